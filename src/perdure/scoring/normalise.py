"""Texts brought to one form before they are compared: as the VQA evaluator does, and what Chinese needs beside it.

Source: the evaluator of VQAv2 (Antol et al., "VQA: Visual Question Answering", ICCV 2015, arXiv 1505.00468) in the form
that TextVQA, VizWiz and lmms-eval use.
"""

import re
import unicodedata
from functools import lru_cache

from perdure.scoring.numerals import in_digits
from perdure.scoring.symbols import HAN, signs_hidden, signs_shown

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_GROUPED = re.compile(r"\d,\d")
_COUNTED = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_COUNTED.split())}
_ARTICLES = {"a", "an", "the"}
_EDGES = ".,:;!?'\"*~“”‘’"

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

_BLANK_BESIDE_HAN = re.compile(rf"\s+(?=[{HAN}])|(?<=[{HAN}])\s+")
_POINT = re.compile(r"(?<=\d)\.(?=\d)")
_LATIN = re.compile("[a-z0-9]")
_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_UNSEEN = re.compile("[\ufeff\u200b]")
_FRACTION = re.compile(r"(?<=\d)(?=[¼½¾⅐-⅞])")  # 3½ is 3 1/2
_PERCENT = re.compile(r"(?<=\d)\s+%")
_NUMBER_ALONE = re.compile(r"负(\d+(?:\.\d+)?%?)")
_MINUS = re.compile(r"\bminus (?=\d)")
# Not words that only end in 不, 没, 非, 无 or 未, nor 是不是, nor what is denied twice.
_OPPOSED = re.compile(
    "(?:(?<![要岂何可莫无是])(?<!不[得能])不|(?<![淹沉出埋吞覆湮隐])没|(?<![除莫若无是南北东西中])非|(?<![有虚])无|(?<![周])未"
    "|(?<![是要])不是|(?<!有)没有|并非)$"
)


@lru_cache(maxsize=4096)  # each truth is asked for at every answer to it, and by several rules
def normalise(text: str) -> str:
    """The form in which answers are compared, whatever their language.

    Full-width forms become plain ones, case goes, and Chinese numerals become digits. With other Chinese characters in
    it: punctuation and the blanks beside characters go. Otherwise as `vqa_normalise`, and beyond it: quotes, colons and
    asterisks at the edges of words go. A minus before a number and signs of arithmetic stay, which the evaluator drops
    (so that -3 is not 3, nor x+y x-y): see `symbols.signs_hidden`. A text that consists of an article alone keeps it.
    """
    plain = one_form(text).strip()
    if has_han(plain):
        counted = in_digits(_COMMA.sub("", plain.lower()))
        plain = _NUMBER_ALONE.sub(r"-\1", counted) if _NUMBER_ALONE.fullmatch(_bare(counted)) else counted
        if has_han(plain):
            return _chinese(plain) or text
    words = (word.strip(_EDGES) for word in vqa_normalise(signs_hidden(plain)).split())
    return signs_shown(" ".join(word for word in words if word)) or plain.lower().strip(_EDGES) or plain.lower()


def one_form(text: str) -> str:
    """`text` with each character in its plain form: full-width ones, ½ as 1/2, ’ as '; marks that nobody sees go."""
    parted = _FRACTION.sub(" ", _UNSEEN.sub("", text))
    plain = unicodedata.normalize("NFKC", parted).replace("\u2044", "/").replace("’", "'")
    return _PERCENT.sub("%", plain)


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

    A number or a Latin word that is part of a longer one does not count, nor a number after minus or in a fraction, nor
    what Chinese denies: 是 in 不是, 猫 in 没有猫.
    """
    if not truth:
        return False
    chinese = has_han(answer) or has_han(truth)
    before, after = r"(?<!\S)", r"(?!\S)"
    if chinese:
        answer, truth = (_MINUS.sub("负", each) for each in (answer, truth))
        before = r"(?<![a-z0-9负])(?<!\d\.)" if _LATIN.match(truth[0]) else ""
        after = r"(?![a-z0-9]|\.\d)" if _LATIN.match(truth[-1]) else ""
    if truth[0].isdecimal():
        before += "(?<!minus )(?<!/ )"
    if truth[-1].isdecimal():
        after += "(?! /)"
    found = re.finditer(before + re.escape(truth) + after, answer)
    return any(not (chinese and _OPPOSED.search(answer, 0, each.start())) for each in found)


def has_han(text: str) -> bool:
    """Whether there are Chinese characters in a text."""
    return re.search(f"[{HAN}]", text) is not None


def _chinese(text: str) -> str:
    plain = _POINT.sub("\0", signs_hidden(text, "负"))  # the point of 3.5 is no full stop
    plain = "".join(" " if unicodedata.category(c)[0] in "PZ" else c for c in plain).replace("\0", ".")
    return _BLANK_BESIDE_HAN.sub("", " ".join(signs_shown(plain).split()))


def _bare(text: str) -> str:
    return text.strip(f"{_EDGES}。 ")
