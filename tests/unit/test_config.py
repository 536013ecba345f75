"""The configuration: what is wrong is named with its place, what is right is read back as it was written."""

from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from clipdist.config import NOT_MATHS, RunConfig, differences, flat, load_config, read_config, to_yaml
from clipdist.errors import UserError

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))

BASE = """\
# comment
data:
  set: somewhere
  augment:
    noise: 2.0
model:
  image: {name: timm:vit_tiny, side: 32}
train:
  global_batch: 8
  epochs: 1
seed: 3
when_small:
  train.epochs: 2
  optim:
    lr: 1e-2
"""


def load(folder: Path, text: str, *overrides: str) -> RunConfig:
    path = folder / "some.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, list(overrides))


def refusal(folder: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the error."""
    with pytest.raises(UserError) as caught:
        load(folder, text, *overrides)
    return str(caught.value).splitlines()


def line_of(text: str, part: str) -> int:
    return 1 + next(number for number, line in enumerate(text.splitlines()) if part in line)


@pytest.mark.parametrize(
    ("right", "wrong", "key", "near"),
    [
        ("seed: 3", "sede: 3", "sede", "seed"),
        ("train:", "trian:", "trian", "train"),
        ("  global_batch", "  globl_batch", "train.globl_batch", "global_batch"),
        ("    noise", "    nose", "data.augment.nose", "noise"),
        ("side: 32", "sied: 32", "model.image.sied", "side"),
        ("seed: 3", "lr: 3", "lr", "optim.lr"),
        ("seed: 3", "train_global_batch: 3", "train_global_batch", "train.global_batch"),
        ("  train.epochs: 2", "  train.epoch: 2", "train.epoch", "epochs"),
    ],
)
def test_an_unknown_key_is_named_with_its_line_and_the_nearest(
    right: str, wrong: str, key: str, near: str, tmp_path: Path
) -> None:
    text = BASE.replace(right, wrong)
    expected = f"{tmp_path / 'some.yaml'}:{line_of(text, wrong)}: unknown key {key}; did you mean {near}?"
    assert expected in refusal(tmp_path, text)


def test_an_unknown_key_like_no_other_lists_the_valid_ones(tmp_path: Path) -> None:
    (line,) = refusal(tmp_path, BASE + "optim: {zzz: 1}\n")
    assert "unknown key optim.zzz; valid here: lr, image_lr_scale, " in line


def test_a_key_of_a_list_item_is_checked(tmp_path: Path) -> None:
    text = BASE.replace("  epochs: 1\n", "  epochs: 1\n  stages:\n    - from_epoch: 0\n      imag: 2\n")
    assert refusal(tmp_path, text) == [
        f"{tmp_path / 'some.yaml'}:{line_of(text, 'imag:')}: unknown key train.stages.0.imag; did you mean image?"
    ]


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("train.epochs=many", "train.epochs='many': Input should be a valid integer"),
        ("train.epochs=2.5", "train.epochs=2.5: Input should be a valid integer"),
        ("train.epochs=true", "train.epochs=True: Input should be a valid integer"),
        ("train.epochs='2'", "train.epochs='2': Input should be a valid integer"),
        ("train.epochs=", "train.epochs=None: Input should be a valid integer"),
        ("train.compile=1", "train.compile=1: Input should be a valid boolean"),
        ("optim.lr=fast", "optim.lr='fast': Input should be a valid number"),
        ("optim.lr=[1]", "optim.lr=[1]: Input should be a valid number"),
        ("name=7", "name=7: Input should be a valid string"),
        ("optim.schedule=cosin", "optim.schedule='cosin': Input should be 'cosine', 'constant' or 'plateau'"),
        ("optim.betas=[0.9]", "optim.betas=[0.9]: Too few values"),
        ("optim.betas=[0.9, 1, 1]", "optim.betas=[0.9, 1, 1]: Tuple should have at most 2 items"),
        ("optim.betas=[0.9, x]", "optim.betas.1='x': Input should be a valid number"),
        ("data.augment=3", "data.augment=3: Input should be an object"),
        (
            "model.image.pretrained=[1]",
            "model.image.pretrained=[1]: Input should be a valid boolean or Input should be a valid string",
        ),
        (
            "train.stages=[{image: some}]",
            "train.stages.0.image='some': Input should be a valid integer or Input should be 'all' or 'none'",
        ),
    ],
)
def test_a_wrong_type_is_one_line_with_its_place(override: str, complaint: str, tmp_path: Path) -> None:
    (line,) = refusal(tmp_path, BASE, override)
    assert line.startswith(f"command line: {complaint}")


def test_a_wrong_type_in_the_recipe_names_its_line(tmp_path: Path) -> None:
    text = BASE.replace("epochs: 1", "epochs: soon").replace("train.epochs: 2", "evaluate.workers: 2")
    assert refusal(tmp_path, text)[0].startswith(f"{tmp_path / 'some.yaml'}:10: train.epochs='soon': ")


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    lines = refusal(tmp_path, BASE.replace("seed: 3", "sede: 3"), "train.epochs=x", "optim.lr=y")
    assert [line.split(": ")[1].split("=")[0] for line in sorted(lines)] == [
        "unknown key sede; did you mean seed?",
        "optim.lr",
        "train.epochs",
    ]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    assert refusal(tmp_path, "train:\n  epochs: 1\n") == [
        f"{path}: data is missing and has no default",
        f"{path}:1: train.global_batch is missing and has no default",
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (BASE + "seed: 4\n", ":16: seed stands here a second time"),
        (BASE.replace("  epochs: 1\n", "  epochs: 1\n  epochs: 1\n"), ":11: train.epochs stands here a second time"),
        (BASE + "train.epochs: 5\n", ":16: train.epochs stands here a second time"),
        (BASE + "  : [\n", ":16: not valid YAML: "),
        ("data: [\n", ":2: not valid YAML: "),
        ("data: x\n\ttrain: 1\n", ":2: not valid YAML: "),
        ("data: \x01\n", ": not valid YAML: unacceptable character"),
        ("day: 2026-02-30\n", ": not valid YAML: day is out of range"),
        ("", ": expected keys and values, found nothing"),
        ("- 1\n", ": expected keys and values, found [1]"),
        ("word\n", ": expected keys and values, found 'word'"),
        (BASE.replace("when_small:", "when_small: 3\nloss:"), ":12: when_small=3: expected keys and values"),
    ],
)
def test_a_file_that_is_no_recipe(text: str, complaint: str, tmp_path: Path) -> None:
    (line,) = refusal(tmp_path, text)
    assert line.startswith(f"{tmp_path / 'some.yaml'}{complaint}")


def test_a_recipe_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe .*none\.yaml: there is no such file$"):
        load_config(tmp_path / "none.yaml", [])
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path, [])
    (tmp_path / "picture.yaml").write_bytes(b"\x89PNG\xff")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path / "picture.yaml", [])


def test_overrides_are_yaml_and_the_last_one_counts(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        BASE,
        "optim.lr=1e-4",
        "optim.eps=2.5E-7",
        "optim.betas=[0.8, 0.9]",
        "log.tensorboard=false",
        "train.epochs=4",
        "train.epochs=5",
        "data.augment.noise=1",
        "model.image.mean=null",
        "model.image.pretrained=weights.pt",
        "model.text.options={layer_norm_eps: 1e-12, hidden_size: 32, flag: true, word: 1e-x}",
        "train.stages=[{from_epoch: 0, image: none}, {from_epoch: 1, image: 3}]",
        "loss.tile=",
    )
    assert (config.optim.lr, config.optim.eps, config.optim.betas) == (1e-4, 2.5e-7, (0.8, 0.9))
    assert config.log.tensorboard is False
    assert config.train.epochs == 5
    assert config.data.augment.noise == 1.0
    assert isinstance(config.data.augment.noise, float)
    assert config.model.image.mean is None
    assert config.model.image.pretrained == "weights.pt"
    assert config.model.text.options == {"layer_norm_eps": 1e-12, "hidden_size": 32, "flag": True, "word": "1e-x"}
    assert [stage.image for stage in config.train.stages] == ["none", 3]
    assert (config.data.set, config.seed, config.name) == ("somewhere", 3, "some"), "the rest is the recipe's"


def test_an_override_of_a_section_replaces_it(tmp_path: Path) -> None:
    (line,) = refusal(tmp_path, BASE, "train={epochs: x, global_batch: 4}")
    assert line.startswith("command line: train.epochs='x': "), "not the recipe's line"
    assert load(tmp_path, BASE, "train={epochs: 7, global_batch: 4}").train.epochs == 7


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("seed.x=1", "command line: seed.x: seed is 3, not a section with keys below it"),
        ("model.image.side.x=1", "command line: model.image.side.x: model.image.side is 32, not a section"),
        ("trian.epochs=1", "command line: unknown key trian; did you mean train?"),
        ("train.epoch=1", "command line: unknown key train.epoch; did you mean epochs?"),
        ("model.txt.max_tokens=1", "command line: unknown key model.txt; did you mean text?"),
        ("when_small.train.epochs=1", "command line: unknown key when_small; "),
        ("train.epochs", "'train.epochs': expected key=value"),
        ("=3", "'=3': expected key=value"),
        ("train.epochs=[", "'train.epochs=[': the value is not valid YAML"),
        ("name=2026-02-30", "'name=2026-02-30': the value is not valid YAML"),
    ],
)
def test_an_override_that_fits_nowhere(override: str, complaint: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, BASE, override)[0].startswith(complaint)


def test_an_empty_section_holds_its_defaults(tmp_path: Path) -> None:
    """All its lines commented out, as one does while trying things."""
    text = BASE.replace("    noise: 2.0\n", "").replace("seed: 3\n", "seed: 3\nevaluate:\n  # workers: 0\n")
    assert load(tmp_path, text) == load(tmp_path, text.replace("evaluate:\n", "").replace("  augment:\n", ""))
    assert load(tmp_path, text, "evaluate.workers=1", "data.augment.blur=0.5").evaluate.workers == 1
    assert refusal(tmp_path, text.replace("  set: somewhere\n  augment:\n", "")) == [
        f"{tmp_path / 'some.yaml'}:2: data.set is missing and has no default"
    ]


def test_when_small_applies_only_when_asked_for(tmp_path: Path) -> None:
    whole, small = load(tmp_path, BASE), load(tmp_path, BASE, "small=true")
    assert (whole.small, whole.train.epochs, whole.optim.lr) == (False, 1, 5e-4)
    assert (small.small, small.train.epochs, small.optim.lr) == (True, 2, 1e-2)
    assert load(tmp_path, BASE, "small=true", "small=false") == whole
    assert load(tmp_path, BASE + "small: true\n") == small
    assert load(tmp_path, BASE + "small: true\n", "small=false") == whole
    assert load(tmp_path, BASE, "train.epochs=9", "small=true").train.epochs == 9, "the command line has the last word"


def test_when_small_is_checked_even_when_it_is_not_asked_for(tmp_path: Path) -> None:
    text = BASE.replace("    lr: 1e-2", "    learn: 1e-2")
    expected = f"{tmp_path / 'some.yaml'}:15: unknown key optim.learn; "
    assert refusal(tmp_path, text)[0].startswith(expected)
    assert refusal(tmp_path, text, "small=true")[0].startswith(expected)
    text = BASE.replace("  optim:\n    lr: 1e-2", "  seed.x: 1")
    assert refusal(tmp_path, text) == [
        f"{tmp_path / 'some.yaml'}:14: seed.x: seed is 3, not a section with keys below it"
    ]


OVERRIDES: dict[str, st.SearchStrategy[Any]] = {
    "name": st.sampled_from(["run", "1e-4", "1e5", "2026-01-01", "true", "null", "Größe", "a b", "12", "~", "0x1f"]),
    "seed": st.integers(0, 2**63 - 1),
    "small": st.booleans(),
    "optim.lr": st.floats(0, 1, exclude_min=True) | st.just(1e-300),
    "optim.betas": st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)).map(list),
    "checkpoint.every_minutes": st.sampled_from([0, 1, 0.5, float("inf")]),
    "model.image.mean": st.none() | st.just([0.5, 0.25, 1e-9]),
    "model.image.pretrained": st.booleans() | st.sampled_from(["true", "a/b.pt", "package://p/q"]),
    "model.text.options": st.dictionaries(
        st.sampled_from(["a", "b", "1e3"]),
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    ),
    "train.stages": st.lists(
        st.fixed_dictionaries({"from_epoch": st.integers(0, 9), "image": st.sampled_from(["all", "none", 0, 3])}),
        max_size=3,
    ),
    "model.temperature.bias": st.none() | st.floats(-20, 0),
}


@hypothesis_settings(max_examples=25, deadline=None)
@given(st.fixed_dictionaries({}, optional=OVERRIDES))
def test_the_tree_written_down_is_the_tree_read_back(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("config")
    words = []
    for key, value in values.items():
        text = yaml.safe_dump(value, default_flow_style=True, width=9999).removesuffix("...\n").strip()
        # PyYAML leaves 1e5 bare, since it takes that for text; here it is a number unless quoted.
        words.append(f'{key}="{value}"' if key == "name" else f"{key}={text}")
    config = load(folder, BASE, *words)
    assert config.name == values.get("name", "some")
    written = folder / "config.yaml"
    written.write_text(to_yaml(config), encoding="utf-8")
    assert read_config(written) == config
    assert load_config(written, []) == config, "what a run wrote down is itself a recipe"
    assert differences(config, read_config(written)) == []


def test_only_what_defines_the_maths_counts_as_a_difference(tmp_path: Path) -> None:
    old = load(tmp_path, BASE)
    free = ["name=other", "runs=elsewhere", "resume=force", "data.set=moved", "data.workers=7", "data.prefetch=1"]
    free += ["data.max_bad_fraction=0.5", "data.max_bad_in_a_row=3", "train.processes=2", "train.compile=true"]
    free += ["evaluate.workers=0", "evaluate.panels=0", "checkpoint.keep=9", "log.every_steps=99"]
    assert differences(old, load(tmp_path, BASE, *free)) == []
    changed = load(tmp_path, BASE, *free, "optim.lr=1e-3", "data.augment.noise=3", "optim.betas=[0.9, 0.9]")
    assert differences(old, changed) == [
        "data.augment.noise: 2.0 → 3.0",
        "optim.betas: [0.9, 0.98] → [0.9, 0.9]",
        "optim.lr: 0.0005 → 0.001",
    ]
    assert differences(old, load(tmp_path, BASE, "model.text.options.hidden_size=8"))
    assert differences(old, load(tmp_path, BASE, "data.workers=1", "data.window=1")) == ["data.window: 0 → 1"]


def test_every_key_that_may_differ_exists() -> None:
    for key in NOT_MATHS:
        kind: Any = RunConfig
        for part in key.split("."):
            assert is_dataclass(kind), key
            hints = get_type_hints(kind)
            assert part in hints, key
            kind = hints[part]


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("small", [False, True], ids=["whole", "small"])
def test_a_shipped_recipe_is_valid(path: Path, small: bool, tmp_path: Path) -> None:
    from clipdist.train.trainer import check

    text = path.read_text(encoding="utf-8")
    assert text.startswith("#"), "a recipe's header says what it trains, on what, in what time, to what score"
    config = load_config(path, ["small=true"] if small else [])
    check(config)
    assert config.name == path.stem
    assert "when_small" in yaml.safe_load(text), "every recipe can be run as a smoke test"
    assert all(isinstance(value, bool | int | float | str | list | dict | None) for value in flat(config).values())
    written = tmp_path / "config.yaml"
    written.write_text(to_yaml(config), encoding="utf-8")
    assert read_config(written) == config


def test_the_configuration_cannot_be_changed_afterwards(tmp_path: Path) -> None:
    config = load(tmp_path, BASE)
    with pytest.raises(AttributeError):
        config.train.epochs = 3  # type: ignore[misc]
