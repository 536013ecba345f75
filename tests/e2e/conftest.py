"""For the tests in a browser: the page of `clipdist serve` in Chromium, against a service that really runs."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import COLOURS, SHAPES, TrainedRun

ROOT = Path(__file__).parents[2]
MOST_BYTES = 200_000
ATTACK = "<img src=x onerror=\"document.title='taken over'\">"
REFUSED = "Failed to load resource"  # what Chromium writes into its console for every status of 400 or more

Opening = Callable[..., Any]


@pytest.fixture(scope="session")
def served(trained_run: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running service: five classes under friendly names, captions of which one is an attack."""
    folder = tmp_path_factory.mktemp("served")
    classes = folder / "classes.txt"
    classes.write_text("".join(f"{shape}\ta drawn {shape}\n" for shape in SHAPES), encoding="utf-8")
    captions = folder / "captions.txt"
    lines = [f"A {colour} {shape} at the centre." for colour in COLOURS[:2] for shape in SHAPES[:2]]
    captions.write_text("\n".join([ATTACK, *lines]) + "\n", encoding="utf-8")
    words = ["--classes", str(classes), "--captions", str(captions), "--max-text-characters", "200"]
    words += ["--max-upload-bytes", str(MOST_BYTES), "--max-batch-files", "2"]
    with serving(trained_run.folder / "model", words, folder) as address:
        yield address


@contextmanager
def serving(model: Path, words: list[str], folder: Path) -> Iterator[str]:
    """The address of `clipdist serve` in a process of its own, which writes its log into `folder`."""
    command = [sys.executable, "-m", "clipdist.cli", "serve", str(model), "--port", "0", "--threads", "1", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(folder / "log.txt", "w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=folder)
        try:
            assert process.stdout is not None
            said = ""
            while not (found := re.search(r"http://127\.0\.0\.1:[0-9]+/", said)):
                line = process.stdout.readline()
                assert line, (folder / "log.txt").read_text(encoding="utf-8")[-3000:]
                said += line
            yield found[0]
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


@pytest.fixture
def opened(chromium: Any, served: str) -> Iterator[Opening]:
    """opened(about={changes of /api/about}, script=…, **options of the context) -> the page, once it knows its service.

    At the end: no request went elsewhere, nothing failed in the page, and its title is its own.
    """
    contexts, pages, faults = [], [], []

    def note(request: Any) -> None:
        if not request.url.startswith((served, "blob:", "data:")):
            faults.append(f"a request to {request.url}")

    def open_page(about: dict[str, Any] | None = None, script: str = "", ready: bool = True, **options: Any) -> Any:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        page = context.new_page()
        contexts.append(context)
        pages.append(page)
        page.set_default_timeout(15_000)
        page.on("request", note)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "console",
            lambda message: message.type == "error" and REFUSED not in message.text and faults.append(message.text),
        )
        if script:
            page.add_init_script(script)
        if about:
            page.route("**/api/about", lambda route: route.fulfill(json=changed(route.fetch().json(), about)))
        page.goto(served)
        if ready:
            page.wait_for_selector("#picture:not([hidden])")
        return page

    yield open_page
    titles = [page.title() for page in pages]
    for page in pages:
        page.unroute_all(behavior="ignoreErrors")
    for context in contexts:
        context.close()
    assert not faults
    assert not [title for title in titles if "taken over" in title]


def changed(body: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`body` with other values, one level deep too."""
    old = {key: body[key] if isinstance(body[key], dict) else {} for key in changes}
    return body | {key: old[key] | new if isinstance(new, dict) else new for key, new in changes.items()}
