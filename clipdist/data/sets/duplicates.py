"""Equal and nearly equal hashes among millions: found by sorting, in blocks, in a few arrays."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from math import comb
from operator import or_

import numpy as np
import xxhash

# Bits in which two 64-bit difference hashes may differ and still count as one picture to the eye.
NEAR_BITS = 3
# Hashes of nearly one value come from flat pictures and say nothing.
FEWEST_BITS, MOST_BITS = 6, 58
HASH_BITS = 64
# Each picture is compared with at most this many of those it shares some parts with: more look too much alike.
MOST_NEIGHBOURS = 4000
ROWS_AT_ONCE = 1 << 22


def hashed(data: bytes) -> int:
    """64 bits that are not 0, which stands for nothing."""
    return xxhash.xxh3_64_intdigest(data) or 1


def telling(looks: np.ndarray) -> np.ndarray:
    """bool [N]: which difference hashes, uint64 [N], say something of their picture."""
    bits = bit_counts(looks)
    return (bits >= FEWEST_BITS) & (bits <= MOST_BITS)


def groups_of_equal(values: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of each value that several rows hold, ascending; values uint64 [N], 0 meaning none."""
    order, starts, ends = _runs(values)
    several = (ends - starts > 1) & (values[order[starts]] != 0) if len(order) else np.zeros(0, bool)
    # In the order in which each value first appears.
    chosen = np.flatnonzero(several)
    for run in chosen[np.argsort(order[starts[chosen]], kind="stable")]:
        yield order[starts[run] : ends[run]]


def first_of_equal(values: np.ndarray) -> np.ndarray:
    """int64 [N]: the first row with the same value as each row; itself where the value is 0. Values uint64 [N]."""
    first = np.arange(len(values))
    order, starts, ends = _runs(values)
    if len(order):
        first[order] = np.repeat(order[starts], ends - starts)
        first[values == 0] = np.flatnonzero(values == 0)
    return first


def _runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows in order of their values (ascending among equals), and where each run of equal values starts and ends."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    changes = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    starts = np.concatenate([[0], changes]) if len(order) else np.zeros(0, np.int64)
    return order, starts, np.append(changes, len(order)) if len(order) else starts


@dataclass
class NearSearch:
    """`within[row]`, `across[row]`: the first earlier row of the same set, and of another, that looks like `row` but
    has other bytes; N where there is none. `cut_short` counts pictures with too many neighbours for all to be compared.
    """

    within: np.ndarray
    across: np.ndarray
    cut_short: int


def near_pairs(
    looks: np.ndarray, crowded: np.ndarray | None = None, bits: int = NEAR_BITS
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of pairs (first, second), first < second, whose hashes, uint64 [N], differ in at most `bits` bits; each
    pair once.

    Cut into `bits` + a parts, two such hashes agree in at least a of them: for each choice of a parts, rows are sorted
    by these, and only neighbours that agree in them are compared (after G. Manku et al. 2007, "Detecting
    near-duplicates for web crawling", section 3). Pairs of a row with more than `MOST_NEIGHBOURS` candidates may be
    missing: `crowded`, bool [N], becomes true for such rows.
    """
    agreeing = _agreeing_parts(len(looks), bits)
    parts = [sum(1 << bit for bit in range(part, HASH_BITS, bits + agreeing)) for part in range(bits + agreeing)]
    for chosen in combinations(range(len(parts)), agreeing):
        mask = np.uint64(reduce(or_, (parts[part] for part in chosen)))
        others = [np.uint64(parts[part]) for part in range(chosen[-1]) if part not in chosen]
        order, starts, ends = _runs(looks & mask)
        neighbours = np.repeat(ends, ends - starts) - np.arange(len(order)) - 1
        if crowded is not None:
            crowded[order[neighbours > MOST_NEIGHBOURS]] = True
        for first, different in _neighbours_within(looks[order], neighbours, bits):
            # A pair that agrees in more parts than these is left to the first choice among them.
            new = np.ones(len(different), bool)
            for part in others:
                new &= (different & part) != 0
            pair = order[first[0][new]], order[first[1][new]]
            yield np.minimum(*pair), np.maximum(*pair)


def _agreeing_parts(count: int, bits: int) -> int:
    """The number of parts that neighbours must agree in for the least work: sorts of all rows, and comparisons."""

    def work(agreeing: int) -> float:
        sorts = comb(bits + agreeing, agreeing)
        return sorts * count * (20 + count / 2 ** (HASH_BITS * agreeing / (bits + agreeing)))

    return min(range(1, 6), key=work)


def _neighbours_within(
    ordered: np.ndarray, neighbours: np.ndarray, bits: int
) -> Iterator[tuple[tuple[np.ndarray, np.ndarray], np.ndarray]]:
    """Places in `ordered` of pairs at most `bits` apart, and their differing bits; each is compared with the next
    `neighbours` ones."""
    rows = np.flatnonzero(neighbours)
    for distance in range(1, int(min(neighbours.max(initial=0), MOST_NEIGHBOURS)) + 1):
        rows = rows[neighbours[rows] >= distance]
        for at in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[at : at + ROWS_AT_ONCE]
            different = ordered[some] ^ ordered[some + distance]
            found = np.flatnonzero(bit_counts(different) <= bits)
            if len(found):
                yield (some[found], some[found] + distance), different[found]


def bit_counts(words: np.ndarray) -> np.ndarray:
    """uint8 [N]: how many bits of each word, uint64 [N], are set."""
    if hasattr(np, "bitwise_count"):  # NumPy 2
        return np.bitwise_count(words)
    bytes_ = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), 8)
    return np.unpackbits(bytes_, axis=1).sum(1, dtype=np.uint8)


def search_near(looks: np.ndarray, digests: np.ndarray, sets: np.ndarray) -> NearSearch:
    """Looks-alike among N pictures: difference hashes uint64 [N], digests of their bytes uint64 [N] (0: no picture),
    and the number of the set (a split) each belongs to, int [N]."""
    count = len(looks)
    result = NearSearch(np.full(count, count), np.full(count, count), 0)
    # Of pictures with equal bytes in a set one speaks for all: thousands of copies are no more work than one.
    rows = np.lexsort((np.arange(count), sets, digests))
    keep = np.ones(count, bool)
    keep[1:] = (digests[rows][1:] != digests[rows][:-1]) | (sets[rows][1:] != sets[rows][:-1])
    rows = np.sort(rows[keep & (digests[rows] != 0)])
    rows = rows[telling(looks[rows])]
    crowded = np.zeros(len(rows), bool)
    for first, second in near_pairs(looks[rows], crowded):
        first, second = rows[first], rows[second]
        other_bytes = digests[first] != digests[second]
        same_set = sets[first] == sets[second]
        for chosen, into in ((other_bytes & same_set, result.within), (other_bytes & ~same_set, result.across)):
            np.minimum.at(into, second[chosen], first[chosen])
    result.cut_short = int(crowded.sum())
    return result


def keep_first(digests: np.ndarray, looks: np.ndarray | None = None) -> np.ndarray:
    """int64 [N]: for each picture the earlier one that is kept in its stead; itself where it is kept.

    Digests of bytes, uint64 [N], 0 meaning no picture, which is kept. With `looks`, difference hashes, uint64 [N], a
    picture also goes when it looks like an earlier one that is kept.
    """
    kept = first_of_equal(digests)
    if looks is None:
        return kept
    rows = np.flatnonzero((kept == np.arange(len(digests))) & (digests != 0))
    rows = rows[telling(looks[rows])]
    codes = [first * len(rows) + second for first, second in near_pairs(looks[rows])]
    pairs = np.unique(np.concatenate(codes)) if codes else np.zeros(0, np.int64)
    # By the first of each pair: whether it is kept is settled by the time its own pairs come.
    for code in pairs:
        first, second = rows[code // len(rows)], rows[code % len(rows)]
        if kept[first] == first and kept[second] == second:
            kept[second] = first
    return kept[kept]
