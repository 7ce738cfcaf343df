"""An export with a model card in a folder, offline; nothing of the data but names goes along."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from perdure.api.learner import Learner
from perdure.api.pushing import _without_paths, push
from perdure.backbones import BACKBONES
from perdure.core.manifests import check_new
from perdure.export.model import export


def test_a_folder_gets_the_model_and_a_card_of_what_was_taught(saved: dict[str, Path], tmp_path: Path) -> None:
    spec = f"clip(path={str(saved['clip'])!r})"
    learner = Learner.create(spec, "lora(rank=2)", precision="fp32", device="cpu", epochs=1)
    learner.learn(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), ["a|b", "<img src=x>"] * 2)
    learner.save(tmp_path / "my")
    where = Path(push(tmp_path / "my", str(tmp_path / "model")))
    card = (where / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: perdure\n")
    assert "- Method: `lora(rank=2)`" in card
    assert "- Backbone: `clip(path='clip')`" in card
    for file in (each for each in where.rglob("*") if each.suffix in (".json", ".md")):
        assert str(saved["clip"]) not in file.read_text(), file.name
    assert "<img" not in card
    assert "a&#124;b" in card
    assert BACKBONES["clip"](str(where)).dim == 16
    with pytest.raises(ValueError, match="is there already and not an empty folder"):
        push(tmp_path / "my", str(where))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_whoever_is_killed_leaves_a_whole_model_or_none(saved: dict[str, Path], tmp_path: Path) -> None:
    learner = Learner.create(f"clip(path={str(saved['clip'])!r})", "ncm", precision="fp32", device="cpu")
    learner.learn(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), ["a", "b"] * 2).save(tmp_path / "my")
    files = {path.name for path in Path(push(tmp_path / "my", str(tmp_path / "whole"))).iterdir()}
    ends = []
    for moment in range(1, 200, 4):
        child = multiprocessing.get_context("fork").Process(target=_killed, args=(tmp_path, moment))
        child.start()
        child.join()
        there = (tmp_path / "model").exists()
        assert not there or {path.name for path in (tmp_path / "model").iterdir()} == files, moment
        ends.append(child.exitcode)
        if there:
            break
    assert ends[0] == -signal.SIGKILL
    assert there


def _killed(folder: Path, moment: int) -> None:
    """Push, and be killed after so many changes to files in `folder`."""
    left = [moment]

    def heard(event: str, details: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.mkdir", "os.remove") and str(details[0]).startswith(str(folder)):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(heard)
    push(folder / "my", str(folder / "model"))


@pytest.mark.parametrize(("to", "said"), [("a/b/c/d", "expected 'name/model'"), ("x y", "expected 'name/model'")])
def test_what_is_neither_a_repository_nor_a_folder_is_refused(to: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        push(tmp_path, to)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from perdure.api.pushing import _upload

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for offline in (False, True):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        with pytest.raises(ValueError, match="the hub refuses") as found:
            _upload(tmp_path, "name/model", public=False)
        assert "\n" not in str(found.value)


def test_only_where_it_describes_itself_is_a_path_cut(tmp_path: Path) -> None:
    files = {
        "README.md": "vision(path='/model') from \"/model\"; see https://x.org/models/a and /modeller",
        "labels.json": '{"backbone": "vision(path=\\"/model\\")"}',
        "tokenizer.json": '{"/model": 1, "model": 2}',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    _without_paths(tmp_path, ["vision(path='/model')", "lora(rank=2)"])
    assert (tmp_path / "tokenizer.json").read_text() == files["tokenizer.json"]
    assert (tmp_path / "labels.json").read_text() == '{"backbone": "vision(path=\\"model\\")"}'
    assert (tmp_path / "README.md").read_text() == (
        "vision(path='model') from \"model\"; see https://x.org/models/a and /modeller"
    )


@pytest.mark.parametrize("where", ["task-001", "more/model"])
def test_nothing_is_written_into_the_folder_of_a_learner(where: str, tmp_path: Path) -> None:
    learner = Learner.create("tiny()", "lora(rank=2)", precision="fp32", device="cpu", epochs=1)
    learner.learn(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), ["a", "b"] * 2)
    learner.save(tmp_path / "my")
    for write in (lambda to: export(learner, to, "merged"), check_new):
        with pytest.raises(ValueError, match=r"lies in .*my, which is a learner's or a run's: give a folder beside it"):
            write(tmp_path / "my" / where)
    assert not (tmp_path / "my" / where).exists()


def test_public_says_nothing_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"public=True has no effect on .*which is a folder"):
        push(tmp_path, str(tmp_path / "model"), public=True)
    assert not (tmp_path / "model").exists()
