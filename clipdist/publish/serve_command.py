"""Serves a model to people, as a page, and to programs, as a JSON interface; on this host alone. Ends with Ctrl-C.

On a cluster: start it on the login node, copy the line that it prints into a terminal of your own machine, and open the
address there. It asks nobody for a password: whoever has an account on this host can use it. What is sent is kept in
memory alone, and only until it is answered. Options and limits: docs/serve.md.
"""

import argparse
import ipaddress
import logging
import os
import signal
import socket
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipdist.publish.serve.service import Service

LIMITS = {
    "max_upload_bytes": "bytes of one request (16 MiB)",
    "max_image_pixels": "pixels of one image, told by its header (50,000,000)",
    "max_text_characters": "characters of a text (2,000)",
    "max_batch_files": "images of one request (32)",
    "max_classes": "classes that somebody may name for an image (200)",
    "max_queue": "requests let in and not answered yet; more are refused with 503 (64)",
    "max_connections": "open connections (256)",
    "timeout_seconds": "seconds from the head of a request to its whole answer (60)",
    "body_seconds": "seconds that a request may take to arrive (30)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="model folder, such as runs/phantom/model")
    parser.add_argument("--gallery", type=Path, metavar="FOLDER", help="embeddings to search in, of the same model")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="classes and their names: JSON, or lines")
    parser.add_argument("--templates", type=Path, metavar="FILE", help="prompts, one a line, {} for the class name")
    temperature = parser.add_mutually_exclusive_group()
    temperature.add_argument("--temperature", type=float, help="of probabilities (the model's)")
    temperature.add_argument(
        "--calibration",
        type=Path,
        metavar="JSON",
        help="what clipdist eval --calibrate wrote: its temperature, classes",
    )
    parser.add_argument("--captions", type=Path, metavar="FILE", help="captions to choose from, one a line")
    parser.add_argument("--name", help="what the model is called on the page (the run's name)")
    parser.add_argument("--notice", help="what people should know before they believe an answer")
    parser.add_argument("--device", help="cpu or cuda; default: a GPU when there is one")
    network = parser.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this host alone)")
    network.add_argument("--port", type=int, default=0, help="port of this host (one that is free)")
    network.add_argument("--allow-host", nargs="+", default=[], metavar="NAME", help="more names that it answers under")
    speed = parser.add_argument_group("speed")
    speed.add_argument("--max-batch", type=int, default=16, help="images that go through the model together (16)")
    speed.add_argument("--max-wait-ms", type=float, default=5.0, help="how long the first of them waits for others (5)")
    speed.add_argument("--threads", type=int, help="threads of the model (the cores of this host)")
    speed.add_argument("--decoders", type=int, default=2, help="threads that decode images (2)")
    limits = parser.add_argument_group("limits")
    for name, what in LIMITS.items():
        words = {"timeout_seconds": "timeout", "body_seconds": "body-timeout"}.get(name, name.replace("_", "-"))
        kind = float if name.endswith("seconds") else int
        limits.add_argument(f"--{words}", dest=name, type=kind, help=what)


def run(args: argparse.Namespace) -> int:
    # Read when torch is loaded: its threads, while they have nothing to do, leave the cores to those that decode and
    # answer. By default they spin, which on cores that others use too cost four fifths of the speed.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from clipdist.errors import UserError
    from clipdist.train.command import configure_logging

    configure_logging()
    for talker in ("python_multipart", "uvicorn.error"):  # a line for every bad request, whoever sends them
        logging.getLogger(talker).setLevel(logging.ERROR)
    # Of damaged metadata Pillow warns in words that differ each time, and Python keeps all of them.
    warnings.filterwarnings("ignore", module="PIL")
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f'{error.name} is missing; run: pip install "clipdist[serve]"') from None

    from clipdist.publish.serve.app import LOOPBACK_NAMES, make_app
    from clipdist.publish.serve.limits import Limits
    from clipdist.publish.serve.server import server_of
    from clipdist.publish.serve.setup import prepare

    given = {name: getattr(args, name) for name in LIMITS if getattr(args, name) is not None}
    limits = Limits(**given)
    listening = listen(args.host, args.port)
    service = prepare(args, limits)
    local = ipaddress.ip_address(listening.getsockname()[0]).is_loopback
    names = {*LOOPBACK_NAMES, args.host.lower(), *(name.lower() for name in args.allow_host)}
    app = make_app(service, hosts=frozenset(names) if local or args.allow_host else None)
    announce(listening, service, local)
    # After its graceful end uvicorn raises the signal once more, for whoever handled it before.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        server_of(app).run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    finally:
        service.close()
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A socket that already accepts connections. Raises `UserError` for an address or port that cannot be had."""
    from clipdist.errors import UserError

    if not 0 <= port < 2**16:
        raise UserError(f"--port {port}: expected 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(512)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error}; choose another, or leave it away") from None
    return listening


def announce(listening: socket.socket, service: "Service", local: bool) -> None:
    from clipdist.cluster.board_command import from_another_machine

    address, port = listening.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    about: Any = service.about
    if not local:
        print(
            f"warning: {shown}:{port} can be reached from other machines; there is no password and no encryption here",
            file=sys.stderr,
        )
    rows = f", gallery of {about.gallery.rows:,}" if about.gallery else ""
    kind = about.kind.replace("_", " ")
    print(f"{about.name}: {kind}, {len(about.classes)} classes, {about.captions:,} captions{rows}", end="")
    if not local:
        print(f"\nopen http://{shown}:{port}/; Ctrl-C ends this", flush=True)
        return
    print(f". {from_another_machine(shown, port)}", flush=True)
