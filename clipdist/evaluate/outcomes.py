"""How each single query of an evaluation came out, kept beside its JSON: what two models are compared by.

An `.npz` of plain arrays, never pickled. N images, M texts; P is a part: `zero_shot` or `classification`.

    told                              uint8: a JSON object with `keys` [N] and `units` [N], or null without any
    image_to_text/rank                int32 [N]: of the best right answer, 0 for a query without one
    image_to_text/average_precision   float64 [N], NaN for a query without a right answer
    text_to_image/…                   the same of [M] texts
    text/owner, text/hash             int32 [M] row of each text's image, uint64 [M] hash of its words
    P/rank, P/label                   int32 [N]: rank of the true class, 0 where there is none; the class, -1 for none
    P/log_probability                 float32 [N, C], where that is no more than 4 M numbers
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from clipdist.data.shards import write_atomically
from clipdist.errors import UserError
from clipdist.evaluate.classification import log_softmax, ranks_and_decisions
from clipdist.evaluate.retrieval import RetrievalScores

MOST_PROBABILITIES = 4_000_000
DIRECTIONS = ("image_to_text", "text_to_image")
CLASS_PARTS = ("zero_shot", "classification")


@dataclass(frozen=True)
class Outcomes:
    """Of the images `keys`, in the split's order; `units` are those that were resampled, None without."""

    keys: Sequence[str]
    units: Sequence[Any] | None
    arrays: Mapping[str, np.ndarray]

    def save(self, path: Path) -> dict[str, str]:
        """Writes the file; what the JSON of the evaluation says of it: its name and checksum."""
        told = json.dumps({"keys": list(self.keys), "units": None if self.units is None else list(self.units)})
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, told=np.frombuffer(told.encode(), np.uint8), **self.arrays)
        data = buffer.getvalue()
        write_atomically(path, data)
        return {"file": path.name, "xxh3_64": xxhash.xxh3_64_hexdigest(data)}

    @staticmethod
    def load(path: Path, checksum: str) -> "Outcomes":
        """Raises `UserError` where there is no such file, or it is not the one of this checksum."""
        try:
            data = path.read_bytes()
            if xxhash.xxh3_64_hexdigest(data) != checksum:
                raise UserError(f"{path}: not the file that its evaluation wrote; run clipdist eval again")
            with np.load(io.BytesIO(data), allow_pickle=False) as held:
                arrays = {name: held[name] for name in held.files}
            told = json.loads(arrays.pop("told").tobytes())
            return Outcomes(told["keys"], told["units"], arrays)
        except FileNotFoundError:
            raise UserError(f"{path}: missing; run clipdist eval again") from None
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); run clipdist eval again") from None


def outcomes_of_retrieval(
    scores: RetrievalScores, text_owner_M: np.ndarray, texts: Sequence[str]
) -> dict[str, np.ndarray]:
    """The arrays of both directions."""
    hashes = [xxhash.xxh3_64_intdigest(text.encode(errors="surrogatepass")) for text in texts]
    found: dict[str, np.ndarray] = {
        "text/owner": text_owner_M.astype(np.int32),
        "text/hash": np.array(hashes, np.uint64),
    }
    for name, one in zip(DIRECTIONS, (scores.image_to_text, scores.text_to_image), strict=True):
        found[f"{name}/rank"] = one.ranks_Q.astype(np.int32)
        if one.average_precision_Q is not None:
            found[f"{name}/average_precision"] = one.average_precision_Q
    return found


def outcomes_of_classes(
    part: str, logits_NC: np.ndarray, label_N: np.ndarray, tolerance: float
) -> dict[str, np.ndarray]:
    """The arrays of a part that decides on classes; `label_N` is negative for an image without one."""
    asked = np.flatnonzero(label_N >= 0)
    rank_N = np.zeros(len(label_N), np.int32)
    rank_N[asked] = ranks_and_decisions(logits_NC[asked], label_N[asked], tolerance)[0]
    found = {f"{part}/rank": rank_N, f"{part}/label": label_N.astype(np.int32)}
    if logits_NC.size <= MOST_PROBABILITIES:
        found[f"{part}/log_probability"] = log_softmax(logits_NC).astype(np.float32)
    return found
