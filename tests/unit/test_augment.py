"""Random views: what they may do to an image, and that they come from the generator alone."""

from typing import get_args, get_type_hints

import pytest
import torch
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from perdure.streams import augment
from perdure.streams.augment import AUGMENTS, crop, flip, none, zoom
from perdure.training.config import RunConfig


def batch(count: int = 64, side: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    return {"image": image, "label": torch.arange(count)}


@pytest.mark.parametrize("name", AUGMENTS)
def test_a_view_depends_on_the_generator_alone(name: str) -> None:
    views = []
    for seed, chatter in ((1, 0), (1, 1), (2, 0)):
        torch.manual_seed(chatter)
        views.append(AUGMENTS[name](batch(), torch.Generator().manual_seed(seed)))
    assert torch.equal(views[0]["image"], views[1]["image"])
    assert torch.equal(views[0]["image"], views[2]["image"]) == (name == "none")
    assert all(v["image"].dtype == torch.uint8 and torch.equal(v["label"], torch.arange(64)) for v in views)


def test_none_leaves_the_images_alone() -> None:
    given = batch()
    assert none(given, torch.Generator()) is given


def test_flip_mirrors_half_of_the_images_left_to_right() -> None:
    given = batch(1000, 4)
    image, before = flip(given, torch.Generator().manual_seed(3))["image"], given["image"].clone()
    same = (image == before).flatten(1).all(1)
    mirrored = (image == before.flip(-1)).flatten(1).all(1)
    assert (same | mirrored).all()
    assert 430 < int(mirrored.sum()) < 570
    assert torch.equal(given["image"], before)


def test_crop_is_a_shifted_window_of_the_reflected_image() -> None:
    given = batch(200)
    image = crop(given, torch.Generator().manual_seed(3))["image"]
    padded = torch.nn.functional.pad(given["image"].float(), (2, 2, 2, 2), mode="reflect").to(torch.uint8)
    shifts = set()
    for i in range(200):
        found = [
            (y, x, mirrored)
            for mirrored, source in ((False, padded[i]), (True, padded[i].flip(-1)))
            for y in range(5)
            for x in range(5)
            if torch.equal(image[i], source[:, y : y + 16, x : x + 16])
        ]
        assert len(found) == 1
        shifts.add(found[0])
    assert len(shifts) > 40  # of 50


def test_zoom_enlarges_a_window_as_torchvision_does() -> None:
    side = 32
    given = batch(24, side)
    image = zoom(given, torch.Generator().manual_seed(5))["image"]
    generator = torch.Generator().manual_seed(5)
    mirrored = torch.rand(24, generator=generator) < 0.5
    high, wide = augment._windows(24, side, generator)
    top, left = (torch.rand(2, 24, generator=generator) * (side + 1 - torch.stack([high, wide]))).floor()
    for i in range(24):
        source = given["image"][i].flip(-1) if mirrored[i] else given["image"][i]
        window = [int(v[i]) for v in (top, left, high, wide)]
        expected = tv.resized_crop(source.float(), *window, [side, side], antialias=False)
        assert (image[i].float() - expected).abs().max() < 0.51  # rounding to whole values


def test_zoom_shows_5_to_100_percent_of_the_area_with_aspects_of_3_to_4_and_4_to_3() -> None:
    high, wide = augment._windows(20_000, 224, torch.Generator().manual_seed(0))
    share, aspect = high * wide / 224**2, wide / high
    assert share.min() < 0.06
    assert share.max() > 0.98
    assert share.min() > 0.049
    assert high.max() <= 224
    assert wide.max() <= 224
    assert aspect.min() > 0.74
    assert aspect.max() < 1.35
    torch.manual_seed(0)
    theirs = RandomResizedCrop(224, scale=(0.05, 1))
    drawn = [theirs.make_params([torch.empty(3, 224, 224)]) for _ in range(4000)]
    for quantile in (0.1, 0.5, 0.9):
        expected = torch.tensor([float(d["height"] * d["width"]) / 224**2 for d in drawn]).quantile(quantile)
        assert abs(float(share.quantile(quantile) - expected)) < 0.03
    assert abs(float(aspect.log().mean())) < 0.01


def test_zoom_keeps_an_image_of_one_colour_and_of_one_pixel() -> None:
    for side in (1, 2, 7):
        given = {"image": torch.full((40, 3, side, side), 201, dtype=torch.uint8)}
        assert torch.equal(zoom(given, torch.Generator().manual_seed(1))["image"], given["image"])


def test_every_view_can_be_asked_for_by_name() -> None:
    assert get_args(get_type_hints(RunConfig)["augment"]) == tuple(AUGMENTS)
