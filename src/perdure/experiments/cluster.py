"""Cells of a grid beside each other, on this machine or on many, by Ray: each cell is a task with resources.

Ray places cells where there is room, and starts them again elsewhere when a worker or a machine dies; a run's folder
says where a cell stood, so it goes on from there. All machines must see the grid's folder, the data and the models
under the same paths, as on a network file system.
"""

import contextlib
import importlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from perdure.formatting import meant

_POLL = 0.2  # seconds between two looks at what cells told
_RETRIES = 20  # deaths of workers and machines that a cell survives
_WHOLE = "what was saved is whole, and the same command goes on from here"
_HANGS = 60  # seconds within which a cluster must answer


@dataclass(frozen=True)
class Cluster:
    """Where cells run, and what each takes.

    Args:
        address: "" for this machine; "ray" for the cluster that it belongs to; or a cluster's address, as
            "ray://head:10001".
        jobs: cells at a time on this machine.
        cpus: for each cell, which computes with as many threads.
        gpus: for each cell; a half lets two share one.
    """

    address: str = ""
    jobs: int = 1
    cpus: int = 1
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.address and self.jobs > 1:
            raise ValueError(
                f"--jobs {self.jobs} has no effect with --on {self.address!r}, where as many cells run as there is "
                "room for: leave it out"
            )
        if not self.beside and (self.cpus > 1 or self.gpus):
            named = f"--cpus-per-cell {self.cpus}" if self.cpus > 1 else f"--gpus-per-cell {self.gpus:g}"
            raise ValueError(f"{named} has no effect without --jobs or --on, where cells run in turn: leave it out")
        if self.address and self.address != "ray" and ":" not in self.address:
            raise ValueError(
                f"--on {self.address!r}{meant(self.address, ['ray'])}: expected 'ray' for the cluster that this "
                "machine belongs to, or an address such as ray://head:10001"
            )

    @property
    def beside(self) -> bool:
        """Whether cells run beside each other at all."""
        return bool(self.address) or self.jobs > 1


Told = Callable[[int, str, dict[str, Any]], None]
"""`told(cell, event, facts)`: a cell began a task, was scored, or has something to say."""


def run_beside(cluster: Cluster, calls: Sequence[tuple[Callable[..., None], dict[str, Any]]], told: Told) -> None:
    """Call all of `calls` beside each other until they have returned.

    Args:
        cluster: where.
        calls: a function of this package that takes `tell` besides, and its arguments; what it returns is dropped.
        told: hears what the calls say with `tell(event, facts)`.

    Raises:
        ValueError: when the cluster cannot be reached, has no room for a single call, or ends; or a call raised one.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the calls have saved what they did.
    """
    with _connected(cluster) as ray:
        needs = {"num_cpus": cluster.cpus, "num_gpus": cluster.gpus}
        _check_room(ray, needs)
        board = _board(ray)
        task = ray.remote(**needs, max_retries=_RETRIES)(_call)
        waiting = {task.remote(call, given, number, board): number for number, (call, given) in enumerate(calls)}
        heard = 0
        try:
            while waiting:
                done, _ = ray.wait(list(waiting), num_returns=1, timeout=_POLL)
                for each in done:
                    del waiting[each]
                    _result(ray, each)
                with contextlib.suppress(ray.exceptions.RayActorError):  # its machine died: cells go on untold
                    for number, event, facts in ray.get(board.since.remote(heard)):
                        heard += 1
                        told(number, event, facts)
        except (ray.exceptions.LocalRayletDiedError, ray.exceptions.RaySystemError) as error:  # nobody is left to ask
            raise ValueError(f"Ray has ended before the grid ({type(error).__name__}): {_WHOLE}") from error
        except BaseException as error:
            for each in waiting:
                ray.cancel(each, force=False)  # as Ctrl-C: they finish the step, save and end
            ray.wait(list(waiting), num_returns=len(waiting), timeout=_HANGS)
            if isinstance(error, ray.exceptions.RayError):  # for want of memory, a place on disk, ...
                raise ValueError(f"Ray has given up a cell ({type(error).__name__}): {_WHOLE}") from error
            raise


class _Board:
    """What cells told, kept by one small worker."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, str, dict[str, Any]]] = []

    def tell(self, number: int, event: str, facts: dict[str, Any]) -> None:
        self.lines.append((number, event, facts))

    def since(self, heard: int) -> list[tuple[int, str, dict[str, Any]]]:
        return self.lines[heard:]


def _board(ray: Any) -> Any:
    """The board, on this machine where that is possible: it should live as long as the grid."""
    placing = importlib.import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
    here = placing(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(_Board).remote()


def _call(call: Callable[..., None], given: dict[str, Any], number: int, board: Any) -> None:
    """Runs in a worker."""
    call(**given, tell=lambda event, facts: board.tell.remote(number, event, facts))


def _result(ray: Any, reference: Any) -> None:
    try:
        ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, ValueError) else RuntimeError(str(cause))) from error
    except ray.exceptions.WorkerCrashedError as error:
        raise ValueError(f"a worker died {_RETRIES} times and was given up: {_WHOLE}") from error


def _check_room(ray: Any, needs: dict[str, float]) -> None:
    there = ray.cluster_resources()
    for flag, name, wanted in (("cpus", "CPU", needs["num_cpus"]), ("gpus", "GPU", needs["num_gpus"])):
        most = max((node["Resources"].get(name, 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
        if wanted > most:
            raise ValueError(
                f"--{flag}-per-cell {wanted:g}: no machine has so many; the largest has {most:g}, all together "
                f"{there.get(name, 0):g}"
            )


@contextlib.contextmanager
def _connected(cluster: Cluster) -> Iterator[Any]:
    """Ray, connected to the cluster, or started for as long as the context lasts."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ValueError("cells run beside each other by Ray, which is missing: pip install 'perdure[ray]'") from error
    mine, handler = not ray.is_initialized(), signal.getsignal(signal.SIGTERM)
    first = threading.current_thread() is threading.main_thread()
    try:
        if mine:
            _begin(ray, cluster)
        if first:  # as Ctrl-C: Ray has set one of its own, that aborts the process and shows its stack
            pressed = signal.getsignal(signal.SIGINT)
            signal.signal(signal.SIGTERM, pressed if callable(pressed) else signal.default_int_handler)
        yield ray
    finally:
        if mine:
            ray.shutdown()
        if first:
            signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)


def _begin(ray: Any, cluster: Cluster) -> None:
    quiet = {"log_to_driver": False, "logging_level": "error", "configure_logging": False}
    address = "auto" if cluster.address == "ray" else cluster.address
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            ray.init(num_cpus=cluster.jobs * cluster.cpus, include_dashboard=False, **quiet)
    except SystemExit as stop:  # by which Ray meets SIGTERM while it starts, for seconds
        raise KeyboardInterrupt from stop
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        if not address:
            raise
        why = str(error).splitlines()[0]
        raise ValueError(
            f"--on {cluster.address!r}: no cluster answers there ({why}); one of 'ray start' may ask for a token: "
            "set RAY_AUTH_MODE=token, and copy its ~/.ray/auth_token here"
        ) from error
