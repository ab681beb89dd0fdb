"""Lambda, renewals and random numbers at the right steps."""

import pytest
import torch

from training.schedule import renewal_due, seed_step, specific_weight


def test_lambda_is_zero_in_warmup_and_one_at_the_last_step():
    values = [specific_weight(step, warmup=10, steps=110) for step in range(110)]
    assert values[:10] == [0.0] * 10
    assert values[10] == pytest.approx(0.01)
    assert values[59] == pytest.approx(0.5)
    assert values[-1] == 1.0
    assert values == sorted(values)


def test_lambda_of_the_published_code_is_a_step_late():
    values = [specific_weight(step, 10, 110, late=True) for step in range(110)]
    assert values == [0.0, *(specific_weight(step, 10, 110) for step in range(109))]
    assert values[10] == 0 and values[-1] == pytest.approx(0.99)


def test_renewals(tiny_config):
    config = tiny_config(pool={"size": 8, "renew_every": 3})
    assert [step for step in range(12) if renewal_due(step, config, steps_per_epoch=5)] == [0, 3, 6, 9]


def test_renewals_of_the_published_code(tiny_config):
    config = tiny_config(pool={"size": 8, "renew_every": 3}, quirks={"skip_renewal_at_epoch_start": True})
    due = [step for step in range(16) if renewal_due(step, config, steps_per_epoch=7)]
    assert due == [0, 3, 6, 10, 13]  # epochs begin at 0, 7 and 14; steps 7 and 14 are skipped


def test_random_numbers_are_a_function_of_seed_and_step():
    def draw(seed, step):
        generator = seed_step(seed, step)
        return torch.rand(3), torch.rand(3, generator=generator)

    assert all(torch.equal(a, b) for a, b in zip(draw(1, 2), draw(1, 2), strict=True))
    streams = {tuple(draw(seed, step)[0].tolist()) for seed in range(4) for step in range(-1, 20)}
    assert len(streams) == 4 * 21
