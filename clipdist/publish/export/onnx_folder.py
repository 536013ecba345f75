"""The towers as ONNX graphs: `image.onnx` from uint8 pixels, `text.onnx` from token ids, unit vectors out. Beside them
lies what is outside: the tokenizer, `preprocessing.json`, and `pixels_clipdist.py`, which needs Pillow and NumPy alone.

b = rows, T = tokens, S = side of an image, D = width of the joint embedding, K = classes.
"""

import importlib.util
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from clipdist.errors import UserError
from clipdist.model.dual_encoder import DualEncoder
from clipdist.model.saved import Saved, SavedModel
from clipdist.model.saved_classifier import SavedClassifier
from clipdist.publish.export.exporting import (
    PIXELS,
    SHIPPED,
    TOLERANCE,
    Asked,
    Foreign,
    Own,
    missing_package,
    travelling_tokenizer,
)
from clipdist.publish.export.shipped.modeling_clipdist import pool
from clipdist.publish.export.tower_folders import embeddings_of, write_labels

OPSET = 18
LARGEST_FILE = 1_500_000_000
"""Bytes of weights above which they lie in a file of their own: a graph holds at most 2 GiB."""


def check(saved: Saved, asked: Asked) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise missing_package(package, "'clipdist[onnx]'")


class _Images(nn.Module):
    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.tower, self.projection = model.image, model.image_projection

    def forward(self, pixels: Tensor) -> Tensor:
        return normalize(self.projection(self.tower.model(self.tower.normalise(pixels))), dim=1)


class _Texts(nn.Module):
    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.tower, self.projection = model.text, model.text_projection

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden_bTC = self.tower.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return normalize(self.projection(pool(hidden_bTC, attention_mask, self.tower.pooling)), dim=1)


class _Classes(nn.Module):
    def __init__(self, saved: SavedClassifier) -> None:
        super().__init__()
        self.tower, self.head, self.temperature = saved.model.image, saved.model.head, saved.temperature

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.tower.model(self.tower.normalise(pixels)))
        return logits, torch.softmax(logits / self.temperature, dim=1)


def write(saved: Saved, folder: Path, asked: Asked) -> None:
    tower = saved.model.image
    pixels = torch.randint(0, 256, (2, 3, tower.side, tower.side), dtype=torch.uint8)
    about = {"clipdist.digest": saved.digest, "clipdist.temperature": repr(float(saved.temperature))}  # type: ignore[attr-defined]
    if isinstance(saved, SavedModel):
        _write_graph(_Images(saved.model), folder / "image.onnx", {"pixels": pixels}, ["vectors"], about)
        tokens = saved.tokenizer.max_tokens if saved.model.config.text.fills else min(5, saved.tokenizer.max_tokens)
        ids = torch.full((2, tokens), saved.tokenizer.pad_id)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        fixed = saved.model.config.text.fills
        _write_graph(_Texts(saved.model), folder / "text.onnx", inputs, ["vectors"], about, fixed_tokens=fixed)
        travelling_tokenizer(saved).save_pretrained(folder)
    else:
        assert isinstance(saved, SavedClassifier)
        about["clipdist.labels"] = json.dumps(saved.names, ensure_ascii=False)
        _write_graph(_Classes(saved), folder / "image.onnx", {"pixels": pixels}, ["logits", "probabilities"], about)
        write_labels(saved, folder)
    _write_preparation(saved, folder)


def _write_preparation(saved: Saved, folder: Path) -> None:
    tower = saved.model.image
    body: dict[str, Any] = {
        "opset": OPSET,
        "image": {
            "input": "pixels: uint8 [batch, 3, side, side], RGB; the graph normalises",
            "side": tower.side,
            "resize": tower.resize,
            "interpolation": "bicubic, antialiased",
            "normalised_inside": {"mean": list(tower.mean), "std": list(tower.std)},
        },
        "temperature": float(saved.temperature),  # type: ignore[attr-defined]
    }
    if isinstance(saved, SavedModel):
        text = saved.model.config.text
        bias = saved.model.temperature.bias
        body["logit_bias"] = None if bias is None else float(bias.detach())
        body["text"] = {
            "input": "input_ids, attention_mask: int64 [batch, tokens], padded on the right",
            "max_tokens": text.max_tokens,
            "padding": text.padding,
            "pad_id": saved.tokenizer.pad_id,
        }
        if text.fills:
            body["text"]["attention_mask"] = "ones: what fills counts as text"
    (folder / "preprocessing.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(SHIPPED / PIXELS, folder / PIXELS)


def _write_graph(
    module: nn.Module,
    path: Path,
    inputs: dict[str, Tensor],
    outputs: list[str],
    about: dict[str, str],
    *,
    fixed_tokens: bool = False,
) -> None:
    """Batch, and tokens unless they are fixed, are free. Raises `UserError` where torch cannot trace the tower."""
    import onnx

    free: dict[str, dict[int, Any]] = {}
    for name, tensor in inputs.items():
        free[name] = {0: torch.export.Dim("batch")}
        if tensor.ndim == 2 and not fixed_tokens:
            free[name][1] = torch.export.Dim("tokens")
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter, about itself
            torch.onnx.export(
                module.eval(),
                tuple(inputs.values()),
                path,
                input_names=list(inputs),
                output_names=outputs,
                dynamic_shapes=tuple(free.values()),
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter has many kinds
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise UserError(
            f"--to onnx: torch cannot make a graph of {path.name} ({type(error).__name__}: {' '.join(lines[:1])[:300]})"
        ) from error
    graph = onnx.load(str(path))
    # torch writes where each node came from: paths of this machine, which nobody else needs to know.
    for nodes in (graph.graph.node, *(function.node for function in graph.functions)):
        for node in nodes:
            del node.metadata_props[:]
    for key, value in about.items():
        graph.metadata_props.add(key=key, value=value)
    if graph.ByteSize() > LARGEST_FILE:
        onnx.save(graph, str(path), save_as_external_data=True, location=f"{path.name}.data")
    else:
        onnx.save(graph, str(path))
    onnx.checker.check_model(str(path))


def load(saved: Saved, folder: Path, asked: Asked) -> tuple[Own, Foreign]:
    """Each row also alone, and captions of each length beside others, since a graph may have kept the sizes by which it
    was traced."""
    import onnxruntime

    session = _session(folder / "image.onnx")

    def run(session: Any, **arrays: np.ndarray) -> Tensor:
        whole = session.run(None, arrays)[0]
        rows = len(whole)
        alone = np.concatenate(
            [session.run(None, {key: value[row : row + 1] for key, value in arrays.items()})[0] for row in range(rows)]
        )
        if not np.abs(whole - alone).max() <= TOLERANCE * max(1.0, float(np.abs(whole).max())):
            raise UserError(f"onnxruntime gives rows that depend on the batch, by {np.abs(whole - alone).max():.1e}")
        return torch.from_numpy(whole)

    shared: dict[str, Any] = {
        "image": lambda pixels: run(session, pixels=pixels.numpy()),
        "prepare": _preparation(folder),
        "normalised": False,
        "versions": {"onnxruntime": onnxruntime.__version__, "opset": str(OPSET)},
    }
    if not isinstance(saved, SavedModel):
        assert isinstance(saved, SavedClassifier)
        _check_probabilities(saved, session)
        return Own(saved.model.logits, None, "logits"), Foreign("onnxruntime, on the CPU", **shared)
    import transformers

    words = _session(folder / "text.onnx")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    fills = saved.model.config.text.fills
    padding: Any = "max_length" if fills else True

    def text(texts: Sequence[str]) -> Tensor:
        batch = tokenizer(list(texts), padding=padding, truncation=True, return_tensors="np")
        ids, mask = batch["input_ids"].astype(np.int64), batch["attention_mask"].astype(np.int64)
        if fills:
            return run(words, input_ids=ids, **_taken(words, np.ones_like(mask)))
        found = run(words, input_ids=ids, **_taken(words, mask))
        for row, length in enumerate(mask.sum(1)):  # without its padding
            alone = words.run(
                None, {"input_ids": ids[row : row + 1, :length], **_taken(words, mask[row : row + 1, :length])}
            )
            if not np.abs(alone[0] - found[row].numpy()).max() <= TOLERANCE:
                raise UserError("onnxruntime gives texts that depend on their padding")
        return found

    own = embeddings_of(saved)
    temperature = float(_metadata(words)["clipdist.temperature"])
    told = json.loads((folder / "preprocessing.json").read_text(encoding="utf-8"))
    bias = float(told["logit_bias"] or 0.0)
    return own, Foreign("onnxruntime, on the CPU", text=text, temperature=temperature, bias=bias, **shared)


def _check_probabilities(saved: SavedClassifier, session: Any) -> None:
    side = saved.model.image.side
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, side, side), np.uint8)
    logits, probabilities = session.run(["logits", "probabilities"], {"pixels": pixels})
    expected = torch.softmax(torch.from_numpy(logits) / saved.temperature, dim=1)
    if not float((torch.from_numpy(probabilities) - expected).abs().max()) <= TOLERANCE:
        raise UserError("onnxruntime gives other probabilities than the softmax of the logits at the temperature")


def _taken(session: Any, mask: np.ndarray) -> dict[str, np.ndarray]:
    """The mask where the graph has it as an input; one that a tower does not read is no input."""
    return {"attention_mask": mask} if "attention_mask" in {one.name for one in session.get_inputs()} else {}


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _metadata(session: Any) -> dict[str, str]:
    return dict(session.get_modelmeta().custom_metadata_map)


def _preparation(folder: Path) -> Any:
    """By the file that the folder carries."""
    spec = importlib.util.spec_from_file_location("pixels_of_export", folder / PIXELS)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    how = json.loads((folder / "preprocessing.json").read_text(encoding="utf-8"))["image"]

    def prepare(images: Sequence[Image.Image]) -> Tensor:
        squares = np.stack([module.square(image, how["side"], how["resize"]) for image in images])
        return torch.from_numpy(squares.transpose(0, 3, 1, 2).copy())

    return prepare


def finish(folder: Path, out: Path, asked: Asked) -> None:
    """Nothing in it names its place."""


def usage(saved: Saved, asked: Asked) -> str:
    head = """\
import json, sys
import numpy as np, onnxruntime
from PIL import Image

sys.path.append(folder)
from pixels_clipdist import square

how = json.load(open(f"{folder}/preprocessing.json"))
pixels = square(Image.open("a.jpg"), how["image"]["side"], how["image"]["resize"]).transpose(2, 0, 1)[None]
session = onnxruntime.InferenceSession(f"{folder}/image.onnx")
"""
    if not isinstance(saved, SavedModel):
        return head + 'logits, probabilities = session.run(None, {"pixels": pixels})  # labels.json names the classes'
    mask = "np.ones_like(ids)" if saved.model.config.text.fills else 'batch["attention_mask"].astype(np.int64)'
    padding = '"max_length"' if saved.model.config.text.fills else "True"
    return (
        head
        + f"""\
(images,) = session.run(None, {{"pixels": pixels}})

from transformers import AutoTokenizer  # or tokenizers, on tokenizer.json

batch = AutoTokenizer.from_pretrained(folder)(["a caption"], padding={padding}, truncation=True, return_tensors="np")
ids = batch["input_ids"].astype(np.int64)
session = onnxruntime.InferenceSession(f"{{folder}}/text.onnx")
(texts,) = session.run(None, {{"input_ids": ids, "attention_mask": {mask}}})
print(images @ texts.T)  # cosines"""
    )
