"""Foreign tars read in place: every file where it lies, and what comes before the damage of a damaged one."""

import hashlib
import os
import tarfile
from pathlib import Path

import pytest

from clipdist.data.sets.recode import FilePart, ImageOptions, UnusableImage, recode
from clipdist.data.sets.tar_members import tar_members
from clipdist.errors import UserError
from tests.unit.tars import JPEG, PNG, Members, plain_tar

LONG = "1/" + "long" * 20 + "/" + "name" * 20 + ".jpg"
MEMBERS: Members = [("0/a.jpg", JPEG), ("0/b.png", PNG), (LONG, JPEG), ("empty.txt", b"")]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("md5", [False, True])
def test_each_file_is_one_read_away(tmp_path: Path, format: int, md5: bool) -> None:
    path = plain_tar(tmp_path / "x.tar", MEMBERS, format, folders=("0", "1"))
    found = tar_members(path, md5=md5)
    assert [(name, found.part(number).read_bytes()) for number, name in enumerate(found.names)] == MEMBERS
    assert (found.others, found.damage) == ([], "")
    assert found.md5 == (hashlib.md5(path.read_bytes()).hexdigest() if md5 else "")
    assert str(found.part(0)) == "x.tar:0/a.jpg"
    assert recode(found.part(0), ImageOptions()) == (JPEG, "jpg")


@pytest.mark.parametrize("md5", [False, True])
def test_what_lies_before_the_damage_is_found(tmp_path: Path, md5: bool) -> None:
    """Cut at every block: never a wrong file, never silently a shorter list."""
    path = plain_tar(tmp_path / "x.tar", MEMBERS)
    whole, sound = path.read_bytes(), tar_members(path)
    parts = [sound.part(number) for number in range(len(MEMBERS))]
    for size in range(512, len(whole), 512):
        path.write_bytes(whole[:size])
        found = tar_members(path, md5=md5)
        assert found.names == [part.name for part in parts if part.offset + part.size <= size]
        assert [found.part(number) for number in range(len(found.names))] == parts[: len(found.names)]
        assert bool(found.damage) == (size < parts[-1].offset + 512), size
    path.write_bytes(whole[: parts[1].offset - 512] + b"\xff" * 512 + whole[parts[1].offset :])
    found = tar_members(path, md5=md5)
    assert found.names == ["0/a.jpg"]
    assert found.damage.startswith("damaged or cut short after 1 files (no header and no end at byte")


def test_no_tar_at_all(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"")
    assert "after 0 files" in tar_members(tmp_path / "x.tar").damage
    (tmp_path / "x.tar").write_bytes(b"<html>404</html>" * 100)
    assert "after 0 files" in tar_members(tmp_path / "x.tar", md5=True).damage
    with pytest.raises(UserError, match="cannot be read"):
        tar_members(tmp_path / "none.tar")


def test_links_are_named_and_not_followed(tmp_path: Path) -> None:
    path = plain_tar(tmp_path / "x.tar", MEMBERS)
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo(f"link{kind.decode()}")
            link.type, link.linkname = kind, "0/a.jpg"
            tar.addfile(link)
    found = tar_members(path)
    assert found.others == ["link2", "link1"]
    assert len(found.names) == len(MEMBERS)


def test_a_part_of_a_file_that_became_shorter(tmp_path: Path) -> None:
    path = plain_tar(tmp_path / "x.tar", MEMBERS)
    part = tar_members(path).part(1)
    os.truncate(path, part.offset + part.size - 1)
    with pytest.raises(OSError, match="ends early"):
        part.read_bytes()
    with pytest.raises(UnusableImage, match="unreadable image file"):
        recode(part, ImageOptions())
    with pytest.raises(UnusableImage, match="missing image file"):
        recode(FilePart(tmp_path / "gone.tar", 0, 5, "x"), ImageOptions())
