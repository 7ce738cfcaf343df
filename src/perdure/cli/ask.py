"""The commands that talk with a learner of a language model: ask, once or for many questions, and chat.

What they compute with is imported when they are called: their help waits for no torch.
"""

import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from perdure.cli.console import Screen
from perdure.cli.inputs import opened_and_told, tell_seen
from perdure.cli.use import LearnerCommand
from perdure.formatting import command
from perdure.options.paths import is_file
from perdure.options.ranges import Count
from perdure.storage.schema import SPECIALISTS

if TYPE_CHECKING:
    from perdure.api.chat import Talk
    from perdure.api.learner import Learner
    from perdure.api.specialists import Specialists

_STDIN = "standard input"
_TOGETHER = 256
"""Questions of which all answers are printed before the next ones are read."""
_HELP = "/image PATH shows an image with the next question, /new forgets what was said, /quit ends"


@dataclass(frozen=True, kw_only=True)
class Ask(LearnerCommand):
    """What a learner of a language model answers to a question about images, or about none."""

    learner: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LEARNER")]
    """A learner's or a run's folder."""
    words: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="WORDS")] = ()
    """Image files, if any, and last the question, in quotes: cat.jpg "What is this?"."""
    stdin: bool = False
    """Read questions from standard input, one JSON object a line, as they stand in files of conversations."""
    tokens: Count = 256
    """Most tokens of an answer; what was taught ends by itself."""
    task: str | None = None
    """Name of the task that the questions belong to, where it is known."""

    def __call__(self, screen: Screen) -> None:
        """Print the answers, in the order of the questions."""
        if self.stdin:
            if self.words:
                raise ValueError(f"{self.words[-1]!r} has no effect beside --stdin, which brings the questions")
            learner = opened_and_told(self.learner, self.device, screen)
            lines, before = iter(sys.stdin.readline, ""), 0
            while some := list(islice(lines, _TOGETHER)):
                self._answer_lines(learner, "\n" * before + "".join(some), screen)  # so errors name the right line
                before += len(some)
            if not before:
                raise ValueError(f"{_STDIN} is empty: give a JSON object with a question on each line")
            return
        together = (self.learner / SPECIALISTS).is_file()
        if together and self.words and all(map(is_file, self.words)):
            # a gateway: images alone are for those who know classes
            team = opened_and_told(self.learner, self.device, screen)
            tell_seen(team, list(map(Path, self.words)), 3, False, screen, task=self.task)
            return
        *images, question = self._question()
        learner = opened_and_told(self.learner, self.device, screen)
        screen.wait("answering")
        answer = learner.ask(images or None, question, self.tokens, self.task)
        screen.result({"images": images, "question": question, "answer": answer}, *(answer.splitlines() or [""]))

    def _question(self) -> tuple[str, ...]:
        from perdure.backbones.preprocess import is_image

        example = command("ask", self.learner, "cat.jpg", "What is this?")
        if not self.words or not self.words[-1].strip():
            raise ValueError(f"there is no question: write {example}")
        for word in self.words[:-1]:
            check_image(word, f"an image, and the question in quotes: {example}")
        last = self.words[-1]
        if is_file(last):
            raise ValueError(f"{last} is a file, and no question comes after it: write {example}")
        if is_image(last) and not any(map(str.isspace, last)):
            raise ValueError(f"there is no image {last!r}, and no question comes after it: write {example}")
        return self.words

    def _answer_lines(self, learner: "Learner | Specialists", lines: str, screen: Screen) -> None:
        from perdure.streams.single_task import questions

        found = questions(lines, _STDIN)
        for asked, answer in zip(found, learner.reply(found, self.tokens, self.task), strict=True):
            facts = {"images": list(asked.names), "question": asked.question, "answer": answer}
            screen.result(facts, " ".join(answer.split()))


@dataclass(frozen=True, kw_only=True)
class Chat(LearnerCommand):
    """Talk with a learner of a language model; on a terminal, or line by line from standard input."""

    learner: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LEARNER")]
    """A learner's or a run's folder."""
    tokens: Count = 256
    """Most tokens of an answer."""
    task: str | None = None
    """Name of the task that the questions belong to, where it is known."""

    def __call__(self, screen: Screen) -> None:
        """Answer line after line, until there are no more."""
        from perdure.api.chat import Talk

        talk = Talk(opened_and_told(self.learner, self.device, screen), self.tokens, self.task)
        for line in screen.lines(_HELP):
            if line == "/quit":
                return
            try:
                answer = _heard(line, talk)
            except ValueError as error:
                if not screen.asks:  # a script is told by the exit code
                    raise
                screen.error(str(error))
                continue
            if answer is not None:
                screen.result({"question": line, "answer": answer}, *(answer.splitlines() or [""]))


def _heard(line: str, talk: "Talk") -> str | None:
    """The answer to a line; None where it is a command.

    Raises:
        ValueError: for an unknown command, an image that cannot be read, or a talk that became too long.
    """
    command, _, rest = line.partition(" ")
    if command == "/new" and not rest:
        talk.forget()
    elif command == "/image":
        path = rest.strip().strip("'\"")
        check_image(path, "/image cat.jpg")
        talk.show(path)
    elif command.startswith("/"):
        raise ValueError(f"there is no {command}: {_HELP}")
    else:
        return talk.say(line)
    return None


def check_image(path: str, example: str) -> None:
    """Refuse what is no file.

    Args:
        path: as it was typed.
        example: what to give.

    Raises:
        ValueError: when there is no such file.
    """
    if not is_file(path):
        raise ValueError(f"there is no image {path!r}: give {example}")
