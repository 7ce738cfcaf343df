"""The app as people meet it: a process of its own, asked by Chromium and by HTTP."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
PATIENCE = 60_000
"""Milliseconds; how long a page on a machine that is busy with other things may take."""
playwright.expect.set_options(timeout=PATIENCE)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}


def photos(folder: Path, *colours: str, count: int = 6, seed: int = 0) -> Path:
    """A folder of class folders: noisy pictures of a colour each."""
    random = np.random.default_rng(seed)
    for colour in colours:
        (folder / colour).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            noisy = np.array(COLOURS[colour]) + random.normal(0, 12, (24, 24, 3))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / colour / f"{seed}-{i}.png")
    return folder


class Served:
    """A running app."""

    def __init__(self, address: str, process: subprocess.Popen[str], folder: Path) -> None:
        self.address, self.process, self.folder = address, process, folder


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Served]]:
    """Starts an app in a folder with what is given to it; all are ended with its file of tests."""
    running: list[subprocess.Popen[str]] = []

    def starting(folder: Path, *flags: str) -> Served:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "no_proxy": "*"}
        command = [sys.executable, "-m", "perdure.cli", "app", "learner", "--port", "0", "--json", *flags]
        with (folder / "errors.txt").open("w") as errors:
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        running.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (folder / "errors.txt").read_text()
        return Served(json.loads(line)["address"].replace("0.0.0.0", "127.0.0.1"), process, folder)

    yield starting
    for process in running:
        process.terminate()
    for process in running:
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def app(start: Callable[..., Served], tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A learner of red and green, with a folder to search in."""
    from perdure.api.folders import teach_folder
    from perdure.training.config import RunConfig

    folder = tmp_path_factory.mktemp("app")
    photos(folder / "gallery", "red", "green", "blue", count=2, seed=7)
    config = RunConfig(
        stream="",
        backbone="tiny(text=True)",
        method="lora(rank=2) + align",
        lr=1e-2,
        batch_size=8,
        device="cpu",
        precision="fp32",
    )
    teach_folder(photos(folder / "january", "red", "green"), folder / "learner", config, {})
    return start(folder, "--images", "gallery")


@pytest.fixture(scope="module")  # not the session's: Playwright keeps an event loop running, which others cannot have
def chromium() -> Iterator[Any]:
    """Chromium as the system has it."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    quiet = ["--no-sandbox", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=quiet)
        yield browser
        browser.close()


@pytest.fixture
def new_context(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens browsers that know nothing of each other."""
    contexts: list[Any] = []

    def opening(**options: Any) -> Any:
        contexts.append(chromium.new_context(**options))
        contexts[-1].set_default_timeout(PATIENCE)
        return contexts[-1]

    yield opening
    for context in contexts:
        context.close()
