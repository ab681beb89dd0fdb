"""The loss of Hidden Positives as a module."""

from __future__ import annotations

from torch import Tensor, nn

from hpkernels import backends
from hpkernels.backends import Backend
from hpkernels.nn._settings import settings_of, text_of
from hpkernels.ops import _checks as check
from hpkernels.ops.ghp_contrastive import ghp_contrastive
from hpkernels.ops.multi_positive_contrastive.options import Variant, check_settings

_SETTINGS = (
    "anchors_per_image",
    "temperature",
    "base_temperature",
    "negative_rate",
    "variant",
    "reweight",
    "keep_specific_only",
)


class HiddenPositiveLoss(nn.Module):
    """`hpkernels.ghp_contrastive` with its settings kept; `forward` takes the tensors of one step.

    The settings are checked when the module is made, and are its attributes.

    Args:
        anchors_per_image, temperature, base_temperature, negative_rate: see `hpkernels.ghp_contrastive`.
        variant, reweight, keep_specific_only, symmetric, backend: likewise.
    """

    def __init__(
        self,
        anchors_per_image: int,
        *,
        temperature: float = 0.6,
        base_temperature: float | None = 0.07,
        negative_rate: float = 0.02,
        variant: Variant = "joint",
        reweight: bool = True,
        keep_specific_only: bool = False,
        symmetric: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.anchors_per_image = anchors_per_image
        self.temperature = temperature
        self.base_temperature = base_temperature
        self.negative_rate = negative_rate
        self.variant: Variant = variant
        self.reweight = reweight
        self.keep_specific_only = keep_specific_only
        self.symmetric = symmetric
        self.backend: Backend = backend
        check_settings("HiddenPositiveLoss", **settings_of(self, _SETTINGS))
        check.flag("HiddenPositiveLoss", "symmetric", symmetric)
        backends.check_name(backend, "HiddenPositiveLoss: `backend`")

    def forward(
        self,
        z: Tensor,
        features: Tensor,
        pool: Tensor,
        *,
        specific: Tensor | None = None,
        specific_pool: Tensor | None = None,
        specific_weight: float | Tensor = 0.0,
        z_mixed: Tensor | None = None,
        negatives: Tensor | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        """The 0-d loss; arguments as those of `hpkernels.ghp_contrastive`."""
        return ghp_contrastive(
            z,
            features,
            pool,
            specific=specific,
            specific_pool=specific_pool,
            specific_weight=specific_weight,
            z_mixed=z_mixed,
            negatives=negatives,
            seed=seed,
            symmetric=self.symmetric,
            backend=self.backend,
            **settings_of(self, _SETTINGS),
        )

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return text_of(settings_of(self, (*_SETTINGS, "symmetric", "backend")))
