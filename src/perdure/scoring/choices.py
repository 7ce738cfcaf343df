"""Which option an answer to a multiple-choice question names: by letter or by text, and in the form that was asked."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from perdure.scoring.normalise import HAN, contains, normalise

_OPEN = ascii_uppercase[:10]
"""Letters that count where the options are not known: A to J."""
_LABEL = re.compile(rf"[(\[]?[A-Z](?:[)\]]\s*|[.:、](?:\s+|(?=[{HAN}])))(?=\S)")


@dataclass(frozen=True)
class Choice:
    """What was read from an answer.

    Args:
        index: of the option, from 0; None where none is named, or more than one.
        alone: whether the answer consists of the letter, the option's text, or both, and of nothing else.
    """

    index: int | None
    alone: bool = False


def read_choice(answer: str, options: Sequence[str] = (), letters: str = "") -> Choice:
    """The option that an answer names.

    The article in "a dog", the pronoun "I" and letters within words are no letters of options. An answer that names two
    options names none. What is looked at, in this order: the whole answer; a label at its beginning; what follows
    "answer" or 答案, then "option" or 选; letters in brackets; letters by themselves; texts of options.

    Args:
        answer: in any language, in full-width forms or plain ones.
        options: with or without their labels.
        letters: of the options; as many as there are options when empty, or A to J.
    """
    letters = letters or (ascii_uppercase[: len(options)] if options else _OPEN)
    text = unicodedata.normalize("NFKC", answer).strip()
    texts = [normalise(unlabelled(option)) for option in options]
    if found := re.fullmatch(rf"[\W_]*([{letters}])[\W_]*", text, re.IGNORECASE):
        return Choice(letters.index(found[1].upper()), alone=True)
    spoken = normalise(text)
    if texts.count(spoken) == 1:
        return Choice(texts.index(spoken), alone=True)
    if found := re.match(rf"[\W_]*([{letters}])(?:[\W_]*[).:、\]][\W_]*(?:\s|(?=[{HAN}]))|\s+)", text):
        index, rest = letters.index(found[1]), normalise(text[found.end() :])
        if index < len(texts) and rest == texts[index]:
            return Choice(index, alone=True)
    for pattern in _patterns(letters):
        if named := set(pattern.findall(text)):
            return Choice(letters.index(named.pop())) if len(named) == 1 else Choice(None)
    inside = [i for i, option in enumerate(texts) if contains(spoken, option)]
    # "red" within "dark red" is not what was said.
    longest = [i for i in inside if not any(i != j and contains(texts[j], texts[i]) for j in inside)]
    return Choice(longest[0]) if len(longest) == 1 else Choice(None)


def unlabelled(option: str) -> str:
    """The text of an option without its letter: "(A) red", "A. red" and "（A）红色" are "red" and "红色"."""
    plain = unicodedata.normalize("NFKC", option).strip()
    return _LABEL.sub("", plain, count=1) if _LABEL.match(plain) else plain


def index_of(truth: str, options: Sequence[str]) -> int:
    """The option that is right, given as a letter or as its text.

    Raises:
        ValueError: when it is neither.
    """
    letters = ascii_uppercase[: len(options)] if options else _OPEN
    found = re.fullmatch(rf"\W*([{letters}])\W*", unicodedata.normalize("NFKC", truth))
    if found:
        return letters.index(found[1])
    texts = [normalise(unlabelled(option)) for option in options]
    if texts.count(text := normalise(unlabelled(truth))) == 1:
        return texts.index(text)
    known = f"a letter from A to {letters[-1]}" + (" or the text of one of its options" if options else "")
    raise ValueError(f"the right answer {truth!r} of a multiple-choice question is not {known}; correct the data")


def _patterns(letters: str) -> list[re.Pattern[str]]:
    """What names an option, the surest first."""
    # A capital alone; not the article of "A dog" nor the pronoun of "I see", but "A is right" and "A or B".
    article = r"(?!(?<=[AI])\s+(?!(?:is|was|or|and)\b)[a-z])"
    letter = rf"(?<![A-Za-z0-9])([{letters}])(?![A-Za-z0-9'’]){article}"
    said = r"\W*(?:(?:is|was|are|should be|must be|would be|是|为|应为|应该是|选)\W*)?(?:option\W*|选项\W*)?"
    return [
        re.compile(rf"^[\W_]*([{letters}])[).:、\]](?:\s|$|(?=[{HAN}]))"),
        re.compile(rf"(?:(?:[Aa]nswer|ANSWER)\b|答案){said}{letter}"),
        re.compile(rf"(?:(?:[Oo]ption|OPTION|[Cc]hoice)\b|选项|选择|选){said}{letter}"),
        re.compile(rf"[(\[]([{letters}])[)\]]"),
        re.compile(letter),
    ]
