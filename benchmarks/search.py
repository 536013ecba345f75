"""How long does an exact search in a million rows take, and how much memory, beside other ways of doing it?

python benchmarks/search.py --rows 1000000 --width 512 --queries 1 16 256

Each contestant is a process of its own; they take turns, query after query, and get the same queries. The time is that
of one call, from float32 queries to sorted rows: the least and the median over the repetitions, and the least time of
the processor. On a machine that others use, the least is the fairest. Memory is what the process holds at its end: its
own, and pages of mapped files, which the system may take back. JSON on standard output.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

TOP = 10
PAUSE = 0.2
"""Seconds between two contestants: threads that have done their part spin for a while, on the next one's cores."""
Search = Callable[[np.ndarray], np.ndarray]


def draw_rows(rows: int, width: int, folder: Path, spread: float) -> None:
    """Unit rows in clusters around a common direction, as embeddings lie; in float16, and rounded so in float32."""
    from clipdist.publish.coarse import write_coarse

    draw = np.random.default_rng(0)
    centres = draw.normal(size=(1000, width)).astype(np.float32)
    common = draw.normal(size=width).astype(np.float32)
    features = np.lib.format.open_memmap(folder / "features.npy", mode="w+", dtype=np.float16, shape=(rows, width))
    step = 20_000
    for start in range(0, rows, step):
        count = min(step, rows - start)
        some = centres[draw.integers(0, len(centres), count)] + draw.standard_normal((count, width), np.float32)
        some = common + spread * some
        features[start : start + count] = some / np.linalg.norm(some, axis=1, keepdims=True)
    features.flush()
    for path in write_coarse(features, folder / "x_coarse.npy.partial"):
        path.rename(path.with_suffix(""))


def draw_queries(folder: Path, count: int, seed: int) -> np.ndarray:
    """float32 unit vectors: rows with noise as long as they are."""
    features = np.load(folder / "features.npy", mmap_mode="r")
    draw = np.random.default_rng([1, seed])
    some = features[np.sort(draw.choice(len(features), count, replace=False))].astype(np.float32)
    some += draw.normal(size=some.shape).astype(np.float32) / np.sqrt(some.shape[1])
    unit: np.ndarray = some / np.linalg.norm(some, axis=1, keepdims=True)
    return unit


def _partitioned(score_QN: np.ndarray) -> np.ndarray:
    best = np.argpartition(-score_QN, TOP, axis=1)[:, :TOP]
    order = np.argsort(-np.take_along_axis(score_QN, best, 1), axis=1, kind="stable")
    return np.take_along_axis(best, order, 1)


def numpy_float32(folder: Path) -> Search:
    held = np.load(folder / "features.npy").astype(np.float32)
    return lambda query_QD: _partitioned((held @ query_QD.T).T)


def torch_float32(folder: Path) -> Search:
    import torch

    held = torch.from_numpy(np.load(folder / "features.npy").astype(np.float32))
    return lambda query_QD: (torch.from_numpy(query_QD) @ held.T).topk(TOP, dim=1).indices.numpy()


def _torch_half(folder: Path, kind: str) -> Search:
    import torch

    dtype = getattr(torch, kind)
    held = torch.from_numpy(np.load(folder / "features.npy")).to(dtype)

    def search(query_QD: np.ndarray) -> np.ndarray:
        query = torch.from_numpy(query_QD).to(dtype)
        score_QN = (held @ query[0])[None] if len(query) == 1 else query @ held.T
        return score_QN.float().topk(TOP, dim=1).indices.numpy()

    return search


def torch_float16(folder: Path) -> Search:
    return _torch_half(folder, "float16")


def torch_bfloat16(folder: Path) -> Search:
    return _torch_half(folder, "bfloat16")


def blocks_of_float16(folder: Path) -> Search:
    """Mapped float16, made float32 a block at a time."""
    import torch

    held = torch.from_numpy(np.load(folder / "features.npy", mmap_mode="c"))

    def search(query_QD: np.ndarray) -> np.ndarray:
        query_DQ = torch.from_numpy(query_QD).T.contiguous()
        parts = [held[start : start + 4096].float() @ query_DQ for start in range(0, len(held), 4096)]
        return torch.cat(parts).topk(TOP, dim=0).indices.T.numpy()

    return search


def _faiss(folder: Path, kind: str) -> Search:
    import faiss

    held = np.load(folder / "features.npy", mmap_mode="r")
    index = faiss.index_factory(held.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        index.train(held[:20_000].astype(np.float32))
    for start in range(0, len(held), 50_000):
        index.add(held[start : start + 50_000].astype(np.float32))
    return lambda query_QD: index.search(query_QD, TOP)[1]


def faiss_float16(folder: Path) -> Search:
    return _faiss(folder, "SQfp16")


def faiss_8_bits(folder: Path) -> Search:
    return _faiss(folder, "SQ8")


def clipdist_exact(folder: Path) -> Search:
    from clipdist.publish.search import search_exact

    held = np.load(folder / "features.npy", mmap_mode="r")
    coarse, bounds = np.load(folder / "x_coarse.npy", mmap_mode="c"), np.load(folder / "x_bounds.npy", mmap_mode="c")
    return lambda query_QD: np.stack(search_exact(held, coarse, bounds, query_QD, TOP).rows)


CONTESTANTS = (
    numpy_float32,
    torch_float32,
    torch_float16,
    torch_bfloat16,
    blocks_of_float16,
    faiss_float16,
    faiss_8_bits,
    clipdist_exact,
)


def memory_mib() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    held = {line.split(":")[0]: int(line.split()[1]) // 1024 for line in lines if line.startswith("Rss")}
    return {"own": held["RssAnon"], "mapped": held["RssFile"]}


def compete(name: str, folder: Path, threads: int, pipe: Any) -> None:
    """In a process of its own: answers each request by (seconds, processor seconds, rows)."""
    import torch

    torch.set_num_threads(threads)
    if name.startswith("faiss"):
        import faiss

        faiss.omp_set_num_threads(threads)
    before = memory_mib()
    search = globals()[name](folder)
    pipe.send("ready")
    while (query_QD := pipe.recv()) is not None:
        began, cpu = time.perf_counter(), time.process_time()
        rows = search(query_QD)
        pipe.send((time.perf_counter() - began, time.process_time() - cpu, rows))
    after = memory_mib()
    pipe.send({kind: after[kind] - before[kind] for kind in after})


def truth(folder: Path, query_QD: np.ndarray) -> np.ndarray:
    """The best rows by float64 over all of them."""
    features = np.load(folder / "features.npy", mmap_mode="r")
    score_QN = np.concatenate(
        [
            features[n : n + 20_000].astype(np.float64) @ query_QD.T.astype(np.float64)
            for n in range(0, len(features), 20_000)
        ]
    ).T
    return _partitioned(score_QN)


def measure(args: argparse.Namespace, folder: Path, names: list[str]) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in names:
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=compete, args=(name, folder, args.threads, theirs)))
        processes[-1].start()
        assert pipes[name].recv() == "ready"
        print(f"{name}: ready", file=sys.stderr, flush=True)
    results: dict[str, Any] = {name: {} for name in names}
    for queries in args.queries:
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        right = dict.fromkeys(names, 0)
        repetitions = args.repetitions if queries < 100 else max(3, args.repetitions // 5)
        for repetition in range(repetitions + 1):  # the first is not counted: pages are touched for the first time
            query_QD = draw_queries(folder, queries, repetition)
            expected = truth(folder, query_QD[:4]) if repetition in (1, 2) else None
            for name in names:
                time.sleep(PAUSE)
                pipes[name].send(query_QD)
                seconds, cpu, rows = pipes[name].recv()
                if repetition:
                    times[name].append((seconds, cpu))
                if expected is not None:
                    right[name] += int((rows[:4] == expected).all(axis=1).sum())
        for name in names:
            wall = [one[0] for one in times[name]]
            results[name][f"queries_{queries}"] = {
                "least_ms": round(1000 * min(wall), 2),
                "median_ms": round(1000 * statistics.median(wall), 2),
                "least_cpu_ms": round(1000 * min(one[1] for one in times[name]), 2),
                "same_as_float64": f"{right[name]} of {2 * min(4, queries)}",
            }
        print(queries, json.dumps({name: results[name][f"queries_{queries}"] for name in names}), file=sys.stderr)
    for name, process in zip(names, processes, strict=True):
        pipes[name].send(None)
        results[name]["memory_mib"] = pipes[name].recv()
        process.join()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 16, 256], help="in one call")
    parser.add_argument("--repetitions", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--spread", type=float, default=1.0, help="of the rows; .1: a model whose cosines hardly differ"
    )
    parser.add_argument("--contestants", nargs="+", default=[one.__name__ for one in CONTESTANTS])
    parser.add_argument("--folder", type=Path, help="where rows are drawn, and kept; default: a temporary one")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(args.threads)  # for the processes
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        if not (folder / "x_bounds.npy").exists():
            draw_rows(args.rows, args.width, folder, args.spread)
        print(f"rows drawn and quantised in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        results = measure(args, folder, args.contestants)
    settings = {name: value for name, value in vars(args).items() if name not in ("folder", "contestants")}
    versions = {name: version(name) for name in ("numpy", "torch", "faiss-cpu")}
    load = os.getloadavg()[0]
    print(json.dumps({"settings": settings, "versions": versions, "load": load, "results": results}, indent=1))


if __name__ == "__main__":
    main()
