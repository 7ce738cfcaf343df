"""Every JSON file that is read is what it must be, or refused in one line that names it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perdure.core.checkpoint import read_record
from perdure.evaluation import search_examples as examples
from perdure.reporting.runs import steps_of
from perdure.storage import schema
from perdure.streams.captions import read_tables
from perdure.streams.columns import classes_file
from perdure.streams.karpathy import _json, _largest_objects

NONSENSE = [b"{", b"[" * 100_000, b'{"a": ' * 100_000, b"\xff\xfe", b'"\x80"', b"1" * 5000, b"\x00" * 64]
READERS: dict[str, Callable[[Path], Any]] = {
    "run.json": lambda file: read_record(file.parent),
    "steps.json": lambda file: steps_of(file.parent),
    "classes.json": lambda file: classes_file(file.parent, "label"),
    "dataset_coco.json": _json,
    "instances_train.json": lambda file: _largest_objects(file.parent),
    "train.jsonl": lambda file: read_tables(file.parent, "image"),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("content", NONSENSE, ids=range(len(NONSENSE)))
def test_what_is_no_json_is_refused_in_one_line_that_names_the_file(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as error:
        READERS[name](tmp_path / name)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_examples_of_another_form_are_named(tmp_path: Path, lab: Any) -> None:
    lab.run("ncm", tmp_path)
    query = {"task": "a", "text": "a dog", "pair": 3, "before": [3], "after": [4]}
    for content, said in (
        ({"queries": [query]}, "object missing required field pictures"),
        ({"queries": [query | {"pair": "3"}], "pictures": {}}, r"queries\[0\].pair: expected int, got str"),
        ({"queries": [query], "pictures": {"3": "AA=="}}, "it has no picture of 4"),
    ):
        (tmp_path / examples.EXAMPLES).write_text(json.dumps(schema.sealed(content)) + "\n")
        with pytest.raises(schema.Damaged, match=rf"examples\.json is damaged: .*{said}"):
            examples.read_examples(tmp_path)
    (tmp_path / examples.EXAMPLES).write_text(json.dumps({"queries": [], "pictures": {}}))
    with pytest.raises(schema.Damaged, match=r"examples\.json is damaged: its content does not match its seal"):
        examples.read_examples(tmp_path)


def test_a_seal_does_not_depend_on_layout_and_tells_every_change() -> None:
    content = {"b": [1, 2.5, None, "é"], "a": {"10": True, "9": float("inf")}}
    seal = schema.sealed(content)["seal"]
    assert schema.seal(json.loads(json.dumps(content, indent=3, ensure_ascii=False))) == seal
    assert schema.sealed({"a": {10: True, 9: float("inf")}, "b": (1, 2.5, None, "é")})["seal"] == seal
    assert schema.seal(content | {"b": [1, 2.5, None, "e"]}) != seal
    assert schema.seal(content | {"c": 0}) != seal
