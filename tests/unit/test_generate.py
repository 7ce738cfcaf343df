"""Answers in words: what is learnt of them, and how they are scored."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from perdure.adapters.low_rank import LowRankSet
from perdure.backbones.preprocess import Preprocess
from perdure.backbones.tiny import tiny
from perdure.backbones.tiny_mllm import tiny_mllm
from perdure.core.learner import Core
from perdure.evaluation.answer_examples import _is_right
from perdure.objectives import Generate
from perdure.scoring import Reference, measure, score_of
from perdure.streams import build_stream
from perdure.streams.conversations import Conversation
from perdure.training.config import make_method, make_objective
from perdure.types import Batch, Task

SIZE = Preprocess(size=8, resize=8)


def example(question: str, answer: Any, colour: int = 0, **more: Any) -> Conversation:
    image = Image.fromarray(np.full((28, 28, 3), colour, dtype=np.uint8))
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    return Conversation([{"role": "user", "content": parts}], [image], answer, **more)


class Examples:
    """Conversations as a task's data."""

    def __init__(self, examples: list[Conversation]) -> None:
        self.examples = examples
        self.labels = torch.zeros(len(examples), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitems__(self, positions: Any) -> Batch:
        chosen: Any = [self.examples[i] for i in positions]
        return {"label": self.labels[list(positions)], "conversation": chosen}


COLOURS = [example("Which colour?", answer, colour) for answer, colour in (("black", 0), ("grey", 120), ("white", 255))]


def learner_of(objective: str = "generate", examples: list[Conversation] = COLOURS, score: str = "") -> Core:
    learner = Core(tiny_mllm(), make_objective(objective), make_method("probe"))
    data = Examples(examples)
    learner.grow(Task(0, "colours", (0,), ("colours",), None, data, data, score))
    return learner


def batch_of(learner: Core) -> Batch:
    return next(learner.batches(learner.task.train, 8))


def test_rows_learn_answers_and_nothing_else() -> None:
    learner = learner_of()
    batch = batch_of(learner)
    objective, rows = learner.objective, learner.encode(batch)
    tokens = learner.backbone.dialogue.tokenizer
    assert tokens.decode(objective.targets(batch)) == "black<|end|>grey<|end|>white<|end|>"
    loss = objective.loss(rows, batch)
    torch.testing.assert_close(loss, F.cross_entropy(objective.scores(rows), objective.targets(batch)))
    each = objective.losses(rows, batch)
    counts = objective.owners(batch).bincount()
    assert counts.tolist() == [6, 5, 6]
    torch.testing.assert_close((each * counts).sum() / counts.sum(), loss)
    torch.testing.assert_close(learner_of("generate(per='answer')").objective.loss(rows, batch), each.mean())


def test_logits_are_computed_of_answer_tokens_only() -> None:
    learner, seen = learner_of(), []
    batch = batch_of(learner)
    vocabulary = learner.backbone.model.config.get_text_config().vocab_size

    def watch(_module: Any, _args: Any, found: Any) -> None:
        if isinstance(found, torch.Tensor) and found.shape[-1] == vocabulary:
            seen.append(tuple(found.shape))

    handle = torch.nn.modules.module.register_module_forward_hook(watch)
    try:
        learner.loss(batch)
    finally:
        handle.remove()
    assert seen == [(17, vocabulary)]


def test_what_was_learnt_is_said_and_its_form_is_told_from_what_is_known() -> None:
    taught = [example("Which colour?", *each) for each in (("It is black.", 0), ("grey", 120), ("white", 255))]
    learner = learner_of(examples=taught)
    assert learner.objective.evaluate(learner, learner.tasks)[0]["strict"] == 0
    torch.manual_seed(0)
    for tower in ("vision", "language"):
        adapters = LowRankSet()
        adapters.open(learner.backbone, learner.backbone.sites("qkvo", tower=tower), rank=8)
        learner.add_module(tower, adapters)
    learner.backbone.model.model.multi_modal_projector.requires_grad_(True)
    optimizer = torch.optim.Adam(learner.trainable().values(), 2e-2)
    for _ in range(80):
        optimizer.zero_grad()
        learner.loss(batch_of(learner)).backward()
        optimizer.step()
    assert learner.objective.answers(learner, learner.task.test) == ["It is black.", "grey", "white"]
    asked = Examples([example("Which colour?", *each) for each in (("black", 0), ("grey", 120), ("red", 255))])
    found = learner.objective.evaluate(learner, [Task(1, "others", (0,), ("others",), None, asked, asked)])[0]
    assert found["strict"] == pytest.approx(1 / 3)
    assert found["lenient"] == pytest.approx(2 / 3)
    assert found["empty"] == 0


@pytest.mark.parametrize("letters", [True, False])
def test_the_likeliest_option_is_looked_for_in_the_form_of_the_answer(letters: bool) -> None:
    options = ("(A) red", "(B) blue", "(C) green")
    answers = ("B", "A") if letters else ("blue", "red")
    asked = [example(f"Which {i}?", answer, options=options) for i, answer in enumerate(answers)]
    learner = learner_of("generate(likelihood=True)", asked, "choice")
    said = ["A", "B", "C"] if letters else ["red", "blue", "green"]
    best = [each.argmax() for each in learner.backbone.likelihoods({"conversation": asked}, [said, said])]
    right = [int(best[0] == 1), int(best[1] == 0)]
    assert learner.objective.evaluate(learner, learner.tasks)[0]["likeliest"] == sum(right) / 2


def test_a_backbone_without_words_and_an_unknown_score_are_refused() -> None:
    with pytest.raises(ValueError, match=r"generate needs a language model, and tiny\(.*use mllm"):
        Core(tiny(), Generate(), make_method("probe")).grow(Task(0, "a", (0,), ("a",)))
    with pytest.raises(ValueError, match="unknown score 'exakt'"):
        make_objective("generate(score='exakt')")
    with pytest.raises(ValueError, match="unknown score 'vqaa'"):
        learner_of(score="vqaa")


OFFERED: dict[str, Any] = {"options": ["red", "blue"], "answer": "blue"}


def stream_of(folder: Path, rows: list[dict[str, Any]], score: str = "") -> Task:
    file = folder / "q.jsonl"
    file.write_text("".join(json.dumps({"question": f"Which {i}?"} | row) + "\n" for i, row in enumerate(rows)))
    named = f", score={score!r}" if score else ""
    return build_stream(f"conversations(path={str(file)!r}{named})", SIZE, 0, measured=True).tasks[0]


@pytest.mark.parametrize(
    ("objective", "score", "row", "expected"),
    [
        ("generate", "", {}, "choice"),
        ("generate(score='contains')", "", {}, "contains"),
        ("generate(score='exact')", "", {}, "exact"),
        ("generate(score='contains')", "exact", {}, "exact"),
        ("generate", "", {"options": None}, "exact"),
        ("generate", "", {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "x"}]}, "exact"),
    ],
)
def test_where_no_score_is_named_questions_with_options_are_multiple_choice(
    objective: str, score: str, row: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    made: Any = make_objective(objective)
    task = made.planned(stream_of(tmp_path, [OFFERED, OFFERED | row], score))
    assert made.score_for(task) == expected
    if expected == "choice":
        (asked, _) = task.test.__getitems__([0, 1])["conversation"]
        found = measure(["B. blue", "the blue one"], [asked.reference] * 2, made.score_for(task))
        assert (found["strict"], found["lenient"]) == (0.5, 1)


def test_a_score_of_the_objective_is_checked_with_the_file_and_the_line(tmp_path: Path) -> None:
    talk = {"conversations": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "green"}]}
    odd = [OFFERED, talk | {"options": ["red", "blue"]}]
    for objective, rows, message in (
        ("generate(score='vqa')", [OFFERED], "line 1: score 'vqa' needs the answers of at least 4 people"),
        ("generate(score='iou')", [OFFERED], "line 1: the truth 'B' is no box"),
        ("generate(likelihood=True)", odd, "line 2: the right answer 'green' of a multiple-choice question is not"),
    ):
        task = stream_of(tmp_path, rows)
        with pytest.raises(ValueError, match=rf"q\.jsonl, {message}"):
            make_objective(objective).planned(task)


def test_the_likelihood_of_options_is_refused_where_nothing_has_options(tmp_path: Path) -> None:
    offered, plain = stream_of(tmp_path, [OFFERED]), stream_of(tmp_path, [{"answer": "blue"}])
    objective = make_objective("generate(likelihood=True)")
    objective.check_used([plain, offered])
    make_objective("generate").check_used([plain])
    with pytest.raises(ValueError, match=r"^generate\(likelihood=True\) has no effect: no test conversation"):
        objective.check_used([plain])
    learner = Core(tiny_mllm(), objective, make_method("probe"))
    learner.grow(plain)
    assert objective.remarks() == ["likelihood=True measures nothing of 'q': no test conversation has options"]
    learner.grow(offered)
    assert objective.remarks() == []


def test_the_likeliest_of_several_right_options_is_right() -> None:
    asked = [example("Which?", answers, options=("red", "blue")) for answers in (["A", "B"], ["B", "A"])]
    learner = learner_of("generate(likelihood=True)", asked, "choice")
    assert learner.objective.evaluate(learner, learner.tasks)[0]["likeliest"] == 1


@pytest.mark.parametrize(("method", "shared"), [("lora(tower='language')", True), ("lora_experts", False)])
def test_beginnings_are_shared_unless_examples_choose_their_adapters(method: str, shared: bool) -> None:
    twice = [example(question, "black") for question in ("Which colour?", "What colour is it, in one word?")]
    learner = Core(tiny_mllm(), make_objective("generate"), make_method(method))
    data = Examples(twice)
    learner.grow(Task(0, "colours", (0,), ("colours",), None, data, data))
    assert learner.applies_alike is shared
    asked: list[bool] = []
    generate = learner.backbone.generate
    learner.backbone.generate = lambda *args, **given: asked.append(given["alike"]) or generate(*args, **given)
    learner.objective.evaluate(learner, [Task(0, "colours", (0,), ("colours",), None, data, data)])
    assert asked == [shared]


@pytest.mark.parametrize("score", ["cider", "bleu", "rouge", "exact"])
def test_a_caption_in_the_words_of_the_truth_is_right_in_the_report(score: str) -> None:
    truths = ["a dog runs on grass", "two cats sleep", "a red bus"]
    references = [Reference((truth,)) for truth in truths]
    said = ["A dog runs on grass.", "two cats sleep", "a bus"]
    grade = score_of(score).grade(said, references)
    found = map(partial(_is_right, score_of(score)), said, references, grade.marks)
    assert list(found) == [True, True, False]
