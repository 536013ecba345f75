"""The contrastive losses, distributed and tiled."""

from clipdist.loss.contrastive import ContrastiveLoss, LossConfig

__all__ = ["ContrastiveLoss", "LossConfig"]
