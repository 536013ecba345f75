"""Approximate search by a faiss index that is made once and lies beside the embeddings.

The index (IVF with 8 bits a value) only proposes rows; their products are then computed in float64 from the stored
float16, so that scores are those of the exact search, and what may be wrong is that a row is missing. How often that
happens is measured against the exact search when the index is made, and stored with it.

N rows, D wide, Q queries.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clipdist.data.shards import write_atomically
from clipdist.errors import UserError, disk_errors
from clipdist.publish.coarse import rows_at_once
from clipdist.publish.embedding_parts import sync
from clipdist.publish.search import Found, check_queries, exact_scores, search_exact

if TYPE_CHECKING:
    from clipdist.publish.embeddings import Among, StoredEmbeddings

TOP = 10
SAMPLED_QUERIES = 100
TRAINED_PER_LIST = 50
PROPOSED = 10
"""Rows proposed for each that is wanted."""
WANTED_RECALL = 0.95
FORMAT_VERSION = 1


def require_faiss() -> Any:
    """The module; `UserError` when it is not installed."""
    try:
        import faiss
    except ImportError:
        raise UserError('approximate search needs faiss; run: pip install "clipdist[search]"') from None
    return faiss


@dataclass(frozen=True)
class Measured:
    """How the index was set, and its recall of the exact search's `top` rows."""

    lists: int
    probes: int
    recall: float
    top: int
    queries: int
    queries_are: str


class ApproximateIndex:
    """An index over one kind of a gallery's features. Raises `UserError` without faiss, and below 1,000 rows."""

    def __init__(self, stored: "StoredEmbeddings", among: "Among" = "image") -> None:
        self.faiss = require_faiss()
        self.features_ND = stored.features(among)
        if len(self.features_ND) < 1000:
            raise UserError(f"--approximate: {len(self.features_ND):,} rows; below 1,000 use the exact search")
        self.index, self.measured = self._opened(stored, among)

    def search(self, query_QD: np.ndarray, top: int) -> Found:
        """As `search_exact`, but that rows may be missing."""
        query_QD = check_queries(query_QD, self.features_ND.shape[1], top)
        self.index.nprobe = self.measured.probes
        return self._search(query_QD, top)

    def _search(self, query_QD: np.ndarray, top: int) -> Found:
        wanted = min(len(self.features_ND), PROPOSED * top)
        _, proposed_QK = self.index.search(query_QD.astype(np.float32), wanted)
        rows, scores = [], []
        for query_D, proposed in zip(query_QD, proposed_QK, strict=True):
            own = np.sort(proposed[proposed >= 0])
            score = exact_scores(self.features_ND, own, query_D)
            best = np.lexsort((own, -score))[:top]
            rows.append(own[best])
            scores.append(score[best])
        return Found(rows, scores, wanted * len(query_QD))

    def _opened(self, stored: "StoredEmbeddings", among: "Among") -> tuple[Any, Measured]:
        """The index from the disk when it is of these features, else made and written."""
        path = stored.folder / f"{among}.faiss"
        about = path.with_suffix(".faiss.json")
        key = {"format_version": FORMAT_VERSION, "features": stored.digest(among)}
        try:
            body = json.loads(about.read_text(encoding="utf-8"))
            # A mapped file that is too short would end the process, not raise.
            if body["made_of"] == key and body["bytes"] == path.stat().st_size:
                return self.faiss.read_index(str(path), self.faiss.IO_FLAG_MMAP), Measured(**body["measured"])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError):
            pass  # absent, damaged or of other features: it can always be made again
        index = self._made()
        self.index = index
        measured = self._measure(stored, among)
        with disk_errors(stored.folder):
            partial = path.with_name(path.name + ".partial")
            self.faiss.write_index(index, str(partial))
            sync(partial)
            os.replace(partial, path)
            body = {"made_of": key, "bytes": path.stat().st_size, "measured": asdict(measured)}
            write_atomically(about, (json.dumps(body, indent=1) + "\n").encode())
        return index, measured

    def _made(self) -> Any:
        rows, width = self.features_ND.shape
        lists = max(16, round(4 * math.sqrt(rows)))
        lists = min(lists, rows // 39)  # faiss wants 39 rows for each centre that it learns
        index = self.faiss.index_factory(width, f"IVF{lists},SQ8", self.faiss.METRIC_INNER_PRODUCT)
        draw = np.random.default_rng(0)
        some = np.sort(draw.choice(rows, min(rows, TRAINED_PER_LIST * lists), replace=False))
        index.train(self.features_ND[some].astype(np.float32))
        step = rows_at_once(width)
        for start in range(0, rows, step):
            index.add(self.features_ND[start : start + step].astype(np.float32))
        return index

    def _measure(self, stored: "StoredEmbeddings", among: "Among") -> Measured:
        """Doubles the lists that are looked into until the recall is high enough, or all are."""
        other: Among = "text" if among == "image" else "image"
        queries_are = other if other in stored.kinds and len(stored.features(other)) else among
        source = stored.features(queries_are)
        some = np.sort(np.random.default_rng(1).choice(len(source), min(SAMPLED_QUERIES, len(source)), replace=False))
        query_QD = source[some].astype(np.float64)
        exact = search_exact(self.features_ND, *stored.coarse(among), query_QD, TOP)
        probes, lists = 1, self.index.nlist
        while True:
            self.index.nprobe = probes
            found = self._search(query_QD, TOP)
            both = [len(np.intersect1d(a, b)) for a, b in zip(exact.rows, found.rows, strict=True)]
            recall = sum(both) / sum(map(len, exact.rows))
            if recall >= WANTED_RECALL or probes >= lists:
                return Measured(lists, probes, recall, TOP, len(query_QD), f"{queries_are} features of the gallery")
            probes = min(2 * probes, lists)
