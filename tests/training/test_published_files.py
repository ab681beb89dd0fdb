"""Files as the published code writes them: ViT-S/8 and B/8 load, are fitted, scored, predicted with and trained on."""

import json

import pytest
import torch
import yaml
from tiny import tiny_values

from training import evaluate, predict, published, train
from training.config_file import config_from_dict
from training.runtime import checkpoint


def published_file(dim, width, patch, classes, iterations=4):
    """Keys and shapes of a file of the published code with a ViT of 12 blocks; its numbers are stored once each."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + (224 // patch) ** 2, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for block in range(12):
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            shapes |= {f"blocks.{block}.{name}.weight": (rows, columns), f"blocks.{block}.{name}.bias": (rows,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{block}.{name}.{kind}": (width,) for kind in ("weight", "bias")}
    net = {f"model.{name}": torch.rand(shape[-1]).expand(shape) for name, shape in shapes.items()}
    for one, two in (("cluster1", "cluster2"), ("ema_model1", "ema_model2")):
        for name, rows in ((f"{one}.0", dim), (f"{two}.0", width), (f"{two}.2", dim)):
            net |= {f"{name}.weight": torch.randn(rows, width, 1, 1) * 0.1, f"{name}.bias": torch.randn(rows)}
    return {
        "epoch": 1,
        "iter": iterations,
        "best_epoch": 1,
        "best_iter": iterations,
        "net_model_state_dict": net,
        "net_optimizer_state_dict": None,
        "linear_model_state_dict": {"weight": torch.randn(classes, dim, 1, 1), "bias": torch.randn(classes)},
        "linear_optimizer_state_dict": None,
        "cluster_model_state_dict": {"clusters": torch.randn(classes, dim)},
        "cluster_optimizer_state_dict": None,
        "best": 61.2,
    }


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A ViT-S/8 file imported with images: folder, preset and what the import printed."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    torch.save(published_file(70, 384, 8, 6), folder / "published.pth")
    values = tiny_values(folder / "run", head={"dim": 70}, steps=6) | {
        "backbone": {"name": "vit_small_patch8_224.dino", "pretrained": True, "cache": True}
    }
    (folder / "preset.yaml").write_text(yaml.safe_dump(values))
    published.main(
        [
            "import",
            str(folder / "published.pth"),
            str(folder / "run/checkpoint.pt"),
            "--config",
            str(folder / "preset.yaml"),
        ]
    )
    return folder


def test_small_is_fitted_at_import(imported, capsys):
    evaluate.main(["--checkpoint", str(imported / "run/checkpoint.pt"), "--json"])
    metrics = json.loads(capsys.readouterr().out)
    for figures in (
        metrics["baseline"]["unsupervised"],
        *(metrics["hp"][name] for name in ("kmeans", "cluster_probe", "linear")),
    ):
        assert 0 <= figures["accuracy"] <= 100
    modules = checkpoint.load(imported / "run/checkpoint.pt")["state"]["modules"]
    clusterings = modules["clusterings"]
    assert clusterings["fitted"] and clusterings["matched"].all() and clusterings["codes"].any()


def test_small_predicts(imported, photo_folder, tmp_path, capsys):
    images = photo_folder(labels=False, images=2) / "imgs" / "val"
    predict.main(
        ["--checkpoint", str(imported / "run/checkpoint.pt"), "--images", str(images), "--out", str(tmp_path / "out")]
    )
    assert "2 images, 6 classes" in capsys.readouterr().out


def test_small_trains_on_with_the_preset_that_names_downloads(imported, monkeypatch, capsys):
    seen = []
    step = train.train_step

    def spy(run, images):
        if not seen:
            seen.append(
                (run.state.step, run.state.pools.agnostic.vectors.clone(), run.state.pools.specific.vectors.clone())
            )
        return step(run, images)

    monkeypatch.setattr(train, "train_step", spy)
    train.main(["--config", str(imported / "preset.yaml")])
    ((first, agnostic, specific),) = seen
    assert first == 4 and agnostic.any(dim=1).all() and specific.any(dim=1).all()
    assert checkpoint.load(imported / "run/checkpoint.pt")["state"]["step"] == 6
    assert "resuming at step 4 of 6" in capsys.readouterr().out


def test_base(tmp_path):
    contents = published_file(32, 768, 8, 3)
    torch.save(contents, tmp_path / "potsdam.pth")
    assert (tmp_path / "potsdam.pth").stat().st_size < 10e6
    values = tiny_values(tmp_path / "run", head={"dim": 32}, backbone={"name": "vit_base_patch8_224.dino"})
    _, backbone, state = published.import_state(
        config_from_dict(values), checkpoint.load_tensors(tmp_path / "potsdam.pth")
    )
    net = contents["net_model_state_dict"]
    assert all(torch.equal(value, net[f"model.{name}"]) for name, value in backbone.vit.state_dict().items())
    assert torch.equal(state.head.w3.weight, net["cluster2.2.weight"][:, :, 0, 0])
    assert torch.equal(state.ema_head.w1.bias, net["ema_model1.0.bias"])
    assert state.classes == state.clusters == 3


def test_export_has_the_published_keys(imported, tmp_path):
    published.main(["export", str(imported / "run/checkpoint.pt"), str(tmp_path / "back.pth")])
    back, first = (torch.load(file, weights_only=True) for file in (tmp_path / "back.pth", imported / "published.pth"))
    assert first.keys() - back.keys() == {"best", "best_epoch", "best_iter"}
    for part in ("net_model_state_dict", "linear_model_state_dict", "cluster_model_state_dict"):
        assert {name: value.shape for name, value in first[part].items()} == {
            name: value.shape for name, value in back[part].items()
        }


def test_safetensors_there_and_back(imported, tmp_path, capsys):
    own, again = imported / "run/checkpoint.pt", tmp_path / "again.pt"
    published.main(["export", str(own), str(tmp_path / "weights.safetensors")])
    assert json.loads((tmp_path / "weights.json").read_text())["config"]["head"]["dim"] == 70
    published.main(["import", str(tmp_path / "weights.safetensors"), str(again)])
    assert "projection" not in capsys.readouterr().out
    first, last = checkpoint.load(own), checkpoint.load(again)
    for name in ("head", "ema_head", "projection", "linear_probe", "cluster_probe", "clusterings"):
        for key, value in first["state"]["modules"][name].items():
            assert torch.equal(value, last["state"]["modules"][name][key]), (name, key)
    weights = checkpoint.load(own.with_name("backbone.pt"))["backbone"]
    assert all(torch.equal(value, last["backbone"][key]) for key, value in weights.items())
    with pytest.raises(SystemExit, match="^published: the target .*weights.json is there already"):
        (tmp_path / "weights.safetensors").unlink()
        published.main(["export", str(own), str(tmp_path / "weights.safetensors")])


def test_import_without_images_says_what_is_missing(imported, tmp_path, capsys):
    values = yaml.safe_load((imported / "preset.yaml").read_text()) | {"data": {"size": [32, 40]}}
    (tmp_path / "preset.yaml").write_text(yaml.safe_dump(values))
    arguments = [
        "import",
        str(imported / "published.pth"),
        str(tmp_path / "x.pt"),
        "--config",
        str(tmp_path / "preset.yaml"),
    ]
    published.main(arguments)
    said = capsys.readouterr().out
    assert "no projection z of the loss" in said and "the k-means centres are not in the file" in said
    assert not checkpoint.load(tmp_path / "x.pt")["state"]["modules"]["clusterings"]["fitted"]
    arguments[2] = str(tmp_path / "y.pt")
    with pytest.raises(SystemExit, match="^published: `data.classes` must name the 6 classes .* got 2$"):
        published.main([*arguments, "data.classes=[a, b]"])
