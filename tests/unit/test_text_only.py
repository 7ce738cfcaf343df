"""What language models are shown: conversations with images, without them, and a model that was asked before."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from perdure.api.learner import Learner
from perdure.training.loop import Quiet

SHOWN: list[Any] = [
    {"image": Image.new("RGB", (28, 28), (40 * i, 0, 0)), "question": "What?", "answer": f"a{i}"} for i in range(5)
]
TOLD: list[Any] = [{"question": f"{i} + 1", "answer": str(i + 1)} for i in range(5)]


def learner(method: str, seed: int = 0, size: int = 2) -> Learner:
    return Learner.create("tiny_mllm()", method, "generate()", seed=seed, precision="fp32", epochs=1, batch_size=size)


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


@pytest.mark.parametrize(
    "method",
    [
        f"lora(rank=2, tower='vision'){part}"
        for part in (" + ewc", " + mas", " + si", " + gem(size=8)", " + agem(size=8)", " + lwf", " + derpp(size=8)")
    ]
    + [f"lora(rank=2, tower='projector', at='mlp') + {part}" for part in ("reptile", "fomaml", "maml", "lamaml")]
    + ["gpm(tower='vision')", "inflora(rank=2, tower='vision')", "finetune(tower='vision') + ewc"],
)
def test_what_asks_for_gradients_finds_none_in_texts_alone(method: str) -> None:
    # two where halves are set against each other, of which some hold a text alone
    taught = learner(method, size=2 if method.endswith(("reptile", "maml")) and "lamaml" not in method else 1)
    for shift in (0, 3):  # the second lesson begins with what the first has left
        taught.learn(conversations=[{**each, "answer": f"{i + shift}"} for i, each in enumerate([*SHOWN, *TOLD])])
    assert all(torch.isfinite(value).all() for value in taught.learnt_state().values() if value.is_floating_point())


def test_a_lesson_of_texts_alone_tells_what_is_not_read(tmp_path: Path) -> None:
    class Noted(Quiet):
        def note(self, text: str) -> None:
            told.append(text)

    rows, told = [{**each, "img": "0.png"} for each in TOLD], list[str]()
    (tmp_path / "q.json").write_text(json.dumps(rows))
    taught = learner("lora(rank=2, tower='language')")
    taught.learn(conversations=rows, progress=Noted())
    taught.learn(tmp_path / "q.json", progress=Noted())
    said = ": only texts are read; columns that are not read: img"
    assert [line for line in told if "images" in line] == [
        f"no images in {where}{said}" for where in ("conversations", tmp_path / "q.json")
    ]


@pytest.mark.parametrize("method", ["lora(rank=2, tower='vision')", "finetune(tower='vision')"])
def test_a_tower_of_images_that_is_shown_none_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match=r"show no image that .* could learn from. Adapt tower='language'"):
        learner(method).learn(conversations=TOLD)


@pytest.mark.parametrize("method", ["prompt(tower='vision')", "prefix(tower='vision')", "adapter(tower='vision')"])
def test_it_does_not_matter_whether_the_model_was_asked_before_it_learns(method: str) -> None:
    new, asked = learner(method), learner(method)
    asked.backbone(asked.backbone.sample())  # LLaVA goes on with what transformers records, from the first call on
    for each in (new, asked):
        each.learn(conversations=SHOWN)
    expected, found = new.learnt_state(), asked.learnt_state()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
