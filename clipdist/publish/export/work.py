"""From a saved model to a folder of another library, checked by that library before it takes its name."""

import importlib
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any, cast

import torch

from clipdist import __version__
from clipdist.data.shards import fsync_folder
from clipdist.errors import UserError, disk_errors
from clipdist.model.saved import Saved
from clipdist.publish.card import Said, model_card
from clipdist.publish.export.exporting import Asked, Format, Samples, compare

FORMATS = {
    "huggingface": "clipdist.publish.export.hugging_face",
    "open_clip": "clipdist.publish.export.open_clip_folder",
    "onnx": "clipdist.publish.export.onnx_folder",
    "safetensors": "clipdist.publish.export.tower_folders",
}
REPORT = "export.json"


def export(
    saved: Saved, to: str, out: Path, samples: Samples, asked: Asked, said: Said | None = None
) -> dict[str, Any]:
    """Writes the folder `out`, loads it by the library that it is for, compares, and only then gives it its name; what
    `export.json` says is returned. `saved` is to be on the CPU.

    Raises `UserError`, and leaves nothing behind, when `out` exists or cannot be written, when the format cannot
    express the model, and when the library gives something else than the model.
    """
    if to not in FORMATS:
        raise UserError(f"--to {to}: expected one of {', '.join(FORMATS)}")
    if os.path.lexists(out):
        raise UserError(f"{out}: exists already; choose another folder, or remove it")
    made = cast(Format, importlib.import_module(FORMATS[to]))
    made.check(saved, asked)
    saved.model.float().eval()
    partial = out.with_name(out.name + ".partial")
    with disk_errors(out):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            made.write(saved, partial, asked)
            report = _checked(made, saved, to, partial, samples, asked)
            card = model_card(saved, to, made.usage(saved, asked), report, said)
            (partial / "README.md").write_text(card, encoding="utf-8")
            (partial / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            made.finish(partial, out, asked)
            _sync(partial)
            os.replace(partial, out)
            fsync_folder(out.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return report


def _checked(made: Format, saved: Saved, to: str, folder: Path, samples: Samples, asked: Asked) -> dict[str, Any]:
    try:
        own, foreign = made.load(saved, folder, asked)
        found = compare(saved, own, foreign, samples)
    except UserError as error:
        raise UserError(f"--to {to}: nothing was exported: {error}") from None
    except Exception as error:  # each library has kinds of its own
        if isinstance(error, OSError) and error.errno:
            raise  # the disk's; transformers raises others without a number, about what it read
        raise UserError(
            f"--to {to}: nothing was exported: the library cannot use what was written "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        ) from error
    versions = {"clipdist": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return {
        "format": to,
        "model": saved.digest,
        "tower": asked.tower,
        "checked": found,
        "notes": foreign.notes,
        "versions": versions | foreign.versions,
    }


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
