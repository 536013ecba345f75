"""Equal and nearly equal hashes among millions: found by sorting, in blocks, in a few arrays."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import combinations, islice
from math import comb
from operator import or_

import numpy as np
import xxhash

from clipdist.data.images.looks import same_pictures
from clipdist.errors import UserError

# Bits in which two 64-bit difference hashes may differ for the pictures to be looked at more closely: where looks are
# at hand, and where each look means that a picture is decoded again.
CANDIDATE_BITS, MOST_BITS_APART = 10, 16
NEAR_BITS = 3
# Hashes of nearly one value come from flat pictures and say nothing.
FEWEST_BITS, MOST_BITS = 6, 58
HASH_BITS = 64
# Each picture is compared with at most this many of those it shares some parts with: more look too much alike.
MOST_NEIGHBOURS = 4000
ROWS_AT_ONCE = 1 << 22
# Rows that agree in some parts: up to this many are compared with each other by place, more of them as a table.
LONG_RUN, COLUMNS_AT_ONCE = 128, 2048
# What sorting a row costs, in comparisons; below `FEW_ROWS` nothing takes long.
SORT_COST, FEW_ROWS = 50, 2000


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
    for mask, others in _choices(bits, _agreeing_parts(looks, bits)):
        order, starts, ends = _runs(looks & mask)
        if crowded is not None:
            neighbours = np.repeat(ends, ends - starts) - np.arange(len(order)) - 1
            crowded[order[neighbours > MOST_NEIGHBOURS]] = True
        for first, second, different in _within_runs(looks[order], starts, ends, bits):
            # A pair that agrees in more parts than these is left to the first choice among them.
            new = np.ones(len(different), bool)
            for part in others:
                new &= (different & part) != 0
            pair = order[first[new]], order[second[new]]
            yield np.minimum(*pair), np.maximum(*pair)


def _choices(bits: int, agreeing: int) -> Iterator[tuple[np.uint64, list[np.uint64]]]:
    """(bits to sort by, parts that must differ) of each choice of `agreeing` of all parts. Neighbouring bits, which
    depend on each other, go to different parts, so that no part says much less than another."""
    parts = [sum(1 << bit for bit in range(part, HASH_BITS, bits + agreeing)) for part in range(bits + agreeing)]
    for chosen in combinations(range(len(parts)), agreeing):
        mask = np.uint64(reduce(or_, (parts[part] for part in chosen)))
        yield mask, [np.uint64(parts[part]) for part in range(chosen[-1]) if part not in chosen]


def _agreeing_parts(looks: np.ndarray, bits: int) -> int:
    """The number of parts that neighbours must agree in for the least work, sorts and comparisons, as some of the
    choices show it: real hashes fill few of all values, and a few of them often."""

    def work(agreeing: int) -> float:
        sorts = comb(bits + agreeing, agreeing)
        compared = 0.0
        for mask, _ in islice(_choices(bits, agreeing), 0, None, max(1, sorts // 3)):
            _, starts, ends = _runs(looks & mask)
            sizes = (ends - starts).astype(float)
            compared = max(compared, float((sizes * np.minimum(sizes - 1, 2 * MOST_NEIGHBOURS)).sum() / 2))
        return sorts * (SORT_COST * len(looks) + compared)

    possible = range(1, 6)
    return min(possible, key=work) if len(looks) > FEW_ROWS else 1


def _within_runs(
    ordered: np.ndarray, starts: np.ndarray, ends: np.ndarray, bits: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(first places, second places, differing bits) of pairs in one run of `ordered`, at most `bits` bits and
    `MOST_NEIGHBOURS` places apart."""
    sizes = ends - starts
    # Short runs all at once, each row with its next, then with the one after that.
    rows = np.flatnonzero(np.repeat((sizes > 1) & (sizes <= LONG_RUN), sizes))
    last = np.repeat(ends, sizes)
    for distance in range(1, min(LONG_RUN, MOST_NEIGHBOURS + 1)):
        rows = rows[rows + distance < last[rows]]
        if not len(rows):
            break
        for at in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[at : at + ROWS_AT_ONCE]
            different = ordered[some] ^ ordered[some + distance]
            found = np.flatnonzero(bit_counts(different) <= bits)
            if len(found):
                yield some[found], some[found] + distance, different[found]
    for run in np.flatnonzero(sizes > LONG_RUN):
        start, end = int(starts[run]), int(ends[run])
        for top in range(start, end, LONG_RUN):
            stop = min(top + LONG_RUN, end)
            for left in range(top, min(end, stop + MOST_NEIGHBOURS), COLUMNS_AT_ONCE):
                right = min(left + COLUMNS_AT_ONCE, end)
                different = ordered[top:stop, None] ^ ordered[None, left:right]
                row, column = np.nonzero(bit_counts(different) <= bits)
                first, second = row + top, column + left
                kept = (second > first) & (second - first <= MOST_NEIGHBOURS)
                if kept.any():
                    yield first[kept], second[kept], different[row[kept], column[kept]]


def bit_counts(words: np.ndarray) -> np.ndarray:
    """How many bits of each word, uint64 of any shape, are set; uint8."""
    if hasattr(np, "bitwise_count"):  # NumPy 2
        return np.bitwise_count(words)
    bytes_ = np.ascontiguousarray(words)[..., None].view(np.uint8)
    return np.unpackbits(bytes_, axis=-1).sum(-1, dtype=np.uint8)


def search_near(
    hashes: np.ndarray, digests: np.ndarray, sets: np.ndarray, look: Callable[[np.ndarray], np.ndarray]
) -> NearSearch:
    """Looks-alike among N pictures: difference hashes uint64 [N], digests of their bytes uint64 [N] (0: no picture),
    and the number of the set (a split) each belongs to, int [N].

    Few hashes are held of many pictures. Of those whose hashes are near, rows int64 [R], `look` gives the looks, dtype
    `LOOK`, [R], which decide as in `find_duplicates`.
    """
    count = len(hashes)
    result = NearSearch(np.full(count, count), np.full(count, count), 0)
    # Of pictures with equal bytes in a set one speaks for all: thousands of copies are no more work than one.
    rows = np.lexsort((np.arange(count), sets, digests))
    keep = np.ones(count, bool)
    keep[1:] = (digests[rows][1:] != digests[rows][:-1]) | (sets[rows][1:] != sets[rows][:-1])
    rows = np.sort(rows[keep & (digests[rows] != 0)])
    rows = rows[telling(hashes[rows])]
    crowded, candidate = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
    for first, second in near_pairs(hashes[rows], crowded):
        other_bytes = digests[rows[first]] != digests[rows[second]]
        candidate[first[other_bytes]] = candidate[second[other_bytes]] = True
    result.cut_short = int(crowded.sum())
    rows = rows[candidate]
    # Once more among these alone, rather than to hold pairs, of which there may be thousands to a picture.
    looks = look(rows)
    for first, second in near_pairs(hashes[rows]):
        other_bytes = digests[rows[first]] != digests[rows[second]]
        first, second = first[other_bytes], second[other_bytes]
        same = same_pictures(looks, np.stack([first, second], 1)) > 0
        first, second = rows[first[same]], rows[second[same]]
        same_set = sets[first] == sets[second]
        for chosen, into in ((same_set, result.within), (~same_set, result.across)):
            np.minimum.at(into, second[chosen], first[chosen])
    return result


@dataclass
class Duplicates:
    """What N pictures have twice. `first_N`: the first row with the same bytes. `pairs_P2`, first < second: rows of
    other bytes that show the same picture, each the first of its bytes; `scores_P` says how well their details
    correlate. `cut_short` counts pictures with too many neighbours for all to be compared.
    """

    first_N: np.ndarray
    pairs_P2: np.ndarray
    scores_P: np.ndarray
    cut_short: int = 0

    def edges(self) -> np.ndarray:
        """int64 [E, 2]: rows that belong together, by equal bytes or equal looks."""
        copies = np.flatnonzero(self.first_N != np.arange(len(self.first_N)))
        return np.concatenate([np.stack([self.first_N[copies], copies], 1), self.pairs_P2])

    def keep_first(self) -> np.ndarray:
        """int64 [N]: for each picture the earlier one that is kept in its stead; itself where it is kept. One goes when
        it has the bytes of an earlier one, or looks like an earlier one that is kept."""
        kept = self.first_N.copy()
        # By the first of each pair: whether it is kept is settled by the time its own pairs come.
        for first, second in self.pairs_P2[np.lexsort((self.pairs_P2[:, 1], self.pairs_P2[:, 0]))].tolist():
            if kept[first] == first and kept[second] == second:
                kept[second] = first
        return kept[kept]


def check_bits(bits: int) -> None:
    """`UserError` for a number of bits with which `find_duplicates` would find nothing, or search for ever."""
    if not 0 <= bits <= MOST_BITS_APART:
        raise UserError(f"--bits: found {bits}, expected 0 to {MOST_BITS_APART}")


def cut_short_warning(count: int, outcome: str = "copies of them may lie in several splits") -> list[str]:
    """A line for people who were promised that duplicates stay together, or go; none where `cut_short` counts none."""
    if not count:
        return []
    return [f"warning: {count:,} pictures look like so many others that not all pairs were compared; {outcome}"]


def find_duplicates(digests: np.ndarray, looks: np.ndarray, bits: int = CANDIDATE_BITS) -> Duplicates:
    """The same picture again, in other bytes, size, brightness, or cut a little at its edges.

    `digests` of bytes, uint64 [N], 0 meaning no picture; `looks` have dtype `LOOK`. Candidates are pairs of which the
    hash of one, and that of the other or of its middle, differ in at most `bits` bits, all of them; the thumbnails
    decide. Mirrored, turned and decoloured copies are not found, nor is anything among flat pictures. Raises as
    `check_bits` does.
    """
    check_bits(bits)
    first = first_of_equal(digests)
    rows = np.flatnonzero((first == np.arange(len(digests))) & (digests != 0))
    hashes = np.concatenate([looks["whole"][rows], looks["middle"][rows]])
    owners = np.concatenate([rows, rows])
    is_middle = np.repeat([False, True], len(rows))
    chosen = telling(hashes)
    hashes, owners, is_middle = hashes[chosen], owners[chosen], is_middle[chosen]
    crowded = np.zeros(len(hashes), bool)
    waiting: list[np.ndarray] = []
    confirmed: list[tuple[np.ndarray, np.ndarray]] = []

    def confirm() -> None:
        codes = np.unique(np.concatenate(waiting))
        pairs = np.stack([codes // len(digests), codes % len(digests)], 1)
        scores = same_pictures(looks, pairs)
        confirmed.append((codes[scores > 0], scores[scores > 0]))
        waiting.clear()

    for one, other in near_pairs(hashes, crowded, bits):
        useful = ~(is_middle[one] & is_middle[other]) & (owners[one] != owners[other])
        pair = owners[one[useful]], owners[other[useful]]
        waiting.append(np.minimum(*pair) * len(digests) + np.maximum(*pair))
        if sum(map(len, waiting)) > ROWS_AT_ONCE:
            confirm()
    if waiting:
        confirm()
    cut_short = len(np.unique(owners[crowded]))
    if not confirmed:
        return Duplicates(first, np.zeros((0, 2), np.int64), np.zeros(0, np.float32), cut_short)
    codes, places = np.unique(np.concatenate([codes for codes, _ in confirmed]), return_index=True)
    scores = np.concatenate([scores for _, scores in confirmed])[places]
    return Duplicates(first, np.stack([codes // len(digests), codes % len(digests)], 1), scores, cut_short)


def cosine_pairs(features_ND: np.ndarray, least: float, most: int = 10_000_000) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [P, 2], first < second; float32 [P]): all pairs of unit vectors, float32, whose cosine is `least` or more.

    Every vector is multiplied with every other, in blocks: N² · D operations. Raises `UserError` for more than `most`
    pairs.
    """
    rows, columns, cosines, found = [], [], [], 0
    block = 2048
    for top in range(0, len(features_ND), block):
        for left in range(top, len(features_ND), block):
            product = features_ND[top : top + block] @ features_ND[left : left + block].T
            near = product >= least
            if left == top:
                near = np.triu(near, 1)
            row, column = np.nonzero(near)
            found += len(row)
            if found > most:
                raise UserError(f"more than {most:,} pairs of pictures have a cosine of {least} or more; ask for more")
            rows.append(top + row)
            columns.append(left + column)
            cosines.append(product[row, column].astype(np.float32))
    pairs = np.stack([np.concatenate(rows), np.concatenate(columns)], 1) if rows else np.zeros((0, 2), np.int64)
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    return pairs[order], (np.concatenate(cosines) if cosines else np.zeros(0, np.float32))[order]
