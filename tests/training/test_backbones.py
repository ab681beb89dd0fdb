"""Backbones: patch tokens, query and key, and weights from every layout."""

import math
from argparse import Namespace

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch

from training.backbones import build_backbone
from training.backbones.patch_dictionary import PatchDictionary
from training.backbones.timm_vit import TimmViT
from training.config import BackboneConfig
from training.data.procedural import ProceduralData

VIT = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return TimmViT(VIT)


@pytest.fixture(scope="module")
def dictionary():
    data = ProceduralData(8, (32, 40), seed=0)
    images = [data.image(index).float() / 255 for index in range(8)]
    backbone = PatchDictionary(features_dim=24, patch_size=8, seed=0)
    backbone.fit(images)
    return backbone, torch.stack(images)


def test_vit_tokens_are_those_of_timm_without_prefix(vit):
    images = torch.rand(2, 3, 32, 48)
    tokens, query, key = vit(vit.normalize(images))
    assert vit.grid((32, 48)) == (2, 3)
    assert tokens.shape == (2, 6, vit.features_dim) == (2, 6, 192)
    assert query.shape == key.shape == (2, 3, 1 + 6, 64)
    assert torch.equal(tokens, vit.vit.forward_features(vit.normalize(images))[:, 1:])


def test_vit_query_and_key_give_the_attention_of_the_last_block(vit):
    images = vit.normalize(torch.rand(1, 3, 32, 48))
    attention = vit.vit.blocks[-1].attn
    seen = []
    hook = attention.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    _, query, key = vit(images)
    hook.remove()
    inputs, output = seen[0]
    value = attention.qkv(inputs).unflatten(2, (3, attention.num_heads, -1))[:, :, 2].transpose(1, 2)
    weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(dim=-1)
    expected = attention.proj((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "eva02_tiny_patch14_224"])
def test_rotary_embedding_is_in_query_and_key(name, monkeypatch):
    backbone, seen, original = TimmViT(name), [], torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, *rest, **options):
        seen.append((query, key))
        return original(query, key, value, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    side = backbone.patch_size
    _, query, key = backbone(torch.randn(1, 3, 2 * side, 3 * side))
    torch.testing.assert_close(query, seen[-1][0])
    torch.testing.assert_close(key, seen[-1][1])


def test_hybrid_vit_is_refused():
    with pytest.raises(ValueError, match="is not a plain ViT"):
        TimmViT("vit_tiny_r_s16_p8_224")


def test_vit_is_frozen(vit):
    assert not any(parameter.requires_grad for parameter in vit.parameters())
    assert not vit.training


def test_vit_normalises_as_timm_says(vit):
    grey = torch.full((1, 3, 16, 16), 0.5)
    mean, std = torch.tensor(vit.vit.pretrained_cfg["mean"]), torch.tensor(vit.vit.pretrained_cfg["std"])
    torch.testing.assert_close(vit.normalize(grey)[0, :, 0, 0], (0.5 - mean) / std)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state},
        lambda state: {"teacher": {f"module.backbone.{name}": value for name, value in state.items()}, "epoch": 3},
        lambda state: {"teacher": {f"backbone.{name}": value for name, value in state.items()}},
        lambda state: {
            "student": {},
            "teacher": {f"backbone.{k}": v for k, v in state.items()},
            "args": Namespace(lr=1),
        },
    ],
    ids=["plain", "timm", "dino distributed", "dino", "dino in full"],
)
def test_vit_weight_layouts(vit, tmp_path, wrap):
    state = {name: value + 0.25 for name, value in vit.vit.state_dict().items()}
    head = {"head.mlp.0.weight": torch.zeros(2, 2)}  # of the self-supervised training, left out
    torch.save(wrap(state | head), tmp_path / "weights.pth")
    loaded = TimmViT(VIT, weights=str(tmp_path / "weights.pth"))
    assert all(torch.equal(value, state[name]) for name, value in loaded.vit.state_dict().items())


def test_vit_selfpatch_layout(tmp_path):
    donor = timm.create_model(VIT, num_classes=0, class_token=False, global_pool="avg")
    blocks = {name: value for name, value in donor.state_dict().items() if not name.startswith("fc_norm")}
    state = {f"module.backbone.{name}": value + 0.01 for name, value in blocks.items()}
    torch.save({"teacher": state}, tmp_path / "selfpatch.pth")
    loaded = TimmViT(VIT, weights=str(tmp_path / "selfpatch.pth"), class_token=False)
    tokens, query, _ = loaded(torch.rand(1, 3, 32, 32))
    assert loaded.prefix_tokens == 0
    assert tokens.shape == (1, 4, 192) and query.shape == (1, 3, 4, 64)
    assert torch.equal(loaded.vit.blocks[0].attn.qkv.weight, state["module.backbone.blocks.0.attn.qkv.weight"])
    # The final LayerNorm acts, without scale and shift.
    torch.testing.assert_close(tokens.mean(dim=-1), torch.zeros(1, 4), atol=1e-3, rtol=0)
    torch.testing.assert_close(tokens.std(dim=-1, correction=0), torch.ones(1, 4), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="lacks cls_token .*`backbone.class_token=false`"):
        TimmViT(VIT, weights=str(tmp_path / "selfpatch.pth"))


def published(vit, **renamed):
    """The state of `vit` with other values, under its author's names."""
    state = {name: torch.rand_like(value) for name, value in vit.state_dict().items()}
    return state, {renamed.get(name, name): value for name, value in state.items()}


def test_ibot_msn_and_mae_layouts(vit, tmp_path):
    state, _ = published(vit.vit)
    module = {f"module.{name}": value for name, value in state.items()}
    student = {"encoder": {name: value + 1 for name, value in module.items()}}
    files = {
        "ibot": {"state_dict": state, "epoch": 800},
        "ibot in full": {
            "student": {f"module.backbone.{name}": value + 1 for name, value in state.items()},
            "teacher": {f"backbone.{name}": value for name, value in state.items()}
            | {"head.mlp.0.bias": torch.ones(2)},
            "args": Namespace(arch="vit_small"),
        },
        "msn": student | {"target_encoder": module | {"module.fc.fc1.weight": torch.ones(2, 2)}, "epoch": 800},
        "mae": {"model": state},
        "mae in full": {
            "model": state | {"mask_token": torch.ones(1, 1, 8), "decoder_embed.weight": torch.ones(8, 192)}
        },
    }
    for name, contents in files.items():
        torch.save(contents, tmp_path / "weights.pth")
        loaded = TimmViT(VIT, weights=str(tmp_path / "weights.pth")).vit.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in loaded.items()), name


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_dinov2_layout(name, tmp_path):
    donor = timm.create_model(name, num_classes=0)
    state, file = published(donor, reg_token="register_tokens")
    if "reg_token" in state:  # its author adds the position embedding of the class token, timm has it in the token
        file["pos_embed"] = torch.cat((torch.rand(1, 1, 384), state["pos_embed"]), dim=1)
        file["cls_token"] = state["cls_token"] - file["pos_embed"][:, :1]
    file["mask_token"] = torch.rand(1, 384)
    torch.save(file, tmp_path / "weights.pth")
    whole = TimmViT(name, weights=str(tmp_path / "weights.pth")).vit.state_dict()
    assert all(torch.allclose(value, state[key], atol=1e-6) for key, value in whole.items())
    chunks = {f"backbone.{key.replace('blocks.', 'blocks.0.', 1)}": value for key, value in file.items()}
    torch.save({"teacher": chunks | {"dino_head.mlp.0.bias": torch.ones(2)}}, tmp_path / "training.pth")
    trained = TimmViT(name, weights=str(tmp_path / "training.pth")).vit.state_dict()
    assert all(torch.equal(value, whole[key]) for key, value in trained.items())


def test_dinov3_layout(tmp_path):
    names = {"reg_token": "storage_tokens"}
    donor = timm.create_model("vit_small_patch16_dinov3_qkvb", num_classes=0)
    for block in range(12):
        names |= {f"blocks.{block}.gamma_{n}": f"blocks.{block}.ls{n}.gamma" for n in (1, 2)}
    state, file = published(donor, **names)
    file |= {"mask_token": torch.rand(1, 384), "rope_embed.periods": torch.rand(16)}
    for block in range(12):
        query, value = (file.pop(f"blocks.{block}.attn.{part}_bias") for part in "qv")
        file[f"blocks.{block}.attn.qkv.bias"] = torch.cat((query, torch.rand(384), value))  # that of the keys is masked
        file[f"blocks.{block}.attn.qkv.bias_mask"] = torch.ones(1152)
    torch.save(file, tmp_path / "weights.pth")
    loaded = TimmViT("vit_small_patch16_dinov3_qkvb", weights=str(tmp_path / "weights.pth")).vit.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())
    # timm's plain name has no biases: a file whose biases are zero fits, another one does not.
    with pytest.raises(ValueError, match="has blocks.0.attn.qkv.bias, which is not zero: choose .*_dinov3_qkvb"):
        TimmViT("vit_small_patch16_dinov3", weights=str(tmp_path / "weights.pth"))
    zero = {key: torch.zeros_like(value) if key.endswith("qkv.bias") else value for key, value in file.items()}
    torch.save(zero, tmp_path / "weights.pth")
    plain = TimmViT("vit_small_patch16_dinov3", weights=str(tmp_path / "weights.pth")).vit.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in plain.items())


def test_safetensors_weights(vit, tmp_path):
    safetensors.torch.save_file(vit.vit.state_dict(), tmp_path / "weights.safetensors")
    loaded = TimmViT(VIT, weights=str(tmp_path / "weights.safetensors"))
    assert torch.equal(loaded.vit.cls_token, vit.vit.cls_token)
    (tmp_path / "weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="weights.safetensors cannot be read as plain tensors: it is damaged"):
        TimmViT(VIT, weights=str(tmp_path / "weights.safetensors"))


def test_position_embeddings_are_brought_to_size(vit, tmp_path):
    state = vit.vit.state_dict()
    torch.save(state | {"pos_embed": torch.ones(1, 1 + 10 * 10, 192)}, tmp_path / "small.pth")
    loaded = TimmViT(VIT, weights=str(tmp_path / "small.pth"))
    torch.testing.assert_close(loaded.vit.pos_embed, torch.ones(1, 197, 192))


def test_weights_of_another_vit_are_refused(vit, tmp_path):
    state = vit.vit.state_dict()
    for more, message in (
        (
            {"patch_embed.proj.weight": torch.zeros(192, 3, 8, 8)},
            r"has patch_embed.proj.weight of shape \(192, 3, 8, 8\)",
        ),
        ({"blocks.12.norm1.weight": torch.zeros(192)}, r"has blocks.12.norm1.weight beyond it \(1 entries\)"),
        ({"blocks.0.ls1.gamma": torch.zeros(192)}, "has blocks.0.ls1.gamma beyond it"),
    ):
        torch.save(state | more, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=f"other.pth does not fit the ViT: it {message}"):
            TimmViT(VIT, weights=str(tmp_path / "other.pth"))


def test_vit_errors(vit, tmp_path):
    with pytest.raises(ValueError, match="timm has no model 'vit_smal_patch8_224.dino'"):
        TimmViT("vit_smal_patch8_224.dino")
    with pytest.raises(ValueError, match="'resnet18' is not a plain ViT"):
        TimmViT("resnet18")
    with pytest.raises(ValueError, match="there is no weight file"):
        TimmViT(VIT, weights=str(tmp_path / "nothing.pth"))
    state = vit.vit.state_dict()
    torch.save({name: value for name, value in state.items() if name != "norm.bias"}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="does not fit the ViT: it lacks norm.bias"):
        TimmViT(VIT, weights=str(tmp_path / "part.pth"))
    torch.save(state | {"norm.bias": torch.zeros(3)}, tmp_path / "shape.pth")
    with pytest.raises(ValueError, match=r"it has norm.bias of shape \(3,\), expected \(192,\)"):
        TimmViT(VIT, weights=str(tmp_path / "shape.pth"))
    torch.save({"note": "no tensors"}, tmp_path / "none.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        TimmViT(VIT, weights=str(tmp_path / "none.pth"))


def test_the_nearest_name_is_suggested():
    with pytest.raises(
        ValueError, match="timm has no model 'vit_smal_patch16_224'; did you mean vit_small_patch16_224 or"
    ):
        TimmViT("vit_smal_patch16_224")
    with pytest.raises(ValueError, match="did you mean vit_small_patch8_224.dino"):
        TimmViT("vit_smal_patch8_224.dino")
    with pytest.raises(ValueError, match="no weights 'dinoo' for vit_small_patch8_224; there are dino"):
        TimmViT("vit_small_patch8_224.dinoo")
    with pytest.raises(ValueError, match="timm has no model 'qqq'; see timm.list_models"):
        TimmViT("qqq")


def test_models_of_other_kinds_are_refused_in_a_few_words():
    for name in ("resnet18", "swin_tiny_patch4_window7_224", "levit_128"):
        with pytest.raises(ValueError, match=f"^backbone: `backbone.name`: {name!r} is not a plain ViT$"):
            TimmViT(name)


@pytest.fixture
def no_hub(monkeypatch):
    """Make the Hub unreachable; the names that it is asked for."""
    asked = []

    def fail(url, **_):
        asked.append(url)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return asked


def test_a_hub_out_of_reach_is_asked_once(no_hub, monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("went on to the download"))
    with pytest.raises(ValueError, match=f"`backbone.pretrained`: the weights of '{VIT}' cannot .* `backbone.weights`"):
        TimmViT(VIT, pretrained=True)
    assert len(no_hub) == 1 and VIT in no_hub[0]


def test_a_download_that_breaks_off_hints_at_local_weights(monkeypatch):
    def fail(*_, **__):
        raise OSError("a page about the cache")

    monkeypatch.setattr(timm, "create_model", fail)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "there")
    with pytest.raises(ValueError, match="cannot be downloaded .* set `backbone.weights` to it instead$"):
        TimmViT(VIT, pretrained=True)


def test_local_weights_need_no_download(vit, tmp_path, no_hub):
    torch.save(vit.vit.state_dict(), tmp_path / "weights.pth")
    loaded = TimmViT(VIT, pretrained=True, weights=str(tmp_path / "weights.pth"))
    assert torch.equal(loaded.vit.cls_token, vit.vit.cls_token) and not no_hub


def test_dictionary_shapes(dictionary):
    backbone, images = dictionary
    tokens, query, key = backbone(images)
    assert tokens.shape == (8, 20, 24) and query.shape == key.shape == (8, 1, 20, 24)
    assert backbone.prefix_tokens == 0
    assert tokens.isfinite().all() and tokens.std() > 0.1


def test_dictionary_is_reproducible_and_saved_whole(dictionary):
    backbone, images = dictionary
    again = PatchDictionary(features_dim=24, patch_size=8, seed=0)
    again.fit(images)
    assert torch.equal(again(images).tokens, backbone(images).tokens)
    restored = PatchDictionary(features_dim=24, patch_size=8, seed=1)
    restored.load_state_dict(backbone.state_dict())
    assert torch.equal(restored(images).tokens, backbone(images).tokens)


def test_dictionary_treats_images_by_themselves(dictionary):
    backbone, images = dictionary
    torch.testing.assert_close(backbone(images[2:3]).tokens, backbone(images).tokens[2:3], atol=1e-4, rtol=1e-4)


def test_dictionary_attends_to_similar_patches(dictionary):
    backbone, images = dictionary
    tokens, query, key = backbone(images)
    logits = (query @ key.mT)[:, 0]
    cosine = torch.nn.functional.normalize(tokens, dim=-1)
    cosine = cosine @ cosine.mT
    correlation = torch.corrcoef(torch.stack((logits.flatten(), cosine.flatten())))[0, 1]
    assert correlation > 0.99


def test_dictionary_takes_flat_images(dictionary):
    backbone, _ = dictionary
    assert backbone(torch.zeros(1, 3, 32, 40)).tokens.isfinite().all()


def test_dictionary_errors():
    with pytest.raises(ValueError, match="`features_dim` must be in"):
        PatchDictionary(features_dim=100_000, patch_size=8)


def test_build_backbone_follows_the_configuration():
    device = torch.device("cpu")
    built = build_backbone(BackboneConfig(name="patch_dictionary", features_dim=12, patch_size=8), 0, device)
    assert isinstance(built, PatchDictionary) and built.features_dim == 12
    assert isinstance(build_backbone(BackboneConfig(name=VIT), 0, device), TimmViT)


def test_random_weights_follow_the_seed():
    config = BackboneConfig(name="vit_tiny_patch16_224")
    before = torch.get_rng_state()
    first, again, other = (build_backbone(config, seed, torch.device("cpu")).vit.cls_token for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())
