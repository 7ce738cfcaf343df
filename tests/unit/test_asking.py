"""Asking a learner in words: search, and classes that it was never taught."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from perdure.api.learner import Learner
from perdure.cli.main import main
from perdure.objectives.zeroshot import class_texts

NAMES = ["a cat", "two dogs", "雪山"]


def pictures(n: int = 6) -> Tensor:
    return torch.randint(0, 256, (n, 3, 16, 16), generator=torch.Generator().manual_seed(3)).byte()


@pytest.fixture(scope="module")
def learner() -> Learner:
    options: dict[str, Any] = {"epochs": 1, "precision": "fp32", "attention": "sdpa", "device": "cpu"}
    made = Learner.create("tiny(dim=16, text=True)", "lora(rank=2)", **options)
    return made.learn(pictures(), ["a", "b"] * 3)


def cosines(learner: Learner, texts: list[str], templates: tuple[str, ...]) -> Tensor:
    with learner.inference():
        features = F.normalize(learner.encode({"image": pictures()}), dim=1)
        return (features @ class_texts(learner, texts, templates).T).clone()


def test_search_ranks_images_by_the_cosine_to_the_text_as_it_stands(learner: Learner) -> None:
    wanted = cosines(learner, ["雪山"], ("{}",))[:, 0]
    found = learner.search(pictures(), "雪山", top=4)
    assert [place for place, _ in found] == wanted.argsort(descending=True)[:4].tolist()
    assert [cosine for _, cosine in found] == pytest.approx(wanted.sort(descending=True).values[:4].tolist(), abs=1e-6)
    assert len(learner.search(pictures(), "雪山", top=99)) == 6
    one_by_one = learner.search(pictures(), "雪山", top=2, batch_size=1)
    assert [place for place, _ in one_by_one] == [place for place, _ in found[:2]]


def test_any_words_can_be_chosen_among_whatever_was_learnt(learner: Learner) -> None:
    shares = (learner.backbone.logit_scale * cosines(learner, NAMES, ("a photo of a {}.",))).softmax(1)
    for line, found in zip(shares.tolist(), learner.predict(pictures(), classes=NAMES), strict=True):
        assert dict(found) == pytest.approx(dict(zip(NAMES, line, strict=True)), abs=1e-6)
        assert found == sorted(found, key=lambda each: -each[1])
    assert {name for name, _ in learner.predict(pictures())[0]} == {"a", "b"}


def test_what_cannot_be_asked_says_what_can(learner: Learner) -> None:
    for ask, expected in (
        (lambda: learner.search(pictures(), "  "), "is empty: say what to look for"),
        (lambda: learner.predict(pictures(), classes=[]), "classes is empty"),
    ):
        with pytest.raises(ValueError, match=expected):
            ask()
    assert learner.search([], "a") == []
    blind = Learner.create("tiny(dim=16)", "probe", epochs=1, precision="fp32", device="cpu").learn(
        pictures(), ["a", "b"] * 3
    )
    with pytest.raises(ValueError, match="has no text tower"):
        blind.search(pictures(), "a")
    pairs = Learner.create("tiny(dim=16, text=True)", "probe", "retrieve()", precision="fp32", device="cpu")
    with pytest.raises(
        ValueError, match=r"^labels have no effect with retrieve, which learns captions: give captions="
    ):
        pairs.learn(pictures(), ["a", "b"] * 3)


def test_the_commands_print_what_the_learner_says(learner: Learner, tmp_path: Path, capsys: Any) -> None:
    folder, photos = str(learner.save(tmp_path / "it")), tmp_path / "photos"
    photos.mkdir()
    for number, picture in enumerate(pictures()):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(photos / f"{number}.png")
    main(["search", folder, str(photos), "雪山", "--top", "2", "--json"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(each["image"]).name for each in found] == [
        f"{p}.png" for p, _ in learner.search(pictures(), "雪山", 2)
    ]
    main(["predict", folder, str(photos / "0.png"), "--classes", *NAMES, "--json"])
    (answer,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {each["name"] for each in answer["labels"]} == set(NAMES)
    main(["eval", folder, "--retain", "synthetic(tasks=2, classes_per_task=2)", "--json"])
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert row["zero_shot"] == "synthetic"
    with pytest.raises(SystemExit):
        main(["search", folder, str(tmp_path / "nowhere"), "a"])
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda its: its.predict(pictures(), top=1.5), "top=1.5: expected int from 1"),
        (lambda its: its.predict(pictures(), top=0), "top=0: expected int from 1"),
        (lambda its: its.predict(pictures(), batch_size=0), "batch_size=0: expected int from 1"),
        (lambda its: its.predict(pictures(), task=0), "task=0: expected str or None"),
        (lambda its: its.predict_proba(pictures(), batch_size="8"), "batch_size='8': expected int from 1"),
        (lambda its: its.search(pictures(), "a cat", top=-1), "top=-1: expected int from 1"),
        (lambda its: its.search(pictures(), 3), "text=3: expected str"),
        (lambda its: its.forget(3), "name=3: expected str"),
        (lambda its: its.learn(pictures(), ["a", "b"] * 3, epochs="3"), "epochs='3': expected int from 1"),
        (lambda its: its.learn(pictures(), ["a", "b"] * 3, lr="fast"), "lr='fast': expected float"),
        (lambda its: its.pretrain(pictures(), epochs=None), "epochs=None: expected int from 1"),
        (lambda its: its.save(""), "folder='': expected str or Path, not empty"),
        (lambda its: its.save(7), "folder=7: expected str or Path"),
        (lambda its: its.save(__file__), "test_asking.py is a file, or lies in one: give a folder"),
        (lambda its: its.export("", "peft"), "folder='': expected str or Path, not empty"),
        (lambda its: its.export("out", "gguf"), "unknown export 'gguf'; write one of 'peft', 'merged', "),
        (lambda its: type(its).load(""), "folder='': expected str or Path, not empty"),
    ],
)
def test_what_cannot_be_meant_is_a_value_error_of_one_line(
    call: Callable[[Learner], object], line: str, learner: Learner
) -> None:
    with pytest.raises(ValueError, match=re.escape(line)) as refused:
        call(learner)
    assert "\n" not in str(refused.value)
