"""Answers in words: cross-entropy on the tokens of answers, scored by what is said."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.backbones.language import Language
from perdure.core.learner import Core
from perdure.core.objective import Objective
from perdure.options.ranges import Count, checked
from perdure.scoring import Reference, measure, score_of
from perdure.scoring.choices import alternatives, index_of
from perdure.streams.conversations import ConversationSet
from perdure.types import Batch, Data, Task

_TOGETHER = 256
"""Conversations that are read at once; those of them that are alike in length are answered together."""


class Generate(Objective, name="generate"):
    """A row is a token of an answer, the token that ends it included; what competes is the model's whole vocabulary.

    Neither the prompt nor images nor padding are learnt, and no logits of them are computed. Nothing grows with tasks:
    the vocabulary is the head.

    Args:
        tokens: most tokens of an answer.
        score: how answers are scored where the stream does not say, a name of `perdure.scoring.SCORES`; when "" it is
            "choice" for a task whose test questions all have options, their answers among them, else "exact".
        per: the loss is the mean over the batch's answer "token"s, as in transformers and the published codes, or over
            its "answer"s, so that long ones (captions) weigh no more than short ones.
        likelihood: also measure, where there are options to choose from, how often the right one is the likeliest: what
            a model knows, though it may have forgotten how to say it.

    Raises:
        ValueError: for an unknown score.
    """

    asks = frozenset({"conversations"})
    towers = frozenset({"vision", "projector", "language"})
    outputs = ()  # a vocabulary's logits of every token are too many to keep
    open_vocabulary = True
    one_row = False
    vectorised = False  # rows are picked by where answers stand

    @checked
    def __init__(
        self,
        tokens: Count = 32,
        score: str = "",
        per: Literal["token", "answer"] = "token",
        likelihood: bool = False,
    ) -> None:
        super().__init__()
        if score:
            score_of(score)
        self.tokens, self.score, self.per, self.likelihood = tokens, score, per, likelihood
        self._learner: list[Core] = []  # in a list: the learner owns us, not we the learner
        self._cut: set[str] = set()  # where the current task's conversations stand whose answers were cut
        self._optionless = ""  # the current task, where likelihood has nothing to measure

    def bind(self, learner: Core) -> None:
        """See `Objective.bind`."""
        self._learner = [learner]

    def grow(self, learner: Core, task: Task) -> None:
        """Nothing is made room for.

        Raises:
            ValueError: when the backbone does not answer in words, or the task's score is none.
        """
        if not isinstance(learner.backbone, Language):
            raise ValueError(
                f"generate needs a language model, and {learner.backbone.spec} is none: use mllm(path=...), or another "
                "--objective"
            )
        score_of(self.score_for(task))
        self.bind(learner)
        self._cut = set()
        self._optionless = task.name if self.likelihood and len(task.test) and not _offers_options(task) else ""

    def planned(self, task: Task) -> Task:
        """`task` with the score that its questions ask for, where none was named.

        Raises:
            ValueError: for the first test question that cannot be measured so, with its file and line.
        """
        if not isinstance(test := task.test, ConversationSet):
            return task
        if not (task.score or self.score) and test.offers_choices:
            task = replace(task, score="choice")
        if self.score_for(task) != test.score:  # which the stream has checked
            test.check_score(self.score_for(task))
        if self.likelihood:
            test.check_score("choice", offered=True)
        return task

    def check_used(self, tasks: Sequence[Task]) -> None:
        """Raise a ValueError where the likelihood of options is to be measured, and nothing has options."""
        if self.likelihood and not any(map(_offers_options, tasks)):
            raise ValueError(
                "generate(likelihood=True) has no effect: no test conversation has options to choose from; leave it "
                "out, or give some with options"
            )

    @property
    def backbone(self) -> Language:
        """The learner's model."""
        backbone = self._learner[0].backbone
        assert isinstance(backbone, Language)
        return backbone

    def scores(self, features: Tensor) -> Tensor:
        """Logits (R, vocabulary) of hidden states (R, dim)."""
        return self.backbone.head(features)

    def distributions(self, features: Tensor | None, batch: Batch, old: bool = False) -> list[Tensor]:
        """Logits (R, vocabulary): one distribution a token, which former tasks had already."""
        if features is None:
            raise ValueError("generate keeps no logits: its rows are needed")
        return [self.scores(features)]

    def targets(self, batch: Batch) -> Tensor:
        """The token of each row, int64 (R,)."""
        return self.backbone.targets(batch)

    def owners(self, batch: Batch) -> Tensor:
        """The conversation of each row, int64 (R,)."""
        return self.backbone.owners(batch)

    def chance_loss(self, batch: Batch, only_task: bool) -> float:
        """Log of the number of tokens that there are."""
        return math.log(self.backbone.model.config.get_text_config().vocab_size)

    def loss(self, features: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy of the batch, see `per`."""
        pairs = zip(batch.get("conversation", ()), self.backbone.tokens(batch), strict=False)
        self._cut |= {str(conversation.get("where")) for conversation, tokens in pairs if tokens.cut}
        if self.per == "answer":
            return self.losses(features, batch).mean()
        return F.cross_entropy(self.scores(features), self.targets(batch))

    def losses(self, features: Tensor, batch: Batch, only_task: bool | None = None) -> Tensor:
        """Mean cross-entropy of each conversation's answer, (B,)."""
        rows = F.cross_entropy(self.scores(features), self.targets(batch), reduction="none")
        owners = self.owners(batch)
        counts = torch.bincount(owners)
        return torch.zeros_like(counts, dtype=rows.dtype).index_add(0, owners, rows) / counts

    def remarks(self) -> list[str]:
        """How many answers were longer than there was room for; whether there was nothing to choose from."""
        said = []
        if self._optionless:
            said = [f"likelihood=True measures nothing of {self._optionless!r}: no test conversation has options"]
        if not self._cut:
            return said
        count, room = len(self._cut), self.backbone.dialogue.length
        return [
            *said,
            f"{count} answers were cut, to fit into {room} tokens with their questions, the first of {min(self._cut)}: "
            "give a longer length= to mllm(), or shorten them",
        ]

    def answers(self, learner: Core, data: Data, tokens: int | None = None) -> list[str]:
        """What `learner` says in each conversation of `data`, in at most so many tokens; None: as it is measured."""
        with learner.inference():
            return [text for batch in learner.batches(data, _TOGETHER) for text in self.say(learner, batch, tokens)]

    def say(self, learner: Core, batch: Batch, tokens: int | None = None) -> list[str]:
        """What `learner` says in each conversation of `batch`, see `answers`."""

        def say(part: Batch) -> list[str]:
            return self.backbone.generate(
                part, tokens or self.tokens, within=learner.applied, alike=learner.applies_alike
            )

        with learner.computing():
            return learner.said(batch, say)

    def evaluate(self, learner: Core, tasks: Sequence[Task], size: int = _TOGETHER) -> list[dict[str, float]]:
        """Scores of the answers to the test set of each of `tasks`, see `perdure.scoring.measure`.

        `strict` in the form that was asked for; `lenient`, whether the truth is in what was said; the shares that are
        `empty` or `unparsable`, which are wrong; and, where it is asked for, `likeliest`.
        """
        with learner.inference():
            return [self._measured(learner, task, size) for task in tasks]

    def _measured(self, learner: Core, task: Task, size: int) -> dict[str, float]:
        said: list[str] = []
        references: list[Reference] = []
        chosen: list[bool] = []
        for batch in learner.batches(learner.cache.test(task.test), size):
            said += self.say(learner, batch)
            own = [reference_of(each) for each in batch["conversation"]]
            references += own
            if self.likelihood and any(each.options for each in own):
                chosen += self._likeliest(learner, batch, own)
        found = measure(said, references, self.score_for(task))
        return found | ({"likeliest": sum(chosen) / len(chosen)} if chosen else {})

    def _likeliest(self, learner: Core, batch: Batch, references: Sequence[Reference]) -> list[bool]:
        """Of those that have options: whether the likeliest one is right; the first of several alike counts."""
        with learner.computing():
            candidates = [alternatives(each.answers[0], each.options) for each in references]
            # in every process alike: how many answers there are is not known from the batch
            with learner.undivided():
                scores = self.backbone.likelihoods(batch, candidates, within=learner.applied)
        pairs = zip(references, scores, strict=True)
        return [
            int(own.argmax()) in {index_of(answer, each.options) for answer in each.answers}
            for each, own in pairs
            if each.options
        ]

    def score_for(self, task: Task) -> str:
        """The name of the score of a task's answers."""
        return task.score or self.score or "exact"


def _offers_options(task: Task) -> bool:
    return bool(getattr(task.test, "offers_options", False))


def reference_of(conversation: Mapping[str, Any]) -> Reference:
    """What is right in a conversation, as scores want it."""
    answer = conversation["answer"]
    asked = conversation["messages"][-1]["content"]
    texts = [asked] if isinstance(asked, str) else [part["text"] for part in asked if part["type"] == "text"]
    return Reference(
        (answer,) if isinstance(answer, str) else tuple(answer),
        tuple(conversation.get("options") or ()),
        "\n".join(texts),
        next(iter(conversation.get("names") or ()), ""),
        conversation.get("kind") or "",
        tuple(conversation.get("categories") or ()),
    )
