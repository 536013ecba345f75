"""The line before the model: who is computed with whom, in which order, and what happens to those who give up."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Hashable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdist.publish.serve.batching import Batcher, Stopped
from clipdist.publish.serve.metrics import Metrics


class Doubling:
    """Computes 2x, notes what came together, and waits while `gate` is closed."""

    def __init__(self) -> None:
        self.calls: list[tuple[Hashable, list[Any]]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, kind: Hashable, items: Sequence[Any]) -> list[Any]:
        self.calls.append((kind, list(items)))
        self.gate.wait(20)
        if "bad" in items:
            raise ValueError("bad item")
        return [2 * item for item in items]


@asynccontextmanager
async def batcher(compute: Any, **options: Any) -> AsyncIterator[Batcher]:
    made = Batcher(compute, metrics=Metrics(), **({"max_batch": 4, "max_wait_seconds": 0.0} | options))
    try:
        yield made
    finally:
        made.close()


async def until(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.001)


@settings(max_examples=25, deadline=None)
@given(
    asked=st.lists(st.tuples(st.sampled_from(["images", "texts", "calls"]), st.integers(0, 99)), max_size=30),
    max_batch=st.integers(1, 6),
)
def test_everyone_gets_their_own_answer(asked: list[tuple[str, int]], max_batch: int) -> None:
    async def main() -> None:
        compute = Doubling()
        compute.gate.clear()
        async with batcher(compute, max_batch=max_batch, alone="calls") as line:
            tasks = [asyncio.create_task(line.ask(kind, (n, item))) for n, (kind, item) in enumerate(asked)]
            await asyncio.sleep(0)
            compute.gate.set()
            made = await asyncio.gather(*tasks)
        assert [one for one, _ in made] == [2 * (n, item) for n, (_, item) in enumerate(asked)]
        for kind, items in compute.calls:
            assert len(items) <= (1 if kind == "calls" else max_batch)
            assert {asked[n][0] for n, _ in items} == {kind}
            assert items == sorted(items), "older ones first"
            assert all(made[n][1] == len(items) for n, _ in items)
        for kind in ("images", "texts", "calls"):
            numbers = [n for one, items in compute.calls for n, _ in items if one == kind]
            assert numbers == [n for n, (one, _) in enumerate(asked) if one == kind]

    asyncio.run(main())


def test_a_bad_item_fails_alone() -> None:
    async def main() -> None:
        compute = Doubling()
        compute.gate.clear()
        async with batcher(compute) as line:
            first = asyncio.create_task(line.ask("a", 1))
            await until(lambda: compute.calls)
            others = [asyncio.create_task(line.ask("a", item)) for item in (2, "bad", 3)]
            await until(lambda: len(line) == 3)
            compute.gate.set()
            assert await first == (2, 1)
            found = await asyncio.gather(*others, return_exceptions=True)
            assert found[0] == (4, 1)
            assert isinstance(found[1], ValueError)
            assert found[2] == (6, 1)
            assert await line.ask("a", 5) == (10, 1), "and the line goes on"

    asyncio.run(main())


def test_those_who_give_up_are_not_computed_and_the_others_move_up() -> None:
    async def main() -> None:
        compute = Doubling()
        compute.gate.clear()
        async with batcher(compute, max_batch=1) as line:
            tasks = [asyncio.create_task(line.ask("a", n, f"ticket-{n}")) for n in range(4)]
            await until(lambda: len(line) == 3)
            assert [line.position(f"ticket-{n}") for n in range(5)] == [None, 1, 2, 3, None]
            assert line.busy_seconds() > 0
            tasks[1].cancel()
            await until(lambda: line.position("ticket-1") is None)
            assert [line.position(f"ticket-{n}") for n in range(4)] == [None, None, 1, 2]
            compute.gate.set()
            found = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(found[1], asyncio.CancelledError)
        assert [items for _, items in compute.calls] == [[0], [2], [3]]

    asyncio.run(main())


def test_it_waits_for_others_only_while_they_are_coming() -> None:
    async def main() -> None:
        compute, coming = Doubling(), [True]
        async with batcher(compute, max_wait_seconds=20.0, coming=lambda: coming[0]) as line:
            tasks = [asyncio.create_task(line.ask("a", n)) for n in range(3)]
            await asyncio.sleep(0.1)
            assert not compute.calls, "a fourth is on its way"
            tasks.append(asyncio.create_task(line.ask("a", 3)))
            assert await asyncio.gather(*tasks) == [(0, 4), (2, 4), (4, 4), (6, 4)]
            coming[0] = False
            began = time.monotonic()
            assert await line.ask("a", 9) == (18, 1)
            assert time.monotonic() - began < 10, "nobody else comes"
        async with batcher(compute, max_wait_seconds=0.05) as line:
            began = time.monotonic()
            assert await line.ask("a", 9) == (18, 1)
            assert time.monotonic() - began >= 0.05, "somebody may come"

    asyncio.run(main())


def test_the_end_refuses_all_that_waits() -> None:
    async def main() -> None:
        compute = Doubling()
        compute.gate.clear()
        line = Batcher(compute, max_batch=1, max_wait_seconds=0, metrics=Metrics())
        assert line.alive
        tasks = [asyncio.create_task(line.ask("a", n)) for n in range(3)]
        await until(lambda: len(line) == 2)
        closing = asyncio.get_running_loop().run_in_executor(None, line.close)
        await until(lambda: not line.alive)
        with pytest.raises(Stopped):
            await line.ask("a", 4)
        compute.gate.set()
        await closing
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert found[0] == (0, 1)
        assert [type(one) for one in found[1:]] == [Stopped, Stopped]

    asyncio.run(main())
