"""Images and labels decoded ahead: by any number of workers the same, in order, and with the same errors."""

import os
import signal

import pytest
import torch
from PIL import Image

from training import train as loop
from training.data.loading import Ahead, decode, default_workers
from training.features import bank as features
from training.run import open_run
from training.train import batch, train

BACKBONE = {"name": "patch_dictionary", "patch_size": 8, "features_dim": 24}


@pytest.fixture
def folder_config(tiny_config, photo_folder):
    """A run on photographs; keyword arguments are of `data` and `backbone`, and `top`-level entries."""
    roots = []

    def make(name, workers=0, cache="none", views=0, **top):
        if not roots:
            roots.append(photo_folder())
        data = {"name": "folder", "root": str(roots[0]), "size": [32, 40], "classes": list("abcdef")}
        backbone = BACKBONE | {"cache": cache, "views": views}
        return tiny_config(name, steps=4, warmup=1, data=data | {"workers": workers}, backbone=backbone, **top)

    return make


def interrupt():
    raise KeyboardInterrupt


def test_any_number_of_workers_gives_the_same_run(folder_config):
    states = []
    for workers in (0, 2):
        run = open_run(folder_config(f"workers{workers}", workers))
        train(run)
        states.append(run.state)
    assert all(state.history == states[0].history for state in states)
    for name, value in states[0].head.state_dict().items():
        assert all(torch.equal(value, state.head.state_dict()[name]) for state in states), name


def test_batches_come_ahead_and_others_in_between(folder_config, monkeypatch):
    bank = open_run(folder_config("run", workers=2)).train_bank
    batches = [torch.tensor([0, 1]), torch.tensor([5, 4]), torch.tensor([1, 2])]
    expected = [decode(bank.data, images, pixels=True, labels=True) for images in batches]
    others = decode(bank.data, torch.tensor([3]), pixels=True, labels=True)
    decoded = []
    monkeypatch.setattr(
        features, "decode", lambda data, images, **asked: (decoded.append(images), decode(data, images, **asked))[1]
    )
    with bank.ahead(batches, views=True):
        for images, batch in zip(batches, expected, strict=True):
            assert torch.equal(bank.labels(torch.tensor([3])), others.labels.long())
            assert torch.equal(bank._pixels(images), batch.pixels / 255)
            assert torch.equal(bank.labels(images), batch.labels.long())
            with bank.ahead([torch.tensor([2, 2])], views=True):
                assert bank._pixels(torch.tensor([2, 2])).shape == (2, 3, 32, 40)
    assert {tuple(images.tolist()) for images in decoded} == {(3,)}, "all others came from workers"


def test_a_resumed_run_begins_at_its_step(folder_config, monkeypatch):
    asked = []
    take = Ahead.take
    monkeypatch.setattr(Ahead, "take", lambda ahead, images: (asked.append(found := take(ahead, images)), found)[1])
    run = open_run(folder_config("run", workers=1))
    step = loop.train_step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "train_step", lambda run, images: interrupt() if run.state.step == 3 else step(run, images))
        train(run)
    asked.clear()
    resumed = open_run(folder_config("run", workers=1))
    assert resumed.state.step == 2
    asked.clear()
    train(resumed)
    assert [found.images.tolist() for found in asked if found is not None][-1] == batch(resumed, 3).tolist()
    assert None not in asked, "every batch came ahead"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_cannot_be_read_is_named(folder_config, tmp_path, workers):
    run = open_run(folder_config("run", workers))
    file = tmp_path / "photos" / "imgs" / "train" / "mosaic_0004.png"
    file.write_bytes(file.read_bytes()[:400])
    with pytest.raises(ValueError, match=r"^data: the image file \S*mosaic_0004.png cannot be read: [^\n]*$"):
        train(run)


class Dying:
    """Images whose worker is killed."""

    def image(self, index):
        if index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(3, 2, 2, dtype=torch.uint8)


def test_a_killed_worker_is_told():
    ahead = Ahead(Dying(), [torch.tensor([0]), torch.tensor([1])], 1, pixels=True, labels=False, pin=False)
    with pytest.raises(OSError, match="a process that decodes images was killed, .*`data.workers` sets how many"):
        for index in (0, 1):
            assert ahead.take(torch.tensor([index])) is not None


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_workers_leave_signals_to_the_process_that_trains(folder_config, sent):
    """A terminal and Slurm send them to all processes of a job."""
    data, others = open_run(folder_config("run")).train_bank.data, children()
    ahead = Ahead(data, torch.arange(6).split(1), 1, pixels=True, labels=False, pin=False)
    assert ahead.take(torch.tensor([0])) is not None
    (worker,) = children() - others
    os.kill(worker, sent)
    for index in range(1, 6):
        assert ahead.take(torch.tensor([index])) is not None
    ahead.close()
    assert worker not in children()


def children():
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return {int(child) for child in file.read().split()}


def test_the_global_generator_is_left_alone(folder_config):
    data = open_run(folder_config("run")).train_bank.data
    before = torch.get_rng_state()
    ahead = Ahead(data, torch.arange(3).split(1), 1, pixels=True, labels=True, pin=False)
    assert ahead.take(torch.tensor([0])).labels.dtype == torch.int16
    ahead.close()
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_are_decoded_once_where_features_are_kept(folder_config, monkeypatch, tmp_path):
    run = open_run(folder_config("run", cache="memory", views=1))
    bank = run.train_bank
    expected = torch.stack([bank.data.label(index) for index in (4, 0, 4)])
    assert torch.equal(bank.labels(torch.tensor([4, 0, 4])), expected)
    monkeypatch.setattr(bank.data, "label", lambda _: pytest.fail("decoded again"))
    assert torch.equal(bank.labels(torch.tensor([4, 4])), expected[[0, 0]])


def test_labels_of_all_values_are_kept(tiny_config, photo_folder):
    root = photo_folder()
    for file in (root / "labels" / "train").iterdir():
        with Image.open(file) as label:
            Image.frombytes("L", label.size, bytes(i % 256 for i in range(label.width * label.height))).save(file)
    classes = [f"c{index}" for index in range(255)]
    for cache in ("none", "memory"):
        data = {"name": "folder", "root": str(root), "size": [48, 64], "classes": classes, "clusters": 255}
        bank = open_run(tiny_config(cache, data=data, backbone=BACKBONE | {"cache": cache})).train_bank
        assert bank.labels(torch.tensor([2])).unique().tolist() == list(range(-1, 255))


def test_a_gpu_is_fed_by_workers_and_a_cpu_is_not(monkeypatch):
    monkeypatch.setattr("joblib.cpu_count", lambda: 12)
    gpu = torch.device("cuda")
    assert default_workers(torch.device("cpu")) == 0
    assert default_workers(gpu) == 8
    for processes, workers in (("2", 6), ("16", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert default_workers(gpu) == workers


def test_half_precision_gives_nearly_the_same_features(tiny_config):
    def features_in(precision):
        name = {"name": "vit_tiny_patch16_224", "precision": precision}
        bank = open_run(tiny_config(precision, data={"name": "procedural", "size": 32}, backbone=name)).train_bank
        return bank.get(torch.arange(3)), bank.patches(torch.tensor([1]), torch.tensor([2]))

    exact, patch = features_in("float32")
    for precision, tolerance in (("float16", 0.01), ("bfloat16", 0.05)):
        half, half_patch = features_in(precision)
        for one, other in zip((*exact, patch), (*half, half_patch), strict=True):
            assert other.dtype == torch.float32
            assert not torch.equal(one, other)
            assert (one - other).norm() < tolerance * one.norm()


def test_patches_of_a_pool_run_the_backbone_once_an_image(folder_config, monkeypatch):
    bank = open_run(folder_config("run", pool={"size": 70, "renew_every": 2})).train_bank
    tokens = bank.get(torch.arange(6)).tokens
    images, positions = torch.arange(70) * 5 % 6, torch.arange(70) % 20
    computed = []
    compute = bank._compute
    monkeypatch.setattr(bank, "_compute", lambda some, **rest: (computed.append(len(some)), compute(some, **rest))[1])
    torch.testing.assert_close(bank.patches(images, positions), tokens[images, positions])
    assert sum(computed) == 6


def test_features_beyond_half_precision_are_refused(tiny_config, monkeypatch):
    config = tiny_config(backbone=BACKBONE | {"precision": "float16"})
    run_features = features.features_of
    monkeypatch.setattr(
        features, "features_of", lambda *a, **k: (f := run_features(*a, **k))._replace(tokens=f.tokens / 0)
    )
    with pytest.raises(ValueError, match="`backbone.precision` must be bfloat16 or float32"):
        open_run(config)
