"""Mixtures and balanced classes: exact shares, every sample of a source equally often, any step at once."""

import itertools
import json
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdist import cli
from clipdist.config import RunConfig, differences, load_config, read_config, to_yaml
from clipdist.data.config import DataConfig
from clipdist.data.loader import MASK_64, TrainLoader
from clipdist.data.mixing import LINES_KEPT, UNIT, MixedOrder, MixedSplit, MixEntry, Mixture, floor_sums, order_of
from clipdist.data.order import Order, SampleOrder, consumed_hash, share
from clipdist.data.rows import TrainRows
from clipdist.data.sets.writer import ShardSetWriter
from clipdist.data.shards import Split
from clipdist.data.text import Tokenizer, train_wordpiece
from clipdist.errors import UserError
from tests.conftest import write_shapes
from tests.unit.pictures import encoded, picture

# The order of sources


class Counted:
    """Sources whose blocks are given; samples are numbered source after source."""

    def __init__(self, counts: Sequence[Sequence[int]]) -> None:
        self.counts = [np.array(blocks, np.int64) for blocks in counts]
        self.sizes = np.array([blocks.sum() for blocks in self.counts], np.int64)
        self.offsets = np.cumsum(self.sizes) - self.sizes

    def blocks(self, source: int) -> np.ndarray:
        return self.counts[source]

    def numbers(self, source: int, own: np.ndarray) -> np.ndarray:
        assert own.min() >= 0
        assert own.max() < self.sizes[source]
        return self.offsets[source] + own

    def source_of(self, numbers: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.offsets, numbers, side="right") - 1


@st.composite
def mixed_orders(draw: st.DrawFn) -> MixedOrder:
    """Up to 8 sources of up to 40 samples in blocks down to one sample; shares from 1:1 to 1:1000."""
    blocks = st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(lambda counts: sum(counts) > 0)
    counts = draw(st.lists(blocks, min_size=1, max_size=8))
    shares = draw(st.lists(st.floats(0.001, 1), min_size=len(counts), max_size=len(counts)))
    total = sum(map(sum, counts))
    order = MixedOrder(
        Counted(counts),
        np.array(shares),
        seed=draw(st.integers(0, 3)),
        global_batch=draw(st.integers(1, min(24, total))),
        window=draw(st.sampled_from([0, 1, 3, 16, 100])),
    )
    order.round_steps = draw(st.integers(1, order.steps_per_epoch))
    return order


def expected(order: MixedOrder) -> np.ndarray:
    """Rows of each source per step, float64 [K]."""
    return np.diff(order._ends) / UNIT


@given(
    st.integers(0, 60),
    st.integers(1, 50),
    st.integers(0, 120),
    st.lists(st.integers(-300, 300), min_size=1, max_size=6),
)
def test_a_sum_of_floors_is_that_of_its_terms(terms: int, modulus: int, factor: int, offsets: list[int]) -> None:
    brute = [sum((factor * v + offset) // modulus for v in range(terms)) for offset in offsets]
    assert floor_sums(terms, modulus, factor, np.array(offsets)).tolist() == brute


def test_a_sum_of_floors_does_not_overflow_at_the_limits() -> None:
    batch, terms, factor = 1 << 15, (1 << 31) - 1, 1327217885
    found = floor_sums(terms, 1 << 31, factor, np.array([0, -batch << 31]))
    assert int(found[0] - found[1]) == terms * batch
    # Σ floor(a v / m) over a whole period of v, a odd and m a power of two: (m - 1)(a - 1) / 2.
    assert floor_sums(1 << 31, 1 << 31, factor, np.zeros(1, np.int64))[0] == ((1 << 31) - 1) * (factor - 1) // 2


@given(mixed_orders(), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_each_place_of_each_stream_comes_exactly_once(order: MixedOrder, epochs: int) -> None:
    steps = epochs * order.steps_per_epoch
    places = [order._places(step, 0, order.global_batch) for step in range(steps)]
    source, place = (np.concatenate(parts) for parts in zip(*places, strict=True))
    for number in range(len(order.sources.sizes)):
        given = np.sort(place[source == number])
        assert np.array_equal(given, np.arange(len(given)))
        assert abs(len(given) - steps * expected(order)[number]) <= 1 + 0.63 * np.log(steps)


@given(mixed_orders())
@settings(max_examples=40, deadline=None)
def test_each_batch_holds_each_source_by_its_share(order: MixedOrder) -> None:
    """Less than two rows from the mean over the round, which is itself within two rows in all of the share."""
    for step in range(2 * order.steps_per_epoch):
        counts = np.bincount(order.sources_of(step), minlength=len(order.sources.sizes))
        start = step % order.steps_per_epoch // order.round_steps * order.round_steps
        steps = min(order.round_steps, order.steps_per_epoch - start)
        first = step // order.steps_per_epoch * order.steps_per_epoch + start
        owed = order._count_given(first + steps) - order._count_given(first)
        assert (np.abs(counts - owed / steps) < 2).all()
        assert (np.abs(owed / steps - expected(order)) <= min(1, 2 / steps) + 1e-9).all()


@pytest.mark.parametrize("weights", [[2, 1], [1, 1, 1], [1, 1000], [5, 3, 1, 1]])
def test_shares_hold_over_a_long_run(weights: list[int]) -> None:
    order = MixedOrder(Counted([[10_000]] * len(weights)), np.array(weights), seed=0, global_batch=64)
    for step in (1, 7, 1000, 10**6, 10**9):
        given = order._count_given(step)
        assert given.sum() == step * 64
        # The shares are kept to half of 1 / UNIT rows a step.
        assert np.abs(given - step * 64 * np.array(weights) / sum(weights)).max() < 3 + step / UNIT


@given(mixed_orders())
@settings(max_examples=40, deadline=None)
def test_samples_of_a_source_come_equally_often_and_once_in_each_pass(order: MixedOrder) -> None:
    assert isinstance(order.sources, Counted)
    seen = np.zeros(order.samples, np.int64)
    for step in range(3 * order.steps_per_epoch):
        numbers, passes = order.batch(step)
        for number, times_round in zip(numbers.tolist(), passes.tolist(), strict=True):
            assert times_round == seen[number], "once in each pass, and the passes follow each other"
            seen[number] += 1
        for offset, size in zip(order.sources.offsets, order.sources.sizes, strict=True):
            assert np.ptp(seen[offset : offset + size]) <= 1, "at any time"


@given(mixed_orders(), st.integers(1, 8), st.data())
@settings(max_examples=40, deadline=None)
def test_ranks_together_hold_the_batch_whatever_was_asked_before(
    order: MixedOrder, ranks: int, data: st.DataObject
) -> None:
    step = data.draw(st.integers(0, 3 * order.steps_per_epoch - 1))
    fresh = MixedOrder(
        order.sources, np.diff(order._ends), seed=order.seed, global_batch=order.global_batch, window=order.window
    )
    fresh.round_steps = order.round_steps
    for other in range(0, 3 * order.steps_per_epoch, 2):
        order.batch(other)
    parts = [order.rows(step, *share(order.global_batch, rank, ranks)) for rank in range(ranks)]
    for joined, whole in zip(map(np.concatenate, zip(*parts, strict=True)), fresh.batch(step), strict=True):
        assert np.array_equal(joined, whole)


@given(mixed_orders(), st.data())
@settings(max_examples=40, deadline=None)
def test_replacements_go_through_the_source_before_they_leave_it(order: MixedOrder, data: st.DataObject) -> None:
    assert isinstance(order.sources, Counted)
    step = data.draw(st.integers(0, 2 * order.steps_per_epoch - 1))
    row = data.draw(st.integers(0, order.global_batch - 1))
    numbers, passes = order.batch(step)
    source = int(order.sources_of(step)[row])
    size = int(order.sources.sizes[source])
    walked = [order.replacement(step, row, attempt) for attempt in range(size + 1)]
    assert walked[0] == (numbers[row], passes[row])
    assert {int(order.sources.source_of(np.array(number))) for number, _ in walked[:size]} == {source}
    after = (source + 1) % len(order.sources.sizes)
    assert int(order.sources.source_of(np.array(walked[size][0]))) == after
    again = [number for number, times_round in walked[:size] if times_round == walked[0][1]]
    assert len(set(again)) == len(again)


def test_the_mixed_order_is_pinned() -> None:
    """Written down once: a change here breaks the resumption of every run in flight."""
    order = MixedOrder(Counted([[5, 9], [3], [7, 2, 2]]), np.array([3.0, 1, 2]), seed=7, global_batch=8, window=6)
    order.round_steps = 2
    assert [order.batch(step).numbers.tolist() for step in (0, 4, 50)] == PINNED
    assert order.batch(50).passes.tolist() == PASSES


PINNED = [[9, 22, 6, 16, 14, 10, 20, 12], [5, 23, 7, 16, 26, 6, 24, 10], [3, 26, 4, 15, 22, 5, 23, 7]]
PASSES = [14, 12, 14, 22, 12, 14, 12, 14]


def test_rare_sources_meet_others_all_the_time() -> None:
    order = MixedOrder(Counted([[50]] * 200), np.ones(200), seed=0, global_batch=16)
    met: set[int] = set()
    for step in range(order.steps_per_epoch):
        found = set(order.sources_of(step).tolist())
        met |= found if 0 in found else set()
    assert len(met) > 150, "of 200, in 50 batches that hold the first source and 15 others"


def test_every_rank_reads_about_its_share_of_each_source() -> None:
    order = MixedOrder(Counted([[4000], [4000]]), np.array([3, 1]), seed=0, global_batch=64)
    for rank in range(4):
        start, stop = share(64, rank, 4)
        assert abs((order.sources_of(5)[start:stop] == 0).sum() - 12) <= 1


def test_a_hundred_thousand_classes_take_bounded_state() -> None:
    sizes = np.random.default_rng(0).integers(1, 30, 100_000)
    order = MixedOrder(Counted(sizes[:, None].tolist()), np.ones(100_000), seed=0, global_batch=1024)
    found = [order.batch(step) for step in (0, 1, 700, 10**6)]
    assert all(len(np.unique(numbers)) == 1024 for numbers, _ in found[:2])
    assert order._walk.cache_info().currsize <= LINES_KEPT
    assert found[3].passes.max() > 100, "one-sample classes come again and again"


def test_too_few_samples_for_a_batch_are_refused() -> None:
    with pytest.raises(UserError, match=r"has 6 samples, fewer than train\.global_batch=8"):
        MixedOrder(Counted([[3], [3]]), np.ones(2), seed=0, global_batch=8)


# Several sets as one


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders a (44 samples, also val), b (10, also val) and c (one sample, no val), readable; k3 of a is broken."""
    parent = tmp_path_factory.mktemp("sets")
    for name, size, val in (("a", 44, 3), ("b", 10, 2), ("c", 1, 0)):
        with ShardSetWriter(parent / name, samples_per_shard=9, license_text=f"licence {name}") as out:
            for number in range(size):
                image = encoded(picture(number, (18, 18)))
                image = image[:60] if (name, number) == ("a", 3) else image
                fields = {"text": f"{name} {number}", "label": f"{number % 3}"}
                out.write("train", f"k{number}", image, "png", fields)
            for number in range(val):
                out.write("val", f"v{number}", encoded(picture(number, (18, 18))), "png", {"text": "x", "label": "0"})
    return parent


def mixed(sets: Path, weights: Sequence[float | None] = (None,) * 3, **options: Any) -> DataConfig:
    entries = tuple(MixEntry(set=str(sets / name), weight=weight) for name, weight in zip("abc", weights, strict=False))
    return DataConfig(mix=entries, **options)


def test_a_mixture_is_its_sets_one_after_another(sets: Path) -> None:
    mixture = Mixture.open(mixed(sets))
    split = mixture.training("train")
    assert isinstance(split, MixedSplit)
    for one in (split, pickle.loads(pickle.dumps(split))):
        assert len(one) == 55
        keys = [one.key(number) for number in range(55)]
        assert keys == [f"{name}/k{n}" for name, size in (("a", 44), ("b", 10), ("c", 1)) for n in range(size)]
        assert [one.read(n).key for n in (0, 44, 54)] == ["a/k0", "b/k0", "c/k0"]
        assert one.read(45).texts == ["b 1"]
        assert [one.part(n) for n in (43, 44, 54)] == [(0, 43), (1, 0), (2, 0)]
        assert one.locate(44 + 9) == (6, 0)
        assert [one.shards[n].file for n in (0, 4, 5, 6, 7)] == [
            *("a/train-000000.tar", "a/train-000004.tar"),
            *("b/train-000000.tar", "b/train-000001.tar", "c/train-000000.tar"),
        ]
        assert [info.samples for info in one.shards] == one.samples_per_shard.tolist()
        assert one.shard(6).path == sets / "b" / "train-000001.tar"
        for beyond in (-1, 55):
            with pytest.raises(IndexError):
                one.read(beyond)
    assert mixture.license == "licence a; licence b; licence c"
    assert mixture.digest.count("+") == 2


def test_validation_takes_the_sets_that_have_the_split(sets: Path) -> None:
    val = Mixture.open(mixed(sets)).validation("val")
    assert [val.key(number) for number in range(len(val))] == ["a/v0", "a/v1", "a/v2", "b/v0", "b/v1"]
    with pytest.raises(UserError, match="no split 'test'"):
        Mixture.open(mixed(sets)).validation("test")
    with pytest.raises(UserError, match="no split 'val'"):
        Mixture.open(mixed(sets)).training("val")


def test_names_and_weights_are_checked(sets: Path) -> None:
    twice = DataConfig(mix=(MixEntry(set=str(sets / "a")), MixEntry(set=str(sets / "b"), name="a")))
    with pytest.raises(UserError, match=r"two sets are called 'a'; give them a `name` each"):
        Mixture.open(twice)
    with pytest.raises(UserError, match=r"found 2 weights for 3 sets; give each set its weight, or none"):
        Mixture.open(mixed(sets, [1, None, 3]))
    lanes = mixed(sets, lanes=2)
    with pytest.raises(UserError, match=r"data\.lanes=2: the order of data\.mix and data\.balance has no lanes"):
        order_of(Mixture.open(lanes).training("train"), lanes, seed=0, global_batch=8)


def shares_seen(config: DataConfig, batch: int, epochs: int = 4) -> tuple[np.ndarray, int]:
    """Mean rows of sets a, b, c per step, and the number of steps."""
    split = Mixture.open(config).training("train")
    assert isinstance(split, MixedSplit)
    order = order_of(split, config, seed=0, global_batch=batch)
    steps = epochs * order.steps_per_epoch
    parts = [split.part(int(number))[0] for step in range(steps) for number in order.batch(step).numbers]
    return np.bincount(parts, minlength=3) / steps, steps


def test_sets_come_by_weight_or_by_size(sets: Path) -> None:
    for config, wanted in (
        (mixed(sets, [2, 1, 1]), [6, 3, 3]),
        (mixed(sets), [12 * 44 / 55, 12 * 10 / 55, 12 / 55]),
        (mixed(sets, [2, 1, 1], balance="label"), [6, 3, 3]),
    ):
        found, steps = shares_seen(config, 12)
        assert np.abs(found - wanted).max() <= 4 / steps


def test_classes_are_balanced_within_each_set(sets: Path) -> None:
    config = mixed(sets, [2, 1, 1], balance="label")
    split = Mixture.open(config).training("train")
    order = order_of(split, config, seed=0, global_batch=12)
    assert isinstance(order, MixedOrder)
    steps = 20
    labels: dict[str, int] = {}
    for number in np.concatenate([order.batch(step).numbers for step in range(steps)]).tolist():
        label = f"{split.key(number)[0]}{int(split.key(number)[3:]) % 3}"
        labels[label] = labels.get(label, 0) + 1
    for label, seen in labels.items():
        assert abs(seen / steps - {"a": 2, "b": 1, "c": 3}[label[0]]) <= 2 / steps
    assert len(labels) == 7


def test_one_set_without_balance_keeps_the_plain_order(sets: Path) -> None:
    config = DataConfig(set=str(sets / "a"))
    split = Mixture.open(config).training("train")
    assert not isinstance(split, MixedSplit)
    order = order_of(split, config, seed=4, global_batch=8)
    plain = Order(split.samples_per_shard, seed=4, global_batch=8)
    assert np.array_equal(order.batch(9).numbers, plain.batch(9).numbers)


# Configuration


def loaded(tmp_path: Path, data: str, *overrides: str) -> RunConfig:
    path = tmp_path / "r.yaml"
    path.write_text(f"data:\n{data}train: {{global_batch: 8, epochs: 1}}\n", encoding="utf-8")
    return load_config(path, list(overrides))


MIX = "  mix:\n    - {set: there/a, weight: 2}\n    - {set: b, weight: 1, name: other}\n"


def test_a_recipe_names_one_set_or_a_mixture(tmp_path: Path) -> None:
    config = loaded(tmp_path, MIX, "data.balance=label", "data.balance_temperature=2")
    assert [(entry.called, entry.weight) for entry in config.data.mix] == [("a", 2.0), ("other", 1.0)]
    with pytest.raises(UserError, match=r"r\.yaml:3: data\.set and data\.mix: expected one of them, found both"):
        loaded(tmp_path, "  set: x\n" + MIX)
    with pytest.raises(UserError, match=r"r\.yaml:1: data\.set is missing"):
        loaded(tmp_path, "  lanes: 0\n")
    with pytest.raises(UserError, match=r"balance_temperature=0\.5"):
        loaded(tmp_path, "  set: x\n", "data.balance_temperature=0.5")
    with pytest.raises(UserError, match=r"unknown key data\.mix\.0\.wieght; did you mean weight"):
        loaded(tmp_path, MIX.replace("weight: 2", "wieght: 2"))


def test_a_mixture_may_move_but_not_change(tmp_path: Path) -> None:
    config = loaded(tmp_path, MIX)
    written = tmp_path / "config.yaml"
    written.write_text(to_yaml(config), encoding="utf-8")
    assert read_config(written) == config
    assert differences(config, loaded(tmp_path, MIX.replace("there", "elsewhere"))) == []
    assert differences(config, loaded(tmp_path, MIX.replace("weight: 2", "weight: 3"))) != []
    assert differences(config, loaded(tmp_path, MIX.replace("name: other", "name: another"))) != []


# Through the loader


Parts = tuple[Split, SampleOrder, DataConfig]


@pytest.fixture(scope="module")
def kinds(sets: Path) -> dict[str, Callable[[int], Parts]]:
    """name -> (workers -> what a loader needs), for a plain, a mixed, a balanced and a mixed and balanced run."""
    tree = {
        "plain": lambda **o: DataConfig(set=str(sets / "a"), **o),
        "mixed": lambda **o: mixed(sets, [3, 2, 1], **o),
        "balanced": lambda **o: DataConfig(set=str(sets / "a"), balance="label", balance_temperature=2.0, **o),
        "both": lambda **o: mixed(sets, balance="label", **o),
    }

    def parts(kind: str, workers: int) -> Parts:
        config = tree[kind](workers=workers, window=10, max_bad_fraction=1.0)
        split = Mixture.open(config).training("train")
        return split, order_of(split, config, seed=5, global_batch=24), config

    return {kind: lambda workers, kind=kind: parts(kind, workers) for kind in tree}  # type: ignore[misc]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_wordpiece([f"{name} {number}" for name in "abc" for number in range(44)], 100, 8)


def digests(parts: Parts, tokenizer: Tokenizer, world_size: int, cuts: Sequence[int], steps: int = 6) -> list[int]:
    """The hash of the samples of each step, over all ranks; the run is interrupted and gone on with at `cuts`."""
    split, order, config = parts
    found = [0] * steps
    for first, last in itertools.pairwise([0, *cuts, steps]):
        for rank in range(world_size):
            rows = TrainRows(split, order, config, side=16, resize="crop", tokenizer=tokenizer)
            # The loader is asked for all that is left, and left when the interruption comes.
            loader = TrainLoader(rows, rank=rank, world_size=world_size, first_step=first, steps=steps)
            for batch in itertools.islice(iter(loader), last - first):
                found[batch.step] = (found[batch.step] + batch.consumed) & MASK_64
    return found


@pytest.mark.parametrize("kind", ["plain", "mixed", "balanced", "both"])
def test_the_order_reaches_the_batches(
    kind: str, kinds: dict[str, Callable[[int], Parts]], tokenizer: Tokenizer
) -> None:
    whole = digests(kinds[kind](0), tokenizer, 1, [])
    split, order, _ = kinds[kind](0)
    for step, found in enumerate(whole):
        keys = [split.key(number) for number in order.batch(step).numbers.tolist()]
        planned = sum(consumed_hash(step, key) for key in keys) & MASK_64
        broken = {"k3", "a/k3"} & set(keys)
        assert (found == planned) == (not broken), "the broken sample alone is replaced"
    assert digests(kinds[kind](1), tokenizer, 2, [2, 3]) == whole
    assert digests(kinds[kind](0), tokenizer, 3, [1]) == whole


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["plain", "mixed", "balanced", "both"])
def test_the_batches_are_those_of_one_process(
    kind: str, world_size: int, workers: int, kinds: dict[str, Callable[[int], Parts]], tokenizer: Tokenizer
) -> None:
    whole = digests(kinds[kind](0), tokenizer, 1, [])
    draw = np.random.default_rng(world_size * 10 + workers)
    for _ in range(2):
        cuts = sorted(set(draw.integers(1, 6, int(draw.integers(0, 4))).tolist()))
        assert digests(kinds[kind](workers), tokenizer, world_size, cuts) == whole


# A run


def test_a_mixed_and_balanced_run_goes_on_and_says_what_it_saw(
    recipe: Callable[..., Path], shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_shapes(tmp_path / "other")
    entries = [{"set": str(shapes), "weight": 3}, {"set": str(other), "weight": 1}]
    path = recipe(data__set="", data__mix=entries, data__balance="label", train__epochs=1, train__global_batch=48)
    assert cli.main(["train", str(path)]) == 0
    run = tmp_path / "runs" / "tiny"
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    assert [Path(one["path"]).name for one in environment["shard_sets"]] == ["shapes", "other"]
    about = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    capsys.readouterr()
    assert cli.main(["plan", str(path), "--step", "0"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 48
    assert {(name, times_round) for _, name, times_round in lines} == {("shapes", "0"), ("other", "0")}
    assert sum(name == "other" for _, name, _ in lines) in range(8, 17)
    assert all(key.startswith(f"{name}/shape-") for key, name, _ in lines)
    assert int(about["data/digest"], 16) == sum(consumed_hash(0, key) for key, _, _ in lines) & MASK_64
    shutil.rmtree(other)
    write_shapes(other, zstd=True)
    assert cli.main(["train", str(path), "train.epochs=2"]) == 2
    refused = capsys.readouterr().err
    assert "another recipe (train.epochs" in refused
    assert cli.main(["train", str(path)]) == 2
    assert f"has seen another version of {other}" in capsys.readouterr().err
