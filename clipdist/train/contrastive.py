"""The objective of a dual encoder: an image and its caption near each other, and far from all others of the batch."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from clipdist.data.caching import open_cache
from clipdist.data.images.geometry import ResizeMode
from clipdist.data.loader import Batch
from clipdist.data.order import SampleOrder
from clipdist.data.rows import TrainRows
from clipdist.data.shards import Split, write_atomically
from clipdist.data.text import Tokenizer, captions_of
from clipdist.errors import disk_errors
from clipdist.evaluate.embed import embed_split
from clipdist.loss import ContrastiveLoss
from clipdist.model.build import build_model, build_tokenizer
from clipdist.model.dual_encoder import DualEncoder
from clipdist.model.saved import save_model
from clipdist.model.tower_model import TowerModel
from clipdist.train.collapse import CollapseWatch
from clipdist.train.engine import Engine, Inputs
from clipdist.train.objective import Objective, Step, Validation
from clipdist.train.run_folder import RunFolder
from clipdist.train.step import compute_gradient
from clipdist.train.validate import validate

if TYPE_CHECKING:
    from clipdist.config import RunConfig


class Contrastive(Objective):
    what = "pairs"
    tokenizer: Tokenizer

    def __init__(self, config: "RunConfig", order: SampleOrder) -> None:
        super().__init__(config, order)
        self.criterion = ContrastiveLoss(**asdict(config.loss))
        self.collapse = CollapseWatch(self.criterion, config.train.global_batch, order.steps_per_epoch)

    def prepare(self, folder: RunFolder, split: Split, val_split: Split | None) -> None:
        kept, config = folder.path / "tokenizer", self.config.model
        complete = kept / "complete"

        def make() -> None:
            tokenizer = build_tokenizer(config, captions_of(split))
            split.let_go()
            with disk_errors(kept):
                tokenizer.save(kept)
                write_atomically(complete, b"")

        self._make_once(folder, complete, make)
        self.tokenizer = Tokenizer.load(kept, config.text.max_tokens, config.text.fills)

    def build(self) -> DualEncoder:
        return build_model(self.config.model, self.tokenizer, self.config.seed)

    def rows(self, split: Split, *, side: int, resize: ResizeMode) -> TrainRows:
        data, tokenizer = self.config.data, self.tokenizer
        cache = open_cache(data, split, tokenizer, side) if data.cache == "decoded" else None
        return TrainRows(split, self.order, data, side=side, resize=resize, tokenizer=tokenizer, cache=cache)

    def gradient(self, engine: Engine, batch: Batch, micro_batch: int, seed: Callable[[int], None]) -> Step:
        inputs = Inputs(batch.images_b3HW, batch.token_ids_bT, batch.attention_mask_bT)
        found = compute_gradient(engine, self.criterion, inputs, batch.group_b, micro_batch, seed)
        self.collapse.note(found.loss, found.feature_sums_2D, batch.group_b)
        scale = found.logit_scale
        return Step(found.loss, {"train/logit_scale": scale, "train/temperature": 1 / scale})

    def after_update(self, engine: Engine) -> None:
        if self.config.model.temperature.learned:
            engine.clamp_temperature()

    def measured(self) -> dict[str, float]:
        return self.collapse.measure()

    def warning(self, values: Mapping[str, Any]) -> str | None:
        return self.collapse.judge(dict(values))

    def validate(self, engine: Engine, split: Split) -> Validation | None:
        config = self.config
        assert isinstance(engine.model, DualEncoder)
        embeddings = embed_split(engine.model, self.tokenizer, split, **self._reading(engine))
        scale, bias = engine.temperature()
        if not engine.accelerator.is_main_process:
            return None
        return validate(
            embeddings,
            split,
            groups=config.data.groups,
            kind=config.loss.kind,
            scale=scale,
            bias=bias,
            loss_rows=config.train.global_batch,
            panels=config.evaluate.panels,
            max_pixels=config.data.max_image_pixels,
        )

    def save(
        self, folder: Path, model: TowerModel, weights: dict[str, Tensor], scores: dict[str, Any], about: dict[str, Any]
    ) -> None:
        assert isinstance(model, DualEncoder)
        about = {**about, "groups": self.config.data.groups}
        save_model(folder, model, self.tokenizer, scores=scores, about=about, weights=weights)

    def timed(self, model: TowerModel) -> list[tuple[Any, str, str]]:
        return [
            (model, "encode_image", "image tower"),
            (model, "encode_text", "text tower"),
            (self, "criterion", "loss"),
        ]

    def describe(self, record: Mapping[str, Any]) -> str:
        return f"temperature {record['train/temperature']:.3f}"

    def describe_validation(self, values: Mapping[str, float]) -> str:
        return (
            f"loss {values['val/loss']:.4f}, gallery {values['val/gallery']:,.0f}, "
            f"image→text R@1 {values['val/image_to_text/R@1']:.3f} R@5 {values['val/image_to_text/R@5']:.3f}, "
            f"text→image R@1 {values['val/text_to_image/R@1']:.3f} R@5 {values['val/text_to_image/R@5']:.3f}"
        )
