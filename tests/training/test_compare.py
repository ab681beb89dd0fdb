"""Runs compared: groups, pairs by seed, intervals, what is refused, and the page."""

import base64
import json
import math
import re

import pytest
from scipy import stats
from tiny import tiny_values

from training import compare as program
from training.compare import as_dict, as_text, compare, paired_difference, tables
from training.config_file import config_from_dict
from training.report.group_curves import mean_and_spread
from training.results import write_results
from training.run import open_run
from training.train import train
from training.trials import find_runs, read_trial

CONFUSION = [[30, 10], [0, 40], [5, 0]]
HP, OTHER = [70.0, 72.0, 71.0, 77.0, 70.0], [69.0, 70.0, 70.5, 70.0, 69.0]


@pytest.fixture
def leave(tmp_path):
    """Write what a finished run leaves, with a given accuracy and mIoU of k-means."""

    def make(name, seed, accuracy, *, baseline=60.0, miou=None, iou=(50.0, None), confusion=CONFUSION, **top):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        scores = {"accuracy": accuracy, "miou": accuracy / 2 if miou is None else miou}
        ground = {"accuracy": baseline + seed, "miou": 30.0 + seed}
        config = config_from_dict(tiny_values(folder, seed=seed, **top)).model_dump()
        metrics = {
            "baseline": {"unsupervised": ground},
            "hp": {"unsupervised": scores, "kmeans": scores, "cluster_probe": scores, "linear": None},
            "images": "validation",
            "position_score": {"baseline": 2.0, "kmeans": -1.0, "cluster_probe": None},
            "per_class": {"classes": ["road", "<sky>"]}
            | {name: {"iou": list(iou), "confusion": confusion} for name in ("baseline", "kmeans", "cluster_probe")},
            "config": config,
            "run": {"training_seconds": 2.0, "steps": 6, "scored_images": 4, "commit": "abc", "device": "cpu"},
        }
        (folder / "metrics.json").write_text(json.dumps(metrics))
        return folder

    return make


@pytest.fixture
def two_groups(leave, tmp_path):
    for seed, (hp, other) in enumerate(zip(HP, OTHER, strict=True)):
        leave(f"hp_s{seed}", seed, hp)
        leave(f"other_s{seed}", seed, other, loss={"local": False})
    return tmp_path / "runs"


def test_paired_difference_is_that_of_a_t_test():
    found = paired_difference(dict(enumerate(OTHER)), dict(enumerate(HP)))
    expected = stats.ttest_rel(OTHER, HP)
    interval = expected.confidence_interval(0.95)
    assert found.interval == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(expected.pvalue)
    assert found.mean == pytest.approx(sum(OTHER) / 5 - sum(HP) / 5)
    assert not found.beyond_chance


def test_differences_of_few_or_equal_pairs():
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    single = paired_difference({0: 3.0, 5: 1.0}, {0: 1.0})
    assert single[:3] == (2.0, None, None) and not single.beyond_chance
    assert paired_difference({0: 3.0, 1: 4.0}, {0: 1.0, 1: 2.0})[:3] == (2.0, (2.0, 2.0), 0.0)
    assert paired_difference({0: 3.0, 1: 4.0}, {0: 3.0, 1: 4.0})[:3] == (0.0, (0.0, 0.0), 1.0)


def test_groups_are_paired_by_seed_whatever_their_order(two_groups):
    found = as_dict(compare(sorted(two_groups.glob("*"), reverse=True), against="hp"))
    assert set(found["runs"]) == {"hp", "other"}
    other = found["rows"]["other"]["kmeans.accuracy"]
    assert other["by_seed"] == dict(enumerate(OTHER))
    assert other["difference"]["pairs"] == {seed: b - a for seed, (a, b) in enumerate(zip(HP, OTHER, strict=True))}
    assert found["rows"]["hp"]["kmeans.accuracy"]["difference"] is None
    assert found["settings"] == {"loss.local": [False, True]}
    baseline = found["rows"]["k-means of the frozen features"]["kmeans.accuracy"]
    assert baseline["by_seed"] == {seed: 60.0 + seed for seed in range(5)}


def test_against_the_baseline_each_group_has_its_own(leave, two_groups):
    for seed in range(5):
        leave(f"third_s{seed}", seed, 80.0, baseline=70.0, quirks={"nearest_resize": True})
    found = as_dict(compare([two_groups], against="baseline"))["rows"]
    assert found["third"]["kmeans.accuracy"]["difference"]["mean"] == pytest.approx(8.0)
    assert found["hp"]["kmeans.accuracy"]["difference"]["mean"] == pytest.approx(10.0)
    assert "k-means of the frozen features, of hp, other" in found
    assert found["k-means of the frozen features, of third"]["kmeans.accuracy"]["mean"] == 72.0


def test_seeds_without_a_partner_are_told_and_left_out(leave, two_groups):
    leave("other_s9", 9, 10.0, loss={"local": False})
    comparison = compare([two_groups])
    assert "other: no partner in hp for seed 9, not in the differences" in comparison.notes
    row = as_dict(comparison)["rows"]["other"]["kmeans.accuracy"]
    assert 9 in row["by_seed"] and 9 not in row["difference"]["pairs"]


def test_tables_in_text_and_markdown(two_groups):
    comparison = compare([two_groups])
    lines = as_text(comparison, ["kmeans.accuracy", "kmeans.miou"]).splitlines()
    assert re.split(r"\s{2,}", lines[0].strip()) == ["seeds", "kmeans.accuracy", "less hp", "kmeans.miou", "less hp"]
    assert re.split(r"\s{2,}", lines[2]) == ["hp", "5", "72.0 ± 2.9", "36.0 ± 1.5"]
    assert "−2.3 (−5.6 to +1.0)" in lines[3] and "k-means of the frozen features" in lines[1]
    assert "−10.0 (−13.6 to −6.4)*" in lines[1]
    marked = as_text(comparison, ["kmeans.accuracy"], markdown=True).splitlines()
    assert marked[1] == "|---|---|---|---|" and marked[3] == "| hp | 5 | 72.0 ± 2.9 |  |"
    assert "(−13.6 to −6.4)\\* |" in marked[2]
    assert len(tables(comparison)) == 3, "k-means, cluster probe, training: nothing of which there is nothing"


def test_a_single_seed_has_no_interval(leave, tmp_path):
    leave("a", 3, 70.0)
    leave("b", 3, 75.0, loss={"local": False})
    text = as_text(compare([tmp_path / "runs"]), ["kmeans.accuracy"])
    assert "+5.0 (–)" in text and "a single seed: no interval can be given" in text and "±" not in text


def test_rows_are_sorted(two_groups):
    names = [row.name for row in compare([two_groups], sort="kmeans.accuracy").rows]
    assert names == ["hp", "other", "k-means of the frozen features"]


def test_names_come_from_folders_or_from_what_differs(leave, tmp_path):
    for name in ("run_seed0", "run_seed1", "x7"):
        leave(name, int(name[-1]), 70.0)
    for name, temperature in (("y-2", 0.5), ("y-2b", 0.7)):
        leave(name, 2, 70.0, loss={"temperature": temperature})
    (tmp_path / "runs" / "hp").mkdir()
    leave("hp/0", 0, 70.0, head={"dim": 8})
    found = [group.name for group in compare([tmp_path / "runs", tmp_path / "runs" / "hp"]).groups]
    assert found[1:] == ["y", "y-2b", "hp"]
    assert found[0] == "head.dim=16, loss.temperature=0.6"


def test_runs_are_found_by_folder_parent_pattern_and_file(leave, two_groups, tmp_path):
    (two_groups / "cut").mkdir()
    (two_groups / "cut" / "checkpoint.pt").touch()
    for paths in ([two_groups], [two_groups / "*_s*", two_groups / "cut"]):
        finished, unfinished = find_runs(paths)
        assert len(finished) == 10 and unfinished == [two_groups / "cut"]
    (two_groups / "hp_s5").mkdir()  # a run that has just begun
    assert find_runs([two_groups / "hp_s*"])[1] == [two_groups / "hp_s5"]
    single = find_runs([two_groups / "hp_s0" / "metrics.json", two_groups / "hp_s0", two_groups / "hp_s0" / "."])
    assert single == ([two_groups / "hp_s0"], [])
    assert f"left out, as not finished: {two_groups / 'cut'}" in compare([two_groups]).notes


def test_runs_of_other_keys_than_where_they_ran_are_one_group(leave, tmp_path):
    leave("a0", 0, 70.0, log_every=1)
    leave("a1", 1, 71.0, log_every=7, backend="reference", checkpoint_every=5)
    assert [group.name for group in compare([tmp_path / "runs"]).groups] == ["a"]


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"confusion": [[30, 10], [0, 41], [5, 0]]}, "on different labels: the files or the code of the data changed"),
        (
            {"confusion": [[1, 1], [1, 1], [0, 0]], "evaluation": {"size": [64, 80]}},
            "on different labels: they differ in evaluation.size",
        ),
    ],
)
def test_runs_that_were_scored_on_other_labels_are_refused(leave, tmp_path, change, sentence):
    leave("a", 0, 70.0, evaluation={})
    leave("b", 1, 70.0, **({"evaluation": {}} | change))
    with pytest.raises(ValueError, match=f"runs/b and .*runs/a do not compare, as they were scored {sentence}"):
        compare([tmp_path / "runs"])


def test_what_compares_with_care_is_told(leave, tmp_path):
    leave("a", 0, 70.0, evaluation={})
    folder = leave("b", 0, 70.0, evaluation={"flip": True})
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["run"]["commit"] = "def"
    (folder / "metrics.json").write_text(json.dumps(metrics))
    notes = compare([tmp_path / "runs"]).notes
    assert "groups differ in how they were scored or what they were trained on: evaluation.flip" in notes
    assert "runs are of different commits: abc, def" in notes


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("{", "is not what training.train writes: Expecting"),
        ("[]", "is not what training.train writes"),
        ('{"run": {}}', "is not what training.train writes: it has no 'config'"),
        ('{"config": {"stepz": 3}}', "is not what training.train writes: config: unknown key"),
    ],
)
def test_a_file_that_is_no_result_is_named(leave, tmp_path, capsys, content, sentence):
    folder = leave("a", 0, 70.0)
    (folder / "metrics.json").write_text(content)
    with pytest.raises(SystemExit, match="^compare: .*runs/a/metrics.json " + sentence):
        program.main([str(tmp_path / "runs")])


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["{}/nothing"], "nothing must be the folder of a run or hold such folders; it is no folder"),
        (["{}", "--against", "hq"], "--against must be baseline or one of hp, other, got hq"),
        (
            ["{}", "--metric", "kmeans.accuracy,kmeans.moiu"],
            r"there is no metric kmeans.moiu \(did you mean kmeans.miou\?\)",
        ),
        (["{}", "--sort", "miou"], "there is no metric miou"),
        (["{}", "{}/hp_s0copy"], "hp_s0.* are the same run of seed 0: give one of them"),
        ([], "the following arguments are required: runs"),
    ],
)
def test_mistakes_are_one_sentence(leave, two_groups, arguments, sentence):
    if "copy" in "".join(arguments):
        leave("hp_s0copy", 0, 1.0)
    with pytest.raises(SystemExit, match=f"^compare: .*{sentence}"):
        program.main([argument.format(two_groups) for argument in arguments])


def test_only_unfinished_runs(tmp_path):
    (tmp_path / "run" / "tensorboard").mkdir(parents=True)
    with pytest.raises(ValueError, match="no run is finished: no metrics.json in .*run"):
        compare([tmp_path])


def test_the_page_holds_everything_and_needs_nothing(leave, two_groups, capsys):
    program.main([str(two_groups), "--json"])
    printed = json.loads(capsys.readouterr().out)
    program.main([str(two_groups / "*")])  # of which the page is one now
    assert printed["rows"]["other"]["kmeans.miou"]["difference"]["p"] > 0.05
    page = (two_groups / "compare.html").read_text()
    assert "http" not in page and "<script" not in page and "src=" not in page
    assert page.count("<svg") == 4, "the baseline and the other group, in accuracy and mIoU"
    assert "<code>loss.local</code>" in page and "&lt;sky&gt;" in page and "<sky>" not in page
    assert "seed 3: −7.00" in page.replace("-7.00", "−7.00")
    for place in re.findall(r'(?:cx|x1|x2)="([^"]*)%"', page):
        assert 0 <= float(place) <= 100


def test_the_page_has_a_curve_for_each_group(two_groups):
    for seed in range(3):
        for step in range(4):
            line = {"step": step, "loss": 2.0 - step + seed, "lambda": 0.5, "seconds": {"other": 1.0}}
            with open(two_groups / f"hp_s{seed}" / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
    with open(two_groups / "hp_s2" / "log.jsonl", "a") as log:
        log.write('{"step": 4, "lo')  # it was killed
    program.main([str(two_groups)])
    page = (two_groups / "compare.html").read_text()
    (picture,) = re.findall(r'src="data:image/svg\+xml;base64,([^"]*)"', page)
    drawn = base64.b64decode(picture).decode()
    assert "<h3>Loss</h3>" in page and page.count("src=") == 1
    assert "hp</text>" in drawn and "other</text>" not in drawn, "which has logged nothing"


def test_curves_are_of_the_steps_that_all_seeds_have():
    steps, mean, spread = mean_and_spread([{0: 1.0, 1: 5.0, 2: 3.0}, {0: 3.0, 2: 4.0}])
    assert steps.tolist() == [0, 2] and mean.tolist() == [2.0, 3.5]
    assert spread == pytest.approx([math.sqrt(2), math.sqrt(0.5)])
    assert mean_and_spread([{3: 1.0}])[2].tolist() == [0.0]


def test_groups_without_labels_have_position_scores_alone(leave, tmp_path):
    for name, local in (("a", True), ("b", False)):
        folder = leave(name, 0, 1.0, loss={"local": local})
        metrics = json.loads((folder / "metrics.json").read_text())
        metrics["baseline"]["unsupervised"] = None
        metrics["hp"] = dict.fromkeys(metrics["hp"])
        metrics["per_class"] = {"classes": []}
        (folder / "metrics.json").write_text(json.dumps(metrics))
    program.main([str(tmp_path / "runs")])
    rows = as_dict(compare([tmp_path / "runs"]))["rows"]
    assert set(rows["b"]) == {"kmeans.position", "seconds", "images_per_second"}


def test_what_a_run_writes_is_read(tiny_config):
    run = open_run(tiny_config(evaluation={"knn": 3, "every": 0}))
    train(run)
    folder = write_results(run)[0].parent
    trial = read_trial(folder)
    assert trial.config["loss.temperature"] == 0.6 and "output" not in trial.config
    row = as_dict(compare([folder]))["rows"]["run"]
    for name in program.METRICS:
        assert name in row and math.isfinite(row[name]["mean"]), name
