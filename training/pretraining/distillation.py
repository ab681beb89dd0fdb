"""Self-distillation of patches: what the student and the teacher are, and the loss between them.

The teacher, a moving average of the student, assigns the patches of one view of a photograph to K prototypes. The
student has to name that prototype for the same place in another view: another crop, mirrored or not, in other colours,
with a share of its patches hidden. So a patch must be known by what it shows and by what surrounds it, not by where it
lies in the crop.

    loss = mean over matched patches of -sum_k q_k log softmax(s / temperature)_k
    q    = Sinkhorn(t / teacher_temperature)

with s, t (N, K) the cosines of prototypes with the projected patches of the student's view, and of the teacher's other
view at the same places. Student, moving average and masks are those of DINO (Caron et al., 2021) and iBOT (Zhou et al.,
2022), the balanced assignments those of SwAV (Caron et al., 2020), as DINOv2 has them in the place of centring.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.backbones.timm_vit import TimmViT
from training.model import to_map, to_rows

_HIDDEN, _PROJECTED = 512, 128  # units of the projection
_ROUNDS = 3  # of Sinkhorn's algorithm, as in SwAV and DINOv2


class Distilled(nn.Module):
    """A ViT, the projection of its patches and the prototypes: the student, or the teacher.

    Args:
        backbone: of which the ViT is taken, with its normalisation of images.
        prototypes: K.
    """

    def __init__(self, backbone: TimmViT, prototypes: int) -> None:
        super().__init__()
        self.layer = backbone.layer
        self.vit = backbone.vit.requires_grad_(True).train()
        self.first = nn.Linear(backbone.features_dim, _HIDDEN)
        self.second = nn.Linear(_HIDDEN, _PROJECTED)
        self.prototypes = nn.Parameter(torch.randn(prototypes, _PROJECTED))

    def tokens(self, images: Tensor) -> Tensor:
        """Patch tokens (V, G, Df) of normalised images, as `TimmViT` gives them: blocks after the layer do not run."""
        (tokens,) = self.vit.forward_intermediates(
            images,
            indices=[self.layer - 1],
            norm=True,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return tokens

    def cosines(self, tokens: Tensor) -> Tensor:
        """Of projected tokens (N, Df) with the prototypes, (N, K) float32."""
        hidden = F.gelu(_standardised(self.first(tokens)))
        projected = F.normalize(_standardised(self.second(hidden)), dim=1)
        with torch.autocast(tokens.device.type, enabled=False):
            return projected @ F.normalize(self.prototypes, dim=1).mT


def _standardised(rows: Tensor) -> Tensor:
    """Channels (N, D) of mean 0 and variance 1 over these rows, float32.

    The patches of a ViT have a large part in common, in which all would be equally near to every prototype: the
    assignments would be nearly uniform, and there would be nothing to learn from.
    """
    return F.batch_norm(rows.float(), None, None, training=True) if len(rows) > 1 else rows.float()


def distillation_loss(scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """The mean cross-entropy of the student's cosines (N, K) to the teacher's assignments (N, K); 0 without rows."""
    of_rows = -(targets * F.log_softmax(scores / temperature, dim=1)).sum(dim=1)
    return of_rows.sum() / max(1, len(of_rows))


@torch.no_grad()
def assign(scores: Tensor, temperature: float) -> Tensor:
    """Assignments (N, K) of cosines (N, K): rows add up to 1, and the columns to nearly the same.

    Sinkhorn's algorithm on logarithms (Cuturi, 2013): all patches cannot be given to one prototype, which is the
    collapse that a teacher without it drifts to.
    """
    logs = scores / temperature
    for _ in range(_ROUNDS):
        logs = logs - logs.logsumexp(dim=0, keepdim=True)
        logs = logs - logs.logsumexp(dim=1, keepdim=True)
    return logs.exp()


def hide(images: Tensor, hidden: Tensor) -> Tensor:
    """Normalised images (V, 3, h, w) with the patches `hidden` (V, H, W) in the mean colour, which is 0."""
    patch = images.shape[2] // hidden.shape[1]
    pixels = hidden.repeat_interleave(patch, dim=1).repeat_interleave(patch, dim=2)
    return images.masked_fill(pixels[:, None], 0)


def tokens_at(tokens: Tensor, places: Tensor) -> Tensor:
    """Tokens (V, G, Df) of the other view at places (V, H, W, 2) in it, bilinear between patches; (V, G, Df)."""
    height, width = places.shape[1:3]
    others = to_map(tokens.roll(len(tokens) // 2, 0), (height, width))
    return to_rows(F.grid_sample(others.float(), places, padding_mode="border", align_corners=False))


@torch.no_grad()
def health(tokens: Tensor, scores: Tensor, temperature: float) -> dict[str, float]:
    """How far the features are from collapse.

    Args:
        tokens: (V, G, Df), the teacher's.
        scores: (N, K), the student's cosines.
        temperature: the student's.

    Returns:
        effective_rank: exp of the entropy of the eigenvalues of the covariance of the tokens' directions (Roy and
            Vetterli, 2007), from 1 (collapsed to a line) to Df.
        by_position: the share of their variance that the place in the crop explains; 1 is a collapse to position.
        prototypes_used: exp of the entropy of the student's mean softmax, from 1 (collapsed to one) to K.
    """
    used = F.softmax(scores / temperature, dim=1).double().mean(dim=0)
    directions = F.normalize(tokens.double(), dim=2)
    centred = directions - directions.mean(dim=(0, 1))
    variance = centred.square().sum(dim=2).mean()
    rank = by_position = 1.0
    if variance > 1e-12:  # else rounding alone is left
        covariance = torch.einsum("vgi,vgj->ij", centred, centred)
        share = torch.linalg.eigvalsh(covariance).clamp(min=0)
        rank = _exp_entropy(share / share.sum())
        by_position = (centred.mean(dim=0).square().sum(dim=1).mean() / variance).item()
    return {"effective_rank": rank, "by_position": by_position, "prototypes_used": _exp_entropy(used)}


def _exp_entropy(share: Tensor) -> float:
    return torch.special.entr(share).sum().exp().item()
