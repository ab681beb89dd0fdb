"""What would run, and why not the others: the rules that dispatch follows, and the cost model, put into sentences."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hpkernels import _native, backends, cost
from hpkernels.cost import DEVICES, RouteCost
from hpkernels.ops import _cuda, _triton
from hpkernels.ops.masked_topk.cuda import MOST_KEPT
from hpkernels.ops.multi_positive_contrastive import routes

SIZES = {
    name: parameter.default
    for name, parameter in inspect.signature(cost.estimate).parameters.items()
    if name not in ("op", "device", "dtype")
}
"""What a call may give besides op, device and dtype, with the defaults."""
_LISTS, _BLOCKS = "lists of pairs, blocks within images", "blocks of all pairs"
_COST_OF = {_LISTS: "lists", _BLOCKS: "blocks"}
"""The names that the cost model has for the routes of the GPU backends."""


@dataclass(frozen=True)
class Step:
    """One of the ops that a call is made of.

    Attributes:
        op: its name, with what it works on.
        engine: how its products are computed.
        route: which pairs they are computed of.
    """

    op: str
    engine: str
    route: str


@dataclass(frozen=True)
class Explanation:
    """What ``backend="auto"`` would do with a call; ``str()`` is a table.

    Attributes:
        op: the op.
        device: the device, in words.
        dtype: of the inputs.
        backend: the backend that runs, or that would once it has passed its self-check.
        steps: what it does.
        cost: on the roofline of the device, forward and backward; None where no rates of the device are known.
        not_taken: why not, by the name of a backend, an engine or a route.
    """

    op: str
    device: str
    dtype: str
    backend: str
    steps: tuple[Step, ...]
    cost: RouteCost | None
    not_taken: dict[str, str]

    def __str__(self) -> str:
        rows = [(step.op, f"{step.engine}; {step.route}") for step in self.steps]
        if self.cost is None:
            rows.append(("cost", "no rates of this device are known: name one, device=..."))
        else:
            time = f"{_time(self.cost.milliseconds)} on the roofline (a prediction), bound by {self.cost.bound}"
            work = f"{_work(self.cost.flops)}, {_memory(self.cost.bytes)} moved"
            rows.append(("cost", f"{time}; {work}, workspace {_memory(self.cost.workspace)}"))
        lines = [f"{self.op}, {self.dtype}, on {self.device}: {self.backend}"]
        lines += [f"  {name:30} {what}" for name, what in rows]
        lines += ["not taken, and why", *(f"  {name}: {reason}" for name, reason in self.not_taken.items())]
        return "\n".join(lines)


def _time(milliseconds: float) -> str:
    return _in_unit(milliseconds * 1e3, 1000, "µs", "ms", "s")


def _work(flops: float) -> str:
    return _in_unit(flops / 1e6, 1000, "MFLOP", "GFLOP", "TFLOP", "PFLOP")


def _memory(size: float) -> str:
    return _in_unit(size / 2**10, 1024, "KiB", "MiB", "GiB", "TiB")


def _in_unit(value: float, step: int, *units: str) -> str:
    """`value`, of the first unit, in the unit that reads best; each is `step` of the one before."""
    index = 0
    while value >= step and index + 1 < len(units):
        value, index = value / step, index + 1
    return f"{_number(value)} {units[index]}"


def _number(value: float) -> str:
    """Four digits, or more for all those before the point: no exponent."""
    return f"{value:.4g}" if value < 1024 else f"{value:,.0f}"


def explain(op: str, *, device: str | None = None, dtype: str | None = None, **sizes: Any) -> Explanation:
    """Explain which backend, engine and route a call takes on this machine or on a named device, and why not others.

    Args:
        op: as for `hpkernels.estimate`.
        device: a name in `hpkernels.cost.DEVICES`, in upper or lower case; None: the GPU of this machine, or its CPU if
            it has none.
        dtype: "float16", "bfloat16", "float32" or "float64". None: "float16" on a GPU, "float32" on a CPU.
        sizes: those of `hpkernels.estimate`, as far as they differ from its defaults.

    Returns:
        The choice and its cost, which is a prediction; how many positives there are is known to the call alone.

    Raises:
        ValueError: an unknown op, device, dtype or size, or a number out of range.

    Examples:
        >>> import hpkernels
        >>> told = hpkernels.explain("ghp_contrastive", N=50176, D=512, device="H100")
        >>> told.backend, told.steps[0].engine
        ('cuda', 'TMA and wgmma')
        >>> told.not_taken["reference"]
        'cuda comes first'
    """
    _check_sizes(sizes)
    if device is not None and not isinstance(device, str):
        raise ValueError(f"explain: `device` must be one of {', '.join(DEVICES)}, got {device!r}")
    if device is not None:
        device = next((name for name in DEVICES if name.casefold() == device.casefold()), device)
    try:  # which checks them
        cost.estimate(op, dtype="float32" if dtype is None else dtype, device=device or "CPU", **sizes)
    except ValueError as error:
        raise ValueError(str(error).replace("estimate:", "explain:", 1)) from None
    place = _Place.named(device) if device else _Place.here()
    dtype = dtype or ("float32" if place.kind == "cpu" else "float16")
    given = SIZES | sizes
    if given["N"] is None:
        given["N"] = (64 if given["images"] is None else given["images"]) * given["anchors_per_image"]
    kind = getattr(torch, dtype)
    fused = op == "contrastive" and place.kind == "cuda" and _takes_fused(given)
    first = "multi_positive_contrastive" if fused else "masked_topk" if op == "ghp_contrastive" else op
    backend, not_taken = _backend(first, place, kind)
    steps, refused = _steps(op, backend, place, kind, given)
    not_taken |= refused
    if place.rates is None:
        return Explanation(op, place.text, dtype, backend, steps, None, not_taken)
    estimate = cost.estimate(op, dtype=dtype, device=place.rates, **sizes)
    route = _COST_OF.get(steps[-1].route, steps[-1].route)
    return Explanation(op, place.text, dtype, backend, steps, estimate.routes[route], not_taken)


def _check_sizes(sizes: dict[str, Any]) -> None:
    for name, value in sizes.items():
        if name not in SIZES:
            raise ValueError(f"explain: sizes must be some of {', '.join(SIZES)}, got `{name}`")
        default = SIZES[name]
        kinds: Any = bool if isinstance(default, bool) else (int, float) if isinstance(default, float) else int
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            wanted = {bool: "True or False", int: "an integer"}.get(kinds, "a number")
            raise ValueError(f"explain: `{name}` must be {wanted}, got {value!r}")


@dataclass(frozen=True)
class _Place:
    """A device: in words, its compute capability if it is an NVIDIA GPU, its rates if known, and itself if at hand."""

    text: str
    capability: tuple[int, int] | None
    rates: str | None
    device: torch.device | None = None

    @property
    def kind(self) -> str:
        """The type of device."""
        return self.device.type if self.device else "cpu" if self.capability is None else "cuda"

    @staticmethod
    def named(name: str) -> _Place:
        return _Place(name, DEVICES[name].capability, name)

    @staticmethod
    def here() -> _Place:
        if not torch.cuda.is_available():
            return _Place("the CPU of this machine", None, "CPU", torch.device("cpu"))
        device = torch.device("cuda", torch.cuda.current_device())
        name = torch.cuda.get_device_name(device)
        known = next((known for known in DEVICES if known in name), None)
        capability = None if torch.version.hip else torch.cuda.get_device_capability(device)
        return _Place(f"{name} of this machine", capability, known, device)


def _backend(op: str, place: _Place, dtype: torch.dtype) -> tuple[str, dict[str, str]]:
    """The backend of the first op of a call, and why not each other."""
    on = place.device or torch.device(place.kind)
    taken, reasons = "", dict[str, str]()
    asked = "auto" if place.device is None else backends.requested("auto", "explain")
    for backend in backends.BACKENDS:
        if asked not in ("auto", backend):
            reasons[backend] = f"{asked} is asked for"
            continue
        if place.device is not None:
            ask = backends.automatic if asked == "auto" else backends.availability
            ok, reason = ask(op, backend, on, dtype)
        else:
            ok, reason = _able_there(op, backend, on, dtype)
        if op == "contrastive" and backend == "cuda" and not ok:
            reason = "it takes problems of multi_positive_contrastive alone, see docs/contrastive.md"
        if taken:
            reasons[backend] = f"{taken} comes first" if ok else reason
        elif ok:
            taken = backend
        else:
            reasons[backend] = reason
    if not taken:
        raise ValueError(f"explain: backend '{asked}' is not available: {reasons[asked]}")
    return taken, reasons


def _able_there(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> _native.Availability:
    """Whether a backend would run on a device that is not at hand, with a library that is compiled for it."""
    if not backends.is_registered(op, backend):
        return backends.availability(op, backend)
    if backend == "cpu" and device.type != "cpu":
        return _native.supports_cpu(device, dtype)
    if backend in ("cuda", "triton") and device.type == "cpu":
        return _native.Availability(False, "its kernels take tensors on a GPU")
    if backend in ("cuda", "triton") and dtype not in _cuda.DTYPES:
        return _native.Availability(False, f"its kernels take float16, bfloat16 and float32, not {dtype}")
    return _native.Availability(True, "if it passes its self-check there")


def _steps(
    op: str, backend: str, place: _Place, dtype: torch.dtype, given: dict[str, Any]
) -> tuple[tuple[Step, ...], dict[str, str]]:
    """The steps of an op, and why not the other engines and routes."""
    refused: dict[tuple[str, str], list[str]] = {}  # the steps by what is not taken there and why

    def engine(step: str, row: int) -> str:
        """The engine of products of rows of `row` elements."""
        if backend == "reference":
            return "PyTorch"
        if backend == "cpu":
            return f"{torch.backends.cpu.get_cpu_capability()} kernels" if place.device else "CPU kernels"
        if backend == "triton":
            return f"tiles of {'gfx942' if place.capability is None else _triton.architecture_of(place.capability)}"
        reason = _cuda.without_wgmma(place.capability or (0, 0), dtype, row)
        if not reason and place.device is not None and "without wgmma" in _native.LIBRARIES["_C_cuda"].reason:
            reason = "the library is built without it"
        other = ("TMA and wgmma", reason) if reason else ("mma.sync", "TMA and wgmma come first")
        refused.setdefault(other, []).append(step)
        return "mma.sync" if reason else "TMA and wgmma"

    def topk(step: str, row: int, k: int) -> Step:
        if k > MOST_KEPT and backend in ("cuda", "triton"):
            refused[f"{backend} kernels", f"they keep {MOST_KEPT} values of a row, got k = {k}"] = [step]
            return Step(step, "PyTorch", "product")
        return Step(step, engine(step, row), "product")

    def discovery(step: str, row: int) -> Step:
        return Step(step, engine(step, row), "symmetric")

    def loss(step: str) -> Step:
        route, others = _route(backend, given)
        refused.update({other: [] for other in others.items()})
        return Step(step, engine(step, given["D"]), route)

    if op == "contrastive":
        steps = [_against_keys(backend, engine, given, refused)]
    elif op == "local_propagation":
        steps = [Step(op, engine(op, given["heads_dim"]), "weights and stencil")]
    elif op == "masked_topk":
        steps = [topk(op, given["features_dim"], given["k"])]
    elif op == "hidden_positives":
        steps = [discovery(op, given["features_dim"])]
    elif op == "multi_positive_contrastive":
        steps = [loss(op)]
    else:
        sources = {"features": given["features_dim"]} | ({"specific": given["D"]} if given["specific"] else {})
        steps = [topk(f"masked_topk of {source}", row, 1) for source, row in sources.items()]
        steps += [discovery(f"hidden_positives of {source}", row) for source, row in sources.items()]
        steps += [loss("multi_positive_contrastive")]
    reasons: dict[str, str] = {}
    for (other, reason), names in refused.items():
        everywhere = len(names) in (0, len(steps))
        reasons[other if everywhere else f"{other} for {', '.join(names)}"] = reason
    return tuple(steps), reasons


def _against_keys(
    backend: str, engine: Callable[[str, int], str], given: dict[str, Any], refused: dict[tuple[str, str], list[str]]
) -> Step:
    """The step of `contrastive`."""
    epilogue = {"cpu": "C++ epilogue", "triton": "Triton epilogue"}.get(backend, "PyTorch")
    if backend in ("cuda", "triton"):
        if _takes_fused(given):
            refused["route chunked", "rows are short enough for fused kernels (a prediction)"] = []
            return Step("multi_positive_contrastive", engine("multi_positive_contrastive", given["D"]), "fused")
        reason = (
            f"D = {given['D']} or N = {given['N']} is too large for it (a prediction)"
            if _is_square(given)
            else "it takes anchors that are their own keys, with symmetric positives, in one direction"
        )
        refused["route fused", reason] = []
    return Step("contrastive", f"matrix products of PyTorch, {epilogue}", "chunked")


def _takes_fused(given: dict[str, Any]) -> bool:
    """Whether `contrastive` goes to the kernels of `multi_positive_contrastive` on a GPU."""
    return _is_square(given) and cost.fused_is_faster(given["N"], given["D"])


def _is_square(given: dict[str, Any]) -> bool:
    symmetric: bool = given["keys"] is None and given["symmetric"] and not given["both_directions"]
    return symmetric


def _route(backend: str, given: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """The route of the loss, and why not each other."""
    anchors, group, rate = given["N"], given["anchors_per_image"], given["negative_rate"]
    if backend == "reference":
        return "blocks", {}
    if backend == "cpu":
        settings = rate, given["density"], given["within_image_share"]
        counts = cost.expected_pairs(anchors, group, *settings)
        route = cost.contrastive_route(anchors, group, *counts)
        work = {
            name: cost.route_work(*logits) for name, logits in cost.contrastive_logits(anchors, group, *counts).items()
        }
        return route, {
            f"route {name}": f"{_number(amount / work[route])} times the work, by the density given; a call counts its"
            " pairs"
            for name, amount in work.items()
            if name != route
        }
    across = given["density"] * (1 - given["within_image_share"]) * anchors**2
    if not given["symmetric"]:
        return _BLOCKS, {_LISTS: "they are of positives that are known to be symmetric"}
    if not cost.lists_may_be_faster(anchors, group, rate):
        reason = "there is one image" if anchors == group else f"with a rate of {rate:g} nothing is saved by them"
        return _BLOCKS, {_LISTS: reason}
    capacity = routes.capacity(anchors)
    if across > capacity:
        return _BLOCKS, {
            _LISTS: f"{across:,.0f} positives across images, by the density given, are more than the {capacity:,} that"
            " are listed; the device decides by counting"
        }
    return _LISTS, {
        _BLOCKS: f"{across:,.0f} positives across images, by the density given, are no more than the {capacity:,} that"
        " are listed; the device decides by counting"
    }
