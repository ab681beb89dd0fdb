"""The clock budget of the Hopper kernels: what a tile takes of each part of a multiprocessor, and what binds it.

A prediction on paper: nothing here was timed. Instructions are counted in the compiled library, the rest follows from
the shape of the tile.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.compiled import cuda_resources, sass
from benchmarks.compiled.sass_loops import Step, step
from benchmarks.pages.tables import replace_between
from hpkernels import _native
from hpkernels.cost import DEVICES

_PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"

# An H100 SXM. Its published 989 TFLOP/s are 4096 a clock of 132 multiprocessors at 1.83 GHz; under load they have less.
_PROCESSORS, _CLOCK, _PUBLISHED_CLOCK = 132, 1.7e9, 1.83e9
# Of a multiprocessor, a clock. Instructions are of a warp; their rates are those of NVIDIA's CUDA C++ Programming Guide
# for compute capability 9.0. 5.5 TB/s of the second-level cache is an assumption (docs/kernels.md has what is known).
_RATES = {
    "products": 4096,
    "shared memory": 128,
    "second-level cache": 5.5e12 / _PROCESSORS / _CLOCK,
    "memory": DEVICES["H100"].bandwidth / _PROCESSORS / _CLOCK,
    "instructions": 4,
    "comparisons, logic, integers": 2,
    "exponentials": 0.5,
}
_HALF_RATE = {
    "FMNMX", "FSEL", "FSET", "FSETP", "IADD3", "ISETP", "LEA", "LOP3", "PLOP3", "PRMT", "R2P", "SEL", "SHF", "VIADD",
    "VIMNMX",
}  # fmt: skip

_ANCHORS, _GROUP, _DIM, _ATTENTION, _POOL, _RATE = 50176, 784, 512, 384, 2048, 0.02
_IMAGES = _ANCHORS // _GROUP
_STRIPS = _ANCHORS // 128
_BOX = 64  # elements of a row that come by one copy
_STEP = 16  # elements that one wgmma multiplies


@dataclass(frozen=True)
class Kernel:
    """A kernel and what one of its tiles takes.

    Attributes:
        key: of its table on the page.
        name: of the kernel; `variant`: what its template arguments contain.
        flops: of the products of a tile.
        shared, cache, memory: bytes of a tile, read and written.
        warps: that take a step of the loop for each tile.
        trips: of the loop nest, see `sass_loops.step`.
        gathered: how often the loop that gathers goes round in a tile, if warps of their own gather.
        usual: whether a usual tile takes the "fewest" instructions of the loop, or the "most".
        tiles: of the paper's size.
        blocks: of threads that share these evenly; None: not evenly, or so many that it makes no difference.
        within: tiles and blocks where only the pairs within images are computed.
    """

    key: str
    name: str
    variant: tuple[str, ...]
    shape: str
    flops: float
    shared: float
    cache: float
    memory: float
    warps: int
    trips: tuple[int, ...]
    usual: str
    tiles: int
    blocks: int | None = None
    within: tuple[int, int] | None = None
    gathered: int | None = None


def _wgmma_bytes(columns: int, depth: int) -> int:
    """What one group of warps reads of shared memory for 64 rows, so many columns and elements."""
    return (64 + columns) * 2 * depth


def _triangle(rows: int, columns: int) -> int:
    """Tiles of the anchors' square on and right of the diagonal."""
    across = math.ceil(_ANCHORS / columns)
    return sum(across - strip * rows // columns for strip in range(math.ceil(_ANCHORS / rows)))


def _strip(columns: int, dim: int) -> dict[str, float]:
    """Tiles of 128 rows, which stay in shared memory, against columns that stream."""
    streamed = columns * dim * 2
    reads = 2 * _wgmma_bytes(columns, dim)  # 64 rows each
    return {"flops": 2 * 128 * columns * dim, "shared": reads + streamed, "cache": streamed}


def _kernels() -> list[Kernel]:
    row = 2 * _DIM
    boxes, boxes_of_attention = _DIM // _BOX, _ATTENTION // _BOX
    wide, square, logits = _strip(256, _DIM), _strip(128, _DIM), _strip(128, _ATTENTION)
    listed = math.ceil(_RATE * _ANCHORS / 128)
    own_strip = 128 * row
    products, sums = _wgmma_bytes(64, _DIM), 2 * _wgmma_bytes(_DIM // 2, 64)
    gathered = {"flops": 2 * 64 * 128 * _DIM, "cache": 128 * row + 64 * row / listed}
    of_lists = {"tiles": _GROUP * listed, "blocks": _GROUP, "warps": 8, "gathered": 16}
    return [
        Kernel("discovery", "hidden_positives_fwd_kernel", ("WideGeometry90", "true"), "128 x 256", **wide,
               memory=2 * 128 * 256 / 8, warps=8, trips=(1, boxes), usual="most", tiles=_triangle(128, 256)),
        Kernel("top1", "masked_topk_top1_fwd_kernel", ("WideGeometry90",), "128 x 256", flops=wide["flops"],
               shared=wide["shared"], cache=wide["cache"] + own_strip / 8, memory=own_strip / 8, warps=8,
               trips=(1, boxes), usual="fewest", tiles=_STRIPS * _POOL // 256, blocks=_STRIPS),
        Kernel("topk", "masked_topk_fwd_kernel", ("Geometry90",), "128 x 128", flops=square["flops"],
               shared=square["shared"] + 2 * 128 * 128 * 4, cache=square["cache"] + own_strip / 16,
               memory=own_strip / 16, warps=4, trips=(1, boxes), usual="most", tiles=_STRIPS * _POOL // 128,
               blocks=_STRIPS),
        Kernel("blocks-forward", "contrastive_blocks_fwd_kernel", ("Geometry90", "true"), "128 x 128", **square,
               memory=2 * 128 * 128 / 8, warps=4, trips=(1, boxes), usual="fewest", tiles=_STRIPS**2,
               within=(_IMAGES * 7**2, 2 * 7 * _IMAGES)),
        Kernel("blocks-backward", "contrastive_blocks_bwd_kernel", ("GradientSm90", "512", "true"), "64 x 64",
               flops=2 * 2 * 64 * 64 * _DIM, shared=products + sums + 64 * row + 3 * 64 * 64 * 2, cache=64 * row + 1024,
               memory=2 * 64 * 64 / 8, warps=4, trips=(1,), usual="fewest", tiles=(_ANCHORS // 64) ** 2,
               within=(_IMAGES * 13**2, 13 * _IMAGES)),
        Kernel("sampled-forward", "sampled_fwd_kernel", ("GatheredSm90", "512"), "64 x 128", **gathered,
               shared=2 * products + 128 * row, memory=0, trips=(1,), usual="most", **of_lists),
        Kernel("sampled-backward", "sampled_bwd_kernel", ("GatheredSm90", "512"), "64 x 128",
               flops=3 * gathered["flops"], cache=gathered["cache"],
               shared=2 * products + 2 * sums + 4 * boxes * _wgmma_bytes(64, 64) // 2 + 128 * row + 128 * 128,
               memory=128 * row, trips=(1, 2, boxes // 2), usual="most", **of_lists),
        Kernel("logits", "local_propagation_logits_fwd_kernel", ("Geometry90",), "128 x 128", flops=logits["flops"],
               shared=logits["shared"], cache=logits["cache"] * (1 + 2 / 7) + 128 * 128 * 4, memory=0, warps=4,
               trips=(1, boxes_of_attention), usual="most", tiles=_IMAGES * math.ceil(_GROUP / 128) ** 2),
    ]  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """A kernel's budget: clocks of a tile by part of the multiprocessor, and the instructions of a thread."""

    kernel: Kernel
    clocks: dict[str, float]
    most: int
    fewest: int

    @property
    def bound(self) -> str:
        """What takes the longest."""
        return max(self.clocks, key=lambda part: self.clocks[part])

    @property
    def milliseconds(self) -> float:
        """Of all tiles."""
        return self.milliseconds_of(self.kernel.tiles, self.kernel.blocks)

    def milliseconds_of(self, tiles: int, blocks: int | None) -> float:
        """Of some tiles, in whole rounds of thread blocks where these share them evenly."""
        processors = _PROCESSORS if blocks is None else blocks / math.ceil(blocks / _PROCESSORS)
        return 1e3 * tiles * self.clocks[self.bound] / processors / _CLOCK

    @property
    def floor(self) -> float:
        """Milliseconds of the products at the published rate."""
        return 1e3 * self.kernel.tiles * self.kernel.flops / DEVICES["H100"].matrix["float16"]


def budgets(library: Path) -> list[Budget]:
    """Those of all kernels, for the library as it is built."""
    functions = _functions(library)
    return [_budget(kernel, *_steps(kernel, functions)) for kernel in _kernels()]


def _functions(library: Path) -> dict[str, str]:
    """The SASS of the kernels for Hopper, by their readable names."""
    listed = sass.dump(library, "-arch", "sm_90a", "--dump-resource-usage")
    mangled = re.findall(r"^ Function (\S+):$", listed, flags=re.MULTILINE)
    names = dict(zip(mangled, cuda_resources._readable("\n".join(mangled)).splitlines(), strict=True))
    wanted = [name for name, readable in names.items() if any(_is_of(kernel, readable) for kernel in _kernels())]
    text = sass.dump(library, "-arch", "sm_90a", "-sass", "-fun", ",".join(wanted))
    parts = re.split(r"^\s*Function : (\S+)$", text, flags=re.MULTILINE)[1:]
    return {names[name]: part for name, part in zip(parts[::2], parts[1::2], strict=True)}


def _is_of(kernel: Kernel, name: str) -> bool:
    words = (kernel.name, *kernel.variant, "__half")
    return all(re.search(rf"\b{word}\b", name) for word in words)


def _steps(kernel: Kernel, functions: dict[str, str]) -> tuple[Step, Step | None]:
    found = [text for name, text in functions.items() if _is_of(kernel, name)]
    if len(found) != 1:
        raise ValueError(f"{kernel.name} must be in the library once with {kernel.variant}, is {len(found)} times")
    gather = None if kernel.gathered is None else step(found[0], "LDGSTS", (1, kernel.gathered))
    return step(found[0], "HGMMA", kernel.trips), gather


def _budget(kernel: Kernel, of_loop: Step, gather: Step | None) -> Budget:
    usual: Counter[str] = getattr(of_loop, kernel.usual)
    more = Counter() if gather is None else gather.most
    at_half_rate = sum(kernel.warps * usual[name] + 4 * more[name] for name in _HALF_RATE)
    work = {
        "products": kernel.flops,
        "shared memory": kernel.shared,
        "second-level cache": kernel.cache,
        "memory": kernel.memory,
        "instructions": kernel.warps * usual.total() + 4 * more.total(),
        "comparisons, logic, integers": at_half_rate,
        "exponentials": kernel.warps * usual["MUFU"],
    }
    clocks = {part: amount / _RATES[part] for part, amount in work.items() if amount}
    return Budget(kernel, clocks, of_loop.most.total(), of_loop.fewest.total())


def table_of(budget: Budget) -> Iterator[str]:
    """Lines of Markdown."""
    kernel = budget.kernel
    yield f"| `{kernel.name}`, a tile of {kernel.shape} | amount | a clock | clocks |"
    yield "|---|---|---|---|"
    for part, clocks in budget.clocks.items():
        bold = "**" if part == budget.bound else ""
        amount, rate = _amounts(part, clocks)
        yield f"| {bold}{part}{bold} | {amount} | {rate} | {bold}{_round(clocks)}{bold} |"
    yield ""
    share = budget.floor * _PUBLISHED_CLOCK / _CLOCK / budget.milliseconds
    within = f" ({budget.milliseconds_of(*kernel.within):.2g} ms within images)" if kernel.within else ""
    yield (
        f"Predicted, not measured: {_spaced(kernel.tiles)} tiles, bound by the {budget.bound}, take"
        f" **{budget.milliseconds:.2g} ms**{within}; tensor cores are busy for {share:.0%} of it. At their published"
        f" rate the products alone take {budget.floor:.2g} ms. The loop has {_spaced(budget.most)} instructions of a"
        f" thread, the shortest way through it {_spaced(budget.fewest)}; the table counts the"
        f" {'first' if kernel.usual == 'most' else 'second'}."
    )


def _amounts(part: str, clocks: float) -> tuple[str, str]:
    rate, amount = _RATES[part], clocks * _RATES[part]
    if part == "products":
        return f"{amount / 1e6:.3g} MFLOP", f"{rate} FLOP"
    if part in ("shared memory", "second-level cache", "memory"):
        return f"{amount / 1024:.3g} KiB", f"{rate:.3g} bytes"
    return f"{_round(amount)} of warps", f"{rate:.3g}"


def _round(value: float) -> str:
    return _spaced(float(f"{value:.3g}"))


def _spaced(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ")


def marks(key: str) -> tuple[str, str]:
    """The comments of a page between which a table stands."""
    return f"<!-- begin budget {key} -->", f"<!-- end budget {key} -->"


def add_clock_budget(commands: Any) -> None:
    """Enter the command `clock-budget` into those of ``python -m benchmarks``."""
    command = commands.add_parser("clock-budget", help="what a tile of the Hopper kernels takes, and what binds it")
    command.add_argument("--write", action="store_true", help="into docs/kernels.md")
    command.set_defaults(command=_clock_budget)


def _clock_budget(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if reason := cuda_resources.reason_to_skip():
        parser.error(reason)
    library = _native._file("_C_cuda")
    if newer := cuda_resources.newer_sources(library):
        parser.error(f"{library.name} is older than {', '.join(newer)}: python setup.py build_ext --inplace")
    try:
        for budget in budgets(library):
            lines = "\n".join(table_of(budget)) + "\n"
            if options.write:
                replace_between(_PAGE, *marks(budget.kernel.key), f"\n{lines}\n")
            else:
                print(lines)
    except ValueError as error:
        parser.error(str(error))
    return 0
