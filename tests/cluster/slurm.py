"""A real SLURM on this machine: a controller and a few nodes, each with a host name, a process tree and fake GPUs of
its own, on loopback alone.

Needs root, Linux namespaces and Debian's packages slurmctld, slurmd, slurm-client and munge. What makes it work:

- All daemons listen on 127.0.0.1, nodes on ports of their own. With an address for each node, `srun` within a job waits
  forever: a step calls back the address that the connection came from.
- A node is the first process of a process namespace, so killing it is what pulling its plug would be.
- GPUs are character devices that SLURM counts; programs see `CUDA_VISIBLE_DEVICES`, and no GPU behind it.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NODES = 4
DAEMONS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "scontrol")
CONTROL_PORT, FIRST_PORT = 16917, 17100

CONFIGURATION = """
ClusterName=clipdist
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
SlurmctldPort={control_port}
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
NodeName=n[1-{nodes}] NodeAddr=127.0.0.1 Port={first_port}-{last_port} CPUs=4 RealMemory=8000 Gres=gpu:4 State=UNKNOWN
PartitionName=low  Nodes=ALL Default=YES PriorityTier=1  PreemptMode=REQUEUE GraceTime=0  DefaultTime=30
PartitionName=kind Nodes=ALL             PriorityTier=1  PreemptMode=REQUEUE GraceTime=60 DefaultTime=30
PartitionName=high Nodes=ALL             PriorityTier=10 PreemptMode=OFF                  DefaultTime=30
"""

# Whoever ends these tests by force ends the cluster, too.
WITH_US = ("setpriv", "--pdeathsig", "KILL")
# The node's first process: it reaps orphans, and everything below it ends with it.
NODE = 'hostname "$1"; mount --bind "$2/hosts" /etc/hosts; slurmd -D -f "$2/slurm.conf" -N "$1"; exit $?'


def missing() -> str:
    """Why there can be no SLURM here; empty when there can."""
    if os.geteuid() != 0:
        return "a local SLURM needs root"
    path = f"{os.environ['PATH']}:/usr/sbin"
    lacking = [name for name in DAEMONS if not shutil.which(name, path=path)]
    return f"not installed: {', '.join(lacking)} (make test-cluster installs them)" if lacking else ""


class LocalSlurm:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}
        self.environment["PATH"] += ":/usr/sbin:/sbin"
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def up(self) -> None:
        root, host = self.root, socket.gethostname().split(".")[0]
        for name in ("state", "spool", "dev"):
            (root / name).mkdir(parents=True)
        root.chmod(0o755)
        names = [f"n{number}" for number in range(1, NODES + 1)]
        (root / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"127.0.0.1 {n}\n" for n in [host, *names]))
        for number in range(4):  # as /dev/null is
            os.mknod(root / "dev" / f"nvidia{number}", 0o666 | 0o020000, os.makedev(1, 3))
        (root / "gres.conf").write_text(f"Name=gpu File={root}/dev/nvidia[0-3] Flags=nvidia_gpu_env\n")
        (root / "cgroup.conf").write_text(
            "CgroupPlugin=cgroup/v1\n"
        )  # unused; found out by itself, it would be mounted
        last = FIRST_PORT + NODES - 1
        ports = {"control_port": CONTROL_PORT, "first_port": FIRST_PORT, "last_port": last}
        (root / "slurm.conf").write_text(CONFIGURATION.format(host=host, root=root, nodes=NODES, **ports))
        key = root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        munge = [f"--{what}-file={root / 'munge'}.{what}" for what in ("pid", "log", "seed")]
        self._daemon("munged", "-F", f"--key-file={key}", f"--socket={root}/munge.socket", *munge)
        self._daemon("slurmctld", "-D", "-c", "-f", str(root / "slurm.conf"))
        self._until(lambda: "UP" in self.run("scontrol", "ping"), 20, "the controller answers")
        for name in names:
            self.start_node(name)
        self._until(lambda: self.idle() == NODES, 30, "all nodes are idle")

    def idle(self) -> int:
        """How many nodes wait for work."""
        return self.run("sinfo", "-h", "-p", "low", "-N", "-o", "%t").split().count("idle")

    def _daemon(self, *words: str) -> None:
        with open(self.root / f"{words[0]}.out", "wb") as out:
            self._daemons.append(subprocess.Popen([*WITH_US, *words], stdout=out, stderr=out, env=self.environment))

    def start_node(self, name: str) -> None:
        """Powers a node on."""
        words = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", NODE]
        with open(self.root / f"{name}.out", "ab") as out:
            self._nodes[name] = subprocess.Popen(
                [*WITH_US, *words, "node", name, str(self.root)],
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

    def run(self, *words: str, check: bool = False, **more: Any) -> str:
        """Standard output of a command of SLURM."""
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=self.environment, **more)
        assert not check or done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def submit(self, *words: str, cwd: Path, **variables: str) -> str:
        """`sbatch` and its words; the job's number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *words],
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

        def there() -> bool:
            nonlocal found
            found = self.job(number)
            if found.get("JobState") == "PENDING" and found.get("Reason") in ("BeginTime", "None"):
                self.hasten(number)
            ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
            return found.get("JobState") in states or (found.get("JobState") in ended)

        self._until(there, seconds, f"job {number} is {' or '.join(states)}")
        assert found["JobState"] in states, f"job {number} is {found['JobState']}, exit code {found['ExitCode']}"
        return found

    def _until(self, there: Any, seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not there():
            assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
            time.sleep(0.1)
