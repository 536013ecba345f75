"""The two towers: any timm image model and any Hugging Face text encoder, each giving one vector per input.

b = rows, T = tokens, C = width of a tower's output.
"""

import importlib.util
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
import torch
import transformers
from pydantic import Field, PositiveInt
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from clipdist.data.images.geometry import ResizeMode
from clipdist.errors import UserError
from clipdist.model.rename import rename_lite0_keys
from clipdist.settings import field, settings

Pooling = Literal["mean", "cls", "last", "max"]


@settings
class ImageTowerConfig:
    name: str = "timm:vit_base_patch16_224"
    """`timm:<model>`: any image model of timm."""
    pretrained: bool | str = False
    """true: the weights that timm names, from the hub; a file; or `package://<python package>/<path>`."""
    side: PositiveInt = 224
    """Pixels along each side of the input."""
    resize: ResizeMode = "crop"
    """How an image becomes a square. crop: a part of it, in evaluation the middle; squash: all of it, out of
    proportion; pad: all of it, with margins."""
    mean: tuple[float, float, float] | None = None
    """Per channel, pixels scaled to 0..1; by default what the model was made for."""
    std: tuple[float, float, float] | None = None
    """Likewise."""
    options: dict[str, Any] = field(default_factory=dict)
    """Passed to `timm.create_model`, such as drop_path_rate."""
    batch_norm: Literal["global", "frozen"] = "global"
    """global: statistics of the global batch; frozen: the stored ones, usual when fine-tuning on small batches."""
    channels_last: bool = False
    """Memory layout that convolutions prefer on GPUs with mixed precision, and some of them on CPUs. Same maths."""
    patch_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a transformer's patches left out of each training step, drawn anew for each image: nearly as much less
    work (FLIP, Li et al. 2023, arXiv 2212.00794)."""
    checkpoint_activations: bool = False
    """Keeps the inputs of blocks only, and computes the rest a second time in the backward pass: less memory, a third
    more work, same gradients."""
    cache_features: bool = False
    """Keeps the tower's features on disk while it trains nowhere, so that each is computed once."""


@settings
class TextTowerConfig:
    name: str = "hf:bert-base-uncased"
    """`hf:<name or folder>`, `package://<python package>/<folder>`; not pretrained, also a bare type: `hf:bert`."""
    pretrained: bool = True
    """true: weights from the hub, a folder or a package; false: the same architecture from random weights."""
    max_tokens: PositiveInt = 77
    """Captions are cut here. Batches are padded to their longest caption, not to this."""
    pooling: Pooling = "mean"
    """Which token stands for a caption: the mean of all, the first, the last, or the largest of each feature."""
    tokenizer: str = "model"
    """`model`: the text tower's own; `captions`: a WordPiece trained on the training split; or a name or folder."""
    padding: Literal["longest", "max_tokens"] = "longest"
    """max_tokens: every caption is filled up to it, and what fills counts as text, as in SigLIP."""
    vocabulary: PositiveInt = 8192
    """Largest vocabulary of a tokenizer trained on captions."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of the Hugging Face configuration, such as hidden_size or a dropout rate."""
    checkpoint_activations: bool = False
    """As the image tower's."""
    cache_features: bool = False
    """As the image tower's."""

    @property
    def fills(self) -> bool:
        return self.padding == "max_tokens"


def resolve(path: str) -> Path:
    """`package://<python package>/<path>` -> the installed file or folder; any other path as it is."""
    if not path.startswith("package://"):
        return Path(path)
    package, _, inside = path.removeprefix("package://").partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ModuleNotFoundError, ValueError):  # the parent of a dotted name is missing; an empty name
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{path}: the Python package {package!r} is not installed")
    found = Path(next(iter(spec.submodule_search_locations))) / inside
    if not found.exists():
        raise UserError(f"{path}: the package {package!r} has no {inside}")
    return found


def natural_side(name: str) -> int:
    """Pixels along each side of the input that a timm model was made for; 224 where timm does not say."""
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return int(known.input_size[-1]) if known else 224


class ImageTower(nn.Module):
    """A timm model without its classifier: uint8 images [b, 3, H, W] -> features [b, C].

    Normalisation happens here, on the device, so that whoever feeds pixels cannot normalise differently.
    """

    def __init__(self, config: ImageTowerConfig, *, load_pretrained: bool = True) -> None:
        super().__init__()
        kind, _, name = config.name.partition(":")
        if kind != "timm":
            raise UserError(f"model.image.name={config.name!r}: expected timm:<model>")
        from_hub = config.pretrained is True and load_pretrained
        self.model, self.arguments = _create_timm(name, config, from_hub)
        if isinstance(config.pretrained, str) and load_pretrained:
            _load_weights(self.model, resolve(config.pretrained))
        if config.checkpoint_activations:
            _checkpoint_timm(self.model, name)
        natural = resolve_model_data_config(self.model)
        self.side, self.resize, self.batch_norm = config.side, config.resize, config.batch_norm
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.mean: tuple[float, ...] = tuple(config.mean or natural["mean"])
        self.std: tuple[float, ...] = tuple(config.std or natural["std"])
        for key, values in (("_mean", self.mean), ("_std", self.std)):
            self.register_buffer(key, torch.tensor(values).view(1, 3, 1, 1) * 255, persistent=False)
        self.width = self._measure_width(name)

    @torch.no_grad()
    def _measure_width(self, name: str) -> int:
        # timm's attributes for it differ between families; a picture tells the truth.
        self.model.eval()
        try:
            shape = self(torch.zeros(1, 3, self.side, self.side, dtype=torch.uint8)).shape
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UserError(f"model.image.side={self.side}: timm:{name} cannot take it ({first_line(error)})") from None
        self.model.train()
        if len(shape) != 2:
            raise UserError(
                f"timm:{name} gives features of shape {tuple(shape)}, expected [b, C]; choose another tower"
            )
        return int(shape[1])

    def normalise(self, images_b3HW: Tensor) -> Tensor:
        assert isinstance(self._mean, Tensor)
        assert isinstance(self._std, Tensor)
        return (images_b3HW.to(self._mean.dtype) - self._mean) / self._std

    def forward(self, images_b3HW: Tensor) -> Tensor:
        features: Tensor = self.model(self.normalise(images_b3HW).contiguous(memory_format=self.memory_format))
        return features

    def blocks(self) -> list[list[str]]:
        """Names of parameters, block by block from the input to the output, as timm groups them."""
        model: Any = self.model
        grouped = group_with_matcher(model.named_parameters(), model.group_matcher(), reverse=False)
        return [[f"model.{name}" for name in names] for _, names in sorted(grouped.items())]


def _create_timm(name: str, config: ImageTowerConfig, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and what `timm.create_model` needs to make another of its shape."""
    if name not in timm.list_models() and name not in timm.list_pretrained():
        near = timm.list_models(f"*{name.split('_')[0]}*")[:8]
        raise UserError(f"model.image.name: timm has no model {name!r}; near: {', '.join(near) or 'none'}")
    options = {**config.options, "pretrained": pretrained, "num_classes": 0}
    if config.patch_dropout:
        options["patch_drop_rate"] = config.patch_dropout
    try:
        # Transformers need the side when they are built, convolutional towers refuse to hear of it.
        return timm.create_model(name, img_size=config.side, **options), {**config.options, "img_size": config.side}
    except TypeError as error:
        if "img_size" not in str(error):
            raise _wrong_options(name, error) from None
    except (OSError, RuntimeError) as error:
        raise _not_created(name, config, error) from None
    try:
        return timm.create_model(name, **options), dict(config.options)
    except TypeError as error:
        raise _wrong_options(name, error) from None
    except (OSError, RuntimeError) as error:
        raise _not_created(name, config, error) from None


def _wrong_options(name: str, error: TypeError) -> UserError:
    if "patch_drop_rate" in str(error):
        return UserError(f"model.image.patch_dropout: timm:{name} has no patches that can be left out; set it to 0")
    return UserError(f"model.image.options: {error}")


def _not_created(name: str, config: ImageTowerConfig, error: Exception) -> UserError:
    known = str(config.pretrained).lower() if isinstance(config.pretrained, bool) else repr(config.pretrained)
    return UserError(f"model.image.pretrained={known}: timm:{name} cannot be made ({first_line(error)})")


def _checkpoint_timm(model: Any, name: str) -> None:
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        raise UserError(
            f"model.image.checkpoint_activations: timm:{name} cannot; set it to false, or lower train.micro_batch"
        ) from None


def first_line(error: BaseException) -> str:
    """What an exception says, without the pages that some libraries add."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _load_weights(model: nn.Module, path: Path) -> None:
    """Loads every weight of the model from `path`; only a classifier may be left over there."""
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"model.image.pretrained: no file {path}") from None
    except Exception as error:  # each reader has kinds of its own
        raise UserError(f"model.image.pretrained: {path} cannot be read ({first_line(error)})") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict):
        raise UserError(f"model.image.pretrained: {path} holds no dictionary of weights")
    if "_conv_stem.weight" in state:
        state = rename_lite0_keys(state)
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        wrong = str(error).splitlines()[1:]
        raise UserError(
            f"{path}: does not fit this tower: {len(wrong)} weights of another shape ({' '.join(wrong[:1]).strip()})"
        ) from None
    heads = ("classifier", "head", "fc")
    left_over = [key for key in result.unexpected_keys if not key.startswith(heads)]
    if result.missing_keys or left_over:
        missing, extra = ", ".join(result.missing_keys[:3]), ", ".join(left_over[:3])
        raise UserError(
            f"{path}: does not fit this tower: {len(result.missing_keys)} weights missing ({missing}), "
            f"{len(left_over)} unknown ({extra})"
        )


class TextTower(nn.Module):
    """A Hugging Face encoder and a pooling: token ids [b, T] and mask [b, T] -> features [b, C]."""

    def __init__(
        self,
        config: TextTowerConfig,
        *,
        vocabulary: int,
        pad_id: int,
        stored: transformers.PretrainedConfig | None = None,
    ) -> None:
        """`vocabulary` is the tokenizer's size. `stored` rebuilds a saved tower, whatever `config.name` was."""
        super().__init__()
        if stored is not None:
            self.model = _from_config(stored)
        elif config.pretrained:
            self.model = _from_pretrained(config)
            model: Any = self.model
            if vocabulary > model.get_input_embeddings().num_embeddings:
                model.resize_token_embeddings(vocabulary)
        else:
            self.model = _from_config(_new_config(config, vocabulary, pad_id))
        if config.checkpoint_activations:
            _checkpoint_hugging_face(self.model)
        self.pooling: Pooling = config.pooling
        self.hf_config: Any = self.model.config
        self.width = self._measure_width(config.max_tokens)

    @torch.no_grad()
    def _measure_width(self, max_tokens: int) -> int:
        # As long a caption as there may be: some towers have fewer positions than they say, and would fail mid-run.
        token = next(number for number in range(3) if number != self.hf_config.pad_token_id)
        self.model.eval()
        try:
            hidden = self.model(torch.full((1, max_tokens), token)).last_hidden_state
        except (IndexError, RuntimeError) as error:
            raise UserError(
                f"model.text.max_tokens={max_tokens}: the tower cannot take so many ({first_line(error)}); set "
                f"model.text.options.max_position_embeddings or fewer tokens"
            ) from None
        self.model.train()
        return int(hidden.shape[-1])

    def forward(self, token_ids_bT: Tensor, attention_mask_bT: Tensor) -> Tensor:
        hidden_bTC = self.model(input_ids=token_ids_bT, attention_mask=attention_mask_bT).last_hidden_state
        return pool(hidden_bTC, attention_mask_bT, self.pooling)

    def blocks(self) -> list[list[str]]:
        """Names of parameters, block by block from the input to the output: embeddings, each layer, what follows."""
        lists = [(name, part) for name, part in self.model.named_modules() if isinstance(part, nn.ModuleList)]
        prefix, layers = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
        grouped: list[list[str]] = [[] for _ in range(len(layers) + 2)]
        seen_layers = False
        for name, _ in self.model.named_parameters():
            if name.startswith(f"{prefix}."):
                seen_layers = True
                grouped[1 + int(name.removeprefix(f"{prefix}.").split(".")[0])].append(f"model.{name}")
            else:
                grouped[-1 if seen_layers else 0].append(f"model.{name}")
        return [names for names in grouped if names]


def pool(hidden_bTC: Tensor, mask_bT: Tensor, pooling: Pooling) -> Tensor:
    """[b, C]: one vector per caption; padding never counts."""
    if pooling == "cls":
        return hidden_bTC[:, 0]
    if pooling == "last":
        return hidden_bTC[torch.arange(len(mask_bT)), mask_bT.sum(1) - 1]
    if pooling == "max":
        return hidden_bTC.masked_fill(mask_bT[:, :, None] == 0, -torch.inf).amax(1)
    weights_bT1 = mask_bT[:, :, None].to(hidden_bTC.dtype)
    return (hidden_bTC * weights_bT1).sum(1) / weights_bT1.sum(1)


def text_source(config: TextTowerConfig) -> str:
    """What Hugging Face is asked for: a name, a type or a folder."""
    if config.name.startswith("package://"):
        return str(resolve(config.name))
    kind, _, name = config.name.partition(":")
    if kind != "hf" or not name:
        raise UserError(
            f"model.text.name={config.name!r}: expected hf:<name or folder> or package://<package>/<folder>"
        )
    return name


def _from_pretrained(config: TextTowerConfig) -> nn.Module:
    source = text_source(config)
    try:
        loaded = transformers.AutoConfig.from_pretrained(source, **config.options)
        if loaded.model_type in ("clip", "siglip"):  # of a dual encoder, the text tower alone
            loaded = type(loaded.text_config).from_pretrained(source, **config.options)
        _check_options(config, loaded)
        # Published in half precision or not: what is trained is float32.
        return _auto_model(loaded).from_pretrained(source, config=loaded, dtype=torch.float32)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"model.text.name={config.name!r}: cannot be loaded ({first_line(error)})") from None


def _check_options(config: TextTowerConfig, made: transformers.PretrainedConfig) -> None:
    known = {*type(made)().to_dict(), *made.attribute_map}
    unknown = [key for key in config.options if key not in known]
    if unknown:
        raise UserError(f"model.text.options: {made.model_type} has no {', '.join(unknown)}")


def _checkpoint_hugging_face(model: Any) -> None:
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"model.text.checkpoint_activations: {model.config.model_type} cannot; set it to false, or lower "
            f"train.micro_batch instead"
        )
    words = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=words)
    else:  # of earlier transformers; the later ones are to lose it with version 6
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=words)


def _auto_model(config: transformers.PretrainedConfig) -> Any:
    """The encoder alone of what has a decoder, too. A T5 encoder's own configuration no longer says that it had one."""
    if config.model_type == "siglip_text_model":
        # The one encoder that transformers does not know how to find by its configuration.
        transformers.AutoModel.register(type(config), transformers.SiglipTextModel, exist_ok=True)
    both = config.is_encoder_decoder or type(config)().is_encoder_decoder
    return transformers.AutoModelForTextEncoding if both else transformers.AutoModel


def _new_config(config: TextTowerConfig, vocabulary: int, pad_id: int) -> transformers.PretrainedConfig:
    source = text_source(config)
    sizes = {"vocab_size": vocabulary, "pad_token_id": pad_id}
    if source in transformers.CONFIG_MAPPING:
        # Without this, BERT's type starts at the size of the published model: 30,522 words and 512 positions.
        made = transformers.AutoConfig.for_model(source, **{**sizes, **config.options})
    else:
        try:
            made = transformers.AutoConfig.from_pretrained(source, **{**sizes, **config.options})
        except (OSError, ValueError) as error:
            raise UserError(f"model.text.name={config.name!r}: cannot be loaded ({first_line(error)})") from None
    _check_options(config, made)
    positions = getattr(made, "max_position_embeddings", None)
    if positions is not None and positions < config.max_tokens:
        raise UserError(
            f"model.text.max_tokens={config.max_tokens}, but the tower has {positions} positions; "
            f"set model.text.options.max_position_embeddings or fewer tokens"
        )
    return made


def _from_config(config: transformers.PretrainedConfig) -> nn.Module:
    return _auto_model(config).from_config(config, dtype=torch.float32)
