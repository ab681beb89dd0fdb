"""The multi-positive contrastive loss: SupCon with weighted positives, sampled negatives and per-image means."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels import backends
from hpkernels.backends import Backend
from hpkernels.ops import _checks as check
from hpkernels.ops._bits import words_per_row
from hpkernels.ops.multi_positive_contrastive import registration
from hpkernels.ops.multi_positive_contrastive.options import ContrastiveOptions, Variant, check_options, without_ignored
from hpkernels.positive_mask import PositiveMask


def multi_positive_contrastive(
    z: Tensor,
    positives: PositiveMask | Tensor,
    *,
    specific: PositiveMask | Tensor | None = None,
    specific_weight: float | Tensor = 0.0,
    anchors_per_image: int | None = None,
    temperature: float = 0.07,
    base_temperature: float | None = None,
    negative_rate: float = 1.0,
    negatives: Tensor | None = None,
    seed: int | Tensor | None = None,
    variant: Variant = "joint",
    reweight: bool = False,
    keep_specific_only: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Compute the multi-positive contrastive loss of N anchors without keeping any N x N tensor for backward.

    With ``l_ij = <z_i, z_j> / temperature``, positives A, specific positives S and negatives R:
    ``logp_ij = l_ij - log sum_{k != i, A_ik or R_ik} exp(l_ik)``, ``w_ij = A_ij + specific_weight * S_ij``,
    ``n_i = sum_j w_ij``. The loss of an image is the mean of ``-sum_j w_ij logp_ij / n_i`` over its anchors that have
    an A-positive, and the loss is the mean over the images that have such an anchor (HP, CVPR 2023).
    With positives from labels and the defaults it is SupCon (Khosla et al., NeurIPS 2020, L_out).

    Args:
        z: (N, D) floating-point anchors, ordered image by image; usually L2-normalised, but any
            rows whose products do not overflow are safe.
        positives: task-agnostic positives A: a `PositiveMask`, or what makes one: integer labels (N,) or a bool mask
            (N, N). Anchors that a mask ignores (`PositiveMask.from_labels`) take no part at all.
        specific: task-specific positives S in the same forms, or None.
        specific_weight: lambda >= 0, a float or a 0-d tensor; a positive one needs `specific`.
        anchors_per_image: G, a divisor of N. None: all anchors are one image.
        temperature: positive.
        base_temperature: the loss is multiplied by temperature / base_temperature. None: no scaling.
        negative_rate: probability in [0, 1] that a (patch position, anchor) pair is drawn as a negative.
        negatives: (G, N) bool mask to use instead of a draw: row = patch position, column = anchor.
        seed: of the draw, an int or a 0-d int64 tensor on the device of `z`. None: one is drawn from PyTorch's
            generator of that device, so that ``torch.manual_seed`` governs it.
        variant: "joint" (the published training recipe) or "separate" (the paper's equation: an A term over anchors
            with A-positives plus lambda times an S term over anchors with S-positives, each normalised by itself, over
            the images that have such anchors).
        reweight: weight each anchor of an image by n_i over the image's mean n, which makes the loss of an image one
            weighted mean over its positive pairs.
        keep_specific_only: in "joint", also keep anchors whose only positives are task-specific; the published code
            drops them.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        The 0-d loss, float32 (float64 for float64 `z`). Anchors with nothing to contribute, and images without any
        anchor left, are left out of the means; if nothing is left the loss is 0 with zero gradient.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it. On the CPU, outside
            ``torch.compile``, a `z` or `specific_weight` that is not finite, or that makes the loss so, is a
            ValueError; elsewhere the loss is NaN.

    Notes:
        Logits and sums are float32 (float64) whatever the dtype of `z`. Negatives are drawn by a counter-based
        generator, the same bits on every backend. Gradients reach `z` only; double backward is refused.
        Deterministic. Kept for backward: z, the packed masks and four numbers an anchor; on a GPU also R and the lists
        of pairs, of up to half of the bytes of a mask. The reference works on blocks of rows in up to 256 MiB.

    Examples:
        >>> import torch, hpkernels
        >>> z = torch.nn.functional.normalize(torch.eye(4) + 0.1).requires_grad_()
        >>> positives = hpkernels.PositiveMask.from_labels(torch.tensor([0, 0, 1, 1]))
        >>> loss = hpkernels.multi_positive_contrastive(z, positives, temperature=0.5)
        >>> loss.backward()
        >>> f"{loss.item():.4f}"
        '1.0986'
    """
    op = "multi_positive_contrastive"
    check.tensor(op, "z", z, ("N", "D"))
    anchors = z.shape[0]
    positives = to_mask(op, "positives", positives, z)
    if specific is not None:
        specific = to_mask(op, "specific", specific, z)
    options = check_options(
        op,
        z,
        ContrastiveOptions(
            specific_weight=specific_weight,
            anchors_per_image=anchors if anchors_per_image is None else anchors_per_image,
            temperature=temperature,
            base_temperature=base_temperature,
            negative_rate=negative_rate,
            negatives=negatives,
            seed=seed,
            variant=variant,
            reweight=reweight,
            keep_specific_only=keep_specific_only,
        ),
        has_specific=specific is not None,
    )
    check.finite(op, "z", z)
    for ignored in [mask.ignored for mask in (positives, specific) if mask is not None]:
        if ignored is not None:
            positives = positives.ignoring(ignored)
            specific = None if specific is None else specific.ignoring(ignored)
            options = without_ignored(options, ignored)
    backend = backends.select(op, backend, z)
    return mean_loss(op, z, None, positives, specific, options, backend)


def mean_loss(
    op: str,
    z: Tensor,
    z_mixed: Tensor | None,
    positives: PositiveMask,
    specific: PositiveMask | None,
    options: ContrastiveOptions,
    backend: str,
) -> Tensor:
    """The mean loss of one branch or two, which share their relations, for arguments that have been checked."""
    masks = (positives.bits, None if specific is None else specific.bits, options.specific_weight)
    drawn = (options.negatives, options.seed)
    weighting = (options.variant, options.reweight, options.keep_specific_only)
    symmetric = positives.symmetric and (specific is None or specific.symmetric)
    pairs = registration.contrastive_pairs(
        *masks,
        *drawn,
        options.anchors_per_image,
        options.negative_rate,
        *weighting,
        symmetric,
        z.shape[1] * z.element_size(),
        z.shape[0],
        0,
        backend,
    )
    losses, _ = registration.multi_positive_contrastive(
        z,
        z_mixed,
        *masks,
        *drawn,
        pairs,
        options.anchors_per_image,
        options.temperature,
        options.scale,
        options.negative_rate,
        *weighting,
        symmetric,
        None,
        0,
        backend,
    )
    return mean_of(op, losses)


def mean_of(op: str, losses: Tensor) -> Tensor:
    """The mean of the losses of the branches; where values can be read it must be finite."""
    mean: Tensor = losses.mean()
    if check.readable(mean.detach()) and not mean.isfinite():  # the inputs are: they were checked
        raise ValueError(
            f"{op}: {'`z`' if len(losses) == 1 else '`z` and `z_mixed`'} must have inner products that are finite when"
            f" divided by the temperature, in {str(mean.dtype).removeprefix('torch.')}, got a loss of {mean.item()}"
        )
    return mean


def to_mask(op: str, name: str, mask: PositiveMask | Tensor, z: Tensor) -> PositiveMask:
    """Check that `mask` is a PositiveMask of the anchors `z`, or make one of labels or of a bool mask."""
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        check.tensor(op, name, mask, (z.shape[0], z.shape[0]), check.BOOLEAN)
        mask = PositiveMask.from_dense(mask)
    elif isinstance(mask, Tensor) and mask.dtype in check.ANY_INTEGER:
        check.tensor(op, name, mask, (z.shape[0],), check.ANY_INTEGER)
        mask = PositiveMask.from_labels(mask)
    if not isinstance(mask, PositiveMask):
        got = f"a tensor of {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{op}: `{name}` must be a PositiveMask, integer labels (N,) or a bool mask (N, N), got {got}")
    if mask.keys is not None:
        raise ValueError(
            f"{op}: `{name}` must be a square mask, of the anchors with each other, got one of {mask.anchors} anchors x"
            f" {mask.keys} keys"
        )
    if mask.anchors != z.shape[0]:
        raise ValueError(f"{op}: `{name}` must be a mask of N = {z.shape[0]} anchors, got one of {mask.anchors}")
    # Attributes can be changed after the constructor has checked them, and kernels trust the shape.
    check.tensor(op, f"{name}.bits", mask.bits, (mask.anchors, words_per_row(mask.anchors)), (torch.int32,))
    check.same(op, name, mask.bits, "z", z, dtype=False)
    bits = check.saveable(mask.bits)
    if z.requires_grad and bits is not mask.bits:
        mask = PositiveMask(bits, mask.anchors, symmetric=mask.symmetric, ignored=mask.ignored)
    return mask
