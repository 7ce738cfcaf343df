"""Conversations without images among such with them: they teach the towers of images nothing, and stop no training."""

from typing import Any

import pytest
import torch
from PIL import Image

from perdure.api.learner import Learner

SHOWN: list[Any] = [
    {"image": Image.new("RGB", (28, 28), (40 * i, 0, 0)), "question": "What?", "answer": f"a{i}"} for i in range(5)
]
TOLD: list[Any] = [{"question": f"{i} + 1", "answer": str(i + 1)} for i in range(5)]


def learner(method: str, seed: int = 0) -> Learner:
    return Learner.create("tiny_mllm()", method, "generate()", seed=seed, precision="fp32", epochs=1, batch_size=2)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "method",
    [
        "lora(rank=2, tower='vision', at='qkvo,mlp')",
        "lora(rank=2, tower='vision+projector', at='mlp')",
        "lora(rank=2, tower='projector+language', at='mlp')",
        "finetune(tower='vision')",
    ],
)
def test_a_batch_without_images_is_a_batch_like_any_other(method: str, seed: int) -> None:
    taught = learner(method, seed)
    before = {name: value.clone() for name, value in taught.learnt_state().items()}
    taught.learn(conversations=[*SHOWN, *TOLD])
    after = taught.learnt_state()
    assert all(torch.isfinite(value).all() for value in after.values() if value.is_floating_point())
    assert before.keys() != after.keys() or any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method", ["lora(rank=2, tower='vision')", "finetune(tower='vision')"])
def test_a_tower_of_images_that_is_shown_none_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match=r"show no image that .* could learn from. Adapt tower='language'"):
        learner(method).learn(conversations=TOLD)
