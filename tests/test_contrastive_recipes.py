"""The recipes of docs/recipes.md, which are run and compared with dense formulas, and losses of another library."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

import hpkernels
from benchmarks.published import ghp_contrastive as published_ghp_contrastive
from hpkernels import Labels, PairLists, PositiveMask, contrastive, use_backend
from hpkernels.testing import available_cases
from tests.ops.oracles import ntxent_of_metric_learning, supcon_of_metric_learning
from tests.pages import ROOT, document, heading

RTOL = 1e-5
# The recipes have tensors on the CPU.
BACKENDS = [case.backend for case in available_cases("contrastive", [torch.float32]) if case.device == "cpu"]


def logits(it, anchors, keys, temperature):
    return it[anchors].double() @ it[keys].double().T / temperature


def supcon(logits, positives, kept=None):
    """The mean over anchors of the mean over their positives of -log p, among the keys that are `kept`."""
    weights = positives.double()
    kept = torch.ones_like(positives, dtype=torch.bool) if kept is None else kept
    log_p = logits - logits.masked_fill(~kept, -torch.inf).logsumexp(dim=1, keepdim=True)
    return -((weights * log_p).sum(dim=1) / weights.sum(dim=1))[weights.sum(dim=1) > 0].mean()


def both(logits, positives, kept):
    return (supcon(logits, positives, kept) + supcon(logits.T, positives.T, kept.T)) / 2


def labels(it):
    others = ~torch.eye(16, dtype=torch.bool)
    return supcon(logits(it, "embeddings", "embeddings", 0.1), (it["labels"][:, None] == it["labels"]) & others, others)


def two_views_without_labels(it):
    every = logits(it, "views", "views", 0.5).masked_fill(torch.eye(16, dtype=torch.bool), -torch.inf)
    return cross_entropy(every, torch.arange(16).roll(8))


def a_queue_of_past_keys(it):
    of_own = (it["queries"] * it["keys"][:8]).sum(dim=1, keepdim=True)
    every = torch.cat((of_own, it["queries"] @ it["keys"][:8].T, it["queries"] @ it["queue"].T), dim=1).double()
    own = torch.cat((torch.zeros(8, 1), torch.eye(8), torch.zeros(8, 64)), dim=1).bool()  # not counted twice
    return cross_entropy(every.masked_fill(own, -torch.inf) / 0.2, torch.zeros(8, dtype=torch.long))


def a_memory_bank_with_labels(it):
    others = it["batch"][:, None] != torch.arange(100)
    same = it["labels"][it["batch"], None] == it["labels"]
    return supcon(logits(it, "anchors", "bank", 0.1), same & others, others)


def several_captions_an_image(it):
    every = logits(it, "images", "texts", 0.07)
    of_texts = cross_entropy(every.T, it["image_of_text"])
    log_p = every.log_softmax(dim=1)
    captions = [log_p[0, :3], log_p[1, 3:5], log_p[2, 5:8], log_p[3, 8:]]
    return (of_texts - sum(some.mean() for some in captions) / 4) / 2


def retrieval_with_hard_negatives(it):
    positives = torch.zeros(4, 12, dtype=torch.bool)
    positives[[0, 0, 1, 2, 3], [0, 1, 3, 6, 9]] = True
    others = torch.arange(4)[:, None] != torch.arange(12) // 3
    return supcon(logits(it, "queries", "passages", 0.02), positives, positives | others)


def duplicates(it):
    kept = torch.ones(6, 6, dtype=torch.bool)
    kept[[0, 3], [3, 0]] = False  # the same image
    kept[[1, 2], [2, 1]] = False  # the same text
    return both(logits(it, "images", "texts", 0.07), torch.eye(6).bool(), kept)


def decoupled(it):
    every = logits(it, "views", "views", 0.1)
    partner = torch.arange(16).roll(8)
    negatives = torch.arange(16) % 8 != torch.arange(16)[:, None] % 8
    pulls = every[torch.arange(16), partner]
    return (every.masked_fill(~negatives, -torch.inf).logsumexp(dim=1) - pulls).mean()


def prototypes(it):
    return cross_entropy(logits(it, "embeddings", "prototypes", 0.1), it["labels"], ignore_index=-1)


def log_q_correction(it):
    corrected = logits(it, "users", "items", 0.05) - it["probability"][it["item"]].double().log()
    return supcon(corrected, it["item"][:, None] == it["item"])


def ignored_pixels(it):
    rows = it["pixels"].double()[it["labels"] != 255]
    labels = it["labels"][it["labels"] != 255]
    others = ~torch.eye(len(rows), dtype=torch.bool)
    return supcon(rows @ rows.T / 0.1, (labels[:, None] == labels) & others, others)


def soft_positives(it):
    similarity = it["teacher_anchors"] @ it["teacher_keys"].T
    fifth = similarity.topk(5).values[:, 4:]
    target = (similarity / 0.1).masked_fill(similarity < fifth, -torch.inf).softmax(dim=1)
    return cross_entropy(logits(it, "anchors", "keys", 0.1), target.double())


def false_negatives_that_a_guide_finds(it):
    similarity = it["guide_queries"] @ it["guide_passages"].T
    kept = similarity <= similarity.diagonal()[:, None] - 0.05
    assert 0 < (~kept).sum() - 8 < 56, "some are left out, besides the positives, and not all"
    own = torch.eye(8).bool()
    return supcon(logits(it, "queries", "passages", 0.05), own, kept | own)


def learnable_temperature(it):
    every = it["images"].double() @ it["texts"].double().T * it["log_scale"].double().exp()
    own = torch.arange(8)
    return (cross_entropy(every, own) + cross_entropy(every.T, own)) / 2


def a_bag_of_positives(it):
    every = logits(it, "clips", "narrations", 0.1)
    bags = every.softmax(dim=1)[torch.arange(4)[:, None], torch.arange(12).view(4, 3)]
    return -bags.sum(dim=1).log().mean() + torch.tensor(3.0).double().log()


def one_term_for_each_positive_pair(it):
    every = logits(it, "embeddings", "embeddings", 0.1)
    others = [[j for j in range(12) if j % 4 != i % 4] for i in range(12)]
    pairs = [(i, j) for i in range(12) for j in range(12) if j % 4 == i % 4 and j != i]
    return sum(every[i, [j, *others[i]]].logsumexp(dim=0) - every[i, j] for i, j in pairs) / len(pairs)


def hidden_positives(it):
    similarities = [it[name].double() for name in ("features", "pool", "features", "pool")]
    z, every = it["z"].double(), torch.ones(25, 50, dtype=torch.bool)
    settings = {"specific_weight": 0.0, "anchors_per_image": 25, "temperature": 0.5, "base_temperature": 0.07}
    return published_ghp_contrastive(z, z, *similarities, every, **settings)


def many_devices(it):
    return both(logits(it, "images", "texts", 0.07), torch.eye(8).bool(), torch.ones(8, 8, dtype=torch.bool))


def classes_of_other_libraries(it):
    rows, labels, others = (
        it["features"].double().flatten(0, 1),
        it["labels"].repeat_interleave(2),
        ~torch.eye(16).bool(),
    )
    return supcon(rows @ rows.T / 0.1, (labels[:, None] == labels) & others, others) * 0.1 / 0.07


RECIPES = (
    labels,
    two_views_without_labels,
    a_queue_of_past_keys,
    a_memory_bank_with_labels,
    several_captions_an_image,
    learnable_temperature,
    retrieval_with_hard_negatives,
    duplicates,
    false_negatives_that_a_guide_finds,
    soft_positives,
    decoupled,
    a_bag_of_positives,
    one_term_for_each_positive_pair,
    prototypes,
    log_q_correction,
    ignored_pixels,
    hidden_positives,
    many_devices,
    classes_of_other_libraries,
)


@pytest.fixture(scope="module")
def page():
    """The programs of each recipe, by its heading as a name; "recipes" is what they begin with."""
    programs = {}
    for example in document(ROOT / "docs" / "recipes.md").examples():
        programs.setdefault(re.sub(r"\W", "_", heading(example)).lower(), []).append(example.parsed)
    return programs


def test_every_recipe_is_compared(page):
    assert list(page) == ["recipes", *(recipe.__name__ for recipe in RECIPES)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_recipe(recipe, backend, page):
    torch.manual_seed(0)
    found = {}
    exec(page["recipes"][0], found)
    programs = page[recipe.__name__]
    assert programs
    for program in programs:
        with use_backend(backend):
            exec(program, found)
        leaves = [value for value in found.values() if isinstance(value, torch.Tensor) and value.requires_grad]
        leaves = [value for value in leaves if value.is_leaf]
        assert leaves and found["loss"].requires_grad
        expected = recipe(found)
        torch.testing.assert_close(found["loss"].double(), expected, rtol=RTOL, atol=0)
        gradients = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (found["loss"], expected)]
        for ours, dense in zip(*gradients, strict=True):
            assert dense.any()
            torch.testing.assert_close(ours, dense, rtol=0, atol=RTOL * dense.abs().max().item())


ROWS = torch.randn(9, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
KEYS = torch.randn(11, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
LABELS, KEY_LABELS = torch.tensor([0, 1, 2, 0, 1, 0, 3, 2, 4]), torch.tensor([0, 1, 2, 4, 4, 0, 0, 5, 1, 2, 1])
REFERENCES = {"own": (), "references": (KEYS, KEY_LABELS)}


def metric_learning_supcon(rows, keys=None, key_labels=None):
    """It normalises rows itself, and leaves anchors without positives out of the mean as `contrastive` does."""
    normal = None if keys is None else normalize(keys, dim=1)
    return contrastive(normalize(rows, dim=1), normal, positives=Labels(LABELS, key_labels), temperature=0.2)


def metric_learning_ntxent(rows, keys=None, key_labels=None):
    """Each positive pair once, as in the recipe."""
    same = LABELS[:, None] == (LABELS if keys is None else key_labels)
    if keys is None:
        same.fill_diagonal_(False)
    anchor, positive = same.nonzero(as_tuple=True)
    return contrastive(
        normalize(rows, dim=1)[anchor],
        normalize(rows if keys is None else keys, dim=1),
        positives=PairLists(torch.arange(len(anchor) + 1), positive),
        exclude=Labels(LABELS[anchor], LABELS if keys is None else key_labels),
        exclude_positives=False,
        temperature=0.2,
    )


OF_METRIC_LEARNING = {
    "SupConLoss": (metric_learning_supcon, supcon_of_metric_learning),
    "NTXentLoss": (metric_learning_ntxent, ntxent_of_metric_learning),
}


@pytest.mark.parametrize("references", REFERENCES.values(), ids=REFERENCES)
@pytest.mark.parametrize("loss", OF_METRIC_LEARNING)
def test_losses_of_metric_learning(loss, references):
    ours, oracle = OF_METRIC_LEARNING[loss]
    inputs = [tensor.clone().requires_grad_() for tensor in (ROWS, *references[:1])]
    expected = oracle(inputs[0], LABELS, *inputs[1:], *references[1:], temperature=0.2)
    actual = ours(*inputs, *references[1:])
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, inputs) for value in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13)


@pytest.mark.parametrize("references", REFERENCES.values(), ids=REFERENCES)
@pytest.mark.parametrize("loss", OF_METRIC_LEARNING)
def test_oracles_are_the_library(loss, references):
    reason = "pytorch-metric-learning is not installed, which is a part of the extra `benchmarks`"
    losses = pytest.importorskip("pytorch_metric_learning.losses", reason=reason)
    published = getattr(losses, loss)(temperature=0.2)(ROWS, LABELS, None, *references)
    expected = OF_METRIC_LEARNING[loss][1](ROWS, LABELS, *references, temperature=0.2)
    torch.testing.assert_close(published, expected, rtol=1e-12, atol=0)


def test_masks_may_take_the_place_of_labels():
    """The recipes use the smallest form of pairs; others say the same."""
    anchors, keys = normalize(ROWS, dim=1), normalize(KEYS, dim=1)
    expected = contrastive(anchors, keys, positives=Labels(LABELS, KEY_LABELS))
    same = LABELS[:, None] == KEY_LABELS
    indices = same.nonzero()[:, 1]
    offsets = torch.cat((torch.zeros(1, dtype=torch.long), same.sum(dim=1).cumsum(0)))
    near = hpkernels.hidden_positives(same.double(), torch.full((9,), 0.5).double(), keys=torch.eye(11).double())
    for positives in (same, PositiveMask.from_labels(LABELS, key_labels=KEY_LABELS), PairLists(offsets, indices), near):
        torch.testing.assert_close(contrastive(anchors, keys, positives=positives), expected, rtol=1e-12, atol=0)
