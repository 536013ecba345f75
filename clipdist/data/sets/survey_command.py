"""How `clipdist audit` and `clipdist split` are told to look at a set."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from clipdist.errors import UserError

if TYPE_CHECKING:
    from clipdist.data.sets.survey import ShardSurvey, Survey


def add_survey_arguments(parser: argparse._ActionsContainer) -> None:
    """Declares how a set is looked at."""
    parser.add_argument(
        "--bits", type=int, default=10, help="in which the hashes of two candidates may differ, of 64 (default: 10)"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--again", action="store_true", help="look at every shard, also those seen by an earlier run")
    parser.add_argument(
        "--state",
        type=Path,
        metavar="DIR",
        help="where what was seen is kept (default: .audit in the set, or the user's cache when that is read-only)",
    )


def surveyed(args: argparse.Namespace) -> "Survey":
    """The survey that the arguments of `add_survey_arguments` ask for."""
    from clipdist.data.sets.duplicates import check_bits
    from clipdist.data.sets.survey import survey_set
    from clipdist.progress import progress

    if args.workers < 1:
        raise UserError(f"--workers: found {args.workers}, expected at least 1")
    check_bits(args.bits)  # before anything is looked at

    def shown(surveys: Iterable["ShardSurvey"], total: int) -> Iterable["ShardSurvey"]:
        return progress(surveys, total=total, unit="shard", description="looking", quiet=not total)

    return survey_set(args.set, workers=args.workers, state=args.state, again=args.again, shown=shown)
