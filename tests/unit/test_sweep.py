"""Sweeps: what their words mean, what is refused, what is sent again, and the table and plot of what came of it; on a
real SLURM: tests/cluster."""

import argparse
import csv
import io
import itertools
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from clipdist.cluster import scheduler, sweep
from clipdist.cluster.submit import add_resource_arguments
from clipdist.cluster.sweep import Plan, plan, prepare, read_record, resumed, run_here, states, write, write_record
from clipdist.cluster.sweep_plot import cut, draw
from clipdist.cluster.sweep_table import Results, Row, as_csv, as_json, as_text, duration, read_results, write_results
from clipdist.cluster.sweep_words import combinations, count, read_words, run_name
from clipdist.errors import UserError
from clipdist.train.run_folder import hold
from tests.conftest import TrainedRun
from tests.distributed.test_training import ROOT, column

CPU = ("--gpus-per-node", "0", "--processes-per-node", "1", "--accelerate-config", "launch/accelerate/cpu.yaml")
RATES = "optim.lr=1e-3,5e-3,2e-2"


def resources(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_resource_arguments(parser)
    return parser.parse_args([*CPU, *given])


def run(*given: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/sweep.py", *map(str, given)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **{"timeout": 240, **options})


@pytest.mark.parametrize(
    ("word", "texts"),
    [
        ("optim.lr=1e-4,3e-4", ("1e-4", "3e-4")),
        ("a= 1 , 2 ", ("1", "2")),
        ("a=[1,2]", ("[1,2]",)),
        ("train.stages=[{from_epoch: 0, image: none}],[]", ("[{from_epoch: 0, image: none}]", "[]")),
        ("a='x,y',z", ("'x,y'", "z")),
        ("a='it''s, so',z", ("'it''s, so'", "z")),
        (r'a="x\",y",z', (r'"x\",y"', "z")),
        ("a=don't,won't", ("don't", "won't")),
        ("a={b: 'c,d'},null", ("{b: 'c,d'}", "null")),
        ("a='log(1,2)'", ("'log(1,2)'",)),
        ("a=b=c,d", ("b=c", "d")),
    ],
)
def test_commas_part_values_outside_of_brackets_and_quotes(word: str, texts: tuple[str, ...]) -> None:
    (key,) = read_words([word])
    assert (key.texts, key.search) == (texts, "")
    assert key.varies == (len(texts) > 1)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("optim.lr", "expected key=value"),
        ("=1,2", "expected key=value"),
        ("optim.lr=", "no value"),
        ("optim.lr=1,,2", "a value is missing beside a comma"),
        ("optim.lr=1,2,", "a value is missing beside a comma"),
        ("a=[1,2", "] is missing"),
        ("a=1)", ") closes nothing"),
        ("a=[1)", ") closes nothing"),
        ("a='x,y", "' is missing"),
        ("a=log(1,2),3", "stand alone"),
        ("a=loguniform(1,2)", "no function loguniform; one of: log, uniform, choice, range"),
        ("a=log(1)", "expected log(low,high) with 2 numbers"),
        ("a=log(1,x)", "expected log(low,high) with 2 numbers"),
        ("a=uniform(0,inf)", "expected uniform(low,high) with 2 numbers"),
        ("a=log(0,1)", "expected 0 < low < high, found 0 and 1"),
        ("a=uniform(2,1)", "expected low < high, found 2 and 1"),
        ("a=choice()", "nothing to choose from"),
        ("a=range(1,2)", "expected range(first,last,step) with 3 numbers"),
        ("a=range(1,9,0)", "no step of 0 leads from 1 to 9"),
        ("a=range(9,1,2)", "no step of 2 leads from 9 to 1"),
        ("a=range(0,1,1e-9)", "use uniform or log"),
        ("name=x", "--name names the sweep"),
        ("runs=a,b", "runs cannot be searched over"),
        ("evaluate.monitor=val/loss,val/mean_R@1", "what the runs are compared by"),
        ("a+b=[1,2],[3]", "found [3], expected a list with a value for each of a, b, such as […,…]"),
        ("a+b=1,2", "found 1, expected a list with a value for each of a, b"),
        ("a+=[1,2]", "found [1,2], expected a list"),
        ("a+b=log(1,2)", "keys together take lists of values, not numbers of log"),
        ("a+runs=[1,2],[3,4]", "runs cannot be searched over"),
    ],
)
def test_words_that_mean_nothing(word: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        read_words([word])
    assert said in str(caught.value)
    assert word in str(caught.value)


def test_a_key_stands_once() -> None:
    with pytest.raises(UserError, match=r"optim.lr: given twice"):
        read_words(["optim.lr=1,2", "optim.lr=3"])
    with pytest.raises(UserError, match=r"optim.lr: given twice"):
        read_words(["optim.lr+train.epochs=[1,2],[3,4]", "optim.lr=3"])


def test_keys_that_take_their_values_together(recipe: Callable[..., Path]) -> None:
    keys = read_words(["a+b.c=[1,[2,3]],['x,y',null]", "d=5,6", "e+f=choice([0,1],[2,3])"])
    assert count(keys, 1) == 4
    made = list(combinations(keys, 1, 0))
    assert [words[:3] for words in made] == [
        ["a=1", "b.c=[2,3]", "d=5"],
        ["a=1", "b.c=[2,3]", "d=6"],
        ["a='x,y'", "b.c=null", "d=5"],
        ["a='x,y'", "b.c=null", "d=6"],
    ]
    assert all(words[3:] in (["e=0", "f=1"], ["e=2", "f=3"]) for words in made)
    planned = plan(recipe(), ["optim.lr+train.epochs=[1e-3,3],[1e-4,5]"], "together")
    assert [(c.optim.lr, c.train.epochs) for c in planned.configs.values()] == [(1e-3, 3), (1e-4, 5)]
    assert list(planned.values.values()) == [
        {"optim.lr": 1e-3, "train.epochs": 3},
        {"optim.lr": 1e-4, "train.epochs": 5},
    ]
    assert resumed(planned, 0, 0).keys == {"optim.lr": "grid", "train.epochs": "grid"}


@pytest.mark.parametrize(("file", "runs"), [("towers", 8), ("rates", 60), ("temperatures", 7)])
def test_the_sweeps_of_a_file(file: str, runs: int, shapes: Path) -> None:
    """What stands after the file on the command line counts, too."""
    path = f"@launch/sweeps/skincap_{file}.txt"
    done = run(path, *CPU, "--cluster", "local", "--dry-run", f"data.set={shapes}")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^new ", done.stdout, re.MULTILINE)) == runs


def test_a_grid_is_every_combination_with_every_draw() -> None:
    keys = read_words(["a=1,2", "b=x", "c=3,4", "d=uniform(0,1)"])
    assert count(keys, 3) == 12
    made = list(combinations(keys, 3, 0))
    assert len(made) == 12
    assert [words[:3] for words in made[:4]] == [[f"a={a}", "b=x", f"c={c}"] for a in "12" for c in "34"]
    draws = [words[3] for words in made]
    assert [len(set(draws[start : start + 4])) for start in (0, 4, 8)] == [1, 1, 1], "one draw for the whole grid"
    assert len(set(draws)) == 3


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("a=range(1,7,2)", ["1", "3", "5", "7"]),
        ("a=range(0,0.3,0.1)", ["0.0", "0.1", "0.2", "0.3"]),
        ("a=range(5,1,-2)", ["5", "3", "1"]),
        ("a=choice('a,b',[1,2],null)", ["'a,b'", "[1,2]", "null"]),
    ],
)
def test_one_of_several_is_drawn(word: str, values: list[str]) -> None:
    (key,) = read_words([word])
    drawn = [key.draw(0, number) for number in range(200)]
    assert sorted(set(drawn)) == sorted(values)
    counts = [drawn.count(value) for value in values]
    assert min(counts) > 200 / len(values) / 2, "evenly"


ends = st.tuples(st.floats(1e-8, 1e8), st.floats(1e-8, 1e8)).filter(lambda pair: pair[0] < pair[1])


@example(ends=(0.12345678, 0.12345679), seed=0, number=0, search="uniform")  # rounded, it lies beyond
@given(ends=ends, seed=st.integers(0, 2**40), number=st.integers(0, 10**6), search=st.sampled_from(["log", "uniform"]))
def test_draws_lie_between_the_ends_and_depend_on_nothing_else(
    ends: tuple[float, float], seed: int, number: int, search: str
) -> None:
    low, high = ends
    word = f"optim.lr={search}({low!r},{high!r})"
    (alone,) = read_words([word])
    _, among = read_words(["a=1,2", word])
    text = alone.draw(seed, number)
    assert low <= float(text) <= high
    assert text == among.draw(seed, number)


def test_draws_are_spread_evenly_by_their_logarithm() -> None:
    (key,) = read_words(["a=log(1e-5,1e-2)"])
    decades = np.floor(np.log10([float(key.draw(7, number)) for number in range(3000)]))
    assert all(abs(int((decades == decade).sum()) - 1000) < 120 for decade in (-5, -4, -3))
    assert key.draw(7, 0) != key.draw(8, 0)
    (other,) = read_words(["b=log(1e-5,1e-2)"])
    assert key.draw(7, 0) != other.draw(7, 0), "two keys are not drawn alike"


@given(few=st.integers(1, 10), more=st.integers(0, 10), seed=st.integers(0, 99))
def test_more_draws_keep_the_first(few: int, more: int, seed: int) -> None:
    keys = read_words(["a=1,2", "b=log(1e-5,1)", "c=choice(x,y,z)"])
    assert list(combinations(keys, few + more, seed))[: 2 * few] == list(combinations(keys, few, seed))


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = scalars | st.lists(scalars, max_size=3)
combination = st.dictionaries(
    st.sampled_from(["optim.lr", "model.image.name", "model.text.name", "seed"]), values, min_size=1
)


@given(one=combination, other=combination)
@settings(max_examples=300)
def test_names_are_safe_stable_and_tell_runs_apart(one: dict[str, Any], other: dict[str, Any]) -> None:
    name = run_name(one)
    assert re.fullmatch(r"[a-z][A-Za-z0-9._+=-]{0,115}", name)
    assert name == run_name(dict(reversed(one.items())))
    assert (name == run_name(other)) == (json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True))


def test_a_name_tells_the_values() -> None:
    found = run_name({"optim.lr": 0.0003, "model.image.name": "timm:resnet50", "model.temperature.learned": False})
    assert re.fullmatch(r"image\.name=resnet50_temperature\.learned=false_optim\.lr=0\.0003_[0-9a-f]{8}", found)


def test_a_plan(recipe: Callable[..., Path]) -> None:
    path = recipe()
    planned = plan(path, ["optim.lr=1,2e-3", "model.width=16,32", "train.epochs=7"], "grid")
    assert planned.folder == path.parent / "runs" / "grid"
    assert [(config.optim.lr, config.model.width) for config in planned.configs.values()] == [
        (1.0, 16), (1.0, 32), (0.002, 16), (0.002, 32),
    ]  # fmt: skip
    assert {config.train.epochs for config in planned.configs.values()} == {7}
    assert all(config.folder == planned.folder / name for name, config in planned.configs.items())
    names = list(planned.configs)
    assert planned.values[names[0]] == {"optim.lr": 1.0, "model.width": 16}
    assert list(plan(path, ["model.width=32,16", "optim.lr=0.002,1.0"], "grid").configs)[::-1] == [
        names[0], names[2], names[1], names[3],
    ], "however the same values are written, and in whatever order"  # fmt: skip
    assert not planned.folder.exists()


def test_draws_that_coincide_are_one_run(recipe: Callable[..., Path]) -> None:
    planned = plan(recipe(), ["model.width=choice(16,32)"], "drawn", draws=9)
    assert (planned.combinations, len(planned.configs)) == (9, 2)
    assert "2 runs, 2 new; 7 draws have the values of another" in sweep.summary(
        planned, dict.fromkeys(planned.configs, "new")
    )


@pytest.mark.parametrize(
    ("words", "options", "said"),
    [
        (["optim.lrr=1,2"], {}, "optim.lrr=1: command line: unknown key optim.lrr; did you mean lr?"),
        (["optim.lr=1e-3,fast"], {}, "optim.lr=fast: command line: optim.lr='fast'"),
        (["model.width=16,1.5"], {}, "model.width=1.5: command line: model.width=1.5: Input should be a valid integer"),
        (["model.width=uniform(16,32)"], {"draws": 1}, "Input should be a valid integer"),
        (["train.epochs=3"], {}, "nothing varies"),
        ([], {}, "nothing varies"),
        (["optim.lr=0.001,1e-3"], {}, "optim.lr=1e-3: these values stand there a second time"),
        (["optim.lr=log(1e-4,1e-2)"], {}, "say how often with --random"),
        (["optim.lr=1e-4,1e-2"], {"draws": 3}, "no key is drawn at random"),
        (["seed=range(1,20,1)", "optim.lr=1,2"], {"draws": 200}, "mean 400 runs, more than 200; .* --max-runs 400"),
        (["optim.lr=1,2"], {"at_most": 1}, "mean 2 runs, more than 1"),
        (["optim.lr=1,2"], {"name": "a/b"}, "--name 'a/b': expected a plain folder name"),
    ],
)
def test_what_is_wrong_with_a_plan(
    words: list[str], options: dict[str, Any], said: str, recipe: Callable[..., Path]
) -> None:
    path = recipe()
    with pytest.raises(UserError, match=said):
        plan(path, words, **{"name": "x", **options})
    assert not (path.parent / "runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.global_batch=24,25"], r"global_batch=25\w*: train.global_batch=25 does not divide"),
        (["data.set=nowhere"], "shard set nowhere: there is no such folder"),
        (["evaluate.patience=1", "data.train_split=train,trian"], "no split 'trian'"),
    ],
)
def test_every_combination_is_checked_before_anything_is_queued(
    words: list[str], said: str, recipe: Callable[..., Path]
) -> None:
    planned = plan(recipe(), [*words, "seed=1,2"], "x")
    with pytest.raises(UserError, match=said):
        prepare(planned, states(planned, resumed(planned, 0, 0)), resources("--processes-per-node", "2"))
    assert not planned.folder.exists()


def begin(planned: Plan) -> None:
    write_record(planned.folder, resumed(planned, 0, 0))


def finish(planned: Plan, name: str, trained: Path, finished: bool = True) -> None:
    """Puts a run where the plan has one."""
    folder = Path(shutil.copytree(trained, planned.folder / name))
    if not finished:
        path = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip() / "state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"finished": False}))


def test_the_same_command_sends_what_is_left(
    recipe: Callable[..., Path], trained_run: TrainedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(train__epochs=4, log__tensorboard=True)
    planned = plan(path, ["optim.lr=5e-3,1e-3,2e-3,3e-3,4e-3"], "rates")
    finished, unfinished, stopped, queued, new = planned.configs
    begin(planned)
    finish(planned, finished, trained_run.folder)
    finish(planned, unfinished, trained_run.folder, finished=False)
    (planned.folder / unfinished / "config.yaml").unlink()  # which has another learning rate
    finish(planned, stopped, trained_run.folder, finished=False)
    (planned.folder / stopped / "stop").touch()
    record = read_record(planned.folder)
    record.jobs = {finished: "7_0", unfinished: "7_1", stopped: "7_2", queued: "7_3"}
    write_record(planned.folder, record)

    more = plan(path, ["optim.lr=5e-3,1e-3,2e-3,3e-3,4e-3,6e-3"], "rates")
    record = resumed(more, 0, 0)
    assert record.jobs[queued] == "7_3"
    monkeypatch.setattr(scheduler, "queue", lambda: {"7_3": "PENDING", "8": "RUNNING"})
    found = states(more, record, sending=True)
    *_, added = more.configs
    told = {unfinished: "goes on", stopped: "stopped", queued: "in the queue", new: "new", added: "new"}
    assert found == {finished: "finished", **told}
    assert list(prepare(more, found, resources())) == [unfinished, new, added]

    monkeypatch.setattr(scheduler, "queue", lambda: None)
    with pytest.raises(UserError, match="squeue does not answer"):
        states(more, record, sending=True)
    assert states(more, record)[queued] == "new", "for a dry run, where there is no SLURM"


def test_fewer_values_take_no_run_away(recipe: Callable[..., Path]) -> None:
    path = recipe()
    planned = plan(path, [RATES], "rates")
    begin(planned)
    fewer = plan(path, ["optim.lr=5e-3,9e-3"], "rates")
    assert set(resumed(fewer, 0, 0).runs) == set(planned.configs) | set(fewer.configs)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([RATES, "train.epochs=9"], r"train.epochs: 3 → 9"),
        ([RATES, "seed=1,2"], r"keys that vary: optim.lr → optim.lr, seed"),
        (["seed=1,2"], r"keys that vary: optim.lr → seed"),
    ],
)
def test_another_recipe_is_refused(words: list[str], said: str, recipe: Callable[..., Path]) -> None:
    path = recipe()
    first = plan(path, [RATES], "rates")
    begin(first)
    other = plan(path, words, "rates")
    with pytest.raises(UserError, match=rf"the sweep there was made with another recipe \({said}\).*--force"):
        resumed(other, 0, 0)
    forced = resumed(other, 0, 0, force=True)
    assert set(forced.runs) == set(first.configs) | set(other.configs)


def test_what_changes_no_result_may_change(recipe: Callable[..., Path]) -> None:
    path = recipe()
    begin(plan(path, [RATES], "rates"))
    resumed(plan(path, ["optim.lr=2e-3,1e-4", "data.workers=2", "log.every_steps=5"], "rates"), 0, 0)


def test_a_run_of_that_name_is_left_alone(recipe: Callable[..., Path]) -> None:
    planned = plan(recipe(), [RATES], "rates")
    planned.folder.mkdir(parents=True)
    (planned.folder / "config.yaml").touch()
    with pytest.raises(UserError, match="there is a run of that name"):
        resumed(planned, 0, 0)


def test_more_jobs_than_an_array_can_have(recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(recipe(), [RATES], "rates")
    found = states(planned, resumed(planned, 0, 0))
    monkeypatch.setattr(scheduler, "largest_array", lambda: 2)
    with pytest.raises(UserError, match=r"3 runs to send, and an array has at most 2 jobs here \(MaxArraySize\)"):
        prepare(planned, found, resources())
    assert len(prepare(planned, found, resources("--cluster", "local"))) == 3


def test_each_job_trains_by_a_file_of_its_own(recipe: Callable[..., Path]) -> None:
    planned = plan(recipe(), [RATES], "rates")
    record = resumed(planned, 0, 0)
    jobs = write(planned, record, prepare(planned, states(planned, record), resources()))
    for name, job in jobs.items():
        (written,) = job.training.words
        assert yaml.safe_load(Path(written).read_text())["optim"]["lr"] == planned.values[name]["optim.lr"]
        assert job.training.shared == planned.folder / ".jobs"
        assert job.checkpoint().function == job, "a signal before the start submits the same again"
    assert read_record(planned.folder) == record


def test_a_dry_run_prints_the_runs_and_one_array(recipe: Callable[..., Path]) -> None:
    path = recipe()
    done = run(path, "--name", "grid", *CPU, "--at-once", "2", "--dry-run", RATES, "model.width=16,32")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["new"] * 6
    assert "#SBATCH --array=0-5%2" in lines
    assert f"#SBATCH --output={path.parent}/runs/grid/slurm/%A_%a_0_log.out" in lines
    assert subprocess.run(["bash", "-n"], input="\n".join(lines[6:]), text=True).returncode == 0
    assert not (path.parent / "runs").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--name", "x", "optim.lr=1,x"), "clipdist: error: optim.lr=x: command line: optim.lr='x'"),
        (("--name", "x", "optim.lr=1,2", "--cluster", "local", "--at-once", "2"), "--at-once 2: expected 0 or more"),
        (("optim.lr=1,2",), "expected a recipe, and --name, or --show"),
        (("--show", "somewhere"), "--show shows a sweep that there is"),
    ],
)
def test_what_is_wrong_ends_with_code_2(
    given: tuple[str, ...], said: str, recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    script = runpy.run_path(str(ROOT / "launch" / "sweep.py"))
    with pytest.raises(SystemExit) as ended:
        script["run_script"](lambda: script["main"]([str(recipe()), *CPU, *given]))
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert (told.out, said in told.err) == ("", True), told.err


def test_what_is_no_sweep_cannot_be_shown_and_gets_no_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no sweep there; expected runs/<sweep>"):
        write_results(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_two_commands_at_once(recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(recipe(), [RATES], "rates")
    code = f"""import sys, time, pathlib; from clipdist.cluster.sweep import held
with held(pathlib.Path({str(planned.folder)!r})): print('held', flush=True); time.sleep(100)"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert other.stdout
        other.stdout.readline()
        monkeypatch.setattr(sweep, "hold", lambda folder: hold(folder, 0.2))
        with pytest.raises(UserError, match=r"another launch/sweep.py is at work there"), sweep.held(planned.folder):
            pass
    finally:
        other.kill()
        other.wait()
    with sweep.held(planned.folder):
        pass


def test_a_script_that_a_task_leaves_requeues_its_own_job_of_an_array(tmp_path: Path) -> None:
    """By its place: the number that SLURM gives it may be that of the whole array."""
    from clipdist.cluster.submit import TEARDOWN

    fake = tmp_path / "scontrol"
    fake.write_text(
        f'#!/bin/sh\ncase "$*" in\n*hostnames*) echo n1 ;;\n*show*) echo JobState=RUNNING ;;\n'
        f'*) echo "$@" > {tmp_path}/asked ;;\nesac\n'
    )
    fake.chmod(0o755)
    (tmp_path / "sleep").symlink_to("/bin/true")
    script = f"(exit 137)\n{TEARDOWN.format(python=sys.executable, shared=tmp_path / 'shared', crashes=10)}"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "40", "SLURM_JOB_NODELIST": "n1"}
    for more, expected in (({}, "40"), ({"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "3"}, "40_3")):
        done = subprocess.run(["bash", "-c", script], env=environment | more, timeout=120)
        assert (done.returncode, (tmp_path / "asked").read_text()) == (75, f"requeue {expected}\n")
        assert (tmp_path / "shared" / expected / "crashes.json").exists()


def test_a_job_of_an_array_is_called_by_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    from clipdist import world

    monkeypatch.setenv("SLURM_JOB_ID", "40")
    assert world.slurm_job()["job"] == "40"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert world.slurm_job()["job"] == "40_3"


def test_a_table_of_a_sweep_half_done(
    recipe: Callable[..., Path], trained_run: TrainedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = plan(recipe(train__epochs=4), [RATES], "rates")
    first, second, third = planned.configs
    begin(planned)
    finish(planned, second, trained_run.folder)
    finish(planned, third, trained_run.folder, finished=False)
    metrics = planned.folder / third / "metrics.jsonl"
    worse = [json.loads(line) for line in metrics.read_text().splitlines()]
    worse = [record | {key: value / 2 for key, value in record.items() if key == "val/mean_R@1"} for record in worse]
    metrics.write_text("".join(json.dumps(record) + "\n" for record in worse))
    results = read_results(planned.folder)
    told = [(row.run, row.state) for row in results.rows]
    assert told == [(second, "finished"), (third, "training"), (first, "new")]
    best = results.rows[0]
    scores = column(trained_run.folder, "val/mean_R@1")
    seconds = sum(column(trained_run.folder, "perf/step_seconds").values())
    assert (best.score, best.gallery, best.step, best.epoch) == (max(scores.values()), 32, 28, 4)
    assert best.loss == column(trained_run.folder, "train/loss")[28]
    assert best.seconds == pytest.approx(seconds)
    heading, line, *rest = as_text(results).splitlines()
    assert heading.split() == [
        "optim.lr", "state", "mean_R@1", "gallery", "loss", "step", "epoch", "training", "starts", "run",
    ]  # fmt: skip
    assert line.split()[:4] == ["0.005", "finished", f"{best.score:.4f}", "32"]
    assert len(rest) == 2
    write_results(planned.folder)
    assert json.loads((planned.folder / "sweep.json").read_text())["runs"][0]["values"] == {"optim.lr": 0.005}
    assert Image.open(planned.folder / "sweep.png").size[0] > 800
    with open(planned.folder / "sweep_epochs.csv", encoding="utf-8") as file:
        epochs = [(one["run"], one["epoch"]) for one in csv.DictReader(file)]
    assert epochs == [(run, str(epoch)) for run in (second, third) for epoch in (1, 2, 3, 4)]
    assert Image.open(planned.folder / "sweep_epochs.png").size[0] > 800


@pytest.mark.parametrize(
    ("queue", "expected"),
    [({"9_0": "PENDING", "9_1": "RUNNING"}, ["queued", "new", "ended"]), (None, ["new", "new", "new"])],
)
def test_the_queue_tells_more_of_runs_that_wait(
    queue: dict[str, str] | None, expected: list[str], recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(recipe(), [RATES], "rates")
    record = resumed(planned, 0, 0)
    record.jobs = {name: f"9_{place}" for place, name in enumerate(planned.configs)}
    write_record(planned.folder, record)
    monkeypatch.setattr(scheduler, "queue", lambda: queue)
    assert [row.state for row in read_results(planned.folder).rows] == expected


def row(run: str, values: dict[str, Any], score: float | None, **more: Any) -> Row:
    known = Row(run, values, "finished", 10, 2, score, 385, 1.5, 65.0, 1, "")
    return replace(known, **more)


def test_a_csv_that_others_read() -> None:
    keys = {"model.image.name": "grid", "train.stages": "grid", "model.temperature.learned": "grid"}
    rows = [row("a", dict(zip(keys, ["timm:x,y", [{"from_epoch": 0}], True], strict=True)), 0.5, job="7_1")]
    rows += [row("b", dict(zip(keys, ["timm:z", [], False], strict=True)), None, gallery=None, loss=None, epoch=None)]
    results = Results("s", keys, "val/loss", rows)
    first, second = csv.DictReader(io.StringIO(as_csv(results)))
    assert first["model.image.name"] == "timm:x,y"
    assert json.loads(first["train.stages"]) == [{"from_epoch": 0}]
    assert (first["model.temperature.learned"], first["val/loss"], first["val/gallery"]) == ("true", "0.5", "385")
    assert (second["val/loss"], second["epoch"], second["train/loss"]) == ("", "", "")
    assert json.loads(as_json(results))["higher_is_better"] is False


def test_towers_of_one_name_are_told_apart() -> None:
    names = ["timm:bert", "hf:bert"]
    results = Results("s", {"n": "grid"}, "val/loss", [row(name, {"n": name}, 1.0) for name in names])
    assert list(results.labels("n").values()) == names
    alone = replace(results, rows=results.rows[:1])
    assert list(alone.labels("n").values()) == ["bert"]


def test_long_names_are_cut_but_never_to_the_same() -> None:
    names = ["convnext_tiny.in12k_ft_in1k", "convnext_tiny.in12k_ft_in1k_384", "short"]
    assert cut(names) == ["convnext_tiny.i…2k_ft_in1k", "convnext_tiny.i…t_in1k_384", "short"]
    alike = [f"{'a' * 20}{middle}{'b' * 20}" for middle in "xy"]
    assert cut(alike) == alike


@pytest.mark.parametrize(("seconds", "text"), [(7.2, "0:07"), (750, "12:30"), (11100, "3:05:00")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


TOWERS = ["timm:resnet50", "timm:convnext_tiny.in12k_ft_in1k", "timm:vit_base_patch16_224", "timm:b", "timm:swin_tiny"]
GRID = list(itertools.product(TOWERS, ["hf:bert", "hf:a-very-long-name-of-a-tower-for-texts"], [3e-5, 1e-4, 1e-3]))


def figure_of(results: Results, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Matplotlib's own, before it is made a picture."""
    from clipdist.cluster import sweep_plot

    kept = []
    monkeypatch.setattr(sweep_plot, "render", lambda figure, form: kept.append(figure) or b"")
    draw(results)
    return kept[0]


def shown_axes(figure: Any) -> list[Any]:
    return [axes for axes in figure.axes if axes.get_visible()]


def test_a_panel_for_each_of_several_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["model.image.name", "model.text.name", "optim.lr"]
    rows = [row(str(n), dict(zip(keys, one, strict=True)), 0.4 - 0.001 * n) for n, one in enumerate(GRID)]
    rows[3] = replace(rows[3], state="training")
    figure = figure_of(Results("towers", dict.fromkeys(keys, "grid"), "val/mean_R@1", rows), monkeypatch)
    panels = shown_axes(figure)
    assert [axes.get_xlabel() for axes in panels] == ["image.name", "text.name", "optim.lr"]
    assert panels[0].get_ylabel() == "mean R@1\n(gallery 385, chance 0.0026)"
    assert [axes.get_xscale() for axes in panels] == ["linear", "linear", "log"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["not finished", "median", "best: 0.4000"]
    assert figure.legends[0].get_title().get_text() == "towers: 30 runs, 29 finished"
    hollow = [line for line in panels[0].lines if line.get_markerfacecolor() == "white"]
    assert [line.get_ydata()[0] for line in hollow] == [rows[3].score]
    assert_nothing_overlaps(figure, panels)


def assert_nothing_overlaps(figure: Any, panels: list[Any]) -> None:
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    width, height = figure.get_size_inches() * figure.dpi
    assert legend.x1 <= width
    for axes in panels:
        labels = [text for text in axes.get_xticklabels() if text.get_text() and text.get_visible()]
        low, high = axes.get_window_extent().x0 - 1, axes.get_window_extent().x1 + 1
        boxes = [text.get_window_extent() for text in labels]
        boxes = [box for text, box in zip(labels, boxes, strict=True) if text.get_rotation() or low <= box.x0 <= high]
        if not any(text.get_rotation() for text in labels):
            boxes.sort(key=lambda box: box.x0)
            assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
        assert all(box.y0 >= -1 and box.x0 >= -1 for box in boxes)
        assert not legend.overlaps(axes.yaxis.label.get_window_extent()) or not axes.get_ylabel()
        assert axes.get_window_extent().y1 <= legend.y0 <= height


def test_two_keys_are_lines_in_one_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"optim.lr": "grid", "model.image.name": "grid"}
    pairs = list(itertools.product([1e-4, 3e-4, 1e-3], TOWERS))
    rows = [row(str(n), dict(zip(keys, one, strict=True)), 0.4 - 0.01 * n) for n, one in enumerate(pairs)]
    figure = figure_of(Results("s", keys, "val/mean_R@1", rows), monkeypatch)
    (panel,) = shown_axes(figure)
    joined = [line for line in panel.lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 3]
    assert len(joined) == len(TOWERS)
    assert panel.get_xscale() == "log"
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[:2] == ["b", "convnext_tiny.i…2k_ft_in1k"]
    assert_nothing_overlaps(figure, [panel])


@pytest.mark.parametrize(
    ("search", "values", "scale"),
    [
        ("grid", [1e-4, 1e-3], "log"),
        ("grid", [0.1, 0.2, 0.5], "linear"),
        ("grid", [0.0, 1.0, 100.0], "linear"),
        ("log", [0.1, 0.2], "log"),
        ("uniform", [0.001, 0.2, 0.4], "linear"),
    ],
)
def test_an_axis_of_numbers(search: str, values: list[float], scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(str(value), {"optim.lr": value}, 0.1) for value in values]
    (panel,) = shown_axes(figure_of(Results("s", {"optim.lr": search}, "val/mean_R@1", rows), monkeypatch))
    assert panel.get_xscale() == scale
    assert {line.get_xdata()[0] for line in panel.lines if line.get_marker() == "o"} == set(values)


def test_sixty_draws_of_four_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "optim.lr=log(1e-5,1e-2)",
        "model.projection.dropout=uniform(0,0.5)",
        "model.width=choice(256,512)",
        "b=choice(true,false)",
    ]
    keys = read_words(words)
    drawn = [{key.key: yaml.safe_load(key.draw(3, n)) for key in keys} for n in range(60)]
    drawn = [{**one, "optim.lr": float(one["optim.lr"])} for one in drawn]
    rows = [row(str(n), one, 0.3 - 0.05 * abs(math.log10(one["optim.lr"]) + 3.5)) for n, one in enumerate(drawn)]
    rows.sort(key=lambda one: -(one.score or 0))
    results = Results("drawn", {key.key: key.search for key in keys}, "val/mean_R@1", rows)
    figure = figure_of(results, monkeypatch)
    panels = shown_axes(figure)
    assert len(panels) == 4
    assert_nothing_overlaps(figure, panels)
    monkeypatch.undo()
    assert (draw(results) or b"").startswith(b"\x89PNG")


def test_without_scores_the_loss_and_without_that_no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(str(n), {"seed": n}, None, gallery=None, loss=3.0 - n) for n in range(3)]
    results = Results("s", {"seed": "grid"}, "val/mean_R@1", rows)
    (panel,) = shown_axes(figure_of(results, monkeypatch))
    assert panel.get_ylabel() == "training loss, last step"
    monkeypatch.undo()
    assert draw(replace(results, rows=[replace(one, loss=None) for one in rows])) is None


def test_one_that_fails_does_not_keep_the_others_from_running(
    recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(recipe(), [RATES], "rates")
    record = resumed(planned, 0, 0)
    args = resources("--cluster", "local")
    jobs = prepare(planned, states(planned, record), args)
    names = list(jobs)
    ends = {names[0]: 1, names[1]: 75, names[2]: 0}
    monkeypatch.setattr(sweep.submit, "run_here", lambda job, *_: ends[job.training.run.name])
    assert list(run_here(jobs, sweep.submit.resources_of(args), print)) == [(names[0], 1), (names[1], 75)], (
        "75: asked to stop"
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sweep_on_this_machine(recipe: Callable[..., Path]) -> None:
    """From the script to table and plot; and once more, when nothing is left to do."""
    path = recipe(train__epochs=1)
    given = (path, "--name", "rates", *CPU, "--cluster", "local", "--no-preflight", RATES)
    done = run(*given, timeout=1000)
    assert done.returncode == 0, done.stderr + done.stdout
    folder = path.parent / "runs" / "rates"
    with open(folder / "sweep.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [one["state"] for one in rows] == ["finished"] * 3
    assert sorted(float(one["optim.lr"]) for one in rows) == [0.001, 0.005, 0.02]
    assert len(list(folder.glob("*/evaluation/*.json"))) == 3
    assert Image.open(folder / "sweep.png").format == Image.open(folder / "sweep_epochs.png").format == "PNG"
    again = run(*given)
    assert again.returncode == 0, again.stderr
    assert f"{folder}: 3 runs, 3 finished" in again.stdout
    listed = subprocess.run(
        [str(Path(sys.executable).with_name("clipdist")), "runs", str(folder)], capture_output=True, text=True
    )
    assert listed.stdout.count("finished") == 3
