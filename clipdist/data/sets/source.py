"""What `clipdist repack` reads: a shard set, or a folder of tars, however they were written."""

import contextlib
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard
from webdataset.tariterators import group_by_keys, tar_file_iterator

from clipdist.data.sets.index import index_folder, split_name
from clipdist.data.sets.writer import UNFINISHED, ShardSetWriter
from clipdist.data.shard_index import IMAGE_EXTENSIONS
from clipdist.data.shards import MANIFEST, ShardSet, json_fields
from clipdist.errors import UserError, disk_errors

END = 1024  # bytes of zeros that end a tar


@contextlib.contextmanager
def opened_source(source: Path, beside: Path) -> Iterator[tuple[ShardSet, list[tuple[str, str, str]]]]:
    """The shard set at `source`, and samples that could not even be read into one: (tar, key, reason).

    A folder without a manifest is indexed through links in a temporary folder beside `beside`, so that nothing is
    written to it; tars that cannot be indexed are copied there, sample after sample.
    """
    if (source / MANIFEST).exists() or not source.is_dir() or (source / UNFINISHED).exists():
        yield ShardSet.open(source), []
        return
    tars = sorted(path for path in source.iterdir() if path.name.endswith((".tar", ".tar.zst", ".tar.gz")))
    if not tars:
        raise UserError(f"{source}: holds neither a {MANIFEST} nor a .tar, .tar.zst or .tar.gz file")
    with disk_errors(beside.parent):
        beside.absolute().parent.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(dir=beside.absolute().parent, prefix=f".{beside.name}-source-")
    with work as name:
        linked, copied = Path(name) / "linked", Path(name) / "copied"
        try:
            linked.mkdir()
            for path in tars:
                (linked / path.name).symlink_to(path.absolute())
            index_folder(linked, workers=1)
            opened, bad = ShardSet.open(linked), list[tuple[str, str, str]]()
        except UserError:  # damage, too, which reading them from front to back names
            bad = _copy(tars, copied)
            opened = ShardSet.open(copied)
        yield opened, bad


def _copy(tars: list[Path], folder: Path) -> list[tuple[str, str, str]]:
    """Reads tars from front to back as WebDataset does, into a shard set; the samples that are none."""
    bad: list[tuple[str, str, str]] = []
    seen: set[str] = set()
    with ShardSetWriter(folder) as writer:
        for path in tars:
            for sample in _samples(path):
                key = sample["__key__"]
                try:
                    if key in seen:
                        raise ValueError("its key was there before, or its members are not adjacent")
                    image, extension, fields = _parts(sample)
                except ValueError as error:
                    bad.append((path.name, key, str(error)))
                    continue
                seen.add(key)
                writer.write(split_name(path.name.removesuffix(".gz")), key, image, extension, fields)
        if not seen:
            raise UserError(
                f"{tars[0].parent}: no sample in {len(tars)} tars; expected an image and a text of equal name"
            )
    return bad


class _Ending:
    """A stream that remembers its last bytes."""

    def __init__(self, file: Any) -> None:
        self.file, self.last = file, b""

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.last = (self.last + data[-END:])[-END:]
        return data


def _samples(path: Path) -> Iterator[dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        file: Any = stack.enter_context(open(path, "rb"))
        if path.name.endswith(".zst"):
            file = stack.enter_context(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
        elif path.name.endswith(".gz"):
            import gzip

            file = stack.enter_context(gzip.GzipFile(fileobj=file))
        file = _Ending(file)
        members = ({**member, "__url__": path.name} for member in tar_file_iterator(file))
        count = 0
        try:
            for sample in group_by_keys(members):
                yield sample
                count += 1
            while file.read(1 << 20):
                pass
            # Python's tarfile takes a header that is cut short, or damaged, for the end.
            if any(file.last) or len(file.last) < END:
                raise tarfile.ReadError("its end is missing")
        except UserError:
            raise
        except Exception as error:  # tarfile, gzip, zstandard and WebDataset each have their own for damaged data
            what = " ".join(str(error).split())
            raise UserError(f"{path}: damaged tar after {count} samples ({what}); restore it") from None


def _parts(sample: dict[str, Any]) -> tuple[bytes, str, dict[str, Any]]:
    """(image, extension, fields); ValueError when a sample has no image, several, or no readable caption."""
    held = [extension for extension in IMAGE_EXTENSIONS if sample.get(extension)]
    if len(held) != 1:
        raise ValueError(f"{len(held)} images, expected one")
    try:
        fields, text = json_fields(sample.get("json", b"")), sample.get("txt", b"").decode()
    except ValueError as error:
        raise ValueError(f"unreadable caption: {error}") from None
    return sample[held[0]], held[0], fields if fields.get("text") else {**fields, "text": text}
