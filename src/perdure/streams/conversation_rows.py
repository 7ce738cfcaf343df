"""What one entry of a file says: a conversation in LLaVA's form, messages with roles, or a question and its answer.

Every error is a ValueError without the place, which the reader of the file puts in front.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from perdure.formatting import meant
from perdure.streams.conversations import Record, Role, Turn, check_turns

MARK = "<image>"
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
_LABELLED = re.compile(r"\W?([A-Z])[.):]\s*(\S.*)", re.DOTALL)


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


def unanswered(row: Any) -> Any:
    """An entry that is only asked as one that `records` takes: with an answer, whichever, where it has none."""
    if not isinstance(row, Mapping) or _given(_first(row, _ANSWERS)):
        return row
    asked, talk = _first(row, _QUESTIONS), _given(row.get("conversations")) or _given(row.get("messages"))
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
        raise ValueError(f"expected an object with conversations, messages or a question, got {_shown(row)}")
    for name in _REFUSED:
        if row.get(name):
            raise ValueError(f"it holds {name!r}, and only texts and images are read: leave it out, or give frames")
    topic, kind = _topic(row, columns.by), _first(row, _KINDS)
    options = _options(_first(row, _OPTIONS))

    def made(number: int, turns: list[Turn], images: Sequence[int], answers: tuple[str, ...]) -> Record:
        check_turns(turns, len(images))
        return Record(tuple(turns), tuple(images), answers, place, f"{key}:{number}", options, _kind(kind), topic)

    spoken = None
    if _given(row.get("conversations")):
        spoken = _spoken(row["conversations"], "from", "value")
    elif _given(row.get("messages")):
        spoken = _spoken(row["messages"], "role", "content")
    images = list(show(_first(row, columns.images)))
    if spoken is None:
        return [made(i, *each) for i, each in enumerate(_questions(row, images, options, columns))]
    turns, inside = spoken
    if inside and images:
        raise ValueError("images stand both in the messages and beside them: keep one of the two")
    images = images or [number for value in inside for number in show(value)]
    if _given(row.get("system")):
        turns.insert(0, ("system", (_text(row["system"], "system"),)))
    if columns.suffix:
        turns = [(role, _with(parts, columns.suffix) if role == "user" else parts) for role, parts in turns]
    answered = turns[-1][0] == "assistant"
    # Where a turn answers, a column "answer" may be a remark of whoever made the data; a list of answers is none.
    told = _first(row, (columns.answer,) if columns.answer else ("answers",) if answered else _ANSWERS)
    if answered and None in turns[-1][1]:
        raise ValueError(f"an {MARK} mark in the answer: only the user shows images")
    check_turns(turns[:-1] if answered else turns, len(images))
    if not answered:
        turns.append(("assistant", (_answers(told)[0],)))
    return _of_turns(turns, images, () if told is None else _answers(told), columns.every_turn, made)


def _of_turns(
    turns: list[Turn], images: Sequence[int], told: tuple[str, ...], every: bool, made: Callable[..., Record]
) -> list[Record]:
    """Records of a conversation that ends with an answer: of the last one, or of each."""
    found = []
    for end, (role, parts) in enumerate(turns):
        if role != "assistant" or not (every or end == len(turns) - 1):
            continue
        right: tuple[str, ...] = (_text("".join(filter(None, parts)), "answer"),)
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
    told = _first(row, (columns.answer,) if columns.answer else _ANSWERS)
    several = isinstance(asked, list | tuple)
    pairs = [(asked, told)]
    if several:
        if not isinstance(told, list | tuple) or len(told) != len(asked):
            raise ValueError(f"{len(asked)} questions need as many answers, got {_shown(told)}")
        pairs = list(zip(asked, told, strict=True))
    found = []
    for question, answer in pairs:
        text = _text(question, "question")
        suffix, right = columns.suffix, _answers(answer)
        lettered, keys = list(zip(ascii_uppercase, options or (), strict=False)), _keys(_first(row, _OPTIONS))
        shown = all(re.search(rf"\b{a}[.):]\s*{re.escape(each)}", text) for a, each in lettered)
        if options and (not shown or isinstance(answer, int) or right[0] in keys):
            right = (_letter(answer, right, options, keys),)
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
        said = _json(said)
    if not isinstance(said, list | tuple) or not said:
        raise ValueError(f"expected a list of turns, each with {who!r} and {what!r}, got {_shown(said)}")
    turns: list[Turn] = []
    images: list[Any] = []
    bare = False
    for number, turn in enumerate(said, 1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get(who), str) or turn.get(what) is None:
            raise ValueError(f"turn {number}: expected {who!r} and {what!r}, got {_shown(turn)}")
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
                content += _parts(_plain(marked, f"turn {number}"))
                bare = bare or MARK in marked
        turns.append((_ROLES[turn[who]], content))
    if bare and images:
        raise ValueError("some images stand in the messages and some beside them: keep one of the two")
    return turns, images


def _listed(content: Any, number: int) -> Sequence[Any]:
    if not isinstance(content, list | tuple):
        raise ValueError(f"turn {number}: expected a text, or a list of texts and images, got {_shown(content)}")
    return content


def _image_part(part: Any) -> list[Any] | None:
    """What a part of a message shows: nothing where the image is listed elsewhere; None where it is a text."""
    if isinstance(part, str):
        return None
    sort = part.get("type") if isinstance(part, Mapping) else None
    if sort == "text" and isinstance(part.get("text"), str):
        return None
    if sort not in ("image", "image_url"):
        raise ValueError(f"a part {_shown(part)} of a message: only texts and images are read; leave it out")
    shown = next((part[name] for name in ("image", "image_url", "path", "url") if _given(part.get(name))), None)
    if isinstance(shown, Mapping) and _given(shown.get("url")):
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
    return _plain(given, "kind") if isinstance(given, str) else ""


def _options(given: Any) -> tuple[str, ...] | None:
    if isinstance(given, str):
        given = _json(given) if given.lstrip().startswith(("[", "{")) else [each.strip() for each in given.split("|")]
    if isinstance(given, Mapping):
        named = {str(name): text for name, text in given.items()}
        given = [named[key] for key in _keys(given)]
    if given is None:
        return None
    texts = [_plain(each, "an option").strip() for each in given] if isinstance(given, list | tuple) else []
    if not 2 <= len(texts) <= len(ascii_uppercase) or not all(texts):
        raise ValueError(f"options {_shown(given)}: expected a list of 2 to {len(ascii_uppercase)} texts")
    found = [_LABELLED.fullmatch(text) for text in texts]
    if [each and each[1] for each in found] == list(ascii_uppercase[: len(texts)]):
        texts = [each[2] for each in found if each]
    return tuple(texts)


def _keys(given: Any) -> list[str]:
    """The keys of options that are given as a mapping, in their order, numbers as numbers; else none."""
    if isinstance(given, str) and given.lstrip().startswith("{"):
        given = _json(given)
    keys = [str(key) for key, text in given.items() if text is not None] if isinstance(given, Mapping) else []
    return sorted(keys, key=lambda key: (not key.isdecimal(), int(key) if key.isdecimal() else 0, key))


def _letter(given: Any, texts: Sequence[str], options: Sequence[str], keys: Sequence[str]) -> str:
    """The letter of the right option, which is given by its text, its key or else number from 0, or its letter."""
    quoted = _LABELLED.fullmatch(texts[0])  # "B. dog"
    same = [
        i
        for i, option in enumerate(options)
        if option.casefold() == texts[0].casefold()
        or (quoted and (quoted[1], quoted[2].casefold()) == (ascii_uppercase[i], option.casefold()))
    ]
    counted = isinstance(given, int) and 0 <= given < len(options)
    numbered = [i for i, key in enumerate(keys) if key == texts[0]] if keys else [given] if counted else []
    if len(same) == 1 and numbered and same != numbered:
        by = "key" if keys else "number from 0"
        raise ValueError(
            f"the answer {given} is the text of option {ascii_uppercase[same[0]]}, and the {by} of option "
            f"{ascii_uppercase[numbered[0]]}: write the letter of the one that is meant"
        )
    if found := same if len(same) == 1 else numbered:
        return ascii_uppercase[found[0]]
    letter = re.fullmatch(r"\W*([A-Z])\W*", texts[0].upper())
    if len(texts) == 1 and letter and letter[1] in ascii_uppercase[: len(options)]:
        return letter[1]
    raise ValueError(f"the answer {texts[0]!r:.60} is none of the options {', '.join(options)[:80]}; correct it")


def _answers(given: Any) -> tuple[str, ...]:
    """All right answers; what most people say comes first, for it is taught."""
    listed = given if isinstance(given, list | tuple) else [given]
    texts = [_text(each.get("answer") if isinstance(each, Mapping) else each, "answer") for each in listed]
    if not texts:
        raise ValueError("no answer; write one, or remove the question")
    most = max(texts, key=texts.count)
    texts.remove(most)
    return (most, *texts)


def _topic(row: Mapping[str, Any], by: str | None) -> str:
    if by is None:
        return ""
    value = row.get(by)
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        said = f"is {_shown(value)}" if by in row else f"is missing{meant(by, [str(each) for each in row])}"
        raise ValueError(f"{by!r} (by=) {said}; expected the name of a task")
    return " ".join(_plain(value, by).split())


def _text(value: Any, what: str) -> str:
    """A text that says something."""
    text = "" if value is None else _plain(value, what).strip()
    if not text:
        remedy = "write one, or remove the question" if what == "answer" else "write one, or remove the entry"
        raise ValueError(f"no {what}; {remedy}")
    if what == "answer" and MARK in text:
        raise ValueError(f"an {MARK} mark in the answer {text!r:.60}: only the user shows images")
    return text


def _plain(value: Any, what: str) -> str:
    """A text, or a number as one."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{what}: expected a text, got {_shown(value)}")
    try:
        str(value).encode()
    except (UnicodeEncodeError, ValueError) as error:  # half of a pair of characters; a number of thousands of digits
        raise ValueError(f"{what} is no text ({str(error).splitlines()[0]:.60}); correct it") from error
    return str(value)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _first(row: Mapping[str, Any], names: Sequence[str | None]) -> Any:
    return next((row[name] for name in names if name is not None and _given(row.get(name))), None)


def _given(value: Any) -> bool:
    return value is not None and not (isinstance(value, str | list | tuple | Mapping) and len(value) == 0)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
