"""The objective of a classifier: cross-entropy over the classes of a field.

b = rows on this rank, n = rows of a micro-batch, K = classes.

The loss is a mean over rows. So gradients of micro-batches add up, nothing is embedded twice, and the mean over ranks,
which have equally many rows, is that of the global batch.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clipdist import world
from clipdist.data.caching import open_cache
from clipdist.data.images.geometry import ResizeMode
from clipdist.data.labelled import LabelledRows
from clipdist.data.labels import Labels, check_known, read_labels
from clipdist.data.loader import Batch
from clipdist.data.order import SampleOrder
from clipdist.data.rows import TrainRows
from clipdist.data.shards import Split
from clipdist.errors import UserError, disk_errors
from clipdist.evaluate.classifier import Classified, predict_split
from clipdist.model.build import build_classifier
from clipdist.model.classifier import Classifier
from clipdist.model.saved_classifier import LABELS, save_classifier
from clipdist.model.tower_model import TowerModel
from clipdist.train.engine import Engine
from clipdist.train.objective import Objective, Step, Validation
from clipdist.train.run_folder import RunFolder

if TYPE_CHECKING:
    from clipdist.config import RunConfig


class Classify(Objective):
    what = "images"
    absent_parts = ("text tower", "gather")
    labels: Labels

    def __init__(self, config: "RunConfig", order: SampleOrder) -> None:
        super().__init__(config, order)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=config.classify.label_smoothing)

    def prepare(self, folder: RunFolder, split: Split, val_split: Split | None) -> None:
        kept = folder.path / LABELS

        def make() -> None:
            labels = read_labels(split, self.config.classify.label)
            split.let_go()
            if val_split is not None:
                check_known(labels, val_split)
                val_split.let_go()
            with disk_errors(kept):
                labels.save(kept)

        self._make_once(folder, kept, make)
        self.labels = Labels.load(kept)
        monitor, K = self.config.evaluate.monitor, len(self.labels)
        if monitor == "val/top5" and K <= 5:
            raise UserError(f"evaluate.monitor={monitor}: five of {K} classes always hold the right one; set val/top1")

    def build(self) -> Classifier:
        return build_classifier(self.config.model, self.config.classify, len(self.labels), self.config.seed)

    def rows(self, split: Split, *, side: int, resize: ResizeMode) -> TrainRows:
        data, labels = self.config.data, self.labels
        cache = open_cache(data, split, labels, side) if data.cache == "decoded" else None
        return LabelledRows(split, self.order, data, side=side, resize=resize, labels=labels, cache=cache)

    def gradient(self, engine: Engine, batch: Batch, micro_batch: int, seed: Callable[[int], None]) -> Step:
        assert batch.group_b is not None
        told_2 = torch.zeros(2, dtype=torch.float64, device=batch.group_b.device)  # loss, rows that are right
        parts = list(zip(batch.images_b3HW.split(micro_batch), batch.group_b.split(micro_batch), strict=True))
        for number, (images_n3HW, label_n) in enumerate(parts):
            seed(number)
            with engine.accumulating(last=number == len(parts) - 1):
                logits_nK: Tensor = engine.forward((images_n3HW,))
                loss = self.criterion(logits_nK, label_n) * (len(label_n) / len(batch))
                engine.backward(loss)
            told_2 += torch.stack([loss.detach().double(), (logits_nK.argmax(1) == label_n).sum().double()])
        loss_sum, right = world.sum_over_ranks(told_2, "other").tolist()
        return Step(loss_sum / world.connected().world_size, {"train/top1": right / self.order.global_batch})

    def validate(self, engine: Engine, split: Split) -> Validation | None:
        assert isinstance(engine.model, Classifier)
        found = predict_split(engine.model, split, **self._reading(engine))
        if not engine.accelerator.is_main_process:
            return None
        label_N = self.labels.of(found.keys, found.fields, f"{split.folder}, split {split.name!r}")
        classified = Classified(found.logits_NK, label_N, self.labels, bootstrap=0)

        def scores() -> dict[str, Any]:
            """With the temperature, which takes a while to fit, and which only a model that is kept needs."""
            return classified.body(classified.fitted(split.name))

        return Validation(classified.values(), scores, {"val/confidence": classified.confidence_N})

    def save(
        self, folder: Path, model: TowerModel, weights: dict[str, Tensor], scores: dict[str, Any], about: dict[str, Any]
    ) -> None:
        assert isinstance(model, Classifier)
        save_classifier(folder, model, self.labels, self.config.classify, scores=scores, about=about, weights=weights)

    def timed(self, model: TowerModel) -> list[tuple[Any, str, str]]:
        return [(model, "logits", "image tower"), (self, "criterion", "loss")]

    def describe(self, record: Mapping[str, Any]) -> str:
        return f"top-1 {record['train/top1']:.3f}"

    def describe_validation(self, values: Mapping[str, float]) -> str:
        top5 = f" top-5 {values['val/top5']:.3f}" if "val/top5" in values else ""
        return (
            f"loss {values['val/loss']:.4f}, {values['val/images']:,.0f} images of {len(self.labels):,} classes, "
            f"top-1 {values['val/top1']:.3f}{top5} balanced accuracy {values['val/balanced_accuracy']:.3f} "
            f"ECE {values['val/ece']:.3f}"
        )
