"""Several processes of one command on this machine, by torch's own launcher; torchrun and accelerate do the same."""

import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from perdure.formatting import command
from perdure.storage.files import temporary_folder

RUN_ID = "perdure"
"""Under which torch's launcher tells its processes who has started them."""
_SAID = "said"
_PASSED_ON = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")


class Ended(Exception):
    """The processes have ended: which one was the first, where it has not said so itself, and the exit code of all."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text, code)


def launch(processes: int, arguments: Sequence[str], folder: object) -> None:
    """Run `perdure` with `arguments` in so many processes that learn together, and wait for them.

    A signal to this process is passed on: they finish the step, save, and end. When one of them ends otherwise, so do
    all.

    Args:
        processes: how many.
        arguments: of the command line.
        folder: of the run, for messages.

    Raises:
        Ended: with their exit code, where that is not 0.
        KeyboardInterrupt: where they were stopped and none of them has said so, as before it learns.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):  # each has a level of its own
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # the one line is ours
    threads = max(1, (os.cpu_count() or 1) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # each would take all of them
    with temporary_folder() as aside:  # what they put there goes, also of one that is killed
        try:
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=processes,
                logs_specs=DefaultLogsSpecs(str(aside)),
                run_id=RUN_ID,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                local_addr="localhost",
                max_restarts=0,
                monitor_interval=0.1,
                metrics_cfg={},
            )
            with _handlers_kept():
                elastic_launch(config, sys.executable)("-m", "perdure.cli", *arguments)
        except SignalException as stop:
            raise _stopped(aside) from stop
        except ChildFailedError as error:
            raise _ended(error.failures, processes, folder, aside) from error
        finally:
            _end_lost()


def launched_by_us() -> bool:
    """Whether this process is one of those that `launch` has started, which says itself why they ended."""
    return os.environ.get("TORCHELASTIC_RUN_ID") == RUN_ID


def says_itself() -> None:
    """Note for the launcher and the others, in the first of its processes, that this one says why it ends."""
    if (note := _note()) and os.environ["RANK"] == "0":
        with suppress(OSError):  # the launcher is no more
            note.touch()


def first_has_said() -> bool:
    """Whether the first of the launcher's processes, of which this is one, has said why it ends."""
    note = _note()
    return note is not None and note.exists()


def _note() -> Path | None:
    return Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parents[1] / _SAID if launched_by_us() else None


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Torch's handlers go with its launcher: they raise what nobody else expects."""
    before = {name: signal.getsignal(getattr(signal, name)) for name in _PASSED_ON if hasattr(signal, name)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler or signal.SIG_DFL)


def _end_lost() -> None:
    """End what torch had just started and not noted yet when a signal came: nobody else would."""
    for each in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended by itself
            each.kill()


def _stopped(aside: Path) -> BaseException:
    return Ended("", 130) if list(aside.rglob(_SAID)) else KeyboardInterrupt()


def _ended(failures: Mapping[int, Any], processes: int, folder: object, aside: Path) -> BaseException:
    """Of the processes that ended before their time, who was the first and whether it has said why."""

    def order(rank: int) -> tuple[bool, bool, float]:
        code = failures[rank].exitcode
        return code == -signal.SIGTERM, code >= 0, failures[rank].timestamp  # that is how the launcher ends the others

    rank = min(failures, key=order)
    code = int(failures[rank].exitcode)
    if code == 130:
        return _stopped(aside)
    if code == 2:  # it has said why
        return Ended("", code)
    by = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return Ended(
        f"process {rank} of {processes} {by}, and so all have ended; what was saved before is whole: go on with "
        f"{command('resume', folder, '--processes', processes)}",
        1,
    )
