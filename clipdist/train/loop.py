"""The training loop."""

import logging
from typing import TYPE_CHECKING, Any

from clipdist import heartbeat
from clipdist.data.loader import worker_errors
from clipdist.train.results import leave_results
from clipdist.train.signals import Clock, StopRequest
from clipdist.train.trainer import Trainer

if TYPE_CHECKING:
    from clipdist.config import RunConfig

logger = logging.getLogger(__name__)

FINISHED = 0
STOPPED_ON_REQUEST = 75
START_MINUTES = 30.0
"""What a start may take, however short `train.hang_minutes` is: joining the other ranks, weights from the hub."""
STRAGGLER_SHARE = 0.2
"""Of a step's time, from which on a line says that the others wait for one rank."""


@worker_errors()
def train(config: "RunConfig") -> int:
    """Trains a run to its end, or until it is asked to stop; goes on by itself where it stopped before.

    Every rank calls it. Returns 0 when the run is finished and 75 when it was stopped by a signal and left a
    checkpoint: start the same command again. Raises `UserError` for what the user can change, `DiskError` when the
    disk refuses to take the last checkpoint, and `WorkerKilled` when a loader worker dies.
    """
    hang_minutes = config.train.hang_minutes
    heartbeat.watch(max(hang_minutes, START_MINUTES) if hang_minutes else 0)
    try:
        return _train(config)
    finally:
        heartbeat.watch(0)


def _train(config: "RunConfig") -> int:
    trainer = Trainer(config)
    progress, per_epoch = trainer.progress, trainer.order.steps_per_epoch
    if progress.finished:
        say(trainer, f"{trainer.folder.path} is finished: step {progress.step:,}, nothing to do")
        return FINISHED
    engine = f" ({trainer.engine.name})" if trainer.world.world_size > 1 else ""
    what = trainer.objective.what
    say(
        trainer,
        f"{trainer.folder.path}: {trainer.total_steps:,} steps of {trainer.order.global_batch} {what}, "
        f"{per_epoch:,} per epoch, processes: {trainer.world.world_size}{engine}, from step {progress.step:,}",
    )
    if progress.step == trainer.total_steps:  # the recipe now ends where an earlier one went on
        progress.finished = True
        with trainer.averaged():
            leave_results(trainer)
        trainer.save()
        trainer.close()
        return FINISHED
    request, clock, every = StopRequest(), Clock(config.checkpoint.every_minutes), config.checkpoint.every_steps
    heartbeat.watch(config.train.hang_minutes)
    stop = False
    for batch in trainer.batches():
        trainer.enter_epoch(trainer.epoch_of(batch.step))
        values = trainer.step(batch)

        due = clock.due() or bool(every and progress.step % every == 0)
        stop, save, bad = trainer.agree(request.requested, due, len(batch.bad))
        heartbeat.beat()
        if bad:
            trainer.note_bad_samples(batch, bad)
        last = progress.step == trainer.total_steps
        epoch_ends = progress.step % per_epoch == 0
        if progress.step % config.log.every_steps == 0 or epoch_ends or stop:
            record = trainer.log(values)
            say(trainer, describe(trainer, record))

        if epoch_ends:
            progress.bad_in_epoch = 0
            epoch = progress.step // per_epoch
            if trainer.val_split is not None and (epoch % config.evaluate.every_epochs == 0 or last):
                with trainer.averaged():
                    scores, enough = trainer.validate()
                say(trainer, f"epoch {epoch} validation: {trainer.objective.describe_validation(scores)}")
                progress.finished = enough
                trainer.begin_interval()
            progress.finished = progress.finished or last

        if progress.finished:
            with trainer.averaged():
                leave_results(trainer)  # before the checkpoint that says so: a kill in between must not lose them
        if progress.finished or stop or save:
            trainer.save()
            clock.reset()
        if progress.finished or stop:
            break
    trainer.close()
    if progress.finished:
        return FINISHED
    assert stop
    say(trainer, f"stopped on request at step {progress.step:,} with a good checkpoint; the same command goes on")
    return STOPPED_ON_REQUEST


def say(trainer: Trainer, line: str) -> None:
    if trainer.world.is_main:
        logger.info(line)


def describe(trainer: Trainer, record: dict[str, Any]) -> str:
    step = trainer.progress.step
    left = (trainer.total_steps - step) * record["perf/step_seconds"]
    straggler = record.get("perf/straggler_seconds", 0.0) / record["perf/step_seconds"]
    told = ""
    if straggler > STRAGGLER_SHARE:
        told = f" rank {record['perf/slowest_rank']} ({record['perf/slowest_host']}) is waited for {straggler:.0%}"
    return (
        f"step {step:,}/{trainer.total_steps:,} epoch {trainer.epoch_of(step - 1) + 1}/{trainer.config.train.epochs} "
        f"loss {record['train/loss']:.4f} lr {record['train/lr']:.2e} {trainer.objective.describe(record)} "
        f"{record['perf/samples_per_second']:,.0f} {trainer.objective.what}/s wait {record['data/wait_fraction']:.0%} "
        f"left {left / 60:.0f} min{told}"
    )
