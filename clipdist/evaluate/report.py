"""`report.html` of a run: one file that opens without a network, and says what it could not find.

Read from the run directory, each only if present: `config.yaml`, `environment.json`, `metrics.jsonl`,
`bad_samples.jsonl`, `evaluation/*.json`. In `environment.json` these keys are looked for at any depth: `world_size`,
`hosts`, `gpus` (names, one per device), `parameters` (name -> number), `shard_sets` (objects with `path`, `splits`
(name -> samples), `license`, `notes`, of which `synthetic` is shown), `clipdist`, `torch`, `commit`; and at the top
`cpu` (`model`, `cores`). Without `shard_sets`, the manifest in the folder that the configuration's `data.set` names is
read.
"""

import base64
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

import clipdist
from clipdist.data.shards import write_atomically
from clipdist.errors import UserError
from clipdist.evaluate import classifier_page, plots
from clipdist.evaluate.examples import CaptionExample, Example, Mistake, look_uris, thumbnail_uri
from clipdist.evaluate.sections import FIGURES, sections
from clipdist.train.records import BAD_SAMPLES, METRICS, read_records

_DIRECTIONS = {"image_to_text": "image → text", "text_to_image": "text → image"}
_LONGEST_LIST = 50


def write_report(
    run: Path,
    *,
    examples: Sequence[Example] = (),
    caption_examples: Sequence[CaptionExample] = (),
    mistakes: Sequence[Mistake] = (),
    worst: Sequence[Example] = (),
    relevance: str = "",
    scores: dict[str, Any] | None = None,
    title: str | None = None,
) -> Path:
    """Writes `run/report.html` and returns its path; what the run directory lacks is named in it.

    The examples are presented as drawn at random, so draw them so (`Gallery.draw`), and `worst` as the images furthest
    from their texts. `relevance` says in words by which method their looks were made. `scores`, of the shape of
    `RetrievalScores.to_dict()` with or without `data`, `split` and `model`, become the headline; otherwise it is the
    evaluation of a split called test, or else the first evaluation, or else the last validation. Those of a classifier
    have the shape of `Classified.body`, and so has what its model folder says of the validation that chose it.

    Raises `UserError` when `run` is no directory.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such run directory; name one that a training run has written")
    log = _read(run)
    classified = classifier_page.bodies(log.other_evaluations, scores, log.kept)
    log.other_evaluations = [one for one in log.other_evaluations if not classifier_page.is_classified(one[1])]
    log.other_evaluations += classified
    evaluations = [] if classified else _evaluations(log, scores)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"score": _score, "count": _count, "chance": _chance}
    page = environment.get_template("report.html.j2").render(
        title=title or run.resolve().name,
        finished=_finished(log),
        facts=_facts(log),
        notices=[*_notices(log, evaluations), *(classifier_page.notices(*classified[0]) if classified else [])],
        sections=_sections(evaluations, log),
        missing=log.missing,
        evaluations=evaluations,
        headline=_headline(evaluations),
        classifier=classifier_page.cards(*classified[0]) if classified else None,
        mistakes=classifier_page.pictures(mistakes),
        curves=_curves(log.records),
        figures=_score_figures(_headline(evaluations)),
        examples=[_example(one) for one in examples],
        worst=[_example(one) for one in worst],
        relevance=relevance,
        first=sum(one.rank == 1 for one in examples),
        among=sum(one.rank <= 5 for one in examples),
        caption_examples=[_caption_example(one) for one in caption_examples],
        caption_first=sum(one.rank == 1 for one in caption_examples),
        directions=_DIRECTIONS,
        config=log.config_text,
        environment=json.dumps(log.environment, indent=2, ensure_ascii=False) if log.environment else "",
        others=[(name, json.dumps(body, indent=2, ensure_ascii=False)) for name, body in log.other_evaluations],
        bad_samples=log.bad_samples[:_LONGEST_LIST],
        bad_count=len(log.bad_samples),
        version=clipdist.__version__,
    )
    path = run / "report.html"
    write_atomically(path, page.encode())
    return path


@dataclass
class _Log:
    """What a run directory holds, and in words what it does not."""

    run: Path
    records: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    evaluations: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    other_evaluations: list[tuple[str, Any]] = field(default_factory=list)
    bad_samples: list[dict[str, Any]] = field(default_factory=list)
    kept: Any = None
    """What the model folder says of its scores."""
    missing: list[str] = field(default_factory=list)

    def numbers(self, key: str) -> np.ndarray:
        return plots.series(self.records, key)[1]

    def last(self, key: str) -> Any:
        return next((record[key] for record in reversed(self.records) if record.get(key) is not None), None)


def _read(run: Path) -> _Log:
    log = _Log(run)
    if (path := run / METRICS).exists():
        log.records, damaged = read_records(path)
        if damaged:
            log.missing.append(f"metrics.jsonl: {damaged} damaged lines were left out")
    if not log.records:
        log.missing.append("metrics.jsonl: missing or empty, so there are no curves and no times")
    if (path := run / "config.yaml").exists():
        log.config_text = path.read_text(encoding="utf-8", errors="replace")
        try:
            log.config = yaml.safe_load(log.config_text)
        except yaml.YAMLError as error:
            log.missing.append(f"config.yaml: not valid YAML ({str(error).splitlines()[0]})")
    else:
        log.missing.append("config.yaml: missing, so towers and settings are unknown")
    environment = _json(run / "environment.json", log)
    if environment is None:
        log.missing.append("environment.json: no usable one, so hardware and versions are unknown")
    log.environment = environment if isinstance(environment, dict) else {}
    log.config = log.config if isinstance(log.config, dict) else {}
    for path in sorted((run / "evaluation").glob("*.json")):
        body = _json(path, log)
        if isinstance(body, dict) and all(isinstance(body.get(name), dict) for name in _DIRECTIONS):
            log.evaluations.append((path.stem, body))
        elif body is not None:
            log.other_evaluations.append((path.stem, body))
    log.kept = _json(run / "model" / "scores.json", log)
    if not log.evaluations and log.config.get("objective") != "classify":
        log.missing.append("evaluation/: no retrieval scores, so there is no interval beside those of validation")
    if (path := run / BAD_SAMPLES).exists():
        log.bad_samples, damaged = read_records(path)
        if damaged:
            log.missing.append(f"bad_samples.jsonl: {damaged} damaged lines were left out")
    return log


def _json(path: Path, log: _Log) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        log.missing.append(f"{path.relative_to(log.run)}: cannot be read ({error})")
        return None


def _evaluations(log: _Log, scores: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Every evaluation with a `name`, the headline first."""
    found = [{**body, "name": _named(body, stem)} for stem, body in log.evaluations]
    found.sort(key=lambda body: body.get("split") != "test")
    if scores is not None:
        found = [body for body in found if any(body[name] != scores.get(name) for name in _DIRECTIONS)]
        found.insert(0, {**scores, "name": _named(scores, "evaluation")})
    if not found and (validation := _last_validation(log.records)):
        found = [validation]
    return found


def _headline(evaluations: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    return evaluations[0] if evaluations else None


def _named(body: Mapping[str, Any], otherwise: str) -> str:
    data = Path(str(body["data"])).name if body.get("data") else ""
    return ", ".join(part for part in (data, str(body.get("split") or "")) if part) or otherwise


def _last_validation(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The last validation in the shape of an evaluation, without intervals and chance."""
    record = next((one for one in reversed(records) if one.get("val/image_to_text/R@1") is not None), None)
    if record is None:
        return None
    found: dict[str, Any] = {"name": f"last validation, step {_count(record.get('step'))}"}
    galleries = {
        "image_to_text": record.get("val/gallery_texts", record.get("val/gallery")),
        "text_to_image": record.get("val/gallery"),
    }
    for direction, gallery in galleries.items():
        prefix = f"val/{direction}/"
        cells: dict[str, Any] = {
            key.removeprefix(prefix): {"value": value} for key, value in record.items() if key.startswith(prefix)
        }
        found[direction] = cells | ({"gallery": int(gallery)} if gallery else {})
    return found | {name: record.get(f"val/{name}") for name in ("cosine_pos", "cosine_neg")}


def _finished(log: _Log) -> str:
    if moment := _moment(log.last("time")):
        return f"{moment.day} {moment:%B %Y, %H:%M} UTC"
    return ""


def _moment(value: Any) -> datetime | None:
    """A time given in seconds since 1970 or in ISO 8601; None for anything else, such as seconds since the start."""
    if isinstance(value, int | float) and value > 1e9:
        return datetime.fromtimestamp(value, UTC)
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return moment.astimezone(UTC)


def _facts(log: _Log) -> list[tuple[str, str]]:
    """What was trained, on what, where, for how long; only what is known."""
    steps, losses = plots.series(log.records, "train/loss")
    batch = _find(log.config, "global_batch")
    seen = f"{int(steps[-1] * batch):,}" if len(steps) and isinstance(batch, int) else ""
    speed, memory = log.numbers("perf/samples_per_second"), log.numbers("perf/memory_gib")
    wait, utilisation = log.numbers("data/wait_fraction"), log.numbers("perf/mfu")
    facts = {
        "Image tower": _tower(log.config, "image"),
        "Text tower": _tower(log.config, "text"),
        "Parameters": _parameters(_find(log.environment, "parameters")),
        "Data": " · ".join(_shard_sets(log)),
        "Global batch": _count(batch),
        "Steps": f"{int(steps[-1]):,}" if len(steps) else "",
        "Samples seen": seen,
        "Time": _duration(log.records),
        "Throughput": f"{np.median(speed):,.0f} samples/s (median)" if len(speed) else "",
        "Waiting for data": f"{wait.mean():.1%} of the time" if len(wait) else "",
        "Hardware": _hardware(log.environment),
        "Processes": _count(_find(log.environment, "world_size")),
        "Share of peak FLOP/s": f"{utilisation.mean():.1%}" if len(utilisation) else "",
        "Peak memory": f"{memory.max():.1f} GiB per process" if len(memory) else "",
        "Final training loss": f"{losses[-1]:.4g}" if len(losses) else "",
        "Versions": _versions(log.environment),
        "Order digest": _digest(log.last("data/digest")),
    }
    return [(name, value) for name, value in facts.items() if value]


def _tower(config: Mapping[str, Any], which: str) -> str:
    model = config.get("model")
    value = model.get(which) if isinstance(model, dict) else None
    if isinstance(value, dict):
        name, pretrained = value.get("name"), value.get("pretrained")
        return f"{name}{', pretrained' if pretrained else ''}" if name else ""
    return str(value) if value else ""


def _parameters(counts: Any) -> str:
    if isinstance(counts, int):
        return _millions(counts)
    if not isinstance(counts, dict):
        return ""
    return ", ".join(f"{name} {_millions(number)}" for name, number in counts.items() if isinstance(number, int))


def _millions(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e5 else f"{number:,}"


def _shard_sets(log: _Log) -> Iterator[str]:
    sets = _find(log.environment, "shard_sets")
    if not sets and isinstance(folder := _find(log.config.get("data"), "set"), str):
        try:
            sets = [{"path": folder, **json.loads(Path(folder, "manifest.json").read_text(encoding="utf-8"))}]
        except (OSError, ValueError):
            sets = [{"path": folder}]
    for one in sets if isinstance(sets, list) else []:
        if not isinstance(one, dict):
            continue
        name = str(one.get("name") or Path(str(one.get("path") or "unnamed")).name)
        splits = found if isinstance(found := one.get("splits"), dict) else {}
        sizes = [f"{split} {_count(n.get('samples') if isinstance(n, dict) else n)}" for split, n in splits.items()]
        license_text = " ".join(str(one.get("license") or "not stated").split())
        short = license_text if len(license_text) <= 120 else f"{license_text[:119]}…"
        yield ", ".join([name, *sizes, *(["synthetic"] if _synthetic(one) else []), f"licence: {short}"])


def _synthetic(shard_set: Mapping[str, Any]) -> bool:
    return bool(_find(shard_set.get("notes"), "synthetic") or shard_set.get("synthetic"))


def _hardware(environment: Mapping[str, Any]) -> str:
    gpus, hosts = _find(environment, "gpus"), _find(environment, "hosts")
    names = (
        [str(gpu.get("name", "GPU") if isinstance(gpu, dict) else gpu) for gpu in gpus]
        if isinstance(gpus, list)
        else []
    )
    devices = ", ".join(f"{number} × {name}" for name, number in Counter(names).items())
    if not devices and gpus is not None:
        cpu = found if isinstance(found := environment.get("cpu"), dict) else {}
        cores = f"{cpu['cores']} cores" if cpu.get("cores") else ""
        devices = ", ".join(part for part in ("CPU only", str(cpu.get("model") or ""), cores) if part)
    nodes = f"{len(hosts)} node{'s' if len(hosts) > 1 else ''}" if isinstance(hosts, list) and hosts else ""
    return " on ".join(part for part in (devices, nodes) if part)


def _versions(environment: Mapping[str, Any]) -> str:
    names = ("clipdist", "torch", "commit")
    found = {name: _find(environment, name) for name in names}
    return ", ".join(f"{name} {str(value)[:16]}" for name, value in found.items() if isinstance(value, str) and value)


def _duration(records: Sequence[Mapping[str, Any]]) -> str:
    times = [moment for record in records if (moment := _moment(record.get("time")))]
    if len(times) < 2:
        return ""
    minutes = round((max(times) - min(times)).total_seconds() / 60)
    spent = f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{max(1, minutes)} min"
    return f"{spent} from first to last logged step, pauses included"


def _digest(value: Any) -> str:
    return f"{value:016x}" if isinstance(value, int) and value >= 0 else str(value or "")


def _notices(log: _Log, evaluations: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader must know before quoting a number."""
    notices = []
    if any("synthetic" in described.split(", ") for described in _shard_sets(log)):
        notices.append(
            "The data are synthetic: scores say that training works, not how well it would work on real data."
        )
    headline = _headline(evaluations)
    if headline is None:
        return notices
    if duplicates := headline.get("duplicate_texts"):
        effect = (
            "Images of the same group count as right for each other."
            if headline.get("grouped")
            else "A query for one of these cannot be ranked first, so R@1 cannot reach 1."
        )
        notices.append(
            f"{_count(duplicates)} of {_count(headline.get('texts'))} texts also belong to another image. {effect}"
        )
    if left_out := headline.get("left_out"):
        notices.append(f"Samples of this split that could not be read, and so stand in no gallery: {len(left_out):,}.")
    notices += classifier_page.leak_notices(headline)
    if headline["name"].startswith("last validation"):
        notices.append(
            "These scores come from validation during training: no interval, and the split may have chosen the model."
        )
    return notices


def _curves(records: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    figures = [(title, _both_themes(draw, records)) for title, draw in plots.CURVES.values()]
    return [{"title": title, **figure} for title, figure in figures if figure]


def _score_figures(headline: Mapping[str, Any] | None, names: Sequence[str] = ("recall", "cosines")) -> list[Any]:
    if headline is None:
        return []
    figures = [(FIGURES[name][0], _both_themes(FIGURES[name][1], headline)) for name in names]
    return [{"title": title, **figure} for title, figure in figures if figure]


def _sections(evaluations: Sequence[dict[str, Any]], log: _Log) -> list[dict[str, Any]]:
    """What each evaluation has beside recall; those without retrieval are taken out of `log.other_evaluations`."""
    found, unknown = [], []
    others = [(stem, {**body, "name": _named(body, stem)}) for stem, body in _mappings(log.other_evaluations)]
    for stem, body in [*(("", one) for one in evaluations), *others]:
        try:
            shown = [
                {**vars(one), "of": body["name"], "figures": _score_figures(body, one.figures)}
                for one in sections(body)
            ]
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            log.missing.append(f"{body['name']}: a part of this evaluation is not as `clipdist eval` writes it")
            shown = []
        found += shown
        if stem and not shown:
            unknown.append(stem)
    log.other_evaluations = [
        (stem, body) for stem, body in log.other_evaluations if stem in unknown or not isinstance(body, dict)
    ]
    return found


def _mappings(pairs: Sequence[tuple[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return [(stem, body) for stem, body in pairs if isinstance(body, dict)]


def _both_themes(draw: Any, source: Any) -> dict[str, str]:
    light = draw(source)
    if light is None:
        return {}
    encode = {"light": light, "dark": plots.dark(light)}
    return {name: f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" for name, svg in encode.items()}


def _example(example: Example) -> dict[str, Any]:
    return {
        "key": example.key,
        "image": thumbnail_uri(example.image, 420),
        "looks": look_uris(example.looks, 224),
        "true_texts": list(example.true_texts),
        "ranked": list(example.ranked),
        "rank": example.rank,
    }


def _caption_example(example: CaptionExample) -> dict[str, Any]:
    ranked = [(score, thumbnail_uri(image, 200), right) for score, image, right in example.ranked]
    return {"text": example.text, "key": example.key, "ranked": ranked, "rank": example.rank}


def _find(tree: Any, name: str) -> Any:
    """The value of the shallowest key `name` in nested mappings; None without one."""
    level = [tree]
    while level:
        mappings = [one for one in level if isinstance(one, dict)]
        for mapping in mappings:
            if mapping.get(name) is not None:
                return mapping[name]
        level = [value for mapping in mappings for value in mapping.values()]
    return None


def _score(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "–"


def _count(value: Any) -> str:
    if not isinstance(value, int | float):
        return ""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def _chance(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, int | float) else "–"
