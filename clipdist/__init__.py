"""clipdist: train, measure and use CLIP-like dual encoders on image-text pairs, on one machine or a SLURM cluster."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from clipdist.model.saved import load as load
    from clipdist.publish.embeddings import open_embeddings as open_embeddings

__all__ = ["__version__", "load", "open_embeddings"]


def __getattr__(name: str) -> Any:
    # Importing torch and timm takes seconds; `clipdist --help` and the packing tools do without them.
    if name == "load":
        from clipdist.model.saved import load

        return load
    if name == "open_embeddings":
        from clipdist.publish.embeddings import open_embeddings

        return open_embeddings
    raise AttributeError(f"module 'clipdist' has no attribute {name!r}")
