"""Trains open_clip with its own main program on several processes, on a CPU too; its log goes to standard error.

torchrun --nproc-per-node 2 benchmarks/peers/step_open_clip.py MODELS OPTIONS

MODELS is a folder of model configurations, OPTIONS a JSON list of its options in a file: torchrun would take some of
them for its own. The only thing changed is what keeps it from CPUs: its main program hands
`device_ids` to DistributedDataParallel, which only GPUs may have.
"""

import contextlib
import json
import sys
from pathlib import Path

import open_clip
import torch
from open_clip_train.main import main

Wrapped = torch.nn.parallel.DistributedDataParallel


class WithoutDevices(Wrapped):
    def __init__(self, module: torch.nn.Module, device_ids: object = None, **options: object) -> None:
        super().__init__(module, device_ids=device_ids if torch.cuda.is_available() else None, **options)


if __name__ == "__main__":
    torch.nn.parallel.DistributedDataParallel = WithoutDevices  # type: ignore[misc]
    open_clip.add_model_config(sys.argv[1])
    with contextlib.redirect_stdout(sys.stderr):
        sys.exit(main(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))))
