"""A sweep epoch by epoch, as table and plot."""

import csv
import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipdist.cluster import sweep_epochs
from clipdist.cluster.sweep_epochs import NAMED, as_csv, draw, epochs_of
from clipdist.cluster.sweep_table import Results, Row
from tests.conftest import TrainedRun
from tests.distributed.test_training import column


def logged(step: int, epoch: int, **values: float) -> dict[str, Any]:
    return {"step": step, "epoch": epoch} | {name.replace("__", "/"): value for name, value in values.items()}


def row(name: str, values: dict[str, Any], epochs: list[dict[str, float]], gallery: int | None = 800) -> Row:
    return Row(name, values, "finished", 10, 2, 0.1, gallery, 1.5, 65.0, 1, "", epochs)


def test_losses_are_means_and_validations_the_last() -> None:
    records = [
        logged(1, 0, train__loss=4.0),
        logged(2, 0, train__loss=2.0, train__lr=0.1),
        logged(2, 0, val__loss=3.0),
        logged(3, 1, train__loss=9.0),  # of a start that was lost: the next one logs these steps again
        logged(3, 1, train__loss=1.0),
        logged(4, 1, train__loss=float("nan")),
        logged(3, 1, val__loss=2.5),
        logged(4, 1, val__loss=2.0),
    ]
    assert epochs_of(records) == [
        {"epoch": 1, "train/loss": 3.0, "val/loss": 3.0},
        {"epoch": 2, "train/loss": 1.0, "val/loss": 2.0},
    ]
    assert epochs_of([]) == []


@given(st.lists(st.lists(st.floats(0, 10), min_size=1, max_size=4), min_size=1, max_size=5))
def test_every_epoch_has_its_mean(losses: list[list[float]]) -> None:
    records, step = [], 0
    for epoch, some in enumerate(losses):
        for loss in some:
            step += 1
            records.append(logged(step, epoch, train__loss=loss))
    found = epochs_of(records)
    assert [one["epoch"] for one in found] == list(range(1, len(losses) + 1))
    assert [one["train/loss"] for one in found] == pytest.approx([sum(some) / len(some) for some in losses])


def test_the_epochs_of_a_real_run(trained_run: TrainedRun) -> None:
    from clipdist.train.records import METRICS, read_records

    found = epochs_of(read_records(trained_run.folder / METRICS)[0])
    losses = column(trained_run.folder, "val/loss")
    assert [one["epoch"] for one in found] == [1, 2, 3, 4]
    assert [one["val/loss"] for one in found] == [losses[step] for step in sorted(losses)]
    assert found[-1]["train/loss"] < found[0]["train/loss"]


def test_a_csv_has_a_line_for_each_epoch_and_columns_for_what_was_measured() -> None:
    short = [{"epoch": 1, "train/loss": 3.0}]
    long = [{"epoch": 1, "train/loss": 2.0, "val/loss": 2.5}, {"epoch": 2, "train/loss": 1.0, "val/loss": 2.0}]
    results = Results("s", {"b": "grid"}, "val/loss", [row("x", {"b": True}, long), row("y", {"b": False}, short)])
    lines = list(csv.DictReader(io.StringIO(as_csv(results))))
    assert list(lines[0]) == ["run", "b", "epoch", "train/loss", "val/loss"]
    assert [(one["run"], one["b"], one["epoch"]) for one in lines] == [
        ("x", "true", "1"),
        ("x", "true", "2"),
        ("y", "false", "1"),
    ]
    assert [one["val/loss"] for one in lines] == ["2.5", "2.0", ""]


def figure_of(results: Results, monkeypatch: pytest.MonkeyPatch) -> Any:
    kept = []
    monkeypatch.setattr(sweep_epochs, "render", lambda figure, form: kept.append(figure) or b"")
    draw(results)
    return kept[0]


@pytest.mark.parametrize("runs", [1, 8, NAMED, NAMED + 5])
def test_a_panel_for_each_measure_and_a_line_for_each_run(runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs = [{"epoch": n, "train/loss": 3.0 / n, "val/loss": 3.0, "val/mean_R@1": 0.1 * n} for n in (1, 2, 3)]
    rows = [row(str(n), {"optim.lr": 0.1 * n, "name": "timm:a"}, epochs) for n in range(runs)]
    rows.append(row("new", {"optim.lr": 9.0, "name": "timm:a"}, [], None))
    results = Results("rates", {"optim.lr": "grid", "name": "grid"}, "val/mean_R@1", rows)
    figure = figure_of(results, monkeypatch)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_ylabel() for axes in panels] == ["training loss", "validation loss", "mean R@1 (gallery 800)"]
    assert all(len(axes.lines) == runs for axes in panels)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[0] == "optim.lr 0"
    assert len(texts) == min(runs, NAMED + 1)
    assert (texts[-1] == "all others") == (runs > NAMED)
    looks = {(line.get_color(), line.get_linestyle()) for line in panels[0].lines if line.get_marker() != "None"}
    assert len(looks) == min(runs, NAMED)
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert legend.x1 <= figure.get_size_inches()[0] * figure.dpi
    assert all(axes.get_window_extent().y1 <= legend.y0 for axes in panels)


def test_nothing_logged_yet_is_no_plot() -> None:
    assert draw(Results("s", {"b": "grid"}, "val/loss", [row("x", {"b": 1}, [])])) is None
