from __future__ import annotations

import csv
import re
import subprocess
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import csv_files, distributed, estimates, published
from benchmarks import results as records
from benchmarks import run as runner
from benchmarks.accuracy import error_tables, errors
from benchmarks.accuracy.verify import WrongResultError, verify
from benchmarks.cases import OPS, Case, cases
from benchmarks.providers import Provider, known_names, provider, providers
from benchmarks.timing import measure
from hpkernels.ops.ghp_contrastive.reference import ghp_contrastive
from hpkernels.ops.local_propagation.reference import apply_forward, weights_forward
from hpkernels.ops.multi_positive_contrastive.reference import contrastive_loss
from hpkernels.testing import random_problem

pytestmark = pytest.mark.usefixtures("without_gpu")
SMALL = Case("hidden_positives", "forward", images=2, grid=(5, 6))
ENVIRONMENT = {"device": "a processor", "threads": 2, "commit": "abc", "date": "2030-01-02T03:04:05+00:00"}


def small(case: Case) -> Case:
    return replace(case, images=2, grid=(5, 6))


def broken(tried: Provider, change) -> Provider:
    return replace(tried, run=lambda inputs: change(tried.run(inputs)))


def published_and_reference(lam: float):
    """Loss and gradients of both branches, the published way and by the reference's formulas with autograd."""
    problem = random_problem(seed=3, images=3, height=4, width=5)
    negatives = torch.rand((20, 60), generator=torch.Generator().manual_seed(1)) < 0.3
    similarities = (problem.features, problem.pool, problem.specific, problem.specific_pool)
    branches = [value.clone().requires_grad_() for value in (problem.z, problem.z_mixed)]
    theirs = published.ghp_contrastive(
        *branches,
        *similarities,
        negatives,
        specific_weight=lam,
        anchors_per_image=20,
        temperature=0.5,
        base_temperature=0.07,
    )
    ours = ghp_contrastive(
        branches, *similarities, lam, negatives, anchors_per_image=20, temperature=0.5, scale=0.5 / 0.07, reweight=True
    )
    return [(loss.detach(), *torch.autograd.grad(loss, branches)) for loss in (theirs, ours)]


@pytest.mark.parametrize("lam", [0.0, 0.7])
def test_published_loss_is_the_reference(lam):
    for theirs, ours in zip(*published_and_reference(lam), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6)


def test_published_loss_leaves_out_anchors_without_positives():
    problem = random_problem(seed=3, images=2, height=4, width=5)
    positives = torch.rand((40, 40), generator=torch.Generator().manual_seed(0)) < 0.2
    positives = (positives | positives.T).fill_diagonal_(False)
    positives[3], positives[:, 3] = False, False
    nothing, negatives = torch.zeros_like(positives), torch.ones(40, 40, dtype=torch.bool)
    denominator = (positives | negatives).fill_diagonal_(False)
    options = {"anchors_per_image": 40, "temperature": 0.5, "reweight": True}
    expected, _ = contrastive_loss(problem.z, positives, nothing, 0.5, negatives, **options)
    z = problem.z
    actual = published.image_loss(z, z, positives.float(), nothing.float(), denominator.float(), 0.5, 0.5)
    torch.testing.assert_close(actual, expected)


def test_published_propagation_is_the_reference():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn((2, 2, 3, 31, 8), generator=generator)
    code = torch.randn((2, 7, 5, 6), generator=generator, requires_grad=True)
    upstream = torch.randn(code.shape, generator=generator)
    mixed = published.propagate(code, published.attention(query, key, (5, 6)))
    expected = apply_forward(code, weights_forward(query, key, 5, 6, 28.0, 0.1, 0.9, 3, 1))
    torch.testing.assert_close(mixed, expected)
    gradients = [torch.autograd.grad(value, code, upstream)[0] for value in (mixed, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("op", OPS)
def test_every_provider_is_right(op, dtype):
    for case in map(small, cases(op, quick=True, dtype=dtype)):
        able = [tried for tried in providers(case) if not tried.reason_to_skip(case) and not tried.compiles]
        assert "reference" in {tried.name for tried in able}
        for tried in able:
            assert verify(case, tried) == 60


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_row_is_refused(op):
    for case in map(small, cases(op, quick=True)):

        def change(outputs):
            name, value = list(outputs.items())[-1]
            value = value.clone()
            # Scaling would leave zeros as they are; of packed bits it is the lowest of one word that changes.
            row = value.view(len(value), -1)[0]
            if value.dtype.is_floating_point:
                row.copy_(row * 1.01 + 1e-3)
            elif name == "indices":
                row.copy_((row + 1) % 2048)
            else:
                row[0] ^= 2
            return outputs | {name: value}

        with pytest.raises(WrongResultError, match=rf"{op} .* of reference: 1 of"):
            verify(case, broken(provider(case, "reference"), change))


def test_missing_and_nan_results_are_refused():
    case = small(Case("ghp_contrastive", "forward+backward", 1))
    reference = provider(case, "reference")
    with pytest.raises(WrongResultError, match="gives .*'loss'.*expected .*'grad_z'"):
        verify(case, broken(reference, lambda outputs: {"loss": outputs["loss"]}))
    with pytest.raises(WrongResultError, match="loss of reference"):
        verify(case, broken(reference, lambda outputs: outputs | {"loss": outputs["loss"] * torch.nan}))


def test_a_wrong_provider_is_not_timed(monkeypatch):
    wrong = broken(provider(SMALL, "reference"), lambda outputs: {"bits": outputs["bits"] ^ 2})
    monkeypatch.setattr(runner, "providers", lambda case: [wrong])
    for name in ("times", "peak_memory"):
        monkeypatch.setattr(measure, name, lambda *_: pytest.fail("measured before it was verified"))
    with pytest.raises(WrongResultError):
        list(runner.run([SMALL], None, ENVIRONMENT, print))


@pytest.mark.parametrize("error", [WrongResultError("1 of 60 rows"), RuntimeError("CUDA error: misaligned\nmore")])
def test_others_are_timed_where_one_is_wrong(error, monkeypatch):
    def fail(inputs):
        raise error

    right = provider(SMALL, "reference")
    monkeypatch.setattr(runner, "providers", lambda case: [replace(right, name="wrong", run=fail), right])
    monkeypatch.setattr(measure, "peak_memory", lambda *_: measure.Memory())
    wrong, timed = runner.run([SMALL], None, ENVIRONMENT, lambda row: None, keep_going=True)
    assert wrong.note == f"not timed: {str(error).splitlines()[0]}" and wrong.median_ms is None
    assert timed.note == "" and timed.median_ms > 0
    with pytest.raises(type(error)):
        list(runner.run([SMALL], None, ENVIRONMENT, lambda row: None))


def test_long_calls_are_timed_once(monkeypatch):
    """In the process that has measured their memory."""
    monkeypatch.setattr(runner, "providers", lambda case: [provider(SMALL, "reference")])
    monkeypatch.setattr(measure, "times", lambda calls, *_: {name: pytest.fail("timed again") for name in calls})
    monkeypatch.setattr(measure, "peak_memory", lambda *_: measure.Memory(2**21, 61.0))
    for name in ("product", "fill"):
        monkeypatch.setattr(runner.rates, name, lambda *_: None)
    (row,) = runner.run([SMALL], None, ENVIRONMENT, lambda row: None)
    assert (row.median_ms, row.repetitions, row.peak_mib) == (61000.0, 1, 2.0)


def test_what_compiles_too_long_is_left_out_from_then_on(monkeypatch):
    clock = iter([0.0, 61.0, 70.0, 70.5])
    monkeypatch.setattr(runner, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    entries = [replace(provider(SMALL, "reference"), name=name, compiles=True) for name in ("slow", "quick")]
    monkeypatch.setattr(runner, "providers", lambda case: entries)
    monkeypatch.setattr(runner, "verify", lambda *_: 60)
    monkeypatch.setattr(measure, "peak_memory", lambda *_: measure.Memory(None, None, "not measured"))
    both = [SMALL, replace(SMALL, images=1)]
    notes = [(row.anchors, row.provider, row.note) for row in runner.run(both[:1], None, {}, lambda row: None)]
    assert notes == [(60, "slow", "not measured"), (60, "quick", "not measured")]
    clock = iter([0.0, 61.0, 70.0, 70.5, 80.0, 80.5])
    *_, slow, quick = runner.run(both, None, {}, lambda row: None)
    assert (slow.note, quick.note) == ("left out: compiling took more than 60 s", "not measured")


@pytest.mark.parametrize("all_sizes", [False, True])
def test_nobody_is_left_out_of_all_sizes(all_sizes, monkeypatch):
    patience = []
    monkeypatch.setattr(runner, "providers", lambda case: [replace(provider(SMALL, "reference"), most_anchors=1)])
    monkeypatch.setattr(measure, "peak_memory", lambda *arguments: patience.append(arguments[-1]) or measure.Memory())
    (row,) = runner.run([SMALL], None, ENVIRONMENT, lambda row: None, all_sizes=all_sizes)
    assert row.note == ("" if all_sizes else "left out above 1 anchors: it computes all pairs")
    assert patience == ([None] if all_sizes else [])


def test_negatives_and_density_vary():
    case = Case("multi_positive_contrastive", "rate=0.2", images=2)
    inputs = small(case).inputs()
    assert inputs["settings"]["negative_rate"] == 0.2
    assert inputs["negatives"].float().mean().item() == pytest.approx(0.2, abs=0.03)
    for density in (0.001, 0.1):
        count = replace(case, call=f"density={density}").inputs()["positives"].count()
        assert count.float().mean().item() / case.anchors == pytest.approx(density, rel=0.2)
    assert small(Case("ghp_contrastive", "rate=1", images=1)).inputs()["settings"]["negative_rate"] == 1


@pytest.mark.parametrize("call", ["rate=0.2", "rate=1", "density=0.1"])
def test_published_contrastive_loss_is_the_reference(call):
    case = small(Case("multi_positive_contrastive", call, images=2))
    assert verify(case, provider(case, "published")) == 60


@pytest.mark.parametrize("call", ["clip", "dim=768"])
def test_contrastive_calls_of_a_gpu(call):
    case = small(Case("contrastive", call, images=1))
    assert case.inputs()["anchors"].shape == case.inputs()["keys"].shape == (60, 768)
    assert verify(case, provider(case, "torch-dense")) == verify(case, provider(case, "cpu")) == 60


def test_contrastive_cases():
    sizes = {}
    for case in cases("contrastive"):
        sizes.setdefault(case.call, []).append(case.anchors)
        assert case.verified().anchors == 1024
    squares = [1024, 4096, 8192]
    assert sizes == {"keys": squares, "own": [*squares, 100352], "queue": [1024], "both": squares, "clip": [1024, 4096]}


def test_contrastive_keys():
    """A queue keeps its keys at every size, which receive no gradient; anchors without keys are their own."""
    found = {case.call: (small(case).inputs(), small(case)) for case in cases("contrastive", quick=True)}
    assert found["own"][0]["keys"] is None
    assert found["queue"][0]["keys"].shape == (65536, 512) and found["keys"][0]["keys"].shape == (60, 512)
    gradients = {call: set(provider(case, "cpu").run(inputs)) - {"loss"} for call, (inputs, case) in found.items()}
    both = {"grad_anchors", "grad_keys"}
    assert gradients == {"keys": both, "both": both, "clip": both, "own": {"grad_anchors"}, "queue": {"grad_anchors"}}


def test_sizes_can_be_chosen():
    assert [case.images for case in cases("hidden_positives", images=(2, 3))] == [2, 3]


def test_cases_of_a_gpu():
    chosen = cases("ghp_contrastive", device="cuda", dtype="float16")
    assert [(case.call, case.anchors) for case in chosen] == [
        (call, anchors) for call in ("forward+backward", "rate=1") for anchors in (12544, 50176)
    ]
    assert str(chosen[0]) == "ghp_contrastive forward+backward N=12544 float16 cuda"
    on_cpu = {entry.name for entry in providers(chosen[0]) if entry.reason_missing(chosen[0])}
    assert "cpu" in on_cpu and "reference" not in on_cpu and "published" not in on_cpu
    assert not provider(chosen[0], "published").reason_to_skip(chosen[1])
    assert "50176" in provider(chosen[0], "published").reason_to_skip(replace(chosen[0], images=128))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["run", "--device", "cuda"])
    assert "PyTorch sees none" in capsys.readouterr().err


def test_large_cases_are_verified_with_fewer_images():
    large = Case("ghp_contrastive", "forward+backward", images=64)
    assert large.anchors == 50176
    assert large.verified().anchors == 1568
    assert Case("ghp_contrastive", "forward+backward", images=1).verified().images == 1


def test_inputs_are_the_same_every_time():
    first, second = SMALL.inputs(), SMALL.inputs()
    assert torch.equal(first["features"], second["features"])
    # Multiples of 2^-8: products are exact, so no pair depends on the order of a sum.
    assert torch.equal(first["features"] * 256, (first["features"] * 256).round())


def test_times_take_turns_and_do_not_count_the_first(monkeypatch):
    monkeypatch.setattr(measure, "ENOUGH", 0.0)
    order = []
    measured = measure.times({name: lambda name=name: order.append(name) for name in "ab"})
    assert order == ["a", "b"] * (1 + measure.REPETITIONS)
    assert {name: len(times.seconds) for name, times in measured.items()} == {"a": 5, "b": 5}


def test_short_calls_are_repeated_until_it_is_enough(monkeypatch):
    assert len(measure.times({"a": lambda: None})["a"].seconds) == measure.MOST_REPETITIONS
    monkeypatch.setattr(measure, "MOST_REPETITIONS", 10**9)
    monkeypatch.setattr(measure, "ENOUGH", 0.01)
    times = measure.times({"a": lambda: None})["a"]
    assert times.spent >= 0.01 > times.spent - times.seconds[-1]


def test_times_stop_at_the_budget(monkeypatch):
    monkeypatch.setattr(measure, "BUDGET", 0.0)
    assert len(measure.times({"a": lambda: None})["a"].seconds) == measure.FEWEST_REPETITIONS


def test_peak_memory_counts_what_the_call_takes():
    case = Case("hidden_positives", "forward", images=2)
    memory = measure.peak_memory(case, "torch-matmul")
    pairs = case.anchors**2
    assert memory.error == "" and memory.seconds > 0
    if memory.peak is not None:  # products and minima in float32, and the mask
        assert 0.9 * 9 * pairs < memory.peak < 1.3 * 9 * pairs + 2**22


def test_peak_memory_says_what_does_not_fit(monkeypatch):
    sent = []

    class Sender:
        send = staticmethod(sent.append)

    monkeypatch.setattr(measure, "_limit_memory", lambda: None)  # it would be that of the process of the tests
    monkeypatch.setattr(measure, "provider", lambda *_: Provider("huge", lambda inputs: torch.empty(2**50)))
    measure._measure(Sender, SMALL, "huge", torch.get_num_threads())
    assert sent == [measure.Memory(error="does not fit into memory")]


def sent_by_process(monkeypatch, case: Case, tried: Provider) -> list[measure.Memory]:
    """What a process that measures memory sends; it is this one, which therefore has no limit."""
    sent = []
    monkeypatch.setattr(measure, "_limit_memory", lambda gib=None: sent.append(f"limit {gib}"))
    monkeypatch.setattr(measure, "provider", lambda *_: tried)
    measure._measure(SimpleNamespace(send=sent.append), case, tried.name, torch.get_num_threads())
    return sent


@pytest.mark.parametrize("compiles", [False, True])
def test_a_call_is_warmed_up_with_a_small_case(compiles, monkeypatch):
    """But compiled code with the case itself, which it must have seen; the limit of a call begins after that."""
    case, seen = replace(SMALL, images=60, memory_limit=2.5), []
    tried = Provider("any", lambda inputs: seen.append(len(inputs["features"])), compiles=compiles)
    *limits, memory = sent_by_process(monkeypatch, case, tried)
    assert seen == [1800 if compiles else 1560, 1800]
    assert limits == ["limit None", "limit 2.5"] and memory.error == "" and memory.seconds > 0


@pytest.mark.parametrize(("peak", "error"), [(2**30, ""), (2**30 + 1, "does not fit into 1 GiB")])
def test_memory_that_was_kept_from_before_counts(peak, error, monkeypatch):
    """The system does not refuse it: the allocator has it already."""
    monkeypatch.setattr(measure, "peak_above", lambda before: peak)
    memory = sent_by_process(monkeypatch, replace(SMALL, memory_limit=1.0), Provider("any", lambda inputs: None))[-1]
    assert (memory.peak, memory.error) == (None if error else peak, error)


def test_errors_of_a_process_that_measures_memory_are_reported():
    memory = measure.peak_memory(replace(SMALL, call="no such call"), "published")
    assert memory == measure.Memory(error="the process ended with exit code 1")


def row(**values) -> records.Row:
    first = {"op": "masked_topk", "call": "k=1", "images": 4, "height": 28, "width": 28, "anchors": 3136}
    return records.Row(**(first | {"dtype": "float32", "provider": "cpu"} | ENVIRONMENT | values))


def test_csv_round_trip(tmp_path):
    measured, skipped = row(), row(provider="reference", note='left out, "too large"')
    measured.set_times([0.001, 0.002, 0.003, 0.004, 0.005])
    measured.peak_mib, measured.verified_anchors = 1.5, 1568
    (path,) = records.write(tmp_path, [measured, skipped])
    assert records.read(path) == [measured, skipped]
    assert (measured.q1_ms, measured.median_ms, measured.q3_ms, measured.repetitions) == (2.0, 3.0, 4.0, 5)


def test_csv_keeps_rows_of_other_runs(tmp_path):
    records.write(tmp_path, [row(), row(provider="faiss")])
    records.write(tmp_path, [row(note="new"), row(op="hidden_positives")])
    assert [(r.op, r.provider, r.note) for r in records.read_folder(tmp_path)] == [
        ("hidden_positives", "cpu", ""),
        ("masked_topk", "cpu", "new"),
        ("masked_topk", "faiss", ""),
    ]


def test_csv_with_other_columns_is_refused(tmp_path):
    (tmp_path / "old.csv").write_text("op,time\nmasked_topk,3\n")
    with pytest.raises(ValueError, match="old.csv lacks columns: call, images, .*provider; is it"):
        records.read_folder(tmp_path)
    records.write(tmp_path, [row()])
    text = (tmp_path / "masked_topk.csv").read_text()
    (tmp_path / "old.csv").write_text(text.replace("median_ms", "time"))
    with pytest.raises(ValueError, match="old.csv has unknown columns: time; is it"):
        records.read_folder(tmp_path)


@pytest.mark.parametrize("kind", [records.Row, errors.ErrorRow, distributed.DistributedRow])
def test_every_file_of_measurements_ends_with_where_they_are_from(kind, tmp_path):
    csv_files.write_rows(tmp_path / "x.csv", kind, [])
    columns = (tmp_path / "x.csv").read_text().strip().split(",")
    own = [field.name for field in fields(records.Environment)]
    assert columns[-len(own) :] == own == list(records.environment())
    assert columns[0] in ("op", "call")


def test_a_commit_with_changes_says_so(tmp_path, monkeypatch):
    """But for those of results and pages, which measuring and writing tables make."""
    monkeypatch.setattr(records, "RESULTS", tmp_path / "benchmarks" / "results")
    files = [tmp_path / name for name in ("benchmarks/results/x.csv", "docs/x.md", "benchmarks/x.py", "csrc/x.cu")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("old")
    assert records.commit() == "unknown"
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    head = records.commit()
    assert re.fullmatch(r"[0-9a-f]{12}", head)
    for file, change in zip(files, ["", "", "+", "+"], strict=True):
        file.write_text("new")
        assert records.commit() == head + change
        file.write_text("old")


@pytest.mark.parametrize(
    "device, folder",
    [
        ("Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz", "intel-xeon-gold-6338-2-threads"),
        ("AMD EPYC 7763 64-Core Processor", "amd-epyc-7763-2-threads"),
    ],
)
def test_folder_of_a_device(device, folder, monkeypatch):
    assert records.folder_name(device, 2) == folder
    monkeypatch.setattr(records, "device_name", lambda device: "A CPU" if device == "cpu" else "NVIDIA H100")
    threads = torch.get_num_threads()
    assert records.folder_here().name == records.folder_name("A", threads)
    assert records.folder_here(threads=3).name == "a-3-threads"
    assert records.folder_here("cuda") == records.RESULTS / "nvidia-h100"


def test_processes_are_measured_into_a_file(tmp_path, monkeypatch, capsys):
    """Medians and quartiles of the repetitions; rows of other sizes stay, those of the same are replaced."""
    taken = {
        "one process": ([3.0, 1.0, 2.0, 5.0, 4.0], 2**21),
        "gather": ([7.0, 7.0], None),
        "ring": ([8.0, 9.0], 2**20),
    }
    monkeypatch.setattr(distributed, "_measured", lambda call, way, *_: taken[way])
    monkeypatch.setattr(distributed.results, "RESULTS", tmp_path)
    for anchors in ("64", "32", "64"):
        assert command.main(["distributed", "--anchors", anchors, "--ranks", "3"]) == 0
    (file,) = tmp_path.glob("*-3-threads/distributed.csv")
    rows = distributed.read(file)
    assert [(row.anchors, row.call) for row in rows[::3]] == [
        (anchors, call) for anchors in (32, 64) for call in ("both", "keys", "own")
    ]
    gather, one, ring = rows[:3]
    assert (one.q1_ms, one.median_ms, one.q3_ms, one.repetitions, one.peak_mib) == (2.0, 3.0, 4.0, 5, 2.0)
    assert (gather.q1_ms, gather.median_ms, gather.q3_ms, gather.peak_mib) == (7.0, 7.0, 7.0, None)
    assert (ring.median_ms, ring.ranks, ring.threads, ring.dim) == (8.5, 3, 3, 512)
    assert one.device == records.device_name() and one.commit and one.date
    assert "keys   one process        3.0 ms      2.0 MiB a rank" in capsys.readouterr().out
    assert records.read_folder(file.parent) == []  # it has no op's rows


def test_run_from_end_to_end(tmp_path, capsys):
    arguments = ["run", "--quick", "--op", "hidden_positives", "--provider", "torch-matmul", "--provider", "reference"]
    assert command.main([*arguments, "--output", str(tmp_path)]) == 0
    with (tmp_path / "hidden_positives.csv").open(newline="") as file:
        rows = {line["provider"]: line for line in csv.DictReader(file)}
    assert set(rows) == {"torch-matmul", "reference"}
    for line in rows.values():
        assert 0 < float(line["q1_ms"]) <= float(line["median_ms"]) <= float(line["q3_ms"])
        assert line["verified_anchors"] == line["anchors"] == "784"
        assert line["device"] and line["commit"] and line["date"] and line["torch"] == torch.__version__
    out = capsys.readouterr().out
    assert "hidden_positives forward N=784" in out and "cannot express" not in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "--images", "0"], "--images: must be a whole number, 1 or more, got 0"),
        (["run", "--images", "-1"], "--images: must be a whole number, 1 or more, got -1"),
        (["distributed", "--ranks", "0"], "--ranks: must be a whole number, 1 or more, got 0"),
        (["distributed", "--ranks", "²"], "--ranks: must be a whole number, 1 or more, got ²"),
        (["distributed", "--dim", "0"], "--dim: must be a whole number, 1 or more, got 0"),
        (["distributed", "--anchors", "1"], "--anchors must be at least one a rank, got 1 for 2 ranks"),
    ],
)
def test_counts_must_be_positive(arguments, message, monkeypatch, capsys):
    for module, name in ((command, "run"), (distributed, "measure")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("measured with a bad count"))
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "output, message",
    [
        ("file", "--output must be a folder that can be made, got .*file: File exists"),
        ("file/below", "--output must be a folder that can be made, got .*below: Not a directory"),
        ("foreign", "foreign/x.csv lacks columns: "),
    ],
)
def test_an_output_is_refused_before_anything_is_measured(output, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "run", lambda *_: pytest.fail("measured what could not be written"))
    (tmp_path / "file").touch()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x.csv").write_text("a,b\n1,2\n")
    for module in (error_tables, distributed):
        monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("measured what could not be written"))
    for program in (["run", "--quick"], ["errors"], ["distributed"]):
        with pytest.raises(SystemExit) as stopped:
            command.main([*program, "--output", str(tmp_path / output)])
        assert stopped.value.code == 2 and re.search(message, capsys.readouterr().err)


def test_a_row_is_printed_in_the_units_of_the_pages(capsys):
    slow = row(op="training_step", call="forward+backward", images=64, peak_mib=3767.0)
    slow.set_times([11.9, 12.0, 12.1])
    command._print_row(slow)
    assert capsys.readouterr().out.endswith(" 12 s (quartiles 12 s, 12 s), peak 3.7 GiB, 5.3 images/s\n")
    slow.set_times([12.0])
    command._print_row(slow)
    assert " 12 s (one run), peak" in capsys.readouterr().out


def test_errors_go_where_they_are_told_to(tmp_path, monkeypatch, capsys):
    def measured(op, environment, device):
        return [errors.ErrorRow(op, "values", "float32", "cpu", "usual", 1e-7, None, 5, **environment)]

    monkeypatch.setattr(error_tables, "measure", measured)
    monkeypatch.setattr(error_tables, "write_tables", lambda *_: pytest.fail("the pages are of another machine"))
    assert command.main(["errors", "--op", "masked_topk", "--output", str(tmp_path / "new")]) == 0
    (written,) = errors.read(tmp_path / "new" / records.ERRORS)
    assert (written.op, written.device, written.torch) == ("masked_topk", records.device_name(), torch.__version__)
    with pytest.raises(SystemExit):
        command.main(["errors", "--help"])
    assert "overwrites" in capsys.readouterr().out


def test_calls_can_be_chosen(monkeypatch):
    chosen = []
    monkeypatch.setattr(command, "run", lambda cases, *_: chosen.extend(case.call for case in cases) or [])
    assert (
        command.main(["run", "--quick", "--op", "masked_topk", "--op", "contrastive", "--call", "k=8", "--call", "own"])
        == 0
    )
    assert chosen == ["k=8", "own"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--op", "sorting"], "unknown op sorting; known are masked_topk"),
        (["--provider", "abacus"], "unknown provider abacus; known are"),
        (
            ["--op", "contrastive", "--call", "k=1", "--call", "own"],
            "unknown call k=1; known are keys, own, queue, both, clip",
        ),
    ],
)
def test_unknown_names(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["run", "--quick", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown op 'sorting'"):
        cases("sorting")
    assert "cpu" in known_names()


def test_every_op_has_its_benchmark(repository):
    files = {path.stem for path in (repository / "benchmarks").glob("bench_*.py")}
    assert files == {f"bench_{op}" for op in OPS}


def test_estimates_name_every_dense_op(monkeypatch, capsys):
    for name, value in {"_IMAGES": 2, "_SIDE": 6, "_DIM": 16, "_FEATURES": 16, "_POOL": 20}.items():
        monkeypatch.setattr(estimates, name, value)
    assert command.main(["estimates"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["masked_topk", "hidden_positives", "multi_positive_contrastive"]
    assert all(float(line.split()[-2]) > 0 for line in lines)
