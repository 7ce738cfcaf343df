"""Questions about real images, where they are present."""

import importlib.util
from pathlib import Path

import pytest

from perdure.backbones.preprocess import Preprocess
from perdure.streams.conversation_benchmarks import daquar, easy_vqa_questions
from perdure.streams.conversation_stream import as_questions, conversations, in_turn

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
SIZE = Preprocess(32, 32)
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the data sets are not there: {DATA}")
needs_shapes = pytest.mark.skipif(importlib.util.find_spec("easy_vqa") is None, reason="easy-vqa is not installed")


@needs_shapes
def test_easy_vqa_is_six_kinds_of_question_in_the_package_s_own_split() -> None:
    stream = easy_vqa_questions(order="natural")(SIZE, 0)
    assert {task.name: (len(task.train), len(task.test)) for task in stream} == {
        "colour": (5166, 1280),
        "has colour": (10377, 2557),
        "has shape": (3810, 974),
        "lacks colour": (10281, 2644),
        "lacks shape": (3939, 961),
        "shape": (5002, 1257),
    }
    answers = {task.name: {each.answers[0] for each in task.test.records} for task in stream}  # type: ignore[attr-defined]
    assert len(answers["colour"]) == 8
    assert answers["shape"] == {"circle", "rectangle", "triangle"}
    assert all(answers[f"{verb} {what}"] == {"yes", "no"} for verb in ("has", "lacks") for what in ("colour", "shape"))
    shown = stream.tasks[0].test.__getitems__(range(9))["conversation"]
    assert {each.images[0].size for each in shown} == {(64, 64)}


@needs_data
def test_daquar_has_all_its_questions_and_shows_no_image_twice() -> None:
    stream = daquar(str(DATA / "daquar"), order="natural")(SIZE, 0)
    sizes = {task.name: (len(task.train), len(task.test)) for task in stream}
    assert sizes == {"colours": (333, 220), "counting": (454, 274), "objects": (2614, 1690)}
    assert sum(train for train, _ in sizes.values()) == 3401
    learnt, tested = ({i for task in stream for i in getattr(task, part).pairs.tolist()} for part in ("train", "test"))
    assert (len(learnt), len(tested), learnt & tested) == (399, 250, set())
    for each in stream.tasks[1].train.__getitems__(range(50))["conversation"]:
        assert each.answer.isdecimal()


@needs_data
@needs_shapes
def test_questions_of_six_kinds_and_sources_are_one_stream() -> None:
    names = ["colour", "shape", "has colour"]
    coarse = f"parquet(path={str(DATA / 'cifar100')!r}, label='coarse_label', tasks=1, per_class=5, test_per_class=2)"
    pacs = f"parquet(path={str(DATA / 'pacs')!r}, tasks=1, per_class=5, test_per_class=2)"
    stream = in_turn(
        easy_vqa_questions(only=names, order="natural", per_task=20, test_per_task=10),
        daquar(str(DATA / "daquar"), only=["objects", "counting"], per_task=20, test_per_task=10),
        as_questions(coarse, "What is in the picture?"),
        as_questions(pacs, "What is in the picture?"),
    )(SIZE, 0)
    assert [len(task.train) for task in stream] == [20] * 5 + [100, 35]
    assert [len(task.test) for task in stream] == [10] * 5 + [40, 14]
    names_of = stream.tasks[5].names
    for each, label in zip(
        *(stream.tasks[5].test.__getitems__(range(20))[k] for k in ("conversation", "label")), strict=True
    ):
        assert each.answer == names_of[int(label) - 5].replace("_", " ")


@needs_data
def test_a_table_of_questions_is_split_by_what_its_images_show() -> None:
    file = DATA / "tiny_questions" / "test.parquet"
    stream = conversations(str(file), by="kind")(SIZE, 0)
    assert {task.name for task in stream} == {"colour", "either-or", "kind", "name", "yes/no"}
    sets = [[{i for r in d.records for i in r.images} for d in (t.train, t.test)] for t in stream]  # type: ignore[attr-defined]
    learnt, tested = (set().union(*(pair[k] for pair in sets)) for k in (0, 1))
    assert (len(learnt | tested), learnt & tested) == (400, set())
