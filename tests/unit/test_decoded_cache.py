"""The file of decoded pixels: what is read back is right or absent, whatever killed, truncated or filled it."""

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdist.data.images import cache as module
from clipdist.data.images.cache import (
    CHUNK,
    FIELDS,
    IN_USE,
    MAKING,
    PIXELS,
    RECORD,
    RECORDS,
    DecodedCache,
    cache_bytes,
    cached_size,
    cached_sizes,
    clean,
)
from clipdist.errors import UserError

processes = multiprocessing.get_context("fork")
REPOSITORY = Path(__file__).parents[2]


def content(number: int, height: int, width: int, payload: int) -> tuple[np.ndarray, bytes]:
    """What sample `number` is made of: a function of its number, so that a mix-up shows."""
    draw = np.random.default_rng(number)
    return draw.integers(0, 256, (height, width, 3), np.uint8), draw.bytes(payload)


class Samples:
    """Some samples of given sizes, `(height, width, payload)` each."""

    def __init__(self, sizes: list[tuple[int, int, int]]) -> None:
        self.hw = np.array([size[:2] for size in sizes], dtype=np.int64).reshape(-1, 2)
        self.payloads = np.array([size[2] for size in sizes], dtype=np.int64)
        self.contents = [content(number, *size) for number, size in enumerate(sizes)]

    def open(self, folder: Path, identity: str = "set", limit_gib: float = 1.0) -> DecodedCache:
        return DecodedCache.open(folder, identity, self.hw, self.payloads, limit_gib=limit_gib)

    def put_all(self, cache: DecodedCache, order: list[int] | None = None) -> None:
        for number in range(len(self.contents)) if order is None else order:
            cache.put(number, *self.contents[number])

    def sound(self, cache: DecodedCache) -> list[bool]:
        """Which samples the cache has; asserts that what it has is right."""
        found = []
        for number, (pixels, payload) in enumerate(self.contents):
            got = cache.get(number)
            found.append(got is not None)
            if got is not None:
                assert got[0].shape == pixels.shape
                assert np.array_equal(got[0], pixels), number
                assert got[1] == payload, number
        return found


def some(count: int = 6, seed: int = 0, largest: int = 12) -> Samples:
    draw = random.Random(seed)
    return Samples([(draw.randint(1, largest), draw.randint(1, largest), draw.randint(0, 40)) for _ in range(count)])


def in_child(function: Callable[..., Any], *arguments: Any) -> int:
    """Runs it in a process of its own, so that a SIGBUS shows as its exit code."""
    child = processes.Process(target=function, args=arguments)
    child.start()
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


def record_of(folder: Path, number: int, identity: str = "set") -> np.void:
    return np.fromfile(folder / identity / RECORDS, RECORD)[number]


# Sizes


def test_the_shorter_side_is_scaled_down_never_up_and_the_longer_one_bounded() -> None:
    assert cached_size(640, 480, 256) == (256, 341)
    assert cached_size(480, 640, 256) == (341, 256)
    assert cached_size(100, 60, 256) == (60, 100)
    assert cached_size(5000, 500, 256) == (256, 768)
    assert cached_size(2000, 10, 256) == (10, 768)
    assert cached_size(0, 0, 256) == (0, 0)
    assert cached_size(0, 7, 256) == (0, 0)


@given(st.integers(1, 20000), st.integers(1, 20000), st.integers(1, 600))
def test_stored_sizes_keep_the_aspect_to_a_rounding(width: int, height: int, side: int) -> None:
    stored_height, stored_width = cached_size(width, height, side)
    assert (stored_width, stored_height) == cached_size(height, width, side)
    assert 1 <= min(stored_height, stored_width) == min(width, height, side)
    assert max(stored_height, stored_width) <= 3 * side
    factor = min(1.0, side / min(width, height))
    assert abs(max(stored_height, stored_width) - min(max(width, height) * factor, 3 * side)) <= 0.5
    both = cached_sizes(np.array([width, 0]), np.array([height, 5]), side)
    assert both.tolist() == [[stored_height, stored_width], [0, 0]]


# Round trips


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 70)), max_size=12),
    st.randoms(use_true_random=False),
)
def test_what_was_put_is_read_back(sizes: list[tuple[int, int, int]], draw: random.Random) -> None:
    samples = Samples(sizes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = samples.open(folder)
        assert samples.sound(cache) == [False] * len(sizes)
        order = [number for number in range(len(sizes)) if draw.random() < 0.7]
        draw.shuffle(order)
        samples.put_all(cache, order + order[:2])
        expected = [number in order and sizes[number][0] * sizes[number][1] > 0 for number in range(len(sizes))]
        for opened in (cache, samples.open(folder), pickle.loads(pickle.dumps(cache))):
            assert samples.sound(opened) == expected
            assert opened.stored() == sum(expected)
        records = np.fromfile(folder / "set" / RECORDS, RECORD)
        assert not (records["offset"] % 64).any()
        used = sum((folder / "set" / name).stat().st_size for name in (PIXELS, RECORDS))
        assert used == cache_bytes(samples.hw, samples.payloads)


def test_samples_beyond_the_first_chunk_lie_behind_one_another(tmp_path: Path) -> None:
    count = 2 * CHUNK + 3
    hw, payloads = np.tile([[2, 3]], (count, 1)), np.full(count, 60)
    cache = DecodedCache.open(tmp_path, "set", hw, payloads, limit_gib=1)
    records = np.fromfile(tmp_path / "set" / RECORDS, RECORD)
    assert (records["offset"] == np.arange(count) * 128).all()
    for number in (0, CHUNK - 1, CHUNK, 2 * CHUNK, count - 1):
        cache.put(number, *content(number, 2, 3, 50))
    for number in (0, CHUNK - 1, CHUNK, 2 * CHUNK, count - 1):
        got = cache.get(number)
        assert got is not None
        assert np.array_equal(got[0], content(number, 2, 3, 50)[0])
    assert cache.stored() == 5


def test_pixels_are_a_read_only_view_that_outlives_the_cache(tmp_path: Path) -> None:
    samples = some()
    cache = samples.open(tmp_path)
    samples.put_all(cache)
    got, again = cache.get(3), cache.get(3)
    assert got is not None
    assert again is not None
    assert np.shares_memory(got[0], again[0]), "a copy, not a view of the map"
    with pytest.raises(ValueError):
        got[0][0] = 0
    cache.close()
    assert cache.get(3) is None
    del cache
    assert np.array_equal(got[0], samples.contents[3][0])


def test_pixels_need_not_be_contiguous_but_of_the_size_laid_out(tmp_path: Path) -> None:
    cache = DecodedCache.open(tmp_path, "set", np.array([[4, 6]]), np.array([3]), limit_gib=1)
    pixels, payload = content(0, 6, 4, 3)
    cache.put(0, pixels, payload)
    cache.put(0, pixels.transpose(1, 0, 2), payload + b"x")
    assert cache.get(0) is None, "what does not fit is not stored"
    cache.put(0, pixels.transpose(1, 0, 2), payload)
    got = cache.get(0)
    assert got is not None
    assert np.array_equal(got[0], pixels.transpose(1, 0, 2))


def test_a_stored_sample_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = some()
    cache = samples.open(tmp_path)
    samples.put_all(cache)
    monkeypatch.setattr(os, "pwrite", lambda *_: pytest.fail("written again"))
    samples.put_all(samples.open(tmp_path))


def test_another_identity_is_another_cache_and_other_sizes_replace_it(tmp_path: Path) -> None:
    samples, others = some(seed=1), some(seed=2)
    first, second = samples.open(tmp_path, "one"), samples.open(tmp_path, "two")
    samples.put_all(first)
    assert not any(samples.sound(second))
    replaced = others.open(tmp_path, "one")
    others.put_all(replaced)
    assert all(others.sound(replaced))
    assert all(samples.sound(first)), "whoever has the old files open keeps them"


def test_sizes_that_take_the_same_room_are_other_sizes(tmp_path: Path) -> None:
    samples, turned = Samples([(4, 6, 5)]), Samples([(6, 4, 5)])
    samples.put_all(samples.open(tmp_path))
    cache = turned.open(tmp_path)
    turned.put_all(cache)
    assert turned.sound(cache) == [True]


def test_a_copy_by_pickle_holds_no_sizes_and_is_off_once_the_cache_is_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = some(2000).open(tmp_path)
    data = pickle.dumps(cache)
    assert len(data) < 1000
    shutil.rmtree(tmp_path / "set")
    copy = pickle.loads(data)
    assert copy.get(1) is None
    copy.put(1, *content(1, 1, 1, 0))
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert not (tmp_path / "set").exists()


# Processes that are killed, and several at once


def fill(samples: Samples, folder: Path, seed: int, begun: Any) -> None:
    cache = samples.open(folder)
    order = list(range(len(samples.contents)))
    random.Random(seed).shuffle(order)
    begun.release()
    for number in order:
        samples.put_all(cache, [number])
        time.sleep(0.0005)  # so that whoever is to kill it halfway has the time to, on a busy machine too


def test_after_kill_9_every_sample_is_right_or_absent(tmp_path: Path) -> None:
    samples = some(800, largest=130)
    partial = 0
    for attempt in range(8):
        folder = tmp_path / str(attempt)
        begun = processes.Semaphore(0)
        children = [processes.Process(target=fill, args=(samples, folder, attempt + n, begun)) for n in range(2)]
        for child in children:
            child.start()
        for _ in children:
            assert begun.acquire(timeout=60)
        cache = samples.open(folder)
        while cache.stored() < 80 * attempt:
            pass
        for child in children:
            child.kill()
            child.join()
        found = samples.sound(cache)
        partial += any(found) and not all(found)
        samples.put_all(cache)
        assert all(samples.sound(cache))
    assert partial, "no attempt was killed halfway"


def killed_at(write: int, share: float, samples: Samples, folder: Path) -> None:
    """Puts sample 0, and dies in its `write`th write, of which only a share was done."""
    cache = samples.open(folder)
    real, calls = os.pwrite, iter(range(10))

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        if next(calls) == write:
            real(descriptor, memoryview(data)[: int(len(data) * share)], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(descriptor, data, offset)

    os.pwrite = pwrite  # type: ignore[assignment]
    samples.put_all(cache, [0])


@pytest.mark.parametrize("write", range(3))
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_a_put_that_is_cut_off_anywhere_is_a_sample_absent(tmp_path: Path, write: int, share: float) -> None:
    samples = Samples([(20, 30, 40), (20, 30, 40)])
    assert in_child(killed_at, write, share, samples, tmp_path) == -signal.SIGKILL
    assert record_of(tmp_path, 0)["state"] == 0, "the state is written last"
    cache = samples.open(tmp_path)
    assert samples.sound(cache) == [False, False]
    samples.put_all(cache)
    assert samples.sound(cache) == [True, True]


def test_a_disk_that_kept_the_state_but_not_the_pixels_is_noticed(tmp_path: Path) -> None:
    samples = some()
    cache = samples.open(tmp_path)
    samples.put_all(cache)
    with open(tmp_path / "set" / PIXELS, "r+b") as file:
        file.seek(int(record_of(tmp_path, 2)["offset"]))
        file.write(bytes(int(samples.hw[2].prod()) * 3))
    assert samples.sound(cache) == [number != 2 for number in range(6)]
    samples.put_all(cache)
    assert all(samples.sound(cache)), "a damaged sample is stored anew"


def build(samples: Samples, folder: Path, order: list[int], barrier: Any, answers: Any) -> None:
    barrier.wait()
    cache = samples.open(folder)
    inode = (folder / "set" / PIXELS).stat().st_ino
    samples.put_all(cache, order)
    answers.put((inode, all(samples.sound(cache))))


def test_processes_that_build_a_cache_together_make_one(tmp_path: Path) -> None:
    samples = some(60, largest=40)
    for attempt in range(3):
        barrier, answers = processes.Barrier(3), processes.Queue()
        orders = [list(range(60)), list(range(60)), list(range(59, -1, -1))]
        children = [
            processes.Process(target=build, args=(samples, tmp_path / str(attempt), order, barrier, answers))
            for order in orders
        ]
        for child in children:
            child.start()
        found = [answers.get(timeout=60) for _ in children]
        for child in children:
            child.join()
        assert [sound for _, sound in found] == [True] * 3
        assert len({inode for inode, _ in found}) == 1


def killed_while_laying_out(samples: Samples, folder: Path, last_step: str) -> None:
    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if last_step == "reserved":
        os.fsync = die
    else:
        module.write_atomically = die  # type: ignore[assignment]
    samples.open(folder)


@pytest.mark.parametrize("last_step", ["reserved", "written"])
def test_a_layout_that_was_cut_off_is_made_anew(tmp_path: Path, last_step: str) -> None:
    samples = some()
    assert in_child(killed_while_laying_out, samples, tmp_path, last_step) == -signal.SIGKILL
    assert (tmp_path / "set" / PIXELS).exists()
    (tmp_path / "set" / RECORDS).write_bytes(b"rubbish")
    cache = samples.open(tmp_path)
    samples.put_all(cache)
    assert all(samples.sound(cache))


def test_who_comes_while_another_lays_out_waits(tmp_path: Path) -> None:
    samples = some()
    (tmp_path / "set").mkdir()
    opened: list[DecodedCache] = []
    with open(tmp_path / "set" / MAKING, "w") as making:
        fcntl.flock(making, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: opened.append(samples.open(tmp_path)))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert not (tmp_path / "set" / PIXELS).exists()
    thread.join(60)
    assert len(opened) == 1


@pytest.mark.parametrize("name", [PIXELS, RECORDS, "layout.json"])
@pytest.mark.parametrize("fault", ["cut", "removed"])
def test_a_cache_that_lost_a_file_is_made_anew(tmp_path: Path, name: str, fault: str) -> None:
    samples = some()
    samples.put_all(samples.open(tmp_path))
    path = tmp_path / "set" / name
    path.unlink() if fault == "removed" else os.truncate(path, path.stat().st_size // 2)
    cache = samples.open(tmp_path)
    assert not any(samples.sound(cache))
    samples.put_all(cache)
    assert all(samples.sound(cache))
    assert json.loads((tmp_path / "set" / "layout.json").read_text())["samples"] == 6


# Damage


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[tuple[Samples, DecodedCache, Path]]:
    samples = some()
    cache = samples.open(tmp_path)
    samples.put_all(cache)
    yield samples, cache, tmp_path / "set"
    cache.close()


def test_no_flipped_bit_of_a_record_gives_wrong_pixels(stored: tuple[Samples, DecodedCache, Path]) -> None:
    samples, cache, folder = stored
    held = [cache.get(number) for number in range(len(samples.contents))]
    whole = (folder / RECORDS).read_bytes()
    lost = 0
    with open(folder / RECORDS, "r+b", buffering=0) as file:
        for position in range(len(whole)):
            for bit in range(8):
                file.seek(position)
                file.write(bytes([whole[position] ^ (1 << bit)]))
                found = samples.sound(cache)
                number = position // RECORD.itemsize
                assert [n for n, sound in enumerate(found) if not sound] in ([], [number])
                lost += not all(found)
                # Storing it again repairs it, or leaves it, but hurts no other.
                samples.put_all(cache, [number])
                assert sum(samples.sound(cache)) >= len(found) - 1
                file.seek(0)
                file.write(whole)
    assert lost > 0.8 * 8 * len(whole)
    for got, (pixels, payload) in zip(held, samples.contents, strict=True):
        assert got is not None
        assert np.array_equal(got[0], pixels)
        assert got[1] == payload


def test_no_flipped_byte_of_the_pixels_gives_wrong_ones(stored: tuple[Samples, DecodedCache, Path]) -> None:
    samples, cache, folder = stored
    whole = (folder / PIXELS).read_bytes()
    draw = random.Random(0)
    lost = 0
    with open(folder / PIXELS, "r+b", buffering=0) as file:
        for position in range(0, len(whole), 3):
            file.seek(position)
            file.write(bytes([whole[position] ^ draw.randrange(1, 256)]))
            found = samples.sound(cache)
            lost += not all(found)
            samples.put_all(cache)
            assert all(samples.sound(cache))
            file.seek(position)
            file.write(whole[position : position + 1])
    assert lost > 100


@pytest.mark.parametrize(
    "fields",
    [
        {"offset": 2**64 - 1},
        {"offset": 2**40},
        {"height": 2**32 - 1, "width": 2**32 - 1},
        {"height": 0},
        {"payload_size": 2**32 - 1},
        {"payload_size": 2**32 - 1, "capacity": 2**32 - 1},
        {"checksum": 0, "state": 1},
    ],
)
def test_absurd_records_are_refused(stored: tuple[Samples, DecodedCache, Path], fields: dict[str, int]) -> None:
    samples, cache, folder = stored
    records = np.memmap(folder / RECORDS, RECORD, "r+")
    for name, value in fields.items():
        records[name][1] = value
    assert samples.sound(cache) == [number != 1 for number in range(6)]
    samples.put_all(cache)
    assert samples.sound(cache)[2:] == [True] * 4


def test_two_records_that_changed_places_are_refused(tmp_path: Path) -> None:
    samples = Samples([(5, 6, 7)] * 2)
    cache = samples.open(tmp_path)
    samples.put_all(cache)
    records = np.memmap(tmp_path / "set" / RECORDS, RECORD, "r+")
    records[:] = records[::-1].copy()
    assert samples.sound(cache) == [False, False]
    samples.put_all(cache)
    assert samples.sound(cache) == [False, False], "at another's place nothing may be stored"


def test_damage_is_said_once(stored: tuple[Samples, DecodedCache, Path], caplog: pytest.LogCaptureFixture) -> None:
    samples, cache, folder = stored
    np.memmap(folder / RECORDS, RECORD, "r+")["checksum"][:3] += 1
    assert sum(samples.sound(cache)) == 3
    assert len(caplog.records) == 1
    assert "sample 0 is damaged" in caplog.text


def use_truncated(samples: Samples, folder: Path, name: str, size: int, populate: int) -> None:
    module.MADV_POPULATE_READ = populate  # type: ignore[misc]
    cache = samples.open(folder)
    samples.put_all(cache)
    os.truncate(folder / "set" / name, size)
    samples.sound(cache)
    samples.put_all(cache)
    found = samples.sound(cache)
    assert size or not any(found)


@pytest.mark.parametrize("name", [PIXELS, RECORDS])
@pytest.mark.parametrize("size", [0, 5000])
@pytest.mark.parametrize("populate", [22, 999], ids=["kernel asked", "kernel too old"])
def test_files_cut_short_under_a_running_job_crash_nobody(tmp_path: Path, name: str, size: int, populate: int) -> None:
    samples = some(200, largest=40)
    assert in_child(use_truncated, samples, tmp_path, name, size, populate) == 0


def test_files_removed_under_a_running_job_stay_whole(stored: tuple[Samples, DecodedCache, Path]) -> None:
    samples, cache, folder = stored
    shutil.rmtree(folder)
    assert all(samples.sound(cache))


# Space


def test_more_than_the_limit_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    samples = some()
    exact = cache_bytes(samples.hw, samples.payloads) / (1 << 30)
    with pytest.raises(UserError, match=r"data.cache_side.*data.cache: none"):
        samples.open(tmp_path, limit_gib=exact * 0.999)
    assert not list(tmp_path.iterdir())
    samples.open(tmp_path, limit_gib=exact)


def fail_with(number: int) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_space_that_cannot_be_reserved_is_an_error_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", fail_with(errno.ENOSPC))
    with pytest.raises(UserError, match=r"found .* GiB free.*needs .* GiB; .*cache_side.*cache_folder.*cache: none"):
        some().open(tmp_path)
    assert not (tmp_path / "set" / PIXELS).exists(), "what could be reserved is given back"


def test_a_disk_that_fills_up_later_ends_the_storing_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    samples = some()
    monkeypatch.setattr(os, "posix_fallocate", fail_with(errno.EOPNOTSUPP))
    cache = samples.open(tmp_path)
    assert "reserves no space" in caplog.text
    caplog.clear()
    samples.put_all(cache, [0, 1])
    monkeypatch.setattr(os, "pwrite", fail_with(errno.ENOSPC))
    samples.put_all(cache)
    samples.put_all(cache)
    assert len(caplog.records) == 1
    assert "2 of 6 samples are stored" in caplog.text
    assert samples.sound(cache) == [True, True, False, False, False, False]


def fill_up(path: Path) -> None:
    """Writes until the disk is full."""
    with suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def full_disk(folder: Path) -> None:
    """Runs in a name space of its own, where `folder` is a file system of 2 MiB."""
    samples = Samples([(100, 100, 10)] * 40)  # 1.2 MB
    with pytest.raises(UserError, match=r"found 0.00 GiB free"):
        Samples([(100, 100, 10)] * 80).open(folder)
    assert not list(folder.rglob(PIXELS))
    reserved = samples.open(folder, "reserved")
    rest = folder / "rest"
    fill_up(rest)
    samples.put_all(reserved)
    assert all(samples.sound(reserved)), "what was reserved cannot be taken by others"
    reserved.close()
    assert "reserved" in clean(folder, [], 0)
    rest.unlink()
    os.posix_fallocate = fail_with(errno.EOPNOTSUPP)  # type: ignore[assignment]
    sparse = samples.open(folder, "sparse")
    fill_up(rest)
    with open(rest, "r+b") as file:
        file.truncate(rest.stat().st_size - (300 << 10))
    samples.put_all(sparse)
    stored = sum(samples.sound(sparse))
    assert 0 < stored < 40
    assert sparse.stored() == stored


def test_a_full_disk_is_an_error_and_never_a_crash(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no name spaces")
    code = f"from pathlib import Path; from {__name__} import full_disk; full_disk(Path({str(tmp_path)!r}))"
    script = 'mount -t tmpfs -o size=2m none "$1" && exec "$2" -c "$3"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", str(tmp_path), sys.executable, code],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_folder_that_cannot_be_written_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="another folder"):
        some().open(tmp_path / "file")


def memory_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def open_a_million(folder: Path) -> None:
    count = 10**6
    hw, payloads = np.broadcast_to(np.array([2, 2]), (count, 2)), np.broadcast_to(np.array(5), (count,))
    for _ in range(2):
        before = memory_mib("VmRSS")
        cache = DecodedCache.open(folder, "set", hw, payloads, limit_gib=1)
        cache.put(count - 1, *content(0, 2, 2, 5))
        for number in range(0, count, 1001):
            cache.get(number)
        assert cache.stored() == 1
        assert memory_mib("VmHWM") - before < 20
        cache.close()


def test_a_million_samples_cost_no_memory(tmp_path: Path) -> None:
    assert in_child(open_a_million, tmp_path) == 0
    shutil.rmtree(tmp_path / "set")


# Old caches


def opened_at(folder: Path, identity: str, when: int) -> None:
    os.utime(folder / identity / IN_USE, (when, when))


@pytest.fixture
def three(tmp_path: Path) -> Samples:
    """Three caches, `b` the one opened longest ago, then `a`, then `c`."""
    samples = some()
    for identity, when in (("a", 2000), ("b", 1000), ("c", 3000)):
        samples.open(tmp_path, identity).close()
        opened_at(tmp_path, identity, when)
    return samples


def gib_of(samples: Samples, count: float) -> float:
    return count * cache_bytes(samples.hw, samples.payloads) / (1 << 30)


def test_clean_removes_what_was_opened_longest_ago(tmp_path: Path, three: Samples) -> None:
    assert clean(tmp_path, [], gib_of(three, 3)) == []
    assert clean(tmp_path, [], gib_of(three, 2.5)) == ["b"]
    assert clean(tmp_path, ["a"], gib_of(three, 1)) == []
    assert clean(tmp_path, ["a"], 0) == ["c"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    three.open(tmp_path, "b").close()
    opened_at(tmp_path, "b", 100)
    three.open(tmp_path, "b").close()
    assert clean(tmp_path, [], gib_of(three, 1)) == ["a"], "opening counts as use"
    assert clean(tmp_path / "nowhere", [], 0) == []


def hold_open(samples: Samples, folder: Path, identity: str, ready: Any) -> None:
    cache = samples.open(folder, identity)
    ready.release()
    time.sleep(60)
    cache.close()


def test_clean_spares_what_a_living_process_has_open(tmp_path: Path, three: Samples) -> None:
    ready = processes.Semaphore(0)
    child = processes.Process(target=hold_open, args=(three, tmp_path, "b", ready))
    child.start()
    assert ready.acquire(timeout=60)
    copy = pickle.loads(pickle.dumps(three.open(tmp_path, "a")))
    copy.get(0)
    assert clean(tmp_path, [], 0) == ["c"]
    child.kill()
    child.join()
    assert clean(tmp_path, [], 0) == ["b"]
    copy.close()
    assert clean(tmp_path, [], 0) == ["a"]


def test_clean_touches_nothing_but_caches(tmp_path: Path, three: Samples) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / PIXELS).write_bytes(b"mine")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "b" / "notes.txt").write_text("mine")
    assert clean(tmp_path, [], 0) == ["b", "a", "c"]
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["b/notes.txt", f"data/{PIXELS}", "notes.txt"]


def test_who_waited_for_a_removal_to_end_makes_the_cache_anew(tmp_path: Path) -> None:
    samples = some()
    samples.open(tmp_path).close()
    opened: list[DecodedCache] = []
    with open(tmp_path / "set" / IN_USE, "r+") as removing:
        fcntl.flock(removing, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: opened.append(samples.open(tmp_path)))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        shutil.rmtree(tmp_path / "set")
    thread.join(60)
    samples.put_all(opened[0])
    assert all(samples.sound(opened[0]))
    assert clean(tmp_path, [], 0) == [], "its lock is that of a file which is gone"


def test_a_cleaner_that_comes_late_leaves_the_cache_that_was_made_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = some()
    samples.open(tmp_path).close()
    made: list[DecodedCache] = []
    lock = fcntl.flock

    def replaced_before(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        shutil.rmtree(tmp_path / "set")
        made.append(samples.open(tmp_path))
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", replaced_before)
    assert clean(tmp_path, [], 0) == []
    samples.put_all(made[0])
    assert all(samples.sound(made[0]))
    assert (tmp_path / "set" / IN_USE).exists()


def open_and_clean(samples: Samples, folder: Path, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(60):
        if draw.random() < 0.5:
            clean(folder, [], 0)
        else:
            cache = samples.open(folder)
            samples.put_all(cache)
            assert all(samples.sound(cache))
            assert (folder / "set" / IN_USE).exists()
            cache.close()


def test_opening_and_cleaning_at_once_never_takes_a_cache_away(tmp_path: Path) -> None:
    samples = some()
    children = [processes.Process(target=open_and_clean, args=(samples, tmp_path, seed)) for seed in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]


def test_the_fields_of_one_record_are_those_of_all() -> None:
    values = (2**40, 3, 4, 5, 6, 2**60, 7, 1)
    assert np.frombuffer(FIELDS.pack(*values), RECORD)[0].tolist()[:8] == values
