"""The contrastive losses written down plainly, for one process that holds the whole batch; all else is tested by them.

B = rows of the global batch, D = width of the joint embedding.
"""

import torch
import torch.nn.functional as F


def groups_matrix(group_B: torch.Tensor | None, rows: int, device: torch.device) -> torch.Tensor:
    """[B, B] bool: which pairs are positives of each other. Without groups, each pair of itself alone."""
    if group_B is None:
        return torch.eye(rows, dtype=torch.bool, device=device)
    return group_B[:, None] == group_B[None, :]


def infonce_reference(
    image_features_BD: torch.Tensor,
    text_features_BD: torch.Tensor,
    logit_scale: torch.Tensor,
    group_B: torch.Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    image_weight: float = 0.5,
) -> torch.Tensor:
    """Scalar: λ·CE(rows) + (1 − λ)·CE(columns), with targets spread evenly over a group.

    CLIP (Radford et al. 2021, arXiv 2103.00020); the weight between directions is ConVIRT's λ (Zhang et al. 2020,
    arXiv 2010.00747).
    """
    rows = len(image_features_BD)
    same = groups_matrix(group_B, rows, image_features_BD.device).to(image_features_BD.dtype)
    target_BB = (1 - label_smoothing) * same / same.sum(1, keepdim=True) + label_smoothing / rows
    logits_BB = logit_scale * image_features_BD @ text_features_BD.T
    image_to_text = F.cross_entropy(logits_BB, target_BB)
    text_to_image = F.cross_entropy(logits_BB.T, target_BB.T)
    return image_weight * image_to_text + (1 - image_weight) * text_to_image


def sigmoid_reference(
    image_features_BD: torch.Tensor,
    text_features_BD: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    group_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scalar: −(1/B) Σ_ij log σ(y_ij·(s·I_i·T_j + bias)). SigLIP (Zhai et al. 2023, arXiv 2303.15343)."""
    rows = len(image_features_BD)
    sign_BB = 2.0 * groups_matrix(group_B, rows, image_features_BD.device).to(image_features_BD.dtype) - 1.0
    logits_BB = logit_scale * image_features_BD @ text_features_BD.T + logit_bias
    return -F.logsigmoid(sign_BB * logits_BB).sum() / rows
