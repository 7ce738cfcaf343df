"""Searches before and after a stream, in the run's folder and in the report."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perdure.reporting.report import write_report
from perdure.training.run import resume, run


@pytest.fixture
def bench(lab: Any) -> Any:
    return lab.but(objective="retrieve")


def test_queries_are_spread_and_pictures_of_all_that_was_found_are_kept(bench: Any, tmp_path: Path) -> None:
    run(bench.config("finetune(tower='both')"), tmp_path)
    noted = json.loads((tmp_path / "examples.json").read_text())
    assert len({query["text"] for query in noted["queries"]}) == 10
    assert {query["task"] for query in noted["queries"]} == {"topic 0", "topic 1", "topic 2"}
    for query in noted["queries"]:
        for found in (query["before"], query["after"]):
            assert len(set(found)) == 5
            assert {str(pair) for pair in (*found, query["pair"])} <= noted["pictures"].keys()
    assert any(query["before"] != query["after"] for query in noted["queries"])
    picture = Image.open(io.BytesIO(base64.b64decode(next(iter(noted["pictures"].values())))))
    assert picture.size == (16, 16)


def test_a_stopped_run_ends_with_the_same_searches(bench: Any, tmp_path: Path) -> None:
    run(bench.config("lora(rank=2, tower='both')"), tmp_path / "whole")
    bench.broken_run("lora(rank=2, tower='both')", tmp_path / "broken", (2, None))
    whole, broken = ((tmp_path / name / "examples.json").read_text() for name in ("whole", "broken"))
    assert whole == broken
    resume(tmp_path / "whole")
    assert (tmp_path / "whole/examples.json").read_text() == whole


def test_the_report_may_show_its_pictures_and_names_what_was_measured(bench: Any, tmp_path: Path) -> None:
    run(bench.config("probe", retain=("synthetic(tasks=2)",)), tmp_path)
    page = write_report([tmp_path], tmp_path / "report.html").read_text()
    assert len(re.findall(r'src="data:image/png;base64,', page)) == 10 * (1 + 5 + 5)
    assert "img-src data:" in page
    assert "Recall after the last task, among those of all tasks" in page
    assert "Zero-shot accuracy on data sets that were never taught" in page
    assert "Final accuracy" not in page
    assert "Final recall" in page


def test_damaged_searches_are_refused_by_name(bench: Any, tmp_path: Path) -> None:
    run(bench.config("probe"), tmp_path)
    (tmp_path / "examples.json").write_text('{"queries": []')
    with pytest.raises(
        ValueError, match=r"examples\.json is damaged: .*restore it, or remove it: only the report shows it$"
    ):
        write_report([tmp_path], tmp_path / "report.html")


def test_a_classifier_has_no_searches(lab: Any, tmp_path: Path) -> None:
    run(lab.config("probe"), tmp_path)
    assert not (tmp_path / "examples.json").exists()
