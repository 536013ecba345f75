"""clipdist: train, measure and use CLIP-like dual encoders on image-text pairs, on one machine or a SLURM cluster."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from clipdist.model.saved import SavedModel as SavedModel
    from clipdist.model.saved import load as load
    from clipdist.model.saved import load_classifier as load_classifier
    from clipdist.model.saved import load_dual_encoder as load_dual_encoder
    from clipdist.model.saved_classifier import SavedClassifier as SavedClassifier
    from clipdist.publish.embeddings import open_embeddings as open_embeddings

__all__ = [
    "SavedClassifier",
    "SavedModel",
    "__version__",
    "load",
    "load_classifier",
    "load_dual_encoder",
    "open_embeddings",
]

# Importing torch and timm takes seconds; `clipdist --help` and the packing tools do without them.
_LIES_IN = {
    "SavedClassifier": "clipdist.model.saved_classifier",
    "SavedModel": "clipdist.model.saved",
    "load": "clipdist.model.saved",
    "load_classifier": "clipdist.model.saved",
    "load_dual_encoder": "clipdist.model.saved",
    "open_embeddings": "clipdist.publish.embeddings",
}


def __getattr__(name: str) -> Any:
    if name not in _LIES_IN:
        raise AttributeError(f"module 'clipdist' has no attribute {name!r}")
    return getattr(importlib.import_module(_LIES_IN[name]), name)
