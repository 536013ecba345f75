"""A run over a set behind a URL is the run over the folder."""

import functools
import json
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from clipdist.cli import main


class Ranges(SimpleHTTPRequestHandler):
    """A file server that knows ranges, as object stores do."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data, wanted = path.read_bytes(), self.headers.get("Range", "")
        first, last = 0, len(data) - 1
        if wanted.startswith("bytes="):
            start, _, end = wanted[6:].partition("-")
            first, last = int(start), min(int(end or last), last)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        self.wfile.write(data[first : last + 1])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url(shapes: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Ranges, directory=str(shapes)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.usefixtures("signal_handlers")
def test_training_from_a_url_equals_training_from_the_folder(
    url: str, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path = recipe(train__epochs=2, data__workers=2)
    assert main(["train", str(path), "name=folder"]) == 0
    cache = f"data.remote.cache_folder={tmp_path / 'cache'}"
    assert main(["train", str(path), "name=url", f"data.set={url}", cache]) == 0
    runs = [_lines(tmp_path / "runs" / name / "metrics.jsonl") for name in ("folder", "url")]
    assert len(runs[0]) == len(runs[1]) > 10
    for here, there in zip(*runs, strict=True):
        for key in here.keys() & {"step", "data/digest", "train/loss", "val/loss"}:
            assert here[key] == there[key], f"{key} at step {here['step']}"
    environment = json.loads((tmp_path / "runs" / "url" / "environment.json").read_text())
    assert url in json.dumps(environment)


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
