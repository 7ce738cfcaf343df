"""The command line called as a user does, in a temporary folder, with pictures made for the test."""

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perdure.cli.main import main


@dataclass(frozen=True)
class Answer:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


Ask = Callable[..., Answer]


@pytest.fixture
def perdure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """`perdure("predict", folder, ...)` within an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def ask(*words: object) -> Answer:
        code = 0
        try:
            main([str(word) for word in words])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Answer(code, *capsys.readouterr())

    return ask


@pytest.fixture
def no_file_above() -> Callable[[int], AbstractContextManager[None]]:
    """Within `no_file_above(size)` the system refuses to write more bytes into a file, as a full disk would."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture
def tiny() -> tuple[str, ...]:
    """Flags of a backbone that takes milliseconds a step, computed the same way everywhere."""
    return ("--backbone", "tiny()", "--precision", "fp32", "--attention", "sdpa")


@pytest.fixture
def small(tiny: tuple[str, ...]) -> tuple[str, ...]:
    """Flags of a run of two small tasks."""
    stream = "synthetic(tasks=2, classes_per_task=2, per_class=6, test_per_class=4)"
    return ("--stream", stream, "--epochs", "1", *tiny)


@pytest.fixture
def photos(tmp_path: Path) -> Callable[..., Path]:
    """`photos("new", "cat dog", count=8)`: a folder of class folders, relative to the test's own."""

    def make(folder: str, names: str, count: int = 8) -> Path:
        for name in names.split():
            # each class is noise around a colour of its own
            draw = np.random.default_rng([ord(letter) for letter in name])
            colour = draw.integers(40, 215, 3)
            (tmp_path / folder / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = np.clip(colour + draw.normal(0, 25, (20, 20, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / folder / name / f"{i:02}.png")
        return Path(folder)

    return make
