"""The wheel holds the package and what it needs to run, and nothing beside it."""

import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import clipdist

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy of what git knows: a folder build/ of last week would end up in the wheel."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).exists():  # not one that is deleted but not yet committed so
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    words = ["pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), "--quiet"]
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = out.iterdir()
    assert path.name == f"clipdist-{clipdist.__version__}-py3-none-any.whl"
    return zipfile.ZipFile(path)


def test_the_top_level_is_the_package_alone(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert top == {"clipdist", f"clipdist-{clipdist.__version__}.dist-info"}
    assert wheel.read(f"clipdist-{clipdist.__version__}.dist-info/top_level.txt").split() == [b"clipdist"]


def test_every_module_and_file_of_the_package_is_inside(wheel: zipfile.ZipFile) -> None:
    package = ROOT / "clipdist"
    files = {path.relative_to(ROOT).as_posix() for path in package.rglob("*") if path.is_file()}
    expected = {name for name in files if "__pycache__" not in name and not name.endswith((".pyc", ".partial"))}
    assert {"clipdist/py.typed", "clipdist/evaluate/report.html.j2", "clipdist/cli.py"} <= expected
    assert {name for name in wheel.namelist() if name.startswith("clipdist/")} == expected


def test_what_the_wheel_says_of_itself(wheel: zipfile.ZipFile) -> None:
    folder = f"clipdist-{clipdist.__version__}.dist-info"
    about = message_from_bytes(wheel.read(f"{folder}/METADATA"))
    assert about["Name"] == "clipdist"
    assert about["Version"] == clipdist.__version__
    assert about["Requires-Python"] == ">=3.11"
    required = {
        line.split(";")[0].split(">")[0].strip() for line in about.get_all("Requires-Dist", []) if ";" not in line
    }
    named = ("torch", "torchvision", "timm", "transformers", "accelerate", "deepspeed", "webdataset", "submitit")
    assert {*named, "tensorboard", "zstandard"} <= required
    assert "clipdist = clipdist.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()
    assert any("LICENSE" in name for name in wheel.namelist())
