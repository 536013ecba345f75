"""Embeds a shard set, a folder of images or a table with a trained model, for `clipdist search` and for Python.

Run it again after any interruption: it goes on with what is missing. docs/search.md tells more.
"""

import argparse
import time
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="model folder, such as runs/phantom/model")
    parser.add_argument(
        "--data", required=True, metavar="SET|FOLDER|TABLE", help="shard set (also a URL), folder of images, or table"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the embeddings go")
    parser.add_argument("--what", choices=("image", "text", "both"), default="image", help="default: image")
    parser.add_argument("--split", nargs="+", default=[], metavar="NAME", help="of a shard set; default: all")
    parser.add_argument("--exact-pixels", action="store_true", help="decode JPEGs in full, as `clipdist eval` does")
    table = parser.add_argument_group("tables")
    table.add_argument("--image-column", default="image", metavar="COLUMN", help="image path; default: image")
    table.add_argument(
        "--text-column", action="append", default=[], metavar="COLUMN", help="caption; default: text, if there is one"
    )
    table.add_argument("--key-column", metavar="COLUMN", help="default: keys are made from image paths")
    table.add_argument("--images", type=Path, metavar="ROOT", help="where image paths start; default: TABLE's folder")
    speed = parser.add_argument_group("speed")
    speed.add_argument("--processes", type=int, default=0, help="default: one for each CPU core, or GPU")
    speed.add_argument("--threads", type=int, default=1, help="of each process, on CPUs; default: 1")
    speed.add_argument("--readers", type=int, default=1, help="threads of each process that read ahead; default: 1")
    speed.add_argument("--micro-batch", type=int, default=32, help="images at a time; default: 32")
    speed.add_argument("--device", default="", help="cpu or cuda; default: a GPU when there is one")


def run(args: argparse.Namespace) -> int:
    from clipdist.publish.embed import EmbedOptions, embed
    from clipdist.publish.embedding_source import TableColumns
    from clipdist.train.command import configure_logging

    configure_logging()
    began = time.perf_counter()
    done = embed(
        args.model,
        args.data,
        args.out,
        splits=args.split,
        columns=TableColumns(args.image_column, args.text_column, args.key_column, args.images),
        options=EmbedOptions(args.what, args.exact_pixels, args.micro_batch, args.threads, args.device),
        processes=args.processes,
        readers=args.readers,
        quiet=False,
    )
    seconds = time.perf_counter() - began
    if not done.embedded:
        print(f"{done.folder}: was finished before")
    else:
        again = done.samples - done.embedded
        before = f", {again:,} were there before" if again else ""
        print(f"embedded {done.embedded:,} samples in {seconds:,.1f} s{before}")
    texts = f", {done.info['texts']:,} texts" if args.what != "image" else ""
    print(f"{done.folder}: {done.info['rows']:,} samples{texts}, {done.info['width']} wide")
    if bad := done.info["bad"]:
        print(f"could not be read: {bad:,} of {done.samples:,}, see {done.folder / 'bad.jsonl'}")
    return 0
