"""Runs that are killed again and again, and runs that are asked to stop, end as if nothing had happened."""

import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from perdure.cli import main as cli
from perdure.core.checkpoint import locked, whole
from perdure.training.config import flags
from perdure.training.loop import Quiet
from perdure.training.run import resume, run
from perdure.training.snapshots import Interrupted
from perdure.types import Row, Task

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
    # forked on purpose: it spares each child the imports, and the child computes on one thread
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]
KILLS = 6  # for each of two methods


class Doomed(Quiet):
    """Kills its own process at a given moment, counted in steps and in whatever happens to files of a folder."""

    def __init__(self, folder: Path, moments: float) -> None:
        self.folder, self.left = str(folder), moments
        sys.addaudithook(self.heard)

    def heard(self, event: str, details: tuple[Any, ...]) -> None:
        if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir") or (
            event == "open" and str(details[0]).startswith(self.folder)
        ):
            self.pass_by()

    def pass_by(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def step(self, step: int, loss: torch.Tensor, images: int) -> None:
        self.pass_by()

    def scores(self, task: Task, rows: list[Row]) -> None:
        self.pass_by()


def go_on(lab: Any, method: str, out: Path, moments: float) -> None:
    """The body of a child process: start the run, or go on with it, and be killed after so many moments."""
    progress = Doomed(out, moments)
    if (out / "run.json").exists():
        resume(out, progress)
    else:
        run(lab.config(method, save_every=1), out, progress)


def command(arguments: list[str], said: Path, asked: int = 0, at: str = "") -> None:
    """The body of a child process: the command line, with what it says in a file.

    It asks itself to stop by the signal `asked` as it first opens a file in a folder called `at`.
    """
    left = [at] if at else []

    def heard(event: str, details: tuple[Any, ...]) -> None:
        if left and event == "open" and f"/{at}/" in str(details[0]):
            left.clear()
            os.kill(os.getpid(), asked)

    sys.addaudithook(heard)
    sys.stdout = sys.stderr = said.open("w")
    cli.main(arguments)


def fork(target: Any, *arguments: Any) -> Any:
    child = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    child.start()
    return child


def end_of(target: Any, *arguments: Any) -> int:
    """Exit code of a child process."""
    child = fork(target, *arguments)
    child.join()
    return int(child.exitcode)


@pytest.mark.parametrize("method", ["inflora(rank=2) + replay(size=8)", "finetune + ewc(samples=8)"])
def test_run_killed_at_random_moments_equals_unbroken_run(
    method: str, lab: Any, content_of: Any, tmp_path: Path
) -> None:
    moments, broken = random.Random(5), tmp_path / "broken"
    assert end_of(go_on, lab, method, tmp_path / "unbroken", math.inf) == 0
    for _ in range(KILLS):  # a whole run has some 340 moments
        assert end_of(go_on, lab, method, broken, moments.randint(1, 75)) == -signal.SIGKILL
    assert whole(broken) != []
    assert end_of(go_on, lab, method, broken, math.inf) == 0
    assert content_of(broken) == content_of(tmp_path / "unbroken")


METHODS = (
    "finetune | lora(rank=2) | inflora(rank=2) | o_lora(rank=2) | sd_lora(rank=2) | c_lora(rank=2) | "
    "route_lora(rank=2) | fm_lora(rank=4) | l2p(pool=4, top=2) | dualprompt | coda_prompt(components=2) | "
    "moe_adapters | probe + align | lora(rank=2) + lwf | lora(rank=2) + ewc(samples=8) | finetune + si | "
    "finetune + gem(size=8) | finetune + mas | lora(rank=2) + derpp(size=8) | ranpac(dim=64)"
)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", METHODS.split(" | "))
def test_runs_of_twenty_methods_are_killed_five_times_each(
    method: str, lab: Any, content_of: Any, tmp_path: Path
) -> None:
    moments, broken = random.Random(method), tmp_path / "broken"
    assert end_of(go_on, lab, method, tmp_path / "unbroken", math.inf) == 0
    kills = 0
    while kills < 5:
        if end_of(go_on, lab, method, broken, moments.randint(1, 45)) == 0:
            shutil.rmtree(broken)  # it came to its end: from the start again
        else:
            kills += 1
    assert end_of(go_on, lab, method, broken, math.inf) == 0
    assert content_of(broken) == content_of(tmp_path / "unbroken")


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_finishes_the_step_saves_and_says_how_to_go_on(
    asked: signal.Signals, lab: Any, content_of: Any, tmp_path: Path
) -> None:
    bench, out, said = lab.but(epochs=15, tasks=2), tmp_path / "out", tmp_path / "said"
    options = bench.config("lora(rank=2)", save_every=1).describe()
    code = end_of(command, ["run", *flags(options), "--out", str(out)], said, asked, "step-000003")
    text = " ".join(said.read_text().split())
    assert code == 130, text
    assert "all is saved" in text
    assert "perdure resume" in text
    assert len(list(out.glob("task-000/step-*/manifest.json"))) == 1
    assert whole(out) == []

    resume(out)
    bench.run("lora(rank=2)", tmp_path / "unbroken")
    assert content_of(out) == content_of(tmp_path / "unbroken")


class Presses(Quiet):
    """Presses Ctrl-C while the second task is encoded."""

    def __init__(self) -> None:
        self.learnt, self.pressed, self.steps = 0, False, 0

    def encoded(self, examples: int) -> None:
        if self.learnt and not self.pressed:
            self.pressed = True
            os.kill(os.getpid(), signal.SIGINT)

    def step(self, step: int, loss: torch.Tensor, images: int) -> None:
        assert not self.pressed, "it went on with a step"

    def scores(self, task: Task, rows: list[Row]) -> None:
        self.learnt += 1


@pytest.mark.parametrize("method", ["probe + align", "ncm", "inflora(rank=2)", "ranpac(dim=64)"])
def test_asked_to_stop_while_examples_are_encoded_it_stops_there(
    method: str, lab: Any, content_of: Any, tmp_path: Path
) -> None:
    presses, bench = Presses(), lab.but(per_class=40)
    with pytest.raises(Interrupted, match="stopped while task 2 was encoded, before a step of it; go on with 'perdure"):
        run(bench.config(method), tmp_path / "out", presses)
    assert presses.learnt == 1
    assert len(whole(tmp_path / "out")) == 1
    resume(tmp_path / "out")
    bench.run(method, tmp_path / "unbroken")
    assert content_of(tmp_path / "out") == content_of(tmp_path / "unbroken")


def test_a_second_process_on_the_same_folder_is_refused(lab: Any, tmp_path: Path) -> None:
    lab.run("ncm", tmp_path / "out")
    with locked(tmp_path / "out"):
        assert end_of(command, ["resume", str(tmp_path / "out")], tmp_path / "said") == 2
    assert "another process is working in" in " ".join((tmp_path / "said").read_text().split())
