from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from training.probes import ClusterProbe, LinearProbe


@pytest.fixture
def probe(golden):
    case = golden("cluster_probe")
    probe = ClusterProbe(case.clusters.shape[1], case.clusters.shape[0]).double()
    probe.load_state_dict({"clusters": case.clusters})
    return case, probe


def test_cluster_probe_golden(probe):
    case, probe = probe
    loss, onehot = probe(case.code.double())
    loss.backward()
    assert loss.item() == pytest.approx(case.loss.item(), abs=1e-9)
    assert torch.equal(onehot.to(torch.uint8), case.onehot)
    torch.testing.assert_close(probe.clusters.grad, case.grad_clusters, rtol=0, atol=1e-9)


def test_cluster_probe_golden_log_probabilities(probe):
    case, probe = probe
    log_probabilities = probe.log_probabilities(case.code.double(), alpha=2)
    torch.testing.assert_close(log_probabilities, case.log_probs_alpha2, rtol=0, atol=1e-9)


def test_cluster_probe_sees_directions_only(probe):
    case, probe = probe
    loss, onehot = probe(case.code.double())
    with torch.no_grad():
        probe.clusters.mul_(torch.linspace(0.1, 10, 7)[:, None])
    scaled_loss, scaled_onehot = probe(7 * case.code.double())
    torch.testing.assert_close(loss, scaled_loss)
    assert torch.equal(onehot, scaled_onehot)


def test_cluster_probe_loss_falls_to_minus_one():
    torch.manual_seed(0)
    directions = F.normalize(torch.randn(3, 8), dim=1)
    code = directions[torch.randint(3, (2, 4, 5))].permute(0, 3, 1, 2)
    probe = ClusterProbe(8, 3)
    with torch.no_grad():
        probe.clusters.copy_(directions + 0.2 * torch.randn(3, 8))
    optimizer = torch.optim.Adam(probe.parameters(), lr=5e-3)
    for _ in range(100):
        optimizer.zero_grad()
        loss, _ = probe(code)
        loss.backward()
        optimizer.step()
    assert loss.item() < -0.99


def test_parameters_are_those_of_the_published_checkpoint():
    cluster = {name: tuple(value.shape) for name, value in ClusterProbe(6, 4).state_dict().items()}
    linear = {name: tuple(value.shape) for name, value in LinearProbe(6, 4).state_dict().items()}
    assert cluster == {"clusters": (4, 6)}
    assert linear == {"weight": (4, 6, 1, 1), "bias": (4,)}


def test_linear_probe_is_linear_in_the_code():
    probe, code = LinearProbe(6, 4), torch.randn(2, 6, 3, 5)
    expected = torch.einsum("bdhw,cd->bchw", code, probe.weight[:, :, 0, 0]) + probe.bias[:, None, None]
    torch.testing.assert_close(probe(code), expected)


def test_linear_probe_loss_is_the_mean_over_labelled_pixels():
    torch.manual_seed(0)
    probe, code = LinearProbe(6, 4), torch.randn(2, 6, 3, 5)
    labels = torch.randint(-1, 4, (2, 11, 14), dtype=torch.int16)
    labels[0, :3] = -2
    logits = F.interpolate(probe(code), (11, 14), mode="bilinear", align_corners=False).movedim(1, -1)
    labelled = labels >= 0
    expected = F.cross_entropy(logits[labelled], labels[labelled].long())
    torch.testing.assert_close(probe.loss(code, labels), expected)


def test_linear_probe_without_labels_has_no_loss():
    probe = LinearProbe(6, 4)
    loss = probe.loss(torch.randn(2, 6, 3, 5), torch.full((2, 6, 10), -1))
    loss.backward()
    assert loss.item() == 0
    assert not probe.weight.grad.any() and not probe.bias.grad.any()


def test_linear_probe_learns():
    torch.manual_seed(0)
    labels = torch.randint(3, (2, 4, 4))
    code = F.one_hot(labels, 3).movedim(-1, 1).float()
    probe = LinearProbe(3, 3)
    optimizer = torch.optim.Adam(probe.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        loss = probe.loss(code, labels)
        loss.backward()
        optimizer.step()
    assert torch.equal(probe(code).argmax(dim=1), labels)
    assert loss.item() < 0.1
