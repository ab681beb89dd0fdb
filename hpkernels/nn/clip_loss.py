"""The loss of CLIP as open_clip has it, as a module."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, overload

import torch
from torch import Tensor, nn

from hpkernels import backends
from hpkernels.backends import Backend
from hpkernels.nn._settings import settings_of, text_of
from hpkernels.ops import _checks as check
from hpkernels.ops.contrastive import Labels, contrastive

_OP = "ClipLoss"
_SETTINGS = ("local_loss", "gather_with_grad", "cache_labels", "rank", "world_size", "use_horovod", "backend")


class ClipLoss(nn.Module):
    """The loss of CLIP, with the arguments of open_clip's ``ClipLoss``: images find their texts, and texts theirs.

    ``(cross_entropy(logits, arange(N)) + cross_entropy(logits.T, arange(N))) / 2`` with ``logits = logit_scale *
    image_features @ text_features.T`` (Radford et al., ICML 2021), without the logits in memory.

    On several ranks (``world_size > 1``) it is `hpkernels.distributed.contrastive`: each rank gives its own images and
    texts, and gets the loss of the batch of all ranks, with gradients for DistributedDataParallel, whose mean over the
    ranks makes of them the gradient of that loss. Of open_clip's settings two do the same: ``gather_with_grad=True``,
    with or without `local_loss`, but that with `local_loss` the number that open_clip returns is of the rank's own rows
    alone. Without ``gather_with_grad`` open_clip's gradients are others: without `local_loss` those of the features are
    divided by the number of ranks, and that of `logit_scale` is not; with `local_loss` features get the gradient of
    what they are as anchors, and none as keys. Here both settings are accepted and change nothing: the gradient is
    always exact.

    Args:
        local_loss, gather_with_grad: accepted, see above; the logits of no more than a block of rows are in memory.
        cache_labels: accepted; there are no labels to keep.
        rank, world_size: of the default process group of ``torch.distributed``.
        use_horovod: must be False.
        backend: see `hpkernels.contrastive`.

    Raises:
        TypeError, ValueError: a setting is not as described.

    Examples:
        >>> import torch, hpkernels
        >>> images, texts = torch.nn.functional.normalize(torch.randn(2, 4, 8, requires_grad=True), dim=2)
        >>> logit_scale = torch.tensor(10.0, requires_grad=True)
        >>> hpkernels.nn.ClipLoss()(images, texts, logit_scale).backward()
        >>> logit_scale.grad.shape
        torch.Size([])
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        flags = {"local_loss": local_loss, "gather_with_grad": gather_with_grad, "cache_labels": cache_labels}
        for name, value in (flags | {"use_horovod": use_horovod}).items():
            check.flag(_OP, name, value)
        if use_horovod:
            raise ValueError(f"{_OP}: `use_horovod` must be False, as ranks meet in torch.distributed, got True")
        check.integer(_OP, "world_size", world_size, 1)
        check.integer(_OP, "rank", rank, 0, world_size - 1)
        backends.check_name(backend, f"{_OP}: `backend`")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.backend: Backend = backend

    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        *,
        output_dict: Literal[True],
    ) -> dict[str, Tensor]: ...

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The 0-d loss, or with `output_dict` a dictionary that has it as "contrastive_loss".

        Args:
            image_features, text_features: (N, D) floating-point, row by row of the same pair, usually L2-normalised;
                gradients reach both.
            logit_scale: positive, a number or a tensor of one, which receives a gradient: 1 / temperature.
            logit_bias: a number or a tensor of one. Added to all logits it changes nothing: its gradient is 0.
            output_dict: see above.

        Returns:
            The loss, float32 (float64 for float64 features), 0-d.

        Raises:
            TypeError, ValueError: an argument is not as described. Features that are not finite are named as
                `hpkernels.contrastive` has them, `anchors` (images) and `keys` (texts).
        """
        # Of several ranks one that fails its checks ends all.
        with _together() if self.world_size > 1 else nullcontext():
            self._check_ranks()
            check.tensor(_OP, "image_features", image_features, ("N", "D"))
            text_features = check.with_autocast(text_features, image_features)
            check.tensor(_OP, "text_features", text_features, tuple(image_features.shape))
            check.same(_OP, "text_features", text_features, "image_features", image_features)
            check.flag(_OP, "output_dict", output_dict)
            temperature = _temperature(logit_scale, image_features)
            if logit_bias is not None:
                logit_bias = _bias(logit_bias, image_features)
        pairs = torch.arange(image_features.shape[0], device=image_features.device)
        if self.world_size == 1:
            loss = contrastive(
                image_features,
                text_features,
                positives=Labels(pairs),
                temperature=temperature,
                both_directions=True,
                backend=self.backend,
            )
        else:
            loss = self._of_all_ranks(image_features, text_features, pairs, temperature)
        if isinstance(logit_bias, Tensor):  # in the graph: it has the gradient that DistributedDataParallel awaits
            loss = loss + logit_bias.to(loss.dtype) * 0
        return {"contrastive_loss": loss} if output_dict else loss

    def _check_ranks(self) -> None:
        if self.world_size == 1:
            return
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise ValueError(
                f"{_OP}: `world_size` must be 1 where torch.distributed is not initialised, got {self.world_size}"
            )
        here = (torch.distributed.get_rank(), torch.distributed.get_world_size())
        if here != (self.rank, self.world_size):
            raise ValueError(
                f"{_OP}: `rank` and `world_size` must be those of the process group, {here[0]} and {here[1]}, got"
                f" {self.rank} and {self.world_size}"
            )

    def _of_all_ranks(self, images: Tensor, texts: Tensor, pairs: Tensor, temperature: float | Tensor) -> Tensor:
        from hpkernels import distributed  # only where there are ranks: PyTorch may be built without

        return distributed.contrastive(
            images,
            texts,
            positives=Labels(pairs + (self.rank << 32)),  # which no other rank has
            temperature=temperature,
            both_directions=True,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return text_of(settings_of(self, _SETTINGS))


def _together() -> AbstractContextManager[object]:
    from hpkernels.distributed._collectives import together

    return together(_OP)


def _bias(logit_bias: float | Tensor, features: Tensor) -> float | Tensor:
    if not isinstance(logit_bias, Tensor):
        return check.real(_OP, "logit_bias", logit_bias)
    check.finite(_OP, "logit_bias", logit_bias)
    return _number("logit_bias", logit_bias, features)


def _temperature(logit_scale: float | Tensor, features: Tensor) -> float | Tensor:
    (accumulate,) = check.accumulation(features.dtype)
    if not isinstance(logit_scale, Tensor):
        return 1 / check.reciprocal(_OP, "logit_scale", logit_scale, accumulate)
    # Before its reciprocal is taken: half precision would have three digits of it.
    scale = _number("logit_scale", logit_scale, features).to(accumulate)
    if check.readable(scale.detach()):
        check.reciprocal(_OP, "logit_scale", scale.item(), accumulate)
    return scale.reciprocal()


def _number(name: str, value: Tensor, features: Tensor) -> Tensor:
    """A tensor of one number as a 0-d tensor."""
    dims = value.shape if value.numel() == 1 else ()
    check.tensor(_OP, name, value, dims)
    check.same(_OP, name, value, "image_features", features, dtype=False)
    return value.reshape(())
