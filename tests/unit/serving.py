"""A service over small untrained models, in the tests' own process."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import TypeAdapter
from starlette.testclient import TestClient

from clipdist.data.labels import Labels
from clipdist.errors import UserError
from clipdist.model.build import build_classifier, build_model, build_tokenizer
from clipdist.model.classifier import ClassifyConfig
from clipdist.model.dual_encoder import ModelConfig
from clipdist.model.saved import SavedModel
from clipdist.model.saved_classifier import SavedClassifier
from clipdist.publish.serve.app import make_app
from clipdist.publish.serve.engine import Engine
from clipdist.publish.serve.limits import Guard, Limits
from clipdist.publish.serve.server import server_of
from clipdist.publish.serve.service import Service
from clipdist.publish.serve_command import listen
from tests.conftest import COLOURS, SHAPES, TINY

CAPTIONS = [f"A {colour} {shape}." for colour in COLOURS for shape in SHAPES]
CLASSES = {f"s{k}": [shape, f"{shape} shape"] for k, shape in enumerate(SHAPES)}
URL = "http://127.0.0.1"


@cache
def dual_encoder() -> SavedModel:
    config = TypeAdapter(ModelConfig).validate_python(TINY["model"])
    tokenizer = build_tokenizer(config, CAPTIONS)
    model = build_model(config, tokenizer, seed=0).eval()
    return SavedModel(model, tokenizer, {"data": "/somewhere/shapes"}, {}, torch.device("cpu"), "digest")


@cache
def classifier() -> SavedClassifier:
    config = TypeAdapter(ModelConfig).validate_python({"image": TINY["model"]["image"]})
    classify = TypeAdapter(ClassifyConfig).validate_python({"label": "label"})
    labels = Labels("shape", tuple(SHAPES), (1,) * len(SHAPES), ({},) * len(SHAPES))
    model = build_classifier(config, classify, len(labels), seed=0).eval()
    temperature = {"value": 1.5, "fitted_on": "val", "at_bound": False}
    return SavedClassifier(model, labels, temperature, {}, {}, torch.device("cpu"), "digest")


class Hit(NamedTuple):
    row: int
    score: float
    key: str
    texts: tuple[str, ...]


class FakeGallery:
    """Rows are the captions' own embeddings."""

    def __init__(self, saved: SavedModel, model_digest: str = "digest") -> None:
        self.features_ND, self.model_digest = saved.encode_text(CAPTIONS), model_digest
        self.rows, self.width = self.features_ND.shape

    def check_model(self, saved: Any) -> None:
        if saved.digest != self.model_digest:
            raise UserError("embeddings of another model")

    def record(self, row: int) -> dict[str, Any]:
        return {"key": f"key-{row}", "texts": [CAPTIONS[row]]}

    def thumbnail(self, row: int, side: int) -> Image.Image:
        if row == 1:
            raise UserError("/secret/shapes/train-0000.tar: gone")
        return Image.new("RGB", (side, side // 2), (row, 0, 0))

    def search(self, query_QD: np.ndarray, top: int = 10) -> list[list[Hit]]:
        assert query_QD.dtype == np.float32
        cosine_QN = query_QD @ self.features_ND.T
        best_QN = np.argsort(-cosine_QN, axis=1, kind="stable")[:, :top]
        return [
            [Hit(row, float(cosines[row]), f"key-{row}", (CAPTIONS[row],)) for row in rows]
            for cosines, rows in zip(cosine_QN, best_QN.tolist(), strict=True)
        ]


def make_service(saved: Any = None, gallery: Any = None, limits: Limits | None = None, **options: Any) -> Service:
    saved = saved or dual_encoder()
    known = isinstance(saved, SavedModel)
    engine = Engine(
        saved, prompts=list(CLASSES.values()) if known else (), captions=CAPTIONS if known else (), gallery=gallery
    )
    about = {"name": "tiny", "calibrated_on": None, "scores": [], "notice": "Untrained."}
    classes = [(value, names[0]) for value, names in CLASSES.items()] if known else [(n, n) for n in saved.names]
    return Service(engine, limits or Limits(), about=about, classes=classes, threads=1, **options)


@contextmanager
def client_of(service: Service) -> Iterator[TestClient]:
    with TestClient(make_app(service), base_url=URL, raise_server_exceptions=False) as client:
        yield client
    service.close()


@contextmanager
def running(service: Service, head_seconds: float = 10.0) -> Iterator[int]:
    """The port at which a real server answers, in a thread."""
    app: Guard = make_app(service)
    server, listening = server_of(app, head_seconds), listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    port = listening.getsockname()[1]
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(30)
        service.close()
        assert not thread.is_alive()
