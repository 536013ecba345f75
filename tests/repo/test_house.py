"""The rules of the house: what the documentation names exists, scripts parse, modules stay small and apart."""

import argparse
import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from clipdist.cli import VERBS
from clipdist.config import RunConfig

ROOT = Path(__file__).parents[2]
SCRIPT_FOLDERS = ("launch", "shards", "slurm", "benchmarks")
MAX_FILE, MAX_FUNCTION, MAX_TRAINING_LOOP = 500, 80, 120


def known_to_git() -> list[Path]:
    """Tracked files, and new ones that no rule ignores."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted({ROOT / name for name in names if name and (ROOT / name).is_file()})


FILES = known_to_git()
PAGES = [path for path in FILES if path.suffix == ".md" and path.name != "CHANGELOG.md"]
MODULES = [path for path in FILES if path.suffix == ".py" and path.is_relative_to(ROOT / "clipdist")]
SHELL = [
    path
    for path in FILES
    if path.suffix in (".sh", ".bash", ".sbatch")
    or path.read_bytes()[:40].startswith((b"#!/usr/bin/env bash", b"#!/bin/"))
]


def named(paths: list[Path]) -> list[Any]:
    return [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in paths]


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def commands(page: Path) -> list[list[str]]:
    """Every command of a page, as words: lines of code blocks, continued ones joined, and code within sentences."""
    text = text_of(page)
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.M | re.S)
    prose = re.sub(r"^```[a-z]*\n.*?^```", "", text, flags=re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines() + re.findall(r"`([^`\n]+)`", prose)
    found = []
    for line in lines:
        try:
            found.append(shlex.split(line, comments=True))
        except ValueError:  # an apostrophe in what is no command
            found.append(line.split())
    return [words for words in found if words]


def test_there_is_something_to_check() -> None:
    assert ROOT / "README.md" in PAGES
    assert ROOT / "docs" / "run.md" in PAGES
    assert len(MODULES) > 30
    assert ROOT / ".ci" / "run" in SHELL
    assert any("clipdist" in words for words in commands(ROOT / "README.md"))


@pytest.mark.parametrize("page", named(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if not re.match(r"[a-z]+:", target):
            file, _, _ = target.partition("#")
            assert (page.parent / file).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", named(PAGES))
def test_targets_of_make_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", text_of(ROOT / "Makefile"), re.M))
    for words in commands(page):
        if words[0] == "make":
            for target in words[1:]:
                assert target in targets or "=" in target, f"{page.name}: make {target}"


@pytest.mark.parametrize("page", named(PAGES))
def test_files_that_commands_name_exist(page: Path) -> None:
    made = {words[-1] for words in commands(page) if words[0] == "cp"}
    for words in commands(page):
        for word in words:
            inside = re.fullmatch(rf"({'|'.join(SCRIPT_FOLDERS)}|docs|tests|clipdist)/[\w./-]+", word)
            if inside and word not in made:
                assert (ROOT / word).exists(), f"{page.name} names {word}"


@pytest.mark.parametrize("page", named(PAGES))
def test_modules_that_commands_run_exist(page: Path) -> None:
    for words in commands(page):
        for option, module in pairwise(words):
            if option == "-m" and module.startswith("clipdist"):
                assert importlib.util.find_spec(module), f"{page.name}: -m {module}"


def parser_of(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=verb)
    importlib.import_module(VERBS[verb][0]).add_arguments(parser)
    return parser


@pytest.mark.parametrize("page", named(PAGES))
def test_verbs_and_their_options_exist(page: Path) -> None:
    for words in commands(page):
        starts = [n for n, word in enumerate(words[:-1]) if Path(word).name == "clipdist"]
        for verb, rest in ((words[n + 1], words[n + 2 :]) for n in starts):
            if not re.fullmatch("[a-z]+", verb):
                continue  # `clipdist VERB …`, or a folder
            assert verb in VERBS, f"{page.name}: clipdist {verb}"
            known = set(parser_of(verb)._option_string_actions)
            given = {word.partition("=")[0] for word in rest if word.startswith("--")}
            assert given <= known, f"{page.name}: clipdist {verb} has no {', '.join(given - known)}"


@pytest.mark.parametrize("page", named(PAGES))
def test_options_of_scripts_exist(page: Path) -> None:
    library = ROOT / "clipdist"
    adding = ("data/sets/pack_command.py", "cluster/submit.py", "prepare/captions.py")  # arguments to several scripts
    shared = "".join(text_of(library / path) for path in adding)
    for words in commands(page):
        for n, word in enumerate(words):
            if re.fullmatch(rf"({'|'.join(SCRIPT_FOLDERS)})/\w+\.py", word):
                for option in words[n + 1 :]:
                    if option.startswith("--"):
                        flag = f'"{option.partition("=")[0]}"'
                        assert flag in text_of(ROOT / word) or flag in shared, f"{page.name}: {word} has no {flag}"


def keys_of(kind: Any, prefix: str = "") -> Iterator[str]:
    for name, below in get_type_hints(kind).items():
        yield f"{prefix}{name}"
        if is_dataclass(below):
            yield from keys_of(below, f"{prefix}{name}.")


@pytest.mark.parametrize("page", named(PAGES))
def test_keys_of_recipes_exist(page: Path) -> None:
    keys = set(keys_of(RunConfig))
    sections = "|".join(name for name, kind in get_type_hints(RunConfig).items() if is_dataclass(kind))
    for words in commands(page):
        for word in words:
            if found := re.fullmatch(rf"((?:{sections})(?:\.[a-z_]+)+)(?:[=:].*)?", word):
                free = found[1].startswith(("model.text.options.", "model.image.options."))
                assert free or found[1] in keys, f"{page.name} names {found[1]}"


@pytest.mark.parametrize("page", named(PAGES))
def test_no_gap_is_left_to_be_filled(page: Path) -> None:
    gaps = re.findall(r"\b(?:TO" + r"DO|FIX" + r"ME|TBD|[A-Z]+_FIGURES)\b", text_of(page))
    assert not gaps


@pytest.mark.parametrize("path", named(SHELL))
def test_shell_scripts_are_sound(path: Path) -> None:
    checker = Path(sys.executable).with_name("shellcheck")
    for command in (["bash", "-n"], [str(checker)]):
        done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("folder", SCRIPT_FOLDERS)
def test_scripts_are_no_package(folder: str) -> None:
    assert not [path for path in FILES if path.name == "__init__.py" and path.is_relative_to(ROOT / folder)]


def imported(tree: ast.AST, travels: bool = False) -> Iterator[str]:
    """`travels`: the file leaves the package with others beside it, which it can only name relatively."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert travels or not node.level, "relative imports are not used here"
            yield str(node.module)


@pytest.mark.parametrize("path", named(MODULES))
def test_a_module_keeps_the_rules(path: Path) -> None:
    text = text_of(path)
    tree = ast.parse(text)
    assert len(text.splitlines()) <= MAX_FILE, f"{len(text.splitlines())} lines: split it by meaning"
    names = imported(tree, travels=path.parent.name == "shipped")
    assert not {name.split(".")[0] for name in names} & {*SCRIPT_FOLDERS, "tests"}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            limit = MAX_TRAINING_LOOP if node.name == "train" else MAX_FUNCTION
            assert lines <= limit, f"{node.name} has {lines} lines"
    prints = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"]
    if path.name not in ("cli.py", "world.py", "progress.py") and not path.stem.endswith("command"):
        assert not prints, "the library prints nothing; entry points do"


@pytest.mark.parametrize("folder", ["launch", "shards", "benchmarks"])
def test_scripts_import_the_library_and_never_each_other(folder: str) -> None:
    scripts = [path for path in FILES if path.suffix == ".py" and path.is_relative_to(ROOT / folder)]
    for path in scripts:
        others = {other.stem for other in scripts if other != path} | {*SCRIPT_FOLDERS, "tests"}
        if path.name == "supervision.py":  # measures on the SLURM that the tests start
            others.remove("tests")
        assert not {name.split(".")[0] for name in imported(ast.parse(text_of(path)))} & others, path.name


def test_nothing_tells_of_the_machine_it_was_written_on() -> None:
    # In two halves, so that this file does not name them itself.
    words = ["pypi" + r"\.org", "/wo" + "rk/", "/ro" + "ot/", "regi" + r"stry\.\w+\.\w"]
    for path in FILES:
        if path.suffix not in (".png", ".jpg", ".tar", ".idx", ".safetensors"):
            found = re.search("|".join(words), path.read_text(encoding="utf-8"))
            assert not found, f"{path.relative_to(ROOT)} says {found[0] if found else ''}"
