"""The learner in Python: created, taught, asked, saved, loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from perdure.api.learner import Learner
from perdure.core import checkpoint
from perdure.types import Row

PLAIN = {"precision": "fp32", "attention": "sdpa", "device": "cpu", "epochs": 8, "lr": 1e-2, "batch_size": 8}


def create(method: str = "lora(rank=2)", **options: Any) -> Learner:
    return Learner.create("tiny(dim=16)", method, **PLAIN | options)


def pictures(shade: int, count: int = 6) -> torch.Tensor:
    """Noise around a shade of grey."""
    noise = torch.randint(-20, 20, (count, 3, 16, 16), generator=torch.Generator().manual_seed(shade))
    return (shade + noise).to(torch.uint8)


def taught(method: str = "lora(rank=2)") -> Learner:
    learner = create(method)
    learner.learn(torch.cat([pictures(30), pictures(130)]), ["dark"] * 6 + ["grey"] * 6)
    return learner.learn(torch.cat([pictures(180), pictures(230)]), ["light"] * 6 + ["white"] * 6)


def test_it_answers_with_names_and_shares_that_add_up_to_one() -> None:
    learner = create().learn(torch.cat([pictures(30), pictures(230)]), ["dark"] * 6 + ["white"] * 6)
    answers = learner.predict(torch.cat([pictures(31), pictures(229)]))
    assert [answer[0][0] for answer in answers] == ["dark"] * 6 + ["white"] * 6
    for answer in answers:
        assert sum(share for _, share in answer) == pytest.approx(1)
        assert [share for _, share in answer] == sorted((share for _, share in answer), reverse=True)
    assert [len(answer) for answer in learner.predict(pictures(31), top=1)] == [1] * 6


@pytest.mark.parametrize("method", ["lora(rank=2)", "ncm", "inflora(rank=2) + replay(size=4)", "probe"])
def test_a_saved_learner_loaded_answers_the_same(method: str, tmp_path: Path) -> None:
    learner, images = taught(method), torch.cat([pictures(31), pictures(181)])
    learner.save(tmp_path / "it", [Row(1, 0, "accuracy", 0.5)])
    loaded = Learner.load(tmp_path / "it")
    assert loaded.known == {"dark": 0, "grey": 1, "light": 2, "white": 3}
    assert loaded.predict(images) == learner.predict(images)
    assert checkpoint.whole(tmp_path / "it")[-1].rows == [Row(1, 0, "accuracy", 0.5)]


def test_predictions_do_not_pile_up_in_memory() -> None:
    learner = taught("ncm")
    kept = len(learner.kept)
    for _ in range(3):
        learner.predict(pictures(31))
    assert len(learner.kept) == kept


def test_a_folder_of_class_folders_is_learnt(tmp_path: Path) -> None:
    for name, shade in (("dark", 30), ("white", 230)):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("L", (20, 30), shade + i).save(tmp_path / name / f"{i}.png")
    learner = create().learn(tmp_path)
    assert learner.known == {"dark": 0, "white": 1}
    assert learner.predict([tmp_path / "white" / "0.png"], top=1)[0][0][0] == "white"
