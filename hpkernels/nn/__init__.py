"""Thin modules over the ops, for models built from modules."""

from hpkernels.nn.clip_loss import ClipLoss
from hpkernels.nn.hidden_positive_loss import HiddenPositiveLoss
from hpkernels.nn.local_propagation import LocalPropagation
from hpkernels.nn.reference_pool import ReferencePool
from hpkernels.nn.supcon_loss import SupConLoss

__all__ = ["ClipLoss", "HiddenPositiveLoss", "LocalPropagation", "ReferencePool", "SupConLoss"]
