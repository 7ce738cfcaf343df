"""Names of classes and of parts, as people write them."""

import pytest

from perdure.streams.naming import class_name, in_case_only, natural, numbers, recorded, role_of


@pytest.mark.parametrize("end", ["", "set", "_set", "-data", " images", "Set", "_Data"])
@pytest.mark.parametrize(
    ("word", "role"),
    [
        ("train", "train"),
        ("Training", "train"),
        ("TRAIN", "train"),
        ("test", "test"),
        ("Testing", "test"),
        ("val", "val"),
        ("Validation", "val"),
        ("valid", "val"),
        ("dev", "val"),
        ("eval", "val"),
    ],
)
def test_parts_are_known_by_the_words_that_people_use(word: str, role: str, end: str) -> None:
    assert role_of(word + end) == role
    assert role_of(f"{word}{end}-00000-of-00002", whole=False) == role


@pytest.mark.parametrize("name", ["trainer", "trains", "testament", "value", "devil", "steam train", "contest", ""])
def test_other_words_are_no_parts(name: str) -> None:
    assert role_of(name) is None
    assert role_of(f"{name}-1", whole=False) is None


def test_whole_numbers_sort_as_numbers_and_anything_else_as_text() -> None:
    assert natural(["10", "9", "0", "-1"]) == ["-1", "0", "9", "10"]
    assert natural(["10", "9", "cat"]) == ["10", "9", "cat"]
    assert numbers(["10", "9"]) == (10, 9)
    assert numbers(["1", "01"]) is None
    assert numbers(["1", "cat"]) is None


def test_unicode_forms_and_blanks_make_one_class_and_case_makes_two() -> None:
    assert class_name("cafe\u0301", "folder") == class_name("caf\u00e9", "folder")
    assert class_name("  red \u00a0 car ", "folder") == "red car"
    assert recorded(["caf\u00e9", "dog"], {"cafe\u0301 ": 0}) == ["cafe\u0301 ", "dog"]
    assert in_case_only(["Cat", "cat", "dog"]) == [
        "classes 'Cat' and 'cat' differ in upper and lower case only, and are two classes"
    ]
    assert in_case_only(["Cat"], ["cat", "Cat"]) == []
    assert in_case_only(["DOG"], ["dog"]) != []


@pytest.mark.parametrize(("name", "said"), [("caf\udce9", r"'caf\\xe9' is not UTF-8"), (" \t", "is empty")])
def test_a_name_that_cannot_be_recorded_is_refused(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("\\", "\\\\") if "\\\\" in said else said):
        class_name(name, "folder")
