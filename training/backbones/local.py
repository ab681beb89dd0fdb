"""Similarity of tokens in the place of attention, for the weights of local propagation."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

SCALE = 8.0
"""Logit of a patch with itself; docs/backbones.md says how it was chosen."""


def similarity_as_attention(tokens: Tensor, *, centre: bool) -> Tensor:
    """What stands for both query and key, so that their logits are ``SCALE`` times the cosine similarity of `tokens`.

    Args:
        tokens: (B, G, Df).
        centre: subtract the mean token of each image first. The tokens of a ViT have a large part in common, which
            brings every cosine near 1, and the softmax over them near uniform.

    Returns:
        (B, 1, G, Df): one head, no prefix tokens.
    """
    if centre:
        tokens = tokens - tokens.mean(dim=1, keepdim=True)
    length = (SCALE * tokens.shape[-1] ** 0.5) ** 0.5  # query . key / sqrt(Df) is then SCALE times the cosine
    return F.normalize(tokens, dim=-1)[:, None] * length
