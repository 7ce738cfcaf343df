"""What one entry of a file says: a conversation in LLaVA's form, messages with roles, or a question and its answer.

Every error is a ValueError without the place, which the reader of the file puts in front.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from perdure.formatting import meant
from perdure.streams.conversation_values import (
    MARK,
    answer_texts,
    cleaned,
    is_given,
    keys_of_options,
    letter_of,
    options_listed,
    parsed_json,
    plain_text,
    right_answers,
    taught_first,
    text_that_says,
    value_shown,
)
from perdure.streams.conversations import Record, Role, Turn, check_turns

LETTER = "Answer with the option's letter from the given choices directly."
"""What LLaVA was taught to follow; stands after options that are written out here."""

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_ANSWERS = ("answer", "answers", "answer_bbox")
_IMAGES = ("image", "images")
_QUESTIONS = ("question", "text", "prompt", "questions")
_OPTIONS = ("options", "choices", "multi-choice options")
_KINDS = ("kind", "answer_type")
_REFUSED = ("audio", "audios", "video", "videos")


@dataclass(frozen=True)
class Columns:
    """Under which names an entry says what; None: the usual ones.

    Args:
        image: of one image or a list of them.
        question: of the question, or of a list of questions about the same images.
        answer: of the answer, or of a list of right ones.
        by: of the task, where a column says it.
        suffix: what is written under each question; None: how to answer, where options are written out.
        every_turn: whether each answer of a conversation is an example, and not only the last.
    """

    image: str | None = None
    question: str | None = None
    answer: str | None = None
    by: str | None = None
    suffix: str | None = None
    every_turn: bool = False

    @property
    def images(self) -> tuple[str, ...]:
        """Names that the images may have."""
        return (self.image,) if self.image else _IMAGES

    @property
    def named(self) -> dict[str, str]:
        """Names that were chosen, by what they stand for."""
        named = {"image": self.image, "question": self.question, "answer": self.answer}
        return {option: name for option, name in named.items() if name}

    def unread(self, held: Iterable[str]) -> list[str]:
        """Those of the names that entries hold of which nothing is read."""
        others = (*_QUESTIONS, *_ANSWERS, *_OPTIONS, *_KINDS, *_REFUSED, "conversations", "messages", "system")
        return [each for each in held if each not in {*self.named.values(), *self.images, *others, self.by}]


def unanswered(row: Any) -> Any:
    """An entry that is only asked as one that `records` takes: with an answer, whichever, where it has none."""
    if not isinstance(row, Mapping) or _first(row := cleaned(row), _ANSWERS) is not None:
        return row
    asked, talk = _first(row, _QUESTIONS), is_given(row.get("conversations")) or is_given(row.get("messages"))
    if asked is None and not talk:  # refused, for what it has itself
        return row
    several = isinstance(asked, list | tuple) and not talk
    return {**row, "answer": ["A"] * len(asked) if several else "A"}


def records(row: Any, place: str, key: str, show: Callable[[Any], Sequence[int]], columns: Columns) -> list[Record]:
    """The examples in one entry of a file.

    Args:
        row: the entry.
        place: file and line.
        key: what names the entry wherever the data lies.
        show: from what stands where an image is expected to the numbers of images.
        columns: what is called how.

    Raises:
        ValueError: when the entry is not as expected.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with conversations, messages or a question, got {value_shown(row)}")
    row = cleaned(row)
    for name in _REFUSED:
        if row.get(name):
            raise ValueError(f"it holds {name!r}, and only texts and images are read: leave it out, or give frames")
    topic, kind = _topic(row, columns.by), _first(row, _KINDS)
    options = options_listed(_first(row, _OPTIONS))

    def check(turns: Sequence[Turn], images: int) -> None:
        if columns.image not in (None, *row) and not images and any(None in parts for _, parts in turns):
            raise ValueError(f"no image in {_missing(columns.image, row)}")
        check_turns(turns, images)

    def made(number: int, turns: list[Turn], images: Sequence[int], answers: tuple[str, ...]) -> Record:
        check(turns, len(images))
        return Record(tuple(turns), tuple(images), answers, place, f"{key}:{number}", options, _kind(kind), topic)

    spoken = None
    if is_given(row.get("conversations")):
        spoken = _spoken(row["conversations"], "from", "value")
    elif is_given(row.get("messages")):
        spoken = _spoken(row["messages"], "role", "content")
    images = list(show(_first(row, columns.images)))
    if spoken is None:
        return [made(i, *each) for i, each in enumerate(_questions(row, images, options, columns))]
    turns, inside = spoken
    if inside and images:
        raise ValueError("images stand both in the messages and beside them: keep one of the two")
    images = images or [number for value in inside for number in show(value)]
    if is_given(row.get("system")):
        turns.insert(0, ("system", (text_that_says(row["system"], "system"),)))
    if columns.suffix:
        turns = [(role, _with(parts, columns.suffix) if role == "user" else parts) for role, parts in turns]
    answered = turns[-1][0] == "assistant"
    # Where a turn answers, a column "answer" may be a remark of whoever made the data; a list of answers is none.
    told = _first(row, (columns.answer,) if columns.answer else ("answers",) if answered else _ANSWERS)
    if answered and None in turns[-1][1]:
        raise ValueError(f"an {MARK} mark in the answer: only the user shows images")
    check(turns[:-1] if answered else turns, len(images))
    if not answered:
        turns.append(("assistant", (answer_texts(told)[0],)))
    return _of_turns(turns, images, () if told is None else answer_texts(told), columns.every_turn, made)


def _of_turns(
    turns: list[Turn], images: Sequence[int], told: tuple[str, ...], every: bool, made: Callable[..., Record]
) -> list[Record]:
    """Records of a conversation that ends with an answer: of the last one, or of each."""
    found = []
    for end, (role, parts) in enumerate(turns):
        if role != "assistant" or not (every or end == len(turns) - 1):
            continue
        right: tuple[str, ...] = (text_that_says("".join(filter(None, parts)), "answer"),)
        if told and end == len(turns) - 1:
            if right[0] not in told:
                raise ValueError(f"the last turn answers {right[0]!r:.60}, which is not among the answers: correct one")
            others = list(told)
            others.remove(right[0])
            right += tuple(others)
        before = turns[:end]
        seen = sum(part is None for _, content in before for part in content)
        found.append(made(end, before, images[:seen], right))
    return found


def _questions(
    row: Mapping[str, Any], images: Sequence[int], options: tuple[str, ...] | None, columns: Columns
) -> list[tuple[list[Turn], Sequence[int], tuple[str, ...]]]:
    """Turns, images and answers of an entry with a question, or with a list of them about the same images."""
    known = (columns.question,) if columns.question else _QUESTIONS
    asked = _first(row, known)
    if asked is None:
        held = ", ".join(map(str, row)) or "nothing"
        near = meant(columns.question, [str(each) for each in row]) if columns.question else ""
        raise ValueError(f"no question in {' or '.join(known)}{near}, no conversations and no messages; it has: {held}")
    told = _told(row, columns.answer)
    if isinstance(asked, list | tuple):
        if not isinstance(told, list | tuple) or len(told) != len(asked):
            raise ValueError(f"{len(asked)} questions need as many answers, got {value_shown(told)}")
        pairs = [(question, right_answers(answer)) for question, answer in zip(asked, told, strict=True)]
    else:
        right_ones, people = right_answers(told), row.get("answers")
        if columns.answer is None and isinstance(people, list) and people and told is not people:
            right_ones = taught_first(right_ones[0], people)
        pairs = [(asked, right_ones)]
    found = []
    for question, answers in pairs:
        text = text_that_says(question, "question")
        suffix, right = columns.suffix, tuple(text_that_says(each, "answer") for each in answers)
        lettered, keys = list(zip(ascii_uppercase, options or (), strict=False)), keys_of_options(_first(row, _OPTIONS))
        shown = all(re.search(rf"\b{a}[.):]\s*{re.escape(each)}", text) for a, each in lettered)
        if options and (not shown or isinstance(answers[0], int) or right[0] in keys):
            right = tuple(dict.fromkeys(letter_of(each, options, keys) for each in answers))
        if options and not shown:
            text = "\n".join((text, *(f"{letter}. {option}" for letter, option in lettered)))
            suffix = LETTER if suffix is None else suffix
        parts = _parts(f"{text}\n{suffix}" if suffix else text)
        if None not in parts:
            parts = (*[None] * len(images), *parts)
        turns: list[Turn] = [("user", parts)]
        found.append((turns, images, right))
    return found


def _spoken(said: Any, who: str, what: str) -> tuple[list[Turn], list[Any]]:
    """The turns, and the images that stand within them."""
    if isinstance(said, str):
        said = parsed_json(said)
    if not isinstance(said, list | tuple) or not said:
        raise ValueError(f"expected a list of turns, each with {who!r} and {what!r}, got {value_shown(said)}")
    turns: list[Turn] = []
    images: list[Any] = []
    bare = False
    for number, turn in enumerate(said, 1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get(who), str) or turn.get(what) is None:
            raise ValueError(f"turn {number}: expected {who!r} and {what!r}, got {value_shown(turn)}")
        if turn[who] not in _ROLES:
            near = meant(turn[who], _ROLES)
            raise ValueError(f"turn {number} is from {turn[who]!r}{near}; expected one of {', '.join(_ROLES)}")
        content: tuple[str | None, ...] = ()
        for value in [turn[what]] if isinstance(turn[what], str) else _listed(turn[what], number):
            if (image := _image_part(value)) is not None:
                content += (None,)
                images += image
                bare = bare or not image
            else:
                marked = value["text"] if isinstance(value, Mapping) else value
                content += _parts(plain_text(marked, f"turn {number}"))
                bare = bare or MARK in marked
        turns.append((_ROLES[turn[who]], content))
    if bare and images:
        raise ValueError("some images stand in the messages and some beside them: keep one of the two")
    return turns, images


def _listed(content: Any, number: int) -> Sequence[Any]:
    if not isinstance(content, list | tuple):
        raise ValueError(f"turn {number}: expected a text, or a list of texts and images, got {value_shown(content)}")
    return content


def _image_part(part: Any) -> list[Any] | None:
    """What a part of a message shows: nothing where the image is listed elsewhere; None where it is a text."""
    if isinstance(part, str):
        return None
    sort = part.get("type") if isinstance(part, Mapping) else None
    if sort == "text" and isinstance(part.get("text"), str):
        return None
    if sort not in ("image", "image_url"):
        raise ValueError(f"a part {value_shown(part)} of a message: only texts and images are read; leave it out")
    shown = next((part[name] for name in ("image", "image_url", "path", "url") if is_given(part.get(name))), None)
    if isinstance(shown, Mapping) and is_given(shown.get("url")):
        shown = shown["url"]
    return [] if shown is None else [shown]


def _parts(text: str) -> tuple[str | None, ...]:
    """A text with marks as texts and images (None), without the breaks that divide the two."""
    pieces = text.split(MARK)
    found: list[str | None] = []
    for i, piece in enumerate(pieces):
        inner = re.sub(r"^\s*\n\s*", "", piece) if i else piece.lstrip()
        inner = re.sub(r"\s*\n\s*$", "", inner) if i < len(pieces) - 1 else inner.rstrip()
        if not any(found):
            inner = inner.lstrip()
        found += [inner] if inner.strip() else []
        found += [None] if i < len(pieces) - 1 else []
    return tuple(found)


def _with(parts: tuple[str | None, ...], suffix: str) -> tuple[str | None, ...]:
    *others, last = parts or (None,)
    return (*parts, suffix) if last is None else (*others, f"{last}\n{suffix}")


def _kind(given: Any) -> str:
    return plain_text(given, "kind") if isinstance(given, str) else ""


def _missing(named: str | None, row: Mapping[str, Any]) -> str:
    """The name of a column that an entry lacks, what may have been meant, and what there is."""
    held = [str(each) for each in row]
    return f"{named!r}{meant(str(named), held)}; it has: {', '.join(held) or 'nothing'}"


def _told(row: Mapping[str, Any], named: str | None) -> Any:
    """What an entry with a question says is right."""
    if named is not None and named not in row:
        raise ValueError(f"no answer in {_missing(named, row)}")
    return _first(row, (named,) if named else _ANSWERS)


def _topic(row: Mapping[str, Any], by: str | None) -> str:
    if by is None:
        return ""
    value = row.get(by)
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        said = f"is {value_shown(value)}" if by in row else f"is missing{meant(by, [str(each) for each in row])}"
        raise ValueError(f"{by!r} (by=) {said}; expected the name of a task")
    return " ".join(plain_text(value, by).split())


def _first(row: Mapping[str, Any], names: Sequence[str | None]) -> Any:
    return next((row[name] for name in names if name is not None and is_given(row.get(name))), None)
