"""The embedded CLIP against the float32 weights it was made from, on real images."""

import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from perdure.backbones import BACKBONES, Backbone

SHARED = Path(__file__).parents[3] / "shared"
ORIGINAL = SHARED / "weights" / "pocket-clip"
IMAGES = SHARED / "data" / "cifar100" / "test.parquet"

pytestmark = pytest.mark.skipif(
    not (ORIGINAL.is_dir() and IMAGES.is_file()), reason="no ../shared/weights/pocket-clip and ../shared/data/cifar100"
)


@pytest.fixture(scope="module")
def table() -> tuple[list[Image.Image], Tensor, list[str]]:
    """200 test images, their labels, and the 100 class names by label."""
    whole = pq.read_table(IMAGES, columns=["image", "fine_label", "class_name"])
    labels, words = whole["fine_label"].to_pylist(), whole["class_name"].to_pylist()
    names = dict(zip(labels, words, strict=True))
    images = [Image.open(io.BytesIO(row["bytes"])) for row in whole["image"].slice(0, 200).to_pylist()]
    return images, torch.tensor(labels[:200]), [names[label].replace("_", " ") for label in range(100)]


def embed(backbone: Backbone, images: list[Image.Image], names: list[str]) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        features = backbone({"image": torch.stack([backbone.preprocess(image) for image in images])})
        return features, backbone.encode_text([f"a photo of a {name}." for name in names])


def test_half_precision_copy_answers_as_the_original(table: tuple[list[Image.Image], Tensor, list[str]]) -> None:
    images, labels, names = table
    original = BACKBONES["clip"](path=str(ORIGINAL))
    pocket = BACKBONES["pocket"]()
    assert pocket.preprocess == original.preprocess
    exact, copied = embed(original, images, names), embed(pocket, images, names)
    for one, other in zip(copied, exact, strict=True):
        assert ((one - other).norm(dim=1) / other.norm(dim=1)).max() < 1e-2
    answers = [(F.normalize(f) @ F.normalize(t).T).argmax(1) for f, t in (exact, copied)]
    assert (answers[0] == answers[1]).float().mean() >= 0.99
    # 0.087 over 1,000 images; chance is 0.01.
    assert (answers[1] == labels).float().mean() > 0.04


def test_pocket_weights_are_the_original_rounded_to_half() -> None:
    original = BACKBONES["clip"](path=str(ORIGINAL)).state_dict()
    for name, value in BACKBONES["pocket"]().state_dict().items():
        assert torch.equal(value, original[name].half().float()), name
