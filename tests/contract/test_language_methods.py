"""Methods on language models: each learns answers, and goes on where it was stopped."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from perdure.backbones.language import Language
from perdure.core.learner import Core
from perdure.streams import build_stream
from perdure.training.config import RunConfig, make_backbone, make_method, make_objective
from perdure.training.loop import Quiet, TrainConfig, fit_task
from perdure.training.run import resume, run

METHODS = [
    "probe",
    "lora(rank=2, tower='language', at='qkvo,mlp')",
    "lora(rank=2, tower='vision')",
    "lora(rank=2, tower='projector', at='mlp')",
    "lora(rank=2, tower='language', per_task=True)",
    "inflora(rank=2, tower='language', at='qkv')",
    "sd_lora(rank=2, tower='language')",
    "o_lora(rank=2, tower='language')",
    "c_lora(rank=2, tower='language')",
    "adapter(rank=3, tower='language')",
    "finetune(tower='language')",
    "gpm(tower='language', keep=0.5)",
    "joint(tower='language')",
    "lora(rank=2, tower='language') + ewc(samples=4)",
    "lora(rank=2, tower='language') + mas(samples=4)",
    "lora(rank=2, tower='language') + si",
    "lora(rank=2, tower='language') + lwf",
    "lora(rank=2, tower='language') + replay(size=4)",
    "lora(rank=2, tower='language') + derpp(size=4)",
    "lora(rank=2, tower='language') + gem(size=4)",
    "lora(rank=2, tower='language') + agem(size=4)",
    "lora(rank=2, tower='language') + weight_average",
]
FAMILIES = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm")
EVERYWHERE = [METHODS[1], METHODS[5], METHODS[13]]


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two tasks of ten questions about pictures of one colour, one of them without a picture, one with two."""
    folder, colours = tmp_path_factory.mktemp("questions"), {"red": (220, 30, 30), "blue": (30, 30, 220)}
    for name, colour in colours.items():
        for i in range(5):
            pixels = np.full((28, 28 + 8 * i, 3), colour, dtype=np.uint8) + np.uint8(i)
            Image.fromarray(pixels).save(folder / f"{name}{i}.png")
    for task, question in (("colour", "Which colour?"), ("red", "Is it red?")):
        rows: list[dict[str, Any]] = [
            {"image": f"{name}{i}.png", "question": question, "answer": name if task == "colour" else "no"}
            for name in colours
            for i in range(5)
        ]
        rows[0]["image"] = ["red0.png", "blue0.png"]
        rows.append({"question": f"{question} Nothing is shown.", "answer": "none"})
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"conversations(path={[str(folder / 'colour.jsonl'), str(folder / 'red.jsonl')]!r}, share_images=True)"


def config_of(method: str, stream: str, backbone: str = "tiny_mllm()") -> RunConfig:
    settings = {"epochs": 2, "batch_size": 4, "lr": 1e-2, "precision": "fp32", "attention": "sdpa", "device": "cpu"}
    return RunConfig(
        method=method, stream=stream, backbone=backbone, objective="generate(tokens=4)", save_every=2, **settings
    )


class Stop(Exception):
    pass


class Breaks(Quiet):
    """Stops in the second task."""

    def __init__(self) -> None:
        self.index = -1

    def task(self, task: Any, *_: Any) -> None:
        self.index = task.index

    def step(self, step: int, *_: Any) -> None:
        if (self.index, step) == (1, 3):
            raise Stop


def taught(method: str, stream: str, backbone: str) -> Core:
    model = make_backbone(backbone)
    learner = Core(model, make_objective("generate(tokens=4)"), make_method(method))
    for task in build_stream(stream, model.preprocess, 0):
        learner.grow(task)
        fit_task(learner, task, TrainConfig(epochs=2, batch_size=4, lr=1e-2))
    return learner


@pytest.mark.parametrize("method", METHODS)
def test_a_method_learns_answers_and_a_stopped_run_of_it_goes_on(
    method: str, stream: str, tmp_path: Path, content_of: Any
) -> None:
    config = config_of(method, stream)
    run(config, tmp_path / "whole")
    with suppress(Stop):
        run(config, tmp_path / "broken", Breaks())
        assert method == "probe", "which has no steps"
    if method != "probe":
        resume(tmp_path / "broken")
    assert content_of(tmp_path / "broken") == content_of(tmp_path / "whole")


@pytest.mark.parametrize("method", EVERYWHERE)
@pytest.mark.parametrize("family", [*FAMILIES[:2], *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES[2:])])
def test_in_every_family_answers_are_alike_alone_and_together(
    family: str, method: str, stream: str, tiny_mllms: Callable[[str], Path]
) -> None:
    learner = taught(method, stream, f"mllm(path={str(tiny_mllms(family))!r})")
    backbone, data = learner.backbone, learner.task.test
    assert isinstance(backbone, Language)
    with learner.inference():
        (batch,) = learner.batches(data, 256)
        said = [backbone.generate(batch, 4, size, learner.applied) for size in (1, 8)]
        assert said[0] == said[1]
        weights = [p for p in backbone.parameters() if not torch.isfinite(p).all()]
    assert not weights
