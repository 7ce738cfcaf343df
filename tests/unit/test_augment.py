"""Random views: what they may do to an image, and that they come from the generator alone."""

import pytest
import torch

from perdure.augment import AUGMENTS, crop, flip, none


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
