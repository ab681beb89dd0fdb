"""The published checkpoint layout, there and back."""

import argparse

import pytest
import torch

from training.backbones import build_backbone
from training.published import export_state, import_state, main
from training.runtime import checkpoint
from training.state import TrainingState

CPU = torch.device("cpu")


@pytest.fixture
def trained(tiny_config):
    config = tiny_config(backbone={"name": "vit_tiny_patch16_224"})
    torch.manual_seed(3)
    backbone = build_backbone(config.backbone, 0, CPU)
    state = TrainingState(config, backbone.features_dim, 6, CPU)
    state.ema_head.w1.weight.data.add_(1)
    state.step = 12
    return config, backbone, state


def test_layout(trained):
    _, backbone, state = trained
    contents = export_state(backbone, state)
    net = contents["net_model_state_dict"]
    assert contents["iter"] == 12
    assert net["cluster1.0.weight"].shape == (16, 192, 1, 1)
    assert net["cluster2.0.weight"].shape == (192, 192, 1, 1)
    assert net["cluster2.2.weight"].shape == net["ema_model2.2.weight"].shape == (16, 192, 1, 1)
    assert torch.equal(net["ema_model1.0.weight"][:, :, 0, 0], state.ema_head.w1.weight)
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.11.mlp.fc2.bias", "norm.weight"):
        assert f"model.{name}" in net
    assert contents["linear_model_state_dict"]["weight"].shape == (6, 16, 1, 1)
    assert contents["cluster_model_state_dict"]["clusters"].shape == (6, 16)


def test_round_trip(trained):
    config, backbone, state = trained
    _, backbone_again, state_again = import_state(config, export_state(backbone, state))
    image, tokens = torch.rand(1, 3, 32, 32), torch.rand(2, 4, 192)
    assert torch.equal(backbone_again(image).tokens, backbone(image).tokens)
    for name in ("head", "ema_head"):
        own, again = getattr(state, name).eval(), getattr(state_again, name).eval()
        assert torch.equal(own(tokens), again(tokens))
    assert torch.equal(state.cluster_probe.clusters, state_again.cluster_probe.clusters)
    assert state_again.step == 12


def test_published_head_computes_the_same_code(trained):
    _, backbone, state = trained
    net = export_state(backbone, state)["net_model_state_dict"]
    features = torch.rand(2, 192, 3, 5)
    conv = torch.nn.functional.conv2d
    hidden = conv(features, net["cluster2.0.weight"], net["cluster2.0.bias"]).relu()
    code = conv(features, net["cluster1.0.weight"], net["cluster1.0.bias"])
    code = code + conv(hidden, net["cluster2.2.weight"], net["cluster2.2.bias"])
    own = state.head.eval()(features.flatten(2).mT).mT.unflatten(2, (3, 5))
    torch.testing.assert_close(own, code, atol=1e-5, rtol=1e-5)


def test_errors(trained, tiny_config):
    config, backbone, state = trained
    contents = export_state(backbone, state)
    with pytest.raises(ValueError, match="has no cluster_model_state_dict; it has epoch, iter, "):
        import_state(config, {key: value for key, value in contents.items() if not key.startswith("cluster_")})
    part = {name: value for name, value in contents["net_model_state_dict"].items() if "ema_model1" not in name}
    message = (
        r"net_model_state_dict has no ema_model1.0.weight, ema_model1.0.bias; it has model.cls_token, .* and \d+ more"
    )
    with pytest.raises(ValueError, match=message):
        import_state(config, contents | {"net_model_state_dict": part})
    part = {name: value for name, value in contents["net_model_state_dict"].items() if name != "model.norm.bias"}
    with pytest.raises(ValueError, match="the checkpoint does not fit the ViT: it lacks norm.bias"):
        import_state(config, contents | {"net_model_state_dict": part})
    with pytest.raises(ValueError, match="cluster_model_state_dict has no clusters; it has nothing"):
        import_state(config, contents | {"cluster_model_state_dict": {}})
    message = r"does not fit `head.dim` 8 .* has w1.weight of shape \(16, 192\), expected \(8, 192\)"
    with pytest.raises(ValueError, match=message):
        import_state(tiny_config(backbone={"name": "vit_tiny_patch16_224"}, head={"dim": 8}), contents)
    with pytest.raises(ValueError, match="must be the timm ViT"):
        import_state(tiny_config(), contents)


def test_command_line(trained, tmp_path, capsys):
    config, backbone, state = trained
    torch.save(export_state(backbone, state), tmp_path / "published.pth")
    preset = tmp_path / "preset.yaml"
    preset.write_text("{steps: 3, warmup: 1, head: {dim: 16}, backbone: {name: vit_tiny_patch16_224}}")
    main(["import", str(tmp_path / "published.pth"), str(tmp_path / "own.pt"), "--config", str(preset)])
    main(["export", str(tmp_path / "own.pt"), str(tmp_path / "back.pth")])
    first = torch.load(tmp_path / "published.pth", weights_only=True)["net_model_state_dict"]
    last = torch.load(tmp_path / "back.pth", weights_only=True)["net_model_state_dict"]
    assert first.keys() == last.keys() and all(torch.equal(first[name], last[name]) for name in first)
    with pytest.raises(SystemExit, match="an import needs --config"):
        main(["import", str(tmp_path / "published.pth"), str(tmp_path / "x.pt")])


def test_nothing_is_overwritten(tmp_path):
    for name in ("own.pt", "photograph.png"):
        (tmp_path / name).write_bytes(b"mine")
        with pytest.raises(SystemExit, match="^published: the target .* is there already: choose another"):
            main(["export", str(tmp_path / "own.pt"), str(tmp_path / name)])
        assert (tmp_path / name).read_bytes() == b"mine"
    with pytest.raises(SystemExit, match="^published: an export takes no --config and no key=value"):
        main(["export", str(tmp_path / "own.pt"), str(tmp_path / "new.pth"), "seed=1"])


def test_a_file_with_the_options_of_its_training_is_read(trained, tmp_path):
    config, backbone, state = trained
    contents = export_state(backbone, state) | {"opt": argparse.Namespace(lr=0.1)}
    torch.save(contents, tmp_path / "published.pth")
    assert import_state(config, checkpoint.load_tensors(tmp_path / "published.pth"))[2].step == 12


def test_an_export_that_cannot_be_written(trained, tmp_path):
    config, backbone, state = trained
    saved = {"config": config.model_dump(), "backbone": backbone.state_dict(), "state": state.state_dict()}
    checkpoint.save(tmp_path / "own.pt", saved)
    with pytest.raises(SystemExit, match="^published: .*own.pt/out.pth cannot be written: "):
        main(["export", str(tmp_path / "own.pt"), str(tmp_path / "own.pt" / "out.pth")])
