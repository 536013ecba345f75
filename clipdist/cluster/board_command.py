"""Shows runs in TensorBoard, on this host alone, and prints how to see it from another. Ends with Ctrl-C.

On a cluster: start it on the login node, copy the line that it prints into a terminal of your own machine, and open the
address there. Runs that begin meanwhile in the same folders appear too. TensorBoard asks nobody for a password: whoever
has an account on this host can see it.
"""

import argparse
import getpass
import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

HOST = "127.0.0.1"
EVENTS = "tensorboard"
LOOK_SECONDS = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="*", type=Path, default=[Path("runs")], help="runs, or folders of runs (runs)")
    parser.add_argument("--port", type=int, default=0, help="port of this host (one that is free)")


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # a TensorFlow that happens to be there talks a lot
    from tensorboard import program

    from clipdist.cluster.runs import find_runs
    from clipdist.errors import UserError

    found = find_runs(args.runs)
    if not any((path / EVENTS).is_dir() for path in found):
        names = ", ".join(map(str, found))
        raise UserError(f"{names}: nothing for TensorBoard there; train with log.tensorboard=true")
    for talker in ("tensorboard", "werkzeug"):
        logging.getLogger(talker).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="clipdist-board-") as folder:
        shown = Path(folder)
        show(shown, found)
        board = program.TensorBoard()
        board.configure(argv=["tensorboard", f"--logdir={shown}", f"--host={HOST}", f"--port={args.port}"])
        try:
            url = board.launch()
        except program.TensorBoardServerException as error:
            raise UserError(f"--port {args.port}: {error}; choose another, or leave it away") from error
        port = url.rstrip("/").rpartition(":")[2]
        print(f"{len(list(shown.iterdir()))} runs. {from_another_machine(HOST, int(port))}", flush=True)
        try:
            while True:
                time.sleep(LOOK_SECONDS)
                show(shown, find_runs(args.runs))
        except KeyboardInterrupt:
            return 0


def show(folder: Path, runs: Iterable[Path]) -> None:
    """Links in `folder` to the events of those runs, by the runs' names, or, of one that is taken, with their folder's
    name before it. A tree of links is what TensorBoard advises: a list of folders knows no commas and no new runs."""
    linked = {link.readlink() for link in folder.iterdir()}
    for run in runs:
        events = (run / EVENTS).resolve()
        if events in linked or not events.is_dir():
            continue
        linked.add(events)
        real = run.resolve()
        names = [real.name, f"{real.parent.name}-{real.name}"]
        names += [f"{names[1]}-{number}" for number in range(2, len(linked) + 2)]
        name = next(name for name in names if not (folder / name).exists())
        (folder / name).symlink_to(events, target_is_directory=True)


def from_another_machine(host: str, port: int) -> str:
    """How to open, elsewhere, what answers at a loopback address of this machine."""
    return (
        f"From another machine:\n\n  ssh -N -L {port}:{host}:{port} {user()}@{socket.gethostname()}\n\n"
        f"then open http://{host}:{port}/ there; Ctrl-C ends this"
    )


def user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        return "user"
