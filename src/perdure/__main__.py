"""The process around the command line: its streams, its signals, and how it ends.

Nothing is imported here that takes time, so that Ctrl-C is met from the first moment on: one line and exit code 130
while modules are still being imported too, when Python by itself would print where each of them stood. SIGTERM is met
alike: by itself it would end the process before that has tidied up.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
from types import FrameType

_OURS = os.getpid()
_LAUNCHED = "perdure"  # `perdure.training.launch.RUN_ID`, for which nothing is to be imported here
_IMPORTING = "<frozen importlib._bootstrap>"
# a launcher ends by SIGTERM the processes that it has started, and knows them by that
_ASKING = (signal.SIGINT,) if "RANK" in os.environ else (signal.SIGINT, signal.SIGTERM)
_STOPPED = "perdure: stopped at once; what was saved before is whole: the same command goes on, or says what does\n"


def main() -> None:
    """Entry point of the script `perdure`."""
    _open_streams()
    unwound: list[int] = []
    atexit.register(_end, unwound)  # registered first, it is called last
    for number in _ASKING:
        signal.signal(number, _interrupt)
    sys.unraisablehook = _unraisable
    code: object = 0
    try:
        from perdure.cli.main import main as command_line

        command_line()
    except SystemExit as stop:
        code = stop.code
    except BrokenPipeError:
        code = 1
    except KeyboardInterrupt:
        _leave()
    ended = code if isinstance(code, int) else int(code is not None)
    for number in _ASKING:
        signal.signal(number, lambda *_: os._exit(ended))  # all is done: Python only tidies up
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            # What is left leads nowhere, or Python would complain once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            broken = isinstance(error, BrokenPipeError)  # who reads has had enough, and need not be told
            _tell("" if broken else f"perdure: {error.strerror}: the output could not be written\n")
            code = code or (1 if broken else 2)
    if any(each.daemon for each in threading.enumerate()):
        # such as a lesson of the app: where one computes, Python would end it in the middle of C++, which aborts; or
        # of processes that have learnt together, in which torch's own threads do at times
        unwound.append(code if isinstance(code, int) else ended)
    sys.exit(code)  # type: ignore[arg-type]


def _end(codes: list[int]) -> None:
    """Leave by the first of `codes`, if there is one, before Python ends its threads."""
    for code in codes:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # it is full, or closed
                stream.flush()
        os._exit(code)


def _interrupt(_number: int, frame: FrameType | None) -> None:
    """Raise where work is under way; leave where modules are imported, which can swallow what is raised."""
    for number in _ASKING:
        signal.signal(number, lambda *_: _leave(""))  # the impatient need no second line
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:
            _leave()
        frame = frame.f_back
    raise KeyboardInterrupt


def _unraisable(told: "sys.UnraisableHookArgs") -> None:
    """Where Python cannot raise (a finaliser, a callback) it would say so and go on as if nothing had been pressed."""
    if isinstance(told.exc_value, KeyboardInterrupt):
        _leave()
    sys.__unraisablehook__(told)


def _leave(saying: str = _STOPPED) -> None:
    # of several processes one speaks: the one that has started them, by a fork or by `perdure.training.launch`
    started = os.getpid() != _OURS or os.environ.get("TORCHELASTIC_RUN_ID") == _LAUNCHED
    _tell("" if started or os.environ.get("RANK", "0") != "0" else saying)
    if "perdure.storage.files" in sys.modules:  # else nothing was made yet
        getattr(sys.modules["perdure.storage.files"], "remove_temporary", lambda: None)()
    os._exit(130)


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def _open_streams() -> None:
    """What was closed (`>&-`) leads nowhere instead: else the next file to be opened would get its number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names in any script, anywhere


if __name__ == "__main__":
    main()
