"""Features on disk: what is read is what was written, and what cannot be trusted is computed again."""

import multiprocessing
import os
import shutil
import signal
import time
from collections import namedtuple

import pytest
import torch

from training.config_file import config_from_dict
from training.features import cache as feature_cache
from training.features.bank import FeatureBank
from training.features.cache import CHUNK, default_folder, hash_of, open_cache
from training.run import open_run
from training.runtime import checkpoint
from training.runtime.parallel import share
from training.train import train, train_step

IMAGES = 2 * CHUNK + 5
ARRAYS = {"tokens": (3, 4), "weights": (9, 1, 3)}


def values(images):
    """What is kept of images: numbers that float16 holds."""
    return [
        images.float().view(-1, *[1] * len(shape)) + torch.arange(torch.Size(shape).numel()).view(shape) / 16
        for shape in ARRAYS.values()
    ]


class Computing:
    """Computes what is asked for, and remembers which images that were."""

    def __init__(self, fail_after=None):
        self.images = []
        self.fail_after = fail_after

    def __call__(self, batches):
        for batch in batches:
            if self.fail_after is not None and len(self.images) >= self.fail_after:
                raise KeyboardInterrupt
            self.images += batch.tolist()
            yield values(batch)


def opened(folder, computing, **identity):
    found = open_cache(folder, {"backbone": "a"} | identity, IMAGES, ARRAYS, computing, "features")
    for array, expected in zip(found, values(torch.arange(IMAGES)), strict=True):
        assert array.dtype == torch.float16 and torch.equal(array.float(), expected)
    return found


def files(folder):
    (cache,) = [entry for entry in folder.iterdir() if entry.is_dir()]
    return {file.name: file for file in cache.iterdir()}


@pytest.fixture
def built(tmp_path):
    computing = Computing()
    opened(tmp_path, computing)
    assert computing.images == list(range(IMAGES))
    return tmp_path


def again(folder):
    """Open a cache once more; which images were computed for it."""
    computing = Computing()
    opened(folder, computing)
    return computing.images


def test_a_cache_is_announced_and_computed_once(tmp_path, capsys):
    assert again(tmp_path) == list(range(IMAGES))
    assert capsys.readouterr().err.startswith(f"features: {IMAGES} images, 0.0 MB, into {tmp_path}")
    assert again(tmp_path) == []
    assert not capsys.readouterr().err


@pytest.mark.parametrize("identity", [{"backbone": "b"}, {"size": [32, 40]}])
def test_another_identity_is_another_cache(built, identity):
    computing = Computing()
    opened(built, computing, **identity)
    assert computing.images == list(range(IMAGES))
    assert again(built) == []


def test_another_version_is_another_cache(built, monkeypatch):
    monkeypatch.setattr(feature_cache, "VERSION", feature_cache.VERSION + 1)
    assert again(built) == list(range(IMAGES))


def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)


SECOND = list(range(CHUNK, 2 * CHUNK))
LAST = list(range(2 * CHUNK, IMAGES))
DAMAGE = {
    "a flipped bit": (lambda f: flip(f["tokens.float16"], 24 * CHUNK + 7), SECOND),
    "a flipped bit in the other array": (lambda f: flip(f["weights.float16"], 54 * CHUNK), SECOND),
    "cut off": (lambda f: os.truncate(f["tokens.float16"], 24 * 2 * CHUNK + 1), LAST),
    "too long": (lambda f: os.truncate(f["tokens.float16"], 24 * IMAGES + 100), []),
    "an array is gone": (lambda f: f["weights.float16"].unlink(), list(range(IMAGES))),
    "emptied": (lambda f: os.truncate(f["weights.float16"], 0), list(range(IMAGES))),
    "no checksums": (lambda f: f["checksums"].unlink(), list(range(IMAGES))),
    "foreign checksums": (lambda f: f["checksums"].write_bytes(b"\xff\x00 1 2\nno\n"), list(range(IMAGES))),
    "a checksum was cut off": (lambda f: os.truncate(f["checksums"], f["checksums"].stat().st_size - 3), LAST),
    "foreign description": (lambda f: f["meta.json"].write_text('{"backbone": "b"}'), list(range(IMAGES))),
    "no description": (lambda f: f["meta.json"].unlink(), list(range(IMAGES))),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_computed_again_and_nothing_else(built, damage, capsys):
    do, expected = DAMAGE[damage]
    do(files(built))
    capsys.readouterr()
    assert again(built) == expected
    told = capsys.readouterr().err
    assert ("are missing or damaged, and are computed now" in told) == (0 < len(expected) < IMAGES)
    assert again(built) == []


def test_an_interrupted_build_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path, Computing(fail_after=CHUNK))
    assert again(tmp_path) == list(range(CHUNK, IMAGES))


def build(folder, log):
    def slow(batches):
        for batch in batches:
            time.sleep(0.2)
            with open(log, "a") as file:
                file.write(f"{int(batch[0])}\n")
            yield values(batch)

    opened(folder, slow)


def test_of_two_processes_one_computes(tmp_path):
    log = tmp_path / "log"
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=build, args=(tmp_path / "caches", log)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert log.read_text().split() == ["0", str(CHUNK), str(2 * CHUNK)]


def test_a_killed_build_holds_no_lock_and_leaves_nothing_that_is_trusted_unchecked(tmp_path):
    log = tmp_path / "log"
    process = multiprocessing.get_context("fork").Process(target=build, args=(tmp_path / "caches", log))
    process.start()
    while not (log.exists() and log.read_text()):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    computed = again(tmp_path / "caches")
    assert computed[-5:] == LAST and set(range(IMAGES)) - set(computed) <= set(range(CHUNK))


def test_too_little_space_is_told_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 2000))
    with pytest.raises(ValueError, match=r"`backbone.cache_dir` must have 0.0 MB free, got 0.0 MB in .*69 images"):
        opened(tmp_path, Computing())
    assert not any(file.stat().st_size for name, file in files(tmp_path).items() if name.endswith("float16"))


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`backbone.cache_dir` must be a folder, got the file"):
        opened(tmp_path / "file", Computing())


@pytest.mark.parametrize("value", [float("nan"), 1e5])
def test_values_beyond_float16_are_refused(tmp_path, value):
    def compute(batches):
        for batch in batches:
            yield [torch.full_like(array, value) for array in values(batch)]

    with pytest.raises(ValueError, match="beyond float16"):
        opened(tmp_path, compute)
    assert again(tmp_path) == list(range(IMAGES))


def test_the_default_folder_is_that_of_the_users_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "hpkernels" / "features"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_folder() == tmp_path / "home" / ".cache" / "hpkernels" / "features"


def test_the_hash_of_weights_sees_every_tensor():
    layer = torch.nn.BatchNorm1d(3)
    before = hash_of(layer)
    assert hash_of(layer) == before
    layer.running_mean[1] += 1e-6
    assert hash_of(layer) != before


@pytest.fixture
def disk_config(tiny_config, tmp_path):
    """A tiny run with its features on disk; keyword arguments are of its backbone."""

    def make(name="run", cache="disk", views=1, **top):
        backbone = {"name": "patch_dictionary", "patch_size": 8, "features_dim": 24, "cache": cache, "views": views}
        return tiny_config(name, backbone=backbone | {"cache_dir": str(tmp_path / "caches")}, **top)

    return make


def test_a_run_on_disk_is_that_in_memory_with_rounded_features(disk_config):
    runs = {cache: open_run(disk_config(cache, cache)) for cache in ("memory", "disk")}
    images = torch.tensor([7, 2, 7, 0])
    memory, disk = (runs[cache].train_bank for cache in runs)
    for kept, rounded in zip(memory.get(images), disk.get(images), strict=True):
        assert rounded.dtype == torch.float32
        assert torch.equal(rounded, kept.half().float())
    whole = share(len(images))
    views = [bank.photometric_tokens(images, torch.Generator().manual_seed(1), whole) for bank in (memory, disk)]
    assert torch.equal(views[1], views[0].half().float())
    patches = [bank.patches(images, torch.tensor([1, 5, 0, 3])) for bank in (memory, disk)]
    assert torch.equal(patches[1], patches[0].half().float())
    for run in runs.values():
        train(run)
    losses = [[figures["loss"] for figures in run.state.history] for run in runs.values()]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_renewal_reads_patches_and_runs_no_backbone(disk_config, monkeypatch):
    run = open_run(disk_config())
    monkeypatch.setattr(FeatureBank, "_compute", lambda *_, **__: pytest.fail("the backbone ran"))
    monkeypatch.setattr(FeatureBank, "_tokens_of_view", lambda *_: pytest.fail("the backbone ran"))
    train_step(run, torch.arange(4))


def test_runs_share_a_cache_and_get_the_same_bits(disk_config, tmp_path, monkeypatch):
    states = []
    for name in ("first", "second"):
        run = open_run(disk_config(name))
        if name == "second":
            monkeypatch.setattr(FeatureBank, "_compute", lambda *_, **__: pytest.fail("computed again"))
        train(run)
        states.append(run.state)
    for first, second in zip(*(state.head.parameters() for state in states), strict=True):
        assert torch.equal(first, second)


def test_changed_photographs_make_another_cache(disk_config, photo_folder, tmp_path):
    root = photo_folder(labels=False)
    data = {"name": "folder", "root": str(root), "size": [32, 40], "clusters": 3}
    caches = tmp_path / "caches"
    open_run(disk_config("one", views=0, data=data))
    before = set(caches.iterdir())
    moved = root.rename(tmp_path / "moved")
    open_run(disk_config("two", views=0, data=data | {"root": str(moved)}))
    assert set(caches.iterdir()) == before, "the same photographs elsewhere"
    os.utime(moved / "imgs" / "train" / "mosaic_0003.png", ns=(1, 1))
    open_run(disk_config("three", views=0, data=data | {"root": str(moved)}))
    assert len(set(caches.iterdir()) - before) == 1, "of the training images alone"


@pytest.mark.parametrize("old, cache", [(True, "memory"), ("on", "memory"), (False, "none"), ("disk", "disk")])
def test_caches_of_older_configurations(old, cache):
    assert config_from_dict({"steps": 200, "backbone": {"cache": old}}).backbone.cache == cache


def test_another_cache_is_refused():
    with pytest.raises(ValueError, match="`backbone.cache` must be none or memory or disk, got ram"):
        config_from_dict({"steps": 200, "backbone": {"cache": "ram"}})


def test_a_run_of_an_older_version_goes_on(disk_config):
    run = open_run(disk_config(cache="memory"))
    run.save()
    saved = checkpoint.load(run.checkpoint_path)
    saved["config"]["backbone"] |= {"cache": True}
    for key in ("precision", "cache_dir"):
        del saved["config"]["backbone"][key]
    checkpoint.save(run.checkpoint_path, saved)
    assert open_run(disk_config(cache="memory")).state.step == 0
    with pytest.raises(ValueError, match="differs in backbone.cache;"):
        open_run(disk_config(cache="disk"))
