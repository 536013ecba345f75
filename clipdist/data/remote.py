"""Shard sets behind URLs (`s3://`, `gs://`, `https://`, …), read through fsspec and kept on local disk by `ShardCache`.

Every read of the network has a time-out and is tried again after what may pass: resets, stalls, truncated answers,
429 and 5xx. What will not pass by itself (401, 403, 404, a missing package, no credentials) stops at once.

File systems of fsspec run an event loop in a thread, which a fork does not copy: each process makes its own.
"""

import logging
import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import quote, urlsplit

import fsspec
import numpy as np
import xxhash
from fsspec.asyn import AsyncFileSystem, sync
from pydantic import Field, JsonValue, PositiveInt

from clipdist.data.shard_cache import GIB, CacheFull, Held, ShardCache, Stopped, write_replacing
from clipdist.data.shard_index import HEADER, MAGIC, OLD_MAGIC, RECORD
from clipdist.data.shards import MANIFEST, Manifest, ShardInfo
from clipdist.errors import UserError, disk_errors
from clipdist.settings import field, settings
from clipdist.user_cache import user_cache

logger = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0
WARN_EVERY_SECONDS = 10.0
# How long to wait for others to let go of shards, when all that the cache may hold is in use.
FULL_SECONDS = 15.0
PACKAGES = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
SECRET_NAME = re.compile(r"key|secret|token|passw|credential|auth|cookie|sas|connection_string", re.I)
# Values of gcsfs's `token` that name a method instead of being one.
HARMLESS_TOKENS = ("anon", "google_default", "cloud", "cache")


@settings
class RemoteConfig:
    """How a shard set behind a URL is fetched and kept. Says nothing of what is learnt."""

    cache_folder: str = ""
    """Folder on local disk; by default $CLIPDIST_CACHE, else $XDG_CACHE_HOME/clipdist, else ~/.cache/clipdist."""
    cache_gib: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 100.0
    """What the cache may hold, GiB; all jobs and ranks of a machine that name the folder share it."""
    fetch_timeout_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 30.0
    """For one ranged read of at most 8 MiB."""
    fetch_attempts: PositiveInt = 6
    """Trials of one read, with growing pauses between them."""
    read_ahead_shards: PositiveInt = 4
    """Shards that each rank fetches before they are needed."""
    manifest_from_cache: bool = False
    """Starts with the manifest seen last when the URL cannot be reached; by default that stops the run."""
    storage_options: dict[str, JsonValue] = field(default_factory=dict)
    """What fsspec's file system takes: `anon`, `endpoint_url`, `profile`, `client_kwargs`, …. Never a secret, since a
    run writes its configuration down: credentials come from the environment, as each file system finds them."""


def is_url(location: str | Path) -> bool:
    return isinstance(location, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", location) is not None


def check_location(url: str, options: Mapping[str, JsonValue]) -> None:
    """`UserError`, without the value, for a secret in a URL or in options: both are written down with the run."""
    for address in (url, *_texts(options)):
        if is_url(address) and (":" in urlsplit(address).netloc.rpartition("@")[0] or urlsplit(address).query):
            shown = urlsplit(address)
            raise UserError(
                f"{shown.scheme}://{shown.netloc.rpartition('@')[2]}{shown.path}: the URL carries a password or a "
                f"query, which would be written down with the run; give credentials through the environment"
            )
    for name, value in _flat(options):
        if SECRET_NAME.search(name) and not (name == "token" and value in HARMLESS_TOKENS):
            raise UserError(
                f"data.remote.storage_options.{name}: looks like a secret, and a run writes its configuration down; "
                f"set it in the environment instead (s3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile; "
                f"gs: GOOGLE_APPLICATION_CREDENTIALS)"
            )


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [item for name, below in value.items() for item in _flat(below, f"{prefix}.{name}" if prefix else name)]
    if isinstance(value, list):
        return [item for number, below in enumerate(value) for item in _flat(below, f"{prefix}.{number}")]
    return [(prefix, value)]


def _texts(options: Mapping[str, JsonValue]) -> list[str]:
    return [value for _, value in _flat(options) if isinstance(value, str)]


class RemoteFiles:
    """Reads files below a URL, with time-outs and retries. Thread-safe; pickled or forked, it opens a new session."""

    def __init__(self, url: str, config: RemoteConfig) -> None:
        check_location(url, config.storage_options)
        self.url, self.config = url.rstrip("/"), config
        self._opened: tuple[int, fsspec.AbstractFileSystem, str] | None = None
        self._warned, self._unsaid = -WARN_EVERY_SECONDS, 0

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "config": self.config}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(state["url"], state["config"])  # type: ignore[misc]

    def where(self, name: str) -> str:
        return f"{self.url}/{name}"

    def read_all(self, name: str) -> bytes:
        """A small file as a whole."""
        return self._retried(name, lambda: self._cat(name, None, None))

    def read(self, name: str, start: int, stop: int, size: int, stopped: Callable[[], bool] = lambda: False) -> bytes:
        """Bytes start..stop of a file of `size` bytes; start..size from a server that knows no ranges.

        Raises `UserError` when the attempts are used up, `Stopped` when `stopped()` between them.
        """

        def attempt() -> bytes:
            found = self._cat(name, start, stop)
            if len(found) == size > stop - start:
                return found[start:]
            if len(found) != stop - start:
                raise OSError(f"asked for bytes {start} to {stop} of {size}, got {len(found)} bytes")
            return found

        return self._retried(name, attempt, stopped)

    def _retried(self, name: str, attempt: Callable[[], T], stopped: Callable[[], bool] = lambda: False) -> T:
        wait = FIRST_WAIT_SECONDS
        for number in range(1, self.config.fetch_attempts + 1):
            try:
                return attempt()
            except UserError:
                raise
            except Exception as error:  # each file system has its own
                cause = _cause(error)
                if advice := _permanent(error):
                    raise UserError(f"{self.where(name)}: {cause}; {advice}") from error
                if number == self.config.fetch_attempts:
                    raise UserError(
                        f"{self.where(name)}: not fetched in {number} attempts, the last: {cause}; check the network "
                        f"and the server, then run again (what was fetched is kept)"
                    ) from error
                pause = wait * random.uniform(0.5, 1.5)
                self._warn(name, number, pause, cause)
            until = time.monotonic() + pause
            while (left := until - time.monotonic()) > 0:
                if stopped():
                    raise Stopped
                time.sleep(min(left, 0.1))
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _warn(self, name: str, attempt: int, pause: float, cause: str) -> None:
        now = time.monotonic()
        if now - self._warned < WARN_EVERY_SECONDS:
            self._unsaid += 1
            return
        unsaid = f" (and {self._unsaid} retries before it)" if self._unsaid else ""
        self._warned, self._unsaid = now, 0
        which = f"attempt {attempt} of {self.config.fetch_attempts}"
        logger.warning("%s: %s: %s; again in %.1f s%s", self.where(name), which, cause, pause, unsaid)

    def _cat(self, name: str, start: int | None, stop: int | None) -> bytes:
        files, prefix = self._session()
        web = urlsplit(self.url).scheme in ("http", "https")
        path = f"{prefix.rstrip('/')}/{quote(name) if web else name}"
        seconds = self.config.fetch_timeout_seconds
        if isinstance(files, AsyncFileSystem):
            found = sync(files.loop, files._cat_file, path, start=start, end=stop, timeout=seconds)
        else:
            found = _within(seconds, lambda: files.cat_file(path, start=start, end=stop))
        return bytes(found)

    def _session(self) -> tuple[fsspec.AbstractFileSystem, str]:
        if self._opened is None or self._opened[0] != os.getpid():
            scheme = urlsplit(self.url).scheme
            options: dict[str, Any] = dict(self.config.storage_options)
            if scheme in ("http", "https"):
                # A compressed answer has other ranges than the file.
                options["headers"] = {"Accept-Encoding": "identity", **options.get("headers", {})}
            try:
                files = fsspec.filesystem(scheme, skip_instance_cache=True, **options)
            except ImportError as error:
                extra = PACKAGES.get(scheme)
                cure = f'pip install "clipdist[{extra}]"' if extra else "install the package that it names"
                raise UserError(f"{self.url}: {_cause(error)}; {cure}") from error
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"{self.url}: {_cause(error)}; check the URL and data.remote.storage_options"
                ) from error
            self._opened = os.getpid(), files, files._strip_protocol(self.url)
        return self._opened[1], self._opened[2]


def _within(seconds: float, call: Callable[[], T]) -> T:
    """The result of `call`, or `TimeoutError`; a call that never ends keeps a thread, which ends with the process."""
    outcome: list[tuple[T | None, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError
    result, error = outcome[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def _cause(error: BaseException) -> str:
    if isinstance(error, TimeoutError) and not str(error):
        return "no answer in time"
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _permanent(error: Exception) -> str:
    """What to do about an error that no retry cures; empty for one that may pass."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(error, FileNotFoundError) or status == 404:
        return "there is no such file: check the URL, and that the whole set was copied there"
    denied = "Credential" in type(error).__name__ or type(error).__name__ == "ProfileNotFound"
    if isinstance(error, PermissionError) or status in (401, 403) or denied:
        return "check the credentials in the environment, that they may read this place, and the name of the place"
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429):
        return "check the URL and data.remote.storage_options"
    if isinstance(error, TypeError | ValueError | NotImplementedError | ImportError):
        return "check the URL and data.remote.storage_options"
    return ""


class RemoteShards:
    """The shards of one set behind a URL: `hold(info)` brings one onto this machine. Thread-safe, picklable."""

    def __init__(self, files: RemoteFiles, digest: str) -> None:
        self.files, self.digest = files, digest
        config = files.config
        self.cache = ShardCache(user_cache("remote", config.cache_folder), int(config.cache_gib * GIB))

    @property
    def folder(self) -> Path:
        """Where the cache keeps this set."""
        return self.cache.folder / self.digest

    def hold(
        self,
        info: ShardInfo,
        stopped: Callable[[], bool] = lambda: False,
        let_go: Callable[[], bool] = lambda: False,
    ) -> Held:
        """The shard and its index on local disk, fetched and compared with the manifest if they were not there; they
        stay until the result is closed.

        When the cache is full of shards in use, `let_go()` may close one and return True. Raises `UserError`,
        `CacheFull` among them, and `Stopped` when `stopped()`.
        """
        index = re.sub(r"\.tar(\.zst)?$", ".idx", info.file)

        def read(name: str, start: int, stop: int, size: int) -> bytes:
            if stopped():
                raise Stopped
            return self.files.read(name, start, stop, size, stopped)

        @cache
        def size_of_index() -> int:
            return self._size_of_index(index, info)

        patience = time.monotonic() + FULL_SECONDS
        while True:
            try:
                return self.cache.hold(self.files.url, self.digest, info, index, size_of_index, read, stopped)
            except CacheFull as full:
                if full.for_ever:
                    raise
                if let_go():
                    continue
                if time.monotonic() > patience or stopped():
                    raise
                # Others move on too; and a child that was just forked lets go of what its parent held.
                self.cache.ask_for_room()
                time.sleep(0.05)

    def _size_of_index(self, name: str, info: ShardInfo) -> int:
        """From the index's own header, which must speak of this shard."""
        size = HEADER.itemsize
        # A server without ranges sends more than was asked for: of what size is not known yet.
        found = self.files._retried(name, lambda: self.files._cat(name, 0, size))[:size]
        header = np.frombuffer(found, HEADER) if len(found) == size else np.zeros(1, HEADER)
        where = self.files.where(name)
        if header["magic"][0] != MAGIC:
            what = "of an earlier version" if header["magic"][0] == OLD_MAGIC else "not a shard index"
            raise UserError(f"{where}: {what}; run `clipdist index` on the set where it was made, and copy it again")
        samples, tar_bytes = int(header["samples"][0]), int(header["tar_bytes"][0])
        keys = int(header["key_bytes"][0])
        if (samples, tar_bytes) != (info.samples, info.bytes) or keys > samples << 16:
            raise UserError(
                f"{where}: tells of {samples} samples in {tar_bytes} bytes, the manifest of {info.samples} in "
                f"{info.bytes}; copy the whole set again"
            )
        return size + samples * RECORD.itemsize + keys


def open_remote(url: str, config: RemoteConfig | None = None) -> tuple[RemoteShards, Manifest]:
    """The set behind a URL. Its manifest is fetched anew at each opening.

    Raises `UserError` when it cannot be fetched or is damaged, when it names files outside the set, and when the disk
    has less room than the set and `cache_gib` ask for.
    """
    config = config or RemoteConfig()
    files = RemoteFiles(url, config)
    folder = user_cache("remote", config.cache_folder)
    with disk_errors(folder):
        (folder / "manifests").mkdir(parents=True, exist_ok=True)
    remembered = folder / "manifests" / f"{xxhash.xxh3_128_hexdigest(files.url.encode())}.json"
    try:
        found = files.read_all(MANIFEST)
    except UserError as error:
        # What the server says (403, 404) is an answer; only silence may be replaced by memory.
        silent = error.__cause__ is not None and not _permanent(error.__cause__)  # type: ignore[arg-type]
        if not (config.manifest_from_cache and silent and remembered.exists()):
            raise
        logger.warning("%s; going on with the manifest seen last", error)
        found = remembered.read_bytes()
    manifest = _parse(found, files.url)
    shards = [info for infos in manifest.splits.values() for info in infos]
    for info in shards:
        if not re.fullmatch(r"[^/\\\0]+\.tar(\.zst)?", info.file) or info.file.startswith("."):
            raise UserError(f"{files.where(MANIFEST)}: names {info.file!r}, expected the plain name of a .tar")
    with disk_errors(folder):
        write_replacing(remembered, found)
    remote = RemoteShards(files, manifest.digest)
    remote.cache.check_disk(sum(info.bytes for info in shards))
    return remote, manifest


def _parse(body: bytes, url: str) -> Manifest:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / MANIFEST).write_bytes(body)
        try:
            return Manifest.load(Path(folder))
        except UserError as error:
            raise UserError(str(error).replace(folder, url)) from None
