"""The published tars of Google Landmarks v2 where they lie: which image is which member of which tar."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipdist.data.sets.pack import Rejected, available_cores, in_order
from clipdist.data.sets.recode import FilePart
from clipdist.data.sets.tar_members import TarMembers, tar_members
from clipdist.errors import UserError
from clipdist.prepare.landmark_tables import ID, Ids, id_text
from clipdist.progress import progress

TARS = 500
_TAR = re.compile(r"images_\d{3}\.tar")


def find_tars(raw: Path) -> list[Path]:
    """The tars in `raw` and in `raw/train`, by number; `UserError` when there are none, or two of one number."""
    if not raw.is_dir():
        raise UserError(f"{raw}: there is no such folder; expected the downloaded tars and tables")
    places = [folder for folder in (raw, raw / "train") if folder.is_dir()]
    found = sorted(
        (path for folder in places for path in folder.iterdir() if _TAR.fullmatch(path.name)),
        key=lambda path: path.name,
    )
    if not found:
        near = sorted(path.name for folder in places for path in folder.glob("images_*"))[:3]
        raise UserError(
            f"{raw}: found {', '.join(near) or 'no tars'}, expected images_000.tar and the like, there or in train/, "
            f"as they are published: not unpacked, not compressed"
        )
    for one, other in pairwise(found):
        if one.name == other.name:
            raise UserError(f"found {one} and {other}, expected each tar once; remove one of them")
    return found


def find_md5(raw: Path) -> dict[str, str]:
    """Name of a tar -> what its md5 file says, of all md5 files that are there."""
    found = {}
    for folder in (raw, raw / "train", raw / "md5sum" / "train"):
        for path in sorted(folder.glob("md5.images_*.txt")):
            words = path.read_text(encoding="utf-8", errors="replace").split()
            found[path.name.removeprefix("md5.").removesuffix(".txt") + ".tar"] = words[0].lower() if words else ""
    return found


@dataclass
class TarImages:
    """The images of some tars, N ids, ascending: in which tar (a place in `tars`) each lies, and as which member.

    `wrong_md5`: place of a tar -> what is wrong with it. `checked`: tars whose md5 was compared.
    """

    tars: list[TarMembers]
    ids_N: Ids
    tar_N: npt.NDArray[np.int64]
    member_N: npt.NDArray[np.int64]
    wrong_md5: dict[int, str]
    checked: int
    rejected: list[Rejected]

    def part(self, number: int) -> FilePart:
        return self.tars[self.tar_N[number]].part(self.member_N[number])

    @property
    def unchecked(self) -> int:
        return len(self.tars) - self.checked

    @property
    def complete(self) -> bool:
        """Whether every image of the set should be there."""
        return len(self.tars) == TARS and not self.wrong_md5 and not any(tar.damage for tar in self.tars)


def index_tars(
    paths: Sequence[Path], md5: Mapping[str, str], *, workers: int | None = None, quiet: bool = False
) -> TarImages:
    """Where each image lies. Tars that `md5` names are read in full and compared; of others only headers are read."""
    workers = min(available_cores() if workers is None else workers, len(paths))
    work = in_order(partial(_index_all, named=frozenset(md5)), paths, workers, 1)
    tars = list(progress(work, total=len(paths), unit="tar", description="indexing tars", quiet=quiet))
    rejected: list[Rejected] = []
    wrong: dict[int, str] = {}
    ids, of_tar, members = [], [], []
    for number, tar in enumerate(tars):
        expected = md5.get(tar.path.name)
        if expected is not None and tar.md5 != expected:
            wrong[number] = f"{tar.path.name} has md5 {tar.md5}, expected {expected}: fetch it again"
            rejected.append(Rejected(None, tar.path.name, str(tar.path), wrong[number]))
        if tar.damage:
            rejected.append(Rejected(None, tar.path.name, str(tar.path), f"{tar.damage}: fetch it again"))
        rejected += [
            Rejected(None, "", f"{tar.path.name}:{name}", "neither a file nor a folder") for name in tar.others
        ]
        for member, name in enumerate(tar.names):
            stem, _, extension = name.rpartition("/")[2].partition(".")
            if ID.fullmatch(stem) and extension == "jpg":
                ids.append(int(stem, 16))
                of_tar.append(number)
                members.append(member)
            else:
                rejected.append(Rejected(None, "", f"{tar.path.name}:{name}", "no image: expected <id>.jpg"))
    if not ids:
        first = f"; {rejected[0]}" if rejected else ""
        raise UserError(f"{paths[0]} …: no images in {len(paths)} tars, expected members a/b/c/<id>.jpg{first}")
    columns = np.array(ids, np.uint64), np.array(of_tar), np.array(members)
    # An image that lies in a sound tar, too, is taken from there.
    order = np.lexsort((columns[2], columns[1], np.isin(columns[1], list(wrong)), columns[0]))
    again = np.concatenate([[False], columns[0][order][1:] == columns[0][order][:-1]])
    for at in order[again].tolist():
        first = order[np.searchsorted(columns[0][order], columns[0][at])]
        part = tars[columns[1][at]].part(columns[2][at])
        reason = f"the same id as {tars[columns[1][first]].part(columns[2][first])}"
        rejected.append(Rejected(None, id_text(columns[0][at]), str(part), reason))
    ids_N, tar_N, member_N = (column[order[~again]] for column in columns)
    checked = sum(tar.path.name in md5 for tar in tars)
    return TarImages(tars, ids_N, tar_N, member_N, wrong, checked, rejected)


def _index_all(paths: list[Path], named: frozenset[str]) -> list[TarMembers]:
    return [tar_members(path, md5=path.name in named) for path in paths]
