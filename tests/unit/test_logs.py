"""`clipdist logs` finds what jobs and ranks of a run said."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clipdist.cli import main
from clipdist.cluster.logs import find_log, listed, note_output
from clipdist.errors import UserError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """One that a job was started for twice, the second time anew after a crash."""
    run = tmp_path / "runs" / "tiny"
    for age, start in enumerate(("12-0-0", "12-0-1", "9-0-0")):
        folder = run / "logs" / start
        folder.mkdir(parents=True)
        for rank in range(3):
            (folder / f"rank-{rank}.log").write_text(f"rank {rank} of {start}\n")
        os.utime(folder, (1e9 - age, 1e9 - age))
    return run


def test_a_jobs_output(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no job of it has left its output anywhere"):
        find_log(run)
    for name in ("first", "second", "first"):
        (tmp_path / name).write_text("".join(f"{name} line {number}\n" for number in range(100)))
        note_output(run, str(tmp_path / name))
    assert find_log(run) == tmp_path / "first", "which a job has gone on with"
    assert main(["logs", str(run), "-n", "2"]) == 0
    assert capsys.readouterr().out == f"== {tmp_path / 'first'}\nfirst line 98\nfirst line 99\n"
    assert listed(run)[:2] == [str(tmp_path / "second"), str(tmp_path / "first")]
    (tmp_path / "first").unlink()
    assert main(["logs", str(run)]) == 2
    assert "cannot be read (No such file or directory)" in capsys.readouterr().err


def test_words_that_make_no_sense(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        ((run, "-n", -5), "--lines: found -5"),
        ((run, "--start", "12-0-0"), "add --rank R"),
        ((tmp_path / "none", "--list"), "no run there"),
    ):
        assert main(["logs", *map(str, words)]) == 2
        assert said in capsys.readouterr().err


def test_one_rank(run: Path) -> None:
    assert find_log(run, 2) == run / "logs" / "12-0-0" / "rank-2.log", "of the latest start"
    assert find_log(run, 0, "12-0-1") == run / "logs" / "12-0-1" / "rank-0.log"
    with pytest.raises(UserError, match="no rank 3 there; there are: 0, 1, 2"):
        find_log(run, 3)
    with pytest.raises(UserError, match="no start 12-7-0; there are: 9-0-0, 12-0-1, 12-0-0"):
        find_log(run, 0, "12-7-0")


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run there; expected runs/<name>"):
        find_log(tmp_path / "nothing")
    (tmp_path / "new").mkdir()
    with pytest.raises(UserError, match="none: they are kept when a start has ended"):
        find_log(tmp_path / "new", 0)


def test_what_is_added_follows(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.write_text("one\n")
    note_output(run, str(output))
    command = [sys.executable, "-m", "clipdist.cli", "logs", str(run), "--follow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("== ")
        assert process.stdout.readline() == "one\n"
        with open(output, "a") as file:
            file.write("two\n")
        began = time.monotonic()
        assert process.stdout.readline() == "two\n"
        assert time.monotonic() - began < 30
        process.terminate()
