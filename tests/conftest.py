"""The laboratory: a tiny seeded backbone and a stream of random pictures, on one thread and without a network."""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from safetensors.torch import load_file

from perdure.backbones.tiny import Tiny, tiny
from perdure.core.learner import Core
from perdure.streams import build_stream
from perdure.training.config import RunConfig, make_method, make_objective
from perdure.training.loop import Progress, Quiet, TrainConfig, fit_task
from perdure.training.run import resume, run
from perdure.types import Row, Scenario, Stream, Task

torch.set_num_threads(1)
# A power cut is not what these tests are about, and waiting for the disk is a tenth of a run; commands that are
# started as processes of their own do wait.
os.fsync = lambda _: None


class Crash(Exception):
    """A power cut: nothing in the package knows this exception."""


class Breaks(Quiet):
    """Crashes at a step of a task, or once a task is learnt when the step is None."""

    def __init__(self, task: int, step: int | None = None) -> None:
        self.place, self.index = (task, step), -1

    def task(self, task: Task, tasks: int | None, epochs: int, steps: int) -> None:
        self.index = task.index

    def step(self, step: int, loss: torch.Tensor, images: int) -> None:
        if (self.index, step) == self.place:
            raise Crash

    def scores(self, task: Task, rows: list[Row]) -> None:
        if (task.index, None) == self.place:
            raise Crash


@dataclass(frozen=True)
class Laboratory:
    """How experiments are set up: milliseconds a step."""

    tasks: int = 3
    classes: int = 2
    per_class: int = 8
    noise: float = 0.7
    scenario: Scenario = "class"
    objective: str = "classify"
    dim: int = 16
    fused: bool = True
    layers: int | None = None
    lr: float = 1e-2
    epochs: int = 2
    seed: int = 0
    precision: str = "fp32"

    def but(self, **changes: Any) -> "Laboratory":
        """The same with changes."""
        return replace(self, **changes)

    @property
    def text(self) -> bool:
        return not self.objective.startswith("classify")

    def config(self, method: str, **more: Any) -> RunConfig:
        """What `run` takes; attention is fixed, for a measurement would make runs differ."""
        stream = (
            f"synthetic(tasks={self.tasks}, classes_per_task={self.classes}, per_class={self.per_class}, "
            f"test_per_class=4, noise={self.noise}, scenario={self.scenario!r})"
        )
        if self.objective.startswith("retrieve"):
            stream = f"captions_synthetic(tasks={self.tasks}, test_per_task=8, scenario={self.scenario!r})"
        settings = {
            "stream": stream,
            "backbone": f"tiny(dim={self.dim}, fused={self.fused}, text={self.text}, layers={self.layers})",
            "objective": self.objective,
            "epochs": self.epochs,
            "batch_size": 8,
            "lr": self.lr,
            "seed": self.seed,
            "precision": self.precision,
            "attention": "sdpa",
            "device": "cpu",
            "save_every": 1000,
        }
        return RunConfig(method=method, **settings | more)

    def train_config(self, **more: Any) -> TrainConfig:
        return TrainConfig(**{"epochs": self.epochs, "batch_size": 8, "lr": self.lr} | more)

    def backbone(self) -> Tiny:
        return tiny(dim=self.dim, fused=self.fused, text=self.text, layers=self.layers)

    def stream(self) -> Stream:
        return build_stream(self.config("probe").stream, self.backbone().preprocess, self.seed)

    def learner(self, method: str) -> Core:
        objective = make_objective(self.objective, method)
        return Core(self.backbone(), objective, make_method(method), self.scenario, self.seed)

    def teach(self, learner: Core, tasks: Any, **more: Any) -> Core:
        """Learn `tasks` one after another, in memory."""
        for task in tasks:
            learner.grow(task)
            fit_task(learner, task, self.train_config(**more))
        return learner

    @staticmethod
    def descend(learner: Core, task: Task, steps: int = 4) -> None:
        """Train on a task that `learner` has grown for, without ending it."""
        learner.train()
        learner.settle()
        learner.method.begin_task(learner, task)
        optimizer = torch.optim.Adam(learner.trainable().values(), 2e-2)
        batch = task.train.__getitems__(range(len(task.train)))
        for _ in range(steps):
            optimizer.zero_grad()
            learner.loss(batch).backward()
            optimizer.step()

    @staticmethod
    def close(learner: Core, task: Task) -> None:
        """End a task."""
        learner.method.end_task(learner, task)
        learner.settle()
        learner.learnt += 1

    def taught(self, method: str, **more: Any) -> Core:
        """A learner that has learnt the whole stream."""
        return self.teach(self.learner(method), self.stream(), **more)

    def run(self, method: str, out: Path, **more: Any) -> dict[str, Any]:
        return run(self.config(method, **more), out)

    def broken_run(self, method: str, out: Path, *places: tuple[int, int | None], **more: Any) -> None:
        """A run that crashes at each of `places`, (task, step), and is resumed each time.

        A method that trains nothing has no steps to crash at.
        """
        begin: Callable[[Progress], Any] = partial(run, self.config(method, **more), out)
        for place in places:
            with suppress(Crash):
                begin(Breaks(*place))
            torch.manual_seed(987)  # whatever happened before must not matter
            begin = partial(resume, out)
        begin(Quiet())


CERTAIN = ("learnt", "tasks", "rows", "sha256", "trainable_parameters")


def content(folder: Path) -> dict[str, Any]:
    """All of a run's folder that must not depend on how often it was stopped: measurements, tensors, files."""
    found: dict[str, Any] = {"results": (folder / "results.jsonl").read_bytes()}
    summary = json.loads((folder / "summary.json").read_text())
    timed = ("manifest", "seal")  # manifests say how long it took
    found["summary"] = {k: v for k, v in summary.items() if "second" not in k and "peak" not in k and k not in timed}
    for path in sorted(folder.glob("task-*/*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
            found |= {f"{name}: {k}": v.numpy().tobytes() for k, v in load_file(path).items()}
        else:
            kept = json.loads(path.read_text())
            keys = kept if path.name == "source.json" else CERTAIN
            found[name] = {k: kept[k] for k in keys}
    return found


@pytest.fixture(scope="session")
def lab() -> Laboratory:
    """The laboratory with its usual settings."""
    return Laboratory()


@pytest.fixture(scope="session")
def tiny_mllms(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family of multimodal language models -> folder of a tiny random one, as it would lie on the hub."""

    @cache
    def folder(family: str) -> Path:
        from tiny_mllms import build

        if family == "smolvlm":
            pytest.importorskip("num2words", reason="the processor of SmolVLM needs num2words")
        return build(family, tmp_path_factory.mktemp(family))

    return folder


@pytest.fixture(scope="session")
def content_of() -> Any:
    """See `content`."""
    return content
