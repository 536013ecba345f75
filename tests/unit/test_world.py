"""How many processes were asked for, and how many there are."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from clipdist import world
from clipdist.errors import UserError


class FakeProcess:
    """A process with the given command lines above it, nearest first; None for one that must not be read."""

    def __init__(self, *above: list[str] | None) -> None:
        self.above = above

    def parents(self) -> list["FakeParent"]:
        return [FakeParent(words) for words in self.above]


class FakeParent:
    def __init__(self, words: list[str] | None) -> None:
        self.words = words

    def cmdline(self) -> list[str]:
        if self.words is None:
            raise psutil.AccessDenied
        return self.words


def asked(monkeypatch: pytest.MonkeyPatch, *above: str | None) -> int:
    process = FakeProcess(*[None if words is None else words.split() for words in above])
    monkeypatch.setattr(psutil, "Process", lambda: process)
    return world.asked_processes()


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("/v/bin/python /v/bin/accelerate launch --num_processes 2 -m clipdist.train r.yaml", 2),
        ("/v/bin/python /v/bin/accelerate launch --num_processes=12 train.py", 12),
        ("/v/bin/python /v/bin/accelerate launch --num-processes 3 train.py", 3),
        ("/v/bin/python -u /v/bin/accelerate launch --cpu --num_processes 4 train.py", 4),
        ("python /v/bin/accelerate-launch --num_processes 5 train.py", 5),
        ("python -m accelerate.commands.launch --num_processes 6 train.py", 6),
        ("python -m accelerate.commands.accelerate_cli launch --num_processes 7 train.py", 7),
        ("accelerate launch --num_processes 8 train.py --num_processes 9", 8),
        ("accelerate launch train.py", 0),
        ("accelerate launch --num_processes many train.py", 0),
        ("accelerate config --num_processes 2", 0),
        ("python launch.py --num_processes 2", 0),
        ("bash -c accelerated --launch --num_processes 2", 0),
        ("", 0),
    ],
)
def test_asked_processes_reads_the_launchers_command_line(
    line: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asked(monkeypatch, line) == number
    assert asked(monkeypatch, "bash -c x", line) == number, "a shell may stand between"
    assert asked(monkeypatch, None, line) == number, "a process that may not be read is passed over"
    assert asked(monkeypatch, "a", "b", "c", line) == 0, "what is further up launched something else"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("num_processes: 3\n", 3),
        ("num_machines: 1\n", 0),
        ("num_processes:\n", 0),
        ("num_processes: many\n", 0),
        ("- 1\n", 0),
        ("[\n", 0),
        ("", 0),
    ],
)
def test_asked_processes_reads_the_launchers_configuration(
    text: str, number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "cpu.yaml"
    config.write_text(text, encoding="utf-8")
    assert asked(monkeypatch, f"accelerate launch --config_file {config} -m clipdist.train") == number
    assert asked(monkeypatch, f"accelerate launch --config_file={config} --num_processes 2 -m x") == 2


def test_asked_processes_without_a_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert asked(monkeypatch) == 0
    assert asked(monkeypatch, f"accelerate launch --config_file {tmp_path / 'none.yaml'} x") == 0

    class Gone:
        def parents(self) -> list[FakeParent]:
            raise psutil.NoSuchProcess(1)

    monkeypatch.setattr(psutil, "Process", Gone)
    assert world.asked_processes() == 0


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--a", "1", "--b=2", "--c-d", "3"], {"a": "1", "b": "2", "c_d": "3"}),
        (["--a=", "x"], {"a": ""}),
        (["--a=b=c"], {"a": "b=c"}),
        (["x", "--last"], {"last": ""}),
        (["--a", "1", "--a", "2"], {"a": "1"}),
        ([], {}),
    ],
)
def test_options(words: list[str], found: dict[str, str]) -> None:
    assert world._options(words) == found


def alone(monkeypatch: pytest.MonkeyPatch, world_size: str | None = None, asked_for: int = 0) -> None:
    """This process without a group; what the environment and the launcher say."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    if world_size:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setattr(world, "asked_processes", lambda: asked_for)


def test_check_size_of_one_process_that_nobody_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    alone(monkeypatch)
    assert world.check_size() == world.check_size(1) == world.World(0, 1, 0)
    assert world.check_size().is_main
    alone(monkeypatch, "1", 1)
    assert world.check_size() == world.World()


def test_check_size_names_what_was_asked_and_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    alone(monkeypatch, asked_for=2)
    with pytest.raises(UserError, match=r"^accelerate launch asks for 2 processes, but 1 are connected\. .*cpu\.yaml"):
        world.check_size()
    alone(monkeypatch, "4")
    with pytest.raises(UserError, match=r"^the launcher's WORLD_SIZE asks for 4 processes, but 1 are connected"):
        world.check_size()
    alone(monkeypatch)
    with pytest.raises(UserError, match=r"^train\.processes=3, but 1 are connected; launch 3 .* train\.processes=0$"):
        world.check_size(3)


def test_announced_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    alone(monkeypatch)
    assert world.announced() == world.World(0, 1, 0)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert world.announced() == world.World(5, 8, 1)
    assert not world.announced().is_main
    assert world.connected() == world.World(), "without a group, this process is alone"


def test_an_error_is_reported_with_its_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone(monkeypatch)
    world.report(UserError("one\ntwo"))
    assert capsys.readouterr() == ("", "clipdist: error: one\nclipdist: error: two\n")
    monkeypatch.setenv("RANK", "3")
    world.report(UserError("one"))
    assert capsys.readouterr() == ("", "clipdist: error: rank 3: one\n")


LEFT = """
import atexit, os
from {module} import end

class Held:
    def __del__(self, write=os.write):
        write(1, b"taken apart\\n")

held = Held()  # until the interpreter takes itself apart, which is when a thread of gloo may abort it
atexit.register(print, "registered")
print("last words", end="")
end(7)
"""


@pytest.mark.parametrize("module", ["clipdist.world", "clipdist.cli"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_ends_without_the_interpreters_own_end(module: str, ranks: int) -> None:
    script = "import clipdist.world" + LEFT.format(module=module)
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": str(ranks)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout == "last wordsregistered\n" + "taken apart\n" * (ranks == 1)
