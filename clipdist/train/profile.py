"""Where the time of a training step goes: measures a run's own steps, part by part.

The parts of a step share all of its time, each moment belonging to one of them. On a GPU the clock waits for the device
wherever a part begins or ends, so that work counts where it was ordered; what that costs is measured too, against plain
steps in between.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from clipdist import world
from clipdist.data.loader import Batch, worker_errors
from clipdist.errors import disk_errors
from clipdist.train.engine import Exchange
from clipdist.train.metrics import arithmetic, device_peak, memory
from clipdist.train.trainer import Trainer

PARTS = (
    *("data wait", "image tower", "text tower", "gather", "loss"),
    *("backward", "gradient exchange", "optimiser", "other"),
)
WARM_UP, TRACED = 3, 3
GATHERS = ("features", "vectors")  # the loss' collectives, as `world.traffic` calls them


class Stopwatch:
    """Seconds of named pieces of work that may lie within each other; each counts without what lies within it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.running = False
        self._open: list[str] = []
        self._since = 0.0

    def now(self) -> float:
        """The time when the device has done all that it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if not self.running:
            yield
            return
        self._charge()
        self._open.append(name)
        try:
            with record_function(name):
                yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        now = self.now()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, which counts as a part."""

        def inner(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return work(*args, **kwargs)

        return inner


@dataclass
class Profile:
    """What one rank measured; times are in seconds per step."""

    steps: int
    parts: dict[str, float]
    """Of each of `PARTS` that there is; they add up to `step_seconds`."""
    step_seconds: float
    plain_seconds: float
    """Of a step that nothing looks into, as training runs them."""
    pairs_per_second: float
    """Over all processes, by the plain steps."""
    what: str = "pairs"
    figures: dict[str, float] = field(default_factory=dict)
    """Metrics of these steps: memory, arithmetic and communication."""


@contextmanager
def observed(trainer: Trainer, watch: Stopwatch) -> Iterator[None]:
    """Has the trainer's own towers, loss, engine and optimiser pass by the stopwatch."""
    engine = trainer.engine
    places: list[tuple[Any, str, str]] = [
        *trainer.objective.timed(trainer.model),
        (engine, "backward", "backward"),
        (engine, "gradient_norms", "optimiser"),
        (engine, "update", "optimiser"),
    ]
    before = [vars(owner).get(name) for owner, name, _ in places]
    for owner, name, part in places:
        setattr(owner, name, watch.timed(part, getattr(owner, name)))
    try:
        yield
    finally:
        for (owner, name, _), own in zip(places, before, strict=True):
            if own is None:
                delattr(owner, name)  # the method of its class shows again
            else:
                setattr(owner, name, own)  # an engine's, or an objective's


def measure(trainer: Trainer, steps: int, trace: Path | None = None) -> list[Profile]:
    """Trains a few steps to warm up, then `steps` whose parts are timed, a plain one after each; [profile of each
    rank]. All ranks call it. With `trace`, a few further steps are recorded, and rank 0 writes its own there."""
    watch = Stopwatch(trainer.device)
    trainer.total_steps = max(trainer.total_steps, trainer.progress.step + WARM_UP + 2 * steps + TRACED)
    sent: defaultdict[str, float] = defaultdict(float)
    plain = 0.0
    batches: Any = iter(trainer.batches())  # a generator: closing it ends the workers
    with worker_errors(), closing(batches), observed(trainer, watch):
        for _ in range(WARM_UP):
            _step(trainer, batches, watch)
        memory(trainer.device)
        world.traffic.take()
        for _ in range(steps):
            watch.running = True
            with watch.part("other"):
                _step(trainer, batches, watch)
            watch.running = False
            taken = world.traffic.take()
            began = watch.now()
            _step(trainer, batches, watch)
            plain += watch.now() - began
            world.traffic.take()
            exchange = trainer.engine.gradient_exchange()  # known once the next step has begun
            _split(watch, taken, exchange)
            if exchange:
                sent["perf/seconds_gradients"] += exchange.seconds / steps
            for purpose, what in taken.items():
                sent[f"perf/bytes_sent_{purpose}"] += what.bytes / steps
                sent[f"perf/seconds_{purpose}"] += what.seconds / steps
        peak = memory(trainer.device)
        if trace is not None:
            _record(trainer, batches, watch, trace)
    if trainer.world.world_size > 1:
        sent["perf/bytes_sent_gradients"] = trainer.engine.gradient_bytes()
    return world.gather_objects(_summary(trainer, watch, steps, plain / steps, {**peak, **sent}))


def _step(trainer: Trainer, batches: Iterator[Batch], watch: Stopwatch) -> None:
    """What the loop does at each step; logging, validation and checkpoints, which come now and then, are left out."""
    with watch.part("data wait"):
        batch = next(batches)
    trainer.enter_epoch(trainer.epoch_of(batch.step))
    trainer.engine.measure_each_exchange()
    trainer.step(batch)
    trainer.agree(False, False, len(batch.bad))


def _split(watch: Stopwatch, taken: dict[str, world.Sent], exchange: Exchange | None) -> None:
    """Takes a step's collectives out of the parts that they lie in. Of the gradients' exchange, which runs beside the
    backward pass, only what is not hidden behind it."""
    gathered = sum(taken[purpose].seconds for purpose in GATHERS if purpose in taken)
    exposed = exchange.exposed_seconds if exchange else 0.0
    for part, within, seconds in (("gather", "loss", gathered), ("gradient exchange", "backward", exposed)):
        seconds = min(seconds, watch.seconds[within])
        watch.seconds[part] += seconds
        watch.seconds[within] -= seconds


def _record(trainer: Trainer, batches: Iterator[Batch], watch: Stopwatch, trace: Path) -> None:
    """Writes a Chrome trace of a few steps in which the parts have names."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if trainer.device.type == "cuda" else [])
    seconds = dict(watch.seconds)
    recorder = profile(activities=activities) if trainer.world.is_main else None
    with recorder or nullcontext():
        for _ in range(TRACED):
            watch.running = True
            with watch.part("other"), record_function("step"):
                _step(trainer, batches, watch)
            watch.running = False
    watch.seconds = defaultdict(float, seconds)
    if recorder is not None:
        with disk_errors(trace.parent):
            trace.parent.mkdir(parents=True, exist_ok=True)
            recorder.export_chrome_trace(str(trace))


def _summary(trainer: Trainer, watch: Stopwatch, steps: int, plain: float, figures: dict[str, float]) -> Profile:
    parts = {name: watch.seconds[name] / steps for name in PARTS if name not in trainer.objective.absent_parts}
    assert watch.seconds.keys() <= set(PARTS)
    if trainer.step_flops:  # known to rank 0
        peak = device_peak(trainer.device, trainer.config.train.precision)
        figures = figures | arithmetic(trainer.step_flops, plain, trainer.world.world_size, peak)
    speed = trainer.order.global_batch / plain
    return Profile(steps, parts, sum(parts.values()), plain, speed, trainer.objective.what, figures)
