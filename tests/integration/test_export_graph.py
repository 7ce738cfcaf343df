"""Exports as one graph give the scores of the learner, for batches of any size, without a library of models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from perdure.api.learner import Learner

SPECS = {
    "vit": ("vision", "classify", "inflora(rank=3) + align"),
    "clip": ("clip", "zeroshot", "lora(rank=3, tower='both')"),
    "timm": ("timm", "classify", "lora(rank=3) + ncm"),
    "pocket": ("pocket", "classify(cosine=True)", "lora(rank=3)"),
    "dinov2": ("vision", "classify", "probe + align"),
}


SLOW = ("timm", "pocket", "dinov2")


@pytest.fixture(params=[pytest.param(f, marks=pytest.mark.slow if f in SLOW else ()) for f in SPECS])
def learner(request: Any, saved: dict[str, Path], timm_file: Path) -> Learner:
    family = request.param
    name, objective, method = SPECS[family]
    where = {"timm": f"name='test_vit', checkpoint={str(timm_file)!r}", "pocket": ""}
    options = where.get(family) if family in where else f"path={str(saved[family])!r}"
    made = Learner.create(f"{name}({options})", method, objective, precision="fp32", device="cpu", epochs=1)
    return made.learn(pictures(made, 8), ["a cat", "a dog"] * 4)


def pictures(learner: Learner, n: int) -> torch.Tensor:
    side = learner.backbone.preprocess.size
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.manual_seed(n))


@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_a_graph_gives_the_scores_of_the_learner(learner: Learner, to: str, tmp_path: Path) -> None:
    if to == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    folder = learner.export(tmp_path / "graph", to)
    assert json.loads((folder / "labels.json").read_text())["labels"] == ["a cat", "a dog"]
    for count in (1, 5):
        images = pictures(learner, count)
        with learner.inference():
            expected = learner({"image": images})
        if to == "onnx":
            session = onnxruntime.InferenceSession(folder / "model.onnx")
            found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        else:
            found = torch.export.load(folder / "model.pt2").module()(images).detach()
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    assert np.isfinite(found.numpy()).all()


def test_what_is_no_graph_of_classes_is_refused(tmp_path: Path) -> None:
    learner = Learner.create("pocket()", "lora(rank=2)", "retrieve", precision="fp32", device="cpu", epochs=1)
    images = torch.zeros(4, 3, 48, 48, dtype=torch.uint8)
    learner.learn(images, captions=["a", "b", "c", "d"])
    with pytest.raises(ValueError, match="a graph gives scores of classes, and retrieve learns none"):
        learner.export(tmp_path / "graph", "onnx")
