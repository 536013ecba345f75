"""`clipdist split`: new splits for a packed set."""

import argparse
from pathlib import Path

from clipdist.data.sets.pack_command import parse_fractions
from clipdist.data.sets.survey_command import add_survey_arguments, surveyed
from clipdist.errors import UserError

DESCRIPTION = """\
Divide a packed set anew: no unit (patient, lesion, slide, place) and no picture in two splits, near-duplicates counting
as one picture, labels in proportion. Equal arguments give equal splits.

  clipdist split data/mine --fractions train=0.8 val=0.1 test=0.1 --out splits.csv --repack data/divided
  clipdist repack data/mine data/divided --split-table splits.csv --side 256        the same later, with other images

What clipdist audit has seen is not read again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.formatter_class = DESCRIPTION, argparse.RawDescriptionHelpFormatter
    parser.add_argument("set", type=Path, metavar="SET", help="folder of a shard set")
    parser.add_argument("--fractions", nargs="+", required=True, metavar="NAME=FRACTION", help="of the samples")
    parser.add_argument("--stratify-by", default="label", metavar="FIELD", help="keep its values in proportion")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="a table of key, split and unit")
    parser.add_argument("--repack", type=Path, metavar="DST", help="write the set with these splits")
    near = parser.add_argument_group("near-duplicates")
    near.add_argument(
        "--duplicates", action=argparse.BooleanOptionalAction, default=True, help="keep them together (default: yes)"
    )
    add_survey_arguments(near)


def run(args: argparse.Namespace) -> int:
    """Prints what the splits hold; 0. Raises `UserError` for what the user can change."""
    import tempfile

    from clipdist.data.sets.divide import divide
    from clipdist.data.sets.duplicates import find_duplicates
    from clipdist.data.sets.repack import repack
    from clipdist.data.sets.repack_samples import Choice

    fractions = parse_fractions(args.fractions)
    if args.seed < 0:
        raise UserError(f"--seed: found {args.seed}, expected 0 or more")
    if not (args.out or args.repack):
        raise UserError("expected --out FILE.csv, --repack DST, or both")
    survey = surveyed(args)
    duplicates = find_duplicates(survey.samples["image"], survey.looks, args.bits) if args.duplicates else None
    division = divide(survey, fractions, stratify_by=args.stratify_by, seed=args.seed, duplicates=duplicates)
    print(division)
    with tempfile.TemporaryDirectory() as folder:
        table = args.out or Path(folder) / "splits.csv"
        division.write(table)
        if args.out:
            print(args.out)
        if args.repack:
            choice = Choice(split_table=str(table), drop_bad=True)
            notes = {"division": division.notes}
            made = repack(args.set, args.repack, choice, workers=args.workers, max_rejected_fraction=1.0, notes=notes)
            print(made)
    return 0
