"""Signs of arithmetic in answers: x+y is not x-y, and C++ is not C, though the VQA evaluator drops what parts them.

While its punctuation goes, a sign that stays is a private character of Unicode between blanks.
"""

import re

HAN = "\u3005\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Characters that are words by themselves, for a class of a regular expression."""

_SPACED = "+=<>≤≥≠×/"
_KEPT = {sign: chr(0xE000 + i) for i, sign in enumerate(f"{_SPACED}%#")}
_A = "\ue0ff"
_SHOWN = str.maketrans({kept: sign for sign, kept in _KEPT.items()} | {_A: "a"})
_TWO = {"<=": "≤", ">=": "≥", "!=": "≠", "÷": "/"}

# What a sign of two sides stands between: a digit, a bracket, or a letter alone.
_LEFT = r"(?:(?<=[\d)])|(?<=\b[a-zA-Z]))"
_RIGHT = r"(?=[\d(]|[a-zA-Z]\b)"
_DASH = re.compile("(?<=\\S)[\u2010-\u2013](?=\\S)|\u2212")
_TAG = re.compile(r"(?<![\w)])<[a-zA-Z]\w*>|</[a-zA-Z]\w*>")
_ARROW = re.compile(r"(?<![-=])[-=]+>")
_DATE = re.compile(r"\b(\d+)/(\d+)/(\d+)\b")
_EDGE = re.compile(r"^\s*=\s*(?=\w)|(?<=\w)\s*=\s*$")
_POSITIVE = re.compile(r"(?<![\w)+])(?<![\w)+]\s)\+(?=\.?\d)")
_NEGATIVE = re.compile(rf"(?<![^\W{HAN}])-(?=\.?\d)|(?<![\w)])(?<![\w)]\s)-(?=[(√]|[a-zA-Z]\b)")
_CHARGE = re.compile(r"(?<![a-zA-Z0-9])([a-zA-Z]|AB|ab)-(?=\W*$)")
_TIMES = re.compile(rf"{_LEFT}(\s?)\*\1{_RIGHT}")
_DIVIDED = re.compile(rf"{_LEFT}(\s?)/\1{_RIGHT}")
_BROKEN = re.compile(rf"(?<![^\W{HAN}])(?<!\.)\.(?=\d)")
_SUBTRACTED = re.compile(r"(?<=\b[a-zA-Z])(\s?)-\1(?=[a-zA-Z]\b)")
_OPERATOR = f"[{''.join(_KEPT[sign] for sign in _SPACED)}]"
_NAMED_A = re.compile(
    rf"\ba(?= {_OPERATOR}| minus\b|\W*$)|(?:(?<={_OPERATOR} )|(?<=\bminus ))a\b(?! [a-z]{{2}})", re.IGNORECASE
)
_GROUPS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_LISTED = re.compile(r"(?<=\d),(?=\d)")


def signs_hidden(text: str, minus: str = "minus ") -> str:
    """`text` with its signs out of reach of what drops punctuation, until `signs_shown`.

    + and signs of comparison stay; * and / between numbers, brackets or letters alone, but not within dates and words;
    % after a number; # after a letter. ".5" is "0.5", "1,000" is "1000", and "1,5" is no 15. An "a" that ends the text
    or stands beside a sign, as in "Vitamin A" and "a-b", is no article. Tags, arrows and the + of "+5" go.

    Args:
        text: in NFKC.
        minus: what stands for the sign before a number, a bracket or a letter alone.
    """
    plain = _DASH.sub("-", text)
    for pattern in (_TAG, _ARROW, _EDGE):
        plain = pattern.sub(" ", plain)
    plain = _LISTED.sub(", ", _GROUPS.sub("", plain))
    plain = _DATE.sub(r"\1-\2-\3", _BROKEN.sub("0.", plain))
    for one, other in _TWO.items():
        plain = plain.replace(one, other)
    plain = _NEGATIVE.sub(minus, _POSITIVE.sub("", plain))
    plain = _SUBTRACTED.sub(" minus ", _CHARGE.sub(r"\1 minus", plain))
    plain = _DIVIDED.sub(f" {_KEPT['/']} ", _TIMES.sub("×", plain))
    plain = re.sub(r"(?<=\d)%|(?<=[a-zA-Z])#", lambda sign: _KEPT[sign[0]], plain)
    plain = re.sub("[+=<>≤≥≠×]", lambda sign: f" {_KEPT[sign[0]]} ", plain)
    return _NAMED_A.sub(_A, " ".join(plain.split()))


def signs_shown(text: str) -> str:
    """`text` with the signs that `signs_hidden` hid."""
    return text.translate(_SHOWN)
