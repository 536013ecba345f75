"""The preflight of one node: everything that can be known of it before the first step, in seconds.

Whatever may hang (a file system, a driver, a name server) is asked in child processes, all at once, and given up after
a while: then that is what is found.
"""

import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch

from clipdist.cluster.doctor import machine
from clipdist.cluster.doctor import recipe as recipes
from clipdist.cluster.doctor import shared_folder as files
from clipdist.cluster.doctor.bounded import Hung, Work
from clipdist.cluster.doctor.findings import Finding
from clipdist.cluster.doctor.machine import Gpu
from clipdist.cluster.doctor.recipe import ModelSize
from clipdist.errors import UserError

if TYPE_CHECKING:
    from clipdist.config import RunConfig

T = TypeVar("T")
SECONDS = 30.0
"""How long anything may take to answer."""


@dataclass(frozen=True)
class Launch:
    """What is to be launched."""

    processes: int = 0
    """On each node; 0: one for each GPU that the job has there, or that is found, at least one."""
    nodes: tuple[str, ...] = ()
    """Host names of a job's nodes; empty: this machine alone."""
    gpus: int = 0
    """How many SLURM gave to the job on this node."""
    cpu: bool = False
    """It is meant for CPUs: no GPU is expected."""

    @property
    def ranks(self) -> int:
        return max(1, self.processes) * max(1, len(self.nodes))


class Health(NamedTuple):
    """All that was found on a node."""

    findings: list[Finding]
    facts: dict[str, str]
    """What must be alike on all nodes, by the names of `findings.MUST_AGREE`."""
    file_clock: float | None
    """Seconds by which the clock of the shared file system is ahead of this machine's; None: not measured."""
    launch: Launch
    """With the number of processes that was taken."""


def preflight(
    config: "RunConfig | None", launch: Launch | None = None, *, shared: Path | None = None, seconds: float = SECONDS
) -> list[Finding]:
    """What a node's processes would meet; without a recipe, what can be said without.

    One process of each node calls it, before those that train are there: they take memory, and lock the run. It
    changes nothing but for small files in the recipe's `runs` and in `shared`, which it removes. Whatever is wrong is a
    finding. Each thing has `seconds` to answer, and few wait for another: twice as long is the most that it takes.
    """
    return examine(config, launch, shared=shared, seconds=seconds).findings


def examine(
    config: "RunConfig | None", launch: Launch | None = None, *, shared: Path | None = None, seconds: float = SECONDS
) -> Health:
    """`preflight`, and what is to be compared with other nodes."""
    launch = launch or Launch()
    questions = Questions(seconds)
    # What this process has done on a GPU already, a child cannot.
    here = torch.cuda.is_initialized()
    looking = questions.ask("GPUs", machine.look_at_gpus, here=here)
    resolving = questions.ask("host name", machine.check_host_name, socket.gethostname(), launch.nodes)
    places = {"runs": Path(config.runs)} if config else {}
    if shared and not (config and shared.absolute().is_relative_to(Path(config.runs).absolute())):
        places["shared folder"] = shared
    probing = {name: questions.ask(name, files.probe, place) for name, place in places.items()}
    of_run = _ask_of_run(questions, config) if config else None

    gpus = looking() or []
    if not launch.processes:
        launch = replace(launch, processes=1 if launch.cpu else max(1, launch.gpus or len(gpus)))
    clearing = questions.ask("scratch", machine.check_scratch, launch.processes)
    checking = questions.ask("recipe", recipes.check_recipe, config, launch.ranks, here=here) if config else None

    found = questions.findings
    driver = machine.driver_version()
    found += machine.check_gpus(gpus, launch.processes, launch.gpus, launch.cpu, driver, torch.version.cuda)
    found.append(machine.check_nccl(gpus, launch.ranks, launch.cpu, machine.nccl_version()))
    size, written = None, 0
    if config and of_run and checking:
        found.append(machine.check_precision(config, gpus, launch.cpu))
        questions.note(checking())
        size, written = of_run.tell(questions, config)
    probes = {name: answer() for name, answer in probing.items()}
    for name, probe in probes.items():
        if probe is not None:
            found += [check(name, probe) for check in (files.check_speed, files.check_locks, files.check_clock)]
    found.append(_check_memory(config, launch, gpus, size))
    if config and size and (probe := probes["runs"]) is not None:
        needed = recipes.needed_bytes(config, size.parameters)
        why = f"{config.checkpoint.keep} checkpoints and one under way, the best model twice"
        found.append(files.check_space("runs", probe.free_bytes, max(0, needed - written), why))
    found += clearing() or []
    found += machine.check_limits(launch.ranks, gpus, len(launch.nodes))
    questions.note(resolving())
    clock = probes.get("shared folder", probes.get("runs"))
    return Health(found, machine.facts(gpus), clock.clock_ahead if clock else None, launch)


class Questions:
    """Asks in child processes; what goes wrong there becomes a finding."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.findings: list[Finding] = []

    def ask(self, name: str, function: Callable[..., T], *words: object, here: bool = False) -> Callable[[], T | None]:
        """Begins; what it returns waits for the answer, None when there is none. `here`: in this process, then."""
        work = None if here else Work(function, *words)

        def answer() -> T | None:
            try:
                return function(*words) if work is None else work.result(self.seconds)
            except UserError as error:
                self.findings.append(Finding(name, "error", str(error)))
            except Hung as error:
                advice = "is a file system, a driver or a name server dead on this machine?"
                self.findings.append(Finding(name, "error", f"{error}; expected one in a moment: {advice}"))
            except Exception as error:
                self.findings.append(Finding(name, "error", f"cannot be looked at ({error})"))
            return None

        return answer

    def note(self, finding: Finding | None) -> None:
        if finding is not None:
            self.findings.append(finding)


class _OfRun(NamedTuple):
    """Questions about a recipe that are under way."""

    size: Callable[[], ModelSize | None]
    data: Callable[[], Finding | None]
    holder: Callable[[], str | None]
    written: Callable[[], int | None]

    def tell(self, questions: Questions, config: "RunConfig") -> tuple[ModelSize | None, int]:
        """The model's size, and the bytes of the checkpoints that are there; the rest becomes findings."""
        size = self.size()
        if size is not None:
            questions.note(recipes.check_model(size))
        questions.note(self.data())
        if holder := self.holder():
            advice = f"a start waits a minute for it, then is refused: clipdist stop {config.folder} ends it"
            questions.note(Finding("run", "warn", f"{config.folder} is being trained by {holder}; {advice}"))
        elif holder == "":
            questions.note(Finding("run", "ok", f"nobody trains {config.folder}"))
        return size, self.written() or 0


def _ask_of_run(questions: Questions, config: "RunConfig") -> _OfRun:
    return _OfRun(
        questions.ask("model", recipes.run_model_size, config),
        questions.ask("shard set", recipes.check_data, config),
        questions.ask("run", files.holder, config.folder),
        questions.ask("run", files.checkpoint_bytes, config.folder),
    )


def _check_memory(config: "RunConfig | None", launch: Launch, gpus: list[Gpu], size: ModelSize | None) -> Finding:
    parameters = size.parameters if size else 0
    # float32 weights, gradients and AdamW's two averages in each process; on GPUs one copy of a checkpoint.
    state = 12 * parameters if gpus and not launch.cpu else 16 * parameters * launch.processes
    workers = config.data.workers if config else 0
    return machine.check_memory(machine.free_memory(), launch.processes, workers, state)
