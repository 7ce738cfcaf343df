"""A small real LLaVA answers questions about images that it has not seen."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from perdure.backbones.language import Language
from perdure.backbones.mllm import mllm
from perdure.cli.main import main
from perdure.scoring import measure

SHARED = Path(__file__).parents[3] / "shared"
PARTS, QUESTIONS = SHARED / "weights" / "pocket-mllm", SHARED / "data" / "tiny_questions" / "test.parquet"

pytestmark = pytest.mark.skipif(
    not (PARTS.is_dir() and QUESTIONS.is_file()),
    reason="no ../shared/weights/pocket-mllm and ../shared/data/tiny_questions",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pocket-mllm")
    subprocess.run([sys.executable, str(PARTS / "compose.py"), str(made)], check=True, capture_output=True)
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> Language:
    found = mllm(str(folder))
    found.check_finite()
    return found


@pytest.fixture(scope="module")
def questions() -> list[dict[str, Any]]:
    rows = pq.read_table(QUESTIONS).slice(0, 120).to_pylist()
    return [
        {
            "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}],
            "images": [row["image"]["bytes"]],
            "answer": row["answer"],
            "kind": row["kind"],
        }
        for row in rows
    ]


def test_it_answers_as_its_authors_measured(model: Language, questions: list[dict[str, Any]]) -> None:
    said = model.generate({"conversation": questions}, tokens=8)
    for kind, least in (("yes/no", 0.65), ("either-or", 0.7)):
        own = [(text, each["answer"]) for text, each in zip(said, questions, strict=True) if each["kind"] == kind]
        assert len(own) > 15
        assert measure(*map(list, zip(*own, strict=True)), "exact")["strict"] >= least, kind


def test_answers_are_the_same_at_every_batch_size(model: Language, questions: list[dict[str, Any]]) -> None:
    batch = model.prepare({"conversation": questions[:24]})
    said = {size: model.generate(batch, tokens=8, size=size) for size in (24, 5, 1)}
    assert said[24] == said[5] == said[1]


def test_it_is_taught_file_after_file_asked_and_exported_as_people_do_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def perdure(*words: object) -> str:
        main([str(word) for word in words])
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    rows = pq.read_table(QUESTIONS).to_pylist()
    kinds = [[row for row in rows if row["kind"] == kind][:24] for kind in ("yes/no", "either-or")]
    for number, kind in enumerate(kinds):
        lines = []
        for i, row in enumerate(kind):
            Path(f"{number}-{i}.png").write_bytes(row["image"]["bytes"])
            asked = {"image": f"{number}-{i}.png", "question": row["question"], "answer": row["answer"]}
            lines.append(json.dumps(asked))
        Path(f"{number}.jsonl").write_text("\n".join(lines))
    made = ("--backbone", f"mllm(path={str(folder)!r})", "--precision", "fp32")
    for number in (0, 1):
        fast = ("--epochs", 1, "--batch-size", 6, "--lr", 1e-4)
        perdure("learn", f"{number}.jsonl", "--into", "my", *fast, *(() if number else made))
    question = kinds[1][0]["question"]
    told = json.loads(perdure("ask", "my", "1-0.png", question, "--json"))["answer"]
    assert told
    assert "mean over tasks" in perdure("eval", "my")
    perdure("export", "my", "--to", "peft", "--out", "lora")
    perdure("export", "my", "--to", "merged", "--out", "merged")
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    shown = {"messages": [message], "images": [kinds[1][0]["image"]["bytes"]]}
    assert mllm("merged").generate({"conversation": [shown]}, tokens=64) == [told]
