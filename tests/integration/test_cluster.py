"""A grid whose cells run beside each other, on a cluster of which a machine dies."""

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from perdure.experiments.cluster import Cluster, _connected
from perdure.experiments.grid import GridProgress, cells, compare
from perdure.training.config import RunConfig
from perdure.training.loop import Quiet

CONFIG = RunConfig(
    stream="synthetic(tasks=3, per_class=8, test_per_class=8)",
    backbone="tiny()",
    epochs=20,
    batch_size=2,
    save_every=10,
    precision="fp32",
)
METHODS = ("lora(rank=2)", "inflora(rank=2)")


class _Killing(Quiet):
    """Kills a machine when the first cell has learnt its first task."""

    def __init__(self, kill: Any) -> None:
        self.kill, self.heard = kill, 0

    def beside(self, number: int, total: int, method: str, seed: int, event: str, facts: dict[str, Any]) -> None:
        self.heard += 1
        if self.heard == 1:
            self.kill()

    def cell(self, *_: Any) -> None:
        raise AssertionError("cells do not run in turn")

    def step_cost(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def machines() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="ray is not installed")
    from ray.cluster_utils import Cluster as Machines

    if sys.platform == "win32":
        pytest.skip("Ray's test clusters need a POSIX system")
    found = Machines(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    found.add_node(num_cpus=1)
    found.wait_for_nodes()
    ray.init(address=found.address, log_to_driver=False, configure_logging=False)
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.mark.parametrize(
    ("options", "named"), [({"cpus": 4}, "--cpus-per-cell 4"), ({"gpus": 0.5}, "--gpus-per-cell 0.5")]
)
def test_what_a_cell_takes_has_no_effect_where_cells_run_in_turn(options: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f"{named} has no effect without --jobs or --on"):
        Cluster(**options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Ray's own
def test_a_grid_ends_with_the_same_table_when_a_machine_dies(machines: Any, tmp_path: Path) -> None:
    here = compare(CONFIG, cells(METHODS, (0, 1), tmp_path / "a"), tmp_path / "a", steps=False)
    worker = next(node for node in machines.list_all_nodes() if node is not machines.head_node)
    progress: GridProgress = _Killing(lambda: machines.remove_node(worker, allow_graceful=False))
    grid = cells(METHODS, (0, 1), tmp_path / "b")
    there = compare(CONFIG, grid, tmp_path / "b", progress, steps=False, cluster=Cluster("ray"))
    timed = ("seconds", "evaluation_seconds", "images_per_second")
    assert [{k: v for k, v in row.items() if k not in timed} for row in there] == [
        {k: v for k, v in row.items() if k not in timed} for row in here
    ]
    assert all(json.loads((cell.folder / "run.json").read_text())["resolved"]["threads"] == 1 for cell in grid)


ASKED = """
import time
from perdure.experiments.cluster import Cluster, _connected
try:
    with _connected(Cluster(jobs=2)):
        print("ready", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    print("asked")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_sigterm_stops_a_grid_as_control_c_does() -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    with subprocess.Popen([sys.executable, "-c", ASKED], stdout=subprocess.PIPE, text=True) as grid:
        assert grid.stdout is not None
        assert grid.stdout.readline() == "ready\n"
        grid.terminate()
        assert grid.stdout.read() == "asked\n"
    assert grid.returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_sigterm_while_ray_starts_does_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="ray is not installed")

    def starting(**_: Any) -> None:
        signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(number))  # as Ray does
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("ray.init", starting)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), _connected(Cluster(jobs=2)):
        pass
    assert signal.getsignal(signal.SIGTERM) == before


DIED = """
import time
import psutil
from perdure.experiments.cluster import Cluster, run_beside

def call(tell):
    tell("note", {})
    time.sleep(1)

def told(*_):
    for each in psutil.Process().children(recursive=True):
        if each.name() == "raylet":
            each.kill()

try:
    run_beside(Cluster(jobs=2), [(call, {})] * 6, told)
except ValueError as error:
    print(error)
"""


@pytest.mark.slow  # Ray takes half a minute to tidy up
def test_a_grid_whose_ray_was_killed_says_so_in_one_line() -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    ended = subprocess.run([sys.executable, "-c", DIED], check=False, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "Ray has ended before the grid (LocalRayletDiedError): what was saved is whole, and" in ended.stdout


def _kill(folders: list[Path], kills: list[float], ended: threading.Event) -> None:
    """Kill a worker at random, ten times, each after some cell has saved another step or task."""
    draw = random.Random(3)

    def saved() -> set[Path]:
        each = ("task-*/manifest.json", "task-*/step-*/manifest.json")
        return {path for folder in folders for pattern in each for path in folder.glob(pattern)}

    while len(kills) < 10 and not ended.is_set():
        before = saved()
        while saved() <= before and not ended.wait(0.01):
            pass
        ended.wait(draw.uniform(0, 0.5))
        with contextlib.suppress(psutil.NoSuchProcess):
            here = psutil.Process().children(recursive=True)
            if workers := [each for each in here if "_call" in " ".join(each.cmdline()[:1])]:
                draw.choice(workers).kill()
                kills.append(time.monotonic())


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.filterwarnings("ignore")  # of Ray's own
def test_ten_kills_of_workers_lose_nothing(content_of: Any, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    config = dataclasses.replace(CONFIG, save_every=2, epochs=10)
    grids = {name: cells(METHODS, (0,), tmp_path / name) for name in ("here", "there")}
    here = compare(config, grids["here"], tmp_path / "here", steps=False)
    kills: list[float] = []
    ended = threading.Event()
    killer = threading.Thread(target=_kill, args=([cell.folder for cell in grids["there"]], kills, ended))
    killer.start()
    try:
        there = compare(config, grids["there"], tmp_path / "there", steps=False, cluster=Cluster(jobs=2))
    finally:
        ended.set()
        killer.join()
    assert len(kills) == 10
    for mine, theirs in zip(grids["there"], grids["here"], strict=True):
        assert content_of(mine.folder) == content_of(theirs.folder)
    assert [row["method"] for row in there] == [row["method"] for row in here]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--on", "rai"], "did you mean 'ray'"),
        (["--on", "ray", "--jobs", "2"], "--jobs 2 has no effect"),
        (["--jobs", "0"], "jobs"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused_in_one_line(perdure: Any, flags: list[str], said: str) -> None:
    grid = ["--stream", CONFIG.stream, "--backbone", "tiny()", "--methods", "lora", "--out", "g"]
    refused = perdure("compare", *grid, *flags)
    assert refused.code != 0
    assert said in refused.err
    assert len(refused.err.strip().splitlines()) == 1
