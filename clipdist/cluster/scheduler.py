"""What we ask of SLURM about jobs and nodes, through `scontrol`, `squeue` and the like; no accounting is needed."""

import os
import re
import signal
import subprocess
import tempfile
import time

SECONDS = 60.0


def ask(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs one of SLURM's commands; how it ended is the caller's to look at. It outlasts the SIGTERM that ends a job,
    which reaches each of its processes."""
    try:
        return subprocess.run(
            words, capture_output=True, text=True, timeout=SECONDS, check=False, preexec_fn=_ignore_the_end
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(words, 1, "", str(error))


def _ignore_the_end() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def job(number: str) -> dict[str, str]:
    """What SLURM knows of a job: JobState, Restarts, ExcNodeList, …; empty when it knows nothing."""
    words = ask("scontrol", "show", "job", number, "--oneliner").stdout.split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def gpus_lost(number: str) -> bool:
    """Whether this running job has none of the GPUs that it asks for. SLURM (22.05) starts one so that goes back into
    the queue before it is noticed that a node of it is lost: once, the next start has them again."""
    words = ask("scontrol", "--details", "show", "job", number, "--oneliner").stdout.split()
    asked = any(word.startswith("TresPer") and "gpu" in word for word in words)
    return asked and "JOB_GRES=(null)" in words


NEVER = re.compile(
    r"can't_use|not_known|NotAllowed|InvalidAccount|InvalidQOS|PartitionNodeLimit|PartitionTimeLimit|BadConstraints"
)
"""Reasons of a job that waits, for which it would wait forever."""


def test(script: str) -> str:
    """What SLURM has against a script for sbatch, in its own words; empty when it would take it."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh", encoding="utf-8") as file:
        file.write(script)
        file.flush()
        done = ask("sbatch", "--test-only", file.name)
    return done.stderr.strip().replace("\n", "; ") or "sbatch --test-only failed" if done.returncode else ""


def hopeless(number: str, seconds: float = 2.0) -> str:
    """Why a job that has just been queued would wait forever, in SLURM's words, which has them in a moment; empty where
    it says nothing of the kind. Without accounting, it is here that a wrong account shows."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = job(number)
        if found.get("JobState") != "PENDING":
            return ""
        if NEVER.search(found.get("Reason", "")):
            return found["Reason"].replace("_", " ")
        time.sleep(0.2)
    return ""


def cancel(number: str) -> None:
    ask("scancel", number)


def requeue(number: str, without: str = "") -> str:
    """Puts this running job back into the queue, from where it may not come to the node `without` again; what was done,
    in words.

    A job that does not run any more is SLURM's: cancelled it shall end, and preempted it is in the queue already.
    """
    found = job(number)
    state = found.get("JobState", "unknown")
    if state != "RUNNING":
        return f"the job is {state}: what follows is up to SLURM"
    done = ask("scontrol", "requeue", number)
    if done.returncode:
        return f"the job cannot go back into the queue ({done.stderr.strip()}); submit it again to go on"
    if not without:
        return "back into the queue"
    excluded = [name for name in [found.get("ExcNodeList", ""), without] if name not in ("", "(null)")]
    # While we are being ended: SLURM takes the list for a job that waits only.
    done = ask("scontrol", "update", f"JobId={number}", f"ExcNodeList={','.join(excluded)}")
    told = f"not again to {without}" if done.returncode == 0 else f"{without} not excluded: {done.stderr.strip()}"
    return f"back into the queue, {told}"


def others(number: str, without: str) -> int:
    """How many nodes of the job's partition it could run on: not the node `without`, nor those excluded before, nor
    those that are down or drained."""
    found = job(number)
    listed = found.get("ExcNodeList", "(null)")
    excluded = set()
    if listed != "(null)":
        excluded = set(ask("scontrol", "show", "hostnames", listed).stdout.split())
    lines = ask("sinfo", "--noheader", "--Node", f"--partition={found.get('Partition', '')}", "--format=%N %t").stdout
    pairs = [line.split() for line in lines.splitlines()]
    usable = {
        name for name, state in pairs if state.strip("*~#$@+") in ("idle", "alloc", "mix", "comp", "resv", "plnd")
    }
    return len(usable - excluded - {without})


def queue() -> dict[str, str] | None:
    """Our jobs that wait or run, those of an array as array_index -> PENDING, RUNNING, …; None where SLURM does not
    answer."""
    done = ask("squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i %T")
    if done.returncode:
        return None
    return dict(line.split(maxsplit=1) for line in done.stdout.splitlines())


def largest_array() -> int:
    """How many jobs an array can have here; SLURM's default where it does not answer."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config").stdout, re.MULTILINE)
    return int(found[1]) if found else 1001
