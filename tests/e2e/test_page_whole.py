"""The page over all of a service: a gallery that `clipdist embed` made, maps of what a model looked at, classes."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipdist.cli import main
from tests.conftest import SHAPES, TrainedRun, picture
from tests.e2e.conftest import serving

expect = pytest.importorskip("playwright.sync_api").expect

pytestmark = pytest.mark.browser


def test_gallery_map_and_classes_of_a_trained_model(
    trained_run: TrainedRun, chromium: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, gallery = trained_run.folder / "model", tmp_path / "gallery"
    assert main(["embed", str(model), "--data", str(trained_run.shapes), "--out", str(gallery)]) == 0
    (tmp_path / "classes.txt").write_text("\n".join(SHAPES) + "\n", encoding="utf-8")
    words = ["--gallery", str(gallery), "--classes", str(tmp_path / "classes.txt")]
    with serving(model, words, tmp_path) as address:
        page = chromium.new_page(viewport={"width": 1280, "height": 900})
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: faults.append(request.url) if elsewhere(request.url, address) else None)
        page.goto(address)
        expect(page.locator("header")).to_contain_text("gallery of 200")

        shown = picture("red", "square", "centre")
        page.set_input_files("#picture-file", {"name": "a.png", "mimeType": "image/png", "buffer": shown})
        page.wait_for_selector(".bars")
        neighbours = page.locator("#picture-result .hit img")
        expect(neighbours.first).to_be_visible()
        assert loaded(page, "#picture-result .hit img")

        before = pixels_of(page)
        with page.expect_response("**/api/relevance") as answer:
            page.locator("#picture-result .bars button").first.click()
        assert answer.value.status == 200
        expect(page.locator("#overlay")).to_be_visible()
        assert loaded(page, "#overlay")
        assert not np.array_equal(before, pixels_of(page)), "the map lies over the picture"

        page.click("#tab-sentence")
        page.fill("#sentence-text", "A blue circle at the top.")
        page.keyboard.press("Enter")
        expect(page.locator("#sentence-result .hit").first).to_be_visible()
        assert loaded(page, "#sentence-result .hit img")
        page.close()
    assert not faults


def elsewhere(url: str, address: str) -> bool:
    return not url.startswith((address, "blob:", "data:"))


def loaded(page: Any, selector: str) -> bool:
    """Whether pictures are there, and all of them were received and decoded."""
    page.wait_for_function(
        "selector => [...document.querySelectorAll(selector)].slice(0, 4).every(one => one.naturalWidth > 0)",
        arg=selector,
    )
    return bool(page.locator(selector).count())


def pixels_of(page: Any) -> np.ndarray:
    """What the place of the picture looks like."""
    place = page.locator("#preview").locator("xpath=..")
    place.wait_for()
    return np.asarray(Image.open(io.BytesIO(place.screenshot())).convert("RGB"))
