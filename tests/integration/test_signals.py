"""The process around a command: Ctrl-C from the first moment on, and streams that are closed, broken or full."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perdure.training.launch import RUN_ID

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and descriptors of POSIX")
PRESSED = """
import os, signal, sys
class Press:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            for _ in range({times}):
                os.kill(os.getpid(), signal.{name})
sys.meta_path.insert(0, Press())
from perdure.__main__ import main
sys.argv = ["perdure", "run", "--stream", "synthetic()", "--backbone", "tiny()", "--out", "x"]
main()
"""
ASIDE = """
import os, signal, sys
from perdure.__main__ import main
from perdure.cli import main as command_line
from perdure.storage.files import temporary_folder
class Press:
    def find_spec(self, name, path=None, target=None):
        if name == "imported.later":
            os.kill(os.getpid(), signal.{name})
def working():
    with temporary_folder() as folder:
        (folder / "upload.png").write_bytes(b"a picture")
        import imported.later
sys.modules["imported"] = type(sys)("imported")
sys.modules["imported"].__path__ = []
sys.meta_path.insert(0, Press())
command_line.main = working
main()
"""
FORKED = """
import os, signal, sys
from perdure.__main__ import main
from perdure.cli import main as command_line
from perdure.storage.files import temporary_folder
class Press:
    def find_spec(self, name, path=None, target=None):
        if name == "imported.later":
            os.kill(os.getpid(), signal.SIGINT)
def working():
    with temporary_folder() as folder:
        (folder / "upload.png").write_bytes(b"a picture")
        if not os.fork():
            import imported.later
        print(os.waitstatus_to_exitcode(os.wait()[1]), *(each.name for each in folder.iterdir()))
sys.modules["imported"] = type(sys)("imported")
sys.modules["imported"].__path__ = []
sys.meta_path.insert(0, Press())
command_line.main = working
main()
"""
COMPUTING = """
import atexit, sys, threading
import torch
from perdure.__main__ import main
from perdure.cli import main as command_line
def lesson():
    weight = torch.ones(8, 8, requires_grad=True)
    weight.register_hook(lambda gradient: gradient * sum(range(100)))
    while True:
        (weight @ weight).sum().backward()
def stopped():
    for _ in range(4):
        threading.Thread(target=lesson, daemon=True).start()
    threading.Event().wait(0.5)
    threading.Thread(target=lambda: print("written", threading.Event().wait(0.5), flush=True)).start()
    atexit.register(print, "tidied up")
    sys.exit(int(sys.argv[1]))
command_line.main = stopped
main()
"""
BESIDE = """
import os, signal, sys
class Last:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(1000))
class Words(list):
    def __getitem__(self, place):
        Last()
        return super().__getitem__(place)
sys.argv = Words(["perdure", "list", "methods"])
from perdure.__main__ import main
main()
"""
STOPPED = "perdure: stopped at once; what was saved before is whole: the same command goes on, or says what does\n"


def python(*words: str, cwd: Path, **more: Any) -> tuple[int, str, str]:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
    done = subprocess.run([sys.executable, *words], check=False, text=True, cwd=cwd, timeout=120, **streams)
    return done.returncode, done.stdout or "", done.stderr or ""


@pytest.mark.parametrize(
    ("module", "times", "name"),
    [
        ("perdure.cli.main", 2, "SIGINT"),
        ("tyro", 1, "SIGINT"),
        ("rich.console", 2, "SIGTERM"),
        ("torch", 1, "SIGINT"),
        ("torch", 1, "SIGTERM"),
    ],
)
def test_control_c_or_sigterm_while_modules_are_imported_is_one_line(
    module: str, times: int, name: str, tmp_path: Path
) -> None:
    ended = python("-c", PRESSED.format(module=module, times=times, name=name), cwd=tmp_path)
    assert ended == (130, "", STOPPED)
    assert not any(tmp_path.iterdir())


def test_of_several_processes_that_leave_at_once_only_who_started_them_says_so(tmp_path: Path) -> None:
    script = PRESSED.format(module="torch", times=1, name="SIGINT")
    for rank, launcher, said in (("0", "torchrun", STOPPED), ("1", "torchrun", ""), ("0", RUN_ID, "")):
        told = os.environ | {"RANK": rank, "TORCHELASTIC_RUN_ID": launcher}
        assert python("-c", script, cwd=tmp_path, env=told) == (130, "", said)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_what_lies_aside_goes_where_a_module_is_imported_with_it_open(name: str, tmp_path: Path) -> None:
    aside = os.environ | {"TMPDIR": str(tmp_path)}
    assert python("-c", ASIDE.format(name=name), cwd=tmp_path, env=aside) == (130, "", STOPPED)
    assert not any(tmp_path.iterdir())


def test_a_fork_that_leaves_at_once_says_nothing_and_takes_nothing_of_who_started_it(tmp_path: Path) -> None:
    aside = os.environ | {"TMPDIR": str(tmp_path)}
    assert python("-c", FORKED, cwd=tmp_path, env=aside) == (0, "130 upload.png\n", "")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("code", [0, 2, 130])
def test_a_command_that_ends_beside_threads_that_compute_is_not_aborted(code: int, tmp_path: Path) -> None:
    assert python("-c", COMPUTING, str(code), cwd=tmp_path) == (code, "written False\ntidied up\n", "")


def test_control_c_where_python_cannot_raise_stops_too(tmp_path: Path) -> None:
    assert python("-c", BESIDE, cwd=tmp_path) == (130, "", STOPPED)


def closed(*numbers: int) -> Callable[[], None]:
    return lambda: [os.close(number) for number in numbers] and None


@pytest.mark.parametrize("words", [("list", "methods"), ("--help",), ("--version",), ("rnu",)])
@pytest.mark.parametrize("numbers", [(1,), (2,), (0, 1, 2)])
def test_closed_streams_change_nothing_but_what_is_read(
    words: tuple[str, ...], numbers: tuple[int, ...], tmp_path: Path
) -> None:
    code, _, err = python("-m", "perdure", *words, cwd=tmp_path, preexec_fn=closed(*numbers))
    assert code == (2 if words == ("rnu",) else 0)
    assert err.count("\n") == (words == ("rnu",) and 2 not in numbers)


@pytest.mark.parametrize("words", [("list", "methods"), ("--help",), ("--version",)])
def test_who_reads_no_more_is_not_told(words: tuple[str, ...], tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    assert python("-m", "perdure", *words, cwd=tmp_path, stdout=theirs) == (1, "", "")
    assert python("-m", "perdure", "rnu", cwd=tmp_path, stderr=theirs) == (2, "", "")
    os.close(theirs)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", [("list", "methods"), ("--help",)])
def test_output_that_cannot_be_written_is_one_line(words: tuple[str, ...], tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        code, _, err = python("-m", "perdure", *words, cwd=tmp_path, stdout=full)
    assert code == 2
    assert err.startswith("perdure: No space left on device")
    assert err.count("\n") == 1


def test_a_name_that_the_terminal_has_no_letters_for_is_shown_in_others(tmp_path: Path) -> None:
    plain = os.environ | {"PYTHONIOENCODING": "ascii"}
    code, out, err = python("-m", "perdure", "list", "methods", "猫", cwd=tmp_path, env=plain)
    assert (code, out) == (2, "")
    assert err.startswith(r"perdure: '\u732b' is not among the methods")
    code, out, _ = python("-m", "perdure", "list", "methods", "ewc", cwd=tmp_path, env=plain)
    assert code == 0
    assert out.isascii()
