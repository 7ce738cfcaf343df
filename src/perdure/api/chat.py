"""A talk with a learner that answers in words: what was said so far, and images that wait for a question."""

from typing import Any

from perdure.api.abilities import TOKENS
from perdure.api.given import decoded
from perdure.api.learner import Learner
from perdure.api.specialists import Specialists
from perdure.streams.conversations import Conversation, Turn, messages


class Talk:
    """Nothing is said yet.

    Args:
        learner: who answers; it may be exchanged for another between two answers.
        tokens: most tokens of an answer.
        task: name of the task that the questions belong to, where it is known.

    Raises:
        ValueError: when the learner does not answer in words.
    """

    def __init__(self, learner: Learner | Specialists, tokens: int = TOKENS, task: str | None = None) -> None:
        learner.check_speaks()
        self.learner, self.tokens, self.task = learner, tokens, task
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.turns: list[Turn] = []
        self.images: list[Any] = []
        self.waiting = 0

    def show(self, images: Any) -> None:
        """One or several images, as in `Learner.learn`, that the next question is about."""
        new = decoded(images, self.learner)
        self.images += new
        self.waiting += len(new)

    def say(self, text: str) -> str:
        """The answer to `text`.

        Raises:
            ValueError: when the talk became too long.
        """
        turns: list[Turn] = [*self.turns, ("user", (*[None] * self.waiting, text))]
        (answer,) = self.learner.reply([Conversation(messages(turns), self.images)], self.tokens, self.task)
        # an empty answer is none that a conversation can go on from
        self.turns, self.waiting = [*turns, ("assistant", (answer or "...",))], 0
        return answer
