"""What a run leaves for those who use it: its best model and its report. All ranks call these, rank 0 writes.

What the disk refuses is written before the next checkpoint, which says that it is there.
"""

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from clipdist.model.saved import plain

if TYPE_CHECKING:
    from clipdist.train.trainer import Trainer

logger = logging.getLogger(__name__)


def described(trainer: "Trainer", split: str) -> dict[str, Any]:
    """What numbers and models of this moment belong to."""
    return {
        "data": trainer.data.folder,
        "data_digest": trainer.data.digest,
        "split": split,
        "step": trainer.progress.step,
        "model": str(trainer.folder.path / "model"),
    }


def keep_model(trainer: "Trainer", scores: dict[str, Any]) -> None:
    """Writes the current weights as the run's finished model."""
    weights = trainer.engine.weights()
    if trainer.saver is None or not trainer.world.is_main:
        return
    about = {
        **described(trainer, trainer.config.data.train_split),
        "val_split": trainer.config.data.val_split,
        "epoch": trainer.progress.step / trainer.order.steps_per_epoch,
        "license": trainer.data.license,
        "notes": trainer.data.notes,
    }
    folder = trainer.folder.path / "model"
    write = partial(trainer.objective.save, folder, trainer.model, weights, scores, about)
    # They may be the model's own, which goes on training.
    trainer.saver.first(
        str(folder), write, keep=lambda: weights.update({name: plain(tensor) for name, tensor in weights.items()})
    )


def leave_results(trainer: "Trainer") -> None:
    """Leaves the finished model, the table of hyper-parameters and the report."""
    if trainer.val_split is None:
        keep_model(trainer, {})
    if trainer.writer is None or trainer.saver is None:
        return
    from clipdist.config import flat
    from clipdist.evaluate.report import write_report

    progress, writer, run = trainer.progress, trainer.writer, trainer.folder.path
    best = {} if progress.best is None else {trainer.config.evaluate.monitor: progress.best}
    writer.hyper_parameters(flat(trainer.config), best)
    where = f"best at step {progress.best_step:,}" if best else "last step"

    def report() -> None:
        writer.sync()  # it shows what is in the file
        path = write_report(run)
        logger.info("finished: model in %s (%s), report in %s", run / "model", where, path)

    trainer.saver.first(str(run / "report.html"), report)
