"""What happens at which step: the ramp of lambda, the renewal of the pool, and the random numbers of a step.

All are functions of the step alone, so that a resumed run goes on exactly as it would have.
"""

from __future__ import annotations

import torch

from training.config import Config


def specific_weight(step: int, warmup: int, steps: int, late: bool = False) -> float:
    """Lambda: 0 for the first `warmup` steps, then a linear rise to 1 at the last step; `late`: all a step later."""
    return max(0.0, (step + (not late) - warmup) / (steps - warmup))


def renewal_due(step: int, config: Config, steps_per_epoch: int) -> bool:
    """Whether the task-specific pool is refilled before `step`; it always is before the first."""
    if step == 0:
        return True
    if config.quirks.skip_renewal_at_epoch_start:
        # The published code counts the steps of each epoch anew and leaves out the zeroth.
        step %= steps_per_epoch
        return step > 0 and step % config.pool.renew_every == 0
    return step % config.pool.renew_every == 0


def seed_step(seed: int, step: int) -> torch.Generator:
    """Seed all random numbers of `step`: PyTorch's global generators (dropout, negatives) and the one returned."""
    # Neighbouring seeds and steps must not share a stream: a large odd stride keeps (seed, step) pairs apart.
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xD1342543DE82EF95) % 2**63
    torch.manual_seed(mixed)
    return torch.Generator().manual_seed(mixed)
