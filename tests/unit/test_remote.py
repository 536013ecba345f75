"""Shard sets behind URLs: equal to local ones, whatever network, server, disk and kill -9 do; bounded and shared."""

import errno
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from clipdist.data import remote as remote_module
from clipdist.data import shard_cache
from clipdist.data.order import Order
from clipdist.data.read_ahead import FORGET_STEPS, ReadAhead, upcoming_shards
from clipdist.data.remote import RemoteConfig, check_location
from clipdist.data.sets.writer import ShardSetWriter
from clipdist.data.shard_cache import CacheFull, Stopped
from clipdist.data.shards import RawSample, ShardSet, Split
from clipdist.errors import UserError
from clipdist.user_cache import user_cache
from tests.unit.faulty_server import FaultyServer, serving

pytest.importorskip("aiohttp", reason="fsspec's http needs it")

SMALL_BLOCK = 4096
SHARDS, PER_SHARD = 6, 5
# What a process of its own runs first: blocks and pauses as small as in this one.
PREPARE = f"""
from clipdist.data import remote, shard_cache
from clipdist.data.remote import RemoteConfig
from clipdist.data.shards import ShardSet
shard_cache.BLOCK, remote.FIRST_WAIT_SECONDS = {SMALL_BLOCK}, 0.01
"""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of about 30 kB: some eight blocks each."""
    folder = tmp_path_factory.mktemp("remote") / "set"
    noise = np.random.default_rng(0)
    with ShardSetWriter(folder, samples_per_shard=PER_SHARD) as out:
        for number in range(SHARDS * PER_SHARD):
            out.write("train", f"s{number}", noise.bytes(4_000), "png", {"text": f"caption {number}"})
    return folder


@pytest.fixture
def server(local: Path) -> Iterator[FaultyServer]:
    with serving(local) as one:
        yield one


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "BLOCK", SMALL_BLOCK)
    monkeypatch.setattr(remote_module, "FIRST_WAIT_SECONDS", 0.01)


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., RemoteConfig]:
    def make(**changes: Any) -> RemoteConfig:
        return RemoteConfig(
            **{"cache_folder": str(tmp_path / "cache"), "fetch_timeout_seconds": 0.5, "cache_gib": 0.01, **changes}
        )

    return make


def split_of(server: FaultyServer, config: RemoteConfig) -> Split:
    return ShardSet.open(server.url, remote=config).split("train")


def all_of(split: Split) -> list[RawSample]:
    return [split.read(number) for number in range(len(split))]


def expected(local: Path) -> list[RawSample]:
    return all_of(ShardSet.open(local).split("train"))


def shard_bytes(local: Path) -> int:
    """Of one shard with its index; they are about equal."""
    return max(path.stat().st_size + path.with_suffix(".idx").stat().st_size for path in local.glob("*.tar"))


def kept(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "remote").rglob("*.tar"))


def leftovers(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "remote").rglob("*~*"))


class Samples(Dataset[RawSample]):
    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, number: int) -> RawSample:
        return self.split.read(number)


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_what_the_local_set_holds(context: str, local: Path, server: FaultyServer, config: Any) -> None:
    split = split_of(server, config())
    first = split.read(0)  # the parent has an open shard, a session and a lock when the workers begin
    loader = DataLoader(Samples(split), batch_size=None, num_workers=2, multiprocessing_context=context)
    assert list(loader) == expected(local)
    assert first == expected(local)[0]
    assert set(server.fetched().values()) == {1}


def test_the_second_opening_fetches_the_manifest_alone(local: Path, server: FaultyServer, config: Any) -> None:
    all_of(split_of(server, config()))
    server.requests.clear()
    assert all_of(split_of(server, config())) == expected(local)
    assert {name for name, _ in server.requests} == {"manifest.json"}


def test_the_set_says_where_it_comes_from_and_survives_pickling(server: FaultyServer, config: Any) -> None:
    opened = ShardSet.open(server.url + "/", remote=config())
    assert opened.location == server.url
    split = opened.split("train")
    split.read(0)
    assert pickle.loads(pickle.dumps(split)).read(7) == split.read(7)


@pytest.mark.parametrize("fault", [500, 503, 429, "stall", "reset", "truncate"])
def test_what_passes_is_tried_again(
    fault: int | str, local: Path, server: FaultyServer, config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("manifest.json", "train-000000.idx", "train-000000.tar", "train-000001.tar")
    for name in names:
        server.faults[name].extend([fault] if fault == "stall" else [fault, fault])
    assert all_of(split_of(server, config(fetch_timeout_seconds=0.2))) == expected(local)
    assert not any(server.faults[name] for name in names)
    assert "attempt 1 of 6" in caplog.text
    assert caplog.text.count("attempt") < 8, "warnings are limited"


@pytest.mark.parametrize("name", ["manifest.json", "train-000000.idx", "train-000000.tar"])
def test_attempts_have_an_end(name: str, server: FaultyServer, config: Any) -> None:
    server.always[name] = 503
    with pytest.raises(UserError, match=rf"{name}: not fetched in 3 attempts, the last: .*503"):
        split_of(server, config(fetch_attempts=3)).read(0)
    assert sum(asked == name for asked, _ in server.requests) == 3


@pytest.mark.parametrize(("status", "advice"), [(403, "credentials"), (404, "the whole set was copied")])
@pytest.mark.parametrize("name", ["manifest.json", "train-000000.idx", "train-000000.tar"])
def test_what_does_not_pass_is_not_tried_again(
    name: str, status: int, advice: str, server: FaultyServer, config: Any
) -> None:
    server.always[name] = status
    with pytest.raises(UserError, match=rf"{server.url}/{name}: .*{advice}"):
        split_of(server, config()).read(0)
    assert sum(asked == name for asked, _ in server.requests) == 1


def test_a_server_that_is_not_there(config: Any) -> None:
    with pytest.raises(UserError, match="not fetched in 2 attempts"):
        ShardSet.open("http://127.0.0.1:9/set", remote=config(fetch_attempts=2))


def test_a_server_without_ranges(local: Path, server: FaultyServer, config: Any) -> None:
    server.ranges = False
    assert all_of(split_of(server, config())) == expected(local)
    assert set(server.fetched().values()) == {1}, "a whole answer is not asked for again"


def test_a_flipped_byte_is_fetched_once_more(local: Path, server: FaultyServer, config: Any, tmp_path: Path) -> None:
    server.faults["train-000001.tar"].append("flip")
    assert all_of(split_of(server, config())) == expected(local)
    assert server.fetched()["train-000001.tar"] == 2
    assert not leftovers(tmp_path)


def test_a_shard_that_stays_damaged_is_named(server: FaultyServer, config: Any, tmp_path: Path) -> None:
    server.always["train-000001.tar"] = "flip"
    split = split_of(server, config())
    info = split.shards[1]
    with pytest.raises(UserError, match=rf"{server.url}/{info.file}: found checksum .{{16}}, .*expects {info.xxh3_64}"):
        split.read(PER_SHARD)
    assert server.fetched()[info.file] == 2
    assert not kept(tmp_path)
    split.read(0)


@pytest.mark.parametrize("damage", ["other", "header"])
def test_an_index_of_another_shard_is_refused(damage: str, local: Path, tmp_path: Path, config: Any) -> None:
    folder = shutil.copytree(local, tmp_path / "damaged")
    index = folder / "train-000000.idx"
    sound = bytearray(index.read_bytes())
    sound[8 if damage == "other" else 0] ^= 1
    index.write_bytes(sound)
    message = "tells of 4 samples|tells of" if damage == "other" else "not a shard index"
    with serving(folder) as server, pytest.raises(UserError, match=f"{server.url}/train-000000.idx: .*({message})"):
        split_of(server, config()).read(0)


@pytest.mark.parametrize("name", ["../x.tar", "/tmp/x.tar", "a/b.tar", ".x.tar", "x.txt"])
def test_a_manifest_writes_nowhere_else(name: str, local: Path, tmp_path: Path, config: Any) -> None:
    folder = shutil.copytree(local, tmp_path / "evil")
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("train-000000.tar", name))
    with serving(folder) as server, pytest.raises(UserError, match=r"expected the plain name of a .tar"):
        split_of(server, config())


def test_a_set_made_anew_under_the_same_url_is_another(local: Path, tmp_path: Path, config: Any) -> None:
    folder = shutil.copytree(local, tmp_path / "set")
    with serving(folder) as server:
        old = all_of(split_of(server, config()))
        with ShardSetWriter(folder, overwrite=True) as out:
            out.write("train", "new", b"pixels", "png", {"text": "new"})
        assert [sample.key for sample in all_of(split_of(server, config()))] == ["new"]
    assert old == expected(local)


def test_a_start_without_network_only_if_asked_for(local: Path, config: Any) -> None:
    with serving(local) as server:
        all_of(split_of(server, config()))
    with pytest.raises(UserError, match="not fetched in 1 attempts"):
        split_of(server, config(fetch_attempts=1))
    assert all_of(split_of(server, config(fetch_attempts=1, manifest_from_cache=True))) == expected(local)


def test_an_answer_is_not_replaced_by_memory(server: FaultyServer, config: Any) -> None:
    split_of(server, config())
    server.always["manifest.json"] = 404
    with pytest.raises(UserError, match="no such file"):
        split_of(server, config(manifest_from_cache=True))


def start(server: FaultyServer, config: RemoteConfig, body: str) -> subprocess.Popen[str]:
    """A process of its own that has opened the set as `split` and runs `body`."""
    settings = {name: getattr(config, name) for name in ("cache_folder", "cache_gib", "fetch_timeout_seconds")}
    script = (
        f"{PREPARE}\nsplit = ShardSet.open({server.url!r}, remote=RemoteConfig(**{settings!r})).split('train')\n{body}"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition: Callable[[], Any]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until, "never came true"
        time.sleep(0.005)


def test_a_killed_fetch_is_taken_up_at_its_last_block(
    local: Path, server: FaultyServer, config: Any, tmp_path: Path
) -> None:
    server.seconds_per_answer = 0.1
    child = start(server, config(), "split.read(0)")
    wait_for(lambda: ("train-000000.tar", 3 * SMALL_BLOCK) in server.requests)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert [path.name.partition("~")[0] for path in leftovers(tmp_path) if ".tar" in path.name] == ["train-000000.tar"]
    assert not kept(tmp_path)
    server.seconds_per_answer = 0.0
    server.requests.clear()
    assert all_of(split_of(server, config())) == expected(local)
    starts = [first for name, first in server.requests if name == "train-000000.tar"]
    assert min(starts) >= 3 * SMALL_BLOCK
    assert not leftovers(tmp_path)


def test_a_killed_fetch_whose_blocks_rotted_is_begun_again(
    local: Path, server: FaultyServer, config: Any, tmp_path: Path
) -> None:
    split = split_of(server, config())
    info = split.shards[0]
    folder = tmp_path / "cache" / "remote" / ShardSet.open(server.url, remote=config()).manifest.digest
    folder.mkdir(parents=True)
    (folder / f"{info.file}~{info.bytes}").write_bytes(bytes(2 * SMALL_BLOCK + 17))
    assert all_of(split) == expected(local)
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("fails_at", range(2))
def test_dying_between_the_two_renames(
    fails_at: int, local: Path, server: FaultyServer, config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    split, real, calls = split_of(server, config()), os.replace, iter(range(9))

    def replace(*paths: Any) -> None:
        if next(calls) >= fails_at:
            raise KeyboardInterrupt
        real(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            split.read(0)
    assert not kept(tmp_path)
    assert all_of(split_of(server, config())) == expected(local)
    assert not leftovers(tmp_path)


def test_four_processes_fetch_each_shard_once(local: Path, server: FaultyServer, config: Any) -> None:
    server.seconds_per_answer = 0.01
    body = "import xxhash\nprint(xxhash.xxh3_64_hexdigest(b''.join(split.read(n).image for n in range(len(split)))))"
    children = [start(server, config(), body) for _ in range(4)]
    outputs = {child.communicate(timeout=60) for child in children}
    assert len(outputs) == 1, outputs
    assert [child.returncode for child in children] == [0] * 4, outputs
    assert server.fetched() == dict.fromkeys(server.fetched(), 1)
    assert len(server.fetched()) == SHARDS


def test_eviction_keeps_the_bound_and_what_others_read(
    local: Path, server: FaultyServer, config: Any, tmp_path: Path
) -> None:
    small = config(cache_gib=3.2 * shard_bytes(local) / shard_cache.GIB)
    reader = start(server, small, "split.read(0)\nprint('open', flush=True)\ninput()\nprint(split.read(4).key)")
    assert reader.stdout is not None
    assert reader.stdout.readline() == "open\n"
    whole = []
    for _ in range(2):
        for number in range(SHARDS):
            split_of(server, small).read(number * PER_SHARD)
            sizes = [path.stat().st_size for path in (tmp_path / "cache" / "remote").glob("*/*")]
            whole.append(sum(sizes))
            assert "train-000000.tar" in kept(tmp_path)
    assert max(whole) <= small.cache_gib * shard_cache.GIB
    assert server.fetched()["train-000000.tar"] == 1
    assert server.fetched()["train-000001.tar"] == 2
    assert reader.communicate("\n", timeout=30)[0] == "s4\n"
    split_of(server, small).read(3 * PER_SHARD)
    for number in range(1, 4):
        split_of(server, small).read(number * PER_SHARD)
    assert "train-000000.tar" not in kept(tmp_path), "nobody holds it any more"


def test_the_least_recently_opened_goes_first(server: FaultyServer, config: Any, local: Path, tmp_path: Path) -> None:
    small = config(cache_gib=3.2 * shard_bytes(local) / shard_cache.GIB)
    for number in (0, 1, 2, 0, 3):
        split_of(server, small).read(number * PER_SHARD)
        time.sleep(0.02)  # time stamps of files are coarse
    assert kept(tmp_path) == ["train-000000.tar", "train-000002.tar", "train-000003.tar"]


def test_one_reader_closes_its_own_shards_before_it_gives_up(local: Path, server: FaultyServer, config: Any) -> None:
    small = config(cache_gib=1.2 * shard_bytes(local) / shard_cache.GIB)
    assert all_of(split_of(server, small)) == expected(local)


def test_a_bound_below_what_is_open_at_once(
    local: Path, server: FaultyServer, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipdist.data.remote.FULL_SECONDS", 0.2)
    split = split_of(server, config(cache_gib=1.2 * shard_bytes(local) / shard_cache.GIB))
    need = 2 * shard_bytes(local) / shard_cache.GIB
    with split.hold(0), pytest.raises(CacheFull, match=f"need {need:.3g} GiB, data.remote.cache_gib=.*set it to at"):  # type: ignore[union-attr]
        split.hold(1)
    with split.hold(1) as path:  # type: ignore[union-attr]
        assert path.exists()


def test_a_bound_below_one_shard(server: FaultyServer, config: Any) -> None:
    with pytest.raises(CacheFull, match=r"data.remote.cache_gib"):
        split_of(server, config(cache_gib=1e-6)).read(0)


def test_a_forked_child_keeps_nothing_in_the_cache(local: Path, server: FaultyServer, config: Any) -> None:
    split = split_of(server, config(cache_gib=1.2 * shard_bytes(local) / shard_cache.GIB))
    held = split.hold(0)
    assert held
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    held.close()
    split.read(PER_SHARD)  # needs the room of shard 0, which the child lets go when it comes to run
    assert child.is_alive()
    child.kill()
    child.join()


def test_partial_files_of_the_dead_give_way(local: Path, server: FaultyServer, config: Any, tmp_path: Path) -> None:
    server.seconds_per_answer = 0.1
    child = start(server, config(), "split.read(0)")
    wait_for(lambda: ("train-000000.tar", 2 * SMALL_BLOCK) in server.requests)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    server.seconds_per_answer = 0.0
    split_of(server, config(cache_gib=1.2 * shard_bytes(local) / shard_cache.GIB)).read(PER_SHARD)
    assert not leftovers(tmp_path)
    assert kept(tmp_path) == ["train-000001.tar"]


def test_a_disk_too_small_for_the_set(server: FaultyServer, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"this disk has room for .* GiB of shards, data.remote.cache_gib allows"):
        split_of(server, config())
    split_of(server, config(cache_gib=40_000 / shard_cache.GIB))


def test_a_disk_that_fills_up_is_one_line_and_keeps_no_rest(
    local: Path, server: FaultyServer, config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    split, real = split_of(server, config()), os.pwrite

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        if offset >= 2 * SMALL_BLOCK:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data[: SMALL_BLOCK // 2], offset)  # a short write goes on

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); free some space"):
            split.read(0)
    assert not sum(path.stat().st_size for path in leftovers(tmp_path) if ".tar" in path.name)
    assert all_of(split) == expected(local)


def test_a_really_full_disk(local: Path, server: FaultyServer, config: Any, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs rights that this machine does not give")
    try:
        split = split_of(server, config(cache_folder=str(disk), cache_gib=60_000 / shard_cache.GIB))
        rest = disk / "rest"
        rest.write_bytes(bytes(shutil.disk_usage(disk).free - 20_000))
        with pytest.raises(UserError, match=r"No space left on device.*free some space"):
            split.read(0)
        rest.unlink()
        assert split.read(0) == expected(local)[0]
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize(
    "options",
    [
        {"key": "AKIA", "secret": "hush"},
        {"client_kwargs": {"aws_session_token": "hush"}},
        {"headers": {"Authorization": "Bearer hush"}},
        {"token": "hush"},
        {"endpoint_url": "http://user:hush@host/"},
        {"nested": [{"password": "hush"}]},
    ],
)
def test_secrets_are_refused_and_never_repeated(options: dict[str, Any], config: Any) -> None:
    with pytest.raises(UserError, match="environment") as caught:
        ShardSet.open("s3://bucket/set", remote=config(storage_options=options))
    assert "hush" not in str(caught.value)
    assert "AKIA" not in str(caught.value)


@pytest.mark.parametrize("url", ["https://user:hush@host/set", "https://host/set?X-Signature=hush"])
def test_urls_carry_no_secrets(url: str, config: Any) -> None:
    with pytest.raises(UserError, match="password or a query") as caught:
        ShardSet.open(url, remote=config())
    assert "hush" not in str(caught.value)


def test_harmless_options_pass() -> None:
    options = {"anon": True, "profile": "lab", "client_kwargs": {"endpoint_url": "http://127.0.0.1:9000"}}
    check_location("s3://bucket/set", options)
    check_location("gs://bucket/set", {"token": "anon"})
    check_location("abfs://container@account.host/set", {})


def test_a_missing_package_is_named(config: Any) -> None:
    with pytest.raises(UserError, match=r"check the URL|install"):
        ShardSet.open("nosuch://bucket/set", remote=config())


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("CLIPDIST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert user_cache("remote") == tmp_path / "home" / ".cache" / "clipdist" / "remote"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_cache("remote") == tmp_path / "xdg" / "clipdist" / "remote"
    monkeypatch.setenv("CLIPDIST_CACHE", str(tmp_path / "own"))
    assert user_cache("remote") == tmp_path / "own" / "remote"
    assert user_cache("remote", str(tmp_path / "given")) == tmp_path / "given" / "remote"


def test_file_systems_without_an_event_loop_have_time_outs_too(
    local: Path, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec = remote_module.fsspec
    kind = fsspec.get_filesystem_class("memory")
    kind().put(str(local), "/unit-set", recursive=True)
    try:
        opened = ShardSet.open("memory://unit-set", remote=config())
        assert all_of(opened.split("train")) == expected(local)
        monkeypatch.setattr(kind, "cat_file", lambda *_, **__: time.sleep(5))
        with pytest.raises(UserError, match="no answer in time"):
            ShardSet.open("memory://unit-set", remote=config(fetch_timeout_seconds=0.05, fetch_attempts=1))
    finally:
        kind().rm("/unit-set", recursive=True)


def brute_force(order: Order, split: Split, start: int, stop: int, steps: int) -> list[tuple[int, int]]:
    last: dict[int, int] = {}
    found = []
    for step in range(steps):
        for number in order.rows(step, start, stop).numbers.tolist():
            shard, _ = split.locate(number)
            if step - last.get(shard, -FORGET_STEPS - 1) > FORGET_STEPS:
                found.append((step, shard))
            last[shard] = step
    return found


def test_shards_are_announced_in_the_order_of_their_need(local: Path) -> None:
    split = ShardSet.open(local).split("train")
    order = Order(split.samples_per_shard, seed=3, global_batch=6, lanes=3, window=4)
    assert list(upcoming_shards(order, split, 2, 4, 0, 40)) == brute_force(order, split, 2, 4, 40)
    later = list(upcoming_shards(order, split, 2, 4, 7, 40))
    assert later[0][0] == 7


def test_reading_ahead_fetches_so_far_and_no_further(server: FaultyServer, config: Any) -> None:
    split = split_of(server, config())
    upcoming = iter([(step, step) for step in range(SHARDS)])
    with ReadAhead(split, upcoming, shards=2) as ahead:
        wait_for(lambda: len(ahead._ready) == 2)
        time.sleep(0.1)
        assert sorted(server.fetched()) == ["train-000000.tar", "train-000001.tar"]
        ahead.advance(0)
        wait_for(lambda: len(server.fetched()) == 3)
        for step in range(SHARDS):
            ahead.advance(step)
    assert not ahead._thread.is_alive()


def test_reading_ahead_waits_for_room(server: FaultyServer, config: Any, local: Path) -> None:
    split = split_of(server, config(cache_gib=2.2 * shard_bytes(local) / shard_cache.GIB))
    with ReadAhead(split, iter([(step, step) for step in range(SHARDS)]), shards=4) as ahead:
        for step in range(SHARDS):
            wait_for(lambda step=step: f"train-{step:06d}.tar" in server.fetched())
            ahead.advance(step)


def test_what_cannot_be_read_ahead_is_left_to_the_reader(
    server: FaultyServer, config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server.always["train-000000.tar"] = 403
    split = split_of(server, config())
    with ReadAhead(split, iter([(1, 0), (2, 1)]), shards=2) as ahead:
        wait_for(lambda: len(ahead._ready) == 1)
        ahead.advance(0)
    assert "not read ahead" in caplog.text
    with pytest.raises(UserError, match="credentials"):
        split.read(0)


def test_reading_ahead_ends_at_once_in_the_midst_of_retries(
    server: FaultyServer, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = split_of(server, config())
    monkeypatch.setattr(remote_module, "FIRST_WAIT_SECONDS", 1000.0)
    server.always["train-000000.tar"] = 500
    ahead = ReadAhead(split, iter([(1, 0)]), shards=2)
    wait_for(lambda: server.fetched())
    ahead.close()
    assert not ahead._thread.is_alive()


def test_a_defect_in_the_thread_is_not_silent(server: FaultyServer, config: Any) -> None:
    def broken() -> Iterator[tuple[int, int]]:
        raise ZeroDivisionError
        yield 0, 0

    with ReadAhead(split_of(server, config()), broken(), shards=1) as ahead:
        ahead._thread.join()
        with pytest.raises(ZeroDivisionError):
            ahead.advance(0)


def test_waiting_for_another_process_can_be_stopped(server: FaultyServer, config: Any, tmp_path: Path) -> None:
    split = split_of(server, config())
    folder = tmp_path / "cache" / "remote" / split.folder.name
    folder.mkdir(parents=True)
    descriptor = shard_cache._try_lock(folder / "train-000000.lease", shard_cache.fcntl.LOCK_EX)
    assert descriptor is not None
    with pytest.raises(Stopped):
        split.hold(0, lambda: True)
    os.close(descriptor)


def test_whoever_came_to_fetch_does_not_wait_for_readers_of_what_has_come(
    server: FaultyServer, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, real, answers = split_of(server, config()), shard_cache._is_whole, iter([False])
    with split.hold(0), monkeypatch.context() as patch:  # type: ignore[union-attr]
        # As if the shard had come between the look and the lock.
        patch.setattr(shard_cache, "_is_whole", lambda *given: next(answers, True) and real(*given))
        until = time.monotonic() + 5
        with split.hold(0, lambda: time.monotonic() > until) as path:  # type: ignore[union-attr]
            assert path.exists()
    assert server.fetched()["train-000000.tar"] == 1


def test_what_came_while_waiting_for_the_lock_is_not_fetched_again(
    server: FaultyServer, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, real, answers = split_of(server, config()), shard_cache._is_whole, iter([False])
    split.hold(0).close()  # type: ignore[union-attr]
    with monkeypatch.context() as patch:
        patch.setattr(shard_cache, "_is_whole", lambda *given: next(answers, True) and real(*given))
        split.hold(0).close()  # type: ignore[union-attr]
    assert server.fetched()["train-000000.tar"] == 1


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an S3 server on loopback."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    one = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    one.start()
    host, port = one.get_host_and_port()
    yield f"http://{host}:{port}"
    one.stop()


def test_s3(s3: str, local: Path, config: Any, tmp_path: Path) -> None:
    import s3fs

    options = {"endpoint_url": s3}
    files = s3fs.S3FileSystem(endpoint_url=s3, skip_instance_cache=True)
    files.mkdir("bucket")
    files.put(str(local), "bucket/some/set", recursive=True)
    remote = config(storage_options=options, fetch_timeout_seconds=10.0)
    split = ShardSet.open("s3://bucket/some/set", remote=remote).split("train")
    split.read(0)
    loader = DataLoader(Samples(split), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert list(loader) == expected(local)
    assert len(kept(tmp_path)) == SHARDS
    files.rm("bucket/some/set/train-000000.tar")
    elsewhere = config(storage_options=options, fetch_timeout_seconds=10.0, cache_folder=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"s3://bucket/some/set/train-000000.tar: .*the whole set was copied"):
        ShardSet.open("s3://bucket/some/set", remote=elsewhere).split("train").read(0)
    with pytest.raises(UserError, match=r"s3://nowhere/set/manifest.json: .*check the URL"):
        ShardSet.open("s3://nowhere/set", remote=remote)
