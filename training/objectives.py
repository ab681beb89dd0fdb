"""What the head learns from: hidden positives with their ablations, and the baselines (``loss.objective``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

import hpkernels
from training.evaluation.kmeans import closeness, kmeans
from training.runtime.clock import timed
from training.runtime.parallel import gathered
from training.schedule import specific_weight

if TYPE_CHECKING:
    from training.config import Config
    from training.run import Run
    from training.train import Codes, Views

_NEIGHBOURS = 7  # STEGO: an image's nearest ones, of which one is drawn
_SAMPLES = 11  # STEGO: a side of the grid of points that are drawn in an image
_RANDOM_IMAGES = 5  # STEGO: how often each image is compared with a random other one


@timed("loss")
def objective_term(run: Run, views: Views, codes: Codes) -> Tensor:
    """The 0-d loss of the objective in ``loss.objective``: of all ranks, with the gradient of one's own rows."""
    objective = run.config.loss.objective
    if objective == "hp":
        return hidden_positives(run, views, codes)
    if objective == "views":
        return photometric_views(run, codes)
    if objective == "clusters":
        return frozen_clusters(run, views, codes)
    if objective == "stego":
        return feature_correlation(run, views, codes)
    return codes.code.new_zeros(())


def check_objective(config: Config, images: int, clusters: int) -> None:
    """Refuse an objective that the data or the pool is too small for.

    Raises:
        ValueError: it is.
    """
    if config.loss.objective == "clusters" and config.pool.size < clusters:
        raise ValueError(f"config: `pool.size` must be at least the {clusters} clusters, got {config.pool.size}")
    if config.loss.objective == "stego" and images < 2:
        raise ValueError(f"config: `loss.objective` stego needs at least 2 training images, got {images}")


def current_lambda(run: Run) -> float:
    """The weight of task-specific positives at this step."""
    return specific_weight(run.state.step, run.config.warmup, run.steps, run.config.quirks.late_lambda)


def hidden_positives(run: Run, views: Views, codes: Codes) -> Tensor:
    """Global hidden positives and the contrastive loss of both branches."""
    loss, pools = run.config.loss, run.state.pools
    if not loss.agnostic:
        return _specific_alone(run, codes)
    lam = current_lambda(run)
    specific = loss.specific and lam > 0
    return hpkernels.distributed.ghp_contrastive(
        codes.z.flatten(0, 1),
        F.normalize(views.features, dim=-1).flatten(0, 1),
        pools.agnostic(),
        specific=F.normalize(codes.ema, dim=-1).flatten(0, 1) if specific else None,
        specific_pool=pools.specific() if specific else None,
        specific_weight=lam if specific else 0.0,
        z_mixed=None if codes.z_mixed is None else codes.z_mixed.flatten(0, 1),
        symmetric=loss.symmetric,
        keep_specific_only=not run.config.quirks.drop_specific_only_anchors,
        ddp=False,
        **_options(run),
    )


def _specific_alone(run: Run, codes: Codes) -> Tensor:
    """The same with task-specific positives in the place of the task-agnostic ones, from the first step on."""
    return hpkernels.distributed.ghp_contrastive(
        codes.z.flatten(0, 1),
        F.normalize(codes.ema, dim=-1).flatten(0, 1),
        run.state.pools.specific(),
        z_mixed=None if codes.z_mixed is None else codes.z_mixed.flatten(0, 1),
        symmetric=run.config.loss.symmetric,
        ddp=False,
        **_options(run),
    )


def photometric_views(run: Run, codes: Codes) -> Tensor:
    """Naive contrastive learning: the only positive of a patch is the same patch in the other view."""
    both = torch.cat([gathered(z).flatten(0, 1) for z in (codes.z, codes.z_photometric)])
    patches = torch.arange(len(both) // 2, device=both.device).repeat(2)
    return hpkernels.multi_positive_contrastive(both, patches, **_options(run))


def frozen_clusters(run: Run, views: Views, codes: Codes) -> Tensor:
    """SupCon with the k-means cluster of a patch's frozen feature as its label."""
    labels = gathered(closeness(views.tokens, _centres(run)).argmax(dim=-1)).flatten()
    return hpkernels.multi_positive_contrastive(gathered(codes.z).flatten(0, 1), labels, **_options(run))


def feature_correlation(run: Run, views: Views, codes: Codes) -> Tensor:
    """The loss of STEGO (ICLR 2022): codes correlate where frozen features do by more than a shift.

    Patches of an image are compared with those of itself, of one of its nearest images, and of random ones.
    """
    bank, loss, share = run.train_bank, run.config.loss, views.share
    neighbours = _neighbours(run)[views.images.cpu()]
    chosen = torch.randint(neighbours.shape[1], (share.rows, 1))
    near_tokens = bank.get(neighbours.take_along_dim(share.of(chosen), dim=1)[:, 0]).tokens
    near_code = run.state.head(near_tokens, share)
    tokens, code, near_tokens, near_code = map(gathered, (views.tokens, codes.code, near_tokens, near_code))

    here, there = (torch.rand(share.rows, _SAMPLES, _SAMPLES, 2, device=run.device) * 2 - 1 for _ in range(2))
    own = [_at(rows, here, bank.grid) for rows in (tokens, code)]
    near = [_at(rows, there, bank.grid) for rows in (near_tokens, near_code)]
    self_shift, near_shift, random_shift = loss.stego_shifts
    terms = [_correlation(own, own, self_shift), _correlation(own, near, near_shift)]
    others = []
    for _ in range(_RANDOM_IMAGES):
        order = torch.randperm(share.rows)
        order = (order + (order == torch.arange(share.rows))) % share.rows  # never an image with itself
        other = [_at(rows[order], there, bank.grid) for rows in (tokens, code)]
        others.append(_correlation(own, other, random_shift))
    terms.append(torch.stack(others).mean())
    return sum(weight * term for weight, term in zip(loss.stego_weights, terms, strict=True))


def _at(rows: Tensor, points: Tensor, grid: tuple[int, int]) -> Tensor:
    """Unit rows (B, P, D) of patches (B, H*W, D), interpolated at points (B, h, w, 2) in [-1, 1]."""
    values = F.grid_sample(rows.mT.unflatten(2, grid), points, padding_mode="border", align_corners=True)
    return F.normalize(values.flatten(2).mT, dim=-1)


def _correlation(one: list[Tensor], other: list[Tensor], shift: float) -> Tensor:
    """One term of STEGO's loss; both hold unit rows (B, P, .) of features and of codes."""
    features, codes = (a @ b.mT for a, b in zip(one, other, strict=True))
    # Features are centred for each point, and keep their mean over all.
    centred = features - features.mean(dim=2, keepdim=True)
    centred = centred - centred.mean() + features.mean()
    return -(codes.clamp(min=0) * (centred.detach() - shift)).mean()


def _centres(run: Run) -> Tensor:
    """k-means centres (C, Df) of the task-agnostic pool, which a resumed run finds again."""
    if run.cluster_centres is None:
        pool, number = run.state.pools.agnostic(), run.state.clusters
        run.cluster_centres = kmeans(pool, number, seed=run.config.seed, restarts=5)
    return run.cluster_centres


@torch.no_grad()
def _neighbours(run: Run) -> Tensor:
    """The nearest images (n, K) of each training image, by the mean of their features."""
    if run.nearest_images is None:
        bank = run.train_bank
        means = F.normalize(torch.cat([bank.get(some).tokens.mean(dim=1) for some in bank.batches()]), dim=1)
        close = [
            # An image is no neighbour of itself.
            (means[some] @ means.mT)
            .scatter(1, some[:, None].to(means.device), -2)
            .topk(min(_NEIGHBOURS, len(bank) - 1))
            for some in bank.batches()
        ]
        run.nearest_images = torch.cat([found.indices for found in close]).cpu()
    return run.nearest_images


def _options(run: Run) -> dict[str, Any]:
    """What all contrastive losses take from the configuration."""
    loss = run.config.loss
    return {
        "anchors_per_image": run.train_bank.anchors_per_image,
        "temperature": loss.temperature,
        "base_temperature": loss.base_temperature,
        "negative_rate": loss.negative_rate,
        "seed": torch.randint(2**63 - 1, (), device=run.device),  # the same on all ranks
        "variant": loss.variant,
        "reweight": loss.reweight,
        "backend": run.config.backend,
    }
