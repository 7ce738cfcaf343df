"""Uploads that are not taught yet: held by the app that has them, with a note by which the next one finds them.

An app that is killed, or stopped, forgets its queue. What it held is free from then on, so the app that is started next
takes it over; what another one holds stays that one's.
"""

import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import filelock

from perdure.storage.files import write_sealed
from perdure.storage.schema import read_typed

NAMED = 6
"""Bytes of what an upload's folder is called."""
UPLOAD = re.compile(f"[0-9a-f]{{{2 * NAMED}}}")
_NOTE = "lesson.json"


class _Facts(TypedDict):
    """lesson.json beside pictures that are to be taught."""

    id: str
    title: str
    place: str
    skip_bad: bool
    learner: str
    since: float
    seal: str


@dataclass(frozen=True)
class WaitingLesson:
    """A lesson that waits, or is learnt.

    Args:
        id: by which it is asked for.
        title: of it.
        where: its folder or file lies.
        skip_bad: whether unreadable pictures are left out.
        learner: the folder of whom is taught.
        since: when it came, in seconds since 1970.
    """

    id: str
    title: str
    where: Path
    skip_bad: bool
    learner: Path
    since: float


class Held:
    """The uploads that this process holds."""

    def __init__(self) -> None:
        self._locks: dict[Path, filelock.BaseFileLock] = {}

    def begin(self, upload: Path) -> None:
        """Hold a new upload, of which nothing is known as long as its pictures are written."""
        self._take(upload)
        (upload / _NOTE).touch()

    def note(self, upload: Path, lesson: WaitingLesson) -> None:
        """Write down what is to be done with an upload that is whole."""
        facts = {
            "id": lesson.id,
            "title": lesson.title,
            "place": str(lesson.where.resolve().relative_to(upload)),
            "skip_bad": lesson.skip_bad,
            "learner": os.path.relpath(lesson.learner.resolve(), upload),  # both may be moved together
            "since": lesson.since,
        }
        write_sealed(upload / _NOTE, facts)

    def leave(self, upload: Path) -> None:
        """Nothing more is done with an upload, whose pictures stay."""
        with suppress(OSError):  # where nothing can be written
            (upload / _NOTE).unlink()
        self._free(upload)

    def remove(self, upload: Path) -> None:
        """Remove an upload; where a kill comes between, its empty note stays to the last, and tells the next app."""
        with suppress(OSError):  # it is gone, or nothing can be written
            (upload / _NOTE).write_bytes(b"")
            for each in filter(Path.is_dir, upload.iterdir()):
                shutil.rmtree(each, ignore_errors=True)
        shutil.rmtree(upload, ignore_errors=True)
        self._free(upload)

    def left(self, root: Path, learner: Path) -> tuple[list[WaitingLesson], list[Path]]:
        """What nobody holds any more of the uploads in `root`, and is held from now on.

        Returns:
            The lessons for `learner` in the order in which they came, and the uploads of which not all was written.
        """
        lessons, parts = [], []
        for upload in sorted(path.parent.resolve() for path in root.glob(f"*/{_NOTE}")):
            if not (UPLOAD.fullmatch(upload.name) and _mine(upload, learner) and self._take(upload)):
                continue
            found = _mine(upload, learner)  # who held it may have done with it meanwhile
            if isinstance(found, WaitingLesson):
                lessons.append(found)
            elif found:
                parts.append(upload)
            else:
                self._free(upload)
                with suppress(OSError):  # the lock made its folder anew
                    (upload / ".lock").unlink()
                    upload.rmdir()
        return sorted(lessons, key=lambda each: (each.since, each.id)), parts

    def _take(self, upload: Path) -> bool:
        """Whether nobody else holds it."""
        lock = filelock.FileLock(upload / ".lock", thread_local=False)  # the thread that teaches lets go of it
        try:
            lock.acquire(timeout=0)
        except (filelock.Timeout, OSError):  # or nothing can be written there, and so nothing is taught
            return False
        self._locks[upload] = lock
        return True

    def _free(self, upload: Path) -> None:
        if lock := self._locks.pop(upload, None):
            lock.release()


def _mine(upload: Path, learner: Path) -> WaitingLesson | bool:
    """What is noted for `learner`; True where not all was written; False where nothing, or for another one.

    A note that is no more what was written says of nobody that he is to be taught.
    """
    try:
        if not (upload / _NOTE).stat().st_size:
            return True
        found = read_typed(upload / _NOTE, _Facts, "remove its folder", must_be_sealed=True)
        where, whom = (upload / found["place"]).resolve(), (upload / found["learner"]).resolve()
    except (OSError, ValueError):  # it is gone, damaged, or names no path
        return False
    if upload not in where.parents or whom != learner.resolve():
        return False
    return WaitingLesson(found["id"], found["title"], where, found["skip_bad"], whom, found["since"])
