"""The photometric view."""

import pytest
import torch
from torchvision.transforms import v2

from training.features.views import photometric, photometric_parameters

# The published recipe as torchvision has it, image by image.
RECIPE = v2.Compose(
    [
        v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([v2.GaussianBlur(kernel_size=5)], p=0.5),
    ]
)


def images(count=3):
    return torch.rand(count, 3, 16, 20, generator=torch.Generator().manual_seed(0))


def view(images, seed):
    return photometric(images, photometric_parameters(len(images), torch.Generator().manual_seed(seed)))


def by_torchvision(images, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed))))
        return torch.stack([RECIPE(image) for image in images])


@pytest.mark.parametrize("normalised", [False, True])
def test_each_image_is_as_torchvision_makes_it(normalised):
    before = images(40)
    before[:3] = before[:3, :1]  # grey
    before[3] = 0
    before[4, 0] = before[4, 1]  # two greatest channels
    if normalised:
        before = before * 4 - 2
    for seed in range(3):
        torch.testing.assert_close(view(before, seed), by_torchvision(before, seed), atol=2e-5, rtol=0)


def test_a_part_of_the_batch_is_the_part_of_its_view():
    parameters = photometric_parameters(10, torch.Generator().manual_seed(1))
    whole = photometric(images(10), parameters)
    assert torch.equal(photometric(images(10)[3:7], parameters[3:7]), whole[3:7])
    some = torch.tensor([8, 0, 3])
    assert torch.equal(photometric(images(10)[some], parameters[some]), whole[some])


def test_reproducible_and_different_for_each_draw():
    first = view(images(), 1)
    assert torch.equal(first, view(images(), 1))
    assert not torch.equal(first, view(images(), 2))


def test_each_image_is_drawn_by_itself():
    same = images()[:1].expand(3, -1, -1, -1)
    first, second, third = view(same, 1)
    assert not torch.equal(first, second) and not torch.equal(second, third)


def test_stays_in_range_and_leaves_the_input_and_global_generator_alone():
    before, state = images(), torch.get_rng_state()
    changed = view(before, 3)
    assert changed.shape == before.shape and changed.min() >= 0 and changed.max() <= 1
    assert torch.equal(before, images())
    assert torch.equal(torch.get_rng_state(), state)


def test_normalised_images_are_clipped_by_each_operation_and_not_before():
    """As in the published code, where the first operation sees what is outside [0, 1]."""
    normalised = torch.full((40, 3, 8, 8), 1.2)  # darkened by up to 30 %, it may come back into the range
    normalised[:, :, 4:] = -1
    changed = view(normalised, 0)
    assert changed.min() >= 0 and changed.max() <= 1 + 1e-5
    assert not torch.allclose(changed, view(normalised.clamp(0, 1), 0))


def test_geometry_is_kept():
    half = torch.zeros(1, 3, 16, 20)
    half[..., 10:] = 1
    for seed in range(5):
        changed = view(half, seed)
        assert changed[..., 14:].mean() > changed[..., :6].mean() + 0.2
