"""Names of classes as every reader of data takes them: which are the same, and in which order they naturally come."""

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

_WHOLE = re.compile(r"[+-]?\d+", re.ASCII)
_ROLES = {
    "train": r"train(?:ing|val)?|trn",
    "test": r"test(?:ing)?|tst",
    "val": r"val(?:id(?:ation)?)?|dev(?:el(?:opment)?)?|eval(?:uation)?|hold[ _-]?out",
}
_SORT = r"(?:[ _.-]*(?:set|data|dataset|split|part|folder|files?|images?|imgs?|photos|pictures|pics))*"
_ROLE = {role: re.compile(rf"(?:{words}){_SORT}(?![a-z])", re.IGNORECASE) for role, words in _ROLES.items()}

Role = Literal["train", "test", "val"]
"""What a part of a data set is for."""
_SHOWN = 3
_SHARD = re.compile(r"[-_.]?\d+(?:-of-\d+)?")


def task_name(number: int, classes: Sequence[str]) -> str:
    """What a task of these classes is called: `2: otter, raven, ray, ... (10 classes)`."""
    shown = ", ".join(classes[:_SHOWN]) + (", ..." if len(classes) > _SHOWN else "")
    return f"{number}: {shown} ({len(classes)} {'class' if len(classes) == 1 else 'classes'})"


def class_name(text: str, where: str) -> str:
    """A name as it is recorded: in Unicode's composed form, with single blanks within and none around.

    Operating systems and editors write "é" as one character or as two, and nobody sees a blank at the end.

    Raises:
        ValueError: when it is empty, or stands for bytes that are not UTF-8; `where` says what has the name.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        raise ValueError(f"{where} {shown!r} is not UTF-8: rename it") from error
    name = _one_form(text)
    if not name:
        raise ValueError(f"{where} {text!r} is empty: give each class a name")
    return name


def natural(names: Iterable[str]) -> list[str]:
    """Different names in their natural order: as numbers where all are whole numbers, else as texts."""
    different = set(names)
    if different and all(_WHOLE.fullmatch(name) for name in different):
        return sorted(different, key=lambda name: (int(name), name))
    return sorted(different)


def numbers(names: Sequence[str]) -> tuple[int, ...] | None:
    """The numbers that the names are; None unless all are whole numbers, and different ones."""
    if not all(_WHOLE.fullmatch(name) for name in names):
        return None
    found = tuple(map(int, names))
    return found if len(set(found)) == len(found) else None


def recorded(names: Iterable[str], known: Mapping[str, int]) -> list[str]:
    """The names, each spelt as in `known` where it is there in another Unicode form, or with other blanks."""
    spelt = {_one_form(name): name for name in known}
    return [name if name in known else spelt.get(_one_form(name), name) for name in names]


def _one_form(name: str) -> str:
    return " ".join(unicodedata.normalize("NFC", name).split())


def in_case_only(names: Iterable[str], known: Collection[str] = ()) -> list[str]:
    """A remark for each two names that differ in upper and lower case only; of `known` ones only with new ones."""
    new = sorted(set(names) - set(known))
    spelt: dict[str, str] = {}
    for name in (*known, *new):
        spelt.setdefault(name.casefold(), name)
    pairs = [(spelt[name.casefold()], name) for name in new if spelt[name.casefold()] != name]
    return [f"classes {a!r} and {b!r} differ in upper and lower case only, and are two classes" for a, b in pairs]


def role_of(name: str, whole: bool = True) -> Role | None:
    """Which part of a data set is called `name`, in the words that people use; None when it is none.

    Args:
        name: of a folder, or of a file without its ending.
        whole: whether nothing else may follow, as "-00000-of-00002" does in a file's name.
    """
    for role, pattern in _ROLE.items():
        found = pattern.match(name)
        if found and (not whole or found.end() == len(name)):
            return role  # type: ignore[return-value]
    return None


def told_role(stem: str) -> tuple[str, Role | None]:
    """What a file holds, "" where its name does not say, and what for: by the first or the last word of its `stem`.

    `train-00000-of-00002`, `train_4w`, `flickr_train` and `labels.test` say what for; `train` alone says no more.
    """
    if role := role_of(stem) or role_of(_SHARD.sub("", stem)):
        return "", role
    for found in (
        re.fullmatch(r"(?P<name>.+)[._-](?P<role>[a-zA-Z]+)", stem),
        re.fullmatch(r"(?P<role>[a-zA-Z]+)[._-](?P<name>.+)", stem),
    ):
        if found and (role := role_of(found["role"])):
            return found["name"], role
    return stem, None
