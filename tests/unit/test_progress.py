"""What long work tells of itself where no terminal is."""

import pytest

from clipdist.progress import progress


@pytest.mark.parametrize(("every", "counts"), [(0.0, [1, 2, 3]), (60.0, [3])])
def test_lines_now_and_then_and_the_last_one_once(
    every: float, counts: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    given = list(progress(iter("abc"), total=3, unit="shard", description="verifying", every_seconds=every))
    assert given == list("abc")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(counts)
    assert all(f"{count} of 3 shards" in line for line, count in zip(lines, counts, strict=True))


def test_nothing_to_do_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress([], unit="shard")) == []
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress([1, 2], quiet=True)) == [1, 2]
    assert capsys.readouterr().err == ""
