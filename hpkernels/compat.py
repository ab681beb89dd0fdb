"""Classes with the interfaces of the published Hidden Positives repository, computed by hpkernels."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from hpkernels import backends
from hpkernels.backends import Backend
from hpkernels.ops import _checks as check
from hpkernels.ops.ghp_contrastive import ghp_contrastive
from hpkernels.ops.multi_positive_contrastive.options import Variant, check_settings

__all__ = ["SupConLoss"]

_VARIANTS: dict[Any, Variant] = {1: "joint", 2: "separate"}

_T = TypeVar("_T")


class SupConLoss(nn.Module):
    """The ``SupConLoss`` of the published Hidden Positives repository: same constructor, same `forward`.

    Its `forward` takes codes, features and pools, and it has no N x N temporaries. `hpkernels.nn.SupConLoss` is another
    class of that name: the widely used one of the SupContrast repository, which takes features and labels.

    Args:
        temperature: of the logits.
        contrast_mode: accepted as published, where it has no effect; "one" or "all".
        base_temperature: the loss is multiplied by temperature / base_temperature.
        mix_in_separate: with ``loss_version`` 2 the published code ignores `modeloutput_z_mix`; True averages both
            branches there too.
        backend: see `hpkernels.ghp_contrastive`.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        contrast_mode: Literal["one", "all"] = "one",
        base_temperature: float = 0.07,
        *,
        mix_in_separate: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if contrast_mode not in ("one", "all"):
            raise ValueError(f"SupConLoss: `contrast_mode` must be 'one' or 'all', got {contrast_mode!r}")
        check_settings(
            "SupConLoss",
            temperature=temperature,
            base_temperature=base_temperature,
            anchors_per_image=1,
            negative_rate=1.0,
            variant="joint",
            reweight=True,
            keep_specific_only=False,
        )
        check.flag("SupConLoss", "mix_in_separate", mix_in_separate)
        backends.check_name(backend, "SupConLoss: `backend`")
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature
        self.mix_in_separate = mix_in_separate
        self.backend: Backend = backend

    def forward(
        self,
        modeloutput_z: Tensor,
        modeloutput_s_pr: Tensor | None = None,
        modeloutput_f: Tensor | None = None,
        Pool_ag: Tensor | None = None,
        Pool_sp: Tensor | None = None,
        opt: dict[str, Any] | None = None,
        lmbd: float | Tensor | None = None,
        modeloutput_z_mix: Tensor | None = None,
    ) -> Tensor:
        """The loss of one step.

        Args:
            modeloutput_z: (N, D) L2-normalised projections; gradients reach them.
            modeloutput_s_pr: (N, Ds) L2-normalised EMA-head outputs.
            modeloutput_f: (N, Df) L2-normalised backbone features.
            Pool_ag: (M, Df) task-agnostic pool, in any floating dtype (published: float16).
            Pool_sp: (M, Ds) task-specific pool.
            opt: settings; read are ``["model"]["spatial_size"]`` (H = W), ``["rho"]`` (negative rate),
                ``["loss_version"]`` (1 joint, 2 separate) and ``["reweighting"]`` (0 or 1).
            lmbd: lambda, the weight of the task-specific positives.
            modeloutput_z_mix: (N, D) projections of the locally propagated codes.

        Returns:
            The 0-d loss.

        Raises:
            TypeError, ValueError: an argument is missing or not as described. Messages of the checks inside name the
                arguments of `hpkernels.ghp_contrastive`.
        """
        modeloutput_s_pr = _given("modeloutput_s_pr", modeloutput_s_pr)
        modeloutput_f = _given("modeloutput_f", modeloutput_f)
        Pool_ag = _given("Pool_ag", Pool_ag)
        Pool_sp = _given("Pool_sp", Pool_sp)
        opt = _given("opt", opt)
        weight: Any = _given("lmbd", lmbd)
        variant = _VARIANTS.get(_setting(opt, "loss_version"))
        if variant is None:
            raise ValueError(f"SupConLoss: `opt['loss_version']` must be 1 or 2, got {opt['loss_version']!r}")
        use_mix = variant == "joint" or self.mix_in_separate
        return ghp_contrastive(
            modeloutput_z,
            modeloutput_f,
            Pool_ag.to(modeloutput_f.dtype),
            specific=modeloutput_s_pr,
            specific_pool=Pool_sp.to(modeloutput_s_pr.dtype),
            specific_weight=weight,
            z_mixed=modeloutput_z_mix if use_mix else None,
            anchors_per_image=_setting(opt, "model", "spatial_size") ** 2,
            temperature=self.temperature,
            base_temperature=self.base_temperature,
            negative_rate=_setting(opt, "rho"),
            variant=variant,
            reweight=bool(_setting(opt, "reweighting")),
            backend=self.backend,
        )


def _given(name: str, value: _T | None) -> _T:
    if value is None:
        raise TypeError(f"SupConLoss: `{name}` must be given, got None")
    return value


def _setting(opt: Any, *keys: str) -> Any:
    for depth, key in enumerate(keys):
        try:
            opt = opt[key]
        except (KeyError, TypeError):
            path = "".join(f"[{part!r}]" for part in keys[: depth + 1])
            raise ValueError(f"SupConLoss: `opt` must have {path}, got none") from None
    return opt
