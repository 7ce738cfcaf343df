"""Uploads that are not taught yet: held by the app that has them, with a note by which the next one finds them.

An app that is killed, or stopped, forgets its queue. What it held is free from then on, so the app that is started next
takes it over; what another one holds stays that one's.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import filelock

from perdure.storage.files import write_sealed
from perdure.storage.schema import Damaged, read_typed

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
class Noted:
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

    def note(self, upload: Path, lesson: Noted) -> None:
        """Write down what is to be done with an upload that is whole."""
        facts = {
            "id": lesson.id,
            "title": lesson.title,
            "place": str(lesson.where.resolve().relative_to(upload)),
            "skip_bad": lesson.skip_bad,
            "learner": str(lesson.learner.resolve()),
            "since": lesson.since,
        }
        write_sealed(upload / _NOTE, facts)

    def leave(self, upload: Path) -> None:
        """Nothing more is done with an upload."""
        with suppress(OSError):  # where nothing can be written
            (upload / _NOTE).unlink()
        self._free(upload)

    def left(self, root: Path, learner: Path) -> tuple[list[Noted], list[Path]]:
        """What nobody holds any more of the uploads in `root`, and is held from now on.

        Returns:
            The lessons for `learner` in the order in which they came, and the uploads of which not all was written.
        """
        lessons, parts = [], []
        for path in sorted(root.glob(f"*/{_NOTE}")):
            upload = path.parent.resolve()
            if not self._take(upload):
                continue
            if not path.stat().st_size:
                parts.append(upload)
            elif (found := _read(path)) and found.learner == learner.resolve():
                lessons.append(found)
            else:
                self._free(upload)
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


def _read(path: Path) -> Noted | None:
    """A note; None for one that is no more what was written, which says of nobody that he is to be taught."""
    try:
        found = read_typed(path, _Facts, "remove its folder", must_be_sealed=True)
    except Damaged:
        return None
    where = (path.parent / found["place"]).resolve()
    if path.parent.resolve() not in where.parents:
        return None
    return Noted(
        found["id"], found["title"], where, found["skip_bad"], Path(found["learner"]).resolve(), found["since"]
    )
