"""Peers, sweeps and the whole training step of the benchmarks. GPU libraries have stand-ins with their signatures."""

from __future__ import annotations

import ast
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

import hpkernels
from benchmarks import __main__ as command
from benchmarks import registry, sweeps
from benchmarks import results as records
from benchmarks import run as runner
from benchmarks.accuracy.verify import WrongResultError, verify
from benchmarks.cases import END_TO_END, OPS, Case, cases
from benchmarks.end_to_end import seconds_of_parts
from benchmarks.pages import catalogue
from benchmarks.peers import chunked, search
from benchmarks.providers import known_names, limits, provider, providers
from benchmarks.registry import Provider
from benchmarks.results import Row
from benchmarks.timing import measure
from benchmarks.timing.timers import Times

CHUNKED = {
    "masked_topk": ("k=8",),
    "hidden_positives": ("forward",),
    "multi_positive_contrastive": ("labels", "sampled", "rate=0.2", "density=0.1"),
    "contrastive": ("keys", "own", "both", "clip"),
    "ghp_contrastive": ("forward+backward", "density=0.1"),
}


def small(op: str, call: str, **values) -> Case:
    return replace(Case(op, call, images=2, grid=(5, 6)), **values)


def test_peers_do_not_import_the_list_of_providers(repository):
    files = [repository / "benchmarks" / "registry.py", *(repository / "benchmarks" / "peers").glob("*.py")]
    for file in files:
        imported = {node.module for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)}
        assert "benchmarks.providers" not in imported, file


def test_docs_have_the_table_of_providers(repository):
    assert catalogue.table() in (repository / "docs" / "benchmarks.md").read_text(), "python -m benchmarks tables"
    assert set(known_names()) - {"cuda", "triton"} == set(catalogue.PROVIDERS)


def test_the_run_says_what_a_provider_cannot_express():
    case = small("masked_topk", "k=1")
    assert limits([case], ["torch-topk", "cpu"]) == ["masked_topk: torch-topk cannot express masks, groups"]
    several = [case, small("ghp_contrastive", "rate=1"), small("multi_positive_contrastive", "rate=1")]
    losses, ranking = limits(several, ["torch-chunked"])
    assert ranking == "masked_topk: torch-chunked cannot express masks, groups"
    assert losses.startswith("ghp_contrastive, multi_positive_contrastive: torch-chunked cannot express anchors of no")
    for line in limits([case for op in OPS for case in cases(op)], None):
        assert "what these" not in line and "what that" not in line, "a line stands alone"
    assert not any(line.startswith("cuvs") for line in limits([case], None)), "it does not run here"


def test_limits_are_printed_when_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(command, "run", lambda *_: pytest.fail("measured"))
    assert command.main(["run", "--limits", "--op", "masked_topk", "--provider", "torch-topk"]) == 0
    assert capsys.readouterr().out == "masked_topk: torch-topk cannot express masks, groups\n"


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op, call", [(op, call) for op, calls in CHUNKED.items() for call in calls])
def test_blocks_give_the_whole(op, call, dtype, compiles, monkeypatch):
    """With many blocks; compiling, which takes long, is left out of what is compiled."""
    monkeypatch.setattr(chunked, "CHUNK_BYTES_ON_CPU", 4 * 60 * 7)
    monkeypatch.setattr(chunked, "compiled", lambda function: function)
    assert len(list(chunked._blocks(torch.empty(60, 1), 60))) == 10
    case = small(op, call, dtype=dtype)
    assert verify(case, provider(case, "compiled-chunked" if compiles else "torch-chunked")) == 60


@pytest.mark.parametrize(
    "package, op, call, name",
    [
        ("open_clip", "contrastive", "clip", "open_clip"),
        ("pytorch_metric_learning", "contrastive", "keys", "pytorch-metric-learning"),
        ("pytorch_metric_learning", "multi_positive_contrastive", "labels", "pytorch-metric-learning"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_losses_of_libraries(package, op, call, name, dtype):
    pytest.importorskip(package)
    case = small(op, call, dtype=dtype)
    assert verify(case, provider(case, name)) == 60


def exact_search(query, pool, k):
    return (query.float() @ pool.float().T).topk(k, dim=1)


class StandardGpuResources:
    pass


def knn_gpu(res, xq, xb, k, D=None, I=None, metric=1, device=-1, use_cuvs=False):  # noqa: E741, as in faiss
    assert isinstance(res, StandardGpuResources) and metric == 0
    return exact_search(xq, xb, k)


class Resources:
    def __init__(self, stream=None):
        assert stream == 7


def build(dataset, metric="sqeuclidean", metric_arg=2.0, resources=None):
    assert metric == "inner_product" and isinstance(resources, Resources)
    return dataset


def search_index(index, queries, k, neighbors=None, distances=None, resources=None, prefilter=None):
    assert isinstance(resources, Resources)
    values, indices = exact_search(queries, index, k)
    distances.copy_(values)
    neighbors.copy_(indices)
    return distances, neighbors


def flash_knn(x, c, k, *, tol=None, backend=None, return_distances=True):
    assert x.dtype == c.dtype and x.shape[1] % 16 == 0
    squares = torch.cdist(x.double(), c.double()).square()
    distances, indices = squares.topk(k, dim=1, largest=False)
    return distances.float(), indices.int()


class MemoryEfficientCLIPLoss(torch.nn.Module):
    def __init__(self, temperature=0.07, normalized_inputs=False, stable=True, tau_plus=0.0, label_smoothing=0.0):
        super().__init__()
        assert normalized_inputs and not stable
        self.temperature = temperature

    def forward(self, image_features, text_features, tau_plus=None):
        logits = image_features.float() @ text_features.float().T / self.temperature
        own = torch.arange(len(logits))
        return sum(torch.nn.functional.cross_entropy(rows, own) for rows in (logits, logits.T)) / 2


def module(name: str, **contents) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(contents)
    return made


@pytest.fixture
def stand_ins(monkeypatch):
    """Modules in the place of libraries that need a GPU."""
    modules = [
        module("faiss", knn_gpu=knn_gpu, METRIC_INNER_PRODUCT=0, StandardGpuResources=StandardGpuResources),
        module("faiss.contrib"),
        module("faiss.contrib.torch_utils"),
        module("cuvs"),
        module("cuvs.common", Resources=Resources),
        module("cuvs.neighbors"),
        module("cuvs.neighbors.brute_force", build=build, search=search_index),
        module("flashlib", flash_knn=flash_knn),
        module("memeff", MemoryEfficientCLIPLoss=MemoryEfficientCLIPLoss),
    ]
    for made in modules:
        monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    for cached in (search._faiss_resources, search._cuvs_resources):
        cached.cache_clear()
    yield {made.__name__: made for made in modules}
    for cached in (search._faiss_resources, search._cuvs_resources):
        cached.cache_clear()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "name, op, call",
    [
        ("faiss-gpu", "masked_topk", "k=8"),
        ("cuvs", "masked_topk", "k=8"),
        ("flashlib", "masked_topk", "k=1"),
        ("memeff", "contrastive", "clip"),
    ],
)
def test_calls_of_gpu_libraries(name, op, call, dtype, stand_ins):
    case = small(op, call, dtype=dtype)
    tried = provider(case, name)
    assert tried.reason_missing(case), "it takes tensors on a GPU"
    if dtype in tried.only:
        assert verify(case, tried) == 60


def test_squared_distances_alone_are_refused(stand_ins, monkeypatch):
    monkeypatch.setattr(search, "_widened", lambda rows, column: torch.nn.functional.pad(rows, (0, 16)))
    case = small("masked_topk", "k=1", dtype="float16")
    with pytest.raises(WrongResultError, match="flashlib"):
        verify(case, provider(case, "flashlib"))


def test_a_faiss_without_gpus_says_so(stand_ins):
    del stand_ins["faiss"].StandardGpuResources
    case = small("masked_topk", "k=1")
    with pytest.raises(RuntimeError, match="built for CPUs"):
        provider(case, "faiss-gpu").run(case.inputs())


def test_a_whole_step_needs_the_packages_of_training(monkeypatch):
    case = next(case for case in cases("training_step", quick=True) if case.call == "end-to-end")
    assert provider(case, "reference").reason_missing(case) == ""
    monkeypatch.setitem(sys.modules, "training.train", None)  # as if a package that it imports were not there
    registry._lacks_for_training.cache_clear()
    assert "needs the extra training: training.train is not" in provider(case, "reference").reason_missing(case)
    registry._lacks_for_training.cache_clear()


def test_sizes_that_are_compiled():
    """More than the default limit of PyTorch, beyond which it would run eager code without a word."""
    with torch._dynamo.config.patch(recompile_limit=8):
        registry.compiled.__wrapped__(len)
        assert torch._dynamo.config.recompile_limit == 64


def test_density_cases():
    swept = sweeps.sweep_cases("density")
    assert {case.op for case in swept} == {"multi_positive_contrastive", "ghp_contrastive"}
    assert [case.call for case in swept[:7]][::6] == ["density=0.0005", "density=0.05"]
    assert {case.anchors for case in swept} == {3136}
    assert {case.anchors for case in sweeps.sweep_cases("density", device="cuda", dtype="float16")} == {50176}
    with pytest.raises(ValueError, match="--sweep density must have an op of .*, got masked_topk"):
        sweeps.sweep_cases("density", ["masked_topk"])


def test_memory_cases():
    """N doubles from one image to 512."""
    swept = sweeps.sweep_cases("memory", memory_limit=2.0)
    calls = {
        ("hidden_positives", "forward"),
        ("multi_positive_contrastive", "sampled"),
        ("contrastive", "own"),
        ("ghp_contrastive", "forward+backward"),
    }
    assert {(case.op, case.call) for case in swept} == calls
    for op, call in calls:
        assert [case.images for case in swept if (case.op, case.call) == (op, call)] == [2**i for i in range(10)]
    assert max(case.anchors for case in swept if case.op == "ghp_contrastive") == 401408
    assert {case.memory_limit for case in swept} == {2.0}


@pytest.mark.parametrize("density", [0.002, 0.05])
def test_density_of_the_whole_loss(density):
    """Of both kinds of positives, and every provider finds them."""
    case = small("ghp_contrastive", f"density={density}", grid=(20, 20))
    inputs = case.inputs()
    for rows, pool in (("features", "pool"), ("specific", "specific_pool")):
        threshold = (inputs[rows] @ inputs[pool].T).amax(dim=1)
        case_of_op = inputs | {"features": inputs[rows], "threshold": threshold}
        mask = chunked._discovered(case_of_op)["mask"]
        assert mask.float().mean().item() == pytest.approx(density, rel=0.25)
    for name in ("published", "cpu", "torch-chunked"):
        assert verify(case, provider(case, name)) == 800


def row(provider_name: str, anchors: int, seconds: float | None = None, note: str = "") -> Row:
    made = Row("contrastive", "own", anchors // 1024, 32, 32, anchors, "float32", provider_name, note=note)
    if seconds is not None:
        made.set_times([seconds])
        made.peak_mib = anchors / 1024
    return made


def test_providers_take_part_until_they_do_not_fit(monkeypatch):
    """One ends by memory, one by time, one with the sweep."""
    asked = []

    def measured(some: list[Case], names: set[str]):
        (case,) = some
        asked.append((case.anchors, sorted(names)))
        found = {
            "small": row("small", case.anchors, 0.1),
            "slow": row("slow", case.anchors, 40.0 * case.images),
            "large": row("large", case.anchors, 0.1 if case.images == 1 else None, "does not fit into 1 GiB"),
        }
        yield from (found[name] for name in sorted(names))

    entries = [Provider(name, lambda inputs: inputs) for name in ("small", "slow", "large", "other")]
    entries.append(Provider("missing", lambda inputs: inputs, missing="it is not installed"))
    monkeypatch.setattr(sweeps, "providers", lambda case: entries)
    growing = sweeps.sweep_cases("memory", ["contrastive"], images=[1, 2, 4], memory_limit=1.0)
    assert {case.memory_limit for case in growing} == {1.0}
    rows = list(sweeps.until_it_ends(growing, ["small", "slow", "large", "missing"], measured))
    assert asked == [(1024, ["large", "slow", "small"]), (2048, ["large", "slow", "small"]), (4096, ["small"])]
    assert sweeps.largest(rows)[4:-1] == [
        "| large | 1024 | 1.0 | N = 2048 does not fit into 1 GiB |",
        "| slow | 2048 | 2.0 | a call takes 80 s |",
        "| small | 4096 | 4.0 | no larger N was tried |",
    ]


def test_sweep_of_the_memory(tmp_path, capsys):
    """9 bytes a pair: 784 anchors fit into 16 MiB, 1568 do not, and the machine has no part in that."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the memory of a process is limited on Linux alone")
    arguments = ["--sweep", "memory", "--op", "hidden_positives", "--provider", "torch-matmul"]
    arguments += ["--images", "1", "--images", "2", "--memory-limit", "0.015625", "--output", str(tmp_path)]
    assert command.main(["run", *arguments]) == 0
    assert "| torch-matmul | 784 |" in capsys.readouterr().out
    notes = {found.anchors: found.note for found in records.read_folder(tmp_path)}
    assert notes == {784: "", 1568: "does not fit into 0.015625 GiB"}


def test_limit_of_a_gpu(monkeypatch):
    """A share of all its memory: what is used, and what the call may take."""
    shares = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=8 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    for limit in (None, 2.0, 100.0):
        measure._limit_memory_of_gpu(small("contrastive", "own", device="cuda", memory_limit=limit), used=2**30)
    assert shares == [0.375, 1.0]


@pytest.mark.parametrize(
    "arguments",
    [["--memory-limit", "2"], *(["--sweep", "memory", "--memory-limit", value] for value in ("0", "nan", "inf"))],
)
def test_a_limit_without_its_sweep_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["run", *arguments])
    assert stopped.value.code == 2
    assert "--memory-limit must be more than 0 and finite, with --sweep memory, got" in capsys.readouterr().err


def test_whole_steps_are_of_what_the_loop_computes_in():
    assert [case.grid for case in cases("training_step") if case.call == END_TO_END] == [(14, 14)]
    assert [case.dtype for case in cases("training_step", device="cuda", dtype="float16") if case.call == END_TO_END]
    for device, dtype in (("cpu", "float16"), ("cuda", "float32")):
        assert END_TO_END not in {case.call for case in cases("training_step", device=device, dtype=dtype)}


def test_a_whole_step_by_part(monkeypatch):
    """The parts of each provider's own repetitions, which sum up to the step; every step computes the same."""
    case = small("training_step", END_TO_END)
    monkeypatch.setattr(measure, "peak_memory", lambda *_: measure.Memory())
    rows = list(runner.run([case], ["cpu", "published"], {}, lambda row: None))
    for name in ("cpu", "published"):
        own = {row.call: row for row in rows if row.provider == name}
        whole = own.pop(END_TO_END)
        parts = {f"{END_TO_END} {part}" for part in ("backbone", "head", "discovery", "loss", "backward", "optimizer")}
        assert parts <= set(own)
        backbone = own[f"{END_TO_END} backbone"]
        assert backbone.repetitions == whole.repetitions and backbone.median_ms > 0
        assert sum(row.median_ms for row in own.values()) == pytest.approx(whole.median_ms, rel=0.5)
        assert whole.images_per_second == pytest.approx(2000 / whole.median_ms)


def test_a_step_is_the_same_each_time():
    inputs = small("training_step", END_TO_END).inputs()
    tried = {entry.name: entry for entry in providers(small("training_step", END_TO_END))}
    first, published, again = (tried[name].run(inputs) for name in ("cpu", "published", "cpu"))
    for name, value in first.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)
    assert any(not torch.equal(published[name], value) for name, value in first.items()), "it is the same code"
    assert seconds_of_parts(inputs, "cpu", 2)["head"] == [step["head"] for step in inputs["parts"]["cpu"]]
    assert seconds_of_parts({}, "cpu", 3) == {}
    kept = {"parts": {"cpu": [{"head": float(place)} for place in range(7)]}}  # the first call is the warm-up
    assert seconds_of_parts(kept, "cpu", 6) == {"head": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}
    assert seconds_of_parts(kept, "cpu", 3, calls_of_each=2) == {"head": [1.0, 3.0, 5.0]}


@pytest.mark.parametrize(("timer", "calls_of_each"), [("events", 2), ("wall", 1)])
def test_parts_of_a_step_that_events_time(timer, calls_of_each, monkeypatch):
    """Each repetition has one call more, by the wall clock, whose parts are not taken."""
    case, asked = small("hidden_positives", "forward"), []
    monkeypatch.setattr(measure, "peak_memory", lambda *_: measure.Memory())
    monkeypatch.setattr(measure, "times", lambda *_: {"cpu": Times(timer, [0.001, 0.002, 0.003])})
    monkeypatch.setattr(runner.rates, "fill", lambda *_: None)
    monkeypatch.setattr(runner, "seconds_of_parts", lambda inputs, *of: asked.append(of) or {})
    list(runner.run([case], ["cpu"], {}, lambda row: None))
    assert asked == [("cpu", 3, calls_of_each)]


def test_the_published_step_has_nothing_of_ours_but_the_loop(monkeypatch):
    case = small("training_step", END_TO_END)
    inputs, published = case.inputs(), provider(case, "published")

    def fail(*_, **__):
        raise AssertionError("ours")

    for module, name in (
        (hpkernels, "local_propagation_weights"),
        (hpkernels, "apply_local_propagation"),
        (hpkernels.distributed, "ghp_contrastive"),
    ):
        monkeypatch.setattr(module, name, fail)
    assert published.run(inputs)["loss"] > 0
    with pytest.raises(AssertionError, match="ours"):
        provider(case, "cpu").run(inputs)
