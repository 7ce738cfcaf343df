"""Evaluation sets on real files."""

from pathlib import Path

import pytest

from perdure.streams.evaluation_sets import mme

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "tiny_questions" / "mme_like"


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the data set is not there: {DATA}")
def test_questions_in_mmes_layout_are_worth_50_to_who_always_says_yes() -> None:
    found = mme(str(DATA))
    assert len(found.questions) == 120
    scores = found.measure(["Yes"] * 120)
    assert [scores[f"{rule}/existence"] for rule in ("official", "guarded")] == [50, 50]
    truths = [reference.answers[0] for reference in found.references]
    assert found.measure(truths)["official/perception"] == 200
    assert "artwork" in found.grade(truths).remarks[0]
