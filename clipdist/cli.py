"""The `clipdist` command: one verb per line; each verb's module owns its arguments."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from clipdist import __version__
from clipdist.errors import UserError, WorkerKilled

# verb: (module with `add_arguments(parser)` and `run(args) -> exit code`, what it does)
VERBS = {
    "pack": ("clipdist.data.sets.pack_command", "image-text pairs from a table or a folder -> shard set"),
    "index": ("clipdist.data.sets.index_command", "make WebDataset tars of other tools into a shard set, in place"),
    "verify": ("clipdist.data.sets.verify_command", "find damage in a shard set, and leaks between its splits"),
    "repack": ("clipdist.data.sets.repack_command", "a shard set anew: other shards, images, order, splits"),
    "audit": (
        "clipdist.evaluate.audit_command",
        "leaks, duplicates, captions, classes and quality, on a page to look at",
    ),
    "split": ("clipdist.data.sets.split_command", "new splits: units and near-duplicates whole, labels in proportion"),
    "plan": ("clipdist.data.plan_command", "print which samples make up the batch of a step"),
    "train": ("clipdist.train.command", "train a run from a recipe, in this process"),
    "node": ("clipdist.cluster.node_command", "one node's processes of a SLURM job, as a task of it"),
    "requeue": ("clipdist.cluster.requeue_command", "for scripts: put a job back where none of its tasks decided"),
    "doctor": ("clipdist.cluster.doctor.command", "check this machine, or each node of a job, before a run"),
    "profile": ("clipdist.train.profile_command", "measure where the time of a recipe's training step goes"),
    "consolidate": ("clipdist.train.consolidate_command", "the weights of a checkpoint as one safetensors file"),
    "eval": ("clipdist.evaluate.command", "score a model: retrieval, zero-shot, probes, calibration, subgroups"),
    "export": ("clipdist.publish.export_command", "a model for transformers, open_clip, timm or ONNX, checked there"),
    "compare": ("clipdist.evaluate.compare_command", "runs beside each other: scores query by query, curves, settings"),
    "embed": ("clipdist.publish.embed_command", "a model's features of a whole set, to search in"),
    "search": ("clipdist.publish.search_command", "find images by a text or an image among embedded ones"),
    "runs": ("clipdist.cluster.runs_command", "list runs: state, step, loss, speed, last sign of life"),
    "logs": ("clipdist.cluster.logs_command", "show what a run's jobs and ranks said"),
    "board": ("clipdist.cluster.board_command", "TensorBoard of runs on this host, and how to see it from another"),
    "stop": ("clipdist.cluster.stop_command", "save and end a run for good, here or on SLURM"),
    "serve": ("clipdist.publish.serve_command", "a page and a JSON interface to a model, on this host"),
    "report": ("clipdist.evaluate.report_command", "write a run's report.html anew"),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one verb; 0 when all went well, 2 for what the user can change, as one line without a traceback."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if words[0] == "--version":
        print(f"clipdist {__version__}")
        return 0
    if words[0] not in VERBS:
        print(f"clipdist: error: no verb {words[0]!r}; one of: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(VERBS[words[0]][0])
    parser = argparse.ArgumentParser(
        prog=f"clipdist {words[0]}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    try:
        # Intermixed: overrides may stand before and after options, as in `plan RECIPE --step 3 key=value`.
        code = int(module.run(parser.parse_intermixed_args(words[1:])))
        sys.stdout.flush()
        return code
    except UserError as error:
        return ended(error, 2)
    except WorkerKilled as error:
        return ended(error, 1)
    except BrokenPipeError:  # `clipdist plan … | head`
        # What is still in the buffer would raise once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def ended(error: Exception, code: int) -> int:
    """Prints the error and answers with the code; one of several ranks ends here."""
    from clipdist import world

    world.report_last(error)
    if world.announced().world_size > 1:
        # Others may wait in a collective that this one will never join, and the interpreter would wait for them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def end(code: int) -> NoReturn:
    """As `world.end`, without bringing torch where nothing needed it."""
    if "clipdist.world" in sys.modules:
        sys.modules["clipdist.world"].end(code)
    sys.exit(code)


def run_script(main: Callable[[], object]) -> None:
    """Runs a script's `main`; what the user can change ends it with one line and exit code 2."""
    try:
        main()
    except UserError as error:
        report(error)
        sys.exit(2)


def report(error: Exception) -> None:
    """Prints a user's error, with the rank when it is not rank 0's."""
    from clipdist import world  # brings torch, which takes seconds that `clipdist --help` need not wait

    world.report(error)


def usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  clipdist {verb:{width}}  {what}" for verb, (_, what) in VERBS.items()]
    return "\n".join(["usage: clipdist VERB …    (clipdist VERB --help tells more)", "", *lines])


if __name__ == "__main__":
    end(main())
