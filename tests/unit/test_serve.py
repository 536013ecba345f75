"""What the service answers, against the model asked without it."""

import csv
import io
import json
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from clipdist import __version__
from clipdist.errors import UserError
from clipdist.publish.serve import app as serve_app
from clipdist.publish.serve import service as serve_service
from tests.conftest import SHAPES, picture
from tests.unit.serving import (
    CAPTIONS,
    CLASSES,
    FakeGallery,
    classifier,
    client_of,
    dual_encoder,
    make_service,
)

RED = picture("red", "square", "left")
BLUE = picture("blue", "circle", "top", seed=1)


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with client_of(make_service(gallery=FakeGallery(dual_encoder()))) as made:
        yield made


@pytest.fixture(scope="module")
def of_classifier() -> Iterator[TestClient]:
    with client_of(make_service(classifier())) as made:
        yield made


def problem(response: Any, status: int) -> str:
    """The message of an error of that status; nothing within the service shows in it."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"status", "message"}
    assert body["error"]["status"] == status
    message: str = body["error"]["message"]
    for secret in ("/", "Traceback", "0x", "Error", "clipdist."):
        assert secret not in message.replace("multipart/form-data", ""), message
    return message


def test_about_says_what_is_served(client: TestClient, of_classifier: TestClient) -> None:
    body = client.get("/api/about").json()
    assert (body["name"], body["kind"], body["width"], body["version"]) == ("tiny", "dual_encoder", 32, __version__)
    assert body["classes"] == [{"name": value, "title": names[0]} for value, names in CLASSES.items()]
    assert body["temperature"] == pytest.approx(dual_encoder().temperature)
    assert body["gallery"] == {"rows": len(CAPTIONS)}
    assert body["captions"] == len(CAPTIONS)
    assert body["limits"]["max_queue"] == 64
    assert "somewhere" not in json.dumps(body), "a path of the training data"
    other = of_classifier.get("/api/about").json()
    assert (other["kind"], other["gallery"], other["captions"]) == ("classifier", None, 0)
    assert [one["name"] for one in other["classes"]] == SHAPES
    assert other["temperature"] == 1.5


def test_an_image_gets_what_the_model_says_of_it(client: TestClient) -> None:
    body = client.post("/api/image", files={"image": RED}, data={"top": "3"}).json()
    saved = dual_encoder()
    truth_K = saved.zero_shot(CLASSES).predict_proba([RED])[0]
    order = np.argsort(-truth_K)[:3]
    assert [one["name"] for one in body["classes"]] == [list(CLASSES)[k] for k in order]
    assert [one["title"] for one in body["classes"]] == [SHAPES[k] for k in order]
    assert [one["probability"] for one in body["classes"]] == pytest.approx(truth_K[order].tolist(), abs=1e-5)
    cosine_C = saved.encode_text(CAPTIONS) @ saved.encode_image([RED])[0]
    best = np.argsort(-cosine_C)
    assert [one["text"] for one in body["captions"]] == [CAPTIONS[c] for c in best[:5]]
    assert [one["score"] for one in body["captions"]] == pytest.approx(cosine_C[best[:5]].tolist(), abs=1e-5)
    assert [one["row"] for one in body["neighbours"]] == best[:3].tolist()
    assert body["neighbours"][0]["text"] == CAPTIONS[best[0]]
    assert body["neighbours"][0]["key"] == f"key-{best[0]}"
    assert body["batched_with"] == 1
    assert 0 < body["seconds"] < 60


def test_own_words_take_the_place_of_the_classes(client: TestClient) -> None:
    for words in ("red, a green bar ,blue", "red\na green bar\n\nblue\nred"):
        body = client.post("/api/image", files={"image": RED}, data={"classes": words}).json()
        truth = dual_encoder().zero_shot(["red", "a green bar", "blue"]).classify([RED])[0]
        assert [one["name"] for one in body["classes"]] == [name for name, _ in truth]
        assert [one["probability"] for one in body["classes"]] == pytest.approx([p for _, p in truth], abs=1e-5)


def test_a_classifier_answers_with_its_own_classes(client: TestClient, of_classifier: TestClient) -> None:
    body = of_classifier.post("/api/image", files={"image": RED}, data={"top": 2}).json()
    truth = classifier().classify([RED], top=2)[0]
    assert [one["name"] for one in body["classes"]] == [name for name, _ in truth]
    assert [one["probability"] for one in body["classes"]] == pytest.approx([p for _, p in truth], abs=1e-5)
    assert body["captions"] == body["neighbours"] == []
    none = client.post("/api/image", files={"image": RED}, data={"classes": " , "})
    assert "found 0 different names" in problem(none, 422)
    asked = of_classifier.post("/api/image", files={"image": RED}, data={"classes": "a,b"})
    assert "classifier" in problem(asked, 409)
    assert "classifier" in problem(of_classifier.post("/api/text", json={"text": "a"}), 409)


def test_a_text_finds_the_nearest_rows(client: TestClient, of_classifier: TestClient) -> None:
    body = client.post("/api/text", json={"text": CAPTIONS[7], "top": 4}).json()
    assert len(body["hits"]) == 4
    assert body["hits"][0] == {"row": 7, "key": "key-7", "text": CAPTIONS[7], "score": pytest.approx(1, abs=1e-5)}
    with client_of(make_service()) as without:
        assert "--gallery" in problem(without.post("/api/text", json={"text": "a"}), 409)
        assert without.post("/api/image", files={"image": RED}).json()["neighbours"] == []
        assert "--gallery" in problem(without.get("/api/gallery/0/thumbnail"), 409)


def test_a_row_has_a_thumbnail(client: TestClient) -> None:
    response = client.get("/api/gallery/3/thumbnail?side=64")
    assert response.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(response.content)).size == (64, 32)
    assert problem(client.get("/api/gallery/1/thumbnail"), 404) == "the image of this row is not there any more"
    assert "rows 0 to 39" in problem(client.get("/api/gallery/40/thumbnail"), 404)
    for wrong in ("-1/thumbnail", "x/thumbnail", "3/thumbnail?side=1000000", f"{10**40}/thumbnail"):
        problem(client.get(f"/api/gallery/{wrong}"), 422)


def test_a_batch_is_a_table_with_a_line_for_each_file(client: TestClient) -> None:
    sent = [("a, b.png", RED), ("../../x/blue.png", BLUE), ("no.png", b"no image"), ("=1+1.png", RED), ("", BLUE)]
    response = client.post("/api/batch", files=[("images", one) for one in sent[:4]])
    assert response.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(response.text)))
    assert [row["filename"] for row in rows] == ["a, b.png", "blue.png", "no.png", "'=1+1.png"]
    assert list(rows[0])[:3] == ["filename", "class1", "probability1"]
    for row, image in ((rows[0], RED), (rows[1], BLUE)):
        truth = dual_encoder().zero_shot(CLASSES).classify([image])[0]
        assert [row[f"class{k}"] for k in (1, 2, 3)] == [CLASSES[name][0] for name, _ in truth[:3]]
        assert [float(row[f"probability{k}"]) for k in (1, 2, 3)] == pytest.approx([p for _, p in truth[:3]], abs=1e-5)
        assert row["caption"] in CAPTIONS
        assert row["error"] == ""
    cells = ("=1+1\r=cmd", "\n@a", "a -b")
    assert [serve_service._cell(text) for text in cells] == ["'=1+1 =cmd", "'@a", "a -b"]
    assert rows[2]["class1"] == rows[2]["caption"] == ""
    assert "no image of a known format" in rows[2]["error"]
    many = [("images", ("a.png", RED))] * 33
    assert "Maximum number of files is 32" in problem(client.post("/api/batch", files=many), 413)


def test_a_map_is_drawn_by_the_models_own_module(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_service.Service, "maps", property(lambda self: False))
    asked = {"files": {"image": RED}, "data": {"text": "s0"}}
    assert "no relevance map" in problem(client.post("/api/relevance", **asked), 501)
    monkeypatch.setattr(serve_service.Service, "maps", property(lambda self: True))
    said: list[Any] = []

    def relevance_map(saved: Any, image: Any, text: str, method: str = "gradient") -> np.ndarray:
        said.append((image.size, text))
        return np.ones((32, 32), np.float32)

    fake: Any = types.ModuleType("relevance")
    fake.relevance_map, fake.overlay = relevance_map, lambda image, found: image
    monkeypatch.setitem(sys.modules, serve_service.RELEVANCE, fake)
    response = client.post("/api/relevance", **asked)
    assert response.headers["content-type"] == "image/png"
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(response.content))), dual_encoder().preprocess(RED).permute(1, 2, 0)
    )
    assert said == [((32, 32), "square")], "a class's name stands for its title"

    def refuse(*given: Any) -> None:
        raise UserError("/secret: this tower has none")

    fake.relevance_map = refuse
    assert "no relevance map" in problem(client.post("/api/relevance", **asked), 501)
    assert "found nothing" in problem(client.post("/api/relevance", files={"image": RED}), 422)


def test_wrong_requests_are_told_what_is_wrong(client: TestClient) -> None:
    post = client.post
    assert "found no file" in problem(post("/api/image", files={"picture": RED}), 422)
    assert "found no file" in problem(post("/api/image", files={"image": (None, "text")}), 422)
    assert "Maximum number of files is 1" in problem(post("/api/image", files=[("image", RED), ("image", RED)]), 413)
    assert "multipart/form-data" in problem(post("/api/image", content=RED), 415)
    assert "multipart/form-data" in problem(post("/api/image", json={"image": "x"}), 415)
    headers = {"content-type": "multipart/form-data"}
    assert "Missing boundary" in problem(post("/api/image", content=RED, headers=headers), 400)
    headers = {"content-type": "multipart/form-data; boundary=x"}
    problem(post("/api/image", content=b"--y\r\nrubbish", headers=headers), 400)
    headers = {"content-type": "multipart/form-data; boundary=x; charset=undefined"}
    form = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + RED + b"\r\n--x--\r\n"
    assert "names cannot be read" in problem(post("/api/image", content=form, headers=headers), 400)
    assert "empty" in problem(post("/api/image", files={"image": b""}), 422)
    for text in (b"GIF89a", RED[:60], b"\xff\xd8\xff\xe0", b"II*\0" + bytes(20)):
        assert "cannot be read" in problem(post("/api/image", files={"image": text}), 422)
    for data in (b"%!PS-Adobe-3.0 EPSF-3.0\n", b"%PDF-1.4", b"<svg/>", b"MZ"):
        assert "no image of a known format" in problem(post("/api/image", files={"image": data}), 415)
    for top in ("0", "101", "-1", "x", "1e2", "1" * 5000, "²"):
        assert "from 1 to 100" in problem(post("/api/image", files={"image": RED}, data={"top": top}), 422)
    for words in ("alone", "same,same"):
        assert "expected 2 to 200" in problem(post("/api/image", files={"image": RED}, data={"classes": words}), 422)
    names = ",".join(map(str, range(201)))
    assert "found 201" in problem(post("/api/image", files={"image": RED}, data={"classes": names}), 422)


def test_wrong_texts_are_told_what_is_wrong(client: TestClient) -> None:
    post = client.post
    assert "1,000,000 characters" in problem(post("/api/text", json={"text": "a" * 10**6}), 422)
    for text in ("", " \n "):
        assert "found nothing" in problem(post("/api/text", json={"text": text}), 422)
    for body in ({}, {"text": 1}, {"text": "a", "top": 0}, {"text": "a", "top": "x"}, [], "x", None):
        problem(post("/api/text", json=body), 422)
    json_type = {"content-type": "application/json"}
    problem(post("/api/text", content=b'{"text": "\\ud800"}', headers=json_type), 422)
    assert problem(post("/api/text", content=b"[" * 10**6, headers=json_type), 400)
    assert problem(post("/api/text", content=b"{", headers=json_type), 422)
    own = {"files": {"image": RED}, "data": {"classes": "a," + "b" * 10**4}}
    assert "10,002 characters" in problem(post("/api/image", **own), 422)
    assert "1024KB" in problem(post("/api/image", files={"image": RED}, data={"classes": "b" * 2**21}), 413)
    escaped = (
        b'--x\r\nContent-Disposition: form-data; name="classes"\r\n\r\na,\\ud800\r\n--x\r\n'
        b'Content-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + RED + b"\r\n--x--\r\n"
    )
    headers = {"content-type": "multipart/form-data; boundary=x; charset=unicode_escape"}
    problem(post("/api/image", content=escaped, headers=headers), 422)


def test_routes_and_methods_that_do_not_exist(client: TestClient) -> None:
    problem(client.get("/nothing"), 404)
    problem(client.get("/docs"), 404)
    problem(client.get("/api/image"), 405)
    problem(client.get("/page/..%2fapp.py"), 404)
    problem(client.get("/page/app.py"), 404)
    assert problem(client.get("/api/about", headers={"host": "evil.example:80"}), 421)
    for host in ("localhost:1234", "[::1]:80", "127.0.0.1"):
        assert client.get("/api/about", headers={"host": host}).status_code == 200


def test_what_fails_within_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    service = make_service()

    def broken(*given: Any) -> None:
        raise RuntimeError("secret /etc/passwd")

    monkeypatch.setattr(service.engine, "_look", broken)
    with client_of(service) as client:
        assert "own log" in problem(client.post("/api/image", files={"image": RED}), 500)
        assert client.get("/healthz").json() == {"status": "ok"}
        assert 'route="/api/image",status="500"} 1.0' in client.get("/metrics").text


def test_the_page_may_load_its_own_files_alone(client: TestClient) -> None:
    response = client.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "img-src 'self' data: blob:" in policy
    assert "unsafe" not in policy
    for other in (response, client.get("/nothing"), client.get("/api/about"), client.post("/api/image")):
        assert other.headers["x-content-type-options"] == "nosniff"
        assert other.headers["x-frame-options"] == "DENY"
    for path in serve_app.PAGE.iterdir():
        if path.is_file():
            served = client.get(f"/page/{path.name}")
            assert served.content == path.read_bytes(), f"{path.name}: of a kind that is not served"


def test_it_tells_of_its_health_and_counts_what_it_does() -> None:
    service = make_service()
    with client_of(service) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        client.post("/api/image", files={"image": RED})
        client.post("/api/image", files={"image": b"x"})
        assert client.get("/api/queue").json() == {"waiting": 0, "limit": 64}
        assert client.get("/api/queue/unknown").json() == {"position": None}
        lines = client.get("/metrics").text.splitlines()
        for line in (
            'clipdist_requests_total{route="/api/image",status="200"} 1.0',
            'clipdist_requests_total{route="/api/image",status="415"} 1.0',
            'clipdist_batch_size_sum{kind="images"} 1.0',
            "clipdist_requests_inside 0.0",
            'clipdist_refused_total{reason="overload"} 0.0',
        ):
            assert line in lines
        service.batcher.close()
        assert problem(client.get("/healthz"), 503) == "the model has stopped"
        assert "ending" in problem(client.post("/api/image", files={"image": RED}), 503)
