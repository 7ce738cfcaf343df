"""The report: what it shows, that it is one file, and what it says about damaged folders."""

import html
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from perdure.reporting import charts
from perdure.reporting.charts import duration, show
from perdure.reporting.report import write_report
from perdure.reporting.runs import RunResults, grouped

INFLORA = "inflora(rank=10)"


def write_run(
    folder: Path,
    method: str = INFLORA,
    seed: int = 0,
    tasks: int = 5,
    learnt: int | None = None,
    names: list[str] | None = None,
    lost: float = 0.03,
    **config: Any,
) -> Path:
    """A run's folder as `perdure run` writes it, with made-up numbers; `learnt` < `tasks` is a run still going."""
    draw = random.Random(f"{method} {seed}")
    names = names or [f"task {i + 1}" for i in range(tasks)]
    done = tasks if learnt is None else learnt
    folder.mkdir(parents=True)
    facts = {
        "perdure": "0.1.0",
        "created": "2026-03-04T10:20:30+00:00",
        "git": None,
        "seed": seed,
        "config": {
            "stream": "cifar100(tasks=5)",
            "backbone": "clip(path='openai/clip-vit-base-patch16')",
            "method": method,
            "objective": "classify()",
            "epochs": 20,
            "lr": 5e-4,
            "batch_size": 128,
            "precision": "auto",
            "seed": seed,
        }
        | config,
        "resolved": {"precision": "bf16", "attention": "eager", "threads": 2, "device": "cpu"},
        "backbone": {"fingerprint": "5f" * 32, "preprocess": {"size": 224, "resize": 224, "mean": [0.5] * 3}},
        "versions": {"torch": "2.9.0"},
        "stream": {
            "name": "cifar100",
            "scenario": "class",
            "tasks": [
                {
                    "index": i,
                    "name": name,
                    "classes": [2 * i, 2 * i + 1],
                    "names": [f"{name} a", f"{name} b"],
                    "train": 1000,
                    "test": 200,
                }
                for i, name in enumerate(names)
            ],
            "skipped": [],
        },
    }
    (folder / "run.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")
    rows: list[dict[str, Any]] = []
    matrix: list[list[float | None]] = []
    for i in range(done):
        row = [max(0.05, 0.92 - 0.01 * j - lost * (i - j) + draw.uniform(-0.02, 0.02)) for j in range(i + 1)]
        matrix.append([*row, *[None] * (tasks - i - 1)])
        for j, value in enumerate(row):
            for metric, better in (("accuracy", 0.0), ("accuracy_with_task_id", 0.05), ("task_id_accuracy", 0.03)):
                rows.append({"after": i, "on": j, "metric": metric, "value": min(1.0, value + better)})
            if j < i:
                rows.append({"after": i, "on": j, "metric": "feature_drift", "value": lost * (i - j)})
        if method.startswith("inflora"):
            for k in range(12):
                share = 1 - math.exp(-(i + 1) * (0.02 + 0.012 * k))
                facts = {"occupied_share": share, "free_dimension": round(768 * (1 - share))}
                facts |= {"old_space_share": 1e-8} if i else {}
                rows += [
                    {"after": i, "on": None, "metric": f"{name}/encoder.layers.{k}:qkv", "value": value}
                    for name, value in facts.items()
                ]
    with (folder / "results.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    if done == tasks:
        summary = {
            "matrix": matrix,
            "trainable_parameters": 1_240_080,
            "stored_bytes": 7_340_032 + 1000 * seed,
            "seconds_per_task": [
                {"prepare": 3.2, "train": 61 + 5 * draw.random(), "finish": 2.1 + 0.1 * i, "evaluate": 4 + 1.5 * i}
                for i in range(tasks)
            ],
            "images_per_second": 318.4,
            "peak_rss_bytes": 2_147_483_648,
            "skipped_images": 0,
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def render(out: Path, *folders: Path) -> str:
    return write_report(folders, out / "out.html").read_text(encoding="utf-8")


def text_of(page: str) -> str:
    """What a reader sees, without the style sheet and with single spaces."""
    body = re.sub(r"(?s)<style>.*?</style>|<[^>]+>", " ", page)
    return " ".join(html.unescape(body).split())


class Balance(HTMLParser):
    """Every element is closed, in order."""

    void = frozenset({"meta", "br", "link", "img", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_balance(page: str) -> None:
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert parser.open == []


def test_one_run_shows_its_numbers_in_words(tmp_path: Path):
    page = render(tmp_path, write_run(tmp_path / "a"))
    check_balance(page)
    text = text_of(page)
    run = RunResults.read(tmp_path / "a")
    meaning = "Mean accuracy over all tasks after the last one was learnt. Higher is better."
    assert f"Final accuracy {meaning} {100 * run.numbers()['acc']:.1f} %" in text
    assert "Trainable parameters Numbers that training may change, in the last task. 1,240,080" in text
    assert "7.34 MB" in text
    assert "2.15 GB" in text
    assert "318 /s" in text
    assert "5f5f5f" in text
    assert "any class seen so far may be answered" in text
    assert "Comparison" not in text
    assert "Not finished" not in text


def test_every_evaluated_score_stands_in_the_matrix(tmp_path: Path):
    page = render(tmp_path, write_run(tmp_path / "a", tasks=20))
    shown = page[page.index('aria-label="Accuracy matrix"') : page.index("Forgetting of each task")]
    cells = re.findall(r'<td class="(?:own )?h(\d+)">([\d.]+)</td>', shown)
    scores = [v for row in RunResults.read(tmp_path / "a").matrix() for v in row if v is not None]
    assert [text for _, text in cells] == [f"{100 * v:.1f}" for v in scores]
    assert [int(h) for h, _ in cells] == [charts.level(v) for v in scores]
    assert len(scores) == 210


def test_the_file_stands_alone(tmp_path: Path):
    page = render(tmp_path, write_run(tmp_path / "a"), write_run(tmp_path / "b", "lora(rank=10)", lost=0.1))
    assert not re.search(r'https?://|<script|<link|<img|@import|url\((?!#)|\bsrc=|\bhref=(?!"#)|file:', page)
    assert "default-src 'none'" in page


def test_the_same_folders_give_the_same_bytes(tmp_path: Path):
    folder = write_run(tmp_path / "a")
    assert render(tmp_path, folder) == render(tmp_path, folder)


def test_names_with_markup_and_chinese_are_shown_as_they_are(tmp_path: Path):
    names = ['<b>猫</b> & "狗"', "</title><script>alert(1)</script>", "{{ 7 * 7 }}"]
    page = render(tmp_path, write_run(tmp_path / "<i>&", names=names, tasks=3, stream="images(path='图片 & <x>')"))
    check_balance(page)
    assert all(name in html.unescape(page) for name in names)
    assert "images(path='图片 & <x>')" in text_of(page)
    assert not re.search(r"<script|<b>猫|<x>|<i>&", page)


LAYER_TABLES = ("Share of each update that reaches old inputs", "Free directions of each layer")
REASONS = ("How far old features moved", "How much of an update reaches old inputs", "How much room is left")


def table_of(page: str, label: str) -> list[list[str]]:
    """The cells of a heat map, row by row."""
    shown = page.split(f'aria-label="{label}"')[1].split("</table>")[0]
    return [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in shown.split("<tbody>")[1].split("</tr>")[:-1]]


def test_each_layer_shows_its_free_directions_and_what_reached_old_inputs(tmp_path: Path):
    page = render(tmp_path, write_run(tmp_path / "a"))
    check_balance(page)
    free = table_of(page, LAYER_TABLES[1])
    assert [len(row) for row in free] == [5] * 12
    assert free[11] == [str(round(768 * math.exp(-(i + 1) * (0.02 + 0.012 * 11)))) for i in range(5)]
    assert table_of(page, LAYER_TABLES[0]) == [["·", *["0.0"] * 4]] * 12
    assert page.count('<th scope="row" title="encoder.layers.11:qkv">') == 2


def test_the_drift_of_every_old_task_stands_in_the_report(tmp_path: Path):
    folder = write_run(tmp_path / "a", "lora(rank=10)", lost=0.3)
    page = render(tmp_path, folder)
    assert table_of(page, "Feature drift") == [
        [f"{30 * (i - j)}.0" if j < i else "·" for j in range(4)] for i in range(1, 5)
    ]
    assert RunResults.read(folder).drifts() == [None, *(pytest.approx(v) for v in (0.3, 0.45, 0.6, 0.75))]
    assert "Feature drift How far features of old test images moved" in text_of(page)
    assert "75.0 %" in text_of(page), "the mean after the last task"
    assert not any(label in page for label in LAYER_TABLES)


def test_the_rank_chosen_for_each_task_and_why_stand_in_the_report(tmp_path: Path):
    folder = write_run(tmp_path / "a", "fm_lora()")
    with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
        for after, (rank, complexity) in enumerate([(16, None), (4, 0.61239), (8, 0.9)]):
            for metric, value in (("rank", rank), ("complexity", complexity)):
                if value is not None:
                    file.write(json.dumps({"after": after, "on": None, "metric": metric, "value": value}) + "\n")
    page = render(tmp_path, folder)
    check_balance(page)
    assert table_of(page, "Numbers of the method") == [
        ["16", "4", "8", "·", "·"],
        ["·", "0.612", "0.9", "·", "·"],
    ]


def test_why_it_forgot_is_drawn_where_it_was_measured_and_in_the_methods_colour(tmp_path: Path):
    lora, ours = write_run(tmp_path / "b", "lora(rank=10)", lost=0.4), write_run(tmp_path / "a")
    page = render(tmp_path, lora, ours)
    check_balance(page)
    drift, reach, room = (page.split(f"<h3>{title}</h3>")[1].split("</figure>")[0] for title in REASONS)
    assert [sorted(set(re.findall(r"fill: none; stroke: var\(--c(\d)\)", each))) for each in (drift, reach, room)] == [
        ["0", "1"],
        ["1"],
        ["1"],
    ]
    assert "lora(rank=10): 100.0 %" in drift
    assert "inflora(rank=10): 0.0 %" in reach
    alone = render(tmp_path, lora)
    assert [title in alone for title in REASONS] == [True, False, False]


def test_a_run_without_these_measurements_says_nothing_about_them(tmp_path: Path):
    folder = write_run(tmp_path / "a", "lora(rank=10)")
    path = folder / "results.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "drift" not in line))
    page = render(tmp_path, folder)
    check_balance(page)
    assert "did not forget" not in page
    assert 'aria-label="Feature drift"' not in page
    assert RunResults.read(folder).numbers()["feature_drift"] is None


def test_several_runs_are_compared_by_method_over_seeds(tmp_path: Path):
    folders = [write_run(tmp_path / f"{m}{s}", f"{m}(rank=4)", s) for m in ("lora", "inflora") for s in range(3)]
    page = render(tmp_path, *folders)
    check_balance(page)
    groups = grouped([RunResults.read(f) for f in folders])
    assert [(g.label, len(g.runs)) for g in groups] == [("lora(rank=4)", 3), ("inflora(rank=4)", 3)]
    values = [run.numbers()["acc"] for run in groups[0].runs]
    mean = sum(values) / 3
    std = (sum((v - mean) ** 2 for v in values) / 2) ** 0.5
    assert f"lora(rank=4) 3 {100 * mean:.1f} ± {100 * std:.1f}" in text_of(page)
    assert page.split("Accuracy over time")[1].split("</figure>")[0].count("fill-opacity: 0.14") == 2


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(tmp_path: Path):
    a = write_run(tmp_path / "a", seed=0, stream="cifar100(tasks=5, seed=0)")
    b = write_run(tmp_path / "b", seed=1, stream="cifar100(tasks=5, seed=1)")
    c = write_run(tmp_path / "c", seed=2, stream="cifar100(tasks=5, seed=2)", lr=0.01)
    groups = grouped([RunResults.read(f) for f in (a, b, c)])
    assert [(g.label, len(g.runs)) for g in groups] == [(f"{INFLORA} · lr 0.0005", 2), (f"{INFLORA} · lr 0.01", 1)]


def test_runs_on_different_streams_are_told_apart_with_a_warning(tmp_path: Path):
    page = render(tmp_path, write_run(tmp_path / "a"), write_run(tmp_path / "b", stream="cub200(tasks=5)"))
    assert "These runs differ in stream: their numbers cannot be compared directly." in text_of(page)


def test_a_run_still_going_is_shown_as_far_as_it_got(tmp_path: Path):
    folder = write_run(tmp_path / "a", learnt=3)
    with (folder / "results.jsonl").open("a") as file:
        file.write('{"after": 3, "on": 0, "metric": "accuracy", "value": 0.5}\n{"after": 3, "on": 1, "metr')
    run = RunResults.read(folder)
    assert run.learnt() == 3
    assert run.numbers()["acc"] == pytest.approx(sum(v for v in run.matrix()[2] if v is not None) / 3)
    text = text_of(render(tmp_path, folder))
    assert "Not finished: 3 of 5 tasks are learnt and evaluated." in text


def test_scores_of_unfinished_runs_are_no_final_ones(tmp_path: Path):
    runs = [write_run(tmp_path / f"{seed}", seed=seed) for seed in (0, 1)]
    whole, part = grouped([RunResults.read(each) for each in [*runs, write_run(tmp_path / "2", seed=2, learnt=1)]])
    assert (whole.label, len(whole.runs)) == (INFLORA, 2)
    assert part.label == f"{INFLORA} · 1 of 5 tasks"
    assert (whole.finished, part.finished) == (True, False)
    page = render(tmp_path, *runs, tmp_path / "2")
    assert '<td class="best">' not in page, "of one finished method none is the best"


def test_runs_of_one_seed_differ_in_nothing(tmp_path: Path):
    runs = [write_run(tmp_path / name) for name in "ab"]
    assert "over 2 runs that differ in nothing, their seed included" in text_of(render(tmp_path, *runs))


def test_only_a_report_is_written_over(tmp_path: Path):
    folder = write_run(tmp_path / "a")
    before = (folder / "run.json").read_bytes()
    with pytest.raises(ValueError, match=r"run.json is there and is no report: give another --out"):
        write_report([folder], folder / "run.json")
    assert (folder / "run.json").read_bytes() == before
    assert write_report([folder], write_report([folder], folder)) == folder / "report.html"


@pytest.mark.parametrize("learnt", [0, 1])
def test_a_run_at_its_very_beginning_gives_a_report(tmp_path: Path, learnt: int):
    folder = write_run(tmp_path / "a", learnt=learnt)
    check_balance(render(tmp_path, folder))
    assert RunResults.read(folder).numbers()["forgetting"] is None


def test_a_record_that_lacks_something_is_refused_with_the_field(tmp_path: Path):
    folder = write_run(tmp_path / "a")
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    (folder / "run.json").write_text(json.dumps(facts | {"stream": None}))
    assert "run.json is damaged: stream: expected object, got null" in refusal(folder)
    del facts["stream"]["tasks"][1]["names"]
    (folder / "run.json").write_text(json.dumps(facts))
    assert "run.json is damaged: stream.tasks[1]: object missing required field names" in refusal(folder)


def test_a_summary_without_results_is_enough(tmp_path: Path):
    folder = write_run(tmp_path / "a")
    before = RunResults.read(folder).numbers()["acc"]
    (folder / "results.jsonl").unlink()
    assert RunResults.read(folder).numbers()["acc"] == pytest.approx(before)
    check_balance(render(tmp_path, folder))


def test_scores_of_the_pre_trained_model_stand_above_the_first_task(tmp_path: Path):
    folder = write_run(tmp_path / "a", tasks=2)
    with (folder / "results.jsonl").open("a") as file:
        file.writelines(
            json.dumps({"after": -1, "on": j, "metric": "accuracy", "value": 0.25}) + "\n" for j in range(2)
        )
        file.write(json.dumps({"after": 0, "on": 1, "metric": "accuracy", "value": 0.35}) + "\n")
    page = render(tmp_path, folder)
    assert RunResults.read(folder).numbers()["fwt"] == pytest.approx(0.1)
    assert "nothing yet" in page
    assert page.count(">25.0</td>") == 2


def test_images_left_out_are_listed(tmp_path: Path):
    folder = write_run(tmp_path / "a")
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    facts["stream"]["skipped"] = ["photos/x.jpg: cut off"]
    (folder / "run.json").write_text(json.dumps(facts))
    assert "photos/x.jpg: cut off" in text_of(render(tmp_path, folder))


def test_the_report_goes_into_a_folder_that_is_named(tmp_path: Path):
    folder = write_run(tmp_path / "a")
    assert write_report([folder], folder) == folder / "report.html"
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "results.jsonl", "run.json", "summary.json"]


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        write_report([folder], folder.parent / "out.html")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    assert "has no run.json" in refusal(tmp_path)
    assert "has no run.json" in refusal(tmp_path / "absent")
    with pytest.raises(ValueError, match="no run to report"):
        write_report([], tmp_path / "out.html")


@pytest.mark.parametrize("name", ["run.json", "summary.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"config": 3, "matrix": [[1, 2]]}'])
def test_a_damaged_file_is_named_with_the_remedy(tmp_path: Path, name: str, content: bytes):
    folder = write_run(tmp_path / "a")
    (folder / name).write_bytes(content)
    message = refusal(folder)
    assert str(folder / name) in message
    assert "restore" in message


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"after": 0}', '{"after": "x", "on": 0, "metric": "accuracy", "value": 1}']
)
def test_a_damaged_line_of_results_is_named_by_number(tmp_path: Path, line: str):
    folder = write_run(tmp_path / "a")
    path = folder / "results.jsonl"
    path.write_text("\n" + line + "\n" + path.read_text())
    assert "results.jsonl, line 2, is damaged" in refusal(folder)


@pytest.mark.parametrize("dark", [False, True])
def test_text_on_the_heat_map_can_be_read(dark: bool):
    def rgb(text: str) -> tuple[int, int, int]:
        return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)

    colours = charts.heat_colours(dark)
    assert min(charts.contrast(rgb(a), rgb(b)) for a, b in colours) >= 4.5
    steps = [charts.contrast(rgb(a), (255, 255, 255)) for a, _ in colours]
    assert steps == sorted(steps, reverse=dark), "lightness alone must tell the order"


def test_contrast_is_that_of_the_accessibility_guidelines():
    assert charts.contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert charts.contrast((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.01)


def test_a_bar_grows_from_zero_to_either_side():
    assert 'x="25.00%" width="75.00%"' in charts.bar(0.3, -0.1, 0.3, "lost")
    assert 'x="0.00%" width="25.00%"' in charts.bar(-0.1, -0.1, 0.3, "gained")


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("acc", 0.7134, "71.3 %"),
        ("bwt", -0.031, "−3.1 points"),
        ("bwt", -0.0001, "0.0 points"),
        ("stored_bytes", 999.0, "999 B"),
        ("stored_bytes", 1_000_000.0, "1 MB"),
        ("stored_bytes", 0.0, "0 B"),
        ("peak_rss_bytes", 5e15, "5,000 TB"),
        ("images_per_second", 12.345, "12.3 /s"),
        ("acc", None, "–"),
    ],
)
def test_numbers_carry_their_unit(key: str, value: float | None, text: str):
    assert text_of(str(show(key, value))) == text


def test_durations_are_written_for_people():
    assert [duration(s) for s in (0.1234, 59.7, 75.2, 119.9, 7260)] == [
        "0.123 s",
        "59.7 s",
        "1 min 15 s",
        "2 min 0 s",
        "2 h 1 min",
    ]
