"""The one cost model: FLOPs, bytes, workspace and time of each op by each route. Needs neither a GPU nor torch.

Times are those of a perfect implementation at the published (for the CPU: measured) rates of a device: the larger of
arithmetic and traffic. docs/benchmarks.md says how far measured times are from them.
"""

from __future__ import annotations

from dataclasses import dataclass

_BLOCK_FLOPS, _PAIR_FLOPS = 4, 8
"""FLOPs for each logit and feature of `multi_positive_contrastive`, forward and backward. In a block both multiply, but
half of it as products are symmetric, and backward once more for the gradient. Pairs by themselves are multiplied in
both and added to the gradients of both anchors."""
_PAIR_SLOWDOWN = 1.5
"""How much slower the arithmetic of pairs by themselves is than that of blocks: the CPU backend chooses its route by
it. Measured 2026-11-25, 2 threads of an AMD EPYC (Zen 4): 100 and 146 GFLOP/s over forward and backward."""

MOST_LISTED_DENSITY = 0.015
"""Share of all pairs up to which the Triton and CUDA backends list positives across images instead of computing blocks
of all pairs. A prediction: rows read from cache, one a pair, against products at the matrix rate. Not measured yet."""
_SAMPLED_SLOWDOWN = 4
"""How much slower a sampled negative is there than a pair in a block: rows are gathered, gradients staged. On paper."""
_GPU_BLOCK_FLOPS, _GPU_SAMPLED_FLOPS, _GPU_LISTED_FLOPS = 6, 8, 6
"""FLOPs for each logit and feature of `multi_positive_contrastive` there, forward and backward: blocks multiply in both
directions, and once more for the gradient, which also the column of a sampled negative gets."""

_FUSED_DIM, _FUSED_ANCHORS = 768, 92_000
"""Above this D a library's products with an epilogue take less time than fused kernels, by what others have measured on
Hopper with other losses; above this N a mask of N² / 8 bytes takes more memory than their blocks. Not measured here."""
CHUNK_BYTES_ON_CPU, CHUNK_BYTES_ON_GPU = 2**25, 2**30
"""Of a block of `contrastive`. Caches of the CPU hold it; on a GPU gradients of all keys are read and written once a
block."""

_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

OPS = (
    "masked_topk",
    "hidden_positives",
    "multi_positive_contrastive",
    "local_propagation",
    "ghp_contrastive",
    "contrastive",
)
"""The ops whose cost is known."""


@dataclass(frozen=True)
class Device:
    """Rates of a device.

    Attributes:
        matrix: FLOP/s of matrix products by dtype, dense, float32 accumulation.
        vector: FLOP/s of float32 arithmetic outside matrix products.
        bandwidth: bytes/s of its memory.
        source: of the figures.
        ranking: FLOP/s of products that similarities are ranked and compared by, where that is not the rate of the
            dtype: the CPU backend decides all but close cases by int8 products.
        capability: the CUDA compute capability of a GPU. Of a device that has one, the routes of the loss are those of
            the Triton and CUDA backends; else those of the CPU backend.
    """

    matrix: dict[str, float]
    vector: float
    bandwidth: float
    source: str
    ranking: float | None = None
    capability: tuple[int, int] | None = None


def _rates(half: float, single: float, double: float) -> dict[str, float]:
    return {"float16": half, "bfloat16": half, "float32": single, "float64": double}


DEVICES = {
    "H200": Device(_rates(989e12, 67e12, 67e12), 67e12, 4.8e12, "NVIDIA data sheet, SXM", capability=(9, 0)),
    "H100": Device(_rates(989e12, 67e12, 67e12), 67e12, 3.35e12, "NVIDIA data sheet, SXM", capability=(9, 0)),
    "A100": Device(
        _rates(312e12, 19.5e12, 19.5e12), 19.5e12, 2.04e12, "NVIDIA data sheet, SXM 80 GB", capability=(8, 0)
    ),
    "RTX 4090": Device(_rates(165e12, 82.6e12, 1.29e12), 82.6e12, 1.01e12, "NVIDIA Ada white paper", capability=(8, 9)),
    # Half precision is computed in float32 there.
    "CPU": Device(
        _rates(200e9, 200e9, 100e9), 100e9, 34e9, "measured 2026-11-25, 2 threads of an AMD EPYC (Zen 4)", ranking=870e9
    ),
}


@dataclass(frozen=True)
class RouteCost:
    """What one way to compute an op costs.

    Attributes:
        flops: of matrix products and of vector arithmetic together.
        bytes: read from and written to memory at least.
        workspace: bytes needed besides inputs and outputs.
        milliseconds: on the roofline of the device.
        bound: "compute" or "memory", whichever takes longer.
    """

    flops: float
    bytes: float
    workspace: float
    milliseconds: float
    bound: str


@dataclass(frozen=True)
class Estimate:
    """The costs of an op by each of its routes.

    Attributes:
        op: its name.
        device: the name of the device.
        routes: cost of each route, by name.
    """

    op: str
    device: str
    routes: dict[str, RouteCost]

    @property
    def best(self) -> str:
        """The name of the fastest route."""
        return min(self.routes, key=lambda route: self.routes[route].milliseconds)


@dataclass(frozen=True)
class _Work:
    """Work before it is put on a device: FLOPs of products, of products that rank, and of pairs; traffic; workspace.

    Traffic `apart` is that of kernels which multiply nothing, so that it takes its time beside the products.
    """

    matrix: float = 0.0
    ranking: float = 0.0
    pairs: float = 0.0
    bytes: float = 0.0
    apart: float = 0.0
    workspace: float = 0.0

    def __add__(self, other: _Work) -> _Work:
        total = {name: getattr(self, name) + getattr(other, name) for name in _ADDED}
        return _Work(**total, workspace=max(self.workspace, other.workspace))

    def __mul__(self, times: float) -> _Work:
        return _Work(**{name: getattr(self, name) * times for name in _ADDED}, workspace=self.workspace)

    def on(self, device: Device, dtype: str) -> RouteCost:
        """The cost on a device: pairs run at the matrix rate over `_PAIR_SLOWDOWN`, or the vector rate if less."""
        matrix = device.matrix[dtype]
        ranking = matrix if device.ranking is None or dtype == "float64" else device.ranking
        by_pairs = min(matrix / _PAIR_SLOWDOWN, device.vector)
        compute = self.matrix / matrix + self.ranking / ranking + self.pairs / by_pairs
        traffic = self.bytes / device.bandwidth
        milliseconds = 1e3 * (max(compute, traffic) + self.apart / device.bandwidth)
        bound = "compute" if compute >= traffic + self.apart / device.bandwidth else "memory"
        flops = self.matrix + self.ranking + self.pairs
        return RouteCost(flops, self.bytes + self.apart, self.workspace, milliseconds, bound)


_ADDED = ("matrix", "ranking", "pairs", "bytes", "apart")


def estimate(
    op: str,
    *,
    N: int | None = None,
    D: int = 512,
    keys: int | None = None,
    both_directions: bool = False,
    features_dim: int = 384,
    M: int = 2048,
    k: int = 1,
    images: int | None = None,
    anchors_per_image: int = 784,
    negative_rate: float = 0.02,
    density: float = 0.001,
    within_image_share: float = 0.8,
    heads_dim: int = 384,
    window: int = 3,
    branches: int = 2,
    specific: bool = True,
    symmetric: bool = True,
    dtype: str = "float16",
    device: str | Device = "H200",
) -> Estimate:
    """Estimate the cost of an op, forward and backward, by each of its routes.

    Args:
        op: "masked_topk", "hidden_positives", "multi_positive_contrastive", "local_propagation", "ghp_contrastive" or
            "contrastive".
        N: anchors; a multiple of `anchors_per_image`, but with `keys` or for "contrastive". Default: `images` times it.
        D: features of a projection.
        keys: K of "contrastive" and "hidden_positives"; None: the anchors are the keys, for "contrastive" with
            symmetric positives if `symmetric`.
        both_directions: of "contrastive".
        features_dim: Df, features of the backbone; of the queries of "masked_topk" and "hidden_positives".
        M: pool rows.
        k: of "masked_topk".
        images: B. Default: 64, or N / `anchors_per_image`.
        anchors_per_image: G.
        negative_rate: of the loss.
        density: share of all pairs that are positives.
        within_image_share: share of the positives that lie in their anchor's own image.
        heads_dim: heads times d of the attention.
        window: of local propagation.
        branches: of "ghp_contrastive": 2 with `z_mixed`.
        specific: whether "ghp_contrastive" discovers task-specific positives as well.
        symmetric: whether the positives are; if not, the loss has no lists on a GPU, and makes transposes on a CPU.
        dtype: of the inputs.
        device: a name in `hpkernels.cost.DEVICES`, or a `hpkernels.cost.Device` of your own.

    Returns:
        The cost of each route. All of them give the same result.

    Raises:
        ValueError: an unknown op, dtype or device, or a number out of range.

    Examples:
        >>> import hpkernels
        >>> cost = hpkernels.estimate("ghp_contrastive", N=50176, dtype="float16", device="H200")
        >>> cost.best, cost.routes["blocks"].bound
        ('lists', 'compute')
    """
    _check(op, dtype, device, negative_rate=negative_rate, density=density, within_image_share=within_image_share)
    if N is None:
        N = (64 if images is None else images) * anchors_per_image
    sizes = {"N": N, "D": D, "features_dim": features_dim, "M": M, "k": k, "anchors_per_image": anchors_per_image}
    if op == "contrastive" or (op == "hidden_positives" and keys is not None):
        sizes |= {"keys": N if keys is None else keys, "anchors_per_image": 1}
    for name, value in (sizes | {"heads_dim": heads_dim, "window": window, "branches": branches}).items():
        if value < 1:
            raise ValueError(f"estimate: `{name}` must be at least 1, got {value}")
    if N % sizes["anchors_per_image"]:
        raise ValueError(f"estimate: `anchors_per_image` must divide N = {N}, got {anchors_per_image}")
    size = _BYTES[dtype]
    name, rates = ("custom", device) if isinstance(device, Device) else (device, DEVICES[device])
    if op == "masked_topk":
        routes = {"product": _topk(N, M, features_dim, k, size)}
    elif op == "hidden_positives":
        routes = {"symmetric" if keys is None else "between": _discovery(N, keys, features_dim, size)}
    elif op == "contrastive":
        routes = _against_keys(N, keys, D, both_directions, symmetric, size, rates.capability is not None)
    elif op == "local_propagation":
        routes = _local_propagation(N // anchors_per_image, anchors_per_image, D, heads_dim, window, size)
    else:
        if rates.capability is None:
            pairs, within = expected_pairs(N, anchors_per_image, negative_rate, density, within_image_share)
            routes = _contrastive(N, D, anchors_per_image, pairs, within, symmetric, size)
        else:
            across = density * (1 - within_image_share)
            routes = _contrastive_on_gpu(N, D, anchors_per_image, negative_rate, across, size)
            if not symmetric:
                del routes["lists"]
        if op == "ghp_contrastive":
            sources = (features_dim, D) if specific else (features_dim,)
            found = [_topk(N, M, dim, 1, size) + _discovery(N, None, dim, size) for dim in sources]
            routes = {name: sum(found, work * branches) for name, work in routes.items()}
    return Estimate(op, name, {route: work.on(rates, dtype) for route, work in routes.items()})


def expected_pairs(
    anchors: int, anchors_per_image: int, negative_rate: float, density: float, within_image_share: float
) -> tuple[float, float]:
    """The number of pairs in A, S and R, and of those within images."""
    pairs = (density + negative_rate) * anchors * anchors
    within = density * within_image_share * anchors * anchors + negative_rate * anchors * anchors_per_image
    return pairs, min(within, pairs)


def contrastive_route(anchors: int, anchors_per_image: int, pairs: float, within_images: float) -> str:
    """The route of `multi_positive_contrastive` with the least work, from the number of pairs in A, S and R."""
    work = contrastive_logits(anchors, anchors_per_image, pairs, within_images)

    return min(work, key=lambda route: route_work(*work[route]))


def route_work(in_blocks: float, by_themselves: float) -> float:
    """What logits in blocks and pair by pair cost, in FLOPs of blocks for a feature."""
    return _BLOCK_FLOPS * in_blocks + _PAIR_SLOWDOWN * _PAIR_FLOPS * by_themselves


def lists_may_be_faster(anchors: int, anchors_per_image: int, negative_rate: float) -> bool:
    """Whether the route of lists, of Triton and CUDA, can be faster than blocks of all pairs, if positives are few."""
    listed = anchors_per_image / anchors + _SAMPLED_SLOWDOWN * negative_rate
    return listed + MOST_LISTED_DENSITY < 1 and anchors > anchors_per_image


def fused_is_faster(anchors: int, dim: int) -> bool:
    """Whether `contrastive` leaves its square problems on a GPU to the kernels of `multi_positive_contrastive`."""
    return dim < _FUSED_DIM and anchors <= _FUSED_ANCHORS


def contrastive_logits(
    anchors: int, anchors_per_image: int, pairs: float, within_images: float
) -> dict[str, tuple[float, float]]:
    """How many logits each route computes in blocks, and how many pair by pair."""
    return {
        "pairs": (0, pairs),
        "blocks": (anchors * anchors, 0),  # before "images", which is the same for one image
        "images": (anchors * anchors_per_image, pairs - within_images),
    }


def _contrastive(
    n: int, dim: int, per_image: int, pairs: float, within: float, symmetric: bool, size: int
) -> dict[str, _Work]:
    masks = n * n / 8
    transposed = 0 if symmetric else 2 * masks
    return {
        name: _Work(
            matrix=_BLOCK_FLOPS * in_blocks * dim,
            pairs=_PAIR_FLOPS * by_themselves * dim,
            bytes=6 * n * dim * size + 4 * masks + 2 * transposed,
            workspace=2 * masks + transposed + 4.0 * n * dim,
        )
        for name, (in_blocks, by_themselves) in contrastive_logits(n, per_image, pairs, within).items()
    }


def _contrastive_on_gpu(n: int, dim: int, per_image: int, rate: float, across: float, size: int) -> dict[str, _Work]:
    """The routes of hpkernels/ops/multi_positive_contrastive/routes.py; `across`: the density of listed positives.

    Lists read the masks once, to find what they list, and add up the gradient of each anchor in float32.
    """
    masks, rows = n * n / 4, n * dim * size
    sampled, staged = rate * n * n, rate * n * per_image * dim * size
    blocks = _Work(
        matrix=_GPU_BLOCK_FLOPS * n * n * dim, bytes=6 * rows + 3 * masks, workspace=rate * n * per_image / 8
    )
    lists = _Work(
        matrix=(_GPU_BLOCK_FLOPS * n * per_image + _GPU_SAMPLED_FLOPS * sampled) * dim,
        pairs=_GPU_LISTED_FLOPS * across * n * n * dim,
        bytes=6 * rows + masks + 16 * n * dim + 2 * staged + 12 * across * n * n,
        workspace=4 * n * dim + staged + 4 * min(MOST_LISTED_DENSITY * n * n, 2**31),
    )
    return {"lists": lists, "blocks": blocks}


def _against_keys(
    n: int, keys: int | None, dim: int, both: bool, symmetric: bool, size: int, on_gpu: bool
) -> dict[str, _Work]:
    """The routes of `contrastive`, hpkernels/ops/contrastive/chunked.py and fused.py, with gradients to all vectors.

    Products of blocks are written, read for statistics, read and written as g, and read by two products.
    """
    triangle = keys is None and symmetric and not both
    k = n if keys is None else keys
    logits = n * k / (2 if triangle else 1)
    passes = 2 if triangle or both else 1
    accumulated = max(size, 4)
    rows = (n if keys is None else n + k) * dim
    workspace = CHUNK_BYTES_ON_GPU if on_gpu else CHUNK_BYTES_ON_CPU
    chunked = _Work(
        matrix=2.0 * logits * dim * (passes + 2),
        apart=logits * ((2 * passes + 1) * accumulated + 3 * size),
        bytes=(2 + passes) * rows * size,
        workspace=min(workspace, 2.0 * n * k * accumulated) + rows * accumulated,
    )
    if not (triangle and on_gpu):
        return {"chunked": chunked}
    mask = n * n / 8
    fused = _Work(matrix=_GPU_BLOCK_FLOPS * n * n * dim, bytes=6.0 * n * dim * size + 3 * mask, workspace=mask)
    return {"chunked": chunked, "fused": fused}


def _topk(n: int, m: int, dim: int, k: int, size: int) -> _Work:
    return _Work(ranking=2.0 * n * m * dim, bytes=(n + m) * dim * size + 12.0 * n * k)


def _discovery(n: int, keys: int | None, dim: int, size: int) -> _Work:
    """Among anchors (i, j) and (j, i) are decided by the same product. The mask is written."""
    products, rows = (0.5 * n * n, n) if keys is None else (float(n * keys), n + keys)
    mask = n * (keys or n) / 8
    return _Work(ranking=2.0 * products * dim, bytes=rows * dim * size + mask, workspace=mask)


def _local_propagation(b: int, g: int, dim: int, heads_dim: int, window: int, size: int) -> dict[str, _Work]:
    cells = window * window
    weights = _Work(matrix=2.0 * b * g * g * heads_dim, bytes=2.0 * b * g * heads_dim * size + 4.0 * b * g * cells)
    apply = _Work(bytes=4.0 * b * g * dim * size + 8.0 * b * g * cells)
    return {"weights and stencil": weights + apply, "stencil (cached weights)": apply}


def _check(op: str, dtype: str, device: str | Device, **shares: float) -> None:
    for name, value, known in (("op", op, OPS), ("dtype", dtype, _BYTES), ("device", device, DEVICES)):
        if not isinstance(value, Device) and value not in known:
            raise ValueError(f"estimate: `{name}` must be one of {', '.join(known)}, got {value!r}")
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"estimate: `{name}` must be in [0, 1], got {share}")
