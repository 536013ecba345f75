"""Measures where the time of a recipe's training step goes: the same loader, model, loss and engine, in a folder of its
own that is removed afterwards. A run that the recipe names is not touched.

On two processes: accelerate launch --config_file launch/accelerate/cpu.yaml --num_processes 2 -m clipdist.cli profile …
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from clipdist import world
from clipdist.errors import disk_errors

if TYPE_CHECKING:
    from clipdist.config import RunConfig
    from clipdist.train.profile import Profile
    from clipdist.train.trainer import Trainer

BAR = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="YAML recipe, such as launch/recipes/phantom.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.precision=bf16")
    parser.add_argument("--steps", type=_positive, default=20, help="steps to time, as many plain ones beside (20)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a Chrome trace of three more steps, as JSON")


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def run(args: argparse.Namespace) -> int:
    # Loader workers are forked after the tokenizer was used; the warning about it would come once per worker.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from clipdist.config import load_config
    from clipdist.train.command import configure_logging

    config = load_config(args.recipe, args.overrides)
    configure_logging()
    from clipdist.train.profile import measure
    from clipdist.train.trainer import Trainer

    with _folder_of_its_own(config) as own:
        trainer = Trainer(own)
        profiles = measure(trainer, args.steps, args.trace)
        if trainer.world.is_main:
            print(table(_heading(args.recipe, trainer), profiles, args.trace))
        trainer.close()
    return 0


@contextmanager
def _folder_of_its_own(config: "RunConfig") -> Iterator["RunConfig"]:
    """The recipe, which now trains into a new folder below its `runs`, which all nodes see; rank 0 removes it."""
    from clipdist.train.config import check
    from clipdist.train.launched import make_accelerator

    check(config)
    make_accelerator(config.train.precision)  # joins the ranks, which have to agree on a folder
    folder = None
    if world.connected().is_main:
        with disk_errors(Path(config.runs)):
            Path(config.runs).mkdir(parents=True, exist_ok=True)
            folder = tempfile.mkdtemp(prefix=".profile-", dir=config.runs)
    own = world.broadcast_object(folder)
    try:
        quiet = replace(config.log, tensorboard=False)
        yield replace(config, runs=own, resume="never", log=quiet)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _heading(recipe: Path, trainer: "Trainer") -> str:
    import torch

    device = trainer.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    processes = trainer.world.world_size
    rows, what = trainer.order.global_batch // processes, trainer.objective.what
    parts = "" if trainer.micro_batch == rows else f", {trainer.micro_batch} at a time"
    return (
        f"{recipe}: steps of {trainer.order.global_batch:,} {what}, processes: {processes} "
        f"({rows:,} {what} each{parts}), {name}, {trainer.config.train.precision}"
    )


def table(heading: str, profiles: list["Profile"], trace: Path | None = None) -> str:
    """What the user reads: means over ranks, and which rank a part takes longest on."""
    first, ranks = profiles[0], len(profiles)
    means = {part: sum(profile.parts[part] for profile in profiles) / ranks for part in first.parts}
    total = sum(means.values())
    shares = percentages([seconds / total for seconds in means.values()])
    slowest = "    longest on a rank" if ranks > 1 else ""
    lines = [heading, "", f"{'':18}{'ms a step':>10}{'share':>9}{slowest}"]
    for (part, seconds), share in zip(means.items(), shares, strict=True):
        line = f"{part:18}{1e3 * seconds:10.2f}{share:8.1f}%"
        if ranks > 1:
            longest = max(range(ranks), key=lambda rank, part=part: profiles[rank].parts[part])  # type: ignore[misc]
            line += f"{1e3 * profiles[longest].parts[part]:12.2f} (rank {longest})"
            line = f"{line:60}"
        lines.append(f"{line}  {'█' * round(BAR * share / 100)}".rstrip())
    plain = sum(profile.plain_seconds for profile in profiles) / ranks
    lines += [
        f"{'a step':18}{1e3 * total:10.2f}{sum(shares):8.1f}%",
        "",
        f"{'speed':18}{first.pairs_per_second:,.1f} {first.what}/s, {first.pairs_per_second / ranks:,.1f} per process, "
        f"in {first.steps} plain steps of {1e3 * plain:,.2f} ms",
        f"{'cost of timing':18}{100 * (total / plain - 1):+.1f}%: the timed steps against the plain ones between them",
        *_figures(profiles),
    ]
    if trace is not None:
        lines.append(f"{'trace':18}{trace}: open it in https://ui.perfetto.dev")
    return "\n".join(lines)


def _figures(profiles: list["Profile"]) -> Iterator[str]:
    figures = profiles[0].figures
    if "perf/flops_per_step" in figures:
        share = f"{figures['perf/mfu']:.1%} of its peak (MFU)" if "perf/mfu" in figures else "its peak is not known"
        yield (
            f"{'arithmetic':18}{figures['perf/flops_per_step'] / 1e12:,.4g} TFLOP a step, "
            f"{figures['perf/tflops_per_device']:,.4g} TFLOP/s per device, {share}"
        )
    most = max(profile.figures["perf/memory_gib"] for profile in profiles)
    reserved = max(profile.figures.get("perf/memory_reserved_gib", 0.0) for profile in profiles)
    yield f"{'peak memory':18}{most:.2f} GiB" + (f", {reserved:.2f} GiB reserved" if reserved else " of a process")
    sent = {key.removeprefix("perf/bytes_sent_"): value for key, value in figures.items() if "bytes_sent" in key}
    for number, (name, amount) in enumerate(sorted(sent.items(), key=lambda item: -item[1])):
        seconds = figures.get(f"perf/seconds_{name}")
        took = "" if seconds is None else f" in {1e3 * seconds:.2f} ms"
        yield f"{'' if number else 'sent per rank':18}{name}: {amount_of(amount)}{took}"


def amount_of(count: float) -> str:
    """Bytes, readable: 1.5 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"


def percentages(shares: list[float]) -> list[float]:
    """Rounded to a tenth of a per cent so that they add up to 100: those with the largest remainders are rounded up."""
    tenths = [int(1000 * share) for share in shares]
    missing = 1000 - sum(tenths)
    order = sorted(range(len(shares)), key=lambda n: tenths[n] - 1000 * shares[n])
    for n in order[:missing]:
        tenths[n] += 1
    return [number / 10 for number in tenths]
