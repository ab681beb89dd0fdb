"""The training step and what surrounds it."""

import copy
import json
import math
import shutil

import pytest
import torch

import hpkernels
from hpkernels import backends
from training import evaluate as evaluation
from training import train as loop
from training.data import batch_of_step
from training.report.explorer import explore
from training.results import write_results
from training.run import load_run, open_run, open_trained, resolve_device
from training.runtime import progress
from training.train import train, train_step


@pytest.fixture
def tiny_run(tiny_config):
    """Open a tiny run; arguments replace top-level entries of its configuration."""
    return lambda **top: open_run(tiny_config(**top))


def batch(run, step=0):
    return batch_of_step(step, len(run.train_bank), run.config.batch_size, run.config.seed)


def parameters(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()]).clone()


def test_steps_lower_the_loss_on_a_fixed_batch(tiny_run):
    run = tiny_run(steps=40, warmup=39, head={"dim": 16, "dropout": 0}, loss={"negative_rate": 1.0})
    images = batch(run)
    first, *_, last = [train_step(run, images) for _ in range(20)]
    for name in ("contrastive", "cluster_probe", "linear_probe"):
        assert last[name] < first[name], name


def test_one_step_moves_everything_that_learns_and_nothing_else(tiny_run):
    run = tiny_run()
    before = {name: copy.deepcopy(module.state_dict()) for name, module in run.state.modules.items()}
    backbone = copy.deepcopy(run.backbone.state_dict())
    train_step(run, batch(run))
    moved = {
        name
        for name, module in run.state.modules.items()
        if any(not torch.equal(value, before[name][key]) for key, value in module.state_dict().items())
    }
    assert moved == {"head", "ema_head", "projection", "linear_probe", "cluster_probe", "specific_pool"}
    assert all(torch.equal(value, backbone[name]) for name, value in run.backbone.state_dict().items())


def test_probes_do_not_change_the_head(tiny_run):
    heads = []
    for rate in (1e-3, 0.5):
        run = tiny_run(name=f"rate{rate}", optim={"linear_probe_lr": rate, "cluster_probe_lr": rate})
        for step in range(2):
            train_step(run, batch(run, step))
        heads.append(parameters(run.state.head))
    assert torch.equal(*heads)


def test_ema_follows_the_head(tiny_run):
    run = tiny_run(head={"dim": 16, "ema": 0.75})
    for step in range(2):
        average = parameters(run.state.ema_head)
        train_step(run, batch(run, step))
        expected = 0.75 * average + 0.25 * parameters(run.state.head)
        torch.testing.assert_close(parameters(run.state.ema_head), expected)


def test_lambda_and_renewals_come_at_the_right_steps(tiny_run, monkeypatch):
    run = tiny_run(steps=6, warmup=2, pool={"size": 32, "renew_every": 2})
    weights, renewed = [], []
    contrastive, renew = hpkernels.distributed.ghp_contrastive, run.state.pools.renew_specific

    def watch(*arguments, **keywords):
        weights.append((keywords["specific_weight"], keywords["specific"] is not None))
        return contrastive(*arguments, **keywords)

    monkeypatch.setattr(hpkernels.distributed, "ghp_contrastive", watch)
    monkeypatch.setattr(run.state.pools, "renew_specific", lambda *a: (renewed.append(run.state.step), renew(*a)))
    train(run)
    assert weights == [(0.0, False), (0.0, False), (0.25, True), (0.5, True), (0.75, True), (1.0, True)]
    assert renewed == [0, 2, 4]


def test_pools_hold_unit_vectors_of_training_patches(tiny_run):
    run = tiny_run()
    train_step(run, batch(run))
    pool = run.state.pools.agnostic()
    torch.testing.assert_close(pool.norm(dim=1), torch.ones(32))
    everything = run.train_bank.get(torch.arange(10)).tokens.flatten(0, 1)
    everything = torch.nn.functional.normalize(everything, dim=1)
    torch.testing.assert_close((pool @ everything.T).max(dim=1).values, torch.ones(32))
    torch.testing.assert_close(run.state.pools.specific().norm(dim=1), torch.ones(32))


@pytest.mark.parametrize(
    "switches, branches, consistency",
    [({}, 2, True), ({"local": False}, 1, True), ({"consistency": 0}, 2, False), ({"specific": False}, 2, True)],
    ids=["all", "no local", "no consistency", "no specific"],
)
def test_ablations_leave_out_what_they_name(tiny_run, monkeypatch, switches, branches, consistency):
    run = tiny_run(warmup=0, loss=switches)
    seen = {}
    contrastive = hpkernels.distributed.ghp_contrastive
    monkeypatch.setattr(
        hpkernels.distributed, "ghp_contrastive", lambda *a, **k: (seen.update(k), contrastive(*a, **k))[1]
    )
    terms = train_step(run, batch(run))
    assert 1 + (seen["z_mixed"] is not None) == branches
    assert ("consistency" in terms) == consistency
    assert (seen["specific"] is not None) == switches.get("specific", True)


def test_gradients_are_clipped(tiny_run, monkeypatch):
    run = tiny_run(optim={"clip_grad_norm": 0.01})
    norms = []
    step = run.state.optimizers["head"].step

    def watch(*arguments, **keywords):
        trained = list(run.state.head.parameters())  # as published: not the projection
        norms.append(torch.cat([parameter.grad.flatten() for parameter in trained]).norm().item())
        return step(*arguments, **keywords)

    monkeypatch.setattr(run.state.optimizers["head"], "step", watch)
    train_step(run, batch(run))
    assert norms == [pytest.approx(0.01, rel=1e-3)]


def test_gradients_are_not_clipped_at_zero(tiny_run, monkeypatch):
    run = tiny_run(optim={"clip_grad_norm": 0})
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: pytest.fail("clipped"))
    before = parameters(run.state.head)
    train_step(run, batch(run))
    assert not torch.equal(parameters(run.state.head), before)


def test_published_quirks_train(tiny_run):
    run = tiny_run(quirks={"preset": "published"})
    train(run)
    assert run.best_path.is_file()
    assert all(math.isfinite(figures["loss"]) for figures in run.state.history)


def test_the_best_checkpoint_is_chosen_by_four_scores_in_each_epoch_and_at_its_end(tiny_run, monkeypatch):
    looked = []

    def evaluate(state, bank, only, how, images):
        looked.append(state.step)
        figure = {2: 10.0, 4: 30.0, 5: 30.0, 6: 20.0}[state.step]
        return {name: {"accuracy": figure, "miou": 1.0} for name in only}

    monkeypatch.setattr("training.evaluation.validation.evaluate", evaluate)
    run = tiny_run(steps=6, batch_size=2, checkpoint_every=2, quirks={"select_on_labels": True})
    assert run.steps_per_epoch == 5
    train(run)
    assert looked == [2, 4, 5, 6]  # the last is that of the run
    kept = load_run(run.best_path)["state"]
    assert kept["step"] == 5 and kept["best_score"] == 62  # two probes; of equals the later one


def test_uncached_features_are_the_cached_ones(tiny_run):
    cached = tiny_run(name="cached")
    backbone = {"name": "patch_dictionary", "patch_size": 8, "features_dim": 24}
    fresh = tiny_run(name="fresh", backbone=backbone | {"cache": False, "views": 0})
    images = batch(cached)
    for kept, computed in zip(cached.train_bank.get(images), fresh.train_bank.get(images), strict=True):
        torch.testing.assert_close(kept, computed, atol=1e-4, rtol=1e-4)
    positions = torch.tensor([0, 5, 19])
    torch.testing.assert_close(
        cached.train_bank.patches(images[:3], positions),
        fresh.train_bank.patches(images[:3], positions),
        atol=1e-4,
        rtol=1e-4,
    )
    train_step(fresh, images)


def test_results(tiny_run):
    run = tiny_run()
    train(run)
    report, metrics = write_results(run)
    written = json.loads((report.parent / "metrics.json").read_text())
    for figures in (written["baseline"]["unsupervised"], written["hp"]["unsupervised"], written["hp"]["linear"]):
        assert 0 <= figures["miou"] <= figures["accuracy"] <= 100
    assert written["config"]["head"]["dim"] == 16
    assert written["hp"] == metrics["hp"]
    assert [figures["step"] for figures in run.state.history] == list(range(6))
    assert list((report.parent / "tensorboard").glob("events.*"))


def test_the_report_uses_the_backend_of_the_run(tiny_run, monkeypatch):
    run, used = tiny_run(backend="reference"), set()
    for name in ("masked_topk", "hidden_positives"):
        op = getattr(hpkernels, name)
        monkeypatch.setattr(hpkernels, name, lambda *a, op=op, **k: (used.add(k.get("backend")), op(*a, **k))[1])
    run.state.pools.renew_specific(run.train_bank, run.state.ema_head, torch.Generator().manual_seed(0))
    explore(run, 2)
    assert used == {"reference"}


def test_the_log_is_closed_when_training_stops(tiny_run, monkeypatch):
    closed = []
    monkeypatch.setattr(progress.SummaryWriter, "close", lambda writer: closed.append(writer))

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_run())
    assert len(closed) == 1


def test_label_free_folder_trains(tiny_config, photo_folder):
    data = {"name": "folder", "root": str(photo_folder(labels=False)), "size": [32, 40], "clusters": 4}
    run = open_run(tiny_config(data=data))
    train(run)
    report, metrics = write_results(run)
    assert metrics["hp"]["unsupervised"] is None
    assert "linear_probe" not in run.state.history[-1]
    assert report.is_file()


def test_labels_do_not_reach_the_codes(tiny_config, photo_folder):
    roots = [photo_folder(name="with"), photo_folder(labels=False, name="without")]
    heads = []
    for root in roots:
        classes = ["a", "b", "c", "d", "e", "f"]
        data = {"name": "folder", "root": str(root), "size": [32, 40], "classes": classes}
        run = open_run(tiny_config(name=root.name + "run", data=data))
        train(run)
        heads.append(parameters(run.state.head))
    assert torch.equal(*heads)


def test_errors_before_training(tiny_config, photo_folder):
    with pytest.raises(ValueError, match="`warmup` must be less than the 6 steps of the run, got 6"):
        open_run(tiny_config(warmup=6))
    with pytest.raises(ValueError, match="`batch_size` must be at most the 10 training images, got 11"):
        open_run(tiny_config(batch_size=11))
    with pytest.raises(ValueError, match="`device` 'warp' cannot be used here"):
        open_run(tiny_config(device="warp"))
    data = {"name": "folder", "root": str(photo_folder(labels=False)), "size": [32, 40]}
    with pytest.raises(ValueError, match="`data.clusters` must say how many clusters"):
        open_run(tiny_config(data=data))


def test_evaluate_prints_json_alone(tiny_run, capsys):
    run = tiny_run()
    train_step(run, batch(run))
    run.save()
    capsys.readouterr()
    evaluation.main(["--checkpoint", str(run.checkpoint_path), "--json"])
    assert json.loads(capsys.readouterr().out)["images"] == "validation"


def test_command_line_reports_mistakes_in_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="train: config: unknown key `stepz`; did you mean `steps`?"):
        loop.main(["--config", "training/configs/quickstart.yaml", f"output={tmp_path}", "stepz=3"])


@pytest.fixture
def no_backbone(monkeypatch):
    """Fail where a backbone is built: all that is checked must be checked before."""

    def fail(*_):
        raise AssertionError("a backbone was built before the configuration was checked")

    monkeypatch.setattr("training.run.build_backbone", fail)


def test_an_output_that_cannot_be_written_is_refused_at_once(tiny_config, tmp_path, no_backbone):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        with pytest.raises(ValueError, match=r"`output` must be a folder, got the file .*/file$"):
            open_run(tiny_config(name))
    with pytest.raises(ValueError, match="`output` must be a folder to write to, got /proc/run: "):
        open_run(tiny_config("/proc/run"))


@pytest.fixture
def no_cuda_kernels(monkeypatch):
    """The CUDA kernels do not run, as on a machine without a GPU and without their emulator."""
    reason = backends.Availability(False, "PyTorch sees no CUDA device")
    own = backends.availability
    monkeypatch.setattr(
        backends, "availability", lambda op, name, *at: reason if name == "cuda" else own(op, name, *at)
    )


def test_a_backend_that_is_not_there_is_refused_at_once(tiny_config, no_backbone, no_cuda_kernels):
    with pytest.raises(ValueError, match="`backend` 'cuda' cannot be used on cpu: .*'cuda' is not available: "):
        open_run(tiny_config(backend="cuda"))


def test_a_run_without_clusters_is_refused_at_once(tiny_config, photo_folder, no_backbone):
    data = {"name": "folder", "root": str(photo_folder(labels=False)), "size": [32, 40]}
    with pytest.raises(ValueError, match="`data.clusters` must say how many clusters"):
        open_run(tiny_config(data=data))
    with pytest.raises(ValueError, match=r"`data.classes` must name at least 2 classes, got \['all'\]"):
        open_run(tiny_config(data=data | {"classes": ["all"]}))


def test_a_gpu_that_is_not_there_is_named_in_a_few_words(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="^config: `device` 'cuda' cannot be used here: PyTorch finds no GPU$"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="^config: `device` 'cuda:2' cannot be used here: the last GPU is cuda:1$"):
        resolve_device("cuda:2")
    with pytest.raises(ValueError, match="^config: `device` 'meta' cannot be used here: it holds no numbers$"):
        resolve_device("meta")


def test_a_run_goes_on_elsewhere_but_not_with_other_images(tiny_config, photo_folder, tmp_path):
    root = photo_folder()
    data = {"name": "folder", "root": str(root), "size": [32, 40], "classes": ["a", "b", "c", "d", "e", "f"]}
    run = open_run(tiny_config(data=data))
    train_step(run, batch(run))
    run.save()
    moved = root.rename(tmp_path / "moved")
    assert open_run(tiny_config(data=data | {"root": str(moved)}, backend="reference")).state.step == 1
    for kind in ("imgs", "labels"):
        shutil.copy(moved / kind / "train" / "mosaic_0000.png", moved / kind / "train" / "another.png")
    with pytest.raises(ValueError, match="a run on 6 training images, and the 7 of now are not the same"):
        open_run(tiny_config(data=data | {"root": str(moved)}))


def test_a_checkpoint_of_another_kind_of_machine_opens_here(tiny_run, no_cuda_kernels):
    run = tiny_run()
    run.config.backend = "cuda"
    run.save()
    assert open_trained(run.checkpoint_path, "cpu")[0].backend == "auto"
    with pytest.raises(ValueError, match="config: `backend` 'cuda' cannot be used on cpu"):
        open_trained(run.checkpoint_path, "cpu", ["backend=cuda"], ["backend"])
