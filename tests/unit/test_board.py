"""TensorBoard of runs: it starts, it shows what they logged, by their names."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest

from clipdist.cli import main
from clipdist.cluster import board_command
from tests.conftest import TrainedRun
from tests.distributed.test_training import column


def asked(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as answer:
        body = answer.read()
    return json.loads(body) if answer.headers.get_content_type() == "application/json" else body


def test_it_answers_and_shows_the_runs(trained_run: TrainedRun, tmp_path: Path) -> None:
    runs = tmp_path / "my runs, all: 2"
    for name in ("one", "two"):
        shutil.copytree(trained_run.folder / "tensorboard", runs / name / "tensorboard")
        (runs / name / "config.yaml").touch()
    (runs / "without").mkdir()
    (runs / "without" / "config.yaml").touch()
    command = [sys.executable, "-m", "clipdist.cli", "board", str(runs)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said: list[str] = []
        while not (said and said[-1].startswith("then open ")):
            line = process.stdout.readline()
            assert line, process.communicate(timeout=20)
            said.append(line.rstrip("\n"))
        url = said[-1].split()[2]
        port = url.rstrip("/").rpartition(":")[2]
        assert said[0] == "2 runs. From another machine:"
        assert url == f"http://127.0.0.1:{port}/"
        assert f"  ssh -N -L {port}:127.0.0.1:{port} {board_command.user()}@{os.uname().nodename}" in said
        assert b"TensorBoard" in asked(url)
        end = time.monotonic() + 60
        while sorted(asked(f"{url}data/runs")) != ["one", "two"]:  # it reads them in a thread of its own
            assert time.monotonic() < end
            time.sleep(0.2)
        losses = column(trained_run.folder, "train/loss")
        while len(shown := asked(f"{url}data/plugin/scalars/scalars?run=two&tag={quote('train/loss')}")) < len(losses):
            assert time.monotonic() < end
            time.sleep(0.2)
        assert {step: value for _, step, value in shown} == pytest.approx(losses)
        assert listening(int(port)) == {"127.0.0.1"}
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
    finally:
        process.kill()
        process.wait()


def listening(port: int) -> set[str]:
    """Addresses of this host at which somebody listens on a port."""
    sockets = psutil.net_connections("tcp")
    return {one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN and one.laddr.port == port}


def test_nothing_to_show_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["board", str(tmp_path)]) == 2
    assert "no run there; expected runs/<name>, or a folder of runs" in capsys.readouterr().err
    (tmp_path / "quiet").mkdir()
    (tmp_path / "quiet" / "config.yaml").touch()
    assert main(["board", str(tmp_path)]) == 2
    assert "quiet: nothing for TensorBoard there; train with log.tensorboard=true" in capsys.readouterr().err


def test_runs_of_one_name_are_told_apart_and_new_ones_follow(tmp_path: Path) -> None:
    shown = tmp_path / "shown"
    shown.mkdir()

    def made(name: str) -> Path:
        (tmp_path / name / "tensorboard").mkdir(parents=True)
        return tmp_path / name

    first = [made("a/tiny"), made("b/tiny"), tmp_path / "a" / "nothing"]
    board_command.show(shown, first)
    board_command.show(shown, [*first, made("c/b/tiny"), made("a/large")])
    links = {link.name: link.readlink() for link in shown.iterdir()}
    assert links == {
        "tiny": tmp_path / "a" / "tiny" / "tensorboard",
        "b-tiny": tmp_path / "b" / "tiny" / "tensorboard",
        "b-tiny-2": tmp_path / "c" / "b" / "tiny" / "tensorboard",
        "large": tmp_path / "a" / "large" / "tensorboard",
    }
