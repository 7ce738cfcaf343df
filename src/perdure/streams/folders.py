"""Streams from folders of class folders, with train and test folders or without, with domains or without."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal

from perdure.backbones.preprocess import formats, is_image
from perdure.formatting import command, meant
from perdure.streams.naming import class_name, natural, role_of
from perdure.streams.options import Options, stream
from perdure.streams.sources import Files
from perdure.streams.task_split import LabelledData, LabelledPart, arrange

_OURS = ("__MACOSX", "__pycache__", "@eaDir", "lost+found")
"""Folders that systems make: of a Mac's zip files, of Python, of Synology's thumbnails, of a disk check."""
_LEARNT = ("run.json", ".lock")
"""What a folder holds that results are written into, also before the first ones are."""
_SHOWN = 5

Asker = Literal["stream", "learn"]
"""Who is told what to write instead: who describes a stream, or who teaches a folder."""


@stream(arrange)
def images(options: Options, path: str) -> Callable[[bool], LabelledData]:
    """Folders of images: `path/<class>/*`, or `path/train/<class>/*` and `path/test/<class>/*` (or `val`).

    Classes are the folders' names; train and test folders may be called as people call them (`Training`, `test_set`,
    `valid`, ...). With `domain=0` the folders are `<domain>/<class>/*`, with `domain=1` `<class>/<domain>/*`. Without a
    test folder, 20 % of each class are held out; which ones depends on the files' paths within `path` only, never on
    the seed, so all runs are tested on the same images. Hidden files and files that no reader of images knows by their
    ending are left aside; the latter are counted in the stream's notes.

    Args:
        options: the common ones.
        path: the folder.

    Raises:
        ValueError: when the folder is missing, empty or otherwise arranged.
    """
    return lambda measured: read_folders(Path(path), _level(options.domain), measured)


def read_folders(
    path: Path, domain: int | None = None, measured: bool = False, asking: Asker | None = "stream"
) -> LabelledData:
    """The data set in a folder of class folders.

    Args:
        path: the folder.
        domain: the level of the domain folders (0 or 1).
        measured: whether it is only measured: then a test folder alone is enough.
        asking: None reads whatever arrangement of folders there is.
    """
    train, test, left_out = _parts(path, measured)
    roots = [train] if test is None else [train, test]
    read = [_labelled(root, domain, asking, left_out) for root in roots]
    names = natural({name for rows in read for name, _, _ in rows})
    domains = natural({name for rows in read for _, name, _ in rows}) if domain is not None else []
    number, place = ({name: i for i, name in enumerate(each)} for each in (names, domains))
    made = []
    for root, rows in zip(roots, read, strict=True):
        real = [(name, of, file) for name, of, file in rows if file]
        source = Files(root, [file for _, _, file in real])
        made.append(LabelledPart.of(source, [number[n] for n, _, _ in real], [place.get(d, 0) for _, d, _ in real]))
    notes: dict[str, Any] = {"left_out": dict(left_out)} if left_out else {}
    return LabelledData(path.resolve().name, made[0], made[1] if test else None, tuple(names), tuple(domains), notes)


def _parts(path: Path, measured: bool = False) -> tuple[Path, Path | None, Counter[str]]:
    """The folders of the train and the test images, and what is left out beside them.

    There is no test folder when there is none beside the train images; when the data is only `measured`, a test folder
    may stand alone, and is returned first.
    """
    if not path.is_dir():
        here = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        what = "is a file" if path.is_file() else f"does not exist{meant(path.name, here)}"
        raise ValueError(f"path={str(path)!r} {what}; give a folder of class folders")
    folders = _folders(path)
    # "train", "test" and "val" may as well be classes: then they hold images, not folders.
    roles: dict[str, list[Path]] = {"train": [], "test": [], "val": []}
    for folder in folders:
        if (role := role_of(folder.name)) and _folders(folder):
            roles[role].append(folder)
    for same in roles.values():
        if len(same) > 1:
            names = " and ".join(repr(folder.name) for folder in same)
            raise ValueError(f"path={str(path)!r} holds {names}, which mean the same: keep one, or put all into it")
    train, test = (next(iter(roles["train"]), None), next(iter(roles["test"] or roles["val"]), None))
    if train is None and test is None:
        return path, None, Counter()
    if train is None and test is not None and not measured:
        raise ValueError(f"path={str(path)!r} holds {test.name!r} but no 'train'; add the train images' folder")
    others = [folder for folder in folders if folder not in (train, test)]
    if test is None and others:
        if bare := next((folder.name for folder in others if role_of(folder.name)), None):
            raise ValueError(
                f"path={str(path)!r}: {bare!r} holds no class folders, so nothing says what its images show; sort them "
                f"into some, or give {str(train)!r} alone"
            )
        names = ", ".join(folder.name for folder in others)
        raise ValueError(f"path={str(path)!r} holds 'train' beside {names}; call the test images' folder 'test'")
    left_out = Counter({f"in {each.name!r}": count for each in others if (count := len(pictures(each, Counter())))})
    _loose(path, left_out)
    first = train or test or path
    return first, test if first is train else None, left_out


def _labelled(
    root: Path, domain: int | None, asking: Asker | None, left_out: Counter[str]
) -> list[tuple[str, str, str]]:
    """Class, domain ("" without) and path of every image in class folders, or (class, "", "") of one without any.

    `left_out` counts, by kind, the files that are no images, and the images that are in no class.
    """
    if not (outer := _folders(root)):
        loose = next(root.iterdir(), None)
        what = f"holds {loose.name!r} but no folder" if loose else "is empty"
        raise ValueError(f"{str(root)!r} {what}; expected a folder for each class, with its images in it")
    rows: list[tuple[str, str, str]] = []
    _loose(root, left_out)
    if domain is None and asking is not None:
        _check_arrangement(root, outer, asking)
    for folder in (root, *outer):
        if any((folder / mark).is_file() for mark in _LEARNT):
            raise ValueError(f"{folder} is the folder of a learner or a run: keep it apart from images to learn")
    for folder in outer:
        name = class_name(folder.name, f"{root}: folder")
        if domain is None:
            files = pictures(folder, left_out)
            rows += [(name, "", f"{folder.name}/{file}") for file in files] or [(name, "", "")]
            continue
        _loose(folder, left_out)
        if not (inner := _folders(folder)):
            raise ValueError(f"domain={domain}: {str(folder)!r} holds no folder; expected <domain>/<class>/<images>")
        for each in inner:
            within = class_name(each.name, f"{folder}: folder")
            pair = (within, name) if domain == 0 else (name, within)
            files = pictures(each, left_out)
            rows += [(*pair, f"{folder.name}/{each.name}/{file}") for file in files]
    if not any(file for _, _, file in rows):
        others = f"; {told_left_out(left_out)}" if left_out else ""
        known = "jpg, png, webp, ..."
        raise ValueError(
            f"{str(root)!r} has class folders ({outer[0].name}, ...) but no image in them ({known}){others}"
        )
    return rows


def pictures(folder: Path, left_out: Counter[str]) -> list[str]:
    """Paths within `folder` of all images in it and below, sorted; whatever else is there is counted by kind.

    Links are followed. Hidden files and folders are neither read nor counted.

    Raises:
        ValueError: for a link to a folder that holds it.
    """
    above = _above(folder.absolute().parent)
    if folder.is_symlink() and _identity(folder) in above:
        raise ValueError(f"{folder} is a link to a folder that holds it: remove the link")
    files = []
    for file in _files(str(folder), "", (*above, _identity(folder))):
        if file.endswith("/"):
            left_out["dead links"] += 1
        elif is_image(file):
            files.append(file)
        else:
            left_out[_kind(file)] += 1
    return sorted(files)


def told_left_out(left_out: dict[str, int]) -> str:
    """What was left out, in one line."""
    kinds = sorted(left_out.items(), key=lambda each: (-each[1], each[0]))
    shown = [f"{count} {kind}" for kind, count in kinds[:_SHOWN]] + (["..."] if len(kinds) > _SHOWN else [])
    total = sum(left_out.values())
    photographs = "HEIF" not in formats() and any(kind.lower() in (".heic", ".heif") for kind in left_out)
    remedy = " (.heic is read once you pip install 'perdure[heif]')" if photographs else ""
    return f"{total} {'file was' if total == 1 else 'files were'} left out: {', '.join(shown)}{remedy}"


def _kind(file: str) -> str:
    ending = PurePath(file).suffix
    return ending.encode("utf-8", "replace").decode() if 1 < len(ending) <= 16 else "without ending"


def _loose(folder: Path, left_out: Counter[str]) -> None:
    """Count the files that lie beside folders, in no class."""
    for entry in _entries(folder):
        if entry.is_file():
            left_out["images outside of class folders" if is_image(entry.name) else _kind(entry.name)] += 1


def _above(folder: Path) -> tuple[tuple[int, int], ...]:
    """What identifies a folder and all that hold it, wherever links lead."""
    return tuple(map(_identity, (folder, *folder.parents, *folder.resolve().parents)))


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _files(folder: str, within: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Paths within the first folder; of dead links with a stroke at the end."""
    for entry in _entries(folder):
        if entry.is_dir():
            me = _identity(Path(entry.path))
            if entry.is_symlink() and me in above:
                raise ValueError(f"{entry.path} is a link to a folder that holds it: remove the link")
            yield from _files(entry.path, f"{within}{entry.name}/", (*above, me))
        elif entry.is_file():
            yield f"{within}{entry.name}"
        else:
            yield f"{within}{entry.name}/"


def _check_arrangement(root: Path, outer: Sequence[Path], asking: Asker) -> None:
    """Raise a ValueError where the folders in `root` do not look like classes."""
    inner = [tuple(each.name for each in _folders(folder)) for folder in outer]
    bare = [within != () and not _has_image(folder) for folder, within in zip(outer, inner, strict=True)]
    if len(outer) == 1 and bare[0]:
        meant = {"learn": f"{command('learn', outer[0])}", "stream": f"path={str(outer[0])!r}"}[asking]
        raise ValueError(f"{outer[0]} holds only folders ({_few(inner[0])}): did you mean {meant}?")
    same = len(outer) > 1 and inner[0] != () and len(set(inner)) == 1
    if not same and not all(bare):
        return
    what = f"hold the same sub-folders ({_few(inner[0])})" if same else "hold only folders"
    names = _few([folder.name for folder in outer])
    if same and any(map(role_of, inner[0])):
        remedy = "put these outermost, as train/<class> and test/<class>"
    elif asking == "learn":
        remedy = (
            f"learn them one by one, as in {command('learn', outer[0])}, or move the images of a class into its folder"
        )
    else:
        remedy = f"write domain=0 where {names} are domains, domain=1 where they are the classes"
    raise ValueError(f"the class folders of {root} ({names}) {what}: {remedy}")


def _has_image(folder: Path) -> bool:
    return any(is_image(entry.name) and entry.is_file() for entry in _entries(folder))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _folders(path: Path) -> list[Path]:
    return [path / name for name in sorted(entry.name for entry in _entries(path) if entry.is_dir())]


def _entries(folder: str | Path) -> list["os.DirEntry[str]"]:
    """What is in a folder, but for what is hidden; unlike a `Path`, an entry knows what it is without a look at it."""
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not _hidden(entry.name)]


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in _OURS


def _level(domain: str | int | None) -> int | None:
    if domain is None:
        return None
    if str(domain) not in ("0", "1"):
        raise ValueError(f"domain={domain!r}: expected 0 (<domain>/<class>/...) or 1 (<class>/<domain>/...)")
    return int(domain)
