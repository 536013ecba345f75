"""The configuration of a run: defaults < YAML recipe < key=value; validated once, written down, then only that is used.

Each part of the tree stands beside the code that reads it; this module ties them together.
"""

import copy
import difflib
import json
import re
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from clipdist.data.config import DataConfig
from clipdist.data.mixing import order_of
from clipdist.data.order import SampleOrder
from clipdist.data.shards import Split
from clipdist.errors import UserError
from clipdist.loss.contrastive import LossConfig
from clipdist.model.classifier import ClassifyConfig
from clipdist.model.dual_encoder import ModelConfig
from clipdist.settings import field, settings
from clipdist.train.checkpoint import CheckpointConfig
from clipdist.train.config import TrainConfig
from clipdist.train.metrics import LogConfig
from clipdist.train.objective import DEFAULT_MONITOR, IGNORED, EvaluateConfig, Name
from clipdist.train.optim import OptimConfig


@settings
class RunConfig:
    """Everything that defines a run."""

    name: str = ""
    """Name of the run's folder; by default the recipe's file name."""
    runs: str = "runs"
    """Folder that holds the runs."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the order, of every random choice about a sample, of initial weights and of dropout."""
    small: bool = False
    """Applies the recipe's `when_small` section: the same run, shrunk to a smoke test."""
    resume: Literal["auto", "force", "never"] = "auto"
    """auto: go on where the run stopped, unless the recipe changed in what defines the maths; force: go on all the
    same; never: refuse a folder that already holds a run."""
    objective: Name = "contrastive"
    """contrastive: a dual encoder of images and captions; classify: an image tower and a head over the classes of a
    field."""
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    classify: ClassifyConfig = field(default_factory=ClassifyConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name

    def order(self, split: Split) -> SampleOrder:
        """Which samples make up each batch: what training follows and `clipdist plan` prints."""
        return order_of(split, self.data, seed=self.seed, global_batch=self.train.global_batch)


# Keys that may differ when a run goes on: they change where, how fast and how often, never the result.
NOT_MATHS = (
    "name",
    "runs",
    "resume",
    "data.set",  # the set may have moved; its checksums are compared instead
    "data.workers",
    "data.prefetch",
    "data.max_bad_fraction",
    "data.max_bad_in_a_row",
    "data.checksums",
    "data.remote",
    "data.cache_folder",
    "data.cache_gib",
    "model.image.cache_features",
    "model.text.cache_features",
    "loss.backend",
    "train.processes",
    "train.micro_batch",
    "train.compile",
    "train.hang_minutes",
    "evaluate.workers",
    "evaluate.panels",
    "checkpoint",
    "log",
)


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number. PyYAML follows YAML 1.1, which asks for 1.0e-4 and takes the rest for text."""


class _Dumper(yaml.SafeDumper):
    """Puts quotes round a text that `_Loader` would take for a number."""


for _end in (_Loader, _Dumper):
    _end.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def load_config(recipe: Path, overrides: list[str]) -> RunConfig:
    """The validated tree. `overrides` are `key=value` words, dots between levels, values in YAML.

    Raises `UserError` naming file, line and nearest valid key for an unknown key, a wrong type or a syntax error; in
    `when_small` too, whether it applies or not.
    """
    tree, where = _read_recipe(recipe)
    tree.setdefault("name", recipe.stem)
    small = tree.pop("when_small", None) or {}
    if not isinstance(small, dict):
        raise UserError(f"{where['when_small']}: when_small={small!r}: expected keys and values")
    given = [_split_override(word) for word in overrides]

    def resolved(shrunk: bool) -> RunConfig:
        own = copy.deepcopy(tree)
        places = {key: place for key, place in where.items() if key.split(".")[0] != "when_small"}
        if shrunk:
            for key, value in _flatten(small).items():
                _put(own, places, key, value, where.get(f"when_small.{key}", str(recipe)))
        for key, value in given:
            _put(own, places, key, value, "command line")
        _fill_in_published(own)
        return validate(own, places, str(recipe))

    config = resolved(shrunk=False)
    shrunk = resolved(shrunk=True) if small else config
    return shrunk if config.small else config


def _fill_in_published(tree: dict[str, Any]) -> None:
    """Puts what `model.init` stands for below what the tree says itself."""
    model = tree.get("model")
    init = model.get("init") if isinstance(model, dict) else None
    if isinstance(init, str) and init:
        from clipdist.model.published import describe

        described = describe(init)
        if tree.get("objective") == "classify":
            described = {"image": described["image"]}
        tree["model"] = _beneath(described, model)


def _beneath(defaults: Any, own: Any) -> Any:
    if not isinstance(defaults, dict) or not isinstance(own, dict):
        return defaults if own is None else own
    return {**own, **{key: _beneath(value, own.get(key)) for key, value in defaults.items()}}


def read_config(path: Path) -> RunConfig:
    """The tree that a run wrote down in its `config.yaml`."""
    tree, where = _read_recipe(path)
    return validate(tree, where, str(path))


def validate(tree: dict[str, Any], where: dict[str, str], source: str) -> RunConfig:
    """Checks types and names; `where` maps dotted keys to the place that an error should name."""
    tree = _plain(_without_empty_sections(tree, RunConfig))
    try:
        # As JSON, because only there does strict checking take a list for a tuple. Strict: 2.0 is no whole number,
        # and true is none either.
        config = TypeAdapter(RunConfig).validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        raise UserError("\n".join(_explain(error, tree, where, source))) from None
    if config.data.set and config.data.mix:
        raise UserError(f"{where.get('data.mix', source)}: data.set and data.mix: expected one of them, found both")
    if not config.data.set and not config.data.mix:
        raise UserError(f"{where.get('data', source)}: data.set is missing and has no default")
    if not config.evaluate.monitor:
        config = replace(config, evaluate=replace(config.evaluate, monitor=DEFAULT_MONITOR[config.objective]))
    return config


def to_yaml(config: RunConfig) -> str:
    """The resolved tree but for what the objective does not read; `load_config` on it gives the same tree."""
    tree = plain(config)
    for key in IGNORED[config.objective]:
        *parents, last = key.split(".")
        section = tree
        for name in parents:
            section = section[name]
        del section[last]
    return dump(tree)


def plain(config: RunConfig) -> dict[str, Any]:
    """The resolved tree as what JSON can hold; `validate` makes the same configuration of it."""
    tree: dict[str, Any] = _plain(asdict(config))
    return tree


def dump(value: Any) -> str:
    """Plain values as YAML that `read_yaml` reads as the same."""
    return yaml.dump(_plain(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises `UserError` for what holds none."""
    return _read_recipe(path)[0]


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Keys that define the maths and differ, as `key: old → new`."""
    before, after = _compared(old), _compared(new)
    keys = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    keys = [key for key in keys if not any(key == free or key.startswith(f"{free}.") for free in NOT_MATHS)]
    return [f"{key}: {before.get(key)} → {after.get(key)}" for key in keys]


def _compared(config: RunConfig) -> dict[str, Any]:
    """`flat`, with a mixture's sets by name, since each may have moved as `data.set` may."""
    mix = [f"{entry.called}: {entry.weight}" for entry in config.data.mix]
    return {**flat(config), "data.mix": mix}


def flat(config: RunConfig) -> dict[str, Any]:
    """Dotted keys -> plain values, for a table of hyper-parameters."""
    return _flatten(_plain(asdict(config)))


def _read_recipe(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tree of a YAML file, and for each dotted key the `file:line` where it stands."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"recipe {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path}: cannot be read ({error})") from None
    try:
        node = yaml.compose(text, _Loader)
        tree = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # control characters; the 30th of February
        raise UserError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict) or not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: expected keys and values, found {'nothing' if tree is None else repr(tree)[:80]}")
    where: dict[str, str] = {}
    _note_lines(node, "", path, where)
    return tree, where


def _note_lines(node: yaml.Node, prefix: str, path: Path, where: dict[str, str]) -> None:
    children: list[tuple[str, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(str(number), value, value) for number, value in enumerate(node.value)]
    for name, mark, value in children:
        key = f"{prefix}.{name}" if prefix else name
        line = mark.start_mark.line + 1
        if key in where and isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}:{line}: {key} stands here a second time")
        where[key] = f"{path}:{line}"
        _note_lines(value, key, path, where)


def _split_override(word: str) -> tuple[str, Any]:
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise UserError(f"{word!r}: expected key=value, such as train.epochs=5")
    try:
        return key, yaml.load(value, _Loader)
    except (yaml.YAMLError, ValueError):
        raise UserError(f"{word!r}: the value is not valid YAML; quote it") from None


def _put(tree: dict[str, Any], where: dict[str, str], key: str, value: Any, source: str) -> None:
    """Sets a dotted key and notes that its value, and all below it, comes from `source`."""
    *parents, last = key.split(".")
    prefix = ""
    for name in parents:
        prefix = f"{prefix}.{name}" if prefix else name
        where.setdefault(prefix, source)
        if tree.get(name) is None:
            tree[name] = {}
        tree = tree[name]
        if not isinstance(tree, dict):
            raise UserError(f"{source}: {key}: {prefix} is {tree!r}, not a section with keys below it")
    tree[last] = value
    for below in [known for known in where if known.startswith(f"{key}.")]:
        del where[below]
    where[key] = source


def _without_empty_sections(tree: dict[str, Any], kind: Any) -> dict[str, Any]:
    """A section whose lines are all commented out is YAML's null; here it holds its defaults."""
    hints = get_type_hints(kind)
    return {
        name: _without_empty_sections(value or {}, hints[name])
        if is_dataclass(hints.get(name)) and (value is None or isinstance(value, dict))
        else value
        for name, value in tree.items()
    }


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _plain(value: Any) -> Any:
    """What JSON can hold: keys are text, and so is what YAML reads as a date."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _explain(error: ValidationError, tree: dict[str, Any], where: dict[str, str], source: str) -> list[str]:
    """One line per fault. The alternatives of a union, each of which pydantic reports, make one line."""
    lines: list[str] = []
    wrong: dict[str, tuple[str, list[str]]] = {}
    for fault in error.errors():
        place = list(fault["loc"])
        origin = next((where[key] for key in _prefixes(place) if key in where), source)
        key = ".".join(map(str, place))
        if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            lines.append(f"{origin}: unknown key {key}; {_hint(place)}")
        elif fault["type"] in ("missing", "missing_argument") and isinstance(place[-1], str):
            lines.append(f"{origin}: {key} is missing and has no default")
        else:
            # Below the last key of the tree stand names of a union's alternatives, and items that a list lacks.
            found: Any = tree
            depth = 0
            for part in place:
                inside = part in found if isinstance(found, dict) else isinstance(part, int) and _has(found, part)
                if not inside:
                    break
                found, depth = found[part], depth + 1
            key = ".".join(map(str, place[:depth]))
            message = "Too few values" if fault["type"] == "missing" else fault["msg"]
            wrong.setdefault(key, (f"{origin}: {key}={found!r}", []))[1].append(message)
    lines += [f"{start}: {' or '.join(dict.fromkeys(messages))}" for start, messages in wrong.values()]
    return list(dict.fromkeys(lines))


def _has(items: Any, number: int) -> bool:
    return isinstance(items, list) and number < len(items)


def _prefixes(place: list[str | int]) -> list[str]:
    """Dotted keys from the whole place up to its first part."""
    return [".".join(map(str, place[:n])) for n in range(len(place), 0, -1)]


def _hint(place: list[str | int]) -> str:
    """What to write instead of an unknown key: its likeliest spelling here, or where else a key of that name stands."""
    last, valid, everywhere = str(place[-1]), _valid_keys(place[:-1]), _all_keys(RunConfig)
    near = difflib.get_close_matches(last, valid, 1, 0.6) or [key for key in everywhere if key.endswith(f".{last}")]
    if not near and len(place) == 1:
        near = difflib.get_close_matches(last, everywhere, 1, 0.6)
    return f"did you mean {near[0]}?" if near else f"valid here: {', '.join(valid)}"


def _valid_keys(place: list[str | int]) -> list[str]:
    kind: Any = RunConfig
    for name in place:
        if is_dataclass(kind):
            kind = get_type_hints(kind).get(str(name))
        elif get_origin(kind) is tuple:
            kind = get_args(kind)[0]
    return [f.name for f in fields(kind)] if is_dataclass(kind) else []


def _all_keys(kind: Any, prefix: str = "") -> list[str]:
    keys = []
    for name, below in get_type_hints(kind).items():
        keys += _all_keys(below, f"{prefix}{name}.") if is_dataclass(below) else [f"{prefix}{name}"]
    return keys
