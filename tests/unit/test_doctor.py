"""The doctor's checks, each made to fail by what it looks for; and what it makes of several nodes."""

import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clipdist.cli import main
from clipdist.cluster.doctor import machine
from clipdist.cluster.doctor import recipe as recipes
from clipdist.cluster.doctor import shared_folder as files
from clipdist.cluster.doctor.bounded import Hung, Work
from clipdist.cluster.doctor.findings import Finding
from clipdist.cluster.doctor.machine import Gpu
from clipdist.cluster.doctor.preflight import Launch, preflight
from clipdist.config import RunConfig, load_config
from clipdist.data.text import Tokenizer
from clipdist.errors import UserError
from clipdist.model.build import build_model
from tests.conftest import TrainedRun, write_shapes

Recipe = Callable[..., Path]
GIB = 1 << 30


def level(findings: list[Finding], name: str) -> str:
    return next(finding.level for finding in findings if finding.name == name)


def says(findings: list[Finding], name: str) -> str:
    return next(finding.says for finding in findings if finding.name == name)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """mounted(options): an empty file system in memory, such as one of a mebibyte: `size=1m`."""
    points: list[Path] = []

    def mount(options: str) -> Path:
        point = tmp_path / f"mount-{len(points)}"
        point.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(point)], capture_output=True)
        if done.returncode:
            pytest.skip("mounting a file system was refused")
        points.append(point)
        return point

    yield mount
    for point in points:
        subprocess.run(["umount", str(point)], check=True)


# Work that may hang


def complain(error: type[Exception]) -> None:
    raise error("three of four")


def test_a_childs_answer_and_its_errors_come_back() -> None:
    assert Work(divmod, 7, 3).result(20) == (2, 1)
    with pytest.raises(UserError, match=r"^three of four$"):
        Work(complain, UserError).result(20)
    with pytest.raises(RuntimeError, match="OSError: three of four"):
        Work(complain, OSError).result(20)
    with pytest.raises(RuntimeError, match="has died"):
        Work(os._exit, 3).result(20)


def test_a_child_that_hangs_is_given_up_and_ended() -> None:
    began = time.monotonic()
    with pytest.raises(Hung, match="no answer within 0 s") as caught:
        Work(time.sleep, 60).result(0.2)
    assert time.monotonic() - began < 10
    pid = int(str(caught.value).split("process ")[1].split()[0])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_file_system_that_hangs_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Opening a pipe that nobody writes to blocks as a dead server does."""
    os.mkfifo(tmp_path / "recipe.yaml")
    monkeypatch.setattr("clipdist.cluster.doctor.preflight.SECONDS", 0.5)
    assert main(["doctor", str(tmp_path / "recipe.yaml")]) == 2
    assert "error  recipe" in (said := capsys.readouterr().out)
    assert "no answer within 0 s" in said
    assert "1 error" in said


# The shared file system


def test_a_good_folder(tmp_path: Path) -> None:
    found = files.probe(tmp_path / "new" / "folder")
    assert len(found.milliseconds) == files.FILES
    assert found.lock == ""
    assert abs(found.clock_ahead) < 1
    assert found.free_bytes > 0
    assert list((tmp_path / "new" / "folder").iterdir()) == [], "nothing stays behind"
    assert files.check_locks("runs", found).level == files.check_clock("runs", found).level == "ok"


def test_folders_that_cannot_be_written(tmp_path: Path, recipe: Recipe, mounted: Callable[[str], Path]) -> None:
    (tmp_path / "file").touch()
    config = load_config(recipe(), [f"runs={tmp_path / 'file' / 'runs'}"])
    found = preflight(config)
    assert level(found, "runs") == "error"
    assert "cannot be written (Not a directory); choose another folder" in says(found, "runs")
    found = preflight(None, shared=mounted("ro"))
    assert "cannot be written (Read-only file system)" in says(found, "shared folder")


def test_a_small_disk(recipe: Recipe, mounted: Callable[[str], Path]) -> None:
    """The tiny model takes about 10 MiB, and the doctor's own files a few pages."""
    found = preflight(load_config(recipe(), [f"runs={mounted('size=1m')}"]))
    assert level(found, "runs: space") == "error"
    assert "the run needs about" in says(found, "runs: space")
    full = mounted("size=64k")
    (full / "ballast").write_bytes(b"x" * 65536)
    assert "No space left on device); free some space" in says(preflight(None, shared=full), "shared folder")
    half = files.check_space("runs", 15 * GIB, 10 * GIB, "all of it")
    assert (half.level, files.check_space("runs", 20 * GIB, 10 * GIB, "all of it").level) == ("warn", "ok")
    scratch = machine.check_scratch(1, [(mounted("size=1m"), 2 << 20), (Path("/nowhere"), 1)])
    assert [finding.level for finding in scratch] == ["warn", "warn"]
    assert "1 MiB free, expected at least 2 MiB" in scratch[0].says


def test_a_slow_folder_and_one_whose_clock_is_off(tmp_path: Path) -> None:
    found = files.probe(tmp_path)
    slow = found._replace(milliseconds=[1.0, 150.0, 200.0])
    assert files.check_speed("runs", slow).level == "warn"
    assert "takes 150 ms" in files.check_speed("runs", slow).says
    ahead = files.check_clock("runs", found._replace(clock_ahead=30.0))
    assert ahead.level == "warn"
    assert "30 s ahead of this machine's" in ahead.says


def test_locks_that_two_processes_get_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system whose locks are for show; and one that has none."""
    monkeypatch.setattr(fcntl, "lockf", lambda file, how: None)
    found = files.probe(tmp_path)
    assert files.check_locks("runs", found).level == "error"
    assert "two processes got the same lock at once" in files.check_locks("runs", found).says

    def none(file: Any, how: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    assert "a lock cannot be taken (No locks available)" in files.check_locks("runs", files.probe(tmp_path)).says


HOLD = """
import sys
from pathlib import Path
from clipdist.train.run_folder import hold
file = hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_run_that_another_process_trains(recipe: Recipe) -> None:
    config = load_config(recipe(), [])
    assert says(preflight(config), "run") == f"nobody trains {config.folder}"
    config.folder.mkdir(parents=True)
    words = [sys.executable, "-c", HOLD, str(config.folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        found = preflight(config)
        assert files.try_lock(config.folder / ".lock") == files.REFUSED, "looking has not given it up"
        other.communicate()
    assert level(found, "run") == "warn"
    assert f"is being trained by process {other.pid} on" in says(found, "run")
    assert level(preflight(config), "run") == "ok"


# The recipe, its model and its pairs


def test_a_recipe_with_a_typo(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(recipe()), "train.epochz=3", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["exit_code"] == 2
    assert found["findings"][0]["name"] == "recipe"
    assert "unknown key train.epochz; did you mean epochs?" in found["findings"][0]["says"]


def test_a_good_recipe_and_machine(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(recipe()), "--processes-per-node", "2", "--cpu"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "tiny: 24 pairs a step, 12 a process" in said
    assert "samples: train 168, val 32; all 5 files are there in the manifest's size" in said
    assert said.endswith("checks, nothing wrong")


@pytest.mark.parametrize(
    ("word", "ranks", "message"),
    [
        ("train.epochs=3", 5, "train.global_batch=24 does not divide by 5 processes"),
        ("train.processes=2", 3, "train.processes=2, but 3 are to be launched"),
        ("train.precision=fp16", 1, "train.precision=fp16 needs a GPU"),
    ],
)
def test_what_training_would_refuse(word: str, ranks: int, message: str, recipe: Recipe) -> None:
    found = preflight(load_config(recipe(), [word]), Launch(ranks))
    assert level(found, "recipe") == "error"
    assert message in says(found, "recipe")


def test_the_models_size_and_the_room_that_it_needs(trained_run: TrainedRun) -> None:
    config = load_config(trained_run.recipe, [])
    found = recipes.model_size(config.model)
    tokenizer = Tokenizer.load(trained_run.folder / "tokenizer", config.model.text.max_tokens)
    built = sum(parameter.numel() for parameter in build_model(config.model, tokenizer, 0).parameters())
    words = config.model.text.vocabulary - len(tokenizer)
    assert found == (built + words * 32, ""), "a tokenizer that is trained may have fewer words"
    taken = files.checkpoint_bytes(trained_run.folder)
    number = len(list((trained_run.folder / "checkpoints").glob("step-*")))
    one = recipes.needed_bytes(config, built) - 2 * 4 * built  # without the best model
    assert taken / number == pytest.approx(one / (config.checkpoint.keep + 1), rel=0.05)


def with_tower(config: RunConfig, tower: str, **changes: Any) -> RunConfig:
    model = replace(config.model, **{tower: replace(getattr(config.model, tower), **changes)})
    return replace(config, model=model)


@pytest.mark.parametrize(
    ("tower", "changes", "expected", "message"),
    [
        ("image", {"name": "timm:convnext_atoo"}, "error", "timm has no model 'convnext_atoo'"),
        ("image", {"pretrained": "package://no_such_package/w.pth"}, "error", "'no_such_package' is not installed"),
        ("image", {"pretrained": "/nowhere/w.pth"}, "error", "no file /nowhere/w.pth"),
        (
            "text",
            {"name": "hf:nobody/no-model", "pretrained": True},
            "warn",
            "hf:nobody/no-model is not on this machine",
        ),
    ],
)
def test_towers_that_cannot_be_had(
    tower: str, changes: dict[str, Any], expected: str, message: str, recipe: Recipe
) -> None:
    found = preflight(with_tower(load_config(recipe(), []), tower, **changes))
    assert (level(found, "model"), message in says(found, "model")) == (expected, True)


def missing(folder: Path) -> None:
    (folder / "train-000001.tar").unlink()


def without_index(folder: Path) -> None:
    (folder / "train-000001.idx").unlink()


def truncated(folder: Path) -> None:
    os.truncate(folder / "val-000000.tar", 1000)


def without_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words", "expected", "message"),
    [
        (
            missing,
            [],
            "error",
            "of 5 shards looked at (5 in all), 1 are not what the manifest says: train-000001.tar: No",
        ),
        (without_index, [], "error", "train-000001.idx: No such file"),
        (truncated, [], "error", "val-000000.tar: 1,000 bytes where the manifest has"),
        (without_manifest, [], "warn", "5 tars without an index, which training makes first"),
        (shutil.rmtree, [], "error", "there is no such folder"),
        (None, ["data.val_split=dev"], "error", "no split 'dev'"),
        (None, ["train.global_batch=4096"], "error", "train.global_batch=4096"),
    ],
)
def test_shard_sets_that_cannot_be_trained_on(
    damage: Callable[[Path], None] | None,
    words: list[str],
    expected: str,
    message: str,
    recipe: Recipe,
    shapes: Path,
    tmp_path: Path,
) -> None:
    copy = shutil.copytree(shapes, tmp_path / "copy")
    if damage:
        damage(copy)
    found = preflight(load_config(recipe(data__set=str(copy)), words))
    assert level(found, "shard set") == expected
    assert message in says(found, "shard set")


def test_of_many_shards_some_are_looked_at(recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    write_shapes(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    one = manifest["splits"]["train"]["shards"][0]
    for number in range(10, 210):
        for suffix in ("tar", "idx"):
            os.link(folder / f"train-000000.{suffix}", folder / f"train-{number:06d}.{suffix}")
        manifest["splits"]["train"]["shards"].append({**one, "file": f"train-{number:06d}.tar"})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    config = load_config(recipe(data__set=str(folder)), [])
    assert "100 of 205 files are there" in recipes.check_data(config).says
    for path in folder.glob("train-0001*.tar"):
        path.unlink()
    with pytest.raises(UserError, match=r"of 100 shards looked at \(205 in all\), \d+ are not .* and \d+ more"):
        recipes.check_data(config)


# The machine

H100, V100 = Gpu("H100", (9, 0), 80 * GIB, 79 * GIB), Gpu("V100", (7, 0), 16 * GIB, 16 * GIB)


@pytest.mark.parametrize(
    ("gpus", "processes", "given", "driver", "cuda", "expected", "message"),
    [
        ([], 1, 0, "", "13.2", "ok", "training is on CPUs"),
        ([], 2, 2, "", "13.2", "error", "the job has 2 GPUs on this node, no NVIDIA driver is loaded"),
        ([], 2, 2, "535.104", "13.2", "error", "needs driver 580 or newer"),
        ([], 2, 0, "535.104", "13.2", "error", "the driver 535.104 is loaded"),
        ([], 2, 0, "535.104", "12.8", "warn", "torch sees no GPU: training would be on CPUs"),
        ([], 2, 2, "535.104", "12.8", "error", "torch sees no GPU: training would be on CPUs"),
        ([], 1, 0, "580.65", None, "warn", "is built without CUDA"),
        ([], 1, 1, "580.65", None, "error", "is built without CUDA"),
        ([H100], 2, 1, "580.65", "13.2", "error", "NCCL refuses two processes on one"),
        ([H100] * 4, 2, 4, "580.65", "13.2", "warn", "2 will be idle"),
        ([H100, V100], 2, 2, "580.65", "13.2", "warn", "expected one kind"),
        ([H100] * 2, 2, 2, "580.65", "13.2", "ok", "2 × H100"),
    ],
)
def test_gpus_against_what_is_asked(
    gpus: list[Gpu], processes: int, given: int, driver: str, cuda: str | None, expected: str, message: str
) -> None:
    found = machine.check_gpus(gpus, processes, given, False, driver, cuda)[0]
    assert (found.level, message in found.says) == (expected, True), found
    assert machine.check_gpus(gpus, processes, given, True, driver, cuda)[0].level == "ok", "--cpu"


def test_a_gpu_that_somebody_else_uses() -> None:
    taken = machine.check_gpus([H100, H100._replace(free_bytes=30 * GIB)], 2, 2, False, "580.65", "13.2")[1]
    assert taken.level == "warn"
    assert taken.says.startswith("GPU 1 has 30.0 GiB of 80.0 GiB free")
    assert machine.check_gpus([H100], 1, 1, False, "580.65", "13.2")[1].level == "ok"


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.14  Release Build  (dvs@host)", "550.54.14"),
        ("nothing of the kind", ""),
    ],
)
def test_the_drivers_version(line: str, version: str, tmp_path: Path) -> None:
    (tmp_path / "version").write_text(f"{line}\nGCC version:  gcc version 12.3.0\n")
    assert machine.driver_version(tmp_path / "version") == version
    assert machine.driver_version(tmp_path / "none") == ""


def test_precision_and_nccl(recipe: Recipe) -> None:
    config = load_config(recipe(), ["train.precision=bf16"])
    assert machine.check_precision(config, [H100, V100], False).level == "warn"
    assert "V100 has no units" in machine.check_precision(config, [H100, V100], False).says
    assert machine.check_precision(config, [H100], False).level == "ok"
    assert machine.check_precision(config, [V100], True).says == "bf16 on CPUs"
    assert machine.check_nccl([H100], 2, False, "").level == "error"
    assert machine.check_nccl([H100], 2, False, "2.27.3").level == "ok"
    assert machine.check_nccl([H100], 1, False, "").level == machine.check_nccl([H100], 2, True, "").level == "ok"


def test_memory_for_the_processes() -> None:
    assert machine.check_memory(9 * GIB, 4, 0, 0).level == "ok"
    little = machine.check_memory(9 * GIB, 4, 2, GIB)
    assert little.level == "warn"
    assert "expected at least 13.0 GiB" in little.says


@contextmanager
def limited(what: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(what)
    resource.setrlimit(what, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "INFINIBAND", tmp_path)
    with limited(resource.RLIMIT_NOFILE, 600), limited(resource.RLIMIT_MEMLOCK, 1 << 16):
        found = machine.check_limits(8, [H100], 2)
        assert [finding.level for finding in found] == ["warn", "warn"]
        assert "600 for a process, expected at least 640" in found[0].says
        assert "InfiniBand" in found[1].says
        assert [finding.level for finding in machine.check_limits(4, [], 2)] == ["ok", "ok"]


def test_names_of_hosts() -> None:
    assert machine.check_host_name("no such host", ()).level == "ok", "alone"
    lost = machine.check_host_name("127.0.0.1", ("127.0.0.1", "no such host"))
    assert (lost.level, "no such host has no address" in lost.says) == ("error", True)
    inward = machine.check_host_name("127.0.0.1", ("127.0.0.1", "192.0.2.7"))
    assert (inward.level, "127.0.0.1 is 127.0.0.1 to itself" in inward.says) == ("error", True)
    assert machine.check_host_name("127.0.0.1", ("127.0.0.1", "127.0.0.2")).level == "warn"
    assert machine.check_host_name("192.0.2.7", ("192.0.2.7", "192.0.2.8")).level == "ok"
