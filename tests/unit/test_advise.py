"""Advice keeps to the constraints, relies on measured numbers only, and says what it does not know."""

from typing import Any

import pytest

from perdure.cli.advise import advice_lines, use_command
from perdure.cli.main import main
from perdure.core.learner import Core
from perdure.core.method import METHODS
from perdure.export.model import _check
from perdure.options.spec import parse
from perdure.reporting.abilities import exportable
from perdure.reporting.advise import Advice, Constraints, advise, bytes_at, in_words, shipped
from perdure.training.config import FORMER, make_backbone, make_method, make_objective
from perdure.types import Task

ONLY_IN_WORDS = {"disco", "modal_prompt", "smolora"}
"""Methods of language models alone."""

MEGA = 1e6


def row(method: str, acc: float, spread: float | None = 0.01, **more: Any) -> dict[str, Any]:
    """A method measured over four tasks; `acc` is what it ends at."""
    with_id = more.pop("with_id", 0.9)
    stored = more.pop("stored", [1, 2, 3, 4])

    def falling(end: float) -> list[Any]:
        return [[end + 0.1 * (3 - i), spread] for i in range(4)]

    after: dict[str, Any] = {"acc": falling(acc), "acc_with_task_id": falling(with_id)}
    for name in ("new_task_acc", "new_task_acc_with_task_id", "forgetting", "forgetting_with_task_id"):
        after[name] = [None, *([0.3, spread] for _ in range(3))]
    after["stored_bytes"] = [None if v is None else [v * MEGA, 0.0] for v in stored]
    step = more.pop("step", {"ratio": 1.0})
    return {"method": method, "seeds": [0, 1, 2], "after": after, "referenced_bytes": 0.0, "step": step} | more


def setting(*rows: dict[str, Any], scenario: str = "class", tasks: int = 4) -> dict[str, Any]:
    return {"data": "shapes", "scenario": scenario, "tasks": tasks, "rows": list(rows), "command": "perdure compare"}


def only(*rows: dict[str, Any], **asked: Any) -> Advice:
    (answer,) = advise([setting(*rows)], Constraints(**asked))
    return answer


def methods(answer: Advice) -> list[str]:
    return [choice.method for choice in answer.choices]


def test_the_best_after_the_last_task_comes_first() -> None:
    answer = only(row("a", 0.2), row("b", 0.4), row("c", 0.3))
    assert methods(answer) == ["b", "c", "a"]
    assert [c.place for c in answer.choices] == [1, 2, 3]
    assert not any(c.tied for c in answer.choices)


def test_within_the_spread_methods_share_a_place() -> None:
    answer = only(row("a", 0.40, 0.02), row("b", 0.39), row("c", 0.385, 0.001), row("d", 0.3), row("e", 0.1, None))
    assert [(c.place, c.tied) for c in answer.choices] == [(1, True), (1, True), (1, True), (4, False), (5, False)]
    assert any("within one standard deviation" in note for note in answer.notes)


def test_with_the_task_known_accuracy_with_task_id_decides() -> None:
    rows = row("a", 0.2, with_id=0.9), row("b", 0.4, with_id=0.7)
    assert methods(only(*rows)) == ["b", "a"]
    assert methods(only(*rows, task_id_known="yes")) == ["a", "b"]
    assert methods(only(*rows, scenario="task")) == ["a", "b"]
    assert only(*rows, task_id_known="yes").choices[0].share[0] == pytest.approx(0.9)


def test_what_keeps_examples_is_left_out_by_what_was_measured_not_by_name() -> None:
    rows = row("replay(size=9)", 0.4), row("probe", 0.5, referenced_bytes=1.0)
    assert methods(only(*rows)) == ["probe", "replay(size=9)"]
    answer = only(*rows, old_data=False)
    assert methods(answer) == ["replay(size=9)"]
    assert answer.left_out == {"--no-old-data": ["probe"]}


def test_too_dear_steps_are_left_out_no_steps_are_cheap_and_unmeasured_ones_are_unknown() -> None:
    rows = [row("dear", 0.9, step={"ratio": 1.21}), row("fair", 0.3, step={"ratio": 1.2})]
    rows += [row("free", 0.2, step={"ratio": None, "why": "no steps"}), row("new", 0.8, step=None)]
    rows += [row("failed", 0.7, step={"ratio": None, "why": "out of memory"})]
    answer = only(*rows, step_cost=1.2)
    assert methods(answer) == ["fair", "free"]
    assert answer.left_out == {"--step-cost 1.2": ["dear (1.21)"]}
    assert answer.unknown == {"step cost": ["new", "failed"]}
    assert methods(only(*rows)) == ["dear", "new", "failed", "fair", "free"]


def test_bytes_are_those_after_as_many_tasks_as_asked_for() -> None:
    rows = row("a", 0.4), row("b", 0.3, stored=[1, 1, 1, 1])
    assert methods(only(*rows, bytes="3MB", tasks=3)) == ["a", "b"]
    answer = only(*rows, bytes="3MB")
    assert methods(answer) == ["b"]
    assert answer.left_out == {"--bytes 3MB": ["a (4.0 MB)"]}
    assert only(*rows, tasks=2).choices[0].share[0] == pytest.approx(0.6)


def test_beyond_the_measured_tasks_steady_growth_is_carried_on_and_marked() -> None:
    answer = only(row("a", 0.4), row("b", 0.3, stored=[9, 9, 9, 9]), tasks=20, bytes="19.5MB")
    assert answer.left_out == {"--bytes 19.5MB": ["a (20.0 MB)"]}
    assert [(c.stored_bytes, c.stored) for c in answer.choices] == [(9 * MEGA, "extrapolated")]
    assert answer.tasks == 4
    assert any("scores are for 4 tasks" in note and "task 20" in note for note in answer.notes)


def test_growth_that_is_not_steady_gives_a_bound_and_between_bound_and_limit_nothing_is_known() -> None:
    uneven = row("a", 0.4, stored=[1, 2, 4, 5])  # by at most 2 a task: 5 after four tasks, at most 9 after six
    assert only(uneven, tasks=6).choices[0].stored_bytes == 9 * MEGA
    assert only(uneven, tasks=6).choices[0].stored == "at most"
    assert methods(only(uneven, tasks=6, bytes="9MB")) == ["a"]
    assert only(uneven, tasks=6, bytes="8MB").unknown == {"stored bytes": ["a (5.0 MB after 4 tasks)"]}
    assert only(uneven, tasks=6, bytes="4MB").left_out == {"--bytes 4MB": ["a (5.0 MB)"]}


def test_bytes_without_measured_growth_are_not_guessed() -> None:
    assert bytes_at([None, None, None, [5.0, 0.0]], 4) == (5.0, "measured")
    assert bytes_at([None, None, None, [5.0, 0.0]], 5) == (None, "unknown")
    assert bytes_at([[1.0, 0.0], [2.0, 0.0]], 3) == (None, "unknown")
    answer = only(row("a", 0.4, stored=[None, None, None, 1]), tasks=9, bytes="1GB")
    assert (answer.choices, answer.unknown) == ([], {"stored bytes": ["a (1.0 MB after 4 tasks)"]})


def test_a_vote_over_the_test_batch_is_never_advised() -> None:
    answer = only(row("l2p(batchwise=True)", 0.9), row("l2p(batchwise=False)", 0.2))
    assert methods(answer) == ["l2p(batchwise=False)"]
    assert list(answer.left_out.values()) == [["l2p(batchwise=True)"]]


def test_only_the_scenario_asked_for_answers_the_nearest_number_of_tasks_first() -> None:
    settings = [setting(row("a", 0.1)), setting(row("b", 0.1), scenario="domain")]
    settings += [setting(row("c", 0.1), tasks=1), setting(row("d", 0.1), scenario="task")]
    assert [methods(a) for a in advise(settings, Constraints())] == [["a"]]
    assert [methods(a) for a in advise(settings, Constraints(scenario="domain"))] == [["b"]]
    assert [methods(a) for a in advise(settings, Constraints(scenario="task"))] == [["a"], ["d"]]
    assert advise(settings[1:2], Constraints()) == []
    several = [setting(row(f"m{n}", 0.1)) | {"tasks": n} for n in (4, 3, 2)]
    assert [a.setting["tasks"] for a in advise(several, Constraints(tasks=3))] == [3, 4, 2]


def test_a_longer_stream_asked_for_fewer_tasks_says_after_how_many_its_scores_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = setting(row("a", 0.1)) | {"classes": 8, "backbone": "tiny()", "created": ["now"], "git": [], "perdure": []}
    for tasks, said in ((2, ", after the first 2 tasks"), (4, ""), (9, "")):
        asked = Constraints(tasks=tasks)
        lines = advice_lines(in_words(asked), advise([known], asked), None)
        assert lines[2] == f"shapes, 4 tasks, 8 classes, tiny(){said}"
    main(["advise", "--tasks", "10", "--family"])
    heads = [line for line in capsys.readouterr().out.splitlines() if " classes, " in line]
    assert [("after the first 10 tasks" in head) == (" 20 tasks, " in head) for head in heads] == [True] * len(heads)
    assert len(heads) > 1


def test_one_run_is_named_as_such() -> None:
    answer = only(row("a", 0.4, None, seeds=[0]), row("b", 0.3))
    assert "one run only, so no spread: a" in answer.notes


@pytest.mark.parametrize(
    ("text", "count"), [("50MB", 50e6), ("1.5 GB", 1.5e9), ("7", 7), ("2kib", 2048), (".5MiB", 2**19), ("3 B", 3)]
)
def test_bytes_are_read_with_their_unit(text: str, count: float) -> None:
    assert Constraints(bytes=text).limit == count


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"bytes": "fifty"}, "--bytes 'fifty': expected a positive number of bytes, such as 50e6, 50MB or 50MiB"),
        ({"bytes": "5 mibs"}, "--bytes '5 mibs'"),
        ({"bytes": "-1MB"}, "--bytes '-1MB'"),
        ({"scenario": "task", "task_id_known": "no"}, "leave out --task-id-known no"),
    ],
)
def test_constraints_that_cannot_be_are_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"^--") as caught:
        Constraints(**asked)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_constraints_are_said_in_words() -> None:
    asked = Constraints(bytes="50MB", old_data=False, tasks=20, task_id_known="no", step_cost=1.2)
    assert in_words(asked) == [
        "the task is not known at test",
        "20 tasks",
        "at most 50MB stored",
        "no old data kept",
        "a step costs at most 1.2 × plain LoRA's",
    ]


def test_the_shipped_table_can_be_asked_and_names_no_machine() -> None:
    settings = shipped()
    answers = advise(settings, Constraints(tasks=20, bytes="50MB", old_data=False, step_cost=1.2))
    assert answers
    assert all(choice.share[0] > 0 for answer in answers for choice in answer.choices)
    for each in settings:
        assert each["created"]
        assert each["command"].startswith("perdure compare --")
        assert "/" not in each["stream"]
        assert all(parse(r["method"]) for r in each["rows"])
        assert all(len(values) == each["tasks"] for r in each["rows"] for values in r["after"].values())


def test_what_is_advised_is_written_as_it_is_run_today() -> None:
    assert not FORMER.keys() & {
        spec.name for each in shipped() for row in each["rows"] for spec in parse(row["method"])
    }
    lines = advice_lines([], advise(shipped(), Constraints(scenario="class", old_data=False)), None)
    assert any("align on pocket(layers=3)" in line for line in lines)
    commands = [line for line in lines if line.startswith("  perdure compare")]
    assert any(line.endswith("--backbone 'pocket(layers=3)' --methods align --out runs/again") for line in commands)


def test_what_cannot_be_exported_or_searched_is_left_out_where_that_is_asked_for() -> None:
    rows = row("align", 0.5, backbone="pocket(layers=3)"), row("ranpac", 0.4), row("probe + align", 0.3)
    [plain] = advise([setting(*rows) | {"backbone": "pocket()"}], Constraints())
    assert methods(plain) == ["align", "ranpac", "probe + align"]
    [written] = advise([setting(*rows) | {"backbone": "pocket()"}], Constraints(exportable=True))
    assert methods(written) == ["probe + align"]
    assert written.left_out == {"--exportable": ["align on pocket(layers=3)", "ranpac"]}
    [found] = advise([setting(*rows) | {"backbone": "pocket()"}], Constraints(searchable=True))
    assert methods(found) == ["ranpac", "probe + align"]
    [blind] = advise([setting(*rows) | {"backbone": 'vision(path="a")'}], Constraints(searchable=True))
    assert methods(blind) == []
    assert in_words(Constraints(exportable=True, searchable=True))[1:] == ["exportable only", "searchable only"]


@pytest.mark.parametrize(
    "method",
    [
        *sorted(
            name for name, kind in METHODS.items() if not kind.protects and "classes" in (kind.needs or {"classes"})
        ),
        *("inflora(rank=2) + align", "fm_lora(prompts=0)"),
    ],
)
def test_exportable_is_what_export_says(method: str) -> None:
    learner = Core(make_backbone("pocket()"), make_objective("classify()"), make_method(method))
    learner.grow(Task(0, "0", (0, 1), ("a", "b")))
    learner.learnt = 1
    if exportable(method, "pocket()"):
        _check(learner, "merged")
    else:
        with pytest.raises(ValueError, match="keep"):
            _check(learner, "merged")


def test_what_is_printed_is_a_page_and_says_how_to_use_the_first() -> None:
    for asked in (Constraints(), Constraints(exportable=True, searchable=True, old_data=False, bytes="5MB")):
        answers = advise(shipped(), asked)
        lines = advice_lines(in_words(asked), answers, None)
        assert len(lines) <= 50
        place = lines.index("to use the first:")
        assert lines[place + 1] == f"  {use_command(answers[0])}"
