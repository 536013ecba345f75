"""Sends trainings to SLURM, or to this machine, through submitit; what is wrong is found before anything is queued."""

import argparse
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import submitit
from submitit.core.utils import DelayedSubmission, FailedJobError
from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

from clipdist import world
from clipdist.cluster import scheduler
from clipdist.cluster.doctor.recipe import check_data
from clipdist.cluster.job import FINISHED, STOPPED, Limits, Training, log_to_output, run_job
from clipdist.cluster.meeting import this_machine
from clipdist.cluster.node import check_accelerate_config
from clipdist.cluster.node_command import add_running_arguments
from clipdist.cluster.runs import JOBS, STOP
from clipdist.data.shards import write_atomically
from clipdist.errors import UserError, disk_errors
from clipdist.train.config import check

if TYPE_CHECKING:
    from clipdist.config import RunConfig

SITE = Path("slurm/site.sh")
SUBMITTED = "submitted"
"""The folder in a run's own that holds the configurations that were submitted, one file each."""
LOGS = "slurm"
"""The folder in a run's own where submitit leaves a job's output."""


@dataclass(frozen=True)
class Resources:
    """What to ask SLURM for. None, and nothing, leave it to the cluster."""

    nodes: int = 1
    gpus_per_node: int = 1
    minutes: int = 240
    signal_seconds: int = 300
    """How long before the limit the job is told to save."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    cpus_per_task: int | None = None
    """Of the one task on each node, which has all processes of it."""
    mem: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    setup: Sequence[str] = ()
    """Lines of shell before anything runs on the nodes."""
    more: dict[str, str] = field(default_factory=dict)
    """Any other option of sbatch."""


@dataclass(frozen=True)
class Submitted:
    """What a node of the job does: submitit calls it on each. Ends the process with the job's exit code unless that is
    0."""

    training: Training
    evaluate: Sequence[str] = ()
    """Words of `clipdist eval`, run by the first node when the training is finished."""
    here: bool = False
    """On this machine, whatever SLURM's environment says."""
    gpus: int = 0

    def __call__(self) -> int:
        log_to_output()
        allocation = None if self.here else world.allocation()
        code = run_job(self.training, allocation or this_machine(self.gpus))
        if code == FINISHED and self.evaluate and (allocation is None or allocation.node == 0):
            code = subprocess.run(
                [sys.executable, "-m", "clipdist.cli", "eval", *self.evaluate], check=False
            ).returncode
        if code == STOPPED and (self.training.run / STOP).exists():
            code = FINISHED  # as asked: SLURM shall take it for done
        if code and not self.here:
            sys.exit(code)
        return code

    def checkpoint(self) -> DelayedSubmission:
        """For a signal that comes before anything has begun, which submitit answers itself: the same once more."""
        return DelayedSubmission(self)


S = TypeVar("S", bound=Submitted)

# Says nothing of the run, so that it serves each job of an array.
TEARDOWN = """code=$?
case $code in
    0 | 2 | 75) ;;
    *) {python} -m clipdist.cli requeue --shared {shared} --max-crashes {crashes} --code $code || code=$? ;;
esac
[ $code = 75 ] && sleep 60 # back in the queue: until SLURM ends this script
exit $code"""


def add_resource_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to ask SLURM for")
    group.add_argument("--partition", "-p")
    group.add_argument("--account", "-A")
    group.add_argument("--qos")
    group.add_argument("--nodes", "-N", type=int, default=1)
    group.add_argument("--gpus-per-node", type=int, default=1, metavar="N")
    group.add_argument("--cpus-per-task", type=int, metavar="N", help="of one task per node, which has all processes")
    group.add_argument("--mem", help="such as 64GB")
    group.add_argument(
        "--time", type=minutes, default=240, help="as for sbatch: 04:00:00, 2-00:00:00, or minutes (240)"
    )
    group.add_argument(
        "--signal-seconds", type=int, default=300, metavar="S", help="save so long before the limit (300)"
    )
    group.add_argument("--constraint")
    group.add_argument("--exclude", metavar="NODES")
    group.add_argument("--setup", action="append", default=[], metavar="LINE", help=f"of shell; {SITE} comes by itself")
    group.add_argument(
        "--sbatch", action="append", default=[], metavar="KEY=VALUE", help="any other option, such as mail-type=END"
    )
    group = parser.add_argument_group("how to run")
    add_running_arguments(group)
    group.add_argument("--cluster", choices=("slurm", "local"), default="slurm", help="local: on this machine, at once")
    group.add_argument("--dry-run", action="store_true", help="print what sbatch would get, and stop")


def minutes(text: str) -> int:
    """Of a time as sbatch takes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    total = 0
    if found := re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text):
        days, *rest = found.groups()
        parts = [int(part) for part in rest if part is not None]
        if days is not None or len(parts) == 3:
            hours, mins, secs = [*parts, 0, 0][:3]
        else:
            hours, (mins, secs) = 0, [*parts, 0][:2]
        total = int(days or 0) * 1440 + hours * 60 + mins + -(-secs // 60)
    if total < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a time such as 04:00:00, 2-00:00:00, or minutes")
    return total


def resources_of(args: argparse.Namespace) -> Resources:
    more = {}
    for word in args.sbatch:
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            raise UserError(f"--sbatch {word}: expected key=value, such as mail-type=END")
        more[key] = value
    if not 0 < args.signal_seconds < 60 * args.time:
        raise UserError(
            f"--signal-seconds {args.signal_seconds}, --time {args.time} minutes: expected the signal within the time"
        )
    site = [f"source {shlex.quote(str(SITE))}"] if SITE.exists() else []
    return Resources(
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        minutes=args.time,
        signal_seconds=args.signal_seconds,
        partition=args.partition,
        account=args.account,
        qos=args.qos,
        cpus_per_task=args.cpus_per_task,
        mem=args.mem,
        constraint=args.constraint,
        exclude=args.exclude,
        setup=(*site, *args.setup),
        more=more,
    )


def prepare(config: "RunConfig", args: argparse.Namespace, evaluate: bool = True) -> Submitted:
    """Checks everything that can be checked here, and says what is to run. Writes nothing.

    Raises `UserError` for a recipe that could not train on so many processes, data that is not there, and a run that
    was made by another recipe.
    """
    processes = args.processes_per_node or args.gpus_per_node
    if args.nodes < 1 or processes < 1:
        raise UserError(
            f"--nodes {args.nodes}, {processes} processes on each: expected at least 1; without GPUs, say "
            f"--gpus-per-node 0 --processes-per-node 2 --accelerate-config launch/accelerate/cpu.yaml"
        )
    if args.cluster == "local" and args.nodes > 1:
        raise UserError(f"--cluster local has one node, --nodes says {args.nodes}")
    check_accelerate_config(args.accelerate_config)
    check(config, processes=args.nodes * processes, gpus=args.gpus_per_node > 0)
    if config.train.processes and config.train.processes != args.nodes * processes:
        raise UserError(
            f"train.processes={config.train.processes}, but {args.nodes} × {processes} would run; change one of them"
        )
    check_data(config)  # tars without an index are a warning there: the job makes one
    _check_run(config)
    training = Training(
        words=[],
        run=config.folder,
        processes=processes,
        accelerate_config=args.accelerate_config,
        shared=config.folder.parent / JOBS,
        limits=Limits(args.max_crashes, args.rendezvous_seconds),
        preflight=args.preflight,
    )
    words: list[str] = []
    if evaluate and config.data.val_split and config.data.set:
        words = [str(config.folder / "model"), "--data", config.data.set, "--split", config.data.val_split]
    return Submitted(training, words, args.cluster == "local", args.gpus_per_node)


def _check_run(config: "RunConfig") -> None:
    from clipdist.config import differences, read_config

    written = config.folder / "config.yaml"
    if not written.exists():
        return
    if config.resume == "never":
        raise UserError(f"{config.folder}: already holds a run; choose another name, or resume=auto to go on")
    begun = (config.folder / "checkpoints" / "latest").exists()
    if config.resume == "auto" and begun and (changed := differences(read_config(written), config)):
        raise UserError(
            f"{config.folder}: the run there was made with another recipe ({'; '.join(changed)}); choose another "
            f"name, restore these values, or go on all the same with resume=force"
        )


def sbatch_text(
    job: Submitted, name: str, resources: Resources, folder: Path | None = None, jobs: int = 1, at_once: int = 0
) -> str:
    """What sbatch gets, comment lines and all; needs no SLURM here. `folder`, `jobs` and `at_once` as `send_array` has
    them; by default the run's own, and a single job."""
    folder = (folder or job.training.run / LOGS).absolute()
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    array: dict[str, Any] = {"map_count": jobs, "array_parallelism": at_once or jobs} if jobs > 1 else {}
    return _make_sbatch_string(command=command, folder=folder, **_parameters(job, name, resources), **array)


def _parameters(job: Submitted, name: str, resources: Resources) -> dict[str, Any]:
    """By submitit's names."""
    options: dict[str, Any] = {
        "job_name": name,
        "time": resources.minutes,
        "nodes": resources.nodes,
        "ntasks_per_node": 1,
        "gpus_per_node": resources.gpus_per_node or None,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "cpus_per_task": resources.cpus_per_task,
        "mem": resources.mem,
        "constraint": resources.constraint,
        "exclude": resources.exclude,
        "signal_delay_s": resources.signal_seconds,
        "stderr_to_stdout": True,
        "setup": list(resources.setup),
        "teardown": [_teardown(job.training)],
        "srun_args": ["--kill-on-bad-exit=0", *_processors(resources)],
        "additional_parameters": {"requeue": True, **resources.more},
    }
    return {key: value for key, value in options.items() if value is not None}


def _processors(resources: Resources) -> list[str]:
    """From 22.05 on, `srun` does not take them from the job: without these words a task is bound to one."""
    return [f"--cpus-per-task={resources.cpus_per_task}"] if resources.cpus_per_task else []


def _teardown(training: Training) -> str:
    python, shared = shlex.quote(sys.executable), shlex.quote(str(training.shared))
    return TEARDOWN.format(python=python, shared=shared, crashes=training.limits.crashes)


def write_submitted(config: "RunConfig", job: S) -> S:
    """Writes the resolved configuration into the run's folder; the job trains by that file, and by nothing else, so
    that no later change of a recipe reaches a job that waits in the queue."""
    from clipdist.config import to_yaml

    folder = config.folder / SUBMITTED
    with disk_errors(config.folder):
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.iterdir()))
        path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{number}.yaml"
        write_atomically(path, to_yaml(config).encode())
    return replace(job, training=replace(job.training, words=[str(path)]))


def send(job: Submitted, name: str, resources: Resources) -> tuple[str, Path]:
    """Puts one job into the queue; its number and the file that its output goes to. Raises as `send_array` does."""
    (sent,) = send_array([job], name, resources, job.training.run / LOGS)
    return sent


def send_array(
    jobs: Sequence[Submitted], name: str, resources: Resources, folder: Path, at_once: int = 0
) -> list[tuple[str, Path]]:
    """Puts all of these jobs into the queue as one array, or one alone as a plain job; for each its number,
    array_index, and the file that its output goes to, which is in `folder`. At most `at_once` of them run at a time; 0:
    as many as there is room for. Raises `UserError` with SLURM's words when they are refused, or would wait forever:
    then they are taken out again."""
    executor = _executor(folder)
    if refusal := scheduler.test(sbatch_text(jobs[0], name, resources, folder, len(jobs), at_once)):
        raise UserError(f"SLURM refuses the job: {refusal}")
    executor.update_parameters(array_parallelism=at_once or len(jobs), **_parameters(jobs[0], name, resources))
    with _refused(), executor.batch():
        sent: list[submitit.Job[int]] = [executor.submit(job) for job in jobs]
    number = sent[0].job_id
    if reason := scheduler.hopeless(number):
        scheduler.cancel(number.split("_")[0])
        raise UserError(f"SLURM would never start the job, so it is not in the queue: {reason}")
    return [(job.job_id, job.paths.stdout) for job in sent]


def _executor(folder: Path) -> SlurmExecutor:
    if SlurmExecutor.affinity() < 0:
        raise UserError("there is no srun here: run this where sbatch works, or say --cluster local or --dry-run")
    return SlurmExecutor(folder=folder)


@contextmanager
def _refused() -> Iterator[None]:
    """Turns sbatch's refusal into a `UserError`."""
    try:
        yield
    except (FailedJobError, subprocess.CalledProcessError) as error:
        said = [line for line in str(error).splitlines() if line.startswith("sbatch: error")]
        raise UserError(f"SLURM refuses the job: {' '.join(said) or error}") from None


def run_here(job: Submitted, resources: Resources, told: Callable[[str, Path], None]) -> int:
    """Runs the job on this machine and waits; its exit code. `told` is called at its begin, with its process and the
    file that what it says goes to."""
    executor = submitit.LocalExecutor(folder=job.training.run / LOGS)
    executor.update_parameters(
        timeout_min=resources.minutes, signal_delay_s=resources.signal_seconds, gpus_per_node=resources.gpus_per_node
    )
    executor.update_parameters(stderr_to_stdout=True)
    sent: submitit.Job[int] = executor.submit(job)
    told(sent.job_id, sent.paths.stdout)
    try:
        return sent.result()
    except KeyboardInterrupt:
        sent.cancel()
        raise
    except submitit.core.utils.UncompletedJobError as error:
        raise UserError(
            f"the job ended without an answer; see {sent.paths.stdout} ({str(error).splitlines()[0]})"
        ) from None
