"""What a training run holds, and its single actions; `loop.py` puts them in order."""

import logging
import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from clipdist import heartbeat, world
from clipdist.data.loader import MASK_64, Batch, TrainLoader
from clipdist.data.mixing import Mixture
from clipdist.data.order import philox
from clipdist.data.sets.index import open_or_index
from clipdist.errors import UserError
from clipdist.model.build import settle_batch_norm
from clipdist.model.freeze import StageConfig, apply_stage, stage_of, unused_parameters
from clipdist.model.tower_model import TowerModel
from clipdist.train.bad_samples import BadSamples
from clipdist.train.checkpoint import CheckpointSaver, read_checkpoint
from clipdist.train.config import check
from clipdist.train.ema import WeightAverage
from clipdist.train.engine import PRECISIONS, Engine
from clipdist.train.feature_cache import FeatureCaches
from clipdist.train.flops import FlopCount
from clipdist.train.launched import make_accelerator, make_engine
from clipdist.train.metrics import MetricsWriter, arithmetic, communication, device_peak, last_step, memory
from clipdist.train.micro_batch import choose_micro_batch, even_micro_batch, out_of_memory
from clipdist.train.objective import HIGHER_IS_BETTER, Objective, make_objective
from clipdist.train.optim import Schedule, moving_statistics, part_of
from clipdist.train.results import described, keep_model
from clipdist.train.run_folder import RunFolder, open_run, write_environment
from clipdist.train.stragglers import Stragglers

if TYPE_CHECKING:
    from clipdist.config import RunConfig

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """What a checkpoint remembers besides weights and optimiser."""

    step: int = 0
    digest: int = 0
    bad_in_epoch: int = 0
    skipped_in_a_row: int = 0
    best: float | None = None
    best_step: int = 0
    validations_without_improvement: int = 0
    averaged_steps: int = 0
    finished: bool = False


@dataclass
class Interval:
    """Sums since the last logged step, on this rank."""

    began: float = field(default_factory=time.perf_counter)
    steps: int = 0
    wait_seconds: float = 0.0
    skipped: int = 0
    checkpoint_seconds: float = 0.0


class Trainer:
    """Everything of one run on this rank. All ranks construct it, and call each method together."""

    def __init__(self, config: "RunConfig") -> None:
        self.config = config
        check(config)
        self.accelerator = make_accelerator(config.train.precision, config.train.tf32, config.train.hang_minutes)
        self.world = world.check_size(config.train.processes)
        self.device = self.accelerator.device
        self.data = Mixture.open(config.data, open_or_index)
        self.split = self.data.training(config.data.train_split)
        self.val_split = self.data.validation(config.data.val_split) if config.data.val_split else None
        self.order = config.order(self.split)
        self.total_steps = self.order.steps_per_epoch * config.train.epochs
        self.schedule = Schedule(config.optim, self.total_steps)
        stage_of(config.train.stages, 0)
        self.folder: RunFolder = open_run(config, self.data, self.world)
        self.objective: Objective = make_objective(config, self.order)
        self.objective.prepare(self.folder, self.split, self.val_split)
        self._build()
        self.progress = Progress()
        if self.folder.checkpoint:
            self._restore()
        lost = max(0, last_step(self.folder.path) - self.progress.step) if self.world.is_main else 0
        start = {"step": self.progress.step, "lost_steps": lost, "engine": self.engine.name, **world.slurm_job()}
        start |= self.micro_batch_choice
        write_environment(self.folder.path, self.data, self.world, self.device, self.parameters, start)
        self.saver: CheckpointSaver | None = None
        if self.world.is_main or self.engine.in_parts:
            self.saver = CheckpointSaver(self.folder.checkpoints, config.checkpoint, self._sync_files)
        here = self.folder.path, self.progress.step
        self.writer = MetricsWriter(here[0], config.log, here[1]) if self.world.is_main else None
        self.bad_samples = BadSamples(*here)
        self.stragglers = Stragglers(self.device)
        self.interval = Interval()

    def _build(self) -> None:
        config = self.config
        model = self.objective.build().to(self.device)
        self.unused = unused_parameters(model)
        self.flop_count = FlopCount(model, self.unused)
        self.step_flops: float | None = None
        rows = config.train.global_batch // self.world.world_size
        self.micro_batch = self._micro_batch(model, rows)
        model = settle_batch_norm(model, self.device, self.world.world_size, -(-rows // self.micro_batch))
        if config.train.compile:
            model.compile_towers()
        self.sizes = {name: p.numel() for name, p in model.named_parameters()}
        towers = {part: sum(n for name, n in self.sizes.items() if part_of(name) == part) for part in model.towers}
        self.parameters = {f"{part} tower": size for part, size in towers.items()}
        self.parameters["total"] = sum(self.sizes.values())
        self.engine: Engine = make_engine(self.accelerator, model, config)
        self.average = WeightAverage(self.engine, config.train.ema) if config.train.ema else None
        self.stage: StageConfig | None = None
        self.features = FeatureCaches(config, self.engine, self.folder)

    @property
    def model(self) -> TowerModel:
        """What computes now; its parameters may be in parts, one on each rank."""
        return self.engine.model

    def _micro_batch(self, model: TowerModel, rows: int) -> int:
        """Of this rank's `rows`, how many are embedded at a time."""
        config = self.config
        if config.train.micro_batch != "auto":
            self.micro_batch_choice: dict[str, Any] = {
                "micro_batch": even_micro_batch(rows, config.train.micro_batch or rows)
            }
        else:
            choice = choose_micro_batch(
                model,
                self.unused,
                config.train.stages,
                rows=rows,
                max_tokens=config.model.text.max_tokens,
                precision=PRECISIONS[config.train.precision],
                tile=config.loss.tile,
            )
            self.micro_batch_choice = choice.noted()
            if self.world.is_main:
                logger.info("%s", choice)
        return int(self.micro_batch_choice["micro_batch"])

    def enter_epoch(self, epoch: int) -> None:
        """Freezes and thaws by the recipe's stages, and wraps the model anew when that changed anything."""
        stage = stage_of(self.config.train.stages, epoch)
        if stage != self.stage:
            self._enter_stage(stage, epoch)
        self.features.enter(epoch, stage.from_epoch, self.order.steps_per_epoch)

    def _enter_stage(self, stage: StageConfig, epoch: int) -> None:
        self.stage, self.step_flops = stage, None
        if self.config.train.compile:
            torch.compiler.reset()  # no graph of the stage before fits, and torch keeps eight of a tower at most
        apply_stage(self.model, stage, self.unused)
        self.model.train()
        self.engine.enter_stage()
        if self.world.is_main:
            logger.info(
                "epoch %d on: %s; %s of %s parameters train",
                epoch,
                ", ".join(f"{name} {getattr(stage, name)}" for name in self.model.towers),
                f"{sum(self.sizes[name] for name, p in self.model.named_parameters() if p.requires_grad):,}",
                f"{self.parameters['total']:,}",
            )

    def _restore(self) -> None:
        assert self.folder.checkpoint is not None
        weights, optimizer, averages, state = read_checkpoint(self.folder.checkpoint)
        self.engine.load(weights, optimizer)
        if self.average:
            self.average.go_on(averages, state["averaged_steps"])
        self.schedule.load_state_dict(state.pop("schedule"))
        if (scaler := state.pop("scaler")) and self.engine.scaler is not None:
            self.engine.scaler.load_state_dict(scaler)
        state["digest"] = int(state["digest"], 16)
        self.progress = Progress(**state)
        if self.progress.step > self.total_steps:
            raise UserError(
                f"{self.folder.checkpoint}: step {self.progress.step}, beyond the {self.total_steps} steps of this "
                f"recipe; set train.epochs higher, or choose another name"
            )
        if self.config.resume == "force" and self.progress.step < self.total_steps:
            self.progress.finished = False  # more epochs than before, or more patience
        if self.world.is_main:
            logger.info("going on from %s", self.folder.checkpoint)
        else:
            self.progress.digest = 0  # the sum over ranks counts what came before once

    def batches(self) -> TrainLoader:
        rows = self.objective.rows(self.split, side=self.model.image.side, resize=self.model.image.resize)
        return TrainLoader(
            rows,
            rank=self.world.rank,
            world_size=self.world.world_size,
            first_step=self.progress.step,
            steps=self.total_steps,
            device=self.device,
        )

    def step(self, batch: Batch) -> dict[str, float]:
        """One update from the global batch; returns the loss and gradient norms, equal on all ranks.

        A loss or gradient that is not finite changes nothing: averaged over ranks, it is so on all of them.
        """
        lr = self.schedule.apply(self.engine.param_groups, batch.step)
        statistics = moving_statistics(self.model)
        self._count_flops(batch)
        with out_of_memory(self.micro_batch, len(batch), self.config.train.precision):
            seed = partial(self._seed, batch.step)
            found = self.objective.gradient(self.engine, batch, self.micro_batch, seed)
            norms = self.engine.gradient_norms()
            total = math.sqrt(sum(norm**2 for norm in norms.values()))
            finite = math.isfinite(total) and math.isfinite(found.loss)
            self.engine.update(total, self.config.train.max_grad_norm, finite)
        self.objective.after_update(self.engine)
        if self.average and finite:
            self.average.update()
            self.progress.averaged_steps = self.average.steps
        if not finite:
            for buffer, before in statistics:
                buffer.copy_(before)
        self._note_step(batch, finite)
        parts = (*self.model.towers, "head")
        return {
            "train/loss": found.loss,
            "train/lr": lr,
            **found.values,
            "train/grad_norm": total,
            **{f"train/grad_norm_{part}": norms[part] for part in parts},
        }

    def _seed(self, step: int, micro_batch: int) -> None:
        """Dropout and its like: a function of seed, step, rank and micro-batch, so that no state need be saved."""
        torch.manual_seed(int(philox("step", self.config.seed, step, self.world.rank, micro_batch).random_raw() >> 1))

    def _count_flops(self, batch: Batch) -> None:
        """Once for each stage, on rank 0, with captions as long as its own now are."""
        if self.step_flops is None and self.writer is not None:
            assert self.stage is not None, "enter_epoch comes first"
            tokens = batch.token_ids_bT.shape[1]
            self.step_flops = self.flop_count.of_a_step(self.stage, tokens, self.order.global_batch)
            self.features.count_flops(self.flop_count, self.stage, tokens)

    def _note_step(self, batch: Batch, finite: bool) -> None:
        self.progress.step = batch.step + 1
        self.progress.digest = (self.progress.digest + batch.consumed) & MASK_64
        self.progress.skipped_in_a_row = 0 if finite else self.progress.skipped_in_a_row + 1
        self.interval.steps += 1
        self.interval.skipped += not finite
        self.interval.wait_seconds += batch.wait_seconds
        if self.progress.skipped_in_a_row > self.config.train.max_skipped_in_a_row and self.engine.scaler is None:
            raise UserError(
                f"step {batch.step}: the loss or a gradient was not finite for {self.progress.skipped_in_a_row} steps "
                f"in a row; none of them changed the weights. Lower optim.lr, or use bf16 or fp32"
            )

    def agree(self, stop: bool, save: bool, bad: int) -> tuple[bool, bool, int]:
        """(anyone wants to stop, rank 0 wants to save, bad samples of this step over all ranks)."""
        wanted = self.saver is not None and self.saver.wants(save) and self.world.is_main
        own = torch.tensor([stop, wanted, bad], dtype=torch.int64, device=self.device)
        votes = world.sum_over_ranks(own, "agreement").tolist()
        return votes[0] > 0, votes[1] > 0, votes[2]

    def note_bad_samples(self, batch: Batch, count: int) -> None:
        """Names the step's unreadable samples; stops the run when an epoch has too many."""
        self.progress.bad_in_epoch += count
        used = self.order.steps_per_epoch * self.order.global_batch
        most = self.config.data.max_bad_fraction
        self.bad_samples.note(batch.bad, self.progress.bad_in_epoch, used, most, self.split.folder)

    def log(self, values: dict[str, float]) -> dict[str, Any]:
        """Adds throughput and the digest to a step's values and writes them down."""
        interval = self.interval
        seconds = max(time.perf_counter() - interval.began, 1e-9)
        exchanges = communication(self.engine, interval.steps)
        waited, slowest = self.stragglers.compare(interval.wait_seconds, exchanges)
        speed = self.order.global_batch * interval.steps / seconds
        record: dict[str, Any] = {
            **values,
            "data/digest": f"{self.digest():016x}",
            "data/wait_fraction": min(1.0, waited / seconds),
            "data/bad_samples": self.progress.bad_in_epoch,
            "perf/samples_per_second": speed,
            "perf/samples_per_second_per_device": speed / self.world.world_size,
            "perf/step_seconds": seconds / max(1, interval.steps),
            **memory(self.device),
            **exchanges,
            **slowest,
            **self.objective.measured(),
        }
        if interval.checkpoint_seconds:
            record["perf/checkpoint_stall_seconds"] = interval.checkpoint_seconds
        if interval.skipped:
            record["train/skipped_steps"] = interval.skipped
        shares = self.features.shares(interval.steps)
        record |= {f"perf/{name}_features_computed": share for name, share in shares.items()}
        if self.step_flops:
            flops = self.step_flops - self.features.spared_flops(shares)
            peak = device_peak(self.device, self.config.train.precision)
            record |= arithmetic(flops, record["perf/step_seconds"], self.world.world_size, peak)
        if self.writer:
            self.writer.write(self.progress.step, self.epoch_of(self.progress.step - 1), record)
            if wrong := self.objective.warning(record):
                logger.warning("step %d: %s", self.progress.step, wrong)
        self.interval = Interval()
        return record

    def digest(self) -> int:
        """The running hash of every (step, key) consumed by all ranks."""
        # An int64 sum wraps round exactly as the 64-bit hash does.
        signed = np.array([self.progress.digest], np.uint64).astype(np.int64)
        summed = world.sum_over_ranks(torch.from_numpy(signed).to(self.device))
        return int(summed.cpu()) & MASK_64

    def epoch_of(self, step: int) -> int:
        return step // self.order.steps_per_epoch

    def save(self) -> None:
        """A checkpoint of the current step; it may still be being written when this returns, or refused by the disk."""
        began = time.perf_counter()
        self.features.sync()  # on all ranks, before any of them writes
        digest = self.digest()
        engine = self.engine
        weights, optimizer = (
            engine.state_in_parts() if engine.in_parts else (engine.weights(), engine.optimizer_state())
        )
        if self.average:
            optimizer = self.average.put_beside(optimizer)
        if self.saver:
            state = {
                **asdict(self.progress),
                "digest": f"{digest:016x}",
                "schedule": self.schedule.state_dict(),
                "scaler": engine.scaler.state_dict() if engine.scaler is not None else None,
            }
            save = self.saver.save_parts if engine.in_parts else self.saver.save
            save(state.pop("step"), weights, optimizer, state)
        world.barrier()
        self.interval.checkpoint_seconds += time.perf_counter() - began

    def _sync_files(self) -> None:
        """Rank 0: what was logged is on the disk. Raises `DiskError`."""
        if self.writer:
            self.writer.sync()
        self.bad_samples.sync()

    def averaged(self) -> AbstractContextManager[None]:
        """Within, the model has the weights that count: the averages where the recipe asks for them."""
        return self.average.in_place() if self.average else nullcontext()

    def validate(self) -> tuple[dict[str, float], bool]:
        """Measures the validation split, keeps the model if it is the best so far; (values, whether to stop early)."""
        assert self.val_split is not None
        outcome = self.objective.validate(self.engine, self.val_split)
        values: dict[str, float] = {}
        if outcome and self.writer:
            values, step = outcome.values, self.progress.step
            self.writer.write(step, self.epoch_of(step - 1), values)
            for name, numbers in outcome.histograms.items():
                self.writer.histogram(name, numbers, step)
            for name, picture in outcome.panels.items():
                self.writer.image(name, picture, step)
        told = world.broadcast_object(values)
        if self._improves(told):
            split = self.config.data.val_split
            keep_model(self, {"val": {**outcome.scores(), **described(self, split)}} if outcome else {})
        return told, self._note_validation(told)

    def _improves(self, values: dict[str, float]) -> bool:
        value, best = values[self.config.evaluate.monitor], self.progress.best
        if best is None:
            return True
        gain = value - best if HIGHER_IS_BETTER[self.config.evaluate.monitor] else best - value
        return gain > self.config.evaluate.min_improvement

    def _note_validation(self, values: dict[str, float]) -> bool:
        monitor, progress = self.config.evaluate.monitor, self.progress
        if self._improves(values):
            progress.best, progress.best_step = values[monitor], progress.step
            progress.validations_without_improvement = 0
        else:
            progress.validations_without_improvement += 1
        self.schedule.observe(values[monitor], HIGHER_IS_BETTER[monitor])
        patience = self.config.evaluate.patience
        return bool(patience) and progress.validations_without_improvement >= patience

    def begin_interval(self) -> None:
        """Starts timing anew, so that validation does not count as a slow step."""
        self.interval = Interval()
        world.traffic.take()

    def close(self) -> None:
        """Leaves the process group, after every rank has come this far and the last checkpoint is complete.

        While the disk refuses that, all ranks together try again; after `checkpoint.retry_minutes`, `DiskError`.
        """
        end = time.monotonic() + 60 * self.config.checkpoint.retry_minutes
        while True:
            if self.saver:
                self.saver.wait()
            # Rank 0 knows, also of parts that other ranks write.
            main = self.saver if self.world.is_main else None
            left = end - time.monotonic()
            error, left = world.broadcast_object((main.given_up(), left) if main else None)
            if error is None:
                break
            if left <= 0:
                raise error
            if main:
                time.sleep(min(main.outage.pause_left, left))
            heartbeat.beat()
            self.save()
        self.features.close()
        self._sync_files()
        world.barrier()
        self.accelerator.end_training()
