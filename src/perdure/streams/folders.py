"""Streams from folders of class folders, with train and test folders or without, with domains or without."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from perdure.images import Preprocess
from perdure.streams.arrange import Found, Part, arrange
from perdure.streams.options import Options, StreamPlan, near, stream
from perdure.streams.sources import Files
from perdure.types import Stream

_TEST = ("test", "val", "valid", "validation")


@stream()
def images(options: Options, path: str) -> StreamPlan:
    """Folders of images: `path/<class>/*`, or `path/train/<class>/*` and `path/test/<class>/*` (or `val`).

    Classes are the folders' names. With `domain=0` the folders are `<domain>/<class>/*`, with `domain=1`
    `<class>/<domain>/*`. Without a test folder, 20 % of each class are held out; which ones depends on the files' paths
    within `path` only, never on the seed, so all runs are tested on the same images. Hidden files and files that
    no reader of images knows by their ending are left aside; the latter are counted in the stream's notes.

    Args:
        options: the common ones.
        path: the folder.

    Raises:
        ValueError: when the folder is missing, empty or otherwise arranged.
    """

    def plan(preprocess: Preprocess, seed: int) -> Stream:
        return arrange(read_folders(Path(path), _level(options.domain)), options, preprocess, seed)

    return plan


def read_folders(path: Path, domain: int | None = None) -> Found:
    """The data set in a folder of class folders; `domain` is the level of the domain folders (0 or 1)."""
    train, test = parts(path)
    roots = [train] if test is None else [train, test]
    listed = [labelled(root, domain) for root in roots]
    names = sorted({folder for each in listed for folder, _, _ in each})
    domains = sorted({folder for each in listed for _, folder, _ in each}) if domain is not None else []
    made = [_part(root, each, names, domains) for root, each in zip(roots, listed, strict=True)]
    others = sum(not _is_image(file) for root in roots for file in _visible(root))
    notes = {"other_files": others} if others else {}
    return Found(path.resolve().name, made[0], made[1] if test else None, tuple(names), tuple(domains), notes)


def parts(path: Path) -> tuple[Path, Path | None]:
    """The folders of the train and the test images; no test folder when there is none beside `train`."""
    if not path.is_dir():
        here = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        what = "is a file" if path.is_file() else f"does not exist{near(path.name, here)}"
        raise ValueError(f"path={str(path)!r} {what}; give a folder of class folders")
    test = next((path / word for word in _TEST if (path / word).is_dir() and _folders(path / word)), None)
    # "train", "test" and "val" may as well be classes: then they hold images, not folders.
    if test is not None and not (path / "train").is_dir():
        raise ValueError(f"path={str(path)!r} holds {test.name!r} but no 'train'; add the train images' folder")
    if (path / "train").is_dir() and (test is not None or _folders(path / "train")):
        if test is None and len(_folders(path)) > 1:
            others = ", ".join(f.name for f in _folders(path) if f.name != "train")
            raise ValueError(f"path={str(path)!r} holds 'train' beside {others}; call the test images' folder 'test'")
        return path / "train", test
    return path, None


def labelled(root: Path, domain: int | None = None) -> list[tuple[str, str, str]]:
    """Class, domain ("" without) and path within `root` of every image; (class, "", "") of a class without any."""
    if not (outer := _folders(root)):
        loose = next(root.iterdir(), None)
        what = f"holds {loose.name!r} but no folder" if loose else "is empty"
        raise ValueError(f"{str(root)!r} {what}; expected a folder for each class, with its images in it")
    listed = []
    for folder in outer:
        if domain is None:
            listed += [(folder.name, "", found) for found in _files(root, folder)] or [(folder.name, "", "")]
            continue
        if not (inner := _folders(folder)):
            raise ValueError(f"domain={domain}: {str(folder)!r} holds no folder; expected <domain>/<class>/<images>")
        for each in inner:
            pair = (each.name, folder.name) if domain == 0 else (folder.name, each.name)
            listed += [(*pair, found) for found in _files(root, each)]
    if not any(file for _, _, file in listed):
        known = "jpg, png, webp, ..."
        raise ValueError(f"{str(root)!r} has class folders ({outer[0].name}, ...) but no image in them ({known})")
    return listed


def _part(root: Path, listed: Sequence[tuple[str, str, str]], names: Sequence[str], domains: Sequence[str]) -> Part:
    real = [(name, domain, file) for name, domain, file in listed if file]
    class_of, domain_of = {n: i for i, n in enumerate(names)}, {d: i for i, d in enumerate(domains)}
    return Part(
        Files(root, [file for _, _, file in real]),
        np.arange(len(real)),
        np.array([class_of[name] for name, _, _ in real], dtype=np.int64),
        np.array([domain_of.get(domain, 0) for _, domain, _ in real], dtype=np.int64),
    )


def _folders(path: Path) -> list[Path]:
    return sorted((p for p in path.iterdir() if p.is_dir() and not _hidden(p)), key=lambda p: p.name)


def _files(root: Path, folder: Path) -> list[str]:
    return sorted(file.relative_to(root).as_posix() for file in _visible(folder) if _is_image(file))


def _visible(folder: Path) -> Iterable[Path]:
    for file in folder.rglob("*"):
        if file.is_file() and not any(part.startswith((".", "__")) for part in file.relative_to(folder).parts):
            yield file


def _is_image(file: Path) -> bool:
    return Image.registered_extensions().get(file.suffix.lower()) in Image.OPEN


def _hidden(path: Path) -> bool:
    # Such as .ipynb_checkpoints, and the __MACOSX that zip files from a Mac contain.
    return path.name.startswith((".", "__"))


def _level(domain: str | int | None) -> int | None:
    if domain is None:
        return None
    if str(domain) not in ("0", "1"):
        raise ValueError(f"domain={domain!r}: expected 0 (<domain>/<class>/...) or 1 (<class>/<domain>/...)")
    return int(domain)
