"""What the nodes of a job tell each other, before and after their ranks can: small files in a folder that all of them
see.

    <shared>/<job>/crashes.json                          what went wrong in this job so far
                   run                                   the folder of the run that it trains
                   alive-<host>.json                     the latest sign of life of a node's ranks
                   start-<requeues>-<attempt>/here-…     a node has come
                                             port        all have; here the ranks meet, on the first node
                                             failed      the first thing that went wrong, and on which node
                                             stuck-…     a node on which ranks neither work nor end
                                             came-…      how far a node's ranks had come when all of them hung
                                             ended-…     what a node's ranks ended with
                                             verdict     what the first node makes of it

A file that somebody may read is written whole: beside, then renamed.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from clipdist.data.shards import write_atomically
from clipdist.errors import UserError
from clipdist.world import Allocation

T = TypeVar("T")
POLL_SECONDS = 0.1
OUTAGE_SECONDS = 600.0


@dataclass(frozen=True)
class Failure:
    host: str
    why: str
    hung: bool = False
    """All ranks waited, and no sign of progress came: `host` may only be the first to say so."""


@dataclass(frozen=True)
class Crash:
    """What ended a start of the job's processes."""

    time: float
    """In seconds since 1970."""
    host: str
    why: str
    checkpoint: str
    """The newest one by then."""


class Meeting:
    """Of the nodes of one start of a job's processes; each node has one. `attempt` counts the starts within one
    allocation."""

    def __init__(self, shared: Path, allocation: Allocation, attempt: int) -> None:
        self.allocation = allocation
        self.job = shared / allocation.job
        self.folder = self.job / f"start-{allocation.restarts}-{attempt}"
        self.attempt = attempt
        try:
            _persist(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        except OSError as error:
            raise UserError(f"{shared}: cannot be written ({error.strerror}); see --shared") from error

    @property
    def host(self) -> str:
        return self.allocation.nodes[self.allocation.node]

    def note_run(self, run: Path) -> None:
        """What the job trains, for who has to decide without knowing (see job.py)."""
        _put(self.job / "run", f"{run.absolute()}\n")

    def run(self) -> Path | None:
        """None where the first node did not come so far."""
        told = _read(self.job / "run")
        return Path(told.rstrip("\n")) if told else None

    def come(self) -> None:
        """This node is there."""
        _put(self.folder / f"here-{self.host}", "")

    def missing(self, seconds: float) -> list[str]:
        """Nodes that have not come within so many seconds; empty as soon as all have."""
        lacking = list(self.allocation.nodes)

        def all_there() -> bool:
            there = names(self.folder)
            lacking[:] = [host for host in lacking if f"here-{host}" not in there]
            return not lacking

        _wait(lambda: all_there() or None, seconds)
        return lacking

    def open(self, port: int) -> None:
        """The first node says where the ranks meet."""
        _put(self.folder / "port", f"{port}\n")

    def port(self, seconds: float) -> int | None:
        """What the first node said; None when it did not within so many seconds, or something failed meanwhile."""
        path = self.folder / "port"
        found = _wait(lambda: _read(path) or ("0" if self.failure() else None), seconds)
        return int(found) if found and int(found) else None

    def fail(self, why: str, host: str = "", hung: bool = False) -> None:
        """Something went wrong on `host`, this one unless said: the others are to end their ranks. The first to say so
        is who is listened to. Raises `OSError` where the folder cannot be written now."""
        partial = self.folder / f"failed-by-{self.host}"
        write_atomically(partial, json.dumps(asdict(Failure(host or self.host, why, hung))).encode())
        with suppress(FileExistsError):
            os.link(partial, self.folder / "failed")

    def failure(self) -> Failure | None:
        told = _read(self.folder / "failed")
        return Failure(**json.loads(told)) if told else None

    def stuck(self, why: str) -> None:
        """Ranks here neither work nor end by themselves: then it is here that the fault lies, whoever noticed first."""
        _put(self.folder / f"stuck-{self.host}", why)

    def came(self, exchanges: dict[int, int]) -> None:
        """How many exchanges each rank here had come to when it ended."""
        _put(self.folder / f"came-{self.host}", json.dumps(exchanges))

    def end(self, code: int) -> None:
        """What this node's ranks ended with."""
        _put(self.folder / f"ended-{self.host}", f"{code}\n")

    def ends(self, seconds: float) -> dict[str, int]:
        """Host -> what its ranks ended with; of those that said so within that many seconds."""

        def told() -> dict[str, int]:
            there = names(self.folder)
            files = {host: self.folder / f"ended-{host}" for host in self.allocation.nodes if f"ended-{host}" in there}
            return {host: int(code) for host, path in files.items() if (code := _text(path))}

        _wait(lambda: len(told()) == len(self.allocation.nodes) or None, seconds)
        return told()

    def blamed(self, ends: dict[str, int]) -> Failure:
        """Where a crash came from, as far as the nodes can tell: `host` is empty when they cannot."""
        there = names(self.folder)
        for host in self.allocation.nodes:
            if host not in ends:
                return Failure(host, "the node says nothing any more")
            if f"stuck-{host}" in there and (why := _text(self.folder / f"stuck-{host}")):
                return Failure(host, why)
        failure = self.failure() or Failure("", "the launcher failed")
        return self._waited_for(failure) if failure.hung else failure

    def _waited_for(self, failure: Failure) -> Failure:
        """Of ranks that all hung, those which the others waited for: they are an exchange or more behind."""
        told = {host: _json(_read(self.folder / f"came-{host}")) or {} for host in self.allocation.nodes}
        came = {int(rank): number for ranks in told.values() for rank, number in ranks.items()}
        behind = sorted(rank for rank, number in came.items() if number == min(came.values()))
        hosts = [host for host, ranks in told.items() if any(str(rank) in ranks for rank in behind)]
        if not all(told.values()) or len(behind) == len(came):
            # Where all wait in the same exchange, a network may have lost it. A node that is alone has nobody to blame.
            return failure if len(told) == 1 else Failure("", f"{failure.why}; no rank is behind the others")
        who = f"rank{'s' * (len(behind) > 1)} {', '.join(map(str, behind))} hung: the others waited there"
        return Failure(hosts[0], who) if len(hosts) == 1 else Failure("", f"{who} ({', '.join(hosts)})")

    def decide(self, verdict: str) -> None:
        _put(self.folder / "verdict", verdict)

    def verdict(self, seconds: float) -> str | None:
        """The first node's; None when it says nothing for so long."""
        return _wait(lambda: _read(self.folder / "verdict"), seconds)

    def alive(self, last_beat: float) -> None:
        """A sign of life: when the slowest rank here last made a step, in seconds since 1970. Raises `OSError` where
        the folder cannot be written now."""
        body = {"time": time.time(), "last_beat": last_beat}
        write_atomically(self.job / f"alive-{self.host}.json", json.dumps(body).encode())

    def crashes(self) -> list[Crash]:
        return [Crash(**item) for item in _json(_read(self.job / "crashes.json")) or []]

    def note_crash(self, crash: Crash) -> None:
        items = [asdict(item) for item in [*self.crashes(), crash]]
        _put(self.job / "crashes.json", json.dumps(items, indent=1) + "\n")


def latest(shared: Path, allocation: Allocation) -> Meeting:
    """Of the last start within this allocation; of the first where there was none."""
    begin = f"start-{allocation.restarts}-"
    attempts = [name.removeprefix(begin) for name in names(shared / allocation.job) if name.startswith(begin)]
    return Meeting(shared, allocation, max(map(int, attempts), default=0))


def last_beat(job: Path) -> float | None:
    """When the ranks of a job last made a step, all of them, by what its nodes say; None when none says anything."""
    told = [body["last_beat"] for path in job.glob("alive-*.json") if (body := _json(_text(path)))]
    return min(told, default=None)


def this_machine(gpus: int) -> Allocation:
    """What takes the place of SLURM's allocation where there is none: this machine alone."""
    return Allocation(f"local-{os.getpid()}", 0, (socket.gethostname(),), 0, gpus, slurm=False)


def _put(path: Path, text: str) -> None:
    _persist(lambda: write_atomically(path, text.encode()))


def _persist(action: Callable[[], None]) -> None:
    """Tries for a while: a shared file system that is away for a minute must not end the job."""
    end = time.monotonic() + OUTAGE_SECONDS
    while True:
        try:
            return action()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(1)


def names(folder: Path) -> set[str]:
    """Of the files in it; of none where it is away. Whoever waits for a file that another node writes lists its folder
    instead of asking for the file: NFS remembers for a while that it was not there."""
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def _read(path: Path) -> str | None:
    """A file that may not be there yet."""
    return _text(path) if path.name in names(path.parent) else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:  # not there yet, or not here: a shared file system that is away comes back, or a wait ends
        return None


def _json(told: str | None) -> Any:
    try:
        return json.loads(told) if told else None
    except ValueError:
        return None


def _wait(found: Callable[[], T | None], seconds: float) -> T | None:
    """What `found` answers, as soon as that is something; None after so many seconds."""
    end = time.monotonic() + seconds
    while (answer := found()) is None:
        if time.monotonic() > end:
            return None
        time.sleep(POLL_SECONDS)
    return answer
