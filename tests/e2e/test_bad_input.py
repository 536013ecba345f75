"""What a user can get wrong: one line that says what to do, exit code 2, no traceback, nothing half-written."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from clipdist import cli
from clipdist.data.sets.writer import UNFINISHED
from clipdist.errors import UserError, disk_errors
from clipdist.train.checkpoint import checkpoint_files, newest_sound, read_checkpoint, save_checkpoint
from tests.conftest import TrainedRun

# what, words of the command, words of the line that answers. In both, {recipe} is a sound recipe and {set} its shard
# set; {tmp} a folder that holds `file`, `unfinished` (shards without a manifest), `damaged` (a torn manifest), and the
# recipes `typo` and `torn`; {model} a trained model.
REFUSALS = [
    ("unknown verb", "trian {recipe}", "no verb 'trian'; one of: pack,"),
    ("no such recipe", "train {tmp}/none.yaml", "recipe {tmp}/none.yaml: there is no such file"),
    ("a folder for a recipe", "train {tmp}", "recipe {tmp}: cannot be read"),
    (
        "typo in the recipe",
        "train {tmp}/typo.yaml",
        "{tmp}/typo.yaml:2: unknown key data.worker; did you mean workers?",
    ),
    ("torn recipe", "train {tmp}/torn.yaml", "{tmp}/torn.yaml:4: not valid YAML"),
    ("unknown override", "train {recipe} train.epoch=3", "command line: unknown key train.epoch; did you mean epochs?"),
    ("no override", "train {recipe} epochs", "'epochs': expected key=value"),
    ("wrong type", "train {recipe} train.epochs=many", "train.epochs='many': Input should be a valid integer"),
    ("no epochs", "train {recipe} train.epochs=0", "train.epochs=0: expected at least 2 and 1"),
    ("logging never", "train {recipe} log.every_steps=0", "log.every_steps=0: Input should be greater than 0"),
    ("validating never", "train {recipe} evaluate.every_epochs=0", "evaluate.every_epochs=0: Input should be greater"),
    ("no checkpoint kept", "train {recipe} checkpoint.keep=0", "checkpoint.keep=0: Input should be greater than 0"),
    ("negative workers", "train {recipe} data.workers=-1", "data.workers=-1: Input should be greater than or equal to"),
    ("negative rate", "train {recipe} optim.lr=-1e-3", "optim.lr=-0.001: Input should be greater than or equal to 0"),
    ("beta of one", "train {recipe} optim.betas=[0.9,1.0]", "optim.betas.1=1.0: Input should be less than 1"),
    ("huge seed", "train {recipe} seed=99999999999999999999", "seed=99999999999999999999: Input should be less than"),
    ("no such set", "train {recipe} data.set={tmp}/none", "shard set {tmp}/none: there is no such folder"),
    ("a file for a set", "train {recipe} data.set={tmp}/file", "shard set {tmp}/file: there is no such folder"),
    (
        "unfinished set",
        "train {recipe} data.set={tmp}/unfinished",
        "{tmp}/unfinished: no manifest.json, so it is unfin",
    ),
    ("damaged set", "train {recipe} data.set={tmp}/damaged", "{tmp}/damaged/manifest.json: damaged"),
    ("unknown split", "train {recipe} data.train_split=trian", "{set}: no split 'trian'; it has 'train', 'val'"),
    ("unknown val split", "train {recipe} data.val_split=dev", "{set}: no split 'dev'; it has 'train', 'val'"),
    ("wrong world size", "train {recipe} train.processes=2", "train.processes=2, but 1 are connected; launch 2"),
    ("batch too large", "train {recipe} train.global_batch=200", "168 samples, fewer than train.global_batch=200; set"),
    ("lanes", "train {recipe} data.lanes=5", "data.lanes=5 must divide train.global_batch=24"),
    ("warm-up", "train {recipe} optim.warmup_steps=21", "optim.warmup_steps=21, but the run has only 21 steps"),
    (
        "stages",
        'train {recipe} train.stages=[{{"from_epoch":1}}]',
        "train.stages: from_epoch is [1], expected to begin",
    ),
    (
        "sigmoid without bias",
        "train {recipe} loss.kind=sigmoid",
        "loss.kind=sigmoid needs a logit bias: set model.temp",
    ),
    ("smoothing", "train {recipe} loss.label_smoothing=1.5", "label_smoothing=1.5"),
    ("half precision on a CPU", "train {recipe} train.precision=fp16", "train.precision=fp16 needs a GPU; without one"),
    ("monitor", "train {recipe} evaluate.monitor=val/R1", "evaluate.monitor='val/R1', expected one of val/loss, "),
    ("a path for a name", "train {recipe} name=../x", "name='../x': expected a plain folder name"),
    ("the folder above for a name", "train {recipe} name=..", "name='..': expected a plain folder name"),
    ("runs below a file", "train {recipe} runs={tmp}/file/runs", "{tmp}/file/runs/tiny: cannot be written (Not a dir"),
    ("runs is a file", "train {recipe} runs={tmp}/file", "{tmp}/file/tiny: cannot be written (Not a directory)"),
    ("plan of a missing set", "plan {recipe} --step 0 data.set={tmp}/none", "{tmp}/none: there is no such folder"),
    ("plan of a negative step", "plan {recipe} --step -1", "--step -1: expected 0 or more"),
    (
        "no such model",
        "eval {tmp}/none --data {set} --split val",
        "{tmp}/none: not a finished model: model.json is miss",
    ),
    ("no set to score", "eval {model} --data {tmp}/none", "shard set {tmp}/none: there is no such folder"),
    ("split to score", "eval {model} --data {set}", "{set}: no split 'test'; it has 'train', 'val'"),
    ("device", "eval {model} --data {set} --split val --device gpu", "device gpu: cannot be used"),
    ("no GPU", "eval {model} --data {set} --split val --device cuda", "device cuda: cannot be used"),
    (
        "calibration without classes",
        "eval {model} --data {set} --calibrate val",
        "--calibrate serves --zero-shot FIELD",
    ),
    (
        "fitted on what is scored",
        "eval {model} --data {set} --split val --zero-shot label --calibrate val",
        "--calibrate val: the split that is scored; expected another one to fit on",
    ),
    (
        "probed on what is scored",
        "eval {model} --data {set} --split train --probe label",
        "--probe-train train: the split that is scored",
    ),
    ("split to fit on", "eval {model} --data {set} --split val --probe label --probe-train x", "{set}: no split 'x'"),
    ("share of labels", "eval {model} --data {set} --split val --fractions 2", "--fractions: found 2.0, expected"),
    ("batch", "eval {model} --data {set} --split val --in-batch 1", "--in-batch: found 1, expected 2 or more"),
    (
        "large batch",
        "eval {model} --data {set} --split val --workers 0 --bootstrap 0 --in-batch 64",
        "batches of 64: found 32 images with a text; expected 2 to that many",
    ),
    (
        "large pool",
        "eval {model} --data {set} --split val --workers 0 --bootstrap 0 --pool 33",
        "a pool of 33: found 32 distinct texts, of which an image's group bears up to 1; expected 2 to 32",
    ),
    (
        "field of classes",
        "eval {model} --data {set} --split val --workers 0 --bootstrap 0 --zero-shot lable",
        "field 'lable': fewer than two classes occur in it",
    ),
    (
        "file of classes",
        "eval {model} --data {set} --split val --zero-shot label --templates {tmp}/x",
        "{tmp}/x: cannot",
    ),
    (
        "field of subgroups",
        "eval {model} --data {set} --split val --workers 0 --bootstrap 0 --by sex",
        "subgroups by 'sex': no sample has it; the fields are: label, unit",
    ),
    ("queries alone", "eval {model} --queries {tmp}/file", "expected one file of candidates for all or one for each"),
    (
        "candidates alone",
        "eval {model} --data {set} --split val --candidates {tmp}/file",
        "--queries: found 0 files, 1",
    ),
    (
        "queries of no table",
        "eval {model} --queries {tmp}/file --candidates {tmp}/file --images {tmp}",
        "{tmp}/file: found the suffix",
    ),
    ("workers", "eval {model} --data {set} --split val --workers -1", "--workers: found -1, expected 0 or more"),
    (
        "groups that no sample has",
        "eval {model} --data {set} --split val --workers 0 --groups lable",
        "groups=lable: 32 of 32 samples, such as shape-",
    ),
    (
        "scores into a file",
        "eval {model} --data {set} --split val --workers 0 --bootstrap 0 --out {tmp}/file/out",
        "--out {tmp}/file/out: {tmp}/file is no folder, or cannot be written; choose another",
    ),
    ("report of nothing", "report {tmp}/none", "{tmp}/none: no such run directory"),
    ("index of nothing", "index {tmp}/none", "{tmp}/none: there is no such folder"),
    ("index without tars", "index {tmp}/empty", "{tmp}/empty: holds no .tar or .tar.zst file"),
    ("pack of nothing", "pack {tmp}/none.csv --out {tmp}/packed", "{tmp}/none.csv"),
]


@pytest.fixture
def names(recipe: Callable[..., Path], shapes: Path, trained_run: TrainedRun, tmp_path: Path) -> dict[str, str]:
    """What stands for {recipe}, {set}, {tmp} and {model}."""
    (tmp_path / "file").write_text("some text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "typo.yaml").write_text("data:\n  worker: 2\n  set: x\ntrain: {global_batch: 8, epochs: 1}\n")
    (tmp_path / "torn.yaml").write_text("data:\n  set: x\ntrain: {global_batch: 8, epochs\n")
    for name in ("unfinished", "damaged"):
        shutil.copytree(shapes, tmp_path / name)
    (tmp_path / "unfinished" / "manifest.json").unlink()
    (tmp_path / "unfinished" / UNFINISHED).touch()  # as an interrupted packing leaves it
    (tmp_path / "damaged" / "manifest.json").write_text('{"format": "clipdist-sh')
    model = str(trained_run.folder / "model")
    return {"recipe": str(recipe()), "set": str(shapes), "tmp": str(tmp_path), "model": model}


def listing(folder: str) -> set[str]:
    return {str(path) for path in Path(folder).rglob("*")}


@pytest.mark.parametrize(("command", "answer"), [case[1:] for case in REFUSALS], ids=[case[0] for case in REFUSALS])
def test_one_line_and_exit_code_2(
    command: str, answer: str, names: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(names["tmp"])
    assert cli.main([word.format(**names) for word in command.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = [line for line in printed.err.splitlines() if not line.startswith("embedding val")]  # what goes on
    assert line.startswith("clipdist: error: ")
    assert answer.format(**names) in line
    assert listing(names["tmp"]) == before, "nothing was written"


def test_nothing_else_is_printed_by_a_process_of_its_own(recipe: Callable[..., Path], tmp_path: Path) -> None:
    words = [sys.executable, "-m", "clipdist.train", str(recipe()), "train.processes=2"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("clipdist: error: train.processes=2, but 1 are connected")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("train",), "the following arguments are required: recipe"),
        (("plan", "r.yaml"), "the following arguments are required: --step"),
        (("plan", "r.yaml", "--step", "three"), "argument --step: invalid int value: 'three'"),
        (("train", "r.yaml", "--print"), "there is no such file"),  # an option may be shortened
        (("train", "r.yaml", "--fast"), "unrecognized arguments: --fast"),
        (("eval", "model"), "nothing to score: expected --data SET, or --queries"),
    ],
)
def test_wrong_options_show_the_usage(words: tuple[str, ...], answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: int | str | None = cli.main(list(words))
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    *usage, line = capsys.readouterr().err.splitlines()
    assert answer in line
    assert all(not word.startswith("Traceback") for word in usage)


def test_a_run_that_is_there_is_respected(
    trained_run: TrainedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(trained_run.folder, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    words = ["train", str(trained_run.recipe), f"runs={tmp_path / 'runs'}"]
    for override, answer in [
        ("resume=never", f"{run}: already holds a run; choose another name, or resume=auto to go on"),
        ("optim.lr=1e-4", "the run there was made with another recipe (optim.lr: 0.005 → 0.0001); choose another name"),
    ]:
        assert cli.main([*words, override]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert answer in line
    environment = json.loads((run / "environment.json").read_text())
    environment["shard_sets"][0]["digest"] = "0123456789abcdef"
    (run / "environment.json").write_text(json.dumps(environment))
    assert cli.main(words) == 2
    assert "has seen another version of" in capsys.readouterr().err
    (run / "environment.json").write_bytes(before[run / "environment.json"])
    # The lock names whoever held it last; all else is as it was.
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"} == before


def test_a_damaged_model_is_named(
    trained_run: TrainedRun, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    for name, answer in [
        ("model.safetensors", "damaged model (SafetensorError"),
        ("model.json", "damaged model (JSONDecodeError"),
        ("scores.json", "damaged model (JSONDecodeError"),
        ("tokenizer/tokenizer.json", "model"),
    ]:
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(trained_run.folder / "model", model)
        (model / name).write_bytes((model / name).read_bytes()[:40])
        assert cli.main(["eval", str(model), "--data", str(shapes), "--split", "val"]) == 2, name
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"clipdist: error: {model}: "), name
        assert answer in line
        (model / name).unlink()
        assert cli.main(["eval", str(model), "--data", str(shapes), "--split", "val"]) == 2, name
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"clipdist: error: {model}: "), name


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: what a full disk is to a writer, without filling one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("large", ["model", "optimizer"])
def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(large: str, tmp_path: Path) -> None:
    sizes = {"model": 10, "optimizer": 10, large: 100_000}
    small, big = torch.ones(10), torch.ones(sizes[large])
    save_checkpoint(tmp_path, 1, checkpoint_files({"w": small}, {"w": {"exp_avg": small}}), {}, keep=2)
    model = {"w": torch.ones(sizes["model"])}
    optimizer = {"w": {"exp_avg": torch.ones(sizes["optimizer"])}}
    with largest_file(50_000), pytest.raises(UserError) as caught:
        save_checkpoint(tmp_path, 2, checkpoint_files(model, optimizer), {}, keep=2)
    assert str(caught.value) == f"{tmp_path}: cannot be written (File too large); free some space and run it again"
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "latest"}, (
        "the torn one gives its space back"
    )
    sound = newest_sound(tmp_path)
    assert sound is not None
    assert torch.equal(read_checkpoint(sound)[0]["w"], small)
    assert save_checkpoint(tmp_path, 2, checkpoint_files(model, optimizer), {}, keep=2).name == "step-00000002"
    weights, moments, _, _ = read_checkpoint(tmp_path / "step-00000002")
    assert torch.equal({"model": weights["w"], "optimizer": moments["w"]["exp_avg"]}[large], big)


def test_what_a_kill_left_of_a_checkpoint_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "step-00000003.partial").mkdir()
    (tmp_path / "step-00000003.partial" / "model.safetensors").write_bytes(b"torn")
    save_checkpoint(tmp_path, 4, checkpoint_files({"w": torch.ones(1)}, {}), {}, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000004", "latest"}


@pytest.mark.usefixtures("signal_handlers")
def test_training_on_a_full_disk_ends_in_one_line(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with largest_file(100_000):
        assert cli.main(["train", str(recipe(train__epochs=1, checkpoint__retry_minutes=0))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    run = tmp_path / "runs" / "tiny"
    assert line.startswith(f"clipdist: error: {run}/")
    assert "cannot be written (File too large); free some space and run it again (tried for 0 min; no ch" in line
    assert not (run / "model").exists()
    assert not (run / "model.partial").exists(), "the torn one gives its space back"


def test_only_errors_of_the_disk_are_reworded(tmp_path: Path) -> None:
    def within(error: Exception) -> None:
        with disk_errors(tmp_path):
            raise error

    for number in (28, 122):  # no space left; quota exceeded
        with pytest.raises(UserError, match=r"cannot be written \(.+\); free some space"):
            within(OSError(number, os.strerror(number)))
    with pytest.raises(UserError, match=r"written \(Read-only file system\); run it again when it can"):
        within(OSError(30, "x"))
    with pytest.raises(FileNotFoundError):
        within(FileNotFoundError(2, "x"))
    with pytest.raises(RuntimeError, match=r"^own$"):
        within(RuntimeError("own"))
    with pytest.raises(UserError, match=r"^said already$"):
        within(UserError("said already"))
