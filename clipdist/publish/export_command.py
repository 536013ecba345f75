"""A trained model as a folder that other libraries load without clipdist. It is loaded back by that library and
compared with the model before it takes its name; export.json says what was compared. docs/export.md says more.
"""

import argparse
import logging
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="model folder, such as runs/phantom/model")
    parser.add_argument("--to", required=True, choices=["huggingface", "open_clip", "onnx", "safetensors"])
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--tower", choices=["image", "text"], help="of --to safetensors: which tower")
    parser.add_argument(
        "--data", metavar="SET", help="shard set whose first pairs it is checked by; default: made-up ones"
    )
    parser.add_argument("--split", default="val", help="of --data; default: val")
    parser.add_argument(
        "--scores", nargs="+", default=[], type=Path, metavar="FILE", help="JSON of clipdist eval, for the card"
    )
    parser.add_argument("--notice", default="", metavar="TEXT", help="stands on the card in place of the usual warning")
    parser.add_argument(
        "--hub-name",
        default="",
        metavar="ORG/NAME",
        help="of --to open_clip: the repository that will hold it, under which open_clip finds its text tower",
    )


def run(args: argparse.Namespace) -> int:
    from clipdist.errors import UserError
    from clipdist.model.saved import load
    from clipdist.publish.card import Said, read_evaluations
    from clipdist.publish.export.exporting import Asked, generated_samples, real_samples
    from clipdist.publish.export.work import export
    from clipdist.train.command import configure_logging

    if args.tower and args.to != "safetensors":
        raise UserError(f"--tower goes with --to safetensors; --to {args.to} takes the whole model")
    if args.hub_name and args.to != "open_clip":
        raise UserError(f"--hub-name goes with --to open_clip; a folder of --to {args.to} names no place")
    import transformers

    configure_logging()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it tells of every constant that it leaves alone
    saved = load(args.model, "cpu")
    said = Said(args.notice, read_evaluations(args.scores, args.model, saved.digest))
    samples = real_samples(args.data, args.split) if args.data else generated_samples(saved)
    report = export(saved, args.to, args.out, samples, Asked(args.tower, args.hub_name), said)
    print("\n".join(_said(args.out, report)))
    return 0


def _said(out: Path, report: dict[str, Any]) -> list[str]:
    checked = report["checked"]
    lines = [f"{out}: {report['format']}, loaded back by {checked['library']}"]
    for what in ("image", "text"):
        if f"{what}_max_difference" in checked:
            number = checked[f"{what}s"]
            lines.append(f"  {number} {what}s: largest difference {checked[f'{what}_max_difference']:.1e}")
    if found := checked.get("preprocessing"):
        lines.append(
            f"  through its own preprocessing: {found['max_difference']:.1e}; pixels differ by "
            f"{found['grey_levels_mean']:.2f} grey levels on average, at most {found['grey_levels_max']:.0f}"
        )
    lines.append(f"  samples: {checked['samples']}; compared: {checked['compared']}")
    return lines + [f"  note: {note}" for note in report["notes"]]
