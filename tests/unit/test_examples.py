"""The Python of the documentation runs: every block of README and docs/, page by page, and docstrings' examples."""

import doctest
import importlib
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clipdist.cli import main
from clipdist.data.labels import Labels
from clipdist.model.classifier import Classifier, ClassifyConfig
from clipdist.model.dual_encoder import ModelConfig
from clipdist.model.saved_classifier import save_classifier
from clipdist.model.towers import ImageTower, ImageTowerConfig
from tests.conftest import TrainedRun, picture
from tests.unit.serving import client_of, make_service

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
MODULES = [path for path in (ROOT / "clipdist").rglob("*.py") if ">>> " in path.read_text(encoding="utf-8")]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


WITH_PYTHON = [name for name, page in PAGES.items() if blocks(page)]


@pytest.fixture
def place(trained_run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what pages name: runs, and some photographs."""
    for run in ("phantom", "mine"):
        shutil.copytree(trained_run.folder / "model", tmp_path / "runs" / run / "model")
    image = ImageTower(ImageTowerConfig(name="timm:test_resnet", side=32))
    config = ModelConfig(image=ImageTowerConfig(name="timm:test_resnet", side=32))
    names = ("Eiffel Tower", "Tokyo Tower", "Uluru")
    labels = Labels("landmark", names, (5, 5, 5), tuple({"landmark_id": number} for number in range(3)))
    model = Classifier(config, image, classes=3, dropout=0.0)
    (tmp_path / "runs" / "landmarks").mkdir()
    save_classifier(tmp_path / "runs/landmarks/model", model, labels, ClassifyConfig(), scores={}, about={})
    photographs = (
        "a.jpg",
        "b.jpg",
        "photos/1.jpg",
        "photos/2.jpg",
        "photos/3.jpg",
        "lesions/skincap/1.png",
        "lesion.jpg",
    )
    for number, name in enumerate(photographs):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture("red", "circle", "left", number))
    monkeypatch.chdir(tmp_path)
    gallery = ["embed", "runs/phantom/model", "--data", str(trained_run.shapes), "--out", "runs/phantom/gallery"]
    assert main(gallery) == 0
    return tmp_path


# What a page's commands have made before its Python runs.
BEFORE = {
    "docs/export.md": (
        "export runs/phantom/model --to huggingface --out exported/phantom",
        "export runs/phantom/model --to safetensors --tower image --out exported/tower",
    ),
}


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_python_of_the_documentation_runs(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in BEFORE.get(name, ()):
        assert main(command.split()) == 0
    with answered_by_a_service(monkeypatch):
        run_blocks(name)


@contextmanager
def answered_by_a_service(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`httpx.post`, whether that library is there or not, reaches a service in this process."""
    address = "http://127.0.0.1:8000"
    with client_of(make_service()) as client:

        def post(url: str, **words: Any) -> Any:
            return client.post(url.removeprefix(address), **words)

        monkeypatch.setitem(sys.modules, "httpx", SimpleNamespace(post=post))
        yield


def run_blocks(name: str) -> None:
    known: dict[str, object] = {}  # a page's later blocks go on from the earlier ones
    for number, block in enumerate(blocks(PAGES[name]), 1):
        exec(compile(block, f"{name}, block {number}", "exec"), known)


def test_the_manual_of_evaluation_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks(PAGES["docs/evaluate.md"])
    exec(compile(block, "docs/evaluate.md", "exec"), {})
    said = capsys.readouterr().out
    assert "loss in batches of 32" in said
    assert "by sex" in said


def test_there_are_examples_to_run() -> None:
    assert {"README.md", "docs/evaluate.md", "docs/python.md", "docs/run.md"} <= set(WITH_PYTHON)
    assert MODULES


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_examples_of_docstrings_give_what_they_say(path: Path) -> None:
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed
