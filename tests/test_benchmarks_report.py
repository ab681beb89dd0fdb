"""What is made of measured rows: comparisons with a baseline, plots and the tables of docs/benchmarks.md."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from benchmarks import __main__ as command
from benchmarks import arguments, baseline, compare, distributed
from benchmarks import results as records
from benchmarks.cases import Case
from benchmarks.pages import distributed_table, plots, plotted, presentation, tables

pytestmark = pytest.mark.usefixtures("without_gpu")
SVG = "{http://www.w3.org/2000/svg}"
MACHINE = {
    "device": "A Processor",
    "threads": 2,
    "instructions": "AVX2",
    "commit": "abc",
    "date": "2030-01-02T03:04:05",
}


def row(provider: str = "cpu", milliseconds: float = 10.0, spread: float = 0.01, **values) -> records.Row:
    """A row that was timed, with quartiles a share of `spread` below and above its median."""
    case = {"op": "contrastive", "call": "own", "images": 4, "height": 32, "width": 32, "anchors": 4096}
    new = records.Row(**case | {"dtype": "float32", "provider": provider, "peak_mib": 20.0} | MACHINE | values)
    new.q1_ms, new.median_ms, new.q3_ms = (milliseconds * factor for factor in (1 - spread, 1, 1 + spread))
    new.repetitions = 5
    return new


def verdicts(before: list[records.Row], after: list[records.Row], **settings) -> dict[str, str]:
    return {change.after.provider: change.verdict for change in baseline.compare(before, after, **settings).changes}


@pytest.mark.parametrize(
    "milliseconds, spread, verdict",
    [
        (10.4, 0.001, "within"),
        (10.6, 0.001, "slower"),
        (9.6, 0.001, "within"),
        (9.4, 0.001, "faster"),
        (10.6, 0.07, "within"),  # quartiles from 9.86: noise
        (9.4, 0.07, "within"),
    ],
)
def test_zones(milliseconds, spread, verdict):
    (change,) = baseline.compare([row(spread=0.001)], [row(milliseconds=milliseconds, spread=spread)]).changes
    assert change.verdict == verdict
    assert change.noisy == (spread == 0.07)
    assert change.ratio == pytest.approx(milliseconds / 10)


@pytest.mark.parametrize(
    "before, after, verdict, noisy",
    [
        (100, 124, "within", False),
        (100, 126, "more", False),
        (100, 76, "within", False),
        (100, 74, "less", False),
        (20, 27.9, "within", True),  # what an allocator keeps
        (20, 28.1, "more", False),
        (20, 12.1, "within", True),
        (20, 11.9, "less", False),
        (0, 9, "more", False),
        (0, 0, "within", False),
    ],
)
def test_zones_of_memory(before, after, verdict, noisy):
    comparison = baseline.compare([row(peak_mib=before)], [row(peak_mib=after)])
    (change,) = comparison.memory
    assert (change.verdict, change.noisy) == (verdict, noisy)
    assert comparison.failed == (verdict == "more")
    assert [one.verdict for one in comparison.changes] == ["within"]
    others = [row("faiss", peak_mib=value) for value in (before, after)]
    assert not baseline.compare(others[:1], others[1:]).failed, "peers do not count"


def test_memory_that_was_not_measured_is_not_compared():
    for before, after in ((None, 20.0), (20.0, None)):
        comparison = baseline.compare([row(peak_mib=before)], [row(peak_mib=after)])
        assert not comparison.memory and not comparison.failed and len(comparison.changes) == 1


def test_memory_is_compared_whatever_the_timer():
    before, after = row(), row(peak_mib=40.0)
    after.timer = "events"
    comparison = baseline.compare([before], [after])
    assert not comparison.changes and comparison.failed
    assert baseline.compare([before], [after], memory_tolerance=1.1).failed is False


def test_tolerance():
    assert verdicts([row()], [row(milliseconds=11)], tolerance=0.2) == {"cpu": "within"}
    assert verdicts([row()], [row(milliseconds=11)], tolerance=0.05) == {"cpu": "slower"}


@pytest.mark.parametrize(
    "other",
    [{"device": "Another"}, {"threads": 4}, {"op": "x"}, {"call": "keys"}, {"anchors": 1024}, {"dtype": "float16"}],
)
def test_only_the_same_is_compared(other):
    comparison = baseline.compare([row()], [row(milliseconds=99, **other)])
    assert not comparison.changes
    assert (len(comparison.not_measured), len(comparison.without_baseline)) == (1, 1)
    assert not comparison.failed


def test_times_of_other_timers_are_not_compared():
    events = row(milliseconds=99)
    events.timer = "events"
    comparison = baseline.compare([row()], [events])
    assert not comparison.changes and comparison.not_compared == {"timed in another way": [events]}


def test_relative_to_a_provider_of_the_same_run():
    before = [row("cpu", 10), row("torch-dense", 20)]
    slow_machine = [row("cpu", 15), row("torch-dense", 30)]
    assert verdicts(before, slow_machine) == {"cpu": "slower", "torch-dense": "slower"}
    assert verdicts(before, slow_machine, relative_to="torch-dense") == {"cpu": "within", "torch-dense": "within"}
    slow_kernel = [row("cpu", 15), row("torch-dense", 20)]
    assert verdicts(before, slow_kernel, relative_to="torch-dense")["cpu"] == "slower"
    noisy = [row("cpu", 10.8), row("torch-dense", 20, spread=0.1)]  # 0.54 of the unit, whose quartiles are 18 and 22
    assert verdicts(before, noisy, relative_to="torch-dense")["cpu"] == "within"
    (reason,) = baseline.compare(before[:1], slow_kernel, relative_to="torch-dense").not_compared
    assert "torch-dense" in reason


def test_only_ours_fail_a_comparison():
    before = [row("cpu"), row("faiss")]
    assert not baseline.compare(before, [row("cpu"), row("faiss", 20)]).failed
    assert baseline.compare(before, [row("cpu", 20), row("faiss")]).failed
    wrong = replace(row(), median_ms=None, note="not timed: row 3 is off")
    comparison = baseline.compare(before, [wrong, row("faiss")])
    assert comparison.failed and comparison.lost == [wrong]
    assert baseline.compare(before, [replace(wrong, note="does not fit into memory")]).failed
    assert not baseline.compare(before, [replace(wrong, note="left out above 784 anchors")]).failed
    assert not baseline.compare(before, [row("cpu"), replace(row("faiss"), median_ms=None, note="not timed: x")]).failed


def test_report():
    before = [row("cpu", 10), row("torch-dense", 20), row("compiled", 15)]
    after = [row("cpu", 20), row("torch-dense", 30, spread=0.6), row("faiss", 5)]
    lines = list(compare.report(baseline.compare(before, after), before, after))
    assert lines[0].startswith("within  contrastive own N=4096 float32 torch-dense")
    assert lines[0].endswith("20 -> 30 ms, x1.50 (quartiles overlap)")
    assert lines[1].startswith("slower  contrastive own N=4096 float32 cpu")
    assert lines[1].endswith("10 -> 20 ms, x2.00; torch-dense x2.00 -> x1.50")
    assert lines[2].splitlines()[0] == "in the baseline, not measured (1):" and lines[2].endswith("compiled")
    assert lines[3].splitlines()[0] == "measured, not in the baseline (1):" and lines[3].endswith("faiss")
    assert lines[4:] == [
        "time: 0 faster, 1 within the tolerance or noise, 1 slower",
        "memory: 0 less, 2 within the tolerance or noise, 0 more",
    ]
    relative = baseline.compare(before, after, relative_to="torch-dense")
    first = next(compare.report(relative, before, after))
    assert first == "ratios are of times relative to torch-dense"


def test_compare_by_command(tmp_path, monkeypatch, capsys):
    """The baseline of the device is found, and the exit status says whether ours are slower."""
    monkeypatch.setattr(baseline, "RESULTS", tmp_path)
    records.write(tmp_path / "a-2-threads", [row()])
    for milliseconds, status in ((10.1, 0), (12, 1)):
        records.write(tmp_path / "run", [row(milliseconds=milliseconds)])
        assert command.main(["compare", str(tmp_path / "run")]) == status
    assert "10 -> 12 ms, x1.20" in capsys.readouterr().out
    assert command.main(["compare", str(tmp_path / "run"), "--tolerance", "0.3"]) == 0
    records.write(tmp_path / "large", [row(peak_mib=40.0)])
    assert command.main(["compare", str(tmp_path / "large")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "more    contrastive own N=4096 float32 cpu" in lines[-3] and lines[-3].endswith("20 -> 40 MiB, x2.00")
    assert lines[-1] == "memory: 0 less, 0 within the tolerance or noise, 1 more"
    assert command.main(["compare", str(tmp_path / "large"), "--memory-tolerance", "1"]) == 0
    records.write(tmp_path / "elsewhere", [row(milliseconds=12)])
    assert command.main(["compare", str(tmp_path / "run"), "--baseline", str(tmp_path / "elsewhere")]) == 0


def test_a_baseline_is_measured_again(tmp_path, capsys):
    """Without the folder of a run: what the baseline has of this machine, and nothing else."""
    here = {"device": records.device_name(), "threads": command.torch.get_num_threads(), "call": "forward"}
    small = here | {"op": "hidden_positives", "images": 1, "height": 28, "width": 28, "anchors": 784}
    others = [{"device": "Another"}, {"threads": 99}, {"call": "end-to-end head"}]
    old = [row("torch-matmul", 1e6, **small), *(row("torch-matmul", 1e6, **small | other) for other in others)]
    records.write(tmp_path, old[:1])
    assert command.main(["compare", "--baseline", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "time: 1 faster, 0 within the tolerance or noise, 0 slower" in lines
    assert not [line for line in lines if "reference" in line]
    assert not list(baseline.again(old[1:], here))


def test_all_that_a_baseline_has_is_measured_again(monkeypatch):
    """On the device that it was measured on, whatever its size; what fails keeps no other from being measured."""
    asked = []

    def run(cases, names, environment, report, keep_going, all_sizes):
        asked.append((*cases, names, keep_going, all_sizes))
        return []

    monkeypatch.setattr(baseline, "run", run)
    gpu = {"instructions": "sm_90, Triton 3.6.0"}
    rows = [row("cpu"), row("faiss"), replace(row("published"), median_ms=None), row("cuda", **gpu, dtype="float16")]
    assert not list(baseline.again(rows, MACHINE))
    case = Case("contrastive", "own", 4, (32, 32))
    assert asked == [
        (case, ["cpu", "faiss"], True, True),
        (replace(case, device="cuda", dtype="float16"), ["cuda"], True, True),
    ]


def test_folder_of_a_baseline(tmp_path, monkeypatch):
    """Of a GPU it has no number of threads."""
    monkeypatch.setattr(baseline, "RESULTS", tmp_path)
    assert baseline.folder_of("NVIDIA H100", 16).name == "nvidia-h100-16-threads"
    (tmp_path / "nvidia-h100").mkdir()
    assert baseline.folder_of("NVIDIA H100", 16).name == "nvidia-h100"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere"], "there is no folder nowhere, here or in "),
        (["nowhere", "--tolerance", "-1"], "--tolerance must be a share, 0 or more and finite, got -1.0"),
        (["nowhere", "--tolerance", "inf"], "--tolerance must be a share, 0 or more and finite, got inf"),
        (["nowhere", "--memory-tolerance", "nan"], "--memory-tolerance must be a share, 0 or more and finite, got nan"),
        (["--baseline", "nowhere"], "there is no folder nowhere, here or in "),
        (["nowhere", "--relative-to", "abacus"], "unknown provider abacus; known are"),
    ],
)
def test_comparisons_that_cannot_be(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["compare", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("program", ["compare", "plot"])
def test_files_that_are_no_results(program, tmp_path, capsys):
    (tmp_path / "old.csv").write_text("op,time\ncontrastive,3\n")
    with pytest.raises(SystemExit) as stopped:
        command.main([program, str(tmp_path)])
    assert stopped.value.code == 2 and "old.csv lacks columns: call, images" in capsys.readouterr().err


def test_baselines_have_names(tmp_path, monkeypatch, capsys):
    """A folder of benchmarks/results is found by its name; what to do where this machine has none is said."""
    for module in (arguments, baseline):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    records.write(tmp_path / "run", [row()])
    with pytest.raises(SystemExit):
        command.main(["compare", str(tmp_path / "run")])
    assert "a-2-threads: measure one with `run`, or name another with --baseline" in capsys.readouterr().err
    records.write(tmp_path / "other", [row()])
    assert command.main(["compare", "run", "--baseline", "other"]) == 0


def test_runs_of_another_device_are_refused(tmp_path, capsys):
    records.write(tmp_path / "run", [row()])
    records.write(tmp_path / "old", [row(device="Another")])
    with pytest.raises(SystemExit):
        command.main(["compare", str(tmp_path / "run"), "--baseline", str(tmp_path / "old")])
    assert "nothing in common: device Another and A Processor\n" in capsys.readouterr().err
    records.write(tmp_path / "old", [row(threads=1), row("faiss", threads=2)])
    with pytest.raises(SystemExit):
        command.main(["compare", str(tmp_path / "run"), "--baseline", str(tmp_path / "old")])
    assert "nothing in common: no case has the same device, threads, op" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["compare", "--baseline", str(tmp_path / "old")])
    assert "nothing in common: it has no case that was timed on this machine" in capsys.readouterr().err


def test_ops_that_were_not_run_are_counted():
    before = [row(), row("compiled"), *(row(op="masked_topk", anchors=anchors) for anchors in (1, 2, 3))]
    _, others, missing, *_ = compare.report(baseline.compare(before, [row()]), before, [row()])
    assert others == "in the baseline, of ops that the run does not have (3)"
    assert missing.startswith("in the baseline, not measured (1):") and missing.endswith("compiled")


def measured() -> list[records.Row]:
    """Two sizes of a call, where ours takes a quarter of the time of plain PyTorch and a tenth of its memory."""
    return [
        row(name, factor * anchors, anchors=anchors, images=anchors // 1024, peak_mib=memory)
        for anchors in (1024, 12288)
        for name, factor, memory in (("cpu", 1, 30), ("torch-dense", 4, 300), ("compiled", 2, 99), ("reference", 9, 50))
    ]


def test_ratios_are_against_the_published_way():
    names = ["reference", "faiss", "torch-dense", "published"]
    rows = [row(name) for name in names]
    assert presentation.yardstick(rows) == "published"
    assert presentation.yardstick(rows[:3]) == "torch-dense"
    assert presentation.yardstick(rows[:1]) == "reference"
    assert presentation.yardstick([]) is None


def test_plots_show_who_matters():
    rows = [row(name, time) for name, time in (("reference", 1), ("faiss", 3), ("open_clip", 2), ("published", 9))]
    assert presentation.shown([*rows, row("cpu"), row("cpu-float32")], 3) == ["cpu", "published", "open_clip"]


def drawing(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    records.write(tmp_path, measured())
    assert command.main(["plot", str(tmp_path)]) == 0
    first = (tmp_path / "contrastive.svg").read_text()
    texts = {element.text for element in drawing(first).iter(f"{SVG}text")}
    assert {"Time: 4.0× faster", "Memory: 10× less", "hpkernels, cpu", "plain PyTorch", "torch.compile"} <= texts
    assert "reference" not in texts
    assert "contrastive, own · A Processor, 2 threads, float32, 2030-01-02" in texts
    assert command.main(["plot", str(tmp_path)]) == 0
    assert (tmp_path / "contrastive.svg").read_text() == first, "the same rows must give the same file"


def test_all_plots_are_drawn_again(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    with pytest.raises(SystemExit):
        command.main(["plot"])
    for device in ("one", "two"):
        records.write(tmp_path / device, measured())
    (tmp_path / "compiler").mkdir()
    assert command.main(["plot"]) == 0
    assert {path.parent.name for path in tmp_path.glob("*/*.svg")} == {"one", "two"}


def test_plots_do_not_boast(tmp_path):
    pytest.importorskip("matplotlib")
    slower = [replace(one, provider={"cpu": "torch-dense", "torch-dense": "cpu"}[one.provider])
              for one in measured() if one.provider in ("cpu", "torch-dense")]  # fmt: skip
    (path,) = plots.plot(slower, tmp_path)
    texts = {element.text for element in drawing(path.read_text()).iter(f"{SVG}text")}
    assert {"Time: 4.0× slower", "Memory: 10× more"} <= texts


def test_one_size_is_no_plot():
    assert plotted.selected(measured()[:4]) == []


def committed() -> list[tuple]:
    return [
        pytest.param(folder / plotted.file_name(rows[0]), rows, id=f"{folder.name}/{plotted.file_name(rows[0])}")
        for folder in sorted(records.RESULTS.iterdir())
        for rows in plotted.selected(records.read_folder(folder))
    ]


@pytest.mark.parametrize("path, rows", committed())
def test_committed_plots_show_the_committed_rows(path, rows):
    assert path.is_file(), f"python -m benchmarks plot {path.parent}"
    description = drawing(path.read_text()).find(f"{SVG}desc").text
    assert description == plotted.description(rows), f"python -m benchmarks plot {path.parent}"


@pytest.mark.parametrize("path, rows", committed())
def test_plots_suit_dark_pages(path, rows):
    text = path.read_text()
    style = text[text.index("<style>") : text.index("</style>")]
    colors = set(re.findall(r'style="[^"]*?\b((?:fill|stroke): #[0-9a-f]{6})', text))
    assert colors and all(f'[style*="{color}"]' in style for color in colors)
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: (?:bold )?([\d.]+)px", text)]
    assert sizes and min(sizes) >= 12
    assert f'width="{plots.WIDTH}"' in text and "<metadata>" not in text


def test_every_plot_belongs_to_rows():
    files = {path for path in records.RESULTS.glob("*/*.*") if path.suffix in (".svg", ".png")}
    assert files == {parameters.values[0] for parameters in committed()}


def luminance(color: str) -> float:
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True])
def test_colors_can_be_read(dark):
    """Text has the contrast that WCAG asks for."""
    scheme = [pair[dark] for pair in plots.DARK.items()]
    paper, (ink, muted, _, *lines) = luminance(scheme[0]), scheme[1:]
    for color in (ink, muted, *lines):
        low, high = sorted((paper, luminance(color)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, color


def test_tables(tmp_path):
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    alone = row("cpu", 5e5, anchors=50176, images=49)
    alone.repetitions = 1
    full = replace(row("torch-dense", anchors=50176), median_ms=None, note="does not fit into memory")
    fast = row("cpu", 3, op="training_step", images=64)
    failed = replace(row(op="masked_topk"), median_ms=None, note="not timed: row 3 is off")
    records.write(tmp_path / "results" / "device", [*measured(), alone, full, fast, failed])
    for _ in range(2):  # again gives the same
        tables.write_tables(page, tmp_path / "results")
        text = page.read_text().replace(presentation.NBSP, " ")
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
        assert "masked_topk" not in text
        assert "### A Processor, 2 threads" in text and "Measured 2030-01-02 at commit abc." in text
        assert "(../results/device/contrastive.svg)" in text and "(../results/device/contrastive.csv)" in text
        assert "| call | N | `cpu` | `torch-dense` | faster | less memory | `compiled` |" in text
        assert "| own | 1024 | 1.0 s, 30 MiB | 4.1 s, 300 MiB | 4.0× | 10× | 2.0 s, 99 MiB |" in text
        assert "| own | 50 176 | 500 s, 20 MiB, one run | does not fit into memory |  |  |  |" in text
        assert "| own | 4096 | 3.0 ms, 20 MiB | 21 333 images/s |" in text
    page.write_text("no comments")
    with pytest.raises(ValueError, match="must have the lines"):
        tables.write_tables(page, tmp_path / "results")


def test_tables_say_rates_and_providers(tmp_path):
    ours, other = row("cuda", 1), row("published", 9)
    ours.tflops, ours.of_mm, ours.of_roofline = 412.3, 0.61, 0.5
    lines = tables._table([ours, other, row("triton", 2, call="keys"), row("torch-dense", 5, call="keys")])
    text = [line.replace(presentation.NBSP, " ") for line in lines]
    assert text[0] == "| call | N | hpkernels | against | faster | less memory | rate |"
    assert text[2] == "| keys | 4096 | `triton` 2.0 ms, 20 MiB | `torch-dense` 5.0 ms, 20 MiB | 2.5× | 1.0× |  |"
    assert text[3].endswith("| 9.0× | 1.0× | 412 TFLOP/s, 61% of `mm`, 50% of the roofline |")


def test_calls_are_in_the_order_of_their_numbers():
    calls = ["own pools", "k=32", "k=8", "density=0.05", "own", "own head"]
    lines = tables._table([row(call=call) for call in calls])[2:]
    in_order = ["density=0.05", "k=8", "k=32", "own", "own head", "own pools"]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == in_order


def test_a_part_of_a_step_has_no_images_per_second():
    assert row(op="training_step", call="end-to-end").images_per_second == 400
    assert row(op="training_step", call="end-to-end head").images_per_second is None
    assert row().images_per_second is None


def test_the_page_is_up_to_date(repository):
    """Fails where somebody edits the tables or the rows, and not the other."""
    page = repository / "docs" / "benchmarks.md"
    written = page.read_text().partition(tables.BEGIN + "\n")[2].partition(tables.END)[0]
    assert written == tables.measured(page.parent, records.RESULTS), "python -m benchmarks tables"


def of_processes(call: str, way: str, milliseconds: float, **values) -> distributed.DistributedRow:
    sizes = {"anchors": 8192, "dim": 512, "ranks": 2, "peak_mib": 97.4, "repetitions": 5}
    times = {"median_ms": milliseconds, "q1_ms": milliseconds, "q3_ms": milliseconds}
    return distributed.DistributedRow(call, way, **(sizes | times | MACHINE | {"command": "measure it"} | values))


def test_table_of_processes(tmp_path):
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(f"before\n{distributed_table.BEGIN}\nold\n{distributed_table.END}\nafter\n")
    distributed_table.write_table(page, tmp_path / "results")
    assert "No results are committed yet." in page.read_text()
    rows = [
        of_processes("own", "gather", 889.0),
        of_processes("keys", "ring", 1171.0, peak_mib=None),
        of_processes("keys", "gather", 838.0),
        of_processes("keys", "gather", 12.0, anchors=1024),
    ]
    distributed.write(tmp_path / "results" / "device", rows)
    for _ in range(2):  # again gives the same
        distributed_table.write_table(page, tmp_path / "results")
        text = page.read_text().replace(presentation.NBSP, " ")
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
        small, large = text.split("N = K = ")[1:]
        assert small.startswith("1024, D 512, 2 ranks, on A Processor, 2 threads, AVX2, by `measure it`. ")
        assert "Measured 2030-01-02 at commit abc. [Quartiles](../results/device/distributed.csv).\n" in small
        assert "| | gather |\n|---|---|\n| anchors against keys | 12 ms, 97 MiB |\n" in small
        assert "| | gather | ring |\n|---|---|---|\n" in large
        assert "| anchors against keys | 838 ms, 97 MiB | 1.2 s |\n" in large
        assert "| anchors that are their own keys | 889 ms, 97 MiB |  |\n" in large


def test_the_page_of_processes_is_up_to_date(repository):
    """Fails where somebody edits the table or the rows, and not the other."""
    page = repository / "docs" / "distributed.md"
    written = page.read_text().partition(distributed_table.BEGIN + "\n")[2].partition(distributed_table.END)[0]
    assert written == distributed_table.measured(page.parent, records.RESULTS), "python -m benchmarks tables"
