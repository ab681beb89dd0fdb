"""How much the position of a patch tells about its cluster: a score that needs no labels."""

from __future__ import annotations

import math

import torch
from sklearn.metrics import adjusted_mutual_info_score
from torch import Tensor


def position_score(clusters: Tensor) -> float:
    """Mutual information of clusters and patch position, adjusted for chance, in percent.

    ``100 (MI - E[MI]) / (min(H(cluster), H(position)) - E[MI])``, where E[MI] is the mean over all permutations of the
    clusters (Vinh et al., JMLR 2010): 0 if clusters have nothing to do with position, 100 if position decides them.

    Args:
        clusters: (B, G) integers, the cluster of each patch position of B images; negative: left out.

    Returns:
        the score; NaN where there are fewer than two images or clusters, of which nothing can be told.
    """
    counted = clusters >= 0
    if len(clusters) < 2 or len(clusters[counted].unique()) < 2:
        return math.nan
    position = torch.arange(clusters.shape[1], device=clusters.device).expand_as(clusters)
    found, where = clusters[counted].cpu().numpy(), position[counted].cpu().numpy()
    return 100 * float(adjusted_mutual_info_score(where, found, average_method="min"))
