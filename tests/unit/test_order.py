"""The order contract: every sample once per epoch, whatever the shards, lanes and windows; equal for every world."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdist.data.order import Order, Windows, default_lanes, sample_generator, share, shuffled
from clipdist.errors import UserError

shards = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda counts: sum(counts) >= 24)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    lanes = draw(st.sampled_from([1, 2, 3, 4, 6]))
    return Order(
        np.array(draw(shards)),
        seed=draw(st.integers(0, 3)),
        global_batch=lanes * draw(st.integers(1, 24 // lanes)),
        lanes=lanes,
        window=draw(st.integers(1, 40)),
    )


@given(orders(), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_an_epoch_holds_each_sample_at_most_once_and_drops_less_than_a_batch(order: Order, epoch: int) -> None:
    batches = [order.batch(epoch * order.steps_per_epoch + step) for step in range(order.steps_per_epoch)]
    seen = np.concatenate([numbers for numbers, _ in batches])
    assert all((passes == epoch).all() for _, passes in batches)
    assert len(np.unique(seen)) == len(seen)
    assert seen.min() >= 0
    assert seen.max() < order.samples
    assert 0 <= order.samples - len(seen) < order.global_batch


@given(orders(), st.integers(1, 8), st.data())
@settings(max_examples=100, deadline=None)
def test_ranks_together_hold_the_global_batch(order: Order, world_size: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, order.steps_per_epoch - 1))
    step += order.steps_per_epoch
    parts = [order.rows(step, *share(order.global_batch, rank, world_size)) for rank in range(world_size)]
    for joined, whole in zip(map(np.concatenate, zip(*parts, strict=True)), order.batch(step), strict=True):
        assert np.array_equal(joined, whole)


@given(orders(), st.data())
@settings(max_examples=50, deadline=None)
def test_a_step_is_the_same_whatever_was_asked_before(order: Order, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, order.steps_per_epoch - 1)) + 2 * order.steps_per_epoch
    fresh = Order(
        order._line.counts, seed=order.seed, global_batch=order.global_batch, lanes=order.lanes, window=order.window
    )
    for other in range(order.steps_per_epoch, 4 * order.steps_per_epoch):
        order.batch(other)
    assert np.array_equal(order.batch(step).numbers, fresh.batch(step).numbers)


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=20), st.integers(1, 5000))
def test_windows_are_kept_within_their_room_and_always_the_same(sizes: list[int], room: int) -> None:
    windows = Windows(room)
    for number, size in enumerate([*sizes, *sizes]):
        found = windows.permutation(size, 1, number % len(sizes))
        assert np.array_equal(found, shuffled(size, "window", 1, number % len(sizes)))
        assert found.dtype.itemsize == (1 if size <= 256 else 2)
        assert sum(map(len, windows._kept.values())) <= max(room, size)


@given(orders(), st.data())
@settings(max_examples=100, deadline=None)
def test_replacements_walk_through_the_whole_lane(order: Order, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, order.steps_per_epoch - 1))
    row = data.draw(st.integers(0, order.global_batch - 1))
    walked = [order.replacement(step, row, attempt) for attempt in range(order.lane_length)]
    assert walked[0] == (order.batch(step).numbers[row], 0)
    assert len(set(walked)) == order.lane_length


def test_the_samples_left_out_differ_between_epochs() -> None:
    order = Order(np.array([100]), seed=0, global_batch=30)
    left_out = [
        set(range(100)) - set(np.concatenate([order.batch(3 * epoch + step).numbers for step in range(3)]))
        for epoch in range(4)
    ]
    assert len({frozenset(rest) for rest in left_out}) == 4


def test_epochs_and_seeds_give_other_orders() -> None:
    first = Order(np.array([50, 50]), seed=0, global_batch=20)
    second = Order(np.array([50, 50]), seed=1, global_batch=20)
    assert not np.array_equal(first.batch(0).numbers, first.batch(first.steps_per_epoch).numbers)
    assert not np.array_equal(first.batch(0).numbers, second.batch(0).numbers)


def test_the_order_is_pinned() -> None:
    """Written down once: a change here breaks the resumption of every run in flight and needs a new format version."""
    order = Order(np.array([5, 9, 3, 7]), seed=7, global_batch=8, lanes=2, window=6)
    assert order.batch(3 * order.steps_per_epoch + 1).numbers.tolist() == PINNED


PINNED = [19, 18, 1, 21, 4, 2, 11, 12]


def test_a_small_set_is_shuffled_as_a_whole_and_a_large_one_in_lanes() -> None:
    assert default_lanes(4_000, 96, 16_384) == 1
    assert default_lanes(10_000_000, 96, 16_384) == 32
    assert default_lanes(10_000_000, 4096, 40_000) == 64


def test_lanes_never_hold_more_windows_than_memory_takes() -> None:
    assert default_lanes(10**9, 4096, 400_000) == 8
    assert default_lanes(10**10, 4096, 5_000_000) == 1


def test_a_billion_samples_need_no_time_and_little_memory() -> None:
    order = Order(np.full(100_000, 10_000), seed=0, global_batch=32_768)
    numbers, passes = order.rows(6 * order.steps_per_epoch - 1, 0, 64)
    assert numbers.max() < 10**9
    assert set(passes) == {5}
    assert order._line.counts.nbytes + order._line._starts.nbytes < 2**21


def test_a_batch_larger_than_the_split_is_refused() -> None:
    with pytest.raises(UserError, match=r"has 10 samples, fewer than train\.global_batch=16"):
        Order(np.array([10]), seed=0, global_batch=16)


def test_lanes_must_divide_the_batch() -> None:
    with pytest.raises(UserError, match=r"data\.lanes=5 must divide train\.global_batch=16"):
        Order(np.array([100]), seed=0, global_batch=16, lanes=5)


def test_the_draws_of_a_sample_depend_on_seed_epoch_and_key_alone() -> None:
    first = sample_generator(1, 2, "a").random(4)
    assert np.array_equal(first, sample_generator(1, 2, "a").random(4))
    for other in [(2, 2, "a"), (1, 3, "a"), (1, 2, "b")]:
        assert not np.array_equal(first, sample_generator(*other).random(4))
