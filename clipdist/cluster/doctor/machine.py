"""What the doctor looks at on one machine: GPUs and their driver, memory, local disks, limits, the host's name."""

import os
import platform
import re
import resource
import socket
import tempfile
from collections import Counter
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch

from clipdist import __version__
from clipdist.cluster.doctor.findings import Finding
from clipdist.cluster.doctor.shared_folder import GIB, gib

if TYPE_CHECKING:
    from clipdist.config import RunConfig

DRIVER = Path("/proc/driver/nvidia/version")
INFINIBAND = Path("/sys/class/infiniband")
MINIMUM_DRIVERS = {11: 450, 12: 525, 13: 580}
"""Major version of CUDA -> the oldest driver that runs it (NVIDIA, CUDA Compatibility, Minor Version Compatibility)."""
FREE_SHARE = 0.9
"""Of a GPU's memory: with less free, somebody else is on it."""
PROCESS_BYTES, WORKER_BYTES = 2 * GIB, GIB // 2
"""What a training process and a loader worker take before weights and batches; of a worker, what it does not share."""
TEMPORARY_BYTES = GIB
SHARED_MEMORY_BYTES = GIB // 4
"""A process' part of /dev/shm, where NCCL's ranks of a node and the workers of an evaluation exchange tensors."""
FILES, FILES_PER_RANK = 512, 16
"""Open files that a process needs: shards and workers, and connections to each other rank."""


class Gpu(NamedTuple):
    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int


def look_at_gpus() -> list[Gpu]:
    """Those that torch can use; takes some memory of each for as long as the process lives."""
    if not torch.cuda.is_available():
        return []
    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        found.append(Gpu(properties.name, (properties.major, properties.minor), total, free))
    return found


def driver_version(path: Path = DRIVER) -> str:
    """Of the NVIDIA driver that the kernel has loaded, such as 550.54.14; empty without."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", path.read_text(encoding="utf-8"))
    except OSError:
        return ""
    return found[1] if found else ""


def nccl_version() -> str:
    """Of the NCCL in torch; empty without."""
    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        return ""
    return ".".join(map(str, torch.cuda.nccl.version()))


def facts(gpus: Sequence[Gpu]) -> dict[str, str]:
    """What must be alike on all nodes, by the names of `findings.MUST_AGREE`."""
    return {
        "clipdist": __version__,
        "torch": torch.__version__,
        "NCCL": nccl_version(),
        "Python": platform.python_version(),
        "NVIDIA driver": driver_version(),
        "GPUs": _named(gpus),
    }


def _named(gpus: Sequence[Gpu]) -> str:
    return ", ".join(f"{number} × {name}" for name, number in Counter(gpu.name for gpu in gpus).items())


def check_gpus(
    gpus: Sequence[Gpu], processes: int, given: int, cpu: bool, driver: str, cuda: str | None
) -> list[Finding]:
    """`given`: how many SLURM gave to the job here; `cpu`: the launch is meant for CPUs; `cuda`: what torch is built
    for."""
    if cpu:
        return [Finding("GPUs", "ok", f"not asked for; {_named(gpus) or 'none'} here")]
    if not gpus:
        return [_check_none(given, driver, cuda)]
    told = f"{_named(gpus)} (processes: {processes}, driver: {driver or 'unknown'})"
    if len(gpus) < processes:
        advice = f"NCCL refuses two processes on one: launch {len(gpus)} a node, or ask for more with --gpus-per-node"
        found = [Finding("GPUs", "error", f"{told}: one for each is expected; {advice}")]
    elif len(gpus) > processes:
        found = [Finding("GPUs", "warn", f"{told}: {len(gpus) - processes} will be idle; launch {len(gpus)} a node")]
    elif len({gpu.name for gpu in gpus}) > 1:
        found = [Finding("GPUs", "warn", f"{told}: expected one kind, since each step waits for the slowest")]
    else:
        found = [Finding("GPUs", "ok", told)]
    taken = [
        f"GPU {number} has {gib(gpu.free_bytes)} of {gib(gpu.total_bytes)} free"
        for number, gpu in enumerate(gpus)
        if gpu.free_bytes < FREE_SHARE * gpu.total_bytes
    ]
    if taken:
        advice = "somebody else is on it: see nvidia-smi, and end what is yours"
        return [*found, Finding("GPU memory", "warn", f"{', '.join(taken)}, expected nearly all; {advice}")]
    return [*found, Finding("GPU memory", "ok", f"at least {gib(min(gpu.free_bytes for gpu in gpus))} free on each")]


def _check_none(given: int, driver: str, cuda: str | None) -> Finding:
    """torch sees no GPU: whether that is as it should be."""
    if not driver and not given:
        return Finding("GPUs", "ok", "none here: training is on CPUs")
    there = f"the driver {driver} is loaded" if driver else "no NVIDIA driver is loaded"
    wanted = f"the job has {given} GPUs on this node, " if given else ""
    otherwise = "or say --cpu if the launch is for CPUs"
    if cuda is None:
        return Finding(
            "GPUs",
            "error" if given else "warn",
            f"{wanted}{there}, and this torch {torch.__version__} is built without CUDA; install one that is built for "
            f"it, {otherwise}",
        )
    minimum = MINIMUM_DRIVERS.get(int(cuda.split(".")[0]), 0)
    if driver and int(driver.split(".")[0]) < minimum:
        return Finding(
            "GPUs",
            "error",
            f"{wanted}{there}, and this torch {torch.__version__} is built for CUDA {cuda}, which needs driver "
            f"{minimum} or newer; ask for a newer driver, or install a torch that is built for an older CUDA",
        )
    return Finding(
        "GPUs",
        "error" if given else "warn",
        f"{wanted}{there}, and torch sees no GPU: training would be on CPUs; see nvidia-smi, CUDA_VISIBLE_DEVICES and "
        f"whether the job asked for GPUs (--gpus-per-node), {otherwise}",
    )


def check_nccl(gpus: Sequence[Gpu], ranks: int, cpu: bool, version: str) -> Finding:
    if cpu or not gpus or ranks < 2:
        return Finding("NCCL", "ok", f"{version or 'none'}; not needed")
    if version:
        return Finding("NCCL", "ok", version)
    return Finding(
        "NCCL", "error", f"not in torch {torch.__version__}, and {ranks} ranks on GPUs need it; install another"
    )


def check_precision(config: "RunConfig", gpus: Sequence[Gpu], cpu: bool) -> Finding:
    """That fp16 needs a GPU is refused with the recipe."""
    precision = config.train.precision
    old = sorted({gpu.name for gpu in gpus if gpu.capability < (8, 0)})
    if precision == "bf16" and old and not cpu:
        return Finding(
            "precision",
            "warn",
            f"train.precision=bf16, for which {', '.join(old)} has no units (a compute capability of 8.0 or more is "
            f"expected): it is emulated, and slow; set train.precision=fp16",
        )
    return Finding("precision", "ok", f"{precision} on {_named(gpus) if gpus and not cpu else 'CPUs'}")


def check_memory(free_bytes: int, processes: int, workers: int, state_bytes: int) -> Finding:
    """`free_bytes`: what this node's job may still take; `workers` of each process; `state_bytes`: weights, gradients
    and optimiser of all processes, or a checkpoint's copy of them."""
    needed = processes * (PROCESS_BYTES + workers * WORKER_BYTES) + state_bytes
    told = f"{gib(free_bytes)} free (processes: {processes}, loader workers of each: {workers})"
    if free_bytes >= needed:
        return Finding("memory", "ok", told)
    return Finding(
        "memory",
        "warn",
        f"{told}, expected at least {gib(needed)} (2 GiB a process, 0.5 GiB a worker, {gib(state_bytes)} for weights "
        f"and optimiser); ask for more with --mem, lower data.workers, or launch fewer processes",
    )


def free_memory() -> int:
    """Bytes that the system, or the job's control group, has left."""
    from clipdist.train.micro_batch import cgroup_free_bytes

    free, limited = int(psutil.virtual_memory().available), cgroup_free_bytes()
    return free if limited is None else min(free, limited)


def check_scratch(processes: int, places: Sequence[tuple[Path, int]] = ()) -> list[Finding]:
    """`places`: folders and what must be free there; by default the one for temporary files, and /dev/shm."""
    places = places or (
        (Path(tempfile.gettempdir()), TEMPORARY_BYTES),
        (Path("/dev/shm"), processes * SHARED_MEMORY_BYTES),
    )
    found = []
    for folder, expected in places:
        try:
            space = os.statvfs(folder)
        except OSError as error:
            found.append(Finding(str(folder), "warn", f"cannot be looked at ({error.strerror}), expected a folder"))
            continue
        free = space.f_bavail * space.f_frsize
        if free >= expected:
            found.append(Finding(str(folder), "ok", f"{gib(free)} free"))
        else:
            advice = "free some, or start the container with more (--shm-size)"
            if folder.name != "shm":
                advice = "free some, or set TMPDIR to a folder elsewhere"
            found.append(Finding(str(folder), "warn", f"{gib(free)} free, expected at least {gib(expected)}; {advice}"))
    return found


def check_limits(ranks: int, gpus: Sequence[Gpu], nodes: int) -> list[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    expected = FILES + FILES_PER_RANK * ranks
    if files == resource.RLIM_INFINITY or files >= expected:
        found = [Finding("open files", "ok", f"as many as {'any' if files < 0 else f'{files:,}'} for a process")]
    else:
        advice = "put ulimit -n 65536 into slurm/site.sh, or ask the administrators"
        found = [Finding("open files", "warn", f"{files:,} for a process, expected at least {expected:,}; {advice}")]
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    told = "no limit" if locked == resource.RLIM_INFINITY else gib(locked)
    if gpus and nodes > 1 and locked != resource.RLIM_INFINITY and INFINIBAND.exists():
        advice = "InfiniBand registers memory and fails without; ask for PropagateResourceLimitsExcept=MEMLOCK in SLURM"
        return [*found, Finding("locked memory", "warn", f"{told}, expected no limit; {advice}")]
    return [*found, Finding("locked memory", "ok", told)]


def check_host_name(host: str, nodes: Sequence[str]) -> Finding:
    """Whether other nodes can find this one by its name; for a child process, since a name server may be dead."""
    if len(nodes) < 2:
        return Finding("host name", "ok", f"{host}; other nodes need not find it")
    try:
        own = addresses(host)
        others = {node: addresses(node) for node in nodes}
    except OSError as error:
        return Finding(
            "host name",
            "error",
            f"{error}: expected an address for each of {', '.join(nodes)}; ask the administrators for the names in "
            f"DNS or in /etc/hosts",
        )
    if not all(ip_address(address).is_loopback for address in own):
        return Finding("host name", "ok", f"{host} is {', '.join(own)}")
    if all(ip_address(address).is_loopback for found in others.values() for address in found):
        return Finding("host name", "warn", f"all nodes are {', '.join(own)}, so that all must be one machine")
    return Finding(
        "host name",
        "error",
        f"{host} is {', '.join(own)} to itself, where other nodes expect an address that they can reach; take the "
        f"name out of that line of /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME in slurm/site.sh",
    )


def addresses(host: str) -> list[str]:
    """Raises `OSError` naming the host when it has none."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise OSError(f"{host} has no address ({error.strerror})") from None
    return sorted({str(entry[4][0]).partition("%")[0] for entry in found})
