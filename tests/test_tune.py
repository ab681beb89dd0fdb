from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

from hpkernels import tune
from hpkernels.launches import Launch, Sizes
from hpkernels.ops import _triton
from hpkernels.tune import Entry

START = {"BLOCK_N": 32, "BLOCK_D": 16, "num_warps": 4, "num_stages": 2}
ENTRY = Entry("an_op", "a_kernel", "interpreter", "any")
VALUES = torch.tensor([1.0, 2.0])


class Kernel:
    """Does nothing."""

    __name__ = "a_kernel"

    def __getitem__(self, grid):
        return lambda *arguments, **constants: None


KERNEL = Kernel()


@pytest.fixture
def launched(monkeypatch) -> None:
    """A table with one kernel."""
    table = {"a_kernel": {"interpreter": {"any": START}}}
    monkeypatch.setattr(_triton, "table", lambda: table)
    _triton._lookup.cache_clear()
    yield
    _triton._lookup.cache_clear()


def call():
    _triton.launch(KERNEL, (1,), VALUES, **_triton.configuration(KERNEL, VALUES))
    return VALUES


def cost(launch: Launch) -> float:
    """Least for tiles of 128, 8 warps and 3 stages."""
    c = launch.constants
    return 1 + abs(c["BLOCK_N"] - 128) / 128 + abs(c["num_warps"] - 8) / 8 + abs(c["num_stages"] - 3)


def test_the_fastest_configuration_is_found(launched, capsys):
    assert tune.tune(ENTRY, {"call": call}, cost) == {**START, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3}
    assert START == {"BLOCK_N": 32, "BLOCK_D": 16, "num_warps": 4, "num_stages": 2}
    assert _triton.configuration(KERNEL, VALUES) == START
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"a_kernel, element size any: 3.25 ms with {START}"
    assert lines[-1].startswith("a_kernel, element size any: 3.25 ms -> 1 ms with")


def test_every_launch_counts_once(launched):
    seen = []

    def twice():
        call()
        return call()

    tune.tune(ENTRY, {"once": call, "twice": twice}, lambda launch: seen.append(launch) or 1.0)
    assert sum(launch.constants == START for launch in seen) == 2


@pytest.mark.parametrize("gain, found", [(0.01, False), (0.1, True)])
def test_small_gains_are_noise(launched, gain, found):
    best = START | {"num_warps": 8}
    time = lambda launch: 1 - gain * (launch.constants == best)  # noqa: E731
    assert tune.tune(ENTRY, {"call": call}, time) == (best if found else None)


def test_a_gain_that_does_not_come_again_is_none(launched):
    seen = []

    def time(launch):
        seen.append(launch.constants)
        return 1 - 0.5 * (seen.count(launch.constants) == 1 and launch.constants["num_warps"] == 8)

    assert tune.tune(ENTRY, {"call": call}, time) is None


@pytest.mark.parametrize("failure", ["raises", "wrong", "does not compile"])
def test_configurations_that_do_not_work_are_left_out(launched, failure, capsys):
    from triton.runtime.errors import OutOfResources

    def breaks():
        if _triton.configuration(KERNEL, VALUES)["num_warps"] < 8:
            return call()
        print("what the assembler refuses")
        if failure == "wrong":
            return call() + 0.1
        raise OutOfResources(2, 1, "shared memory") if failure == "does not compile" else RuntimeError("no\nmore")

    assert tune.tune(ENTRY, {"call": breaks}, cost) == {**START, "BLOCK_N": 128, "num_stages": 3}
    reason = {"raises": "RuntimeError: no", "wrong": "WrongResultError: call gives other results"}
    assert _triton.configuration(KERNEL, VALUES) == START
    said = capsys.readouterr().out
    assert f"num_warps=8: left out, {reason.get(failure, 'OutOfResources: out of resource')}" in said
    assert "what the assembler refuses" not in said


def test_a_kernel_that_is_not_launched(launched, capsys):
    assert tune.tune(ENTRY, {"call": lambda: VALUES}, cost) is None
    assert "no call launches it" in capsys.readouterr().out


def test_neighbours():
    changes = [
        {name: value for name, value in neighbour.items() if value != START[name]}
        for neighbour in tune.neighbours(START, {"BLOCK_D"})
    ]
    assert changes == [
        {"BLOCK_N": 16},
        {"BLOCK_N": 64},
        {"num_warps": 2},
        {"num_warps": 8},
        {"num_stages": 1},
        {"num_stages": 3},
    ]
    limits = {"BLOCK_N": tune.LARGEST_TILE, "num_warps": 1, "num_stages": 1}
    changed = ({"BLOCK_N": 512}, {"num_warps": 2}, {"num_stages": 2})
    assert [*tune.neighbours(limits)] == [limits | change for change in changed]


@pytest.mark.parametrize(
    "actual, same",
    [
        (torch.tensor([[1e-9, 1.0], [torch.inf, torch.nan]]), True),
        (torch.tensor([[0.0, 1.0], [torch.inf, 0.0]]), False),
        (torch.tensor([[0.0, 1.0], [-torch.inf, torch.nan]]), False),
        (torch.tensor([[0.0, 1.01], [torch.inf, torch.nan]]), False),
    ],
)
def test_results_are_compared(actual, same):
    assert tune._same(actual, torch.tensor([[0.0, 1.0], [torch.inf, torch.nan]])) is same


def test_whole_numbers_are_compared_exactly():
    assert tune._same(torch.tensor([2**30 + 1]), torch.tensor([2**30 + 1]))
    assert not tune._same(torch.tensor([2**30 + 1]), torch.tensor([2**30]))


def test_ranking_and_discovery_keep_their_order_of_sums():
    for entry in tune.entries("sm_90"):
        if entry.op == "hidden_positives" or entry.kernel in ("masked_topk_top1_fwd_kernel", "masked_topk_fwd_kernel"):
            assert "BLOCK_D" in tune.FIXED[entry.kernel]
    known = _triton.table()
    assert all(set(fixed) <= known[kernel]["sm_90"]["2"].keys() for kernel, fixed in tune.FIXED.items())


SMALL = Sizes(images=1, grid=(4, 5), dim=16, feature_dim=16, pool_size=40, heads=1, head_dim=16, large_grid=(5, 5))
interpreted = pytest.mark.skipif(not _triton.INTERPRETED, reason="Triton is not interpreted")


@interpreted
def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch):
    chosen = [entry for entry in tune.entries("interpreter") if entry.op in ("hidden_positives", "masked_topk")][:2]
    first, second = (entry.kernel for entry in chosen)

    def time(launch):
        if launch.name == second:
            raise KeyboardInterrupt
        return 1.0 if launch.constants["num_warps"] == 8 else 2.0

    file = tmp_path / "table.json"
    with pytest.raises(KeyboardInterrupt):
        tune.write_table(file, chosen, torch.device("cpu"), SMALL, time)
    faster = chosen[0].configuration | {"num_warps": 8}
    assert json.loads(file.read_text()) == {first: {"interpreter": {chosen[0].size: faster}}}
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]

    monkeypatch.setenv(_triton.TABLE_VARIABLE, str(file))
    table = _triton.table.__wrapped__()
    assert table[first]["interpreter"][chosen[0].size] == faster
    assert table[second] == _triton.table()[second]


def test_a_table_is_added_to(tmp_path):
    file = tmp_path / "table.json"
    tune.add(file, {})
    assert json.loads(file.read_text()) == {}
    tune.add(file, {ENTRY: START})
    tune.add(file, {Entry("an_op", "a_kernel", "sm_90", "2"): START})
    assert json.loads(file.read_text()) == {"a_kernel": {"interpreter": {"any": START}, "sm_90": {"2": START}}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path, capsys):
    assert tune.main(["--output", str(tmp_path / "table.json")]) == 1
    message = "hpkernels.tune measures on a GPU that Triton can use: PyTorch sees none on this machine\n"
    assert capsys.readouterr().err == message
    assert not any(tmp_path.iterdir())
