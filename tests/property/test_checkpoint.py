"""A checkpoint is whole or refused by name, wherever it was cut."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from perdure.core import checkpoint
from perdure.core.checkpoint import DamagedCheckpoint
from perdure.training.loop import fit_task

SPEC = "lora(rank=2) + ewc(samples=8)"
FILES = ("learner.safetensors", "manifest.json", "step-000002/optimizer.safetensors", "step-000002/learner.safetensors")
fast = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def stopped(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks learnt, and a snapshot within the third."""
    out = tmp_path_factory.mktemp("stopped")
    learner, stream = lab.learner(SPEC), lab.stream()
    for task in stream.tasks[:2]:
        lab.teach(learner, [task])
        checkpoint.save_task(out, learner, [], {})
    learner.grow(stream.tasks[2])

    def save(step: int, optimizer: Any) -> None:
        checkpoint.save_step(out, learner, step, optimizer, [])
        if step == 2:
            raise Cut

    with pytest.raises(Cut):
        fit_task(learner, stream.tasks[2], lab.train_config(), save_step=save)
    return out


class Cut(Exception):
    """Stops the training after a snapshot."""


def bring_back(folder: Path, lab: Any) -> None:
    """What `resume` does with checkpoints, up to the optimizer."""
    done = checkpoint.whole(folder)
    snapshot = checkpoint.latest_step(folder, done)
    tasks = lab.stream().tasks
    checkpoint.restore(lab.learner(SPEC), done[-1], tasks)
    if snapshot is not None:
        learner = lab.learner(SPEC)
        checkpoint.restore(learner, snapshot, tasks)
        optimizer = torch.optim.Adam(learner.trainable().values())
        checkpoint.restore_optimizer(snapshot, learner, optimizer)


def path_of(folder: Path, name: str) -> Path:
    return folder / ("task-002" if name.startswith("step") else "task-001") / name


def damaged(stopped: Path, name: str, content: bytes, lab: Any) -> None:
    """Put `content` into a file, and expect it to be refused by its name."""
    path = path_of(stopped, name)
    kept = path.read_bytes()
    if content == kept:
        return
    path.write_bytes(content)
    try:
        with pytest.raises(DamagedCheckpoint) as error:
            bring_back(stopped, lab)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    finally:
        path.write_bytes(kept)


@pytest.mark.parametrize("name", FILES)
@fast
@given(share=st.floats(0, 1))
@example(share=0.0)
@example(share=0.999999)
def test_a_file_cut_at_any_byte_is_refused_by_name(name: str, share: float, stopped: Path, lab: Any) -> None:
    kept = path_of(stopped, name).read_bytes()
    damaged(stopped, name, kept[: int(share * len(kept))], lab)


@pytest.mark.parametrize("name", FILES)
@fast
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_file_with_one_flipped_bit_is_refused_by_name(
    name: str, share: float, bit: int, stopped: Path, lab: Any
) -> None:
    kept = bytearray(path_of(stopped, name).read_bytes())
    kept[int(share * len(kept))] ^= 1 << bit
    damaged(stopped, name, bytes(kept), lab)


@pytest.mark.parametrize("name", [n for n in FILES if n.endswith("safetensors")])
def test_a_missing_file_is_refused_by_name(name: str, stopped: Path, lab: Any, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "copy")
    path_of(tmp_path / "copy", name).unlink()
    with pytest.raises(DamagedCheckpoint, match=rf"{name} is missing: restore it, or remove"):
        bring_back(tmp_path / "copy", lab)


def test_what_is_not_damaged_is_brought_back(stopped: Path, lab: Any) -> None:
    bring_back(stopped, lab)
