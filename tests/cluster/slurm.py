"""A real SLURM on this machine: a controller and a few nodes, each with a host name, a process tree and fake GPUs of
its own, on loopback alone.

Needs root, Linux namespaces and Debian's packages slurmctld, slurmd, slurm-client, munge and iproute2. What makes it
work:

- All daemons listen on 127.0.0.1, nodes on ports of their own. With an address for each node, `srun` within a job waits
  forever: a step calls back the address that the connection came from.
- A node is the first process of a process namespace, so killing it is what pulling its plug would be.
- With `network`, each node has a network of its own as well, whose cable can be pulled: point-to-point links to the
  controller's, which routes between them. There each node may have an address of its own.
- GPUs are character devices that SLURM counts; programs see `CUDA_VISIBLE_DEVICES`, and no GPU behind it.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

NODES = 4
DAEMONS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "scontrol", "ip")
PORTS = range(16_900, 18_900, NODES + 1)
"""Where to look for as many in a row that are free: another such cluster may be on this machine. Jobs are numbered from
there on, too, since it is by its job that tests find a process."""
NETWORK, CONTROL_HOST = "10.77.0", 254
SPACE = "clipdist-"
"""How the names of our network namespaces begin."""

CONFIGURATION = """
ClusterName=clipdist
SlurmctldHost={host}({control_address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
SlurmctldPort={control_port}
FirstJobId={control_port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=10
TCPTimeout=2
MinJobAge=3600
CompleteWait=0
InactiveLimit=0
ReturnToService=2
GresTypes=gpu
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
NodeName=n[1-{nodes}] NodeAddr={node_addresses} Port={ports} CPUs=8 RealMemory=8000 Gres=gpu:4 State=UNKNOWN
PartitionName=low  Nodes=ALL Default=YES PriorityTier=1  PreemptMode=REQUEUE GraceTime=0  DefaultTime=30
PartitionName=kind Nodes=ALL             PriorityTier=1  PreemptMode=REQUEUE GraceTime=60 DefaultTime=30
PartitionName=gpu  Nodes=ALL             PriorityTier=1  PreemptMode=OFF                  DefaultTime=30
PartitionName=cpu  Nodes=ALL             PriorityTier=1  PreemptMode=OFF                  DefaultTime=30
PartitionName=closed Nodes=ALL           AllowAccounts=theirs                             DefaultTime=30
PartitionName=high Nodes=ALL             PriorityTier=10 PreemptMode=OFF                  DefaultTime=30
"""

# Whoever ends these tests by force ends the cluster, too.
WITH_US = ("setpriv", "--pdeathsig", "KILL")
# The node's first process: it reaps orphans, and everything below it ends with it.
KNOWN = 'mount --bind "$0/hosts" /etc/hosts; exec "$@"'
NODE = 'hostname "$1"; mount --bind "$2/hosts" /etc/hosts; slurmd -D -f "$2/slurm.conf" -N "$1"; exit $?'


def missing() -> str:
    """Why there can be no SLURM here; empty when there can."""
    if os.geteuid() != 0:
        return "a local SLURM needs root"
    path = f"{os.environ['PATH']}:/usr/sbin"
    lacking = [name for name in DAEMONS if not shutil.which(name, path=path)]
    return f"not installed: {', '.join(lacking)} (make test-cluster installs them)" if lacking else ""


def free_ports() -> int:
    """The first of NODES + 1 in a row on which nothing listens here."""
    for first in PORTS:
        with ExitStack() as opened:
            try:
                for port in range(first, first + NODES + 1):
                    opened.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise AssertionError(f"no {NODES + 1} ports in a row are free from {PORTS.start} to {PORTS.stop}")


class LocalSlurm:
    """`network`: each node has one of its own."""

    def __init__(self, root: Path, network: bool = False) -> None:
        self.root, self.network = root, network
        self.disks = root / "disks"
        """What is mounted below, nodes see too; elsewhere each has the mounts that were there when it started."""
        self.environment = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}
        self.environment["PATH"] += ":/usr/sbin:/sbin"
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def up(self) -> None:
        root, host = self.root, socket.gethostname().split(".")[0]
        for name in ("state", "spool", "dev", "disks"):
            (root / name).mkdir(parents=True)
        subprocess.run(["mount", "--bind", str(self.disks), str(self.disks)], check=True, timeout=60)
        subprocess.run(["mount", "--make-shared", str(self.disks)], check=True, timeout=60)
        root.chmod(0o755)
        names = [f"n{number}" for number in range(1, NODES + 1)]
        addresses = {name: self._address(number) for number, name in enumerate(names, 1)}
        addresses[host] = self._address(CONTROL_HOST)
        lines = [f"{address} {name}\n" for name, address in addresses.items()]
        (root / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        if self.network:
            self._lay_cables()
        for number in range(4):  # as /dev/null is
            os.mknod(root / "dev" / f"nvidia{number}", 0o666 | 0o020000, os.makedev(1, 3))
        (root / "gres.conf").write_text(f"Name=gpu File={root}/dev/nvidia[0-3] Flags=nvidia_gpu_env\n")
        (root / "cgroup.conf").write_text(
            "CgroupPlugin=cgroup/v1\n"
        )  # unused; found out by itself, it would be mounted
        control = free_ports()
        first = control + 1
        where = {
            "control_address": self._address(CONTROL_HOST),
            "control_port": control,
            "node_addresses": f"{NETWORK}.[1-{NODES}]" if self.network else "127.0.0.1",
            "ports": str(first) if self.network else f"{first}-{first + NODES - 1}",
        }
        (root / "slurm.conf").write_text(CONFIGURATION.format(host=host, root=root, nodes=NODES, **where))
        key = root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        munge = [f"--{what}-file={root / 'munge'}.{what}" for what in ("pid", "log", "seed")]
        self._daemon("munged", "-F", f"--key-file={key}", f"--socket={root}/munge.socket", *munge)
        self._start_controller("-c")
        for name in names:
            self.start_node(name)
        self._until(lambda: self.idle() == NODES, 30, "all nodes are idle")

    def _address(self, number: int) -> str:
        return f"{NETWORK}.{number}" if self.network else "127.0.0.1"

    def _lay_cables(self) -> None:
        control = f"{SPACE}control"
        self._ip("netns", "add", control)
        self._ip("-n", control, "link", "set", "lo", "up")
        self._ip("-n", control, "addr", "add", f"{NETWORK}.{CONTROL_HOST}/32", "dev", "lo")
        forward = ["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"]
        subprocess.run(["ip", "netns", "exec", control, *forward], check=True, timeout=60)
        for number in range(1, NODES + 1):
            space, cable = f"{SPACE}n{number}", f"v{number}"
            self._ip("netns", "add", space)
            self._ip("-n", control, "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            for device in ("lo", "eth0"):
                self._ip("-n", space, "link", "set", device, "up")
            self._ip("-n", space, "addr", "add", f"{NETWORK}.{number}/32", "dev", "eth0")
            self._ip("-n", space, "route", "add", f"{NETWORK}.{CONTROL_HOST}", "dev", "eth0")
            self._ip("-n", space, "route", "add", "default", "via", f"{NETWORK}.{CONTROL_HOST}")
            self.plug(f"n{number}")

    def plug(self, node: str) -> None:
        """Puts a node's cable in."""
        cable = f"v{node[1:]}"
        self._ip("-n", f"{SPACE}control", "link", "set", cable, "up")
        self._ip("-n", f"{SPACE}control", "route", "replace", f"{NETWORK}.{node[1:]}", "dev", cable)

    def unplug(self, node: str) -> None:
        """Pulls a node's cable: nothing reaches it, nothing comes from it, and nobody is told."""
        self._ip("-n", f"{SPACE}control", "link", "set", f"v{node[1:]}", "down")

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, timeout=60)

    def _inside(self, space: str) -> list[str]:
        # Not `ip netns exec`, which mounts /sys anew: slurmd misses its control groups there.
        return ["nsenter", f"--net=/run/netns/{SPACE}{space}"] if self.network else []

    def idle(self) -> int:
        """How many nodes wait for work."""
        return self.run("sinfo", "-h", "-p", "low", "-N", "-o", "%t").split().count("idle")

    def _daemon(self, *words: str) -> None:
        with open(self.root / f"{words[0]}.out", "wb") as out:
            # The controller listens where its host's name leads.
            known = ("unshare", "--mount", "bash", "-c", KNOWN, str(self.root)) if self.network else ()
            words = (*WITH_US, *self._inside("control"), *known, *words)
            self._daemons.append(subprocess.Popen(words, stdout=out, stderr=out, env=self.environment))

    def _start_controller(self, *words: str) -> None:
        self._daemon("slurmctld", "-D", *words, "-f", str(self.root / "slurm.conf"))
        self._until(lambda: "UP" in self.run("scontrol", "ping"), 20, "the controller answers")

    def restart_controller(self) -> None:
        """It counts anew what jobs have. SLURM 22.05 never gives back the GPUs of a job that it has started without any
        (see `scheduler.gpus_lost`), and then nobody gets them any more."""
        controller = self._daemons.pop()
        controller.terminate()
        controller.wait(30)
        self._start_controller()
        self._until(lambda: self.idle() == NODES, 30, "all nodes are idle")

    def start_node(self, name: str) -> None:
        """Powers a node on."""
        words = ["unshare", "--uts", "--mount", "--propagation", "slave", "--pid", "--fork", "--kill-child"]
        words += ["--mount-proc", "bash", "-c", NODE]
        with open(self.root / f"{name}.out", "ab") as out:
            self._nodes[name] = subprocess.Popen(
                [*WITH_US, *self._inside(name), *words, "node", name, str(self.root)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self.environment,
                start_new_session=True,
            )

    def crash_node(self, name: str) -> None:
        """Powers a node off: every process on it is gone, and says nothing."""
        node = self._nodes.pop(name)
        node.kill()
        node.wait()

    def down(self) -> None:
        for name in list(self._nodes):
            self.crash_node(name)
        for daemon in self._daemons[::-1]:
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        subprocess.run(["umount", "--lazy", str(self.disks)], check=False, timeout=60)
        if self.network:
            for space in ("control", *(f"n{number}" for number in range(1, NODES + 1))):
                subprocess.run(["ip", "netns", "del", f"{SPACE}{space}"], check=False, timeout=60)

    def run(self, *words: str, check: bool = False, **more: Any) -> str:
        """Standard output of a command of SLURM."""
        words = (*self._inside("control"), *words)
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=self.environment, **more)
        assert not check or done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def submit(self, *words: str, cwd: Path, **variables: str) -> str:
        """`sbatch` and its words; the job's number."""
        done = subprocess.run(
            [*self._inside("control"), "sbatch", "--parsable", *words],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=cwd,
            env={**self.environment, **variables},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, NodeList, ExitCode, …"""
        words = self.run("scontrol", "show", "job", number, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def hasten(self, number: str) -> None:
        """A job that is requeued waits two minutes; this one begins at once."""
        self.run("scontrol", "update", f"JobId={number}", "StartTime=now")

    def wait(self, number: str, states: Sequence[str] = ("COMPLETED",), seconds: float = 240) -> dict[str, str]:
        """Until the job is in one of the states; requeued meanwhile, it is hastened."""
        found: dict[str, str] = {}
        pending_since = time.monotonic()

        def there() -> bool:
            nonlocal found
            nonlocal pending_since
            found = self.job(number)
            if found.get("JobState") != "PENDING":
                pending_since = time.monotonic()
            elif time.monotonic() - pending_since > 3:  # in the same second, nodes still refuse it
                self.hasten(number)
                pending_since = time.monotonic()
            ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
            return found.get("JobState") in states or (found.get("JobState") in ended)

        what = f"job {number} is {' or '.join(states)}"
        self._until(there, seconds, what, lambda: f"{self.run('scontrol', 'show', 'job')}\n{self.logs()}")
        told = f"job {number} is {found['JobState']}, exit code {found['ExitCode']}"
        assert found["JobState"] in states, f"{told}\n{self.logs()}"
        return found

    def logs(self) -> str:
        """The last lines of controller and nodes."""
        paths = [self.root / "slurmctld.log", *sorted(self.root.glob("slurmd-*.log"))]
        return "\n".join(line for path in paths for line in path.read_text(errors="replace").splitlines()[-25:])

    def _until(self, there: Any, seconds: float, what: str, more: Callable[[], str] = str) -> None:
        end = time.monotonic() + seconds
        while not there():
            assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}\n{more()}"
            time.sleep(0.1)
