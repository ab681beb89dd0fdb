"""Looks at validation images while training: scores and pictures, and no trace in what is trained."""

import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.evaluation import validation
from training.run import open_run
from training.train import train

EVERY_TWO = {"every": 2, "curve_images": 3}


@pytest.fixture
def trained(tiny_config):
    def make(name="run", **top):
        run = open_run(tiny_config(name=name, **top))
        train(run)
        return run

    return make


def logged(run):
    events = EventAccumulator(f"{run.config.output}/tensorboard").Reload()
    scalars = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    pictures = {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
    return scalars, pictures, events


def test_scores_and_pictures_of_a_run(trained):
    run = trained(evaluation=EVERY_TWO)
    scalars, pictures, events = logged(run)
    names = [f"val/{of}_{probe}" for probe in ("cluster_probe", "linear") for of in ("accuracy", "miou")]
    assert all(scalars[name] == [1, 3, 5] for name in [*names, "val/seconds"])
    assert [tag for tag in sorted(pictures)] == [f"val/mosaic_{index:04d}" for index in range(4)]
    assert pictures["val/mosaic_0000"] == [1, 3, 5]
    size = events.Images("val/mosaic_0000")[0]
    assert size.width > 3.9 * size.height * 40 / 32, "photograph, label and two segmentations"
    looked = [figures for figures in run.state.history if names[0] in figures]
    assert [figures["step"] for figures in looked] == [1, 3, 5]
    assert all(0 <= figures[name] <= 100 for figures in looked for name in names)
    assert [figures["step"] for figures in run.state.history] == list(range(6)), "one entry for each step"


def test_nothing_that_is_trained_depends_on_it(trained):
    looked, plain = trained("looked", evaluation=EVERY_TWO), trained("plain")
    for name, module in looked.state.modules.items():
        for key, value in module.state_dict().items():
            if name != "clusterings":
                assert torch.equal(value, plain.state.modules[name].state_dict()[key]), f"{name}.{key}"
    assert not looked.state.clusterings.matched.any() and not looked.state.clusterings.fitted
    kept = [{name: value for name, value in figures.items() if "val/" not in name} for figures in looked.state.history]
    assert kept == plain.state.history


def test_ten_looks_unless_the_configuration_says_otherwise(trained):
    run = trained(steps=23, evaluation={})
    assert logged(run)[0]["val/seconds"] == [*range(1, 23, 2), 22]
    assert not any(tag.startswith("val/") for tag in logged(trained("none"))[0])


def test_a_resumed_run_looks_where_one_in_one_piece_does(trained, tiny_config, monkeypatch):
    whole = trained("whole", evaluation=EVERY_TWO)
    run = open_run(tiny_config(name="parts", evaluation=EVERY_TWO))
    save = run.save

    def stop(*_):
        save()
        if run.state.step == 4:
            raise InterruptedError

    monkeypatch.setattr(run, "save", stop)
    with pytest.raises(InterruptedError):
        train(run)
    time.sleep(1)  # TensorBoard reads its files by name, which begins with the second
    rest = trained("parts", evaluation=EVERY_TWO)
    assert rest.state.history == whole.state.history
    assert logged(rest)[0]["val/miou_linear"] == logged(whole)[0]["val/miou_linear"] == [1, 3, 5]


def test_without_labels_there_are_pictures_alone(trained, photo_folder):
    data = {"name": "folder", "root": str(photo_folder(labels=False)), "size": [32, 40], "clusters": 5}
    run = trained(data=data, evaluation=EVERY_TWO)
    scalars, pictures, _ = logged(run)
    assert [tag for tag in scalars if tag.startswith("val/")] == ["val/seconds"]
    assert pictures["val/mosaic_0000"] == [1, 3, 5]
    assert all("val/" not in name for figures in run.state.history for name in figures)


def test_a_choice_by_labels_scores_all_images(trained, monkeypatch):
    scored, evaluate = [], validation.evaluate
    monkeypatch.setattr(validation, "evaluate", lambda *a, **k: (scored.append(len(k["images"])), evaluate(*a, **k))[1])
    run = trained(quirks={"select_on_labels": True}, evaluation=EVERY_TWO)
    assert set(scored) == {4} and run.best_path.is_file()


def test_its_time_is_not_that_of_training(trained, monkeypatch):
    now, evaluate = [0.0], validation.evaluate

    def slow(*arguments, **named):
        now[0] += 100
        return evaluate(*arguments, **named)

    def clock():
        now[0] += 1e-6
        return now[0]

    monkeypatch.setattr("training.runtime.progress.time.perf_counter", clock)
    monkeypatch.setattr(validation, "evaluate", slow)
    run = trained(evaluation=EVERY_TWO)
    assert run.state.seconds < 1
    assert [round(event.value) for event in logged(run)[2].Scalars("val/seconds")] == [100, 100, 100]
