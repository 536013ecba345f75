"""`clipdist audit`: what a shard set's splits share, what it holds twice, how captions, classes and pictures are."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from clipdist.data.sets.survey_command import add_survey_arguments, surveyed
from clipdist.errors import UserError, disk_errors

if TYPE_CHECKING:
    from clipdist.data.sets.survey import Survey
    from clipdist.evaluate.audit import Features

DESCRIPTION = """\
Look at a whole shard set: units and pictures that lie in several splits, pictures that it holds twice, repeated
captions, class counts, pictures that are blank, blurred, saturated, dark, tiny or long, sizes, and tokenizers.

  clipdist audit data/mine --report audit.html
  clipdist audit data/mine --model runs/mine/model --cosine 0.97
  clipdist audit data/mine --tokenizer captions --tokenizer bert-base-uncased

Exit code 1 where splits leak, else 0. What was seen is kept, so that the next audit, and clipdist split, read only
shards that are new or changed.
"""

LIMITS = {
    "blank": "blank: fewer grey levels between the darkest and the brightest hundredth (default: 10)",
    "blurred": "blurred: above this, 0 being sharp and 1 not (default: 0.53)",
    "saturated": "saturated: a larger share of white pixels (default: 0.6)",
    "dark": "dark: the brightest twentieth below this grey level (default: 48)",
    "tiny": "tiny: shorter side below, in pixels (default: 64)",
    "long": "long: longer by shorter side above (default: 4)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.formatter_class = DESCRIPTION, argparse.RawDescriptionHelpFormatter
    parser.add_argument("set", type=Path, metavar="SET", help="folder of a shard set")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="a page with pictures to look at")
    parser.add_argument("--shown", type=int, default=24, help="pictures or pairs of each kind in it (default: 24)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead of a summary")
    parser.add_argument("--label", default="label", metavar="FIELD", help="field of the classes (default: label)")
    near = parser.add_argument_group("near-duplicates")
    add_survey_arguments(near)
    near.add_argument("--model", type=Path, metavar="DIR", help="compare this model's image features, too")
    near.add_argument(
        "--embeddings", type=Path, metavar="FILE.npz", help="features made elsewhere: `keys` and `image_features`"
    )
    near.add_argument("--cosine", type=float, default=0.95, help="features as near as this are told (default: 0.95)")
    near.add_argument("--device", help="of --model: cpu or cuda; default: a GPU when there is one")
    captions = parser.add_argument_group("captions")
    captions.add_argument(
        "--tokenizer",
        action="append",
        default=[],
        metavar="NAME",
        help="how it cuts the captions: a folder, a name, or `captions` for one trained on them; repeat it to compare",
    )
    captions.add_argument("--max-tokens", type=int, default=77, help="what a text tower reads (default: 77)")
    captions.add_argument("--vocabulary", type=int, default=8000, help="largest, of `captions` (default: 8000)")
    limits = parser.add_argument_group("limits of pictures")
    from clipdist.data.images.quality import QualityLimits

    for item in fields(QualityLimits):
        kind = int if isinstance(item.default, int) else float
        limits.add_argument(f"--{item.name}", type=kind, default=item.default, metavar="X", help=LIMITS[item.name])


def run(args: argparse.Namespace) -> int:
    """Prints the audit; 1 where splits leak, else 0. Raises `UserError` for what the user can change."""
    from clipdist.data.images.quality import QualityLimits
    from clipdist.evaluate.audit import AuditOptions, audit_survey, to_json
    from clipdist.evaluate.audit_page import write_page
    from clipdist.evaluate.audit_summary import summary

    if args.model and args.embeddings:
        raise UserError("--model and --embeddings exclude each other; leave one out")
    if args.shown < 0 or args.max_tokens < 1 or args.vocabulary < 100:
        raise UserError("--shown: expected 0 or more; --max-tokens: at least 1; --vocabulary: at least 100")
    options = AuditOptions(
        label=args.label,
        bits=args.bits,
        cosine=args.cosine,
        limits=QualityLimits(**{name: getattr(args, name) for name in LIMITS}),
        tokenizers=args.tokenizer,
        max_tokens=args.max_tokens,
        vocabulary=args.vocabulary,
    )
    survey = surveyed(args)
    audit = audit_survey(survey, options, _features(args, survey))
    print(to_json(audit) if args.json else summary(audit))
    if args.report:
        with disk_errors(args.report.parent):
            path = write_page(audit, args.report, args.shown)
        if not args.json:
            print(path)
    return 1 if audit.leaks else 0


def _features(args: argparse.Namespace, survey: "Survey") -> "Features | None":
    from clipdist.evaluate.audit import features_from, features_of

    if args.embeddings:
        return features_from(survey, args.embeddings)
    if args.model:
        return features_of(survey, args.model, workers=args.workers, device=args.device)
    return None
