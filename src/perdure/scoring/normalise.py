"""Texts brought to one form before they are compared: as the VQA evaluator does, and what Chinese needs beside it.

Source: the evaluator of VQAv2 (Antol et al., "VQA: Visual Question Answering", ICCV 2015, arXiv 1505.00468) in the form
that TextVQA, VizWiz and lmms-eval use.
"""

import re
import unicodedata

HAN = "\u3005\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Characters that are words by themselves, for a class of a regular expression."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_GROUPED = re.compile(r"\d,\d")
_COUNTED = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_COUNTED.split())}
_ARTICLES = {"a", "an", "the"}
_EDGES = ".,:;!?'\"*~“”‘’"
_SIGN = re.compile(rf"(?<![^\W{HAN}])[-\u2212](?=\.?\d)")

_WITH_APOSTROPHE = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's
there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't
what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"""
# The evaluator's keys are these words with one apostrophe left out; those with a capital ("Im", "Ive") are left out
# here: they never match, because texts are in lower case by then. One pair is the wrong way round, as there.
_CONTRACTIONS = {
    f"{word[:i]}{word[i + 1 :]}": word
    for word in _WITH_APOSTROPHE.split()
    for i, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}

_NUMERAL = re.compile("[〇零一二两兩三四五六七八九十百千万萬亿億]+")
_BLANK_BESIDE_HAN = re.compile(rf"\s+(?=[{HAN}])|(?<=[{HAN}])\s+")
_POINT = re.compile(r"(?<=\d)\.(?=\d)")
_LONGEST = 32  # characters of a numeral with units; what repeats 亿 without end is no number
_LATIN = re.compile("[a-z0-9]")
_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def normalise(text: str) -> str:
    """The form in which answers are compared, whatever their language.

    Full-width forms become plain ones and case goes. With Chinese characters in it: numerals become digits, punctuation
    and the blanks beside characters go. Otherwise as `vqa_normalise`, and beyond it: quotes, colons and asterisks at
    the edges of words go, and a minus before a number stays, which the evaluator drops (so that -3 is not 3). A text
    that consists of an article alone keeps it.
    """
    plain = unicodedata.normalize("NFKC", text).strip()
    if has_han(plain):
        return _chinese(plain)
    words = (word.strip(_EDGES) for word in vqa_normalise(_SIGN.sub("minus ", plain)).split())
    return " ".join(word for word in words if word) or plain.lower().strip(_EDGES) or plain.lower()


def vqa_normalise(text: str) -> str:
    """The form in which the VQA evaluator compares answers, with its oddities.

    A punctuation mark is deleted where one of its kind stands next to a blank, or where the text groups digits
    ("1,000"), else it becomes a blank. At most 32 full stops go (a flag is passed as a count in the original), also
    those after a digit (its look-behind is mistyped). "none" is 0. Both steps are always applied, as in lmms-eval; the
    original leaves human answers alone where all are the same.
    """
    spaced = text.replace("\n", " ").replace("\t", " ").strip()
    grouped = _GROUPED.search(spaced)
    plain = spaced
    for mark in _PUNCTUATION:
        gone = grouped or f"{mark} " in spaced or f" {mark}" in spaced
        plain = plain.replace(mark, "" if gone else " ")
    plain = re.sub(r"\.(?!\d)", "", plain, count=32)
    words = (_NUMBERS.get(word, word) for word in plain.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def contains(answer: str, truth: str) -> bool:
    """Whether `truth` stands in `answer` as whole words, or as characters in Chinese; both are normalised.

    A number or a Latin word that is part of a longer one does not count.
    """
    if not truth:
        return False
    if has_han(answer) or has_han(truth):
        before, after = (_LATIN.match(truth[i]) is not None for i in (0, -1))
        edges = (r"(?<![a-z0-9负])(?<!\d\.)" if before else "", r"(?![a-z0-9]|\.\d)" if after else "")
        return re.search(re.escape(truth).join(edges), answer) is not None
    return f" {truth} " in f" {answer} "


def has_han(text: str) -> bool:
    """Whether there are Chinese characters in a text."""
    return re.search(f"[{HAN}]", text) is not None


def _chinese(text: str) -> str:
    plain = _COMMA.sub("", _SIGN.sub("负", text.lower()))
    plain = _NUMERAL.sub(lambda found: _digits(found[0]), plain)
    plain = _POINT.sub("\0", plain)  # the point of 3.5 is no full stop
    plain = "".join(" " if unicodedata.category(c)[0] in "PZ" else c for c in plain).replace("\0", ".")
    return _BLANK_BESIDE_HAN.sub("", " ".join(plain.split())) or text


def _digits(numeral: str) -> str:
    """A Chinese numeral in digits: 三十五 is 35, 二〇二四 is 2024; a unit without a number, as in 千克, stays."""
    values = [2 if c == "两" else int(unicodedata.numeric(c)) for c in numeral]
    if max(values) < 10:
        return "".join(map(str, values))
    if values[0] > 10 or len(values) > _LONGEST:
        return numeral
    total = section = digit = 0
    for value in values:
        if value < 10:
            digit = value
        elif value < 10_000:
            section, digit = section + (digit or 1) * value, 0
        else:  # 亿 multiplies all before it, 万 what came after 亿
            total = (total + section + digit) * value if value > 10_000 else total + (section + digit) * value
            section = digit = 0
    return str(total + section + digit)
