"""Many runs of one recipe, which differ in some keys: planned, recorded in the sweep's folder, and sent as one array.

runs/<sweep>/sweep.yaml           the record: recipe, words, values of each run, the job that it was last given to
             sweep.csv|json|png   what came of it so far (sweep_table.py)
             sweep_epochs.csv|png the same, epoch by epoch (sweep_epochs.py)
             slurm/               the jobs' output, one file each
             <run>/               as any other run
"""

import argparse
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from clipdist import world
from clipdist.cluster import scheduler, submit
from clipdist.cluster.job import FINISHED, STOPPED
from clipdist.cluster.runs import STOP, newest_state
from clipdist.cluster.sweep_words import Key, combinations, count, read_words, run_name
from clipdist.config import RunConfig, differences, dump, load_config, plain, read_yaml, validate
from clipdist.data.shards import write_atomically
from clipdist.errors import UserError, disk_errors
from clipdist.train.run_folder import hold

logger = logging.getLogger(__name__)
RECORD = "sweep.yaml"
NEW, GOES_ON, FINISHED_ALREADY, IN_QUEUE, STOPPED_FOR_GOOD = "new", "goes on", "finished", "in the queue", "stopped"
TO_SEND = (NEW, GOES_ON)


@dataclass(frozen=True)
class Plan:
    """The runs that a sweep's words mean, by name."""

    recipe: Path
    words: list[str]
    keys: list[Key]
    """Those that vary."""
    folder: Path
    configs: dict[str, RunConfig]
    values: dict[str, dict[str, Any]]
    """Name -> key -> value, as the run's configuration has it."""
    combinations: int
    """More than there are runs where draws coincide."""


@dataclass
class Record:
    """What `sweep.yaml` holds. Each command adds to it; no run is taken away."""

    recipe: str
    words: list[str]
    random: int
    seed: int
    keys: dict[str, str]
    """Key that varies -> how it is searched: grid, log, uniform, choice or range."""
    base: dict[str, Any]
    """The resolved configuration of the first run: what does not vary is that of all."""
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    jobs: dict[str, str] = field(default_factory=dict)
    """Name -> SLURM's number of the job that it was last given to."""


@dataclass(frozen=True)
class Element(submit.Submitted):
    """One job of the array; where its run is finished, it brings the sweep's table and plot up to date."""

    sweep: Path = Path()

    def __call__(self) -> int:
        code = super().__call__()
        allocation = None if self.here else world.allocation()
        if code == FINISHED and allocation and allocation.node == 0:
            from clipdist.cluster.sweep_table import write_results

            try:
                write_results(self.sweep)
            except (UserError, OSError) as error:  # the run is safe all the same
                logger.warning("%s: table and plot are as they were: %s", self.sweep, error)
        return code


def plan(recipe: Path, words: Sequence[str], name: str, draws: int = 0, seed: int = 0, at_most: int = 200) -> Plan:
    """What the words mean, every configuration of it checked by types. Writes nothing.

    Raises `UserError` for words that mean nothing, for a combination that is no valid configuration, where nothing
    varies, and for more than `at_most` runs.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise UserError(f"--name {name!r}: expected a plain folder name")
    keys = read_words(words)
    _check_count(keys, draws, at_most)
    varying = [key for key in keys if key.varies]
    names = [name for key in varying for name in key.names]
    configs: dict[str, RunConfig] = {}
    values: dict[str, dict[str, Any]] = {}
    for combination in combinations(keys, draws, seed):
        differs = [word for word in combination if word.partition("=")[0] in names]
        try:
            config = load_config(recipe, combination)
        except UserError as error:
            raise UserError(f"{' '.join(differs)}: {error}") from None
        own = {name: _value(plain(config), name) for name in names}
        called = run_name(own)
        if called in configs:
            if not draws:
                raise UserError(f"{' '.join(differs)}: these values stand there a second time, as another text")
            continue
        values[called] = own
        configs[called] = replace(config, name=called, runs=str(Path(config.runs) / name))
    folder = next(iter(configs.values())).folder.parent
    return Plan(recipe, list(words), varying, folder, configs, values, count(keys, draws))


def _check_count(keys: Sequence[Key], draws: int, at_most: int) -> None:
    searched = [key.key for key in keys if key.search]
    if searched and draws < 1:
        raise UserError(f"{', '.join(searched)}: drawn at random; say how often with --random, such as --random 20")
    if draws < 0:
        raise UserError(f"--random {draws}: expected a number of draws")
    if draws and not searched:
        raise UserError(f"--random {draws}: no key is drawn at random; write one as optim.lr=log(1e-5,1e-2)")
    if not any(key.varies for key in keys):
        raise UserError(
            "nothing varies: give a key several values, such as optim.lr=1e-4,3e-4; launch/submit.py runs one"
        )
    if (number := count(keys, draws)) > at_most:
        raise UserError(
            f"these words mean {number:,} runs, more than {at_most:,}; if so many are meant: --max-runs {number}"
        )


def read_record(folder: Path) -> Record:
    """Raises `UserError` where there is no sweep."""
    path = folder / RECORD
    if not path.exists():
        raise UserError(f"{folder}: no sweep there; expected runs/<sweep>, with a {RECORD}")
    tree = read_yaml(path)
    known = {one.name for one in fields(Record)}
    try:
        return Record(**{key: value for key, value in tree.items() if key in known})
    except TypeError as error:
        raise UserError(f"{path}: damaged ({error}); restore it, or remove it to begin the sweep anew") from None


def resumed(planned: Plan, draws: int, seed: int, force: bool = False) -> Record:
    """The record as it is after this plan: the one that there is, with the plan's runs added.

    Raises `UserError` where the sweep there has other keys, or was made of a recipe that differs in what defines the
    maths, unless `force`; and where the folder is no sweep's.
    """
    keys = {name: key.search or "grid" for key in planned.keys for name in key.names}
    first = next(iter(planned.configs.values()))
    base = {key: value for key, value in plain(first).items() if key not in ("name", "runs")}
    record = Record(str(planned.recipe), planned.words, draws, seed, keys, base)
    if not (planned.folder / RECORD).exists():
        if (planned.folder / "config.yaml").exists():
            raise UserError(f"{planned.folder}: there is a run of that name; choose another --name")
        return replace(record, runs=dict(planned.values))
    old = read_record(planned.folder)
    changed = [f"keys that vary: {', '.join(old.keys)} → {', '.join(keys)}"] if set(old.keys) != set(keys) else []
    before = validate(old.base, {}, str(planned.folder / RECORD))
    varied = (*old.keys, *keys)
    changed += [line for line in differences(before, first) if not _concerns(line, varied)]
    if changed and not force:
        raise UserError(
            f"{planned.folder}: the sweep there was made with another recipe ({'; '.join(changed)}); choose another "
            f"--name, restore these values, or say --force, and its table compares runs that differ in this, too"
        )
    runs = {**old.runs, **planned.values}
    return replace(record, keys={**old.keys, **keys}, runs=runs, jobs=dict(old.jobs))


def _concerns(line: str, keys: Sequence[str]) -> bool:
    return any(line.startswith((f"{key}:", f"{key}.")) for key in keys)


def states(planned: Plan, record: Record, sending: bool = False) -> dict[str, str]:
    """Of each run of the plan: new, goes on, finished, in the queue, stopped. The last three are not sent again.

    Where SLURM does not answer, nothing is in its queue; `sending` some there, that is a `UserError` instead, since no
    run may wait there twice.
    """
    given = {record.jobs[name] for name in planned.configs if name in record.jobs}
    queue = scheduler.queue() if given else {}
    if queue is None and sending:
        raise UserError("squeue does not answer, so it cannot be told which runs wait in the queue already; try again")
    return {name: _state(planned.folder / name, record.jobs.get(name) in (queue or {})) for name in planned.configs}


def _state(run: Path, queued: bool) -> str:
    newest = newest_state(run)
    if newest.get("finished"):
        return FINISHED_ALREADY
    if queued:
        return IN_QUEUE
    if (run / STOP).exists():
        return STOPPED_FOR_GOOD
    return GOES_ON if newest else NEW


def prepare(planned: Plan, found: dict[str, str], args: argparse.Namespace) -> dict[str, Element]:
    """Of each run that is to be sent, its job: everything that `submit.prepare` can check is checked, for all of them.
    Writes nothing."""
    local = args.cluster == "local"
    jobs = {}
    for name, config in planned.configs.items():
        if found[name] not in TO_SEND:
            continue
        try:
            job = submit.prepare(config, args)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        jobs[name] = Element(**{one.name: getattr(job, one.name) for one in fields(job)}, sweep=planned.folder)
    largest = 0 if local or args.dry_run else scheduler.largest_array()
    if largest and len(jobs) > largest:
        raise UserError(
            f"{len(jobs):,} runs to send, and an array has at most {largest:,} jobs here (MaxArraySize); send fewer at "
            f"once: fewer values, then the same command with all of them when these are finished"
        )
    return jobs


def write(planned: Plan, record: Record, jobs: dict[str, Element]) -> dict[str, Element]:
    """Writes the record, and each job's configuration. Returns the jobs that train by these."""
    write_record(planned.folder, record)
    return {name: submit.write_submitted(planned.configs[name], job) for name, job in jobs.items()}


def write_record(folder: Path, record: Record) -> None:
    text = f"# {time.strftime('%Y-%m-%d %H:%M:%S')}; launch/sweep.py reads this file and writes it anew\n"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / RECORD, (text + dump(vars(record))).encode())


def send(planned: Plan, record: Record, jobs: dict[str, Element], resources: submit.Resources, at_once: int) -> str:
    """Puts the jobs into the queue as one array, and notes in the record which is whose; the array's number."""
    folder = planned.folder
    sent = submit.send_array(list(jobs.values()), folder.name, resources, folder / submit.LOGS, at_once)
    record.jobs |= {name: number for name, (number, _) in zip(jobs, sent, strict=True)}
    write_record(folder, record)
    return sent[0][0].split("_")[0]


def run_here(
    jobs: dict[str, Element], resources: submit.Resources, told: Callable[[str, Path], None]
) -> Iterator[tuple[str, int]]:
    """Runs the jobs on this machine, one after another; each one's name and exit code. One that fails does not keep the
    others from running; one that was asked to stop is the last. `told` as `submit.run_here` has it."""
    for name, job in jobs.items():
        try:
            code = submit.run_here(job, resources, told)
        except UserError as error:
            logger.error("%s: %s", name, error)
            code = 1
        yield name, code
        if code == STOPPED:
            return


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other commands from the sweep's own files meanwhile."""
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = hold(folder)
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise
        raise UserError(f"{folder}: another launch/sweep.py is at work there; try again when it has ended") from None
    try:
        yield
    finally:
        lock.close()


def summary(planned: Plan, found: dict[str, str]) -> str:
    """How many runs there are of each state, in words."""
    numbers = ", ".join(f"{number} {state}" for state, number in Counter(found.values()).most_common())
    same = planned.combinations - len(found)
    doubles = f"; {same} draws have the values of another" if same else ""
    return f"{planned.folder}: {len(found)} run{'s'[: len(found) - 1]}, {numbers}{doubles}"


def _value(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree
