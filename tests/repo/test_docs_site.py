"""The documentation site builds without a warning, its links lead somewhere, and it loads nothing from elsewhere."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import unquote, urlsplit

import pytest

from clipdist.cli import VERBS
from clipdist.config import RunConfig

ROOT = Path(__file__).parents[2]
LOADED = {"script": "src", "img": "src", "source": "src", "iframe": "src", "link": "href", "object": "data"}
"""Elements that make a browser fetch what an attribute names."""
FOLLOWED = ("a", "area")
NO_CLOSING = ("br", "hr", "img", "input", "link", "meta", "source", "path", "circle")


@dataclass
class Page(HTMLParser):
    """What a page of HTML links to, loads, and can be linked to by."""

    path: Path
    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    prose: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.feed(self.path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag in FOLLOWED and "href" in given:
            self.links.append(given["href"])
        if tag in LOADED and LOADED[tag] in given and given.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(given[LOADED[tag]])
        if tag not in NO_CLOSING:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while tag in self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "p" in self.open and not {"code", "pre", "script", "style"} & set(self.open):
            self.prose.append(data)


def pages_of(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def broken_links(pages: dict[Path, Page]) -> Iterator[str]:
    """Links to files that are not there, and to places within pages that are not there."""
    for page in pages.values():
        for link in page.links:
            address = urlsplit(link)
            if address.scheme or address.netloc or page.path.name == "404.html":  # which cannot know where it is shown
                continue
            target = (page.path.parent / unquote(address.path)).resolve() if address.path else page.path
            if not target.is_file():
                yield f"{page.path.name}: {link}"
            elif address.fragment and target in pages and unquote(address.fragment) not in pages[target].ids:
                yield f"{page.path.name}: {link}, no such place"


def loaded_from_elsewhere(site: Path, pages: dict[Path, Page]) -> Iterator[str]:
    for page in pages.values():
        yield from (f"{page.path.name}: {name}" for name in page.loaded if urlsplit(name).netloc)
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        yield from (
            f"{sheet.name}: {name}" for name in re.findall(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^)\"']+)", text)
        )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", "docs/site/mkdocs.yml"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--site-dir", str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return pages_of(site)


def test_each_page_of_docs_is_there(site: Path, pages: dict[Path, Page]) -> None:
    for source in (ROOT / "docs").rglob("*.md"):
        assert (site / source.relative_to(ROOT / "docs")).with_suffix(".html") in pages
    for name in ("shards/index.html", "launch/accelerate/index.html", "benchmarks/results/index.html"):
        assert site / name in pages


def test_links_lead_somewhere(pages: dict[Path, Page]) -> None:
    assert sum(len(page.links) for page in pages.values()) > 1000
    assert list(broken_links(pages)) == []


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    assert all(page.loaded for page in pages.values())
    assert list(loaded_from_elsewhere(site, pages)) == []


def test_markdown_is_read_as_on_the_repository(pages: dict[Path, Page]) -> None:
    """Lists and tables that need an empty line before them, or fences that do not close, end up as prose."""
    for page in pages.values():
        found = re.search(r"^(?:[-*] |\|.*\||\d+\. |```|#+ |::: )", "".join(page.prose), re.M)
        assert not found, f"{page.path.name}: {found and found[0]}"


def test_the_reference_names_what_is_public(site: Path, pages: dict[Path, Page]) -> None:
    expected = {
        "use": ["load", "model.saved.SavedModel.encode_text", "model.saved_classifier.SavedClassifier.names"],
        "loss": ["loss.ContrastiveLoss.forward"],
        "data": ["data.shards.ShardSet.open", "data.sets.writer.ShardSetWriter.write"],
        "evaluate": ["evaluate.retrieval.retrieval_scores", "evaluate.subgroups.subgroup_scores"],
    }
    for name, places in expected.items():
        assert {f"clipdist.{place}" for place in places} <= pages[site / "api" / f"{name}.html"].ids
    assert set(VERBS) <= pages[site / "commands.html"].ids


def test_the_example_of_a_shard_set_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "api" / "data.md").read_text(encoding="utf-8")
    example = page.split("```python\n")[1].split("```")[0]
    (tmp_path / "a.jpg").write_bytes(b"a picture")
    command = [sys.executable, "-c", example]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "1 ['a small symmetric nevus'] patient 7\n", done.stderr


def test_each_key_of_a_recipe_is_told(pages: dict[Path, Page], site: Path) -> None:
    page = (site / "keys.html").read_text(encoding="utf-8")
    rows = re.findall(r"<tr>\s*<td><code>([\w.\[\]]+)</code></td>(.*?)</tr>", page, re.S)
    told = {key: re.findall(r"<td>(.*?)</td>", rest, re.S) for key, rest in rows}
    expected = {key for key, kind in leaves(RunConfig)}
    assert {key for key in told if "[]" not in key} == expected
    silent = [key for key, (kind, _, meaning) in told.items() if not (kind and meaning)]
    assert silent == [], "a string after the key's declaration says what it means"
    assert told["train.global_batch"][1] == ""
    assert told["optim.betas"][1] == "<code>[0.9, 0.98]</code>"
    assert "train.stages[].from_epoch" in told


def leaves(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of the configuration, by its types rather than by its source text."""
    for name, below in get_type_hints(kind).items():
        if is_dataclass(below):
            yield from leaves(below, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", below


@pytest.mark.browser
def test_it_is_searched_without_a_server(site: Path, chromium: Any) -> None:
    asked: list[str] = []
    page = chromium.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: pytest.fail(str(error)))
    page.goto((site / "index.html").as_uri())
    page.click("input.md-search__input")
    page.keyboard.type("preemption")
    found = page.wait_for_selector("a.md-search-result__link")
    assert ".html" in (found.get_attribute("href") or "")
    page.close()
    assert all(urlsplit(address).scheme in ("file", "data", "blob", "about") for address in asked), asked


def test_what_is_wrong_is_seen(tmp_path: Path) -> None:
    (tmp_path / "here.html").write_text(
        '<link rel="stylesheet" href="//fonts.example/x.css"><script src="https://cdn.example/x.js"></script>'
        '<h1 id="top">x</h1><a href="gone.html">1</a><a href="here.html#nowhere">2</a><a href="#top">3</a>'
        "<p>Text\n- swallowed</p>"
    )
    (tmp_path / "x.css").write_text('@import "https://fonts.example/y.css"; a { background: url(local.png) }')
    pages = pages_of(tmp_path)
    assert list(broken_links(pages)) == ["here.html: gone.html", "here.html: here.html#nowhere, no such place"]
    assert len(list(loaded_from_elsewhere(tmp_path, pages))) == 3
    assert "- swallowed" in "".join(pages[tmp_path / "here.html"].prose)
