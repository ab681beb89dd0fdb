"""What each provider is and what it cannot express, in words for docs/benchmarks.md and ``run --limits``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

BEGIN, END = "<!-- begin providers -->", "<!-- end providers -->"
"""What the table stands between."""


class About(NamedTuple):
    """A provider in words: phrases that stand in a table.

    Attributes:
        what: it is.
        cannot: what it cannot express.
        of_ops: by op, what it cannot express there, where `cannot` is about several ops or about another row.
    """

    what: str
    cannot: str = ""
    of_ops: Mapping[str, str] = MappingProxyType({})


_NOT_RUN = "not run yet, tested with a stand-in"
_TOPK = "masks, groups"
_DISCOVERY = "keys that are not the anchors"
_LOSS = "anchors of no image, the variant `separate`, anchors kept for task-specific positives alone"
_PAIRS = "excluded pairs, pairs with a weight"
_DENSE = f"masks and lists of pairs, {_PAIRS}"
_CHUNKED = f"{_PAIRS}, learnable temperatures"
_PROPAGATION = "weights as they are cached, (B, 9, H, W)"
_ANEW = ", and a new size without compiling anew"

_OF_LOSSES = dict.fromkeys(("multi_positive_contrastive", "ghp_contrastive", "training_step"), _LOSS)
_OF_PUBLISHED = _OF_LOSSES | {"local_propagation": _PROPAGATION}
_OF_PLAIN = {"masked_topk": _TOPK, "hidden_positives": _DISCOVERY, "contrastive": _DENSE}
_OF_CHUNKED = _OF_PLAIN | _OF_LOSSES | {"contrastive": f"masks and lists of pairs, {_CHUNKED}"}


def _anew(of_ops: Mapping[str, str]) -> dict[str, str]:
    return {op: cannot + _ANEW for op, cannot in of_ops.items()}


PROVIDERS = {
    "reference": About("hpkernels in plain PyTorch, in blocks of rows"),
    "cpu": About('hpkernels with `backend="cpu"`; `cuda` and `triton` likewise, on a GPU'),
    "cpu-float32": About("`cpu` on a processor without int8 products (`masked_topk` only)"),
    "published": About(
        "`benchmarks/published.py`: eager PyTorch in the structure of the published code, blocks of all pairs, plain"
        " autograd, in float32",
        _LOSS,
        _OF_PUBLISHED,
    ),
    "compiled": About(
        "`torch.compile` of the loss of an image and of the propagation of `published`, of `torch-topk`, of"
        " `torch-matmul` and of `torch-dense`",
        f"what these cannot{_ANEW}",
        _anew(_OF_PLAIN | _OF_PUBLISHED),
    ),
    "torch-topk": About("plain PyTorch: product and `topk`", _TOPK),
    "torch-matmul": About("plain PyTorch: product and comparison, in float32", _DISCOVERY),
    "torch-bmm": About("`bmm` with the masked (G, G) attention", _PROPAGATION),
    "torch-shifts": About("nine shifted products", "windows other than 3 x 3"),
    "torch-dense": About(
        "plain PyTorch: all logits, positives by equal labels, plain autograd, in float32",
        _DENSE,
    ),
    "torch-chunked": About(
        "plain PyTorch in blocks of rows: `torch.mm`, an epilogue, and at once the gradient of the block by two"
        " products more; on a GPU in the dtype of the inputs, with float32 products",
        _CHUNKED,
        _OF_CHUNKED,
    ),
    "compiled-chunked": About(
        "`torch.compile` of a block of `torch-chunked`", f"what that cannot{_ANEW}", _anew(_OF_CHUNKED)
    ),
    "faiss": About("`IndexFlatIP` of faiss-cpu, filled and searched in each call", "masks, groups, gradients"),
    "faiss-gpu": About(
        f"`knn_gpu` of faiss-gpu; its own memory is not in the peak; API of 1.15.1; {_NOT_RUN}",
        "masks, groups, gradients",
    ),
    "cuvs": About(
        f"brute force of cuVS by inner product, built and searched in each call; its own memory is not in the peak; API"
        f" of 26.10; {_NOT_RUN}",
        "groups, gradients, bfloat16",
    ),
    "flashlib": About(
        f"`flash_knn` of FlashLib, in half precision (its float32 products are TF32's); API of 0.4.0; {_NOT_RUN}",
        "inner products but through squared distances of rows with a column more, masks, groups, gradients",
    ),
    "pytorch-metric-learning": About(
        "its `SupConLoss` with `DotProductSimilarity`, keys as `ref_emb`, in float32",
        "both directions, pairs with a weight, a loss of more pairs than fit",
    ),
    "open_clip": About(
        "its `ClipLoss`, in float32: it would round logits to half precision",
        "several positives of an anchor, numbers of keys other than of anchors, anchors that are their own keys",
    ),
    "memeff": About(
        f"its `MemoryEfficientCLIPLoss` with `stable=False`, on a GPU in bfloat16; API of 0.3.1; {_NOT_RUN}",
        "several positives of an anchor, numbers of keys other than of anchors, anchors that are their own keys",
    ),
}
"""In the order of the table. A backend that is not here has nothing to say."""

LEFT_OUT = {
    "siglip-kernel": "fuses the sigmoid loss (0.1.2), a sum over pairs; every loss here divides by a sum over keys",
}
"""Libraries that are no providers, and why."""


def cannot(name: str, op: str) -> str:
    """What a provider cannot express of what the contract of `op` has, in one phrase, or ""."""
    about = PROVIDERS.get(name)
    return "" if about is None else about.of_ops.get(op, about.cannot)


def table() -> str:
    """The table of docs/benchmarks.md."""
    lines = ["| provider | what it is | what it cannot express |", "|---|---|---|"]
    lines += [f"| `{name}` | {about.what} | {about.cannot} |" for name, about in PROVIDERS.items()]
    lines += ["", "Left out:", "", *(f"- {name} {reason}." for name, reason in LEFT_OUT.items())]
    return "\n".join(lines) + "\n"
