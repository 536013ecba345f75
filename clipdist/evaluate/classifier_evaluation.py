"""`clipdist eval` of a classifier: the scores of its answers on one split, and what is written about them."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from clipdist.data.shards import ShardSet
from clipdist.errors import UserError
from clipdist.evaluate.classifier import Classified, Predictions, Temperature, predict_split
from clipdist.evaluate.cosines import TIE_TOLERANCE
from clipdist.evaluate.examples import Mistake
from clipdist.evaluate.outcomes import Outcomes, outcomes_of_classes
from clipdist.evaluate.relevance_pictures import looker_of
from clipdist.evaluate.suite import Part, described, leaks_of, left_out_line, subgroups_part, units_of, values_of
from clipdist.evaluate.zero_shot import labels_of
from clipdist.model.saved_classifier import SavedClassifier

REFUSED = {
    "groups": "it ranks nothing",
    "in_batch": "it ranks nothing",
    "pool": "it ranks nothing",
    "queries": "it ranks nothing",
    "zero_shot": "it knows its own classes alone",
    "calibrate": "its temperature was fitted in training, and is applied",
    "probe": "its own head is the probe",
}


def check_options(args: argparse.Namespace) -> None:
    """`UserError` for options that say nothing of a classifier."""
    for name, why in REFUSED.items():
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')}: {args.model} is a classifier: {why}; leave it out")


class ClassifierEvaluation:
    """Scores of one classifier on one split, by options that `check_options` has let pass. Images without a class of
    the model's are left out, and counted. All ranks construct it; one goes on."""

    def __init__(self, args: argparse.Namespace, shard_set: ShardSet, saved: SavedClassifier) -> None:
        self.args, self.shard_set, self.saved, self.split = args, shard_set, saved, shard_set.split(args.split)
        self.looker = looker_of(args.relevance, saved)
        self.found: Predictions = predict_split(saved.model, self.split, workers=args.workers)

    def score(self) -> None:
        """All that needs no other rank."""
        args, saved, shard_set = self.args, self.saved, self.shard_set
        fields, field = self.found.fields, saved.labels.field
        values = values_of(fields, args.by)  # a field that cannot be used is named before anything takes time
        label_N, _, left_out = labels_of(fields, field, saved.labels.names)
        units = units_of(fields, args.unit)
        how: dict[str, Any] = {"units": units, "bootstrap": args.bootstrap, "seed": args.seed}
        self.classified = Classified(self.found.logits_NK, label_N, saved.labels, left_out=left_out, **how)
        self.temperature = Temperature(saved.temperature, saved.fitted_on, saved.at_bound)
        self.parts = self._parts(values, how)
        logits_NK = self.classified.logits_NK
        arrays = outcomes_of_classes("classification", logits_NK, label_N, TIE_TOLERANCE)
        self.outcomes = Outcomes(self.found.keys, units, arrays)
        self.leaks = leaks_of(args, shard_set, saved, self.found, self.classified.measured, units)
        self.body = {
            **described(args, shard_set, saved, units),
            "bootstrap": args.bootstrap,
            "leaks": self.leaks.to_dict(),
            "left_out": [{"key": key, "reason": reason} for _, key, reason in self.found.bad],
            **{part.name: part.body for part in self.parts},
        }

    def tables(self) -> list[str]:
        """Plain text, for a terminal."""
        return [*(part.table for part in self.parts), self.leaks.table()]

    def _parts(self, values: dict[str, list[Any]], how: dict[str, Any]) -> list[Part]:
        one = self.classified
        told = one.scores.table(f"classification by {one.labels.field}")
        confused = [f"  {c['class']} for {c['taken_for']}: {c['rows']:,} of {c['of']:,}" for c in one.confused[:5]]
        lines = [told, *(["mistaken most often", *confused] if confused else []), *left_out_line(one.left_out)]
        found = [Part("classification", one.classification(), "\n".join(lines), one.measured)]
        body, table = one.calibration(self.temperature)
        found.append(Part("calibration", body, table))
        return [*found, *([subgroups_part(one.measured, values, how)] if values else [])]

    def mistakes(self, most: int) -> list[Mistake]:
        """The wrong answers of the highest probability, as calibrated."""
        one = self.classified
        probability_NK = one.probabilities(self.temperature)
        given_N = probability_NK.argmax(axis=1)
        wrong = np.flatnonzero((one.label_N >= 0) & (given_N != one.label_N))
        worst = wrong[np.argsort(-probability_NK[wrong, given_N[wrong]], kind="stable")][:most]
        names = one.labels.names
        return [
            Mistake(
                image=self._image(row),
                key=self.found.keys[row],
                label=names[one.label_N[row]],
                given=names[given_N[row]],
                probability=float(probability_NK[row, given_N[row]]),
                of_the_label=float(probability_NK[row, one.label_N[row]]),
            )
            for row in worst.tolist()
        ]

    def _image(self, row: int) -> bytes:
        return self.split.read(int(self.found.numbers_N[row])).image

    def report(self, run: Path) -> Path:
        """The run's report anew, with the worst mistakes in pictures."""
        from clipdist.evaluate.report import write_report

        mistakes = self.mistakes(self.args.examples)
        if self.looker:
            mistakes = self.looker.mistakes(mistakes)
        told = self.looker.in_words if self.looker else ""
        return write_report(run, mistakes=mistakes, relevance=told, scores=self.body)
