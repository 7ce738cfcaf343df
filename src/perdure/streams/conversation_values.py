"""What values of an entry say: texts, options to choose from, right answers.

Every error is a ValueError without the place, which the reader of the file puts in front.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from perdure.scoring.normalise import normalise

MARK = "<image>"
_LABELLED = re.compile(r"\W?([A-Z])[.):]\s*(\S.*)", re.DOTALL)


def options_listed(given: Any) -> tuple[str, ...] | None:
    """The texts of options, which stand in a list, a mapping, or a text as "a|b"; None where there are none."""
    if isinstance(given, str):
        given = (
            parsed_json(given) if given.lstrip().startswith(("[", "{")) else [each.strip() for each in given.split("|")]
        )
    if isinstance(given, Mapping):
        named = {str(name): text for name, text in given.items()}
        given = [named[key] for key in keys_of_options(given)]
    if given is None:
        return None
    texts = [plain_text(each, "an option").strip() for each in given] if isinstance(given, list | tuple) else []
    if not 2 <= len(texts) <= len(ascii_uppercase) or not all(texts):
        raise ValueError(f"options {value_shown(given)}: expected a list of 2 to {len(ascii_uppercase)} texts")
    found = [_LABELLED.fullmatch(text) for text in texts]
    if [each and each[1] for each in found] == list(ascii_uppercase[: len(texts)]):
        texts = [each[2] for each in found if each]
    return tuple(texts)


def keys_of_options(given: Any) -> list[str]:
    """The keys of options that are given as a mapping, in their order, numbers as numbers; else none."""
    if isinstance(given, str) and given.lstrip().startswith("{"):
        given = parsed_json(given)
    keys = [str(key) for key, text in given.items() if text is not None] if isinstance(given, Mapping) else []
    return sorted(keys, key=lambda key: (not key.isdecimal(), int(key) if key.isdecimal() else 0, key))


def letter_of(given: Any, options: Sequence[str], keys: Sequence[str]) -> str:
    """The letter of a right option, which is given by its text, its key or else number from 0, or its letter."""
    text = text_that_says(given, "answer")
    quoted = _LABELLED.fullmatch(text)  # "B. dog"
    same = [
        i
        for i, option in enumerate(options)
        if option.casefold() == text.casefold()
        or (quoted and (quoted[1], quoted[2].casefold()) == (ascii_uppercase[i], option.casefold()))
    ]
    counted = isinstance(given, int) and 0 <= given < len(options)
    numbered = [i for i, key in enumerate(keys) if key == text] if keys else [given] if counted else []
    if len(same) == 1 and numbered and same != numbered:
        by = "key" if keys else "number from 0"
        raise ValueError(
            f"the answer {given} is the text of option {ascii_uppercase[same[0]]}, and the {by} of option "
            f"{ascii_uppercase[numbered[0]]}: write the letter of the one that is meant"
        )
    if found := same if len(same) == 1 else numbered:
        return ascii_uppercase[found[0]]
    letter = re.fullmatch(r"\W*([A-Z])\W*", text.upper())
    if letter and letter[1] in ascii_uppercase[: len(options)]:
        return letter[1]
    raise ValueError(f"the answer {text!r:.60} is none of the options {', '.join(options)[:80]}; correct it")


def right_answers(given: Any) -> list[Any]:
    """All that is right, as it was given; what most people say comes first, for it is taught."""
    listed = given if isinstance(given, list | tuple) else [given]
    right = [each.get("answer") if isinstance(each, Mapping) else each for each in listed]
    texts = [text_that_says(each, "answer") for each in right]
    if not texts:
        raise ValueError("no answer; write one, or remove the question")
    first = texts.index(max(texts, key=texts.count))
    return [right[first], *right[:first], *right[first + 1 :]]


def taught_first(taught: Any, people: Sequence[Any]) -> list[Any]:
    """What people answered, in front the answer beside it, which is theirs in whatever form."""
    form, right = normalise(text_that_says(taught, "answer")), right_answers(people)
    same = [i for i, each in enumerate(right) if normalise(text_that_says(each, "answer")) == form]
    if not same:
        raise ValueError(
            f"the answer {taught!r:.60} is none of the answers beside it: correct one, or name the column of what is "
            "right, as answer='answer'"
        )
    return [taught, *right[: same[0]], *right[same[0] + 1 :]]


def answer_texts(given: Any) -> tuple[str, ...]:
    """The texts of all that is right."""
    return tuple(text_that_says(each, "answer") for each in right_answers(given))


def text_that_says(value: Any, what: str) -> str:
    """A text that says something."""
    text = "" if value is None else plain_text(value, what).strip()
    if not text:
        remedy = "write one, or remove the question" if what == "answer" else "write one, or remove the entry"
        raise ValueError(f"no {what}; {remedy}")
    if what == "answer" and MARK in text:
        raise ValueError(f"an {MARK} mark in the answer {text!r:.60}: only the user shows images")
    return text


def plain_text(value: Any, what: str) -> str:
    """A text, or a number as one."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{what}: expected a text, got {value_shown(value)}")
    try:
        str(value).encode()
    except (UnicodeEncodeError, ValueError) as error:  # half of a pair of characters; a number of thousands of digits
        raise ValueError(f"{what} is no text ({str(error).splitlines()[0]:.60}); correct it") from error
    return str(value)


def parsed_json(text: str) -> Any:
    """What a text holds as JSON; itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def is_given(value: Any) -> bool:
    """Whether there is something in a value."""
    return value is not None and not (isinstance(value, str | list | tuple | Mapping) and len(value) == 0)


def cleaned(value: Any) -> Any:
    """An entry without what pandas makes of missing cells: NaN is nothing, and 3.0 is 3."""
    if isinstance(value, float):
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    if isinstance(value, Mapping):
        return {name: cleaned(each) for name, each in value.items()}
    return [cleaned(each) for each in value] if isinstance(value, list | tuple) else value


def value_shown(value: Any) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
