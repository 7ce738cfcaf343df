"""Public benchmarks by name, and the pictures of the demo."""

import functools
import importlib.resources
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

from perdure.streams.columns import LabelColumns
from perdure.streams.folders import read_folders
from perdure.streams.hub import read_hub
from perdure.streams.options import Options, stream
from perdure.streams.sources import Files
from perdure.streams.tables import holds, parquet_columns, read_parquet
from perdure.streams.task_split import LabelledData, LabelledPart, arrange


@stream(arrange, "domain")
def cifar100(options: Options, path: str | None = None) -> Callable[[bool], LabelledData]:
    """CIFAR-100 (Krizhevsky 2009): 100 classes, 32 × 32.

    Args:
        options: the common ones.
        path: folder of parquet files, or of class folders; None: `uoft-cs/cifar100` from the hub.
    """
    return _reader("cifar100", path, _Hub("uoft-cs/cifar100", LabelColumns("fine_label", None, None), "img"))


@stream(arrange, "domain")
def imagenet_r(options: Options, path: str | None = None) -> Callable[[bool], LabelledData]:
    """ImageNet-R (Hendrycks et al. 2021, arXiv:2006.16241): 200 classes in renditions, about 30,000 images.

    It comes without a split; 20 % of each class are held out, always the same ones. The split of published
    continual-learning results is a list of files: put these into `train` and `test` folders to compare with them.

    Args:
        options: the common ones.
        path: folder of parquet files, or of class folders (with or without train and test); None:
            `axiong/imagenet-r` from the hub.
    """
    hub = _Hub("axiong/imagenet-r", LabelColumns("wnid", "class_name", None), "image", ("test", None))
    return _reader("imagenet_r", path, hub)


@stream(arrange, "domain")
def cub200(options: Options, path: str | None = None) -> Callable[[bool], LabelledData]:
    """CUB-200-2011 (Wah et al. 2011): 200 birds, 5,994 train and 5,794 test images.

    Args:
        options: the common ones.
        path: the original folder (with `images.txt`), one of parquet files, or one of class folders; None:
            `bentrevett/caltech-ucsd-birds-200-2011` from the hub.
    """
    hub = _Hub("bentrevett/caltech-ucsd-birds-200-2011", LabelColumns("label", None, None), "image")
    return _reader("cub200", path, hub)


@stream(arrange, "scenario", "domain")
def domainnet(
    options: Options, path: str | None = None, protocol: Literal["class", "domain"] = "class"
) -> Callable[[bool], LabelledData]:
    """DomainNet (Peng et al. 2019, arXiv:1812.01754): 345 classes in 6 domains, about 587,000 images.

    Args:
        options: the common ones; `tasks` is 5 by default with protocol="class".
        path: the original folder (with `clipart_train.txt` and so on), one of parquet files with a column `domain`, or
            one of domain folders; None: `wltjr1007/DomainNet` from the hub.
        protocol: "class" learns 5 times 69 classes of all domains, "domain" 6 domains of all classes. Results of
            the two cannot be compared.
    """
    hub = _Hub("wltjr1007/DomainNet", LabelColumns("label", None, "domain"), "image")
    return _reader("domainnet", path, hub, tasks=5, scenario=protocol)


@dataclass(frozen=True)
class _Hub:
    name: str
    choice: LabelColumns
    image: str
    parts: tuple[str, str | None] = ("train", "test")


def _reader(name: str, path: str | None, hub: _Hub, **more: Any) -> Callable[[bool], LabelledData]:
    def read(measured: bool) -> LabelledData:
        found = _read(Path(path), hub, measured) if path else read_hub(hub.name, hub.choice, hub.image, hub.parts)
        return replace(found, name=name, **more)

    return read


def _read(path: Path, hub: _Hub, measured: bool) -> LabelledData:
    if path.is_file() or holds(path, ".parquet"):
        columns = parquet_columns(path)
        image = next((c for c in (hub.image, "image", "img") if c in columns), hub.image)
        label = next((c for c in (hub.choice.label, "label") if c in columns), hub.choice.label)
        names = hub.choice.names if hub.choice.names in columns else None
        return read_parquet(str(path), image, LabelColumns(label, names, hub.choice.domain), measured)
    if (path / "train_test_split.txt").is_file():
        return _read_cub(path)
    if hub.choice.domain and any(path.glob("*_train.txt")):
        return _read_domainnet(path)
    return read_folders(path, 0 if hub.choice.domain else None, measured)


def _read_cub(path: Path) -> LabelledData:
    # Lines such as "1 001.Black_footed_Albatross/x.jpg" and "1 0": number of the image, and whether it is for training.
    file_of = dict(line.split(maxsplit=1) for line in _lines(path / "images.txt"))
    learnt = dict(line.split() for line in _lines(path / "train_test_split.txt"))
    folders = sorted({file.partition("/")[0] for file in file_of.values()})
    names = tuple(folder.partition(".")[2].replace("_", " ") or folder for folder in folders)
    parts = []
    for flag in ("1", "0"):
        files = [file for number, file in file_of.items() if learnt[number] == flag]
        labels = [folders.index(file.partition("/")[0]) for file in files]
        parts.append(LabelledPart.of(Files(path / "images", files), labels))
    return LabelledData(path.name, parts[0], parts[1], names)


def _read_domainnet(path: Path) -> LabelledData:
    # Lines such as "clipart/aircraft_carrier/x.jpg 0" in clipart_train.txt.
    domains = sorted(file.name.removesuffix("_train.txt") for file in path.glob("*_train.txt"))
    named: dict[int, str] = {}
    parts = []
    for part in ("train", "test"):
        files, labels, places = [], [], []
        for place, domain in enumerate(domains):
            for line in _lines(path / f"{domain}_{part}.txt"):
                file, _, label = line.rpartition(" ")
                if not label.isdecimal() or file.count("/") < 2:
                    raise ValueError(f"{domain}_{part}.txt: {line!r:.80}: expected 'domain/class/image number'")
                if named.setdefault(int(label), file.split("/")[1]) != file.split("/")[1]:
                    both = f"{named[int(label)]!r} and {file.split('/')[1]!r}"
                    raise ValueError(f"{domain}_{part}.txt: class {label} is {both}; give lists that agree")
                files.append(file)
                labels.append(int(label))
                places.append(place)
        parts.append((files, labels, places))
    position = {label: i for i, label in enumerate(sorted(named))}
    made = [LabelledPart.of(Files(path, files), [position[c] for c in labels], at) for files, labels, at in parts]
    return LabelledData(path.name, made[0], made[1], tuple(named[each] for each in sorted(named)), tuple(domains))


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise ValueError(f"{str(file)!r} is missing; give the whole original folder, or one of parquet files")
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


_SHAPES = ("circle", "rectangle", "triangle")
_NEGATIVE = re.compile(r"\b(not|no)\b")


@stream(arrange, "domain")
def easy_vqa(options: Options) -> Callable[[bool], LabelledData]:
    """4,000 train and 1,000 test images, 64 × 64, of one coloured shape each; from the package `easy-vqa` (MIT).

    The class of an image, one of 8 colours with one of 3 shapes, follows from the package's questions and answers on
    it; images of which they do not tell enough (534 of the 5,000 in version 1.0) are left out and counted in the
    stream's notes. 8 tasks by default.

    Raises:
        ValueError: when the package is missing.
    """
    return lambda _: _read_shapes()


def _read_shapes() -> LabelledData:
    try:
        folder = importlib.resources.files("easy_vqa") / "data"
    except ModuleNotFoundError as error:
        raise ValueError("the data of easy_vqa is not installed: pip install 'perdure[demo]'") from error
    answers = (folder / "answers.txt").read_text(encoding="utf-8").split()
    colours = sorted(set(answers) - set(_SHAPES) - {"yes", "no"})
    names = tuple(f"{colour} {shape}" for colour in colours for shape in _SHAPES)
    train, test = (_part(folder / part, names) for part in ("train", "test"))
    left_out = {"undetermined_images": train[1] + test[1]} if train[1] or test[1] else {}
    return LabelledData("easy_vqa", train[0], test[0], names, notes=left_out, tasks=8)


def _part(folder: Traversable, names: tuple[str, ...]) -> tuple[LabelledPart, int]:
    everything = frozenset(names)
    possible: dict[int, frozenset[str]] = {}
    for question, answer, image in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
        possible[image] = possible.get(image, everything) & _answering(names, question, answer)
    known = {i: names.index(next(iter(rest))) for i, rest in sorted(possible.items()) if len(rest) == 1}
    files = Files(Path(str(folder)) / "images", [f"{i}.png" for i in known])
    return LabelledPart.of(files, list(known.values())), len(possible) - len(known)


@functools.cache  # the package asks 48,248 questions, a few hundred different ones
def _answering(names: tuple[str, ...], question: str, answer: str) -> frozenset[str]:
    words = {name: set(name.split()) for name in names}
    said = set(re.findall("[a-z]+", question)) & set().union(*words.values())
    if answer in ("yes", "no"):
        holds = (answer == "yes") != bool(_NEGATIVE.search(question))
        return frozenset(name for name in names if bool(words[name] & said) == holds)
    # "what is the blue shape?" says the colour and asks for the shape.
    return frozenset(name for name in names if {answer, *said} <= words[name])
