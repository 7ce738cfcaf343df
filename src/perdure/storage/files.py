"""Files that are whole or not there, whenever the power fails; and folders that one process works in."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import filelock
from safetensors import SafetensorError, safe_open

from perdure.storage.schema import Damaged, sealed

_TEMPORARY: dict[str, int] = {}
"""Folders that are to go, and the process that has made each: a fork inherits them, and they are not its own."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; it is made, and goes again when nothing was written to it.

    Raises:
        ValueError: when another process holds it, or it is a file.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{folder} is a file, or lies in one: give a folder") from error
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise ValueError(f"another process is working in {folder}: wait for it, or give another folder") from error
    try:
        yield
    finally:
        with suppress(OSError):  # it is gone; or Windows, which removes no open file
            if made and [each.name for each in folder.iterdir()] == [".lock"]:
                (folder / ".lock").unlink()
                folder.rmdir()
        lock.release()


@contextmanager
def temporary_folder(prefix: str = "perdure-", within: Path | None = None) -> Iterator[Path]:
    """A folder that goes when it is left, and with a process that leaves at once; in the system's unless `within`."""
    made = TemporaryDirectory(prefix=prefix, dir=within)
    _TEMPORARY[made.name] = os.getpid()
    try:
        with made:
            yield Path(made.name)
    finally:
        del _TEMPORARY[made.name]


def remove_temporary() -> None:
    """For a process that ends without unwinding: what it has made by `temporary_folder`."""
    for name, owner in list(_TEMPORARY.items()):
        if owner == os.getpid():
            shutil.rmtree(name, ignore_errors=True)


def write_json(path: Path, content: object) -> None:
    """Write a JSON file so that it is either whole or not there."""
    place(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """The same with a seal: see `perdure.storage.schema`."""
    write_json(path, sealed(content))


def write_text(path: Path, text: str) -> None:
    """The same for text."""
    place(path, text.encode())


def write_page(path: Path, text: str) -> None:
    """A page of HTML, in place of nothing or of another one.

    Raises:
        ValueError: when something else is there.
    """
    if path.exists() and not (path.is_file() and path.read_bytes()[:4096].lstrip().lower().startswith(b"<!doctype")):
        raise ValueError(f"{path} is there and is no report: give another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def place(path: Path, content: bytes, draft: Path | None = None) -> None:
    """Write a file beside its name, as `draft` or a hidden one, force it to disk, and rename it."""
    draft = draft or path.with_name(f".{path.name}.draft")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say where
        with suppress(OSError):
            draft.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to disk."""
    if os.name != "posix":  # Windows cannot open a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def in_use(folder: Path) -> bool:
    """Whether somebody is working in `folder` now, which makes no file there."""
    path = folder / ".lock"
    if not path.exists():
        return False
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    except OSError:  # not even the lock can be written, so nobody learns there
        return False
    lock.release()
    return False


def tensor_shapes(path: Path, remedy: str) -> dict[str, list[int]]:
    """Name -> shape of the tensors in a safetensors file, by its header alone; empty when there is no file.

    Raises:
        Damaged: when its header cannot be read, or tells of more or fewer bytes than there are.
    """
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="numpy") as file:  # which waits for no torch
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{path} is damaged: {error}; {remedy}") from error
