"""Where the files of a foreign tar lie, so that each can be read in its place: one pass, nothing is unpacked.

Unlike `tar_samples.index_tar` this knows no samples, and of a damaged tar it tells what lies before the damage.
"""

import hashlib
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipdist.data.sets.recode import FilePart
from clipdist.data.sets.tar_samples import TAR_ERRORS, HashedFile
from clipdist.data.sets.writer import BLOCK
from clipdist.errors import UserError


@dataclass
class TarMembers:
    """The regular files of a tar, N of them, in its order; `offsets_N`, `sizes_N`: int64, bytes.

    `others` names members that are neither files nor folders (links, devices, files with holes). `damage` says what
    ended the pass early, "" when the tar is whole; a file that is cut there is in none of the lists. `md5`: 32
    hexadecimal digits, "" when it was not asked for.
    """

    path: Path
    names: list[str]
    offsets_N: np.ndarray
    sizes_N: np.ndarray
    others: list[str]
    damage: str = ""
    md5: str = ""

    def part(self, number: int) -> FilePart:
        return FilePart(self.path, int(self.offsets_N[number]), int(self.sizes_N[number]), self.names[number])


def tar_members(path: Path, *, md5: bool = False) -> TarMembers:
    """The members of a plain tar. Without `md5` only headers are read. Raises `UserError` when it cannot be opened."""
    names: list[str] = []
    others: list[str] = []
    places: list[tuple[int, int]] = []
    damage = ""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            source = HashedFile(file, hashlib.md5(usedforsecurity=False)) if md5 else file
            try:
                with tarfile.open(fileobj=source, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:  # type: ignore[call-overload]
                    for member in tar:
                        if member.isfile() and not member.issparse():
                            if member.offset_data + member.size > size:
                                raise tarfile.ReadError(f"{member.name} is cut off")
                            names.append(member.name)
                            places.append((member.offset_data, member.size))
                        elif not member.isdir():
                            others.append(member.name)
                # Python's tarfile takes a damaged header for the end; the true end is a block of zeros.
                if os.pread(file.fileno(), BLOCK, tar.offset) != bytes(BLOCK):
                    raise tarfile.ReadError(f"no header and no end at byte {tar.offset:,}")
            except TAR_ERRORS as error:
                damage = f"damaged or cut short after {len(names):,} files ({error})"
            if isinstance(source, HashedFile):
                source.read_rest()
            checksum = source.hasher.hexdigest() if isinstance(source, HashedFile) else ""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    table = np.array(places, np.int64).reshape(-1, 2)
    return TarMembers(path, names, table[:, 0], table[:, 1], others, damage, checksum)
