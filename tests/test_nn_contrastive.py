"""The modules over `contrastive` that take the place of classes people know, against oracles of those in float64."""

from __future__ import annotations

import inspect

import pytest
import torch
from ranks import raised, run_ranks
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from hpkernels import BackendUnavailableError, contrastive
from hpkernels.nn import ClipLoss, SupConLoss
from hpkernels.testing import helpful_error, unchanged
from tests.ops.oracles import clip, supcon

SAMPLES, VIEWS = 6, 3
# Two samples that share a negative label, and two that are alone with theirs.
LABELS = torch.tensor([0, 1, -1, -1, 1, 2])
GENERATOR = torch.Generator().manual_seed(0)
WEIGHTS = torch.rand(SAMPLES, SAMPLES, generator=GENERATOR, dtype=torch.float64)
WEIGHTS[1] = 0  # a sample whose views have no positives
RELATED = WEIGHTS > 0.5
MASKS = {
    "bool": RELATED,
    "symmetric": RELATED | RELATED.T,
    "float": RELATED.float(),
    "integers": RELATED.to(torch.uint8),
    "weights": WEIGHTS,
    "counts": (WEIGHTS * 4).to(torch.int32),
}


def features_of(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(shape or (SAMPLES, VIEWS, 8), generator=generator, dtype=torch.float64)
    return normalize(rows, dim=-1).to(dtype).requires_grad_()


def images_and_texts(dtype=torch.float64, size=5):
    generator = torch.Generator().manual_seed(2)
    both = normalize(torch.randn(2, size, 8, generator=generator, dtype=torch.float64), dim=-1).to(dtype)
    return [rows.clone().requires_grad_() for rows in both]


def assert_same(actual, expected, inputs, rtol=1e-12):
    gradients = [torch.autograd.grad(loss, inputs) for loss in (actual, expected)]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=0)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=rtol * theirs.abs().max().item())


@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize(
    "given",
    [{}, {"labels": LABELS}, *({"mask": mask} for mask in MASKS.values())],
    ids=["simclr", "labels", *MASKS],
)
def test_supcon(mode, given):
    settings = {"temperature": 0.3, "contrast_mode": mode, "base_temperature": 0.1}
    features = features_of()
    with unchanged(features, *given.values()):
        loss = SupConLoss(**settings)(features, **given)
    assert_same(loss, supcon(features, **given, **settings), features)


@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("given", [{"labels": LABELS}, {"mask": WEIGHTS}], ids=["labels", "weights"])
def test_supcon_of_one_view_counts_samples_without_positives(mode, given):
    features = features_of(SAMPLES, 1, 8)
    loss = SupConLoss(0.3, mode)(features, **given)
    assert_same(loss, supcon(features, **given, temperature=0.3, base_temperature=0.07), features)
    if "labels" in given:
        left_out = contrastive(features[:, 0], positives=LABELS - LABELS.min(), temperature=0.3)
        torch.testing.assert_close(loss, left_out * 4 / SAMPLES * 0.3 / 0.07)


def test_supcon_without_any_positives_is_zero():
    features = features_of(SAMPLES, 1, 8)
    loss = SupConLoss()(features)
    loss.backward()
    assert loss == 0 and not features.grad.any()


@pytest.mark.parametrize("mode", ["all", "one"])
def test_supcon_flattens_features(mode):
    features = features_of(SAMPLES, VIEWS, 2, 2, 3)
    settings = {"temperature": 0.5, "contrast_mode": mode}
    with_strides = features.transpose(0, 1).contiguous().transpose(0, 1)
    for given in (features, with_strides):
        assert_same(SupConLoss(**settings)(given, LABELS), supcon(features, LABELS, **settings) * 0.5 / 0.07, features)


@pytest.mark.parametrize(
    "labels",
    [
        LABELS.to(torch.int8),
        LABELS[:, None],
        LABELS.to(torch.float16),
        LABELS * 2**61,
        (LABELS + 1).to(torch.uint16),
        (LABELS * 2**61).view(torch.uint64),
    ],
    ids=["int8", "column", "float16", "large", "uint16", "uint64"],
)
def test_supcon_takes_labels_of_any_dtype(labels):
    features = features_of()
    assert torch.equal(SupConLoss()(features, labels), SupConLoss()(features, LABELS))


def test_supcon_labels_are_compared_as_they_are():
    features = features_of(3, 1, 8)
    for labels in (torch.tensor([True, False, True]), torch.tensor([0.5, 0.25, 0.5])):
        assert torch.equal(SupConLoss()(features, labels), SupConLoss()(features, torch.tensor([7, 3, 7])))
    assert SupConLoss()(features, torch.full((3,), torch.nan)) == 0


def test_clip():
    images, texts = images_and_texts()
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    with unchanged(images, texts, scale):
        loss = ClipLoss()(images, texts, scale)
    assert_same(loss, clip(images, texts, scale), [images, texts, scale])
    assert torch.equal(ClipLoss()(images, texts, 7.0), loss)
    assert torch.equal(ClipLoss()(images, texts, scale[None]), loss)
    named = ClipLoss(cache_labels=True)(images, texts, scale, output_dict=True)
    assert list(named) == ["contrastive_loss"] and torch.equal(named["contrastive_loss"], loss)


def test_clip_with_a_scale_that_is_learnt_in_half_precision():
    images, texts = images_and_texts(torch.float32)
    scale = torch.tensor(97.0, dtype=torch.float16, requires_grad=True)
    exact = torch.tensor(97.0, requires_grad=True)
    assert torch.equal(ClipLoss()(images, texts, scale), ClipLoss()(images, texts, exact))
    ClipLoss()(images, texts, scale).backward()
    assert scale.grad.dtype == torch.float16


def test_clip_bias_changes_nothing_and_has_a_gradient():
    images, texts = images_and_texts()
    expected = ClipLoss()(images, texts, 7.0)
    bias = torch.tensor([-10.0], requires_grad=True)
    loss = ClipLoss()(images, texts, 7.0, bias)
    loss.backward()
    assert torch.equal(loss, expected) and torch.equal(bias.grad, torch.zeros(1))
    assert torch.equal(ClipLoss()(images, texts, 7.0, -10), expected)


class Towers(torch.nn.Module):
    """Encoders of images and texts, with a scale and a bias, as a model that open_clip trains."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        weights = torch.randn(2, 6, 8, generator=generator, dtype=torch.float64)
        self.image, self.text = (torch.nn.Parameter(weight) for weight in weights)
        self.log_scale, self.bias = (torch.nn.Parameter(torch.tensor(value).double()) for value in (1.0, -10.0))

    def forward(self, images, texts):
        images, texts = normalize(images @ self.image, dim=1), normalize(texts @ self.text, dim=1)
        return images, texts, self.log_scale.exp(), self.bias


PAIRS = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
PARTS = (slice(0, 2), slice(2, 9))


def clip_on_a_rank(rank):
    found = []
    for settings in ({}, {"local_loss": True, "gather_with_grad": True}):
        model = DistributedDataParallel(Towers())
        loss = ClipLoss(**settings, rank=rank, world_size=2)(*model(*PAIRS[:, PARTS[rank]]))
        loss.backward()
        found.append((loss.detach(), {name: value.grad for name, value in model.module.named_parameters()}))
    found.append(raised(ClipLoss(rank=rank, world_size=2), *images_and_texts(), -1.0 if rank else 7.0))
    found.append(raised(ClipLoss(rank=1 - rank, world_size=2), *images_and_texts(), 7.0))
    return found


def test_clip_on_several_ranks(tmp_path):
    """Under DistributedDataParallel, whose gradients are those of one process with the whole batch."""
    model = Towers()
    images, texts, scale, _ = model(*PAIRS)
    loss = clip(images, texts, scale)
    loss.backward()
    for rank, (*found, wrong_scale, error) in enumerate(run_ranks(clip_on_a_rank, 2, tmp_path)):
        for of_rank, gradients in found:
            torch.testing.assert_close(of_rank, loss.detach(), rtol=1e-12, atol=0)
            for name, value in model.named_parameters():
                expected = torch.zeros_like(value) if name == "bias" else value.grad
                torch.testing.assert_close(gradients[name], expected, rtol=0, atol=1e-14)
        assert wrong_scale.startswith(
            "ValueError: ClipLoss: `logit_scale`" if rank else "RuntimeError: ClipLoss: rank 1"
        )
        assert error == (
            "ValueError: ClipLoss: `rank` and `world_size` must be those of the process group,"
            f" {rank} and 2, got {1 - rank} and 2"
        )


def test_modules_say_what_they_are():
    defaults = {"temperature": 0.07, "contrast_mode": "all", "base_temperature": 0.07}
    published = inspect.signature(SupConLoss.__init__).parameters
    assert {name: published[name].default for name in list(published)[1:-1]} == defaults
    assert list(inspect.signature(SupConLoss().forward).parameters) == ["features", "labels", "mask"]
    with pytest.raises(TypeError):
        SupConLoss(0.07, "all", 0.07, "auto")  # what hpkernels adds is given by name
    published = list(inspect.signature(ClipLoss.__init__).parameters)
    assert published[1:4] == ["local_loss", "gather_with_grad", "cache_labels"]
    assert published[4:-1] == ["rank", "world_size", "use_horovod"]
    forward = ["image_features", "text_features", "logit_scale", "logit_bias", "output_dict"]
    assert list(inspect.signature(ClipLoss().forward).parameters) == forward
    module = SupConLoss(0.1, "one", backend="reference")
    assert repr(module) == (
        "SupConLoss(temperature=0.1, contrast_mode='one', base_temperature=0.07, backend='reference')"
    )
    assert "world_size=1" in repr(ClipLoss()) and "local_loss=True" in repr(ClipLoss(True))
    assert not module.state_dict() and not ClipLoss().state_dict()


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.deep)])
def test_compile(dynamic):
    features = features_of(dtype=torch.float32)
    images, texts = images_and_texts(torch.float32)
    scale = torch.tensor(7.0, requires_grad=True)
    calls = [
        (SupConLoss(), (features,), {}),
        (SupConLoss(contrast_mode="one"), (features, LABELS), {}),
        (SupConLoss(), (features,), {"mask": RELATED}),
        (ClipLoss(), (images, texts, scale), {"logit_bias": torch.tensor(1.0)}),
    ]
    for module, tensors, named in calls:
        torch.compiler.reset()
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        inputs = [tensor for tensor in tensors if tensor.requires_grad]
        assert_same(compiled(*tensors, **named), module(*tensors, **named), inputs, rtol=1e-6)


def test_autocast():
    features = features_of(dtype=torch.float32)
    images, texts = images_and_texts(torch.float32)
    expected = [SupConLoss()(features, LABELS), ClipLoss()(images, texts, 7.0)]
    half = ClipLoss()(images.bfloat16(), texts.bfloat16(), 7.0)
    with torch.autocast("cpu", torch.bfloat16):
        actual = [SupConLoss()(features, LABELS), ClipLoss()(images, texts, 7.0)]
        mixed = ClipLoss()(images.bfloat16(), texts, 7.0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(mixed, half, rtol=0, atol=0)


def test_modules_pass_the_backend_on():
    images, texts = images_and_texts()
    for module, arguments in (
        (SupConLoss(backend="cuda"), (features_of(),)),
        (ClipLoss(backend="cuda"), (images, texts, 7.0)),
    ):
        with pytest.raises(BackendUnavailableError):
            module(*arguments)


@pytest.mark.parametrize(
    ("error", "argument", "got", "settings"),
    [
        (ValueError, "temperature", "0", {"temperature": 0}),
        (TypeError, "temperature", "str '1'", {"temperature": "1"}),
        (ValueError, "base_temperature", "-1", {"base_temperature": -1}),
        (ValueError, "contrast_mode", "'some'", {"contrast_mode": "some"}),
        (ValueError, "backend", "'gpu'", {"backend": "gpu"}),
    ],
)
def test_supcon_settings_errors(error, argument, got, settings):
    with helpful_error(error, "SupConLoss", argument, got):
        SupConLoss(**settings)


@pytest.mark.parametrize(
    ("error", "argument", "got", "arguments"),
    [
        (TypeError, "features", "list", {"features": [[1.0]]}),
        (TypeError, "features", "int64", {"features": torch.ones(2, 2, 2).long()}),
        (ValueError, "features", "shape (4, 3)", {"features": torch.ones(4, 3)}),
        (ValueError, "features", "shape (4, 0, 3)", {"features": torch.ones(4, 0, 3)}),
        (TypeError, "labels", "list", {"labels": [0, 1]}),
        (TypeError, "labels", "complex64", {"labels": torch.ones(SAMPLES).to(torch.complex64)}),
        (ValueError, "labels", "shape (5,)", {"labels": LABELS[:5]}),
        (ValueError, "mask", "both", {"labels": LABELS, "mask": RELATED}),
        (TypeError, "mask", "complex64", {"mask": RELATED.to(torch.complex64)}),
        (ValueError, "mask", "shape (6, 5)", {"mask": RELATED[:, :5]}),
        (ValueError, "mask", "-1", {"mask": WEIGHTS - 2 * torch.eye(SAMPLES)}),
        (ValueError, "mask", "nan", {"mask": WEIGHTS * torch.nan}),
        (ValueError, "mask", "inf", {"mask": WEIGHTS / 0}),
        (ValueError, "mask", "requires_grad=True", {"mask": WEIGHTS.clone().requires_grad_()}),
    ],
)
def test_supcon_errors(error, argument, got, arguments):
    with helpful_error(error, "SupConLoss", argument, got):
        SupConLoss()(**{"features": features_of()} | arguments)


@pytest.mark.parametrize(
    ("error", "argument", "got", "settings"),
    [
        (TypeError, "local_loss", "int 1", {"local_loss": 1}),
        (TypeError, "gather_with_grad", "None", {"gather_with_grad": None}),
        (TypeError, "cache_labels", "int 0", {"cache_labels": 0}),
        (ValueError, "use_horovod", "True", {"use_horovod": True}),
        (ValueError, "world_size", "0", {"world_size": 0}),
        (ValueError, "rank", "1", {"rank": 1}),
        (TypeError, "rank", "float 0.0", {"rank": 0.0}),
        (ValueError, "backend", "'gpu'", {"backend": "gpu"}),
    ],
)
def test_clip_settings_errors(error, argument, got, settings):
    with helpful_error(error, "ClipLoss", argument, got):
        ClipLoss(**settings)


@pytest.mark.parametrize(
    ("error", "argument", "got", "arguments"),
    [
        (TypeError, "image_features", "list", {"image_features": [[1.0]]}),
        (ValueError, "image_features", "shape (5,)", {"image_features": torch.ones(5)}),
        (ValueError, "text_features", "shape (4, 8)", {"text_features": torch.ones(4, 8).double()}),
        (TypeError, "text_features", "float32", {"text_features": torch.ones(5, 8)}),
        (ValueError, "logit_scale", "0", {"logit_scale": 0}),
        (TypeError, "logit_scale", "str 'high'", {"logit_scale": "high"}),
        (ValueError, "logit_scale", "-2.0", {"logit_scale": torch.tensor(-2.0)}),
        (ValueError, "logit_scale", "shape (5,)", {"logit_scale": torch.ones(5)}),
        (ValueError, "logit_bias", "shape (5,)", {"logit_bias": torch.ones(5)}),
        (TypeError, "logit_bias", "str 'low'", {"logit_bias": "low"}),
        (TypeError, "output_dict", "int 1", {"output_dict": 1}),
    ],
)
def test_clip_errors(error, argument, got, arguments):
    images, texts = images_and_texts()
    given = {"image_features": images, "text_features": texts, "logit_scale": 7.0} | arguments
    with helpful_error(error, "ClipLoss", argument, got):
        ClipLoss()(**given)
