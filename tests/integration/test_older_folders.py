"""Folders written by older versions: learners answer as they did, stopped runs end as they would have.

`fixtures/format1.tar.xz` was written by the last version without seals (commit b395bde), `format2.tar.xz` by the last
one before saved tensors got the names of today (37dbe5e): small runs of the laboratory, with what each learner answered
for six random pictures, and the results of runs that were stopped within their second task.
"""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from perdure.api.learner import Learner
from perdure.training.run import resume

FIXTURES, FORMATS = Path(__file__).parents[1] / "fixtures", ("format1", "format2")


def members() -> dict[str, Any]:
    """Folder of a run, as `format1/00-lora` -> what it answered, or its results."""
    found: dict[str, Any] = {}
    for name in FORMATS:
        with tarfile.open(FIXTURES / f"{name}.tar.xz") as archive:
            file = archive.extractfile(f"{name}/answers.json")
            assert file is not None
            found |= {f"{name}/{folder}": facts for folder, facts in json.load(file).items()}
    return found


WRITTEN = members()
# Their defaults have changed since (`power`, `mask`): such a run goes on with the rest of its task by the new ones.
CHANGED = ("format1/stopped-01-inflora", "format1/stopped-03-lora")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("older")
    for name in FORMATS:
        with tarfile.open(FIXTURES / f"{name}.tar.xz") as archive:
            archive.extractall(root, filter="data")
    return root


def same(now: Any, then: Any) -> None:
    """Equal but for the last digits: machines round differently."""
    assert len(now) == len(then)
    for one, other in zip(now, then, strict=True):
        assert [name for name, _ in one] == [name for name, _ in other]
        assert [score for _, score in one] == pytest.approx([score for _, score in other], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", [name for name, facts in WRITTEN.items() if "results" not in facts])
def test_a_learner_of_an_older_format_answers_as_it_did(name: str, folders: Path) -> None:
    learner, facts = Learner.load(folders / name), WRITTEN[name]
    images = (torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 255).to(torch.uint8)
    if "answers" in facts:
        same(learner.predict(images), facts["answers"])
    if "search" in facts:
        same([learner.search(images, "a red circle", top=6)], [facts["search"]])


@pytest.mark.parametrize("name", [name for name, facts in WRITTEN.items() if "results" in facts])
def test_a_stopped_run_of_an_older_format_ends_as_it_would_have(name: str, folders: Path) -> None:
    resume(folders / name)
    now, then = ((folders / name / "results.jsonl").read_text().splitlines(), WRITTEN[name]["results"])
    for one, other in zip(map(json.loads, now), map(json.loads, then), strict=True):
        assert (one["after"], one["on"], one["metric"]) == (other["after"], other["on"], other["metric"])
        if name not in CHANGED or other["after"] == 0:
            assert one["value"] == pytest.approx(other["value"], rel=1e-3, abs=1e-5)


def test_an_older_learner_is_known_to_be_what_its_folder_holds_already(folders: Path) -> None:
    folder = folders / "format2/03-inflora"
    before = sorted(folder.rglob("*"))
    Learner.load(folder).save(folder)
    assert sorted(folder.rglob("*")) == before
