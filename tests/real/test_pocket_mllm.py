"""A small real LLaVA answers questions about images that it has not seen."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from perdure.backbones.language import Language
from perdure.backbones.mllm import mllm
from perdure.scoring import measure

SHARED = Path(__file__).parents[3] / "shared"
PARTS, QUESTIONS = SHARED / "weights" / "pocket-mllm", SHARED / "data" / "tiny_questions" / "test.parquet"

pytestmark = pytest.mark.skipif(
    not (PARTS.is_dir() and QUESTIONS.is_file()),
    reason="no ../shared/weights/pocket-mllm and ../shared/data/tiny_questions",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Language:
    folder = tmp_path_factory.mktemp("pocket-mllm")
    subprocess.run([sys.executable, str(PARTS / "compose.py"), str(folder)], check=True, capture_output=True)
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


def test_answers_are_the_same_at_every_batch_size_and_come_faster_together(
    model: Language, questions: list[dict[str, Any]]
) -> None:
    batch = model.prepare({"conversation": questions[:24]})
    said, seconds = {}, {}
    for size in (24, 5, 1):
        start = time.process_time()
        said[size] = model.generate(batch, tokens=8, size=size)
        seconds[size] = time.process_time() - start
    assert said[24] == said[5] == said[1]
    assert seconds[1] > 1.5 * seconds[24], seconds
