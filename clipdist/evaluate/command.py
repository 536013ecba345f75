"""Scores a model on one split of a shard set: retrieval over the full gallery, with 95 % bootstrap intervals.

Prints a table; writes JSON and plots beside the model's run (or into --out), and the run's report anew. What the other
options measure: docs/evaluate.md.

On several processes, with the same numbers:
accelerate launch --config_file launch/accelerate/cpu.yaml --num_processes 2 -m clipdist.cli eval …
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipdist import world
from clipdist.data.mixing import called
from clipdist.data.shards import ShardSet, checksum_file, write_atomically
from clipdist.errors import UserError, disk_errors
from clipdist.train.command import configure_logging
from clipdist.world import World

LEVELS = ("none", "index", "looks")  # those of leaks.py, which takes longer to import

HOURS_OF_SCORING = 7 * 24
"""For which all ranks but one wait: bootstraps, probes and near-duplicates are that one's work."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="model folder, such as runs/phantom/model")
    parser.add_argument("--data", metavar="SET", help="folder or URL of a shard set")
    parser.add_argument("--split", default="test", help="default: test")
    parser.add_argument(
        "--groups",
        help="images that count as each other's right answers: caption, a field such as label, or none; "
        "default: as in training",
    )
    parser.add_argument("--unit", default="unit", help="field resampled as a whole, such as a patient; default: unit")
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples; 0: no intervals; default: 1000")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn; default: 0")
    parser.add_argument("--examples", type=int, default=20, help="images shown in the report; default: 20")
    parser.add_argument(
        "--relevance",
        choices=("gradient", "attention", "grad-cam", "rollout", "off"),
        default="gradient",
        help="how the report shows what of an image speaks for a text; default: gradient, what suits the image tower",
    )
    parser.add_argument("--workers", type=int, default=2, help="loader processes; default: 2")
    parser.add_argument("--out", type=Path, help="folder for JSON and plots; default: evaluation/ beside the model")
    parser.add_argument("--device", help="cpu or cuda; default: a GPU when there is one")
    parser.add_argument(
        "--audit",
        choices=LEVELS,
        default="index",
        help="look for evaluated images in the training set: not, by keys, units and equal bytes, or besides by looks, "
        "which decodes every image; default: index",
    )
    _add_small_galleries(parser.add_argument_group("small galleries, which make scores comparable with published ones"))
    _add_classes(parser.add_argument_group("classes"))
    _add_queries(parser.add_argument_group("queries against labelled candidates, without --data too"))


def _add_small_galleries(group: Any) -> None:
    group.add_argument("--in-batch", type=int, metavar="K", help="mean recall and loss in batches of K, such as 32")
    group.add_argument("--pool", type=int, metavar="K", help="each image against K captions, such as 50: one is right")


def _add_classes(group: Any) -> None:
    group.add_argument("--zero-shot", metavar="FIELD", help="field with the class, for classification by class names")
    group.add_argument("--classes", type=Path, metavar="FILE", help="names for the field's values: JSON, or lines")
    group.add_argument("--templates", type=Path, metavar="FILE", help="prompts, one a line, {} for the class name")
    group.add_argument("--calibrate", metavar="SPLIT", help="split on which a temperature for probabilities is fitted")
    group.add_argument(
        "--probe",
        nargs="+",
        default=[],
        metavar="FIELD",
        help="linear probe and nearest neighbours on a field's classes, or on several fields of 0 and 1",
    )
    group.add_argument("--probe-train", default="train", metavar="SPLIT", help="split to fit probes on; default: train")
    group.add_argument(
        "--probe-features",
        choices=("tower", "joint"),
        default="tower",
        help="what probes see: the image tower's features, or the joint embedding; default: tower",
    )
    group.add_argument(
        "--fractions",
        type=float,
        nargs="+",
        default=[0.01, 0.1, 1.0],
        metavar="SHARE",
        help="shares of the labels for probes; default: 0.01 0.1 1",
    )
    group.add_argument(
        "--by", nargs="+", default=[], metavar="FIELD", help="fields to break scores down by, such as sex"
    )


def _add_queries(group: Any) -> None:
    group.add_argument(
        "--queries",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="tables with columns Variable and Path or Text",
    )
    group.add_argument(
        "--candidates",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="tables with a column Path and one per class; one for all queries, or one for each",
    )
    group.add_argument("--images", type=Path, metavar="FOLDER", help="folder that their paths start from")


def run(args: argparse.Namespace) -> int:
    configure_logging()
    check(args)
    # Missing data should be named before a model is loaded.
    shard_set = ShardSet.open(args.data) if args.data else None
    from clipdist.evaluate.candidates import read_queries

    queries = [read_queries(*files, args.images) for files in _query_files(args)]
    templates = _templates(args.templates)
    for split in _asked(args, "", templates).splits() if shard_set else ():
        assert shard_set is not None
        shard_set.split(split)
    from clipdist.model.saved import load
    from clipdist.model.saved_classifier import SavedClassifier

    who, device = join_ranks(args.device)
    saved, paths = load(args.model, device), []
    if not who.is_main:  # which alone writes, and so alone resamples
        args.bootstrap = 0
    evaluation: Any = None
    if isinstance(saved, SavedClassifier):
        from clipdist.evaluate.classifier_evaluation import ClassifierEvaluation, check_options

        check_options(args)
        assert shard_set is not None
        evaluation = ClassifierEvaluation(args, shard_set, saved)
    else:
        paths = _write_queries(args, queries, saved) if queries and who.is_main else []
        evaluation = Evaluation(args, shard_set, saved, templates) if shard_set is not None else None
    if who.is_main:
        if evaluation is not None:
            evaluation.score()
            print("\n\n".join(evaluation.tables()))
            paths += _write_evaluation(args, evaluation)
        for path in paths:
            print(path)
    leave_ranks(who)
    return 0


def join_ranks(device: str | None) -> tuple[World, Any]:
    """Who this process is among those of the launcher, and its device. Raises `UserError` when fewer are connected than
    were asked for."""
    chosen: Any = device
    if world.announced().world_size > 1:
        from clipdist.train.launched import make_accelerator

        accelerator = make_accelerator("fp32", hang_minutes=HOURS_OF_SCORING * 60 / 2)
        if device in (None, "cuda"):
            chosen = accelerator.device
    return world.check_size(), chosen


def leave_ranks(who: World) -> None:
    """Returns when the last has come here: a launcher takes the end of one for the end of all."""
    if who.world_size > 1:
        import torch

        try:
            world.barrier()
            # Otherwise its threads may still run while the interpreter ends, which aborts it.
            torch.distributed.destroy_process_group()
        except RuntimeError:  # rank 0 ended while this one waited
            if who.is_main:
                raise
            raise UserError("rank 0 has ended; its own message says why") from None


def out_folder(args: argparse.Namespace) -> Path:
    folder: Path = args.out or args.model.resolve().parent / "evaluation"
    return folder


def check(args: argparse.Namespace) -> None:
    """`UserError` for arguments that would fail late, or in the words of another library."""
    for name in ("bootstrap", "examples", "workers", "seed"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name}: found {getattr(args, name)}, expected 0 or more")
    if not (args.data or args.queries):
        raise UserError("nothing to score: expected --data SET, or --queries and --candidates with --images")
    if bool(args.queries or args.candidates) and not (
        args.queries and args.images and len(args.candidates) in (1, len(args.queries))
    ):
        raise UserError(
            f"--queries: found {len(args.queries)} files, {len(args.candidates)} of --candidates and "
            f"--images {args.images}; expected one file of candidates for all or one for each, and the images' folder"
        )
    names = [_query_name(file) for file in args.queries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"--queries: the scores of several files would be written as {', '.join(twice)}.json; score them in calls "
            "of their own, each with an --out"
        )
    for name in ("in_batch", "pool"):
        if getattr(args, name) is not None and getattr(args, name) < 2:
            raise UserError(f"--{name.replace('_', '-')}: found {getattr(args, name)}, expected 2 or more")
    if wrong := [share for share in args.fractions if not 0 < share <= 1]:
        raise UserError(f"--fractions: found {wrong[0]}, expected shares above 0 and up to 1")
    for name in ("classes", "templates", "calibrate"):
        if getattr(args, name) and not args.zero_shot:
            raise UserError(f"--{name} serves --zero-shot FIELD, which is missing")
    place = out_folder(args)
    while not place.exists():
        place = place.parent
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise UserError(f"--out {out_folder(args)}: {place} is no folder, or cannot be written; choose another")


def _templates(path: Path | None) -> list[str]:
    from clipdist.evaluate.zero_shot import read_templates

    return read_templates(path) if path else []


def _asked(args: argparse.Namespace, groups: str, templates: Sequence[str]) -> Any:
    from clipdist.evaluate.suite import Asked

    same = ("split", "unit", "bootstrap", "seed", "workers", "in_batch", "pool", "zero_shot", "classes", "calibrate")
    probes = ("probe", "probe_train", "probe_features", "fractions", "by")
    return Asked(groups=groups, templates=templates, **{name: getattr(args, name) for name in (*same, *probes)})


class Evaluation:
    """Scores of one model on one split, and what is written about them. All ranks construct it; one goes on."""

    def __init__(self, args: argparse.Namespace, shard_set: ShardSet, saved: Any, templates: Sequence[str]) -> None:
        from clipdist.evaluate.relevance_pictures import looker_of
        from clipdist.evaluate.retrieval import retrieval_scores
        from clipdist.evaluate.suite import Suite, embed_for, units_of
        from clipdist.train.validate import groups_of

        self.args, self.shard_set, self.saved, self.split = args, shard_set, saved, shard_set.split(args.split)
        # Here, so that a method that cannot be had is named before anything takes time.
        self.looker = looker_of(args.relevance, saved)
        self.groups_by = args.groups or saved.about.get("groups", "caption")
        asked = _asked(args, self.groups_by, templates)
        self.embeddings = embeddings = embed_for(asked, saved, shard_set, args.split)
        self.group = groups_of(embeddings, self.groups_by)
        self.units = units_of(embeddings.fields, args.unit)
        self.scores = retrieval_scores(
            embeddings.image_features_ND,
            embeddings.text_features_MD,
            embeddings.text_owner_M,
            group_N=self.group,
            units=self.units,
            precision=True,
            bootstrap=args.bootstrap,
            seed=args.seed,
            texts=embeddings.texts,
            shared=True,
        )
        self.suite = Suite(asked, saved, shard_set, embeddings, self.group)

    def score(self) -> None:
        """All that needs no other rank."""
        from clipdist.evaluate.outcomes import Outcomes, outcomes_of_retrieval
        from clipdist.evaluate.suite import described, leaks_of

        embeddings = self.embeddings
        measured = self.scores.measured(embeddings.text_owner_M)
        self.parts = self.suite.parts(measured)
        arrays = outcomes_of_retrieval(self.scores, embeddings.text_owner_M, embeddings.texts)
        for part in self.parts:
            measured |= part.measured
            arrays |= part.outcomes
        self.outcomes = Outcomes(embeddings.keys, self.units, arrays)
        self.leaks = leaks_of(self.args, self.shard_set, self.saved, embeddings, measured, self.units)
        self.body = {
            **self.scores.to_dict(),
            **described(self.args, self.shard_set, self.saved, self.units),
            "groups": self.groups_by,
            "leaks": self.leaks.to_dict(),
            "left_out": [{"key": key, "reason": reason} for _, key, reason in embeddings.bad],
            **{part.name: part.body for part in self.parts},
        }

    def tables(self) -> list[str]:
        """Plain text, for a terminal."""
        return [self.scores.table(), *(part.table for part in self.parts), self.leaks.table()]

    def report(self, run: Path) -> Path:
        """The run's report anew, with examples."""
        from clipdist.evaluate.examples import Gallery
        from clipdist.evaluate.report import write_report

        gallery = Gallery.of(self.embeddings, self.scores, self.split, self.group)
        images, captions = gallery.draw(max(1, self.args.examples))
        worst = gallery.worst()
        if self.looker:
            images, worst = self.looker.examples(images), self.looker.examples(worst)
        told = self.looker.in_words if self.looker else ""
        return write_report(
            run, examples=images, caption_examples=captions, worst=worst, relevance=told, scores=self.body
        )


def _write_evaluation(args: argparse.Namespace, evaluation: Any) -> list[Path]:
    """JSON, plots and, when the model lies in a run, the run's report; returns the paths."""
    run, out = args.model.resolve().parent, out_folder(args)
    with disk_errors(out):
        name = f"{called(args.data)}-{args.split}"
        out.mkdir(parents=True, exist_ok=True)
        # Before the JSON, which names them with their checksum.
        evaluation.body["outcomes"] = evaluation.outcomes.save(out / f"{name}.npz")
        paths = [*_write(out, name, evaluation.body), out / f"{name}.npz"]
        return [*paths, evaluation.report(run)] if (run / "config.yaml").exists() else paths


def _write(out: Path, name: str, body: dict[str, Any]) -> list[Path]:
    """JSON and plots of one evaluation."""
    from clipdist.evaluate.sections import FIGURES

    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.json"]
    write_atomically(paths[0], (json.dumps(body, indent=1) + "\n").encode())
    for kind, (_, draw) in FIGURES.items():
        picture = draw(body, form="png")
        if picture is not None:
            paths.append(out / f"{name}-{kind}.png")
            write_atomically(paths[-1], picture)
    return paths


def _query_files(args: argparse.Namespace) -> list[tuple[Path, Path]]:
    """(queries, candidates) for each file of queries."""
    candidates = args.candidates if len(args.candidates) != 1 else args.candidates * len(args.queries)
    return list(zip(args.queries, candidates, strict=True))


def _query_name(queries: Path) -> str:
    """What the scores of a file of queries are called."""
    return f"{queries.resolve().parent.name}-{queries.stem}"


def _write_queries(args: argparse.Namespace, queries: Sequence[Any], saved: Any) -> list[Path]:
    """Scores and prints what the files of queries ask for."""
    from clipdist.evaluate.suite import query_part

    paths, out = [], out_folder(args)
    for (file, candidates), one in zip(_query_files(args), queries, strict=True):
        part = query_part(one, saved, args.bootstrap, args.seed)
        print(f"{part.table}\n")
        body = {
            part.name: part.body,
            "data": str(file),
            "queries_digest": f"{checksum_file(file)}+{checksum_file(candidates)}",
            "model": str(args.model),
            "bootstrap": args.bootstrap,
        }
        with disk_errors(out):
            paths += _write(out, _query_name(file), body)
    run = args.model.resolve().parent
    if not args.data and (run / "config.yaml").exists():
        from clipdist.evaluate.report import write_report

        with disk_errors(run):
            paths.append(write_report(run))
    return paths
