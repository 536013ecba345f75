"""The page of every key that a recipe may set, read from the source text of the classes that declare them.

Nothing is imported: those classes stand beside the code that reads them, and bring torch.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[2] / "clipdist"
INTRODUCTION = """# Keys of a recipe

Every key, its default and what it does. Set them in a recipe, or on the command line as `key=value`;
`clipdist train RECIPE --print-config` shows what all of them are for one recipe. A key that does not exist is
refused with the nearest one that does.
"""


WORDS = {
    "str": "text",
    "int": "number",
    "float": "number",
    "bool": "`true`, `false`",
    "None": "nothing",
    "PositiveInt": "number",
    "NonNegativeInt": "number",
    "NonNegativeFloat": "number",
}
LISTS, MAPPINGS = ("tuple", "list"), ("dict",)


class Declared(NamedTuple):
    """Classes under the decorator `settings`, and names that stand for types, by name."""

    classes: dict[str, ast.ClassDef]
    aliases: dict[str, ast.expr]


class Key(NamedTuple):
    name: str
    kind: str
    default: str
    meaning: str


def recipe_keys() -> str:
    """The page, in Markdown: a table for each section of a recipe."""
    known = declared()
    parts = [INTRODUCTION]
    for section, name in sections(known, "RunConfig", ""):
        rows = [
            f"| `{section}{key.name}` | {key.kind} | {f'`{key.default}`' if key.default else ''} | {key.meaning} |"
            for key in keys(known, name)
        ]
        if rows:
            heading = f"`{section[:-1]}`" if section else "The run"
            about = ast.get_docstring(known.classes[name]) or ""
            table = "\n".join(["| key | is | by default | |", "|---|---|---|---|", *rows])
            parts.append(f"## {heading}\n\n{about}\n\n{table}\n")
    return "\n".join(parts)


def declared() -> Declared:
    """What the package's modules declare."""
    known = Declared({}, {})
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and "settings" in map(ast.unparse, node.decorator_list):
                known.classes[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript | ast.BinOp):
                known.aliases[ast.unparse(node.targets[0])] = node.value
    return known


def sections(known: Declared, name: str, prefix: str) -> Iterator[tuple[str, str]]:
    """(prefix of its keys, class) of a section and of all below it; `[]` stands for the entries of a list."""
    yield prefix, name
    for node in known.classes[name].body:
        if isinstance(node, ast.AnnAssign):
            below, entries = ast.unparse(node.annotation), ""
            if isinstance(node.annotation, ast.Subscript) and isinstance(node.annotation.slice, ast.Tuple):
                below, entries = ast.unparse(node.annotation.slice.elts[0]), "[]"
            if below in known.classes:
                yield from sections(known, below, f"{prefix}{ast.unparse(node.target)}{entries}.")


def keys(known: Declared, name: str) -> Iterator[Key]:
    """What a class declares, but for sections below it; what it means is the string that follows."""
    body = known.classes[name].body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) not in known.classes:
            said = after.value if isinstance(after, ast.Expr) else None
            meaning = str(said.value) if isinstance(said, ast.Constant) else ""
            yield Key(ast.unparse(node.target), kind(known, node.annotation), default(node.value), one_line(meaning))


def kind(known: Declared, annotation: ast.expr) -> str:
    """What values it takes, in words; KeyError for a type that there are no words for yet."""
    text = ast.unparse(annotation)
    if text in known.aliases:
        return kind(known, known.aliases[text])
    if isinstance(annotation, ast.Subscript):
        base = ast.unparse(annotation.value)
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        if base == "Literal":
            return ", ".join(f"`{one.value}`" for one in inner if isinstance(one, ast.Constant))
        if base == "Annotated":
            return kind(known, inner[0])
        if base in LISTS:
            return "list"
        if base in MAPPINGS:
            return "mapping"
    if isinstance(annotation, ast.BinOp):
        return f"{kind(known, annotation.left)} or {kind(known, annotation.right)}"
    return WORDS[text]


def default(value: ast.expr | None) -> str:
    """As YAML has it; empty where a recipe has to say it."""
    if isinstance(value, ast.Call):
        given = {word.arg: word.value for word in value.keywords}
        if "default" not in given:
            return {"dict": "{}", "list": "[]", "tuple": "[]"}[ast.unparse(given["default_factory"])]
        value = given["default"]
    if value is None:
        return ""
    text = ast.unparse(value)
    known = {"None": "null", "True": "true", "False": "false", "math.inf": ".inf", "()": "[]"}
    if isinstance(value, ast.Tuple) and value.elts:
        return f"[{', '.join(default(one) for one in value.elts)}]"
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return value.value or "''"
    return known.get(text, text)


def one_line(text: str) -> str:
    """Fit for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
