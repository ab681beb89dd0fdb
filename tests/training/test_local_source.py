"""What local propagation goes by: attention, similarity of tokens, features of a layer; what each of them follows."""

import math

import pytest
import timm
import torch
from torch.nn import functional as F

import hpkernels
from training.backbones import build_backbone
from training.backbones.compare import compare, main, uniform_agreement
from training.backbones.local import SCALE, similarity_as_attention
from training.backbones.timm_vit import TimmViT, default_source
from training.config import BackboneConfig, LocalConfig
from training.model import patch_classes
from training.run import open_run, open_trained

VIT = "vit_tiny_patch16_224"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images():
    """Images (24, 3, 128, 160) of coloured rectangles at random places, and the colours of patches (24, 8, 10)."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(0, 6, (24, 8, 10), generator=generator)
    cells = classes[:, ::3, ::4].repeat_interleave(3, 1).repeat_interleave(4, 2)[:, :8, :10]
    shifts = torch.randint(0, 10, (24, 2), generator=generator).tolist()
    labels = torch.stack([cell.roll(shift, (0, 1)) for cell, shift in zip(cells, shifts, strict=True)])
    colours = torch.randint(0, 256, (6, 3), generator=generator)
    pixels = colours[labels].permute(0, 3, 1, 2).repeat_interleave(16, 2).repeat_interleave(16, 3)
    return pixels.to(torch.uint8), labels


def attends_by_position(source):
    """A ViT of random weights, of which the last block compares nothing but the position embedding."""
    torch.manual_seed(0)
    backbone = TimmViT(VIT, local_source=source)
    vit, part = backbone.vit, 16  # dimensions of the position embedding
    y, x = torch.meshgrid(torch.linspace(-1, 1, 14), torch.linspace(-1, 1, 14), indexing="ij")
    waves = [wave(math.pi / 2 * n * axis) for n in (1, 2, 3, 4) for axis in (y, x) for wave in (torch.sin, torch.cos)]
    vit.pos_embed.zero_()
    vit.pos_embed[0, 1:, :part] = torch.stack(waves, dim=-1).flatten(0, 1) / 2
    # A part that all tokens share keeps the LayerNorm from scaling the position by the content.
    vit.pos_embed[0, :, -part:] = torch.tensor([5.0, -5.0]).repeat(part // 2)
    vit.patch_embed.proj.weight[:part] = 0
    dims = torch.arange(192)
    for weight in vit.blocks[-1].attn.qkv.weight[:384].split(192):
        weight.zero_()
        weight[dims, dims % 64] = 8.0 * (dims % 64 < part)
    return backbone


def test_similarity_is_the_scaled_cosine():
    tokens = torch.randn(2, 5, 24)
    alike = similarity_as_attention(tokens, centre=False)
    cosine = F.cosine_similarity(tokens[:, :, None], tokens[:, None], dim=-1)
    torch.testing.assert_close((alike @ alike.mT)[:, 0] / math.sqrt(24), SCALE * cosine)
    # What all tokens of an image share changes nothing once they are centred.
    moved = similarity_as_attention(tokens + 10, centre=True)
    torch.testing.assert_close(moved, similarity_as_attention(tokens, centre=True), atol=1e-4, rtol=1e-4)


def test_layers_are_those_of_timm():
    torch.manual_seed(0)
    backbone = TimmViT(VIT, layer=3)
    images = torch.rand(2, 3, 32, 48)
    tokens, query, key = backbone(images)
    vit = backbone.vit
    expected = vit.forward_intermediates(images, indices=[2], norm=True, output_fmt="NLC", intermediates_only=True)[0]
    assert torch.equal(tokens, expected)
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    x = vit.blocks[1](vit.blocks[0](x))
    q, k, _ = vit.blocks[2].attn.qkv(vit.blocks[2].norm1(x)).unflatten(2, (3, 3, 64)).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close((query, key), (q, k))


def test_later_blocks_do_not_run_and_attention_stays_fused(monkeypatch):
    backbone, calls, original = TimmViT(VIT, layer=3), [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **o: calls.append(1) or original(*a, **o))
    replaced = F.scaled_dot_product_attention
    backbone(torch.rand(1, 3, 32, 32))
    assert len(calls) == 3
    assert F.scaled_dot_product_attention is replaced


def test_layer_of_a_rotary_vit(monkeypatch):
    backbone, seen, original = TimmViT("vit_small_patch16_dinov3", layer=2), [], F.scaled_dot_product_attention

    def spy(query, key, value, *rest, **options):
        seen.append((query, key))
        return original(query, key, value, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    _, query, key = backbone(torch.randn(1, 3, 32, 48))
    assert len(seen) == 2
    torch.testing.assert_close((query, key), seen[1])


def test_sources():
    images = torch.rand(2, 3, 32, 48)
    found = {}
    for source, layer in (("features", 3), ("tokens", None), ("attention", None)):
        torch.manual_seed(0)
        found[source] = build_backbone(BackboneConfig(name=VIT), 0, CPU, LocalConfig(source=source, layer=layer))
    tokens, query, key = found["tokens"](images)
    assert torch.equal(query, similarity_as_attention(tokens, centre=True)) and torch.equal(query, key)
    assert found["tokens"].prefix_tokens == found["features"].prefix_tokens == 0
    assert found["attention"].prefix_tokens == 1 and found["attention"](images).query.shape == (2, 3, 7, 64)
    last, query, _ = found["features"](images)
    assert torch.equal(last, tokens)
    torch.manual_seed(0)
    assert torch.equal(query, similarity_as_attention(TimmViT(VIT, layer=3)(images).tokens, centre=True))
    weights = hpkernels.local_propagation_weights(query, query, (2, 3), prefix_tokens=0)
    assert weights.shape == (2, 9, 2, 3) and weights.std() > 0


def test_a_run_and_its_checkpoint_go_by_the_configured_source(tiny_config):
    config = tiny_config(
        backbone={"name": VIT, "cache": True},
        local={"source": "features", "layer": 2},
        data={"name": "procedural", "size": [32, 48], "train_images": 10, "val_images": 4},
    )
    run = open_run(config)
    run.save()
    _, restored, _ = open_trained(run.checkpoint_path)
    for backbone in (run.backbone, restored):
        assert (backbone.local_source, backbone.local_layer, backbone.prefix_tokens) == ("features", 2, 0)
    images = torch.stack([run.train_bank.data.image(index) for index in (3, 5)]).float() / 255
    alike = run.backbone(run.backbone.normalize(images)).query
    expected = hpkernels.local_propagation_weights(alike, alike, run.train_bank.grid, prefix_tokens=0)
    torch.testing.assert_close(run.train_bank.get(torch.tensor([3, 5])).weights, expected)


@pytest.mark.parametrize(
    "name, source",
    [
        ("vit_small_patch8_224.dino", "attention"),
        ("vit_base_patch16_224.mae", "attention"),
        ("vit_small_patch14_dinov2.lvd142m", "tokens"),
        ("vit_small_patch14_reg4_dinov2.lvd142m", "tokens"),
        ("vit_small_patch16_dinov3.lvd1689m", "tokens"),
        ("eva02_tiny_patch14_224", "tokens"),
    ],
)
def test_default_source(name, source):
    with torch.device("meta"):
        assert default_source(name, timm.create_model(name, num_classes=0)) == source


def test_errors():
    for backbone, local, message in (
        ({"name": VIT, "layer": 13}, {}, "`backbone.layer` must be at most the 12 blocks of vit_tiny_patch16_224"),
        ({"name": VIT}, {"source": "features", "layer": 13}, "`local.layer` must be at most the 12 blocks"),
        ({"name": VIT}, {"source": "tokens", "layer": 2}, "`local.layer` must be null unless"),
        ({"name": "patch_dictionary", "layer": 2}, {}, "`backbone.layer` must be null, as patch_dict"),
        ({"name": "patch_dictionary"}, {"source": "features", "layer": 1}, "`local.layer` must be null, as patch_dict"),
    ):
        with pytest.raises(ValueError, match=f"^config: {message}"):
            build_backbone(BackboneConfig(**backbone), 0, CPU, LocalConfig(**local))


def test_attention_can_follow_position_where_tokens_follow_content(images):
    attention, tokens = (compare(attends_by_position(source), *images, 6) for source in ("attention", "tokens"))
    assert attention.position > 0.8 and tokens.position < 0.1
    assert attention.key_position > 0.9 and tokens.key_position < 0.1
    uniform = uniform_agreement(images[1])
    assert abs(attention.same_class - uniform) < 0.05 and tokens.same_class > uniform + 0.2


def test_agreement_by_hand():
    labels = torch.zeros(1, 32, 48, dtype=torch.int64)
    labels[:, :, 32:] = 1
    labels[:, :16, :16] = -1
    found = patch_classes(labels, (2, 3), 2)
    assert found.tolist() == [[[-1, 0, 1], [0, 0, 1]]]
    # Pairs of neighbours, void left out: 0-0 three, 1-1 one, 0-1 four.
    assert uniform_agreement(found) == pytest.approx(4 / 8)


def test_command_line(tmp_path, capsys, photo_folder):
    preset = tmp_path / "preset.yaml"
    preset.write_text(
        "{steps: 3, warmup: 1, data: {size: [32, 48], classes: [a, b, c]}, backbone: {name: vit_tiny_patch16_224}}"
    )
    main(["--config", str(preset), f"data.root={photo_folder()}", "local.layer=4"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:24].strip() for line in lines[1:]] == [
        "attention",
        "tokens",
        "features of layer 4",
        "all neighbours alike",
        "the classes themselves",
    ]
    with pytest.raises(SystemExit, match="^backbones.compare: .*`data.root`"):
        main(["--config", str(preset)])
