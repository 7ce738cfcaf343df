"""The command line: what was typed becomes a command, and what goes wrong becomes one line and an exit code."""

import errno
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from perdure.cli.advise import Advise
from perdure.cli.console import Command, Screen
from perdure.cli.suggestions import command_of, completion
from perdure.options.own_methods import OWN_METHODS
from perdure.version import __version__

_RANK = os.environ.get("RANK", "0")  # of several processes that learn together
_FIRST = 3  # seconds until one of the others speaks
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(args: Sequence[str] | None = None) -> None:
    """What `args` ask for. Exit code 0 when done, 2 for a request that cannot be met, 130 when interrupted."""
    arguments = list(sys.argv[1:] if args is None else args)
    if arguments in (["--version"], ["-V"]):
        print(f"perdure {__version__}")
        return
    screen = Screen("--json" in arguments, "--quiet" in arguments, "--verbose" in arguments, hushed=_RANK != "0")
    try:
        commands: dict[str, Callable[..., Any]] = {"advise": Advise}
        if arguments[:1] != ["advise"]:
            # Not before: the other commands, recipes and all, take longer to import than advice to be given.
            commands = import_module("perdure.cli.commands").COMMANDS
            arguments = import_module("perdure.cli.config_file").expanded(arguments, commands)
            arguments = import_module("perdure.experiments.recipes").expand(arguments)
        if arguments[:1] == ["--completion"]:
            print(completion(arguments[1:], commands))
            return
        command: Command = command_of(arguments, commands)
        if screen.quiet and screen.verbose:
            raise ValueError("--quiet and --verbose contradict each other: leave one out")
        if command.import_ is not None:  # which processes that are started from here inherit
            if not command.import_.is_file():  # also where nothing that was learnt is read, and the file has no say
                raise ValueError(f"--import {command.import_}: expected a Python file, such as my_method.py")
            os.environ[OWN_METHODS] = str(command.import_.absolute())
        command(screen)
    except KeyboardInterrupt:
        if not ("RANK" in os.environ and _launch().launched_by_us()):  # whoever started us says it
            screen.error("stopped at once; what was saved before is whole: the same command goes on, or says what does")
        sys.exit(130)
    except BrokenPipeError:  # who reads our output has had enough
        raise
    except ValueError as error:
        if screen.verbose:
            traceback.print_exc()
        _tell(screen, str(error))
        sys.exit(2)
    except OSError as error:
        _tell(screen, _said(error))
        sys.exit(2)
    except _raised("perdure.training.launch", "Ended") as ended:
        text, code = ended.args
        if text:
            screen.error(text)
        sys.exit(code)
    except _raised("perdure.core.processes", "Lost") as lost:
        if not ("RANK" in os.environ and _launch().launched_by_us()):  # whoever started us says which one it was
            screen.error(f"{lost}, and so does this one; what was saved before is whole: go on with 'perdure resume'")
        sys.exit(1)
    except _raised("perdure.training.snapshots", "Interrupted") as stop:
        _launch().says_itself()
        screen.error(str(stop))
        sys.exit(130)
    except RuntimeError as error:
        if not import_module("accelerate.utils.memory").should_reduce_batch_size(error):
            raise
        screen.error("out of memory: give a smaller --batch-size; all tasks learnt before are whole")
        sys.exit(2)
    finally:
        screen.close()


def _tell(screen: Screen, text: str) -> None:
    """Say what was wrong; where several processes are wrong alike the first does, whose end is that of the others."""
    if "RANK" in os.environ:
        _launch().says_itself()
    if _RANK != "0":
        time.sleep(_FIRST)
        if _launch().first_has_said():
            return  # though it may not have ended yet
        screen, text = Screen(screen.json), f"process {_RANK}: {text}"
    screen.error(text)


def _launch() -> Any:
    """Who starts several processes; imported late, for most commands need it never."""
    return import_module("perdure.training.launch")


def _raised(module: str, name: str) -> tuple[type[BaseException], ...]:
    """An exception of a module that takes long to import; none where nobody has imported it, for nobody raised it."""
    return (getattr(sys.modules[module], name),) if module in sys.modules else ()


def _said(error: OSError) -> str:
    where = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
    if error.errno in _FULL:
        full = f"{error.strerror}{f': {where}' if where else ''}"
        again = "go on with 'perdure resume', or give the same command again; what was learnt before is whole"
        return f"{full}: free some space, then {again}"
    return f"{error.strerror or error}{f': {where}: check the path and its permissions' if where else ''}"


if __name__ == "__main__":
    import_module("perdure.__main__").main()
