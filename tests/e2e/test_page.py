"""The page of `clipdist serve`: everything that one can do on it.

What the small model lacks (a gallery, a queue that is slow) is answered by routes that stand between page and service.
"""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import COLOURS, SHAPES, picture
from tests.e2e.conftest import ATTACK, MOST_BYTES, Opening

expect = pytest.importorskip("playwright.sync_api").expect

pytestmark = pytest.mark.browser

SQUARE: dict[str, Any] = {"name": "square.png", "mimeType": "image/png", "buffer": picture("red", "square", "centre")}


def shares(page: Any) -> list[float]:
    """The percentages beside the bars."""
    texts = page.locator("#picture-result .bars .value").all_inner_texts()
    return [0.0 if "<" in text else float(text.removesuffix(" %")) for text in texts]


def put(page: Any, file: dict[str, Any] = SQUARE) -> None:
    page.set_input_files("#picture-file", file)


def test_a_picture_gives_classes_and_captions(opened: Opening) -> None:
    page = opened()
    put(page)
    page.wait_for_selector(".bars")
    names = page.locator(".bars .name").all_inner_texts()
    assert sorted(names) == sorted(f"a drawn {shape}" for shape in SHAPES)
    found = shares(page)
    assert sum(found) == pytest.approx(100, abs=0.5)
    assert found == sorted(found, reverse=True)
    widths = [
        float(width.removesuffix("%"))
        for width in page.locator(".bars .fill").evaluate_all("all => all.map(one => one.style.width)")
    ]
    assert widths == pytest.approx(found, abs=0.06)
    expect(page.locator(".badge", has_text="not calibrated")).to_be_visible()
    expect(page.locator("#preview")).to_be_visible()
    expect(page.locator("#picture-name")).to_have_text(re.compile(r"^square\.png · 40 × 40 · [\d.]+ KiB$"))
    expect(page.locator("#announce")).to_contain_text(f"Done: {names[0]}")


def test_what_the_data_say_is_never_markup(opened: Opening) -> None:
    page = opened()
    put(page)
    expect(page.locator(".captions .words", has_text="<img src=x")).to_have_text(ATTACK)
    assert page.locator(".captions img").count() == 0


def test_the_split_of_the_calibration_is_named(opened: Opening) -> None:
    page = opened(about={"calibrated_on": "val"})
    put(page)
    expect(page.locator(".badge.good")).to_have_text("calibrated on val")


def test_the_classes_beyond_those_shown_have_a_bar(opened: Opening) -> None:
    page = opened()
    few = {
        "classes": [{"name": "a", "title": "a", "probability": 0.5}, {"name": "b", "title": "b", "probability": 0.3}]
    }
    answer = {**few, "captions": [], "neighbours": [], "seconds": 0.01, "batched_with": 2}
    page.route("**/api/image", lambda route: route.fulfill(json=answer))
    put(page)
    expect(page.locator(".bars .rest")).to_have_text("all other classes20.0 %")
    expect(page.locator(".timing")).to_contain_text("in a batch of 2")


def test_a_service_without_classes_says_how_to_name_some(opened: Opening) -> None:
    page = opened(about={"classes": []})
    expect(page.locator("#picture-result")).to_contain_text("the classes that you name")
    expect(page.locator("#picture-result")).not_to_contain_text("its classes", use_inner_text=True)
    answer = {"classes": [], "captions": [], "neighbours": [], "seconds": 0.01, "batched_with": 1}
    page.route("**/api/image", lambda route: route.fulfill(json=answer))
    put(page)
    expect(page.locator("#picture-result")).to_contain_text("Name some under “Your own classes”")


def test_pasted_with_the_keyboard(opened: Opening, served: str) -> None:
    page = opened(permissions=["clipboard-read", "clipboard-write"])
    page.evaluate(
        """async (bytes) => {
            const blob = new Blob([new Uint8Array(bytes)], { type: "image/png" });
            await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
        }""",
        list(SQUARE["buffer"]),
    )
    page.keyboard.press("Control+V")
    page.wait_for_selector(".bars")
    assert sum(shares(page)) == pytest.approx(100, abs=0.5)


def test_dropped_anywhere(opened: Opening) -> None:
    page = opened()
    page.click("#tab-model")
    dropped = page.evaluate_handle(
        """(bytes) => {
            const given = new DataTransfer();
            given.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
            return given;
        }""",
        list(SQUARE["buffer"]),
    )
    page.dispatch_event("body", "dragover", {"dataTransfer": dropped})
    expect(page.locator("#dropping")).to_be_visible()
    page.dispatch_event("body", "drop", {"dataTransfer": dropped})
    expect(page.locator("#dropping")).to_be_hidden()
    expect(page.locator("#picture-name")).to_contain_text("dropped.png")
    page.wait_for_selector("#picture .bars")


def test_a_still_from_the_camera(opened: Opening) -> None:
    page = opened()
    page.click("#camera")
    page.click("#camera-take:not([disabled])")
    expect(page.locator("#picture-name")).to_contain_text("camera.jpg")
    page.wait_for_selector(".bars")
    expect(page.locator("#camera-dialog")).to_be_hidden()
    assert page.evaluate("document.getElementById('camera-video').srcObject") is None  # its light is off again


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            "navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('no', 'NotAllowedError'); };",
            "not allowed",
        ),
        (
            "navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('no', 'NotFoundError'); };",
            "No camera",
        ),
        ("Object.defineProperty(navigator, 'mediaDevices', { value: undefined });", "https and on localhost"),
    ],
)
def test_no_camera_is_explained(opened: Opening, script: str, said: str) -> None:
    page = opened(script=script)
    page.click("#camera")
    expect(page.locator("#camera-message")).to_contain_text(said)
    expect(page.locator("#camera-take")).to_be_disabled()
    page.keyboard.press("Escape")
    expect(page.locator("#camera-dialog")).to_be_hidden()


def test_classes_in_the_users_own_words(opened: Opening) -> None:
    page = opened()
    put(page)
    page.wait_for_selector(".bars")
    page.fill("#words", "something red")
    page.click("text=Use these words")
    expect(page.locator("#words-error")).to_contain_text("two classes or more")
    page.fill("#words", "something red\nsomething blue, something green")
    page.click("text=Use these words")
    expect(page.locator("h2", has_text="Your classes")).to_be_visible()
    expect(page.locator("#words-error")).to_be_hidden()
    assert sorted(page.locator(".bars .name").all_inner_texts()) == [
        "something blue",
        "something green",
        "something red",
    ]
    assert sum(shares(page)) == pytest.approx(100, abs=0.5)
    expect(page.locator(".badge", has_text="not calibrated for these words")).to_be_visible()
    page.click("#words-clear")
    expect(page.locator(".bars .name", has_text="a drawn square")).to_be_visible()


def test_the_place_in_the_queue_shows_and_a_request_can_be_cancelled(opened: Opening) -> None:
    page = opened()
    tickets: dict[str, list[str]] = {"sent": [], "asked": []}
    held = []

    def hold(route: Any) -> None:
        tickets["sent"].append(route.request.headers["x-ticket"])
        held.append(route)

    def place(route: Any) -> None:
        tickets["asked"].append(route.request.url.rpartition("/")[2])
        route.fulfill(json={"position": max(1, 4 - len(tickets["asked"]))})

    page.route("**/api/image", hold)
    page.route("**/api/queue/*", place)
    put(page)
    expect(page.locator(".waiting")).to_contain_text("number 3 in the queue")
    expect(page.locator(".waiting")).to_contain_text("number 1 in the queue")
    assert set(tickets["asked"]) == set(tickets["sent"])
    page.click("text=Cancel")
    expect(page.locator(".waiting")).to_have_count(0)
    asked = len(tickets["asked"])
    page.wait_for_timeout(900)
    assert len(tickets["asked"]) <= asked + 1  # one may have been on its way
    expect(page.locator(".stopped")).to_contain_text("Cancelled.")
    page.unroute("**/api/image")
    page.click(".stopped button")
    page.wait_for_selector(".bars")
    expect(page.locator(".stopped")).to_have_count(0)


def test_a_busy_service_is_asked_again_after_the_time_it_named(opened: Opening) -> None:
    page = opened()
    busy = {"error": {"status": 503, "message": "9 requests are waiting already; try again in a moment"}}
    page.route(
        "**/api/image", lambda route: route.fulfill(status=503, headers={"Retry-After": "1"}, json=busy), times=1
    )
    put(page)
    expect(page.locator(".failed")).to_contain_text("9 requests are waiting already")
    button = page.locator(".failed button")
    expect(button).to_have_text("Try again in 1 s")
    expect(button).to_be_disabled()
    expect(button).to_be_enabled()
    button.click()
    page.wait_for_selector(".bars")
    expect(page.locator(".failed")).to_have_count(0)


def test_a_service_that_is_gone_is_said_so(opened: Opening) -> None:
    page = opened()
    page.route("**/api/image", lambda route: route.abort("connectionrefused"))
    put(page)
    expect(page.locator(".failed")).to_contain_text("cannot be reached")
    page.unroute("**/api/image")
    page.click(".failed button")
    page.wait_for_selector(".bars")


def test_a_file_that_is_no_picture_is_refused_in_words(opened: Opening) -> None:
    page = opened()
    put(page, {"name": "notes.png", "mimeType": "image/png", "buffer": b"not a picture at all"})
    expect(page.locator(".failed")).to_contain_text("expected JPEG, PNG")
    expect(page.locator("#unseen")).to_be_visible()
    put(page)
    page.wait_for_selector(".bars")
    expect(page.locator(".failed")).to_have_count(0)


def test_a_picture_that_only_the_model_can_read(opened: Opening) -> None:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(SQUARE["buffer"])).save(buffer, "TIFF")
    page = opened()
    put(page, {"name": "square.tif", "mimeType": "image/tiff", "buffer": buffer.getvalue()})
    page.wait_for_selector(".bars")
    expect(page.locator("#unseen")).to_be_visible()
    expect(page.locator("#frame")).to_be_hidden()


def test_too_large_a_file_is_never_sent(opened: Opening) -> None:
    page = opened()
    sent = []
    page.on("request", lambda request: request.method == "POST" and sent.append(request.url))
    put(page, {**SQUARE, "buffer": SQUARE["buffer"] + b"\0" * MOST_BYTES})
    expect(page.locator(".failed")).to_contain_text("takes up to 195 KiB")
    page.fill("#words", ",".join(f"class number {n}" for n in range(50)))
    page.click("text=Use these words")
    expect(page.locator("#words-error")).to_contain_text("200 characters")
    page.click("#tab-batch")
    page.set_input_files("#batch-files", [{**SQUARE, "name": "vast.png", "buffer": b"\0" * MOST_BYTES}, SQUARE])
    expect(page.locator("#batch .failed")).to_contain_text("vast.png has 195 KiB")
    assert not sent
    page.click("text=Go on without")
    expect(page.locator("#batch-count")).to_have_text("1 of 1 pictures done")


def test_a_picture_of_too_many_pixels_is_never_sent(opened: Opening) -> None:
    page = opened(about={"limits": {"max_image_pixels": 1000}})
    put(page)
    expect(page.locator(".failed")).to_contain_text("The picture has 0.002 megapixels")


def test_many_pictures_become_one_table(opened: Opening, tmp_path: Path) -> None:
    page = opened()
    page.click("#tab-batch")
    requests = []
    page.on("request", lambda request: "/api/batch" in request.url and requests.append(request))
    names = ['a "red" one, square.png', "b.png", "c.png"]
    given = [{**SQUARE, "name": name} for name in names] + [{**SQUARE, "name": "bad.png", "buffer": b"nothing"}]
    page.set_input_files("#batch-files", given)
    expect(page.locator("#batch-count")).to_have_text("4 of 4 pictures done")
    assert len(requests) == 2  # of two pictures each, as the service was told
    assert page.locator("#batch-progress").evaluate("bar => bar.value / bar.max") == 1
    with page.expect_download() as download:
        page.click("text=Download CSV")
    download.value.save_as(tmp_path / "table.csv")
    assert download.value.suggested_filename == "clipdist.csv"
    rows = list(csv.reader(io.StringIO((tmp_path / "table.csv").read_text(encoding="utf-8"))))
    assert rows[0][:3] == ["filename", "class1", "probability1"]
    assert "probability3" in rows[0]
    assert len(rows) == 5
    assert [row[0] for row in rows[2:]] == ["b.png", "c.png", "bad.png"]
    assert rows[2][1].startswith("a drawn ")
    assert 0 < float(rows[2][2]) <= 1
    assert "expected JPEG" in rows[4][-1]
    shown = page.locator("#batch-result tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )
    assert shown == rows  # read by the standard library and by the page


def test_a_batch_that_failed_goes_on_where_it_was(opened: Opening) -> None:
    page = opened()
    page.click("#tab-batch")
    seen = []

    def sometimes(route: Any) -> None:
        seen.append(route.request.post_data_buffer.count(b"\x89PNG"))
        if len(seen) == 2:
            route.fulfill(status=500, json={"error": {"status": 500, "message": "something went wrong here"}})
        else:
            route.continue_()

    page.route("**/api/batch", sometimes)
    page.set_input_files("#batch-files", [{**SQUARE, "name": f"{n}.png"} for n in range(5)])
    expect(page.locator("#batch .failed")).to_contain_text("something went wrong here")
    expect(page.locator("#batch-count")).to_have_text("2 of 5 pictures done, stopped")
    expect(page.locator("#batch-download")).to_be_visible()  # what is there is there
    page.click("#batch .failed >> text=Go on")
    expect(page.locator("#batch-count")).to_have_text("5 of 5 pictures done")
    assert seen == [2, 2, 2, 1]
    assert page.locator("#batch-result tbody tr").count() == 5


HITS = [
    {"row": row, "key": f"key-{row} {ATTACK}", "text": f"{ATTACK} text {row}", "score": 0.9 - row / 10}
    for row in range(3)
]


def with_gallery(opened: Opening, **options: Any) -> Any:
    """A page whose service has a gallery of three pictures and draws maps."""
    page = opened(about={"gallery": {"rows": 3}, "relevance": True}, **options)
    page.route("**/api/text", lambda route: route.fulfill(json={"hits": HITS, "seconds": 0.01}))

    def thumbnail(route: Any) -> None:
        row = int(route.request.url.split("/")[-2])
        buffer = io.BytesIO()
        Image.open(io.BytesIO(picture(COLOURS[row], "circle", "centre"))).save(buffer, "JPEG")
        route.fulfill(body=buffer.getvalue(), content_type="image/jpeg")

    def neighbours(route: Any) -> None:
        route.fulfill(json={**route.fetch().json(), "neighbours": HITS})

    page.route("**/api/gallery/*/thumbnail*", thumbnail)
    page.route("**/api/image", neighbours)
    return page


def test_a_sentence_finds_pictures_of_which_one_becomes_the_query(opened: Opening) -> None:
    page = with_gallery(opened)
    page.click("#tab-sentence")
    page.fill("#sentence-text", "a blue circle")
    page.keyboard.press("Enter")
    images = page.locator("#sentence-result .hit img")
    expect(images).to_have_count(3)
    for image in images.all():
        expect(image).to_have_js_property("naturalWidth", 40)
    expect(page.locator("#sentence-result .hit .words").first).to_have_text(HITS[0]["text"])
    expect(page.locator("#sentence-result .hit .key").first).to_have_text(HITS[0]["key"])
    assert page.locator("#sentence-result .hit .value").all_inner_texts() == ["0.900", "0.800", "0.700"]
    page.locator("#sentence-result .hit").nth(2).click()
    expect(page.locator("#picture")).to_be_visible()
    expect(page.locator("#picture-name")).to_contain_text("key-2")
    page.wait_for_selector("#picture .bars")
    expect(page.locator("#picture-result .hit")).to_have_count(3)  # its own neighbours


def test_a_sentence_needs_a_gallery_and_has_a_limit(opened: Opening) -> None:
    page = opened()
    page.click("#tab-sentence")
    expect(page.locator("#sentence")).to_contain_text("--gallery EMBEDDINGS")
    expect(page.locator("#sentence-form")).to_be_hidden()
    page = with_gallery(opened)
    sent = []
    page.on("request", lambda request: "/api/text" in request.url and sent.append(request))
    page.click("#tab-sentence")
    page.fill("#sentence-text", "a" * 201)
    page.keyboard.press("Enter")
    expect(page.locator("#sentence-error")).to_contain_text("takes up to 200 characters")
    assert not sent
    page.click("#suggestions >> text=a drawn bar")
    expect(page.locator("#sentence-result .hit")).to_have_count(3)
    assert json.loads(sent[0].post_data)["text"] == "a drawn bar"


@pytest.mark.parametrize("shape", [(40, 40), (80, 40)], ids=["square", "wide"])
def test_a_class_shows_what_in_the_picture_speaks_for_it(opened: Opening, shape: tuple[int, int]) -> None:
    page = with_gallery(opened)
    asked = []

    def draw(route: Any) -> None:
        asked.append(route.request.post_data_buffer)
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), "yellow").save(buffer, "PNG")
        route.fulfill(body=buffer.getvalue(), content_type="image/png")

    page.route("**/api/relevance", draw)
    buffer = io.BytesIO()
    Image.new("RGB", shape, "blue").save(buffer, "PNG")
    put(page, {**SQUARE, "buffer": buffer.getvalue()})
    row = page.locator(".bars button").first
    row.click()
    expect(page.locator("#overlay")).to_be_visible()
    expect(row).to_have_attribute("aria-pressed", "true")
    assert re.search(rb'name="text"\r\n\r\n(\w+)\r\n', asked[0])
    if shape == (40, 40):
        page.locator("#map-strength").fill("40")
        assert page.locator("#overlay").evaluate("map => map.style.opacity") == "0.4"
    else:  # what the map covers is not the whole picture, so it does not lie over it
        expect(page.locator("#map-apart")).to_be_visible()
        expect(page.locator("#map-over")).to_be_hidden()
        expect(page.locator("#preview")).to_be_hidden()
    page.uncheck("#map-shown")
    expect(page.locator("#overlay")).to_be_hidden()
    expect(page.locator("#preview")).to_be_visible()
    page.locator(".captions button").first.click()
    expect(page.locator("#map-text")).to_contain_text(page.locator(".captions .words").first.inner_text())
    put(page)
    expect(page.locator("#map")).to_be_hidden()


def test_the_model_its_scores_and_its_limits(opened: Opening, served: str) -> None:
    scores = [{"title": "image to text R@1", "value": 0.112, "low": 0.083, "high": 0.147, "gallery": 385}]
    page = opened(about={"scores": scores, "notice": "For research only."})
    page.click("#tab-model")
    # Waits until the tab is open: of hidden cells it would be the text without what parts them.
    expect(page.locator("#scores tbody td:visible")).to_have_text(["0.112", "0.083 to 0.147", "385"])
    expect(page.locator("#scores tbody th:visible")).to_have_text(["image to text R@1"])
    expect(page.locator("#model")).to_contain_text("195 KiB")
    expect(page.locator("#model pre")).to_contain_text(f"{served}api/image")
    expect(page.locator("footer")).to_contain_text("For research only.")
    link = page.locator("#model a[href='/openapi.json']")
    assert page.request.get(served + link.get_attribute("href")[1:]).json()["openapi"]


def test_a_service_without_a_notice_of_its_own_has_one(opened: Opening) -> None:
    page = opened()
    expect(page.locator("footer")).to_be_in_viewport()
    assert len(page.locator("footer p").inner_text()) > 20


def test_a_service_that_still_loads_is_asked_again(opened: Opening) -> None:
    page = opened(ready=False, about={})
    loading = {"error": {"status": 503, "message": "the model is being loaded"}}
    page.route("**/api/about", lambda route: route.fulfill(status=503, json=loading), times=1)
    page.reload()
    expect(page.locator("#starting")).to_contain_text("the model is being loaded Asking again")
    page.wait_for_selector("#picture:not([hidden])")


def test_with_the_keyboard_alone(opened: Opening) -> None:
    page = opened()
    # Choosers are caught only once someone listens, and the browser is not waited for: a key pressed right after the
    # first listener comes can be faster. So one listens from the start.
    page.on("filechooser", lambda _: None)
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.focus("#tab-picture")
    for key, name in [("ArrowRight", "sentence"), ("End", "model"), ("ArrowRight", "picture"), ("ArrowLeft", "model")]:
        page.keyboard.press(key)
        expect(page.locator(f"#tab-{name}")).to_be_focused()
        expect(page.locator(f"#{name}")).to_be_visible()
        expect(page.locator("[role=tabpanel]:visible")).to_have_count(1)
    page.go_back()
    expect(page.locator("#picture")).to_be_visible()
    page.focus("#choose")
    expect(page.locator("#choose")).to_be_focused()
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(SQUARE)
    page.wait_for_selector(".bars")
