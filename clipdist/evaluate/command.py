"""Scores a model on one split of a shard set: retrieval over the full gallery, with 95 % bootstrap intervals.

Prints a table; writes JSON and plots beside the model's run (or into --out), and the run's report anew.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from clipdist.data.mixing import called
from clipdist.data.shards import ShardSet, write_atomically
from clipdist.errors import UserError, disk_errors
from clipdist.train.command import configure_logging


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="model folder, such as runs/phantom/model")
    parser.add_argument("--data", required=True, metavar="SET", help="folder or URL of a shard set")
    parser.add_argument("--split", default="test", help="default: test")
    parser.add_argument(
        "--groups",
        help="images that count as each other's right answers: caption, a field such as label, or none; "
        "default: as in training",
    )
    parser.add_argument("--unit", default="unit", help="field resampled as a whole, such as a patient; default: unit")
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples; 0: no intervals; default: 1000")
    parser.add_argument("--examples", type=int, default=20, help="images shown in the report; default: 20")
    parser.add_argument("--workers", type=int, default=2, help="loader processes; default: 2")
    parser.add_argument("--out", type=Path, help="folder for JSON and plots; default: evaluation/ beside the model")
    parser.add_argument("--device", help="cpu or cuda; default: a GPU when there is one")


def run(args: argparse.Namespace) -> int:
    configure_logging()
    check(args)
    # Missing data should be named before a model is loaded.
    shard_set = ShardSet.open(args.data)
    split = shard_set.split(args.split)
    from clipdist.evaluate.embed import embed_split
    from clipdist.model.saved import load

    saved = load(args.model, args.device)
    embeddings = embed_split(saved.model, saved.tokenizer, split, workers=args.workers)
    if not embeddings.keys:
        raise UserError(f"{args.data}, split {args.split}: no readable sample; run: clipdist verify {args.data}")
    evaluation = Evaluation(args, shard_set, embeddings, saved)
    print(evaluation.scores.table())
    for path in evaluation.write():
        print(path)
    return 0


def out_folder(args: argparse.Namespace) -> Path:
    folder: Path = args.out or args.model.resolve().parent / "evaluation"
    return folder


def check(args: argparse.Namespace) -> None:
    """`UserError` for arguments that would fail late, or in the words of another library."""
    for name in ("bootstrap", "examples", "workers"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name}: found {getattr(args, name)}, expected 0 or more")
    place = out_folder(args)
    while not place.exists():
        place = place.parent
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise UserError(f"--out {out_folder(args)}: {place} is no folder, or cannot be written; choose another")
    if args.device:
        import torch

        try:
            torch.zeros(1, device=args.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {args.device}: {str(error).splitlines()[0]}; use cpu or cuda") from None


class Evaluation:
    """Scores of one model on one split, and what is written about them."""

    def __init__(self, args: argparse.Namespace, shard_set: ShardSet, embeddings: Any, saved: Any) -> None:
        from clipdist.evaluate.retrieval import retrieval_scores
        from clipdist.train.validate import groups_of

        self.args, self.split, self.embeddings = args, shard_set.split(args.split), embeddings
        self.groups_by = args.groups or saved.about.get("groups", "caption")
        self.group = groups_of(embeddings, self.groups_by)
        units = [fields.get(args.unit) for fields in embeddings.fields]
        has_units = any(unit is not None for unit in units)
        self.scores = retrieval_scores(
            embeddings.image_features_ND,
            embeddings.text_features_MD,
            embeddings.text_owner_M,
            group_N=self.group,
            units=units if has_units else None,
            bootstrap=args.bootstrap,
            texts=embeddings.texts,
        )
        self.body = {
            **self.scores.to_dict(),
            "data": args.data,
            "data_digest": shard_set.manifest.digest,
            "split": args.split,
            "model": str(args.model),
            "groups": self.groups_by,
            "unit": args.unit if has_units else None,
            "left_out": [{"key": key, "reason": reason} for _, key, reason in embeddings.bad],
        }

    def write(self) -> list[Path]:
        """JSON, plots and, when the model lies in a run, the run's report; returns the paths."""
        run, out = self.args.model.resolve().parent, out_folder(self.args)
        with disk_errors(out):
            return self._write(out, run)

    def _write(self, out: Path, run: Path) -> list[Path]:
        from clipdist.evaluate import plots

        out.mkdir(parents=True, exist_ok=True)
        name = f"{called(self.args.data)}-{self.args.split}"
        paths = [out / f"{name}.json"]
        write_atomically(paths[0], (json.dumps(self.body, indent=1) + "\n").encode())
        for kind, draw in (("recall", plots.recall_bars), ("cosines", plots.cosine_histogram)):
            picture = draw(self.body, form="png")
            if picture is not None:
                paths.append(out / f"{name}-{kind}.png")
                write_atomically(paths[-1], picture)
        if (run / "config.yaml").exists():
            paths.append(self._report(run))
        return paths

    def _report(self, run: Path) -> Path:
        from clipdist.evaluate.examples import draw_examples
        from clipdist.evaluate.report import write_report

        embeddings = self.embeddings
        images, captions = draw_examples(
            embeddings.image_features_ND,
            embeddings.text_features_MD,
            embeddings.text_owner_M,
            self.scores,
            texts=embeddings.texts,
            keys=embeddings.keys,
            load_image=lambda row: self.split.read(int(embeddings.numbers_N[row])).image,
            group_N=self.group,
            images=max(1, self.args.examples),
        )
        return write_report(run, examples=images, caption_examples=captions, scores=self.body)
