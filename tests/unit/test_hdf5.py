"""Images in HDF5: where they lie, what is read instead where they lie nowhere in one piece, what is refused."""

from pathlib import Path

import numpy as np
import pytest

from clipdist.data.sets.pack import Pair, pack_pairs
from clipdist.data.sets.recode import FilePart, ImageOptions
from clipdist.data.shards import ShardSet
from clipdist.errors import UserError
from clipdist.prepare.hdf5 import stored_images
from clipdist.prepare.units import duplicates_of
from tests.unit.pictures import encoded, picture

h5py = pytest.importorskip("h5py", reason="h5py (extra: isic) is not installed")
PICTURES = {f"ISIC_{number:07d}": encoded(picture(number), "JPEG") for number in range(12)}


def bytes_of(image: bytes | FilePart) -> bytes:
    return image if isinstance(image, bytes) else image.read_bytes()


def as_values(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def boxed(data: bytes) -> np.ndarray:
    one = np.empty((), object)
    one[()] = as_values(data)
    return one


WAYS = {
    "string": lambda file, name, data: file.create_dataset(name, data=np.bytes_(data)),
    "opaque": lambda file, name, data: file.create_dataset(name, data=np.void(data)),
    "bytes": lambda file, name, data: file.create_dataset(name, data=as_values(data)),
    "chunked": lambda file, name, data: file.create_dataset(name, data=as_values(data), chunks=(64,)),
    "gzip": lambda file, name, data: file.create_dataset(name, data=as_values(data), compression="gzip"),
    "values of any length": lambda file, name, data: file.create_dataset(
        name, (), h5py.vlen_dtype(np.uint8)
    ).write_direct(boxed(data)),
}


def write(path: Path, way: str, **options: object) -> Path:
    with h5py.File(path, "w", **options) as file:
        for name, data in PICTURES.items():
            WAYS[way](file, name, data)
    return path


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options", [{}, {"libver": "latest"}, {"userblock_size": 1024}], ids=["", "latest", "userblock"]
)
def test_every_way_of_storing_gives_the_bytes(tmp_path: Path, way: str, options: dict[str, object]) -> None:
    found = stored_images(write(tmp_path / "images.hdf5", way, **options))
    assert {name: bytes_of(image) for name, image in found.items()} == PICTURES
    placed = {isinstance(image, FilePart) for image in found.values()}
    assert placed == {way in ("string", "opaque", "bytes")}


def test_groups_are_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "images.hdf5", "string")
    with h5py.File(path, "a") as file:
        file.create_group("attributes")
    assert set(stored_images(path)) == set(PICTURES)


def test_a_name_that_is_not_utf8_keeps_its_bytes_in_writing(tmp_path: Path) -> None:
    path = write(tmp_path / "images.hdf5", "string")
    with h5py.File(path, "a") as file:
        file.create_dataset(b"\xff\xfe", data=np.bytes_(b"picture"))
    found = stored_images(path)
    assert set(found) == {*PICTURES, r"\xff\xfe"}
    assert bytes_of(found[r"\xff\xfe"]) == b"picture"
    with h5py.File(path, "a") as file:
        file.create_dataset(b"\xfa", data=np.zeros(3))
    with pytest.raises(UserError, match=r"dataset '\\\\xfa' holds values of type float64"):
        stored_images(path)


def test_one_value_of_any_length_is_itself_and_no_value_is_nothing(tmp_path: Path) -> None:
    data = PICTURES["ISIC_0000003"]
    with h5py.File(tmp_path / "images.hdf5", "w") as file:
        file.create_dataset("one", (1,), h5py.vlen_dtype(np.uint8))[0] = as_values(data)
        file.create_dataset("nothing", data=h5py.Empty("S10"))
    found = stored_images(tmp_path / "images.hdf5")
    assert {name: bytes_of(image) for name, image in found.items()} == {"one": data, "nothing": b""}
    with h5py.File(tmp_path / "images.hdf5", "a") as file:
        file.create_dataset("two", (2,), h5py.vlen_dtype(np.uint8))
    with pytest.raises(UserError, match=r"dataset 'two' holds 2 values, expected the bytes of one encoded image"):
        stored_images(tmp_path / "images.hdf5")


def test_other_values_damage_and_absence_are_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "images.hdf5", "string")
    whole = path.read_bytes()
    with h5py.File(path, "a") as file:
        file["pixels"] = np.zeros((3, 3))
    with pytest.raises(UserError, match="dataset 'pixels' holds values of type float64, expected the bytes"):
        stored_images(path)
    for damaged in (whole[: len(whole) // 2], b"", b"\xff\xd8\xff" * 999):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged, cut short or no HDF5 file"):
            stored_images(path)
    with pytest.raises(UserError, match="there is no such file"):
        stored_images(tmp_path / "none.hdf5")


def test_ranges_of_a_file_are_packed_by_several_processes_and_looked_at(tmp_path: Path) -> None:
    found = stored_images(write(tmp_path / "images.hdf5", "string"))
    pairs = [Pair(name, image, ["a picture"]) for name, image in found.items()]
    for workers in (0, 2):
        pack_pairs({"train": pairs}, tmp_path / f"set-{workers}", workers=workers, quiet=True)
    packed = ShardSet.open(tmp_path / "set-2").split("train")
    assert {sample.key: sample.image for sample in map(packed.read, range(len(packed)))} == PICTURES
    names = [path.name for path in sorted((tmp_path / "set-0").glob("*.tar"))]
    assert all((tmp_path / "set-0" / name).read_bytes() == (tmp_path / "set-2" / name).read_bytes() for name in names)
    twice = [pair.image for pair in pairs] + [pairs[3].image]
    assert duplicates_of(twice, workers=0, quiet=True).edges().tolist() == [[3, 12]]


def test_a_file_that_shrank_meanwhile_is_a_rejected_image(tmp_path: Path) -> None:
    found = stored_images(write(tmp_path / "images.hdf5", "string"))
    last = max(found.values(), key=lambda image: image.offset)
    with open(last.path, "r+b") as file:
        file.truncate(last.offset + 5)
    with pytest.raises(OSError, match="ends early"):
        last.read_bytes()
    pairs = [Pair(name, image, ["a picture"]) for name, image in found.items()]
    summary = pack_pairs(
        {"train": pairs}, tmp_path / "set", images=ImageOptions(check="none"), max_rejected_fraction=0.5, quiet=True
    )
    assert "ends early" in summary.rejected[-1].reason
    assert summary.total < len(PICTURES)
