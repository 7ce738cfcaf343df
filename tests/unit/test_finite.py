"""What is not finite is refused where it is read and where it would leave; nobody is shown "nan %"."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from perdure_pocket import CLIP
from safetensors.torch import load_file, save_file
from torch import Tensor

from perdure.api.learner import Learner
from perdure.objectives.retrieve import Retrieve
from perdure.streams import build_stream
from perdure.training.config import make_backbone

PLAIN = {"precision": "fp32", "attention": "sdpa", "device": "cpu", "epochs": 1, "batch_size": 4}
FEATURES = r"the model gives features that are"


def spoil(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(weights: dict[str, Tensor]) -> None:
        weights[name].view(-1)[-1] = value

    return change


def scale(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(weights: dict[str, Tensor]) -> None:
        weights[name] *= 1e38

    return change


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (spoil("vision_model.encoder.layers.0.mlp.fc1.weight", torch.nan), "the weight .*fc1.weight is"),
        (spoil("text_model.embeddings.token_embedding.weight", torch.nan), "the weight .*token_embedding.weight is"),
        (spoil("text_projection.weight", torch.inf), "the weight .*text_projection.weight is"),
        (spoil("visual_projection.weight", -torch.inf), "the weight .*visual_projection.weight is"),
        (scale("visual_projection.weight"), FEATURES),
        (scale("text_projection.weight"), FEATURES),
    ],
)
def test_a_damaged_backbone_is_refused_when_it_is_read(
    change: Callable[[dict[str, Tensor]], None], what: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(CLIP, tmp_path / "clip"))
    weights = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"^clip\(path='.*'\): {what} not finite .*; get the model again$"):
        make_backbone(f"clip(path={str(folder)!r})")


@pytest.mark.parametrize("method", ["ncm", "ranpac", "lora(rank=2)", "lora(rank=2) + ncm"])
@pytest.mark.parametrize("objective", ["classify()", "zeroshot()"])
def test_answers_that_are_not_finite_are_refused_wherever_they_are_asked_for(method: str, objective: str) -> None:
    images = torch.randint(256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    learner = Learner.create("tiny(dim=16, text=True)", method, objective, **PLAIN).learn(images, list("abababab"))
    stream = build_stream("synthetic(tasks=1, classes_per_task=2, test_per_class=4)", learner.backbone.preprocess, 0)
    asked: list[Callable[[], object]] = [
        lambda: learner.predict(images),
        lambda: learner.predict(images, classes=["x", "y"]),
        lambda: learner.search(images, "a"),
        lambda: learner.objective.evaluate(learner, list(stream)),
    ]
    with torch.no_grad():
        learner.backbone.get_submodule("vision.norm").bias.fill_(torch.nan)
    for ask in asked:
        with pytest.raises(ValueError, match=r"^features of images are not finite .*: go back to an earlier task"):
            ask()


def test_heads_that_are_not_finite_give_no_scores() -> None:
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    learner = Learner.create("tiny(dim=16)", "probe", **PLAIN).learn(images, list("abab"))
    with torch.no_grad():
        learner.objective.heads[0].bias.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"^scores are not finite"):
        learner.predict(images)


def test_texts_that_are_not_finite_have_no_recall() -> None:
    learner = Learner.create("tiny(dim=16, text=True)", "probe", "retrieve()", **PLAIN)
    assert isinstance(learner.objective, Retrieve)
    stream = build_stream("captions_synthetic(tasks=1, test_per_task=4)", learner.backbone.preprocess, 0)
    learner.grow(stream.tasks[0])
    with torch.no_grad():
        learner.backbone.get_submodule("text.norm").bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"^embeddings of texts are not finite"):
        learner.objective.evaluate(learner, stream.tasks)
