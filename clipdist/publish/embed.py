"""A model's features of every sample of a source, on disk: in chunks that are done once, whatever ends the work.

Samples are numbered; a chunk is a run of them, and a micro-batch a run within a chunk, whichever process works on it.
So the gallery is the same, on CPUs to the last byte, for every number of processes and after any interruption.

b = images of a micro-batch, D = width of the joint embedding.
"""

import fcntl
import json
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from clipdist import __version__
from clipdist.data.images.decode import load_for_evaluation
from clipdist.data.sets.pack import start_worker
from clipdist.data.shards import BadSample, checksum_file, write_atomically
from clipdist.errors import UserError, WorkerKilled, disk_errors
from clipdist.model.saved import MAX_IMAGE_PIXELS, SavedModel, load_dual_encoder
from clipdist.progress import progress
from clipdist.publish.embedding_parts import Joined, Part, clear_partial, join, part_path, write_part
from clipdist.publish.embedding_source import SetSource, Source, TableColumns, kind_of, list_files
from clipdist.publish.embeddings import FORMAT, FORMAT_VERSION, INFO

UNFINISHED = "unfinished"
IN_UNFINISHED = {"plan.json", "plan.json.partial", "parts", "listing.parquet", "listing.parquet.partial"}
CHUNK = 512
MOST_CHUNKS = 4096
TEXTS_AT_ONCE = 256

What = Literal["image", "text", "both"]


@dataclass(frozen=True)
class EmbedOptions:
    """What decides the result, but for the model and the data."""

    what: What = "image"
    exact_pixels: bool = False
    """JPEGs decoded in full, as `clipdist eval` does; otherwise at the smallest size that suffices, as in training."""
    micro_batch: int = 32
    """On CPUs a small one is faster: what it computes stays in the cache."""
    threads: int = 1
    """Of each process, on CPUs: sums are split between them."""
    device: str = ""
    """`cpu` or `cuda`; empty: a GPU when there is one."""

    @property
    def image(self) -> bool:
        return self.what != "text"

    @property
    def text(self) -> bool:
        return self.what != "image"


@dataclass(frozen=True)
class EmbedSummary:
    """What a call of `embed` did; `info` is what `embeddings.json` holds."""

    folder: Path
    info: dict[str, Any]
    samples: int
    """Of the source."""
    embedded: int
    """Samples of the chunks that this call did; 0: the gallery was finished before."""


def embed(
    model: str | Path,
    data: str,
    out: Path,
    *,
    splits: Sequence[str] = (),
    columns: TableColumns | None = None,
    options: EmbedOptions | None = None,
    processes: int = 0,
    readers: int = 1,
    quiet: bool = True,
) -> EmbedSummary:
    """Embeds all of `data` (shard set, folder of images or table) into the folder `out`; goes on where an earlier call
    stopped, and returns at once when that one finished.

    `processes` 0: one for each CPU core, or each GPU. `readers` are the threads of each that read and decode ahead.
    Raises `UserError` for data without samples, for a folder that holds something else or embeddings of another model,
    data or options; `WorkerKilled` when a process dies; what a chunk raises.
    """
    options = options or EmbedOptions()
    check_options(options, processes, readers)
    kind = kind_of(data)
    if splits and kind != "shards":
        raise UserError(f"--split: {data} is a {kind}, which has no splits; leave it out")
    saved = load_dual_encoder(model, options.device or None)
    work = out / UNFINISHED
    with disk_errors(out):
        _prepare(out)
        with _locked(out / "lock"):
            work.mkdir(exist_ok=True)
            source: Source
            source = SetSource(data, splits) if kind == "shards" else _listed(data, work, columns, options)
            if not len(source):
                raise UserError(f"{data}: no samples to embed")
            plan = make_plan(model, saved, source, options)
            embedded, info = 0, _finished(out, plan)
            if info is None:
                embedded = _do_chunks(out, plan, saved, source, options, processes, readers, quiet)
                info = _finish(out, plan)
            shutil.rmtree(work, ignore_errors=True)
            (out / "lock").unlink()
    return EmbedSummary(out, info, len(source), embedded)


def check_options(options: EmbedOptions, processes: int, readers: int) -> None:
    """`UserError` for numbers out of range."""
    for name, value, least in (
        ("processes", processes, 0),
        ("readers", readers, 1),
        ("micro-batch", options.micro_batch, 1),
        ("threads", options.threads, 1),
    ):
        if value < least:
            raise UserError(f"--{name}: found {value}, expected {least} or more")


def make_plan(model: str | Path, saved: SavedModel, source: Source, options: EmbedOptions) -> dict[str, Any]:
    """All that must be equal for two calls to give the same gallery, and how it is cut."""
    chunk = max(CHUNK, -(-len(source) // MOST_CHUNKS))
    chunk = -(-chunk // options.micro_batch) * options.micro_batch
    decided = {name: value for name, value in asdict(options).items() if name != "device"}
    packages = ("torch", "timm", "transformers", "numpy", "pillow", "simplejpeg")
    return {
        "model": {"folder": str(model), "digest": saved.digest},
        "width": saved.width,
        "source": source.about(),
        "samples": len(source),
        "chunk": chunk,
        "options": {**decided, "device": saved.device.type},
        "versions": {"clipdist": __version__, **{name: version(name) for name in packages}},
    }


def _listed(data: str, work: Path, columns: TableColumns | None, options: EmbedOptions) -> Source:
    return list_files(data, work / "listing.parquet", columns or TableColumns(), captions=options.text)


def _prepare(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in out.iterdir()}
    begun = _names_in_unfinished(out / UNFINISHED)
    if strange := sorted(begun - IN_UNFINISHED):
        raise UserError(
            f"--out {out}: its {UNFINISHED!r} holds {strange[0]!r}, which no embedding writes, and would be removed at "
            f"the end; choose an empty folder"
        )
    others = sorted(names - {UNFINISHED, "lock"})
    if others and INFO not in names and "plan.json" not in begun:
        raise UserError(f"--out {out}: holds {others[0]!r}, and no embeddings; choose an empty folder")


def _names_in_unfinished(work: Path) -> set[str]:
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise UserError(f"--out {work.parent}: its {UNFINISHED!r} is no folder of ours; choose an empty folder")
    try:
        return {path.name for path in work.iterdir()}
    except FileNotFoundError:  # also: another process has just finished
        return set()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path.parent}: another process embeds into it; wait for it, or end it") from None
        yield


def _finished(out: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """`embeddings.json` of a finished gallery; checks that what is there, finished or not, comes of the same plan."""
    for path in (out / INFO, out / UNFINISHED / "plan.json"):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            # A finished gallery stays one when packages are upgraded; half of one would become a mixture.
            free = ("model", "versions", "chunk") if path.name == INFO else ("model",)
            differing = [name for name in plan if name not in free and found[name] != plan[name]]
            same_model = found["model"]["digest"] == plan["model"]["digest"]
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); remove {out} to begin anew") from None
        if not same_model:
            raise UserError(
                f"{out}: holds embeddings by the model of digest {found['model']['digest']}, asked for "
                f"{plan['model']['digest']}; choose another --out, or remove the folder"
            )
        if differing:
            name = differing[0]
            raise UserError(
                f"{out}: holds embeddings of another {name}: found {_short(found[name], plan[name])}, asked for "
                f"{_short(plan[name], found[name])}; choose another --out, or remove the folder"
            )
        if path.name == INFO:
            return dict(found)
    return None


def _short(value: Any, other: Any) -> str:
    """A value, or of two dictionaries what differs."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {name: inner for name, inner in value.items() if other.get(name) != inner}
    return json.dumps(value, ensure_ascii=False)


def _do_chunks(
    out: Path,
    plan: dict[str, Any],
    saved: SavedModel,
    source: Source,
    options: EmbedOptions,
    processes: int,
    readers: int,
    quiet: bool,
) -> int:
    """Samples that were embedded."""
    parts = out / UNFINISHED / "parts"
    parts.mkdir(exist_ok=True)
    write_atomically(out / UNFINISHED / "plan.json", (json.dumps(plan, indent=1) + "\n").encode())
    clear_partial(parts)
    starts = range(0, len(source), plan["chunk"])
    missing = [n for n in range(len(starts)) if not part_path(parts, n).exists()]
    bounds = [(n, starts[n], min(starts[n] + plan["chunk"], len(source))) for n in missing]
    processes = min(processes or _default_processes(saved.device, options.threads), len(bounds))
    if processes > 1:
        embedder = _Start(str(plan["model"]["folder"]), plan["model"]["digest"], source, options, parts, readers)
        done = _in_processes(embedder, bounds, processes)
    else:
        done = _here(Embedder(saved, source, options, parts, readers), bounds)
    for _ in progress(done, total=len(bounds), unit="chunk", description=f"embedding {len(source):,}", quiet=quiet):
        pass
    return sum(stop - start for _, start, stop in bounds)


def _default_processes(device: torch.device, threads: int) -> int:
    return torch.cuda.device_count() if device.type == "cuda" else max(1, len(os.sched_getaffinity(0)) // threads)


class Embedder:
    """Does chunks, in one process."""

    def __init__(self, saved: SavedModel, source: Source, options: EmbedOptions, parts: Path, readers: int) -> None:
        self.saved, self.source, self.options, self.parts = saved, source, options, parts
        self.pool = ThreadPoolExecutor(readers, thread_name_prefix="reader")
        self.ahead = readers + 1

    def chunk(self, number: int, start: int, stop: int) -> None:
        """Embeds samples start..stop and writes them as part `number`."""
        step = self.options.micro_batch
        pieces: deque[Future[tuple[np.ndarray, Part]]] = deque()
        part, images = Part(), list[np.ndarray]()
        begins = iter(range(start, stop, step))
        while True:
            while len(pieces) < self.ahead and (begin := next(begins, None)) is not None:
                pieces.append(self.pool.submit(self._read, begin, min(begin + step, stop)))
            if not pieces:
                break
            pixels, piece = pieces.popleft().result()
            part.bad += piece.bad
            part.rows += piece.rows
            if len(pixels):
                images.append(self._image_features(pixels))
        width = self.saved.width
        if self.options.image:
            part.image_features_nD = np.concatenate([np.zeros((0, width), np.float16), *images])
            self._check(part.image_features_nD, part, "image")
        if self.options.text:
            self._embed_texts(part)
        with disk_errors(self.parts):
            write_part(self.parts, number, part)

    @torch.inference_mode()
    def _image_features(self, pixels_bHW3: np.ndarray) -> np.ndarray:
        images_b3HW = torch.from_numpy(pixels_bHW3).permute(0, 3, 1, 2).to(self.saved.device)
        features: np.ndarray = self.saved.model.encode_image(images_b3HW).cpu().numpy().astype(np.float16)
        return features

    def _embed_texts(self, part: Part) -> None:
        texts = [text for row in part.rows for text in row["texts"]]
        owners = [place for place, row in enumerate(part.rows) for _ in row["texts"]]
        part.text_features_mD = self.saved.encode_text(texts, micro_batch=TEXTS_AT_ONCE).astype(np.float16)
        part.owner_m = np.array(owners, np.int64)
        self._check(part.text_features_mD, part, "text")

    def _check(self, features_nD: np.ndarray, part: Part, what: str) -> None:
        if not np.isfinite(features_nD).all():
            key = part.rows[0]["key"] if part.rows else ""
            raise UserError(f"the model's {what} features near sample {key!r} are not finite; it cannot be searched by")

    def _read(self, start: int, stop: int) -> tuple[np.ndarray, Part]:
        """(uint8 [b, side, side, 3], rows and bad samples); of texts alone no pixels."""
        tower = self.saved.model.image
        part, images = Part(), []
        for number in range(start, stop):
            place = self.source.place(number)
            try:
                sample = self.source.read(number)
                if self.options.text and not sample.texts and not self.options.image:
                    raise BadSample("no caption")
                if self.options.image:
                    exact = self.options.exact_pixels
                    images.append(
                        load_for_evaluation(sample.image, tower.side, tower.resize, MAX_IMAGE_PIXELS, exact=exact)
                    )
            except BadSample as error:
                where = {name: value for name, value in place._asdict().items() if value is not None}
                part.bad.append({**where, "reason": str(error)})
                continue
            row = {**place._asdict(), "key": sample.key, "texts": sample.texts, "fields": sample.fields}
            part.rows.append(row)
        return np.stack(images) if images else np.zeros((0, tower.side, tower.side, 3), np.uint8), part

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


def _here(embedder: Embedder, bounds: Sequence[tuple[int, int, int]]) -> Iterator[None]:
    """The chunks in this process, on as many threads as each process of several has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(embedder.options.threads)
    try:
        for bound in bounds:
            embedder.chunk(*bound)
            yield
    finally:
        torch.set_num_threads(threads)
        embedder.close()


@dataclass(frozen=True)
class _Start:
    """What a process needs to make its `Embedder`."""

    model: str
    digest: str
    source: Source
    options: EmbedOptions
    parts: Path
    readers: int


class _Own:
    """Of a process that does chunks."""

    start: _Start
    place: int
    embedder: Embedder | None = None


def _in_processes(start: _Start, bounds: Sequence[tuple[int, int, int]], processes: int) -> Iterator[None]:
    """The chunks in any order. Processes are spawned: a forked one could not use torch's threads, or a GPU."""
    context = multiprocessing.get_context("spawn")
    taken = context.Value("i", 0)
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin, initargs=(start, taken))
    try:
        for future in as_completed([pool.submit(_one_chunk, bound) for bound in bounds]):
            future.result()
            yield
    except BrokenProcessPool:
        raise WorkerKilled(
            f"one of {processes} embedding processes was ended from outside, most often because memory ran out: lower "
            f"--processes; the same command goes on with the chunks that are not done"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(start: _Start, taken: Any) -> None:
    """In a new process."""
    start_worker()
    with taken.get_lock():
        _Own.place = taken.value
        taken.value += 1
    _Own.start = start
    torch.set_num_threads(start.options.threads)


def _one_chunk(bound: tuple[int, int, int]) -> None:
    if _Own.embedder is None:  # not made by `_begin`, whose exceptions would not reach the parent
        _Own.embedder = _own_embedder(_Own.start, _Own.place)
    _Own.embedder.chunk(*bound)


def _own_embedder(start: _Start, place: int) -> Embedder:
    device = start.options.device
    if device != "cpu" and torch.cuda.is_available():
        device = f"cuda:{place % torch.cuda.device_count()}"
    saved = load_dual_encoder(start.model, device or None)
    if saved.digest != start.digest:
        raise UserError(f"{start.model}: changed while it was used; start again")
    return Embedder(saved, start.source, start.options, start.parts, start.readers)


def _finish(out: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Joins the parts; `embeddings.json` is written last."""
    work = out / UNFINISHED
    count = -(-plan["samples"] // plan["chunk"])
    parts = [part_path(work / "parts", number) for number in range(count)]
    what = plan["options"]["what"]
    joined: Joined = join(parts, out, width=plan["width"], image=what != "text", text=what != "image")
    if not joined.rows:
        reason = json.loads((out / "bad.jsonl").read_text(encoding="utf-8").partition("\n")[0])["reason"]
        raise UserError(
            f"{plan['source']['location']}: none of {plan['samples']:,} samples could be read; the first: {reason}"
        )
    info = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        **plan,
        "rows": joined.rows,
        "texts": joined.texts,
        "bad": joined.bad,
        "fields": joined.columns,
        "files": {
            name: {"bytes": (out / name).stat().st_size, "xxh3_64": checksum_file(out / name)} for name in joined.files
        },
    }
    write_atomically(out / INFO, (json.dumps(info, indent=1, ensure_ascii=False) + "\n").encode())
    return info
