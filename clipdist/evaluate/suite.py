"""The parts of an evaluation beside retrieval over the full gallery, each only when it is asked for."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipdist.data.shards import ShardSet
from clipdist.errors import UserError
from clipdist.evaluate.embed import Embeddings, embed_split
from clipdist.evaluate.estimates import Measured, unit_name
from clipdist.evaluate.leaks import Evaluated, Leaks, find_leaks, trained_on
from clipdist.model.saved import Saved, SavedModel

if TYPE_CHECKING:
    from clipdist.evaluate.classifier import Predictions


@dataclass(frozen=True)
class Asked:
    """What to measure on `split` of a shard set; a part that is left out is not measured.

    `zero_shot` and `probe` name fields of the samples: one with a class as its value, or for `probe` several, each with
    1 where the label holds and 0 where it does not. `calibrate` and `probe_train` name splits to fit on, never the one
    that is scored.
    """

    split: str
    groups: str
    unit: str = "unit"
    bootstrap: int = 1000
    seed: int = 0
    workers: int = 2
    in_batch: int | None = None
    pool: int | None = None
    zero_shot: str | None = None
    classes: Path | None = None
    templates: Sequence[str] = ()
    calibrate: str | None = None
    probe: Sequence[str] = ()
    probe_train: str = "train"
    probe_features: str = "tower"
    fractions: Sequence[float] = (0.01, 0.1, 1.0)
    by: Sequence[str] = ()

    def splits(self) -> list[str]:
        """All that are read. Raises `UserError` when something would be fitted on the rows that it is scored on."""
        fitted = {"--calibrate": self.calibrate, "--probe-train": self.probe_train if self.probe else None}
        for option, name in fitted.items():
            if name == self.split:
                raise UserError(f"{option} {name}: the split that is scored; expected another one to fit on")
        return [self.split, *(name for name in fitted.values() if name)]


@dataclass(frozen=True)
class Part:
    """A part of the evaluation: `body` stands under `name` in its JSON, `table` on the terminal, `outcomes` in the file
    of single queries."""

    name: str
    body: Any
    table: str
    measured: dict[str, Measured] = field(default_factory=dict)
    outcomes: dict[str, np.ndarray] = field(default_factory=dict)


class Suite:
    """Measures one model on one split; `embeddings` are those of the split's full gallery.

    All ranks construct it, which embeds the other splits that are asked for; `parts` is for one of them."""

    def __init__(
        self, asked: Asked, saved: SavedModel, shard_set: ShardSet, embeddings: Embeddings, group: np.ndarray | None
    ) -> None:
        self.asked, self.saved, self.embeddings, self.group = asked, saved, embeddings, group
        self.scale = 1 / saved.temperature
        self.units = units_of(embeddings.fields, asked.unit)
        # A field that cannot be used is named before anything takes time.
        self.values = values_of(embeddings.fields, asked.by)
        splits = dict.fromkeys(asked.splits()[1:])
        self.others = {split: embed_for(asked, saved, shard_set, split) for split in splits}

    def parts(self, retrieval: Mapping[str, Measured]) -> list[Part]:
        """All parts asked for, in the order in which they are shown; subgroups see the scores of all before them."""
        found = [
            *([self.in_batch(self.asked.in_batch)] if self.asked.in_batch else []),
            *([self.pool(self.asked.pool)] if self.asked.pool else []),
            *(self.zero_shot(self.asked.zero_shot) if self.asked.zero_shot else []),
            *([self.probe()] if self.asked.probe else []),
        ]
        measured = dict(retrieval)
        for part in found:
            measured |= part.measured
        return [*found, *([subgroups_part(measured, self.values, self._resampled())] if self.values else [])]

    def in_batch(self, batch: int) -> Part:
        from clipdist.evaluate.pools import in_batch_scores

        e = self.embeddings
        scores = in_batch_scores(
            e.image_features_ND,
            e.text_features_MD,
            e.text_owner_M,
            batch=batch,
            scale=self.scale,
            group_N=self.group,
            **self._resampled(),
        )
        return Part("in_batch", scores.to_dict(), scores.table())

    def pool(self, pool: int) -> Part:
        from clipdist.evaluate.pools import pool_scores

        e = self.embeddings
        features = (e.image_features_ND, e.text_features_MD, e.text_owner_M, e.texts)
        scores = pool_scores(*features, pool=pool, group_N=self.group, **self._resampled())
        return Part("pool", scores.to_dict(), scores.table())

    def zero_shot(self, by: str) -> list[Part]:
        from clipdist.evaluate.classification import classification_scores
        from clipdist.evaluate.cosines import TIE_TOLERANCE
        from clipdist.evaluate.outcomes import outcomes_of_classes
        from clipdist.evaluate.zero_shot import TEMPLATES, class_features, class_logits, labels_of, read_classes

        names = read_classes(self.asked.classes) if self.asked.classes else None
        label_N, classes, left_out = labels_of(self.embeddings.fields, by, list(names) if names else None)
        prompts = [names[value] if names else [value] for value in classes]
        shown = [some[0] for some in prompts]
        if len(set(shown)) < len(shown):
            shown = [f"{value}: {name}" for value, name in zip(classes, shown, strict=True)]
        templates = list(self.asked.templates) or list(TEMPLATES)
        class_CD = class_features(self.saved.encode_text, prompts, templates)
        logits_NC = class_logits(self.embeddings.image_features_ND, class_CD, self.scale)
        tolerance = self.scale * TIE_TOLERANCE
        scores = classification_scores(logits_NC, label_N, shown, tolerance=tolerance, **self._resampled())
        about = {"field": by, "prompts": prompts, "templates": templates, "left_out": left_out, "scale": self.scale}
        table = "\n".join([scores.table(f"zero-shot by {by}"), *left_out_line(left_out)])
        outcomes = outcomes_of_classes("zero_shot", logits_NC, label_N, tolerance)
        found = [Part("zero_shot", {**scores.to_dict(), **about}, table, {"zero_shot": scores.measured}, outcomes)]
        if self.asked.calibrate:
            found.append(self._calibration(self.asked.calibrate, by, classes, class_CD, logits_NC, label_N, tolerance))
        return found

    def _calibration(
        self,
        split: str,
        by: str,
        classes: list[str],
        class_CD: np.ndarray,
        logits_NC: np.ndarray,
        label_N: np.ndarray,
        tolerance: float,
    ) -> Part:
        from clipdist.evaluate.calibration import calibrated, ends_at_bound, fit_temperature
        from clipdist.evaluate.zero_shot import class_logits, labels_of

        held = self.others[split]
        T = fit_temperature(
            class_logits(held.image_features_ND, class_CD, self.scale), labels_of(held.fields, by, classes)[0]
        )
        body, table = calibrated(
            logits_NC,
            label_N,
            T,
            fitted_on=split,
            at_bound=ends_at_bound(T),
            tolerance=tolerance,
            **self._resampled(),
        )
        return Part("calibration", {**body, "temperature": T / self.scale}, table)

    def probe(self) -> Part:
        from clipdist.evaluate.probe import label_matrix, probe_scores, probe_table
        from clipdist.evaluate.zero_shot import labels_of

        train, fields = self.others[self.asked.probe_train], list(self.asked.probe)
        left_out: dict[str, int] = {}
        labels: Any
        train_labels: Any
        # A value of -1 is how CheXpert marks a label as uncertain: no class of its own.
        several = len(fields) > 1 or any(str(one.get(fields[0])) in ("-1", "-1.0") for one in train.fields)
        if not several:
            train_labels, classes, _ = labels_of(train.fields, fields[0])
            labels, _, left_out = labels_of(self.embeddings.fields, fields[0], classes)
        else:
            classes = fields
            train_labels, labels = (label_matrix(one.fields, fields) for one in (train, self.embeddings))
        scores = probe_scores(
            self._features(train),
            train_labels,
            self._features(self.embeddings),
            labels,
            classes,
            fractions=self.asked.fractions,
            train_units=units_of(train.fields, self.asked.unit),
            **self._resampled(),
        )
        metric = "AUROC" if several or len(classes) == 2 else "accuracy"
        body = {
            "fields": fields,
            "classes": classes,
            "metric": metric,
            "fitted_on": self.asked.probe_train,
            "features": self.asked.probe_features,
            "left_out": left_out,
            "scores": [one.to_dict() for one in scores],
        }
        most = max(one.fraction for one in scores)
        measured = {f"{one.kind}_probe": one.measured for one in scores if one.fraction == most and one.measured}
        table = "\n".join([probe_table(scores, f"{metric} of {', '.join(fields)}"), *left_out_line(left_out)])
        return Part("probe", body, table, measured)

    def _resampled(self) -> dict[str, Any]:
        return {"units": self.units, "bootstrap": self.asked.bootstrap, "seed": self.asked.seed}

    def _features(self, embeddings: Embeddings) -> np.ndarray:
        if self.asked.probe_features == "joint":
            return embeddings.image_features_ND
        assert embeddings.tower_features_NF is not None
        return embeddings.tower_features_NF


def embed_for(asked: Asked, saved: SavedModel, shard_set: ShardSet, split: str) -> Embeddings:
    """A split's features, with the tower's own where probes want them. Raises `UserError` when nothing is readable."""
    embeddings = embed_split(
        saved.model,
        saved.tokenizer,
        shard_set.split(split),
        workers=asked.workers,
        tower_features=bool(asked.probe) and asked.probe_features == "tower",
    )
    if not embeddings.keys:
        place = shard_set.location
        raise UserError(f"{place}, split {split}: no readable sample; run: clipdist verify {place}")
    return embeddings


def described(args: Namespace, shard_set: ShardSet, saved: Saved, units: Sequence[Any] | None) -> dict[str, Any]:
    """What an evaluation belongs to, for its JSON."""
    return {
        "data": args.data,
        "data_digest": shard_set.manifest.digest,
        "split": args.split,
        "split_digest": shard_set.split(args.split).digest,
        "model": str(args.model),
        "model_digest": saved.digest,
        "unit": args.unit if units else None,
        "seed": args.seed,
    }


def leaks_of(
    args: Namespace,
    shard_set: ShardSet,
    saved: Saved,
    found: "Embeddings | Predictions",
    measured: Mapping[str, Measured],
    units: Sequence[Any] | None,
) -> Leaks:
    """What the model has seen of the evaluated images in training, and the scores of the others; `found` holds the
    images' `numbers_N`, `keys` and `fields`."""
    split = shard_set.split(args.split)
    evaluated = Evaluated(shard_set, split, found.numbers_N, found.keys, found.fields, args.unit)
    trained = trained_on(args.model, saved.about)
    leaks = find_leaks(evaluated, trained, saved.about.get("val_split"), level=args.audit, workers=args.workers)
    leaks.rescore(measured, units=units, bootstrap=args.bootstrap, seed=args.seed)
    return leaks


def units_of(fields: Sequence[Mapping[str, Any]], unit: str) -> list[str | None] | None:
    """The units of the images with these fields, None where no image names one. Raises `UserError` as `unit_name`."""
    units = [unit_name(one.get(unit)) for one in fields]
    return units if any(one is not None for one in units) else None


def values_of(fields: Sequence[Mapping[str, Any]], by: Sequence[str]) -> dict[str, list[Any]]:
    """The images' values of each field in `by`, which divides them into subgroups."""
    from clipdist.evaluate.subgroups import check_values

    found = {}
    for name in by:
        found[name] = [one.get(name) for one in fields]
        if all(value is None for value in found[name]):
            known = sorted({key for one in fields for key in one})
            raise UserError(f"subgroups by {name!r}: no sample has it; the fields are: {', '.join(known) or '-'}")
        check_values(found[name], name)
    return found


def subgroups_part(
    measured: Mapping[str, Measured], values: Mapping[str, list[Any]], resampled: Mapping[str, Any]
) -> Part:
    from clipdist.evaluate.subgroups import subgroup_scores

    found = [subgroup_scores(measured, some, field=name, **resampled) for name, some in values.items()]
    return Part("subgroups", [one.to_dict() for one in found], "\n\n".join(one.table() for one in found))


def query_part(queries: Any, saved: SavedModel, bootstrap: int, seed: int = 0) -> Part:
    """Precision@k of `queries`, as `candidates.read_queries` found them."""
    from clipdist.evaluate.candidates import query_scores

    encode = saved.encode_image if queries.kind == "image" else saved.encode_text
    scores = query_scores(
        encode(queries.items),
        queries.class_Q,
        saved.encode_image(queries.candidates),
        queries.has_GC,
        queries.classes,
        kind=queries.kind,
        bootstrap=bootstrap,
        seed=seed,
    )
    notes = [f"{queries.shared} images are both query and candidate, and find themselves"] if queries.shared else []
    body = {**scores.to_dict(), "queries_among_candidates": queries.shared}
    return Part("query_candidates", body, "\n".join([scores.table(), *notes]))


def left_out_line(counts: Mapping[str, int]) -> list[str]:
    """A line of what was left out, and how often; none for nothing."""
    if not counts:
        return []
    most = sorted(counts.items(), key=lambda one: -one[1])[:8]
    more = f" and {len(counts) - len(most)} other values" if len(counts) > len(most) else ""
    return [f"left out, {sum(counts.values()):,}: {', '.join(f'{name} ({count:,})' for name, count in most)}{more}"]
