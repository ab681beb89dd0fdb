"""Everything of a run that changes while it trains, in one place: what a checkpoint holds and what resume restores."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from training.config import Config
from training.evaluation.clusterings import Clusterings
from training.model import FrozenHead, Projection, SegmentationHead, ema_copy
from training.pools import Pools
from training.probes import ClusterProbe, LinearProbe


class TrainingState:
    """The modules, optimizers and history of a run, initialised from the global random generator.

    Args:
        config: of the run.
        features_dim: Df of the backbone.
        clusters: how many clusters k-means and the cluster probe find.
        device: where the modules are.
        classes: how many classes the linear probe tells apart. None: as many as there are clusters.

    Attributes:
        clusters: how many clusters there are.
        classes: how many classes there are.
        step: steps done so far.
        saw_labels: whether the linear probe was trained with a label.
        history: the figures of each logged step, for the curves of the report.
        seconds: time spent in training steps so far.
        best_score: the best sum of validation scores so far, where the checkpoint is chosen by labels.
        last: what the modules were at the last step, where they now are the best ones; training goes on from it.
    """

    def __init__(
        self, config: Config, features_dim: int, clusters: int, device: torch.device, classes: int | None = None
    ) -> None:
        head, optim = config.head, config.optim
        self.clusters = clusters
        self.classes = clusters if classes is None else classes
        self.step = 0
        self.saw_labels = False
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0
        self.best_score = 0.0
        self.last: dict[str, dict[str, Any]] | None = None
        frozen = config.loss.objective == "none"
        dim = features_dim if frozen else head.dim
        self.head = FrozenHead() if frozen else SegmentationHead(features_dim, dim, head.dropout)
        self.ema_head = ema_copy(self.head)
        self.projection = Projection(dim)
        self.linear_probe = LinearProbe(dim, self.classes)
        self.cluster_probe = ClusterProbe(dim, clusters)
        pool_dropout = head.dropout if config.quirks.dropout_on_frozen else 0.0
        self.pools = Pools(config.pool.size, features_dim, dim, pool_dropout)
        self.clusterings = Clusterings(features_dim, dim, clusters)
        for module in self.modules.values():
            module.to(device)

        adam, adamw = torch.optim.Adam, torch.optim.AdamW
        trained = {}
        if not frozen:  # else the probes alone learn
            trained = {
                "head": adamw(self.head.parameters(), lr=optim.head_lr, weight_decay=optim.head_weight_decay),
                "projection": adam(self.projection.parameters(), lr=optim.projection_lr),
            }
        self.optimizers = trained | {
            "linear_probe": adam(self.linear_probe.parameters(), lr=optim.linear_probe_lr),
            "cluster_probe": adam(self.cluster_probe.parameters(), lr=optim.cluster_probe_lr),
        }
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=2048, growth_interval=1000, enabled=device.type == "cuda"
        )

    @property
    def device(self) -> torch.device:
        """Where the modules are."""
        return self.cluster_probe.clusters.device

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Everything with parameters or buffers, by its name in the checkpoint."""
        return {
            "head": self.head,
            "ema_head": self.ema_head,
            "projection": self.projection,
            "linear_probe": self.linear_probe,
            "cluster_probe": self.cluster_probe,
            "agnostic_pool": self.pools.agnostic,
            "specific_pool": self.pools.specific,
            "clusterings": self.clusterings,
        }

    @property
    def nbytes(self) -> int:
        """Of the modules, and of the two moments that an optimizer will keep of each of its parameters."""
        kept = [tensor for module in self.modules.values() for tensor in module.state_dict().values()]
        for optimizer in self.optimizers.values():
            kept += [parameter for group in optimizer.param_groups for parameter in group["params"]] * 2
        return sum(tensor.nbytes for tensor in kept)

    def take_best(self, best: dict[str, Any]) -> None:
        """Take the modules of an earlier `state_dict`; `last` keeps what they are now."""
        self.last = copy.deepcopy({name: module.state_dict() for name, module in self.modules.items()})
        self.load_modules(best)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, so that it loads with ``weights_only=True``."""
        return {
            "step": self.step,
            "saw_labels": self.saw_labels,
            "history": self.history,
            "seconds": self.seconds,
            "best_score": self.best_score,
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scaler": self.scaler.state_dict(),
        } | ({} if self.last is None else {"last": self.last})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        for name in ("step", "history", "seconds"):
            setattr(self, name, state[name])
        self.load_modules(state | {"modules": state.get("last", state["modules"])})
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.scaler.load_state_dict(state["scaler"])

    def load_modules(self, state: dict[str, Any]) -> None:
        """Take the modules alone from `state`, and what labels did to them."""
        self.saw_labels = saw_labels(state)
        self.best_score = state.get("best_score", 0.0)  # older checkpoints have another criterion
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])


def saw_labels(state: dict[str, Any]) -> bool:
    """Whether the linear probe in the `state_dict` of a run was trained with a label.

    In checkpoints of before this was kept, its optimizer has worked; or that of the head has not, in a run imported
    from the published code, where every probe was trained.
    """
    if "saw_labels" in state:
        return state["saw_labels"]
    linear, head = (state["optimizers"][name]["state"] for name in ("linear_probe", "head"))
    return bool(linear) or not head


def output_sizes(state: dict[str, Any]) -> tuple[int, int]:
    """How many clusters and classes there are in the `state_dict` of a run."""
    modules = state["modules"]
    return len(modules["cluster_probe"]["clusters"]), len(modules["linear_probe"]["bias"])
