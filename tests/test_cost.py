"""The cost model against counted operations, and its errors."""

import subprocess
import sys

import pytest
import torch

import hpkernels
from hpkernels import PositiveMask
from hpkernels.cost import DEVICES, contrastive_route, estimate
from hpkernels.ops import _coarse
from hpkernels.ops.hidden_positives import cpu as discovery
from hpkernels.ops.masked_topk import cpu as topk
from hpkernels.ops.multi_positive_contrastive import cpu as contrastive


@pytest.fixture
def multiplied(monkeypatch):
    """The FLOPs of each matrix product that the CPU backend makes."""
    counted = []
    kernels, tile = torch.ops.hpkernels_cpu, _coarse.CoarseProducts.tile
    multiply, square_products = kernels.multiply, kernels.square_products

    def counting_tile(self, *blocks):
        products = tile(self, *blocks)
        counted.append(2 * products.numel() * self.left.rows.shape[1])
        return products

    def counting_multiply(left, right, out, accumulate):
        counted.append(2 * out.numel() * left.shape[1])
        multiply(left, right, out, accumulate)

    def counting_square(z, out):
        counted.append(out.numel() * z.shape[1])  # but for the tiles on the diagonal, half of them is copied
        square_products(z, out)

    monkeypatch.setattr(_coarse.CoarseProducts, "tile", counting_tile)
    monkeypatch.setattr(kernels, "multiply", counting_multiply)
    monkeypatch.setattr(kernels, "square_products", counting_square)
    return counted


def test_topk_is_counted(multiplied):
    topk.forward(torch.rand(70, 24), torch.rand(40, 24), 3)
    cost = estimate("masked_topk", N=70, M=40, features_dim=24, k=3, anchors_per_image=70)
    assert sum(multiplied) == cost.routes["product"].flops


def test_discovery_is_counted(multiplied, monkeypatch):
    monkeypatch.setattr(discovery, "_ROWS", 32)  # the smallest blocks, which come nearest to half of the products
    discovery.forward(torch.rand(960, 24), torch.rand(960))
    flops = estimate("hidden_positives", N=960, features_dim=24, anchors_per_image=960).routes["symmetric"].flops
    assert flops <= sum(multiplied) <= 1.05 * flops


def test_discovery_between_anchors_and_keys_is_counted(multiplied):
    thresholds = torch.rand(70), torch.rand(100)
    discovery.between(torch.rand(70, 24), torch.rand(100, 24), *thresholds, either=False, first=None)
    cost = estimate("hidden_positives", N=70, keys=100, features_dim=24).routes["between"]
    assert sum(multiplied) == cost.flops


def test_positives_that_are_not_symmetric_are_transposed():
    sizes = {"N": 960, "anchors_per_image": 96, "device": "CPU"}
    both, own = (estimate("multi_positive_contrastive", symmetric=way, **sizes).routes for way in (True, False))
    assert own.keys() == both.keys()
    for route, cost in own.items():
        assert cost.flops == both[route].flops
        assert cost.workspace - both[route].workspace == 2 * 960**2 / 8  # of A and S


@pytest.mark.parametrize("route", ["images", "blocks"])
def test_blocks_of_the_loss_are_counted(multiplied, monkeypatch, route):
    monkeypatch.setattr(contrastive, "choose_route", lambda *_: route)
    monkeypatch.setattr(contrastive, "_SIDE", 20)
    z = torch.nn.functional.normalize(torch.rand(60, 8)).requires_grad_()
    mask = PositiveMask.from_labels(torch.arange(60) // 20)
    loss = hpkernels.multi_positive_contrastive(z, mask, anchors_per_image=20, negative_rate=0.0, backend="cpu")
    loss.backward()
    sizes = {"N": 60, "D": 8, "anchors_per_image": 20, "negative_rate": 0.0}
    costs = estimate("multi_positive_contrastive", **sizes, density=19 / 60, within_image_share=1.0, device="CPU")
    assert sum(multiplied) == costs.routes[route].flops


def test_loss_is_the_sum_of_its_parts():
    sizes = {"N": 3136, "dtype": "float32", "device": "CPU", "density": 0.01}
    whole = estimate("ghp_contrastive", **sizes).routes["images"]
    parts = [estimate("multi_positive_contrastive", **sizes).routes["images"].flops * 2]
    for dim in (384, 512):
        parts += [
            estimate(op, N=3136, features_dim=dim).routes[route].flops
            for op, route in (("masked_topk", "product"), ("hidden_positives", "symmetric"))
        ]
    assert whole.flops == pytest.approx(sum(parts))


def test_roofline():
    device = DEVICES["A100"]
    cost = estimate("masked_topk", N=7840, M=2048, features_dim=384, device="A100").routes["product"]
    assert cost.bound == "compute" and cost.milliseconds == pytest.approx(1e3 * cost.flops / 312e12)
    cost = estimate("local_propagation", device="A100").routes["stencil (cached weights)"]
    assert cost.bound == "memory" and cost.milliseconds == pytest.approx(1e3 * cost.bytes / device.bandwidth)


def test_the_routes_of_a_gpu():
    """Lists for the paper's 2 % of negatives, blocks where all are; twice the images, four times the products."""
    few, all_of_them = (estimate("multi_positive_contrastive", negative_rate=rate, device="H100") for rate in (0.02, 1))
    assert (few.best, all_of_them.best) == ("lists", "blocks")
    assert few.routes["blocks"].flops == 6 * 50176**2 * 512
    assert few.routes["lists"].flops == (6 * 50176 * 784 + (8 * 0.02 + 6 * 0.0002) * 50176**2) * 512
    larger = estimate("multi_positive_contrastive", images=128, device="H100")
    assert larger.routes["blocks"].flops == 4 * few.routes["blocks"].flops


def test_route_follows_the_pairs():
    assert contrastive_route(1000, 100, pairs=1000, within_images=1000) == "pairs"
    assert contrastive_route(1000, 100, pairs=60_000, within_images=58_000) == "images"
    assert contrastive_route(1000, 100, pairs=900_000, within_images=90_000) == "blocks"


def test_needs_no_torch():
    code = "import runpy, sys; runpy.run_path('hpkernels/cost.py'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=__file__.rsplit("/tests/", 1)[0])


@pytest.mark.parametrize(
    ("op", "options", "message"),
    [
        ("topk", {}, "estimate: `op` must be one of masked_topk, .* got 'topk'"),
        ("masked_topk", {"dtype": "int8"}, "estimate: `dtype` must be one of float16, .* got 'int8'"),
        ("masked_topk", {"device": "B300"}, "estimate: `device` must be one of H200, .* got 'B300'"),
        ("masked_topk", {"N": 0}, "estimate: `N` must be at least 1, got 0"),
        ("ghp_contrastive", {"N": 100}, "estimate: `anchors_per_image` must divide N = 100, got 784"),
        ("ghp_contrastive", {"density": 1.5}, r"estimate: `density` must be in \[0, 1\], got 1.5"),
    ],
)
def test_errors(op, options, message):
    with pytest.raises(ValueError, match=message):
        estimate(op, **options)
