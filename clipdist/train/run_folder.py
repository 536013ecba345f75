"""The folder that one run owns: its configuration, its environment, and whether it may go on."""

import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from clipdist import world
from clipdist.data.mixing import Mixture
from clipdist.data.shards import write_atomically
from clipdist.errors import DiskError, UserError, disk_errors
from clipdist.train.checkpoint import newest_sound, unseen_files

if TYPE_CHECKING:
    from clipdist.config import RunConfig

LOCK = ".lock"
LOCK_SECONDS = 60.0
SEEN_SECONDS = 90.0
"""How long a node may take to see what another one wrote: NFS remembers a folder for up to a minute."""
PACKAGES = [
    *("clipdist", "torch", "torchvision", "timm", "transformers", "tokenizers", "accelerate", "deepspeed"),
    *("webdataset", "safetensors", "numpy", "pillow"),
]


@dataclass(frozen=True)
class RunFolder:
    path: Path
    checkpoint: Path | None
    """Where to go on from; None at the start."""
    lock: IO[str] | None = field(default=None, repr=False)
    """Held open by rank 0 for as long as the run is its own."""

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


def open_run(config: "RunConfig", data: Mixture, who: world.World) -> RunFolder:
    """Creates or reopens the run's folder; all ranks call it, rank 0 writes.

    Raises `UserError` when the folder holds a run whose recipe, or shard set, differs in what defines the maths, when
    somebody else is training it, and when it cannot be written.
    """
    from clipdist.config import to_yaml

    folder = config.folder
    checkpoint, lock, refused = None, None, None
    if who.is_main:
        try:
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                # Until the run is ours, whoever had it may still write a checkpoint.
                lock = hold(folder, _lock_seconds(config.train.hang_minutes))
            checkpoint = _where_it_stopped(config, data)
            with disk_errors(folder):
                write_atomically(folder / "config.yaml", to_yaml(config).encode())
        except UserError as error:
            refused = error
    # One rank looks for all: another node may not see the newest checkpoint yet, and would go on from the one before.
    name, refused = world.broadcast_object((checkpoint.name if checkpoint else None, refused))
    if refused:
        raise refused
    if name is None:
        return RunFolder(folder, None, lock)
    checkpoint = folder / "checkpoints" / name
    _wait_until_seen(checkpoint)
    return RunFolder(folder, checkpoint, lock)


def _where_it_stopped(config: "RunConfig", data: Mixture) -> Path | None:
    """The checkpoint that the run in the folder goes on from, if there is one; raises as `open_run`."""
    from clipdist.config import differences, read_config

    folder, written = config.folder, config.folder / "config.yaml"
    if not written.exists():
        return None
    if config.resume == "never":
        raise UserError(f"{folder}: already holds a run; choose another name, or resume=auto to go on")
    checkpoint = newest_sound(folder / "checkpoints")
    if checkpoint and config.resume == "auto":
        changed = differences(read_config(written), config)
        if changed:
            raise UserError(
                f"{folder}: the run there was made with another recipe ({'; '.join(changed)}); choose another "
                f"name, restore these values, or go on all the same with resume=force"
            )
        _check_sets(folder, data)
    return checkpoint


def _wait_until_seen(checkpoint: Path) -> None:
    """Returns when all ranks see all files of the checkpoint; `DiskError` on all of them when one does not."""
    end = time.monotonic() + SEEN_SECONDS
    while (unseen := unseen_files(checkpoint)) and time.monotonic() < end:
        time.sleep(0.5)
    for rank, names in enumerate(world.gather_objects(unseen)):
        if names:
            raise DiskError(
                f"{checkpoint}: rank {rank} does not see {', '.join(names)}, which rank 0 has read, within "
                f"{SEEN_SECONDS:g} s; see that its node has this folder mounted, and start again"
            )


def _lock_seconds(hang_minutes: float) -> float:
    """How long to wait for whoever trains the run now. A node that a network lost may still do so, where a job of SLURM
    has gone on without it: until it takes its peers for hung."""
    requeued = int(world.slurm_job().get("requeued", 0)) > 0
    return LOCK_SECONDS + (60 * hang_minutes if requeued else 0)


def hold(folder: Path, wait_seconds: float = LOCK_SECONDS) -> IO[str]:
    """Makes this process the only one that trains the run in `folder`; the lock ends with the file, or the process.

    Waits a while, since ranks whose launcher was killed need a step to notice; then `UserError` names the holder. A
    POSIX record lock: shared file systems know it, and loader workers do not inherit it.
    """
    file = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115  (held open: closing it gives the lock up)
    end = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise UserError(
                    f"{folder}: this file system does not lock files ({os.strerror(error.errno)}), which keeps two "
                    f"jobs from training one run; have it mounted with locks (Lustre: flock), or choose another folder"
                ) from None
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            if time.monotonic() > end:
                file.seek(0)
                raise UserError(
                    f"{folder}: another process is training this run ({file.read().strip()}); stop it, or choose "
                    f"another name"
                ) from None
            time.sleep(0.1)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _check_sets(folder: Path, data: Mixture) -> None:
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    known = [shard_set["digest"] for shard_set in environment["shard_sets"]]
    assert len(known) == len(data.sets), "the recipes agree"
    for seen, shard_set in zip(known, data.sets, strict=True):
        if seen != shard_set.manifest.digest:
            raise UserError(
                f"{folder}: the run there has seen another version of {shard_set.location} (digest {seen}, now "
                f"{shard_set.manifest.digest}), so its order cannot go on; choose another name, or resume=force"
            )


def write_environment(
    folder: Path,
    data: Mixture,
    who: world.World,
    device: torch.device,
    parameters: dict[str, int],
    start: dict[str, Any],
) -> None:
    """`environment.json`: what the run runs on; `start` (step, micro-batch) is added to `starts`. All ranks call it,
    rank 0 writes."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    nodes = world.gather_objects((socket.gethostname(), gpu))
    if not who.is_main:
        return
    path = folder / "environment.json"
    starts: list[dict[str, Any]] = []
    if path.exists():
        starts = json.loads(path.read_text(encoding="utf-8")).get("starts", [])
    now = datetime.now(UTC).isoformat(timespec="seconds")
    body = {
        "world_size": who.world_size,
        "hosts": sorted({host for host, _ in nodes}),
        "gpus": [gpu for _, gpu in nodes if gpu],
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count(), "threads_per_process": torch.get_num_threads()},
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "parameters": parameters,
        "shard_sets": [
            {
                "path": shard_set.location,
                "digest": shard_set.manifest.digest,
                "splits": {name: sum(s.samples for s in shards) for name, shards in shard_set.manifest.splits.items()},
                "license": shard_set.manifest.license,
                "notes": shard_set.manifest.notes,
            }
            for shard_set in data.sets
        ],
        "starts": [*starts, {"time": now, "world_size": who.world_size, **start}],
    }
    body |= {"clipdist": body["versions"]["clipdist"], "torch": torch.__version__}  # type: ignore[index]
    with disk_errors(folder):
        write_atomically(path, (json.dumps(body, indent=1, ensure_ascii=False) + "\n").encode())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _commit() -> str | None:
    try:
        here = Path(__file__).parent
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
