"""What a request goes through: decoding in a few threads, then the model's thread, then an answer."""

import asyncio
import csv
import importlib
import importlib.util
import io
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from clipdist import __version__
from clipdist.errors import UserError
from clipdist.model.saved import SavedModel
from clipdist.publish.serve import schema
from clipdist.publish.serve.batching import Batcher, Stopped
from clipdist.publish.serve.engine import CALLS, IMAGES, TEXTS, Engine, Look, Seen
from clipdist.publish.serve.limits import Admission, Limits, Refused
from clipdist.publish.serve.metrics import Metrics
from clipdist.publish.serve.pictures import pixels_of

T = TypeVar("T")
RELEVANCE = "clipdist.evaluate.relevance"
SHOWN_IN_TABLE = 3
MOST_WORDS_KEPT = 256
NO_GALLERY = "no gallery is loaded; start the service with --gallery"
CLASSIFIER = "this model is a classifier: it knows classes, and no texts"


class Service:
    """Answers requests about one model. `about` is what `GET /api/about` says but for limits and versions."""

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        *,
        about: dict[str, Any],
        classes: Sequence[tuple[str, str]] = (),
        max_batch: int = 16,
        max_wait_seconds: float = 0.005,
        threads: int | None = None,
        decoders: int = 2,
    ) -> None:
        self.engine, self.limits, self.metrics = engine, limits, Metrics()
        self.classes = [schema.ClassName(name=name, title=title) for name, title in classes]
        self.admission = Admission(limits.max_queue)
        self._decoders = ThreadPoolExecutor(decoders, thread_name_prefix="decode")
        self._words: OrderedDict[tuple[str, ...], np.ndarray] = OrderedDict()
        self.about = schema.About(
            **about,
            kind="dual_encoder" if engine.texts else "classifier",
            width=engine.saved.width,
            classes=self.classes,
            temperature=engine.temperature,
            gallery=schema.GalleryAbout(rows=engine.gallery.rows) if engine.gallery is not None else None,
            captions=len(engine.captions),
            limits=schema.LimitsAbout(**{name: getattr(limits, name) for name in schema.LimitsAbout.model_fields}),
            relevance=self.maps,
            version=__version__,
        )
        self.batcher = Batcher(
            engine.compute,
            max_batch=max_batch,
            max_wait_seconds=max_wait_seconds,
            metrics=self.metrics,
            alone=CALLS,
            coming=lambda: self.admission.inside > len(self.batcher),
            before=lambda: torch.set_num_threads(threads) if threads else None,
        )
        self.metrics.queue.set_function(lambda: len(self.batcher))
        self.metrics.inside.set_function(lambda: self.admission.inside)

    @property
    def maps(self) -> bool:
        """Whether relevance maps can be drawn; of some towers it shows only when one is asked for."""
        return importlib.util.find_spec(RELEVANCE) is not None

    def close(self) -> None:
        self.batcher.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)

    def failing(self) -> str | None:
        """Why the service cannot answer at present; None when it can."""
        if not self.batcher.alive:
            return "the model has stopped"
        stuck = self.batcher.busy_seconds() > self.limits.timeout_seconds
        return "the model does not come back from its work" if stuck else None

    async def image(self, data: bytes, words: Sequence[str] | None, top: int, ticket: str | None) -> schema.ImageAnswer:
        """`words`: classes in place of the service's own, None for these. Raises `Refused`."""
        began = time.perf_counter()
        neighbours = top if self.engine.gallery is not None else 0
        if words is not None:
            self._check_words(words)
        seen, together = await self._seen(data, neighbours, ticket)
        if words is not None:
            of_words_KD = await self._of_words(tuple(words), ticket)
            probability_K = self.engine.probabilities(seen.features_D, of_words_KD)
            classes = _likeliest([schema.ClassName(name=word, title=word) for word in words], probability_K, top)
        else:
            classes = _likeliest(self.classes, seen.probability_K, top)
        return schema.ImageAnswer(
            classes=classes,
            captions=[schema.CaptionScore(text=text, score=score) for text, score in seen.captions],
            neighbours=[neighbour(hit) for hit in seen.hits],
            seconds=time.perf_counter() - began,
            batched_with=together,
        )

    async def text(self, text: str, top: int, ticket: str | None) -> schema.TextAnswer:
        """Raises `Refused`."""
        began = time.perf_counter()
        self.check_text(text)
        if not self.engine.texts:
            raise Refused(409, CLASSIFIER)
        if self.engine.gallery is None:
            raise Refused(409, NO_GALLERY)
        hits, _ = await self._ask(TEXTS, (text, top), ticket)
        return schema.TextAnswer(hits=[neighbour(hit) for hit in hits], seconds=time.perf_counter() - began)

    async def relevance(self, data: bytes, text: str, ticket: str | None) -> bytes:
        """A PNG. Raises `Refused`."""
        self.check_text(text)
        if not self.maps:
            raise Refused(501, "no relevance map can be drawn for this model")
        names = {one.name: one.title for one in self.classes}
        if not self.engine.texts and text not in names:
            raise Refused(422, "text: found no class of this model, expected the name of one")
        pixels_3SS = await self._decoded(data)
        picture = Image.fromarray(np.ascontiguousarray(pixels_3SS.numpy().transpose(1, 2, 0)))
        text = names.get(text, text) if self.engine.texts else text
        made, _ = await self._ask(CALLS, lambda: _relevance_png(self.engine.saved, picture, text), ticket)
        return bytes(made)

    async def table(self, files: Sequence[tuple[str, bytes]], ticket: str | None) -> str:
        """CSV with a line for each file, in order; of one that cannot be read, the reason. Raises `Refused` where it is
        the service that cannot answer."""
        answers = await asyncio.gather(*(self._line(name, data, ticket) for name, data in files))
        shown = min(SHOWN_IN_TABLE, len(self.classes))
        buffer = io.StringIO()
        columns = [column for k in range(1, shown + 1) for column in (f"class{k}", f"probability{k}")]
        table = csv.DictWriter(buffer, ["filename", *columns, "caption", "error"], restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(answers)
        return buffer.getvalue()

    async def thumbnail(self, row: int, side: int) -> bytes:
        """A JPEG. Raises `Refused`."""
        gallery = self.engine.gallery
        if gallery is None:
            raise Refused(409, NO_GALLERY)
        if not 0 <= row < gallery.rows:
            raise Refused(404, f"the gallery has rows 0 to {gallery.rows - 1:,}")
        try:
            return await self._in_thread(lambda: _jpeg(gallery.thumbnail(row, side)))
        except (UserError, OSError):
            raise Refused(404, "the image of this row is not there any more") from None

    def check_text(self, text: str) -> None:
        most = self.limits.max_text_characters
        if len(text) > most:
            raise Refused(422, f"text: found {len(text):,} characters, expected at most {most:,}")
        if not text.strip():
            raise Refused(422, "text: found nothing, expected a few words")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Refused(422, "text: found half a character, expected Unicode text") from None

    def _check_words(self, words: Sequence[str]) -> None:
        if not self.engine.texts:
            raise Refused(409, f"{CLASSIFIER}; so it cannot choose among your own words")
        if words:
            self.check_text("\n".join(words))
        if not 2 <= len(words) <= self.limits.max_classes:
            most = self.limits.max_classes
            raise Refused(422, f"classes: found {len(words)} different names, expected 2 to {most}")

    async def _of_words(self, words: tuple[str, ...], ticket: str | None) -> np.ndarray:
        """float32 [K, D]; the last few sets of words are kept, since people try many images on the same ones."""
        if words not in self._words:
            prompts = [[word] for word in words]
            made, _ = await self._ask(CALLS, lambda: self.engine.class_features(prompts), ticket)
            self._words[words] = made
            while len(self._words) > MOST_WORDS_KEPT:
                self._words.popitem(last=False)
        self._words.move_to_end(words)
        return self._words[words]

    async def _line(self, name: str, data: bytes, ticket: str | None) -> dict[str, Any]:
        try:
            seen, _ = await self._seen(data, 0, ticket)
        except Refused as error:
            if error.status_code >= 500:
                raise
            return {"filename": _cell(_base(name)), "error": error.detail}
        line: dict[str, Any] = {"filename": _cell(_base(name))}
        for k, one in enumerate(_likeliest(self.classes, seen.probability_K, SHOWN_IN_TABLE), 1):
            line |= {f"class{k}": _cell(one.title), f"probability{k}": f"{one.probability:.6f}"}
        return line | ({"caption": _cell(seen.captions[0][0])} if seen.captions else {})

    async def _seen(self, data: bytes, neighbours: int, ticket: str | None) -> tuple[Seen, int]:
        seen, together = await self._ask(IMAGES, Look(await self._decoded(data), neighbours), ticket)
        return seen, together

    async def _decoded(self, data: bytes) -> torch.Tensor:
        tower = self.engine.saved.model.image
        return await self._in_thread(lambda: pixels_of(data, tower.side, tower.resize, self.limits.max_image_pixels))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._decoders, work)

    async def _ask(self, kind: str, item: Any, ticket: str | None) -> tuple[Any, int]:
        try:
            return await self.batcher.ask(kind, item, ticket)
        except Stopped:
            raise Refused(503, "the service is ending", {"Retry-After": "5"}) from None


def neighbour(hit: Any) -> schema.Neighbour:
    return schema.Neighbour(row=hit.row, key=hit.key, text=hit.texts[0] if hit.texts else "", score=hit.score)


def _likeliest(
    classes: Sequence[schema.ClassName], probability_K: np.ndarray | None, top: int
) -> list[schema.ClassProbability]:
    if probability_K is None:
        return []
    best = np.argsort(-probability_K, kind="stable")[:top].tolist()
    return [
        schema.ClassProbability(name=classes[k].name, title=classes[k].title, probability=float(probability_K[k]))
        for k in best
    ]


def _base(name: str) -> str:
    """A file's name without folders."""
    return name.encode(errors="replace").decode().replace("\\", "/").rpartition("/")[2]


def _cell(text: str) -> str:
    """Text on one line; what a spreadsheet would take for a formula has an apostrophe before it."""
    text = " ".join(text.split())
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _relevance_png(saved: Any, picture: Image.Image, text: str) -> bytes:
    """Of the square that the tower sees. Raises `Refused` where this kind of tower has no such map."""
    relevance: Any = importlib.import_module(RELEVANCE)  # brings matplotlib
    draw = relevance.relevance_map if isinstance(saved, SavedModel) else relevance.class_relevance
    try:
        drawn = relevance.overlay(picture, draw(saved, picture, text))
    except UserError:
        raise Refused(501, "no relevance map can be drawn for this kind of image tower") from None
    buffer = io.BytesIO()
    drawn.save(buffer, "PNG")
    return buffer.getvalue()
