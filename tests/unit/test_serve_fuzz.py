"""Whatever is sent, the answer is what the schema says, and never that something broke within."""

import io
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from PIL import Image
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance
from starlette.testclient import TestClient

from clipdist.publish.serve.limits import Limits
from tests.unit.pictures import photograph
from tests.unit.serving import URL, FakeGallery, client_of, dual_encoder, make_service, running

# Pillow's remarks on damaged metadata, which the command keeps to itself too.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")

PICTURE = photograph(90, 60)


def originals() -> dict[str, bytes]:
    """Pictures of every format and many kinds, small enough that many changes can be tried."""
    made = {}
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        ("JPEG", "RGB", {"quality": 80, "exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"}),
        ("JPEG", "CMYK", {"progressive": True}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("PNG", "I;16", {}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("WEBP", "RGB", {"quality": 60}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("TIFF", "F", {}),
        ("TIFF", "1", {"compression": "group4"}),
        ("GIF", "P", {"save_all": True, "append_images": [Image.new("P", (90, 60), 3)]}),
        ("BMP", "RGB", {}),
    ]
    for form, mode, options in kinds:
        grey = Image.fromarray(np.asarray(PICTURE.convert("L"), np.uint16) * 200)
        image = grey if mode == "I;16" else PICTURE.convert(mode)
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        made[f"{form}-{mode}"] = buffer.getvalue()
    return made


ORIGINALS = originals()


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    # A header that was changed may ask for anything up to the limit, and this is what decoding it then takes.
    with client_of(make_service(limits=Limits(max_image_pixels=2_000_000))) as made:
        yield made


@pytest.mark.parametrize("kind", ORIGINALS)
def test_a_sound_picture_is_read(client: TestClient, kind: str) -> None:
    response = client.post("/api/image", files={"image": ORIGINALS[kind]})
    assert response.status_code == 200, response.text


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_picture_is_refused_or_read(client: TestClient, data: st.DataObject) -> None:
    original = ORIGINALS[data.draw(st.sampled_from(sorted(ORIGINALS)))]
    damaged = bytearray(original)
    # Headers matter most: half of the changes hit the first 100 bytes.
    place = st.integers(0, min(100, len(damaged)) - 1) | st.integers(0, len(damaged) - 1)
    for where, bits in data.draw(st.lists(st.tuples(place, st.integers(1, 255)), max_size=8)):
        damaged[where] ^= bits
    end = data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))
    response = client.post("/api/image", files={"image": bytes(damaged[:end])})
    assert response.status_code in (200, 413, 415, 422), response.text
    if response.status_code != 200:
        assert response.json()["error"]["status"] == response.status_code
    elif bytes(damaged[:end]) == original:
        assert response.json()["classes"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.binary(max_size=300),
    kind=st.sampled_from(
        ["multipart/form-data; boundary=x", "application/json", "text/plain", "", "multipart/form-data; boundary=\xff"]
    ),
    path=st.sampled_from(["/api/image", "/api/batch", "/api/relevance", "/api/text"]),
    framed=st.booleans(),
)
def test_any_body_is_refused(client: TestClient, body: bytes, kind: str, path: str, framed: bool) -> None:
    content = b"--x\r\nContent-Disposition: form-data; name=" + body + b"\r\n--x--\r\n" if framed else body
    response = client.post(path, content=content, headers={"content-type": kind.encode("latin-1")})
    assert 400 <= response.status_code < 500, response.text
    assert response.json()["error"]["message"]


# That a string is no image, or that words are too few, no schema tells; nor is an unknown ticket wrong.
NOT_CHECKED = [positive_data_acceptance, negative_data_rejection]


def test_it_keeps_to_its_schema() -> None:
    with running(make_service(gallery=FakeGallery(dual_encoder()))) as port:
        schema = schemathesis.openapi.from_url(f"{URL}:{port}/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations()]
        assert len(operations) == 10
        for operation in operations:
            # 501 where no map can be drawn is no failure.
            excluded = [*NOT_CHECKED, *[not_a_server_error] * (operation.path == "/api/relevance")]
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                keeps_to_it(operation.as_strategy(generation_mode=mode), excluded)


def keeps_to_it(cases: Any, excluded: list[Any]) -> None:
    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(case=cases)
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(excluded_checks=excluded)

    with suppress(Unsatisfiable):  # a route that takes nothing cannot be given anything wrong
        check()


def test_the_schema_names_every_route() -> None:
    with client_of(make_service()) as client:
        paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {
        "/api/about",
        "/api/image",
        "/api/relevance",
        "/api/text",
        "/api/batch",
        "/api/gallery/{row}/thumbnail",
        "/api/queue",
        "/api/queue/{ticket}",
        "/healthz",
        "/metrics",
    }
