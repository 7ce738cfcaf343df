"""Cosine heads: directions compete, and class names can be the start."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from perdure.api.learner import Learner
from perdure.backbones.tiny import tiny
from perdure.core.learner import Core
from perdure.training.config import former_parts, make_method, make_objective
from perdure.training.loop import Quiet
from perdure.training.run import run
from perdure.types import Task


@pytest.fixture
def bench(lab: Any) -> Any:
    return lab.but(objective="classify(cosine=True)")


def with_text(lab: Any, objective: str) -> Core:
    """A learner whose backbone has a text tower."""
    return Core(tiny(dim=16, text=True), make_objective(objective), make_method("probe"), "class", lab.seed)


def test_scores_are_scaled_cosines_and_ignore_the_length_of_rows_and_features(lab: Any) -> None:
    learner = lab.but(objective="classify(cosine=True, scale=7)").taught("probe")
    rows = torch.cat([head.weight for head in learner.objective.heads])
    features = torch.randn(5, 16)
    expected = 7 * F.cosine_similarity(features.unsqueeze(1), rows.unsqueeze(0), dim=2)
    torch.testing.assert_close(learner.objective.scores(features), expected)
    torch.testing.assert_close(learner.objective.scores(100 * features), expected)
    assert [name for name, _ in learner.objective.named_parameters()] == [f"heads.{i}.weight" for i in range(3)]


def test_only_the_new_head_is_set_when_a_task_comes(bench: Any) -> None:
    learner, stream = bench.learner("probe"), bench.stream()
    bench.teach(learner, stream.tasks[:1])
    learnt = learner.objective.heads[0].weight.clone()
    learner.grow(stream.tasks[1])
    assert torch.equal(learner.objective.heads[0].weight, learnt)
    torch.testing.assert_close(learner.objective.heads[1].weight.norm(dim=1), torch.ones(2))
    assert not learner.objective.heads[0].weight.requires_grad
    assert learner.objective.heads[1].weight.requires_grad


def test_a_head_whose_classes_come_again_goes_on(bench: Any) -> None:
    bench = bench.but(scenario="domain")
    learner, stream = bench.learner("probe"), bench.stream()
    bench.teach(learner, stream.tasks[:1])
    learnt = learner.objective.heads[0].weight.clone()
    learner.grow(stream.tasks[1])
    assert len(learner.objective.heads) == 1
    assert torch.equal(learner.objective.heads[0].weight, learnt)


@pytest.mark.parametrize("template", ["a photo of a {}.", "{}"])
def test_heads_from_class_names_score_as_zero_shot_before_training(template: str, lab: Any) -> None:
    stream = lab.stream()
    heads = with_text(lab, f"classify(cosine=True, init='zeroshot', template={template!r})")
    names = with_text(lab, f"zeroshot(templates={template!r})")
    images = stream.tasks[0].test.__getitems__(range(8))
    for task in stream:
        heads.grow(Task.described(task.describe()))
        names.grow(Task.described(task.describe()))
        with heads.inference(), names.inference():
            torch.testing.assert_close(heads(images), names(images))


def test_the_scale_is_ten_or_the_models_own_unless_given(lab: Any) -> None:
    task = lab.stream().tasks[0]
    for options, scale in (("", 10.0), (", init='zeroshot', scale=3.0", 3.0), (", init='zeroshot'", None)):
        learner = with_text(lab, f"classify(cosine=True{options})")
        learner.grow(task)
        assert learner.objective.scale == (scale or float(learner.backbone.logit_scale))


def test_class_names_without_a_text_tower_are_refused(lab: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^classify\(init='zeroshot'\) needs a text tower, which tiny.* or pocket\(\), or"
    ):
        lab.but(objective="classify(cosine=True, init='zeroshot')", dim=16).taught("probe")


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("classify(cosine=True, init='zeroshot', template='cat')", "template='cat' has no {} for the class name"),
        ("classify(cosine=True, template='a {}')", "template='a {}' has no effect with init='random': leave it out$"),
        ("classify(scale=3.0)", "scale=3.0 has no effect without cosine=True: leave it out$"),
        ("zeroshot(cosine=True)", "'zeroshot' has no option 'cosine'"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(objective: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_objective(objective)


class Noted(Quiet):
    """Remembers what the user is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_the_former_part_of_a_sum_sets_the_option_and_says_so_once(lab: Any, bench: Any, tmp_path: Path) -> None:
    old, new = Noted(), Noted()
    before = run(lab.config("lora(rank=2) + cosine(scale=7) + align(epochs=1)"), tmp_path / "old", old)
    config = bench.config("lora(rank=2) + align(epochs=1)", objective="classify(cosine=True, scale=7)")
    assert before["matrix"] == run(config, tmp_path / "new", new)["matrix"]
    said = "write --method 'lora(rank=2) + align(epochs=1)' --objective 'classify(cosine=True, scale=7)'"
    assert [note for note in old.notes if said in note] == [f"cosine is no method any more, but an option: {said}"]
    assert not any("cosine" in note for note in new.notes)
    images = (torch.rand(6, 3, 32, 32) * 255).to(torch.uint8)
    one, other = (Learner.load(tmp_path / name).predict(images) for name in ("old", "new"))
    assert one == other


def test_a_sum_of_former_parts_alone_trains_heads(lab: Any) -> None:
    config, spec = lab.config("cosine(init='zeroshot')"), "classify(cosine=True, init='zeroshot')"
    assert former_parts(config).endswith(f"--method probe --objective {shlex.quote(spec)}")
    with pytest.warns(FutureWarning, match="^cosine is no method any more"):
        Learner.create("tiny()", "cosine")
