"""Which option an answer to a multiple-choice question names: by letter or by text, and in the form that was asked."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from perdure.scoring.normalise import contains, normalise
from perdure.scoring.symbols import HAN

_OPEN = ascii_uppercase[:10]
"""Letters that count where the options are not known: A to J."""
_AROUND = r"[\s()\[\].,:;!?、。]*"
"""What may stand about a letter that is an option's, as in "(B)."; "C++" and "C#" may be texts."""
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

    The article in "a dog", the pronoun "I", letters within words and those within an option's text are no letters of
    options. An answer that names two options names none. What is looked at, in this order: the whole answer, as a
    letter and as a text; a label at its beginning; what follows "answer" or 答案, then "option" or 选; letters in
    brackets; letters by themselves; texts of options.

    Args:
        answer: in any language, in full-width forms or plain ones.
        options: with or without their labels.
        letters: of the options; as many as there are options when empty, or A to J.
    """
    letters = letters or (ascii_uppercase[: len(options)] if options else _OPEN)
    text = unicodedata.normalize("NFKC", answer).strip()
    texts = list(map(unlabelled, options))
    if found := re.fullmatch(rf"{_AROUND}([{letters}]){_AROUND}", text, re.IGNORECASE):
        return Choice(letters.index(found[1].upper()), alone=True)
    if (same := _same(text, texts)) is not None:
        return Choice(same, alone=True)
    if found := re.fullmatch(rf"[\W_]*([{letters}])[\W_]*", text, re.IGNORECASE):
        return Choice(letters.index(found[1].upper()), alone=True)
    forms = list(map(normalise, texts))
    if found := re.match(rf"[\W_]*([{letters}])(?:[\W_]*[).:、\]][\W_]*(?:\s|(?=[{HAN}]))|\s+)", text):
        index, rest = letters.index(found[1]), normalise(text[found.end() :])
        if index < len(forms) and rest == forms[index]:
            return Choice(index, alone=True)
    *surer, letter = _patterns(letters)
    label = re.compile(rf"{_AROUND}[{letters}]{_AROUND}")
    rest, named_whole = _without(text, [each for each in texts if letter.search(each) and not label.fullmatch(each)])
    for pattern in (*surer, letter):
        if named := set(pattern.findall(rest)):
            return Choice(letters.index(named.pop())) if len(named) == 1 else Choice(None)
    spoken = normalise(text)
    inside = [i for i, form in enumerate(forms) if contains(spoken, form) or texts[i] in named_whole]
    # "red" within "dark red" is not what was said.
    longest = [i for i in inside if not any(i != j and contains(forms[j], forms[i]) for j in inside)]
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
    plain = unicodedata.normalize("NFKC", truth).strip()
    if found := re.fullmatch(rf"{_AROUND}([{letters}]){_AROUND}", plain):
        return letters.index(found[1])
    if (same := _same(unlabelled(plain), list(map(unlabelled, options)))) is not None:
        return same
    if found := re.fullmatch(rf"\W*([{letters}])\W*", plain):
        return letters.index(found[1])
    known = f"a letter from A to {letters[-1]}" + (" or the text of one of its options" if options else "")
    raise ValueError(f"the right answer {truth!r} of a multiple-choice question is not {known}; correct the data")


def alternatives(truth: str, options: Sequence[str]) -> list[str]:
    """What could be said in place of the right answer, in its form: a letter such as "B" or "(B)", or a text."""
    letters, texts = ascii_uppercase[: len(options)], list(map(unlabelled, options))
    for around in (_AROUND, r"\W*"):
        if found := re.fullmatch(rf"({around})[{letters}]({around})", truth.strip()):
            return [f"{found[1]}{letter}{found[2]}" for letter in letters]
        if _same(unlabelled(truth), texts) is not None:
            break
    return texts


def _same(text: str, texts: Sequence[str]) -> int | None:
    """The one of `texts` that is `text`: as it stands, else in lower case, else normalised; None where none is."""
    ways: tuple[Callable[[str], str], ...] = (str, str.casefold, normalise)
    for way in ways:
        forms = list(map(way, texts))
        if forms.count(said := way(text)) == 1:
            return forms.index(said)
    return None


def _without(text: str, names: Sequence[str]) -> tuple[str, set[str]]:
    """`text` with a blank for each of `names` that stands in it as words, and these names."""
    found = set()
    for name in sorted(names, key=len, reverse=True):
        text, count = re.subn(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", " ", text, flags=re.IGNORECASE)
        found |= {name} if count else set()
    return text, found


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
