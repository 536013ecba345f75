"""Units joined by duplicates: the closure of units and edges, and no straddling in whatever is divided by them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdist.data.sets.pack import Pair
from clipdist.data.sets.tables import split_pairs
from clipdist.prepare.splits import split_by, straddling_units
from clipdist.prepare.units import duplicates_of, joined_units
from tests.unit.pictures import encoded, photograph


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_joined_units_are_the_closure_of_units_and_edges(data: st.DataObject) -> None:
    units = data.draw(st.lists(st.one_of(st.none(), st.sampled_from("abcdef")), min_size=1, max_size=15))
    rows = st.integers(0, len(units) - 1)
    edges = data.draw(st.lists(st.tuples(rows, rows), max_size=8))
    found = joined_units(units, np.array(edges, np.int64).reshape(-1, 2))
    groups = [{row} for row in range(len(units))]
    links = edges + [(i, j) for i, a in enumerate(units) for j, b in enumerate(units) if a is not None and a == b]
    for one, other in links:
        merged = groups[one] | groups[other]
        for row in merged:
            groups[row] = merged
    for one in range(len(units)):
        for other in range(len(units)):
            assert (found[one] == found[other]) == (other in groups[one])
    first_seen = list(dict.fromkeys(found.tolist()))
    assert first_seen == list(range(len(first_seen)))


def test_without_units_each_sample_is_its_own() -> None:
    assert joined_units(None, np.array([[0, 3]]), 5).tolist() == [0, 1, 2, 0, 3]
    with pytest.raises(ValueError, match="expected one of them"):
        joined_units(None, np.zeros((0, 2), np.int64))


def test_duplicates_of_files_and_bytes_keep_together(tmp_path: Path) -> None:
    images: list[Path | bytes] = []
    for number in range(30):
        picture = photograph(256, 200, number)
        (tmp_path / f"{number}.png").write_bytes(encoded(picture))
        images += [tmp_path / f"{number}.png", encoded(picture.resize((200, 160)), "JPEG", quality=60)]
    images += [tmp_path / "missing.png", b"no picture", b"no picture"]
    found = duplicates_of(images, workers=0, quiet=True)
    assert found.pairs_P2.tolist() == [[2 * number, 2 * number + 1] for number in range(30)]
    units = joined_units(None, found.edges(), len(images))
    assert len(set(units.tolist())) == 33
    splits = split_by(None, units, {"train": 0.5, "test": 0.5}, 0)
    assert straddling_units(units.tolist(), splits.tolist()) == []

    pairs = [Pair(f"k{row}", b"", ["text"], {"unit": f"u{row // 3}"} if row < 9 else {}, row) for row in range(60)]
    split = split_pairs(pairs, {"train": 0.5, "test": 0.5}, 0, together_E2=found.edges())
    of_key = {pair.key: name for name, held in split.items() for pair in held}
    assert all(of_key[f"k{2 * number}"] == of_key[f"k{2 * number + 1}"] for number in range(30))
    # u0 holds 0 to 2 and u1 3 to 5: the duplicates 2 and 3 join them.
    assert len({of_key[f"k{row}"] for row in range(6)}) == 1
