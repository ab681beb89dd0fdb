"""The photometric view."""

import torch

from training.views import photometric


def images():
    return torch.rand(3, 3, 16, 20, generator=torch.Generator().manual_seed(0))


def test_reproducible_and_different_for_each_draw():
    first = photometric(images(), torch.Generator().manual_seed(1))
    assert torch.equal(first, photometric(images(), torch.Generator().manual_seed(1)))
    assert not torch.equal(first, photometric(images(), torch.Generator().manual_seed(2)))


def test_each_image_is_drawn_by_itself():
    same = images()[:1].expand(3, -1, -1, -1)
    view = photometric(same, torch.Generator().manual_seed(1))
    assert not torch.equal(view[0], view[1]) and not torch.equal(view[1], view[2])


def test_stays_in_range_and_leaves_the_input_and_global_generator_alone():
    before, state = images(), torch.get_rng_state()
    view = photometric(before, torch.Generator().manual_seed(3))
    assert view.shape == before.shape and view.min() >= 0 and view.max() <= 1
    assert torch.equal(before, images())
    assert torch.equal(torch.get_rng_state(), state)


def test_normalised_images_are_clipped_by_each_operation_and_not_before():
    """As in the published code, where the first operation sees what is outside [0, 1]."""
    normalised = torch.full((40, 3, 8, 8), 1.2)  # darkened by up to 30 %, it may come back into the range
    normalised[:, :, 4:] = -1
    view = photometric(normalised, torch.Generator().manual_seed(0))
    clipped_before = photometric(normalised.clamp(0, 1), torch.Generator().manual_seed(0))
    assert view.min() >= 0 and view.max() <= 1 + 1e-5
    assert not torch.allclose(view, clipped_before)


def test_geometry_is_kept():
    half = torch.zeros(1, 3, 16, 20)
    half[..., 10:] = 1
    for seed in range(5):
        view = photometric(half, torch.Generator().manual_seed(seed))
        assert view[..., 14:].mean() > view[..., :6].mean() + 0.2
