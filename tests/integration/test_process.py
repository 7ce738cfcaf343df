"""A library leaves the caller's process as it found it, and does not mind how it found it."""

import logging
import os
import random
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from huggingface_hub.utils import logging as hub
from PIL import Image
from transformers.utils import logging as transformers

from perdure import write_report
from perdure.api.folders import teach_folder
from perdure.api.learner import Learner
from perdure.api.measuring import evaluate
from perdure.experiments.grid import cells, compare
from perdure.training.loop import Quiet
from perdure.training.run import resume
from perdure.training.runtime import Runtime

PLAIN = {"precision": "fp32", "attention": "sdpa", "device": "cpu", "epochs": 1, "batch_size": 4}
SPEC = "lora(rank=2) + ewc(samples=4)"


def pictures(count: int = 8) -> torch.Tensor:
    noise = torch.randint(256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(3), device="cpu")
    return noise.to(torch.uint8)


def create(objective: str = "classify()", **more: Any) -> Learner:
    return Learner.create("tiny(dim=16, text=True)", SPEC, objective, **PLAIN, **more)


def learnt(objective: str = "classify()") -> Learner:
    return create(objective).learn(pictures(), list("abababab"))


@pytest.fixture(scope="module")
def folders(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A learner, a run, a run that was stopped, all made with one thread; and images."""
    root = tmp_path_factory.mktemp("folders")
    learnt().save(root / "learner")
    lab.run(SPEC, root / "run")
    lab.stopped_run(SPEC, root / "stopped", (1, 2), save_every=1)
    for name in "ab":
        (root / "images" / name).mkdir(parents=True)
        for i, image in enumerate(pictures(4)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / "images" / name / f"{i}.png")
    return root


def refused(new: Path) -> None:
    with pytest.raises(ValueError, match="has learnt nothing yet"):
        create().save(new)


def grid(lab: Any, out: Path) -> Any:
    return compare(lab.config("probe"), cells(["probe"], [0], out), out, steps=False)


CALLS: dict[str, Callable[[Any, Path, Path], object]] = {
    "create": lambda lab, at, new: create(),
    "learn": lambda lab, at, new: learnt().learnt_state(),
    "predict": lambda lab, at, new: Learner.load(at / "learner").predict(pictures()),
    "predict among words": lambda lab, at, new: Learner.load(at / "learner").predict(pictures(), classes=["x", "y"]),
    "search": lambda lab, at, new: Learner.load(at / "learner").search(pictures(), "a"),
    "save": lambda lab, at, new: learnt().save(new / "saved"),
    "load": lambda lab, at, new: Learner.load(at / "learner").learnt_state(),
    "learn on": lambda lab, at, new: Learner.load(at / "learner").learn(pictures(), list("abcdabcd")).learnt_state(),
    "learn augmented": lambda lab, at, new: create(augment="zoom").learn(pictures(), list("abababab")).learnt_state(),
    "learn names": lambda lab, at, new: learnt("zeroshot()").learnt_state(),
    "refused": lambda lab, at, new: refused(new),
    "run": lambda lab, at, new: lab.run(SPEC, new / "run")["matrix"],
    "resume": lambda lab, at, new: resume(shutil.copytree(at / "stopped", new / "run"))["matrix"],
    "eval": lambda lab, at, new: evaluate(at / "run", None)[1],
    "learn a folder": lambda lab, at, new: str(
        teach_folder(at / "images", new / "taught", create().config, {})[0].describe()
    ),
    "compare": lambda lab, at, new: [row["acc"] for row in grid(lab, new / "grid")],
    "report": lambda lab, at, new: write_report([at / "run"], new / "report.html"),
}
every_call = pytest.mark.parametrize("name", CALLS)


def process() -> dict[str, Any]:
    """What a caller may have set, and would miss."""
    return {
        "generator of torch": torch.get_rng_state().tolist(),
        "generator of numpy": str(np.random.get_state()),
        "generator of Python": random.getstate(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "accelerate": dict(PartialState._shared_state),
        "warnings": list(warnings.filters),
        "logging": [transformers.get_verbosity(), hub.get_verbosity(), logging.root.level, logging.root.handlers[:]],
        "bars": transformers.is_progress_bar_enabled(),
        "environment": dict(os.environ),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "folder": Path.cwd(),
    }


@pytest.fixture
def threads() -> Iterator[int]:
    """A caller with more threads than the folders were made with."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


@every_call
def test_the_process_is_left_as_it_was_found(name: str, lab: Any, folders: Path, tmp_path: Path, threads: int) -> None:
    CALLS[name](lab, folders, tmp_path / "once")  # what is imported for the first time may announce itself
    torch.manual_seed(11)
    before = process()
    CALLS[name](lab, folders, tmp_path / "twice")
    after = process()
    assert [key for key in before if after[key] != before[key]] == []


def test_a_task_is_learnt_with_the_threads_of_the_learner(threads: int) -> None:
    class Counts(Quiet):
        def step(self, step: int, loss: torch.Tensor, images: int) -> None:
            seen.append(torch.get_num_threads())

    seen: list[int] = []
    learner = create()
    learner.runtime = Runtime(**learner.runtime.describe() | {"threads": 1})
    learner.learn(pictures(), list("abababab"), Counts())
    assert set(seen) == {1}
    assert torch.get_num_threads() == threads


@contextmanager
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def switched() -> Iterator[None]:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        yield


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference mode, autocast and a default device": switched,
    "no_grad": torch.no_grad,
    "default dtype": double,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("create", "save", "refused", "report")])
def test_what_the_caller_has_switched_on_changes_nothing(
    name: str, mode: str, lab: Any, folders: Path, tmp_path: Path
) -> None:
    expected = CALLS[name](lab, folders, tmp_path / "plain")
    with MODES[mode]():
        found = CALLS[name](lab, folders, tmp_path / "switched")
    if isinstance(expected, dict) and isinstance(found, dict):
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
        assert [key for key, value in found.items() if value.is_inference()] == []
    else:
        assert found == expected


def test_a_learner_loaded_under_inference_mode_learns_later(folders: Path) -> None:
    with torch.inference_mode():
        learner = Learner.load(folders / "learner")
    assert learner.learn(pictures(), list("abcdabcd")).learnt == 2
