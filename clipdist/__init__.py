"""clipdist: train, measure and use CLIP-like dual encoders on image-text pairs, on one machine or a SLURM cluster."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from clipdist.model.saved import load as load

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # Importing torch and timm takes seconds; `clipdist --help` and the packing tools do without them.
    if name == "load":
        from clipdist.model.saved import load

        return load
    raise AttributeError(f"module 'clipdist' has no attribute {name!r}")
