"""A hook of mkdocs: the site has the repository's own paths, and whatever a page links to is part of it.

Pages are written for the repository, where `../launch/recipes/convirt.yaml` is a file. So every page is known to mkdocs
by its path in the repository, and what it links to outside docs/ comes along: Markdown as a page, other text as a page
that shows it, anything else as it is; a folder as its README, or else as a list of the pages in it. The pages of
commands and of a recipe's keys are made from the parsers and classes themselves.
"""

import argparse
import importlib
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from recipe_keys import recipe_keys

from clipdist.cli import VERBS

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
SHOWN = {".yaml": "yaml", ".py": "python", ".sh": "bash", ".txt": "text"}
"""Text that browsers would save rather than show, and its language."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Pages of docs/ under their paths in the repository, what the navigation names, and what any of them links to."""
    for file in list(files.documentation_pages()):
        files.remove(file)
        files.append(_at(File.generated(config, f"docs/{file.src_uri}", abs_src_path=file.abs_src_path)))
    files.append(_at(File.generated(config, "docs/commands.md", content=commands())))
    files.append(_at(File.generated(config, "docs/keys.md", content=recipe_keys())))
    waiting = [_bring(name, files, config) for name in _named(config.nav)]
    waiting += files.documentation_pages()
    while waiting:
        file = waiting.pop()
        if file and file.is_documentation_page():
            waiting += [_bring(target, files, config) for target in _targets(file).values()]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to folders and to text files lead to the pages that stand for them."""
    targets = _targets(page.file)
    folder = posixpath.dirname(page.file.src_uri)

    def instead(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        return before + posixpath.relpath(targets[target], folder) + after if target in targets else match[0]

    return LINK.sub(instead, markdown)


def _named(nav: Any) -> Iterator[str]:
    """Every page that the navigation names."""
    if isinstance(nav, str):
        yield nav
    else:
        for below in nav.values() if isinstance(nav, dict) else nav or ():
            yield from _named(below)


def _targets(file: File) -> dict[str, str]:
    """What a page links to within the repository -> the path of what stands for it on the site."""
    found = {}
    for _, target, _ in LINK.findall(file.content_string):
        name = posixpath.normpath(posixpath.join(posixpath.dirname(file.src_uri), target))
        path = ROOT / name
        if ":" not in target and path.exists() and path.is_relative_to(ROOT):
            shown = f"{name}/README.md" if path.is_dir() else f"{name}.md" if path.suffix in SHOWN else name
            found[target] = posixpath.normpath(shown)
    return found


def _bring(name: str, files: Files, config: MkDocsConfig) -> File | None:
    """Adds it; None where it is there already, or nowhere, of which mkdocs then complains."""
    path = ROOT / name
    source = path.with_suffix("")
    if files.get_file_from_path(name):
        return None
    if path.is_file():
        file = File.generated(config, name, abs_src_path=str(path))
    elif path.suffix == ".md" and source.suffix in SHOWN and source.is_file():
        text = source.read_text(encoding="utf-8")
        text = f"# `{source.relative_to(ROOT)}`\n\n````{SHOWN[source.suffix]}\n{text}````\n"
        file = File.generated(config, name, content=text)
    elif path.name == "README.md" and path.parent.is_dir():
        lines = [f"- [{heading(page)}]({page.name})" for page in sorted(path.parent.glob("*.md"))]
        text = f"# `{path.parent.relative_to(ROOT)}`\n\n" + "\n".join(lines) + "\n"
        file = File.generated(config, name, content=text)
    else:
        return None
    files.append(_at(file))
    return file


def _at(file: File) -> File:
    """The same, with docs/ left out of its address, and as HTML where it is a page."""
    address = file.src_uri.removeprefix("docs/")
    if file.is_documentation_page():
        address = re.sub(r"(^|/)README\.md$", r"\1index.md", address).removesuffix("md") + "html"
    file.dest_uri = address
    return file


def heading(page: Path) -> str:
    """A page's first heading."""
    found = re.search(r"^# (.+)$", page.read_text(encoding="utf-8"), re.M)
    return found[1] if found else page.stem


def commands() -> str:
    """A page that says what each verb of `clipdist` takes, in the words of its own help."""
    parts = ["# Commands\n", "What `clipdist VERB --help` says. Wrong input ends with exit code 2 and one line.\n"]
    for verb, (name, what) in VERBS.items():
        module = importlib.import_module(name)
        parser = argparse.ArgumentParser(
            prog=f"clipdist {verb}",
            description=module.__doc__,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=84),
        )
        module.add_arguments(parser)
        parts.append(f"## {verb}\n\n{what[0].upper()}{what[1:]}.\n\n```text\n{parser.format_help()}```\n")
    return "\n".join(parts)
