"""An audit in a page of plain text."""

from collections.abc import Iterator
from typing import Any

from clipdist.evaluate.audit import Audit

SHOWN = 4


def summary(audit: Audit) -> str:
    """What a person reads on the terminal: leaks first, then what is twice, captions, classes, pictures."""
    body = audit.body
    splits = ", ".join(f"{name} {count:,}" for name, count in body["splits"].items())
    lines = [f"{body['set']}: {body['samples']:,} samples ({splits})"]
    lines += _unreadable(body["unreadable"])
    lines += [*_leaks(body["leaks"]), *_twice(body["leaks"]), *_captions(body["captions"])]
    lines += [*_classes(body["classes"]), *_quality(body["quality"]), *_sizes(body["sizes"])]
    lines += list(_tokenizers(body.get("tokenizers", [])))
    apart = "splits are apart: no unit and no picture lies in two"
    apart += ", of those that can be read" if body["unreadable"]["count"] else ""
    lines.append("splits leak: see above" if audit.leaks else apart)
    return "\n".join(lines)


def _unreadable(found: dict[str, Any]) -> Iterator[str]:
    """Shards that cannot be opened, each in a line, then single samples, which are listed before those of shards."""
    if found["count"]:
        yield f"unreadable: {found['count']:,} (clipdist verify tells more)"
    for one in found["shards"][:SHOWN]:
        yield f"    {one['shard']}: all {one['samples']:,}: {one['reason']}"
    single = found["count"] - sum(one["samples"] for one in found["shards"])
    for one in found["listed"][: min(SHOWN, single)]:
        yield f"    {one['split']}: {one['key']}: {one['reason']}"


def _leaks(leaks: dict[str, Any]) -> Iterator[str]:
    units = leaks["units"]
    if units["straddling"]:
        yield f"LEAK: units in several splits: {units['straddling']:,} of {units['units']:,}"
        for one in units["listed"][:SHOWN]:
            yield f"    {one['unit']}: " + ", ".join(f"{name} {count:,}" for name, count in one["splits"].items())
    for kind, what in (
        ("same", "the same picture"),
        ("near", "near-duplicates"),
        ("embedding", "neighbours by cosine"),
    ):
        if kind in leaks and leaks[kind]["straddling"]:
            yield f"LEAK: {what} in several splits: {leaks[kind]['straddling']:,}"
            yield from _pictures([one for one in leaks[kind]["listed"] if one["straddles"]])


def _pictures(listed: list[dict[str, Any]]) -> Iterator[str]:
    for one in listed[:SHOWN]:
        places = " = ".join(f"{place['split']}: {place['key']}" for place in one["pictures"])
        yield f"    {places}" + (f" ({one['score']:.2f})" if "score" in one else "")


def _twice(leaks: dict[str, Any]) -> Iterator[str]:
    same, near = leaks["same"], leaks["near"]
    yield f"copies of equal bytes: {same['copies']:,} of {same['groups']:,} pictures"
    yield (
        f"near-duplicates: {near['pairs']:,} pairs among {near['pictures']:,} pictures; "
        f"the largest group of duplicates has {near['largest_group']:,}"
    )
    if near["cut_short"]:
        yield f"    {near['cut_short']:,} pictures have too many candidates for all to be compared"
    if one := leaks.get("embedding"):
        yield (
            f"neighbours by {one['features']}: {one['pairs']:,} pairs of cosine {one['cosine']:g} and more among "
            f"{one['pictures']:,} pictures"
        )


def _captions(captions: dict[str, Any]) -> Iterator[str]:
    for name, one in captions["splits"].items():
        yield (
            f"captions of {name}: {one['captions']:,}, {one['distinct']:,} distinct, {one['duplicates']:.1%} repeat "
            f"another; {one['without']:,} samples without; median {one['words'].get('median', 0):g} words"
        )
        for text in one["commonest"][:2]:
            yield f"    {text['times']:,} times ({text['share']:.1%}): {text['text'][:90]}"
    shared = [one for one in captions["shared"] if one["share"]]
    for one in sorted(shared, key=lambda one: -one["share"])[:SHOWN]:
        yield f"    {one['share']:.1%} of the captions of {one['of']} are also in {one['also_in']}"


def _classes(classes: dict[str, Any]) -> Iterator[str]:
    if not classes["classes"]:
        yield f"classes: no sample has the field {classes['field']!r} (--label names another)"
        return
    yield f"classes by {classes['field']}: {classes['classes']:,}"
    for name, one in classes["splits"].items():
        balance = f"largest {one['largest']:,}, smallest {one['smallest']:,}, imbalance {one['imbalance'] or 0:,g} : 1"
        absent = f"; {one['absent']:,} of the classes have none" if one["absent"] else ""
        lacking = f"; {one['lacking']:,} samples lack the field" if one["lacking"] else ""
        yield f"    {name}: {one['classes']:,} classes, {balance}{absent}{lacking}"


def _quality(quality: dict[str, Any]) -> Iterator[str]:
    found = [f"{fault} {one['count']:,}" for fault, one in quality.items() if one["count"]]
    yield "pictures: " + (", ".join(found) if found else "none blank, blurred, saturated, dark, tiny or long")
    for fault, one in quality.items():
        for place in one["listed"][:1]:
            yield f"    {fault}, worst: {place['split']}: {place['key']} ({place['value']:g}, limit {one['limit']:g})"


def _sizes(sizes: dict[str, Any]) -> Iterator[str]:
    for name, one in sizes.items():
        side, aspect = one["shorter_side"], one["aspect"]
        yield (
            f"sizes of {name}: shorter side {side['smallest']:g} to {side['largest']:g}, median {side['median']:g} "
            f"pixels; width by height {aspect['smallest']:.2f} to {aspect['largest']:.2f}"
        )


def _tokenizers(tokenizers: list[dict[str, Any]]) -> Iterator[str]:
    for one in tokenizers:
        yield (
            f"tokenizer {one['tokenizer']} ({one['vocabulary']:,} entries): {one['tokens_per_word']:.2f} tokens a "
            f"word, {one['unknown']:.2%} unknown, longest caption {one['tokens']['longest']:g} tokens, "
            f"{one['cut']:.1%} of captions cut at {one['max_tokens']}"
        )
