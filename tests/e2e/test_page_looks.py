"""The page of `clipdist serve`: names for screen readers, contrast, narrow screens, and what its policy forbids."""

import re

import pytest

from tests.e2e.conftest import ROOT, Opening
from tests.e2e.test_page import SQUARE, put, with_gallery

pytest.importorskip("playwright.sync_api")

pytestmark = pytest.mark.browser

PAGE = ROOT / "clipdist" / "publish" / "serve" / "page"


def test_every_control_has_a_name(opened: Opening) -> None:
    page = with_gallery(opened)
    put(page)
    page.wait_for_selector(".bars")
    for name in ("picture", "sentence", "batch", "model"):
        page.click(f"#tab-{name}")
        nameless = page.locator("button:visible, a:visible, input:visible, textarea:visible").evaluate_all(
            "all => all.filter(one => !(one.innerText || one.ariaLabel || one.labels?.length)).map(one => one.id)"
        )
        assert not nameless


# The contrast of every text on its ground, by WCAG 2's formula; those below 4.5.
FAINT = """() => {
  const rgba = (text) => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return { rgb: [r, g, b], a }; };
  const over = (top, under) => top.rgb.map((one, n) => one * top.a + under[n] * (1 - top.a));
  const light = (rgb) => rgb.map((one) => one / 255)
    .map((one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4))
    .reduce((sum, one, n) => sum + one * [0.2126, 0.7152, 0.0722][n], 0);
  const own = (one) => rgba(getComputedStyle(one).backgroundColor);
  const ground = (one) => one ? over(own(one), ground(one.parentElement)) : [255, 255, 255];
  const faint = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const one = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !one.checkVisibility()) continue;
    if (one.closest("#announce, .skip, :disabled")) continue;
    const [first, second] = [light(over(rgba(getComputedStyle(one).color), ground(one))), light(ground(one))];
    const contrast = (Math.max(first, second) + 0.05) / (Math.min(first, second) + 0.05);
    if (contrast < 4.5) faint.push(`${contrast.toFixed(2)} ${one.className} ${walker.currentNode.data.trim()}`);
  }
  return faint;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_and_fits_a_phone(opened: Opening, scheme: str) -> None:
    page = with_gallery(opened, color_scheme=scheme, viewport={"width": 390, "height": 844}, reduced_motion="reduce")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", ground))) / 3
    assert brightness < 60 if scheme == "dark" else brightness > 200
    page.route("**/api/relevance", lambda route: route.abort())
    put(page)
    page.wait_for_selector(".bars")
    page.locator(".bars button").first.click()
    page.wait_for_selector("#map-work .failed")
    page.evaluate("location.hash = '/batch'")
    page.set_input_files(
        "#batch-files", [SQUARE, {**SQUARE, "name": "a-name-as-long-as-cameras-and-scanners-give.png"}]
    )
    page.wait_for_selector("#batch-download:visible")
    page.evaluate("location.hash = '/sentence'")
    page.fill("#sentence-text", "a blue circle")
    page.keyboard.press("Enter")
    page.wait_for_selector("#sentence-result .hit")
    for name in ("picture", "sentence", "batch", "model"):
        page.evaluate("name => { location.hash = `/${name}`; }", name)
        page.wait_for_selector(f"#{name}:not([hidden])")
        assert not page.evaluate(FAINT)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name


def test_the_page_is_plain_and_keeps_to_the_policy() -> None:
    scripts = {path.name: path.read_text(encoding="utf-8") for path in PAGE.glob("*.js")}
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    for name, text in scripts.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )
    assert not re.search(r"<script(?![^>]*\bsrc=)|\sstyle=|\son[a-z]+=|<style", html)
    addresses = re.findall(
        r"https?://[^\s\"'<>]+", "".join([html, *scripts.values(), (PAGE / "page.css").read_text(encoding="utf-8")])
    )
    assert set(addresses) <= {"http://www.w3.org/2000/svg"}  # the name of a language, which nobody fetches
    assert (
        sum(
            bool(line.strip()) and not line.strip().startswith("//")
            for text in scripts.values()
            for line in text.splitlines()
        )
        < 600
    )
