"""The configuration of a run: defaults < YAML recipe < key=value; validated once, written down, then only that is used.

Each part of the tree stands beside the code that reads it; this module ties them together.
"""

import difflib
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from clipdist.data.loader import DataConfig
from clipdist.errors import UserError
from clipdist.loss.contrastive import LossConfig
from clipdist.model.dual_encoder import ModelConfig
from clipdist.settings import field, settings
from clipdist.train.checkpoint import CheckpointConfig
from clipdist.train.metrics import LogConfig
from clipdist.train.optim import OptimConfig
from clipdist.train.trainer import TrainConfig
from clipdist.train.validate import EvaluateConfig


@settings
class RunConfig:
    """Everything that defines a run."""

    name: str = ""
    """Name of the run's folder; by default the recipe's file name."""
    runs: str = "runs"
    """Folder that holds the runs."""
    seed: int = 0
    small: bool = False
    """Applies the recipe's `when_small` section: the same run, shrunk to a smoke test."""
    resume: Literal["auto", "force", "never"] = "auto"
    """auto: go on where the run stopped, unless the recipe changed in what defines the maths; force: go on all the
    same; never: refuse a folder that already holds a run."""
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name


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
    "train.processes",
    "train.compile",
    "evaluate.workers",
    "evaluate.panels",
    "checkpoint",
    "log",
)


def load_config(recipe: Path, overrides: list[str]) -> RunConfig:
    """The validated tree. `overrides` are `key=value` words, dots between levels, values in YAML.

    Raises `UserError` naming file, line and nearest valid key for an unknown key, a wrong type or a syntax error.
    """
    tree, where = _read_recipe(recipe)
    small = tree.pop("when_small", {}) or {}
    given = [_split_override(word) for word in overrides]
    if any(key == "small" and value is True for key, value in given):
        for key, value in _flatten(small).items():
            _put(tree, key, value, "when_small")
            where[key] = where.get(f"when_small.{key}", str(recipe))
    for key, value in given:
        _put(tree, key, value, f"{key}=…")
        where[key] = "command line"
    tree.setdefault("name", recipe.stem)
    return validate(tree, where, str(recipe))


def read_config(path: Path) -> RunConfig:
    """The tree that a run wrote down in its `config.yaml`."""
    tree, where = _read_recipe(path)
    return validate(tree, where, str(path))


def validate(tree: dict[str, Any], where: dict[str, str], source: str) -> RunConfig:
    """Checks types and names; `where` maps dotted keys to the place that an error should name."""
    try:
        return TypeAdapter(RunConfig).validate_python(tree)
    except ValidationError as error:
        raise UserError("\n".join(dict.fromkeys(_explain(e, where, source) for e in error.errors()))) from None


def to_yaml(config: RunConfig) -> str:
    """The resolved tree; `load_config` on it gives the same tree."""
    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False, allow_unicode=True)


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Keys that define the maths and differ, as `key: old → new`."""
    before, after = _flatten(_plain(asdict(old))), _flatten(_plain(asdict(new)))
    keys = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    keys = [key for key in keys if not any(key == free or key.startswith(f"{free}.") for free in NOT_MATHS)]
    return [f"{key}: {before.get(key)} → {after.get(key)}" for key in keys]


def flat(config: RunConfig) -> dict[str, Any]:
    """Dotted keys -> plain values, for a table of hyper-parameters."""
    return _flatten(_plain(asdict(config)))


def _read_recipe(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tree of a YAML file, and for each dotted key the `file:line` where it stands."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"recipe {path}: there is no such file") from None
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    if not isinstance(tree, dict) or not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: expected keys and values, found {type(tree).__name__}")
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
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"{word!r}: the value is not valid YAML; quote it") from None


def _put(tree: dict[str, Any], key: str, value: Any, source: str) -> None:
    *parents, last = key.split(".")
    for name in parents:
        below = tree.setdefault(name, {})
        if not isinstance(below, dict):
            raise UserError(f"{source}: {name} is {below!r}, not a section with keys below it")
        tree = below
    tree[last] = value


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _explain(error: Any, where: dict[str, str], source: str) -> str:
    place = [str(part) for part in error["loc"]]
    key = ".".join(place)
    known = next((".".join(place[:n]) for n in range(len(place), 0, -1) if ".".join(place[:n]) in where), None)
    origin = where[known] if known else source
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        valid = _valid_keys(place[:-1])
        near = difflib.get_close_matches(place[-1], valid, 1, 0.5) or difflib.get_close_matches(
            key, _all_keys(RunConfig), 1, 0.5
        )
        hint = f"did you mean {near[0]}?" if near else f"valid here: {', '.join(valid)}"
        return f"{origin}: unknown key {key}; {hint}"
    if error["type"] in ("missing", "missing_argument"):
        return f"{source}: {key} is missing and has no default"
    return f"{origin}: {key}={error.get('input')!r}: {error['msg']}"


def _valid_keys(place: list[str]) -> list[str]:
    kind: Any = RunConfig
    for name in place:
        kind = get_type_hints(kind).get(name) if is_dataclass(kind) else None
        if kind is None:
            return []
    return [f.name for f in fields(kind)] if is_dataclass(kind) else []


def _all_keys(kind: Any, prefix: str = "") -> list[str]:
    keys = []
    for name, below in get_type_hints(kind).items():
        keys += _all_keys(below, f"{prefix}{name}.") if is_dataclass(below) else [f"{prefix}{name}"]
    return keys
