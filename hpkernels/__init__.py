"""hpkernels: fast, exact, memory-lean kernels for multi-positive contrastive losses (Hidden Positives, CVPR 2023)."""

from hpkernels import compat, distributed, nn
from hpkernels._version import __version__
from hpkernels.backends import Backend, BackendUnavailableError, use_backend
from hpkernels.cost import estimate
from hpkernels.explanation import Explanation, explain
from hpkernels.ops.contrastive import ContrastiveStatistics, Labels, PairLists, contrastive
from hpkernels.ops.ghp_contrastive import ghp_contrastive
from hpkernels.ops.hidden_positives import PositiveMask, hidden_positives
from hpkernels.ops.local_propagation import apply_local_propagation, local_propagation, local_propagation_weights
from hpkernels.ops.masked_topk import masked_topk
from hpkernels.ops.multi_positive_contrastive import multi_positive_contrastive
from hpkernels.ops.multi_positive_contrastive.options import Variant

__all__ = [
    "Backend",
    "BackendUnavailableError",
    "ContrastiveStatistics",
    "Explanation",
    "Labels",
    "PairLists",
    "PositiveMask",
    "Variant",
    "__version__",
    "apply_local_propagation",
    "compat",
    "contrastive",
    "distributed",
    "estimate",
    "explain",
    "ghp_contrastive",
    "hidden_positives",
    "local_propagation",
    "local_propagation_weights",
    "masked_topk",
    "multi_positive_contrastive",
    "nn",
    "use_backend",
]
