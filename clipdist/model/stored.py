"""Reads the tensors of a checkpoint one by one, whether they lie whole in one file or in parts in the files of many
ranks; nothing is unpickled."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

SHARDING = "DCP_SHARDING_INFO"
"""Where torch.distributed.checkpoint notes, in a safetensors file's header, from where on in the whole tensor a part
lies: {name: {"saved_offsets": [row, column, …]}}."""


class Part(NamedTuple):
    file: Any
    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


class Stored(Mapping[str, Tensor]):
    """Name -> tensor on the CPU, read when it is asked for, and anew each time."""

    def __init__(self, parts: dict[str, list[Part]]) -> None:
        self._parts = parts

    @classmethod
    def open(cls, paths: Iterable[Path]) -> "Stored":
        """Raises `SafetensorError` where a file is no safetensors file, `OSError` where it cannot be read."""
        parts: dict[str, list[Part]] = {}
        for path in paths:
            file: Any = safe_open(path, "pt")  # closes with the last reference
            lie = json.loads((file.metadata() or {}).get(SHARDING, "{}"))
            for name in file.keys():  # noqa: SIM118  (it is no mapping)
                shape = tuple(file.get_slice(name).get_shape())
                offsets = tuple(lie[name]["saved_offsets"]) if name in lie else (0,) * len(shape)
                parts.setdefault(name, []).append(Part(file, name, offsets, shape))
        return cls(parts)

    def select(self, names: Mapping[str, str]) -> "Stored":
        """Some of them under other names: new name -> name here."""
        return Stored({new: self._parts[name] for new, name in names.items()})

    def below(self, prefix: str) -> "Stored":
        """Those whose names begin with `prefix`, without it."""
        return self.select({name.removeprefix(prefix): name for name in self if name.startswith(prefix)})

    def __getitem__(self, name: str) -> Tensor:
        parts = self._parts[name]
        tensors: list[Tensor] = [part.file.get_tensor(part.name) for part in parts]
        if len(parts) == 1:
            return tensors[0]
        ends = zip(*([o + n for o, n in zip(part.offsets, part.shape, strict=True)] for part in parts), strict=True)
        whole = torch.empty([max(end) for end in ends], dtype=tensors[0].dtype)
        for part, tensor in zip(parts, tensors, strict=True):
            whole[tuple(slice(o, o + n) for o, n in zip(part.offsets, part.shape, strict=True))] = tensor
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)
