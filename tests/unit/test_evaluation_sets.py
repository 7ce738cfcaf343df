"""Evaluation sets in the true formats of their public files: a few rows each, with images drawn here."""

import base64
import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from perdure.backbones.tiny_mllm import tiny_mllm
from perdure.core.learner import Core
from perdure.evaluation.held_out import held_out_of
from perdure.options.spec import build, parse_one
from perdure.streams.evaluation_sets import EVALUATION_SETS, EvaluationSet, mme, mme_realworld, video_mme
from perdure.training.config import make_method, make_objective
from perdure.types import Task

OPTIONS = ["(A) red", "(B) blue", "(C) two cars", "(D) none", "(E) The image does not feature the color"]
CHINESE = ["（A）红色", "（B）蓝色", "（C）两辆车", "（D）无", "（E）图片中没有该颜色"]
MME = [  # category, image, question, answer
    ("count", "0001.png", "Is there one cat? Please answer yes or no.", "Yes"),
    ("count", "0001.png", "Are there two cats? Please answer yes or no.", "No"),
    ("artwork", "7.png", "Is this by Monet? Please answer yes or no.", "No"),
    ("artwork", "7.png", "Is this by Klimt? Please answer yes or no.", "Yes"),
]
REAL = [  # task, subtask, category, question, answer
    ("Perception", "Monitoring", "vehicle/color_attribute", "Which colour?", "B"),
    ("Perception", "Remote Sensing", "count", "How many?\n(cars)", "C"),
    ("Reasoning", "Monitoring", "intention", "What next?", "A"),
]
VIDEO = [  # video, duration, question id, task type, question, answer
    ("fFjv93ACGo8", "short", "001-1", "Counting Problem", "How many?", "C"),
    ("fFjv93ACGo8", "short", "001-2", "Information Synopsis", "What genre?", "A"),
    ("N1cdUjctpG8", "long", "601-1", "OCR Problems", "What is written?", "B"),
]
SUBTITLES = (
    '1\n00:00:00,000 --> 00:00:01,500\n<font color="white" size=".72c">Hello</font>\n\n'
    '2\n00:00:01,500 --> 00:00:04,000\n<font color="white" size=".72c">not shown</font>\n\n'
    '3\n00:00:04,000 --> 00:01:00,000\n<font color="white" size=".72c">the\nend</font>\n'
)


def png(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (grey,) * 3).save(file, "PNG")
    return file.getvalue()


def text(grey: int) -> str:
    return base64.b64encode(png(grey)).decode()


def write_mme(root: Path, apart: bool) -> Path:
    for category, image, question, answer in MME:
        folders = [root / category / (name if apart else "") for name in ("images", "questions_answers_YN")]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        (folders[0] / image).write_bytes(png(0))
        with (folders[1] / image).with_suffix(".txt").open("a") as file:
            file.write(f"{question}\t{answer}\n" + "\n" * (answer == "Yes"))
    return root


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)
    return file


def write_tsv(file: Path, rows: list[dict[str, Any]]) -> Path:
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return file


def write_json(file: Path, rows: Any) -> Path:
    file.write_text(json.dumps(rows))
    return file


def mme_parquet(root: Path) -> Path:
    cells = [
        {"question_id": f"{c}/{i}", "image": {"bytes": png(0), "path": i}, "question": q, "answer": a, "category": c}
        for c, i, q, a in MME
    ]
    return write_parquet(root / "data" / "test-00000-of-00001.parquet", cells).parent.parent


def mme_tsv(root: Path) -> Path:
    """As VLMEvalKit has it: the second question of an image names the row of the first one in place of the image."""
    cells = [
        {
            "index": n,
            "image": text(0) if n % 2 == 0 else str(n - 1),
            "image_path": i,
            "question": q,
            "answer": a,
            "category": c,
        }
        for n, (c, i, q, a) in enumerate(MME)
    ]
    return write_tsv(root / "MME.tsv", cells)


@pytest.mark.parametrize(
    "write",
    [
        lambda root: write_mme(root, apart=False),
        lambda root: write_mme(root, apart=True),
        lambda root: write_mme(root / "MME_Benchmark_release_version", apart=True).parent,
        mme_parquet,
        mme_tsv,
    ],
    ids=["beside", "apart", "release", "parquet", "tsv"],
)
def test_every_form_of_mme_is_the_same_questions(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    found = mme(str(write(tmp_path)))
    rows = [(q.reference.categories[0], q.prompt, q.reference.answers[0]) for q in found.questions]
    assert sorted(rows) == sorted((category, question, answer) for category, _, question, answer in MME)
    assert [open_first(found, i) for i in range(4)] == [png(0)] * 4
    scores = found.measure(["Yes"] * 4)
    assert scores["official/perception"] == scores["guarded/total"] == 100
    assert scores["official"] == 0.25


def test_a_question_of_mme_without_its_pair_is_refused(tmp_path: Path) -> None:
    table = mme_tsv(tmp_path)
    table.write_text("\n".join(table.read_text().split("\n")[:4]) + "\n")
    refused(mme, r"MME\.tsv, row 2: expected 2 questions on image '7\.png' of 'artwork', got 1", str(table))


def open_first(found: EvaluationSet, at: int) -> bytes:
    picture = found.questions[at].pictures()[0]
    return picture if isinstance(picture, bytes) else picture.read_bytes()


def real_json(root: Path) -> Path:
    """The original file, with paths of images."""
    for i in range(len(REAL)):
        (root / f"{i}.png").write_bytes(png(i))
    keys = ("Task", "Subtask", "Category", "Text", "Ground truth")
    rows = [
        {
            **dict(zip(keys, row, strict=True)),
            "Question_id": f"x/{i:04}",
            "Image": f"{i}.png",
            "Question Type": "Multiple Choice",
            "Answer choices": OPTIONS,
        }
        for i, row in enumerate(REAL)
    ]
    return write_json(root / "MME_RealWorld.json", rows)


def real_cells(options: Any, image: str) -> list[dict[str, Any]]:
    return [
        {
            "index": i,
            image: text(i),
            "question": question,
            "multi-choice options": options,
            "answer": answer,
            "category": f"{task}/{subtask}",
            "l2-category": category,
        }
        for i, (task, subtask, category, question, answer) in enumerate(REAL)
    ]


def real_columns(root: Path) -> Path:
    rows = real_cells(OPTIONS, "image")
    letters = dict(zip("ABCDE", (option[4:] for option in OPTIONS), strict=True))
    return write_tsv(
        root / "real.tsv", [{k: v for k, v in row.items() if "options" not in k} | letters for row in rows]
    )


@pytest.mark.parametrize(
    "write",
    [
        real_json,
        lambda root: write_json(root / "real.json", real_cells(OPTIONS, "image")),
        lambda root: write_tsv(root / "lite.tsv", real_cells(str(OPTIONS), "image")),
        real_columns,
        lambda root: write_parquet(root / "data" / "train-0.parquet", real_cells(OPTIONS, "bytes")).parent.parent,
    ],
    ids=["paths", "base64", "list in a text", "column a letter", "parquet"],
)
def test_every_form_of_mme_realworld_is_the_same_questions(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    found = mme_realworld(str(write(tmp_path)))
    first = found.questions[0]
    assert first.reference.categories == ("Perception", "Monitoring", "vehicle/attribute")
    assert first.prompt.startswith("Which colour? The choices are listed below: \n(A) red\n(B) blue\n")
    assert first.prompt.endswith("(A, B, C, D, or E) of the correct option.\nThe best answer is:")
    assert [open_first(found, i) for i in (2, 0, 1)] == [png(2), png(0), png(1)]
    scores = found.measure(["blue", "(E)", ""])
    assert (scores["official"], scores["lenient"], scores["empty"]) == pytest.approx((2 / 3, 1 / 3, 1 / 3))
    assert scores["official/Perception/Monitoring/vehicle/attribute"] == 1
    assert scores["guarded/says/E"] == pytest.approx(1 / 3)


def test_chinese_questions_are_asked_in_chinese(tmp_path: Path) -> None:
    rows = real_cells(CHINESE, "image")
    found = mme_realworld(str(write_json(tmp_path / "cn.json", [row | {"question": "什么颜色？"} for row in rows])))
    assert found.name == "mme_realworld, Chinese"
    assert found.questions[0].prompt.startswith("什么颜色？ 选项如下所示:\n（A）红色\n")
    assert found.measure(["（B）", "答案是C", "红色"])["lenient"] == 1


def write_videos(root: Path, frames: int = 6) -> Path:
    cells = [
        {
            "video_id": q[:3],
            "duration": d,
            "domain": "Knowledge",
            "sub_category": "Law",
            "url": "",
            "videoID": v,
            "question_id": q,
            "task_type": t,
            "question": text,
            "options": ["A. x", "B. y", "C. z", "D. w"],
            "answer": a,
        }
        for v, d, q, t, text, a in VIDEO
    ]
    write_parquet(root / "videomme" / "test-00000-of-00001.parquet", cells)
    for video in {row[0] for row in VIDEO}:
        (root / "frames" / video).mkdir(parents=True)
        for i in range(frames):
            (root / "frames" / video / f"frame_{2 * i + 1}.png").write_bytes(png(i))
    (root / "subtitle").mkdir()
    (root / "subtitle" / "fFjv93ACGo8.srt").write_text(SUBTITLES)
    return root


def test_video_mme_shows_frames_in_order_and_tells_what_is_said_at_them(tmp_path: Path) -> None:
    found = video_mme(str(write_videos(tmp_path)), subtitles=True, count=3, rate=1)
    first, _, silent = found.questions
    # Six frames, one a second: numbers 0, 2 and 5, of which 9 comes before 11.
    assert [picture.name for picture in first.pictures() if isinstance(picture, Path)] == [
        f"frame_{n}.png" for n in (1, 5, 11)
    ]
    assert first.prompt == (
        "This video's subtitles are listed below:\nHello\nnot shown\nthe end\nSelect the best answer to the following "
        "multiple-choice question based on the video. Respond with only the letter (A, B, C, or D) of the correct "
        "option.\nHow many?\nA. x\nB. y\nC. z\nD. w\nThe best answer is:"
    )
    assert silent.prompt.startswith("Select the best answer")
    assert found.remarks == ("1 of 2 videos have no subtitles: asked without",)
    assert found.name == "video_mme, 3 frames, with subtitles"
    later = video_mme(str(tmp_path), subtitles=True, count=2, rate=1).questions[0]
    assert "\nHello\nthe end\nSelect" in later.prompt, "frames 0 and 5 only"


def test_video_mme_is_scored_by_duration(tmp_path: Path) -> None:
    found = video_mme(str(write_videos(tmp_path)))
    assert "subtitles are" not in found.questions[0].prompt
    assert len(found.questions[0].images) == 6, "all frames where there are fewer than asked for"
    scores = found.measure(["C", "it is unclear", "A"])
    wanted = ("official", "official/short", "guarded/short", "guarded/long", "official/answered")
    assert [scores[name] for name in wanted] == [1 / 2, 1, 1 / 2, 0, 2]
    assert len(video_mme(str(tmp_path), duration="long").questions) == 1


def change(file: Path, old: str, new: str) -> None:
    content = file.read_text()
    assert old in content
    file.write_text(content.replace(old, new, 1))


def drop_column(file: Path, column: str) -> None:
    pq.write_table(pq.read_table(file).drop_columns([column]), file)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: (p / "count" / "0001.png").unlink(), r"count/0001\.txt: no image 0001\.jpg or \.png"),
        (lambda p: change(p / "count" / "0001.txt", "\tNo", " No"), r"0001\.txt, line 3: expected a question, a tab"),
        (lambda p: change(p / "count" / "0001.txt", "\tNo", "\tMaybe"), r"0001\.txt, line 3: .*\('Maybe',\)"),
        (
            lambda p: change(p / "count" / "0001.txt", "Are there two cats? Please answer yes or no.\tNo", ""),
            r"0001\.txt: expected 2 questions, got 1",
        ),
        (lambda p: (p / "count" / "0001.txt").write_bytes(b"\xff\n"), r"0001\.txt is not UTF-8"),
        (lambda p: (p / "count").rename(p / "counts"), r"unknown subtask 'counts'; did you mean 'count'\?"),
    ],
)
def test_wrong_files_of_mme_are_refused_in_one_line(tmp_path: Path, damage: Callable[[Path], Any], said: str) -> None:
    write_mme(tmp_path, apart=False)
    damage(tmp_path)
    refused(mme, said, str(tmp_path))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f.parent / "1.png").unlink(), r"row 1: the image '.*1\.png' is missing; unpack"),
        (lambda f: change(f, '"Image": "1.png"', '"Image": "https://a.b/1.png"'), "row 1: .*download the images"),
        (lambda f: change(f, '"Image": "1.png"', '"Image": 1'), "row 1: expected an image, got 1"),
        (lambda f: change(f, '"Image": "1.png"', f'"Image": "{"A" * 80}"'), "row 1: expected an image, got b"),
        (lambda f: change(f, '"Text"', '"Txt"'), r"row 0: no column 'Text' or 'question'; did you mean 'Txt'\?"),
        (lambda f: change(f, "How many?\\n(cars)", " "), "row 1: column 'Text' is ' '; expected a text"),
        (lambda f: change(f, '"(E)', '"x", "(E)'), "row 0: expected 5 options, got "),
        (lambda f: change(f, '"C"', '"F"'), r"row 1: .*the truth is \('F',\); expected one of A, B, C, D, E"),
        (lambda f: change(f, '"Reasoning"', '"Reasonning"'), "row 2: .*unknown task 'Reasonning'; did you mean"),
        (lambda f: change(f, "}, {", "},\n {{"), r"real\.json|RealWorld\.json: .*line 2"),
        (lambda f: f.write_text("[]"), "holds no questions"),
        (lambda f: f.write_text("{}"), "expected a list of questions, got {}"),
        (lambda f: f.write_text("[1]"), "row 0: expected an object with a question, got 1"),
        (lambda f: f.unlink(), "does not exist"),
        (lambda f: f.with_name("b.json").write_text("[]"), None),
    ],
)
def test_wrong_files_of_mme_realworld_are_refused_in_one_line(
    tmp_path: Path, damage: Callable[[Path], Any], said: str | None
) -> None:
    file = real_json(tmp_path)
    damage(file)
    refused(mme_realworld, said or r"several sets of questions; give one of", str(file if said else tmp_path))


def test_lines_that_are_no_json_and_rows_that_do_not_fit_are_named(tmp_path: Path) -> None:
    lines = tmp_path / "real.jsonl"
    lines.write_text("\n".join(map(json.dumps, real_cells(OPTIONS, "image"))) + "\n{not json\n")
    refused(mme_realworld, r"real\.jsonl, line 4: it cannot be read as JSON", str(lines))
    table = write_tsv(tmp_path / "real.tsv", real_cells(str(OPTIONS), "image"))
    table.write_text(table.read_text() + "one\ttwo\n")
    refused(mme_realworld, r"real\.tsv: CSV parse error: .*Expected 7 columns, got 2", str(table))
    refused(mme_realworld, r"is no file of questions; expected \.parquet", str(Path(__file__)))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda p: drop_column(next(p.glob("*/*.parquet")), "options"),
            r"parquet, row 0: expected 4 options, got None",
        ),
        (lambda p: drop_column(next(p.glob("*/*.parquet")), "domain"), r"parquet, row 0: no column 'domain'"),
        (lambda p: (p / "frames" / "N1cdUjctpG8").rename(p / "x"), r"row 2: no frames of video 'N1cdUjctpG8'; extract"),
        (lambda p: next(p.glob("*/*.parquet")).write_text("x"), r"is not a parquet file"),
    ],
)
def test_wrong_files_of_video_mme_are_refused_in_one_line(
    tmp_path: Path, damage: Callable[[Path], Any], said: str
) -> None:
    write_videos(tmp_path)
    damage(tmp_path)
    refused(video_mme, said, str(tmp_path))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("count=0", "count=0"),
        ("duration='medium'", "no questions of duration='medium'"),
        ("duration='shrt'", "duration='shrt'"),
        ("frame=1", "did you mean 'frames'"),
    ],
)
def test_options_of_video_mme_are_read_from_a_description(tmp_path: Path, options: str, said: str) -> None:
    described = f"video_mme(path={str(write_videos(tmp_path))!r}, count=2"
    found = build(parse_one(f"{described})"), EVALUATION_SETS, "evaluation set")
    assert found.name == "video_mme, 2 frames, without subtitles"
    with pytest.raises(ValueError, match=said):
        build(parse_one(f"video_mme(path={str(tmp_path)!r}, {options})"), EVALUATION_SETS, "evaluation set")


@pytest.mark.parametrize("likelihood", [False, True])
def test_every_set_is_held_out_whatever_it_shows(tmp_path: Path, likelihood: bool) -> None:
    """Images by path, within a table, and several of a video; text answers and letters."""
    texts = (
        f"mme(path={str(write_mme(tmp_path / 'mme', True))!r})",
        f"mme_realworld(path={str(write_json(tmp_path / 'real.json', real_cells(OPTIONS, 'image')))!r})",
        f"video_mme(path={str(write_videos(tmp_path / 'video'))!r}, count=3, subtitles=True)",
    )
    backbone, objective = tiny_mllm(), make_objective(f"generate(tokens=2, likelihood={likelihood})", "probe")
    learner = Core(backbone, objective, make_method("probe"))
    learner.grow(Task(0, "any", (0,), ("any",)))
    held = held_out_of(texts, learner)
    rows = {row.metric: row.value for row in held.measure(learner, -1)}
    for name, text in zip(held.sets, texts, strict=True):
        found: EvaluationSet = build(parse_one(text), EVALUATION_SETS, "evaluation set")
        with learner.inference():
            asked = [{"conversation": [question.conversation()]} for question in found.questions]
            said = [objective.say(learner, each)[0] for each in asked]
        measured = {number: rows[f"answers/{name}/{number}"] for number in found.measure(said)}
        assert measured == found.measure(said)
        assert (f"answers/{name}/likeliest" in rows) == (likelihood and name != "mme")


def refused(read: Callable[..., EvaluationSet], said: str, path: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        read(path)
    assert not re.search(r"\n", str(error.value))
