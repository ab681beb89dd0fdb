"""ViTs of the shapes of DINOv2 and DINOv3, with random weights, through train, evaluate and predict."""

import json

import pytest
import yaml
from tiny import tiny_values

from training import evaluate, predict, train
from training.runtime import checkpoint


@pytest.mark.parametrize(
    "name, size",
    [
        ("vit_small_patch14_dinov2", [56, 70]),
        ("vit_small_patch16_dinov3", [64, 80]),
    ],
)
def test_train_evaluate_predict(name, size, tmp_path, photo_folder, capsys):
    values = tiny_values(tmp_path / "run", steps=2, warmup=1, backbone={"name": name, "layer": 2, "cache": True})
    values["data"] = values["data"] | {"size": size}
    (tmp_path / "preset.yaml").write_text(yaml.safe_dump(values))
    images, own = photo_folder(labels=False, images=2) / "imgs" / "val", tmp_path / "run" / "checkpoint.pt"
    for program, arguments in (
        (train, ["--config", tmp_path / "preset.yaml"]),
        (evaluate, ["--checkpoint", own, "--json"]),
        (predict, ["--checkpoint", own, "--images", images, "--out", tmp_path / "out"]),
    ):
        capsys.readouterr()
        program.main([str(argument) for argument in arguments])
        if program is evaluate:
            assert 0 < json.loads(capsys.readouterr().out)["hp"]["kmeans"]["accuracy"] <= 100
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    assert checkpoint.load(own)["config"]["local"]["source"] == "auto"
