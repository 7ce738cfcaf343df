"""A folder's files replaced by others all at once: whoever is killed leaves the old ones or the new ones.

New files are written to a draft within the folder. Once all of it is on disk a list of them is placed there, which says
that they count; whoever opens the folder next, and finds the list, finishes what is left to do.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from perdure.storage.files import locked, sync_folder, write_json

DRAFT, _BESIDE, _LIST = ".new", ".draft", "files.json"


@contextmanager
def drafted(folder: Path) -> Iterator[Path]:
    """An empty draft in `folder`, which is locked; at the end its files count, and where something fails, none of them.

    What a killed process has left of a draft is removed, as are those files of sub-folders of the same names in
    `folder` that the draft has not.
    """
    drop_draft(folder)
    draft = folder / DRAFT
    draft.mkdir()
    try:
        yield draft
        for place in (*draft.rglob("*"), draft):
            if place.is_dir():
                sync_folder(place)
        files = [str(path.relative_to(draft)) for path in draft.rglob("*") if path.is_file()]
        write_json(draft / _LIST, sorted(files))
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    settle(folder)


def settle(folder: Path) -> None:
    """Finish a replacement that was begun, whoever began it; nothing where there is none."""
    draft = folder / DRAFT
    try:
        files = json.loads((draft / _LIST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        # another process may be doing the same
        with suppress(FileNotFoundError):
            (draft / name).replace(folder / name)
    for inner in {(folder / name).parent for name in files} - {folder}:
        for path in inner.iterdir():
            if path.is_file() and str(path.relative_to(folder)) not in files:
                path.unlink(missing_ok=True)
        sync_folder(inner)
    sync_folder(folder)
    with suppress(FileNotFoundError):
        for left in [each for each in draft.iterdir() if each.is_dir()]:
            shutil.rmtree(left, ignore_errors=True)
    (draft / _LIST).unlink(missing_ok=True)  # last: as long as it is there, whoever is next goes on
    shutil.rmtree(draft, ignore_errors=True)


def drop_draft(folder: Path) -> None:
    """Remove the draft that a killed process has left in `folder`, which is locked; one that counts is finished."""
    settle(folder)
    shutil.rmtree(folder / DRAFT, ignore_errors=True)


@contextmanager
def draft_beside(target: Path) -> Iterator[Path]:
    """An empty folder on the disk of `target`, within one that this process holds and that is removed in the end."""
    held = target.with_name(f".{target.name}{_BESIDE}")
    with locked(held):
        try:
            draft = held / target.name
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            yield draft
        finally:
            shutil.rmtree(held, ignore_errors=True)


def drop_drafts(folder: Path) -> None:
    """Remove what killed processes left beside their targets in `folder`: nobody holds it any more."""
    for lock in folder.glob(f".*{_BESIDE}/.lock"):
        with suppress(ValueError), locked(lock.parent):  # refused while its export goes on
            shutil.rmtree(lock.parent, ignore_errors=True)
    for left in folder.glob(f".*{_BESIDE}"):
        with suppress(OSError):  # all but the folder was removed; whoever takes its lock now makes it again
            left.rmdir()
