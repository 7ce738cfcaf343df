"""Flickr30k and COCO captions in Karpathy's splits: from the hub, from tables, or from his JSON beside the images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from perdure.formatting import meant
from perdure.storage.schema import decode_json, validated
from perdure.streams.captions import captioned_data, read_tables
from perdure.streams.columns import TableFile, TablePart
from perdure.streams.hub import hub_images, hub_table, load
from perdure.streams.options import TOPICS, CaptionOptions, stream
from perdure.streams.sources import Files
from perdure.streams.topics import CaptionedData, arrange_captions

_LEARNT, _TESTED = ("train", "restval"), ("test",)
_CAPTIONS = ("captions", "caption", "sentences")
_IMAGES = ("", "images", "flickr30k-images", "flickr30k_images")
_SUPER = "supercategory"


@stream(arrange_captions)
def flickr30k(options: CaptionOptions, path: str | None = None) -> Callable[[bool], CaptionedData]:
    """Flickr30k (Young et al. 2014): 29,000 train and 1,000 test images in Karpathy's split, 5 captions each.

    Args:
        options: the common ones of captioned images.
        path: folder with `dataset_flickr30k.json` and the images (in it, in `images` or in `flickr30k-images`), or of
            parquet or JSONL files with a column `split`; None: `nlphuji/flickr30k` from the hub.
    """

    def read(_: bool) -> CaptionedData:
        found = _read(Path(path), options) if path else _read_hub("nlphuji/flickr30k", options, "refs/convert/parquet")
        return replace(found, name="flickr30k")

    return read


@stream(arrange_captions)
def coco(options: CaptionOptions, path: str) -> Callable[[bool], CaptionedData]:
    """COCO captions (Chen et al. 2015, arXiv:1504.00325): 113,287 train and 5,000 test images in Karpathy's split.

    Args:
        options: the common ones of captioned images. `by="supercategory"` makes a task of each of the 12 kinds of
            objects: an image belongs to that of its largest object; images without objects are left out and counted.
        path: folder with `dataset_coco.json` and the images (`train2014/...` in it or in `images`), for
            by="supercategory" with `instances_*.json` too (in it or in `annotations`); or a folder of parquet or JSONL
            files with a column `split`.
    """
    return lambda _: replace(_read(Path(path), options), name="coco")


def _read(path: Path, options: CaptionOptions) -> CaptionedData:
    found = [path] if path.suffix == ".json" else sorted(path.glob("dataset*.json"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"path={str(path)!r} holds {names}; give the path of one of them")
    if found:
        return _read_json(found[0], options.column)
    parts = read_tables(path, "image")
    return _of_tables(path.name, _divided(parts[0]) if len(parts) == 1 else parts, options)


def _of_tables(name: str, parts: Sequence[TablePart], options: CaptionOptions) -> CaptionedData:
    column = next((c for c in _CAPTIONS if c in parts[0].files[0].columns), _CAPTIONS[0])
    return captioned_data(name, parts, (column,), options.column)


def _divided(everything: TablePart) -> list[TablePart]:
    """The train and the test part of what has a column `split`."""
    if "split" not in everything.files[0].columns:
        return [everything]
    split = everything.values("split", "split")
    parts = [[i for i, word in enumerate(split) if word in words] for words in (_LEARNT, _TESTED)]
    for words, rows in zip((_LEARNT, _TESTED), parts, strict=True):
        if not rows:
            raise ValueError(
                f"column 'split' has no row {words[0]!r}, only {_few(split)}; expected train, val and test"
            )
    return [everything.take(rows) for rows in parts]


def _few(words: Sequence[Any]) -> str:
    return ", ".join(repr(word) for word in list(dict.fromkeys(words))[:5])


def _read_hub(name: str, options: CaptionOptions, revision: str | None = None) -> CaptionedData:
    """A data set of the hub with one part and a column `split`; `revision` is where its parquet files are."""
    loaded = load(name, "give path=, a copy on disk", revision=revision)
    part = next(iter(loaded))
    data = loaded[part]
    source = hub_images(f"{name} {part}", data, "image")
    everything = TablePart([hub_table(name, data)], source, range(len(source)))
    return _of_tables(name, _divided(everything), options)


def _read_json(file: Path, by: str | None) -> CaptionedData:
    if by not in (None, _SUPER):
        raise ValueError(f"by={by!r}: {file.name} has no such topics{meant(by, (*TOPICS, _SUPER))}; leave it out")
    if not file.is_file():
        raise ValueError(f"path={str(file)!r} does not exist; give the folder that holds it and the images")
    listed = validated(_json(file), _Listed, str(file), "expected Karpathy's form; get the file again")["images"]
    topics = _largest_objects(file.parent) if by else {}
    kept = [image for image in listed if not by or image.get("cocoid") in topics]
    left_out = {"images_without_objects": len(listed) - len(kept)} if len(kept) < len(listed) else {}
    root, named = _folder(file.parent, listed)
    paths = [named(image) for image in kept]
    columns: dict[str, list[Any]] = {
        "sentences": [[each["raw"] for each in image["sentences"]] for image in kept],
        "split": [image["split"] for image in kept],
        _SUPER: [topics.get(image.get("cocoid", -1)) for image in kept],
    }
    table = TableFile(file.name, len(kept), list(columns), columns.__getitem__, lambda row: f"{file}: {paths[row]}")
    everything = TablePart([table], Files(root, paths), range(len(kept)))
    found = captioned_data(file.stem, _divided(everything), ("sentences",), by)
    return replace(found, notes=found.notes | left_out)


def _folder(path: Path, listed: Sequence[Mapping[str, Any]]) -> tuple[Path, Any]:
    """The folder of the images, and what gives the path of an image within it."""

    def whole(image: Mapping[str, Any]) -> str:
        return "/".join(filter(None, (image.get("filepath"), image["filename"])))

    def bare(image: Mapping[str, Any]) -> str:
        return str(image["filename"])

    for name in _IMAGES:
        for named in (whole, bare):
            if listed and (path / name / named(listed[0])).is_file():
                return path / name, named
    shown = whole(listed[0]) if listed else "the images"
    raise ValueError(f"{str(path)!r} does not hold {shown}; put the images beside the JSON file, or into 'images'")


def _largest_objects(path: Path) -> dict[int, str]:
    """Number of the image -> super-category of its largest object; crowds are not objects."""
    files = sorted((*path.glob("instances_*.json"), *path.glob("annotations/instances_*.json")))
    if not files:
        raise ValueError(
            f"by={_SUPER!r} needs COCO's instances_*.json in {str(path)!r} or in its folder 'annotations'; add them"
        )
    largest: dict[int, tuple[float, int]] = {}
    kinds: dict[int, str] = {}
    for file in files:
        facts = validated(_json(file), _Instances, str(file), "expected COCO's form; get the file again")
        kinds |= {each["id"]: each["supercategory"] for each in facts["categories"]}
        if strange := {each["category_id"] for each in facts["annotations"]} - kinds.keys():
            raise ValueError(f"{file}: no category has the id {min(strange)}; get the file again")
        for image, found in _objects(facts["annotations"]):
            largest[image] = max(largest.get(image, found), found)
    return {image: kinds[category] for image, (_, category) in largest.items()}


class _Sentence(TypedDict):
    raw: str


class _Image(TypedDict):
    filename: str
    split: str
    sentences: list[_Sentence]
    filepath: NotRequired[str]
    cocoid: NotRequired[int]


class _Listed(TypedDict):
    images: list[_Image]


class _Category(TypedDict):
    id: int
    supercategory: str


class _Object(TypedDict):
    image_id: int
    category_id: int
    area: float
    iscrowd: NotRequired[int]


class _Instances(TypedDict):
    categories: list[_Category]
    annotations: list[_Object]


def _objects(annotations: Sequence[_Object]) -> Iterator[tuple[int, tuple[float, int]]]:
    for each in annotations:
        if not each.get("iscrowd"):
            yield each["image_id"], (each["area"], each["category_id"])


def _json(file: Path) -> dict[str, Any]:
    def slim(entry: dict[str, Any]) -> dict[str, Any]:
        # Outlines are most of a file of half a gigabyte; dropped while it is read, they never fill the memory.
        entry.pop("segmentation", None)
        return entry

    facts = decode_json(file.read_bytes(), str(file), "repair it or give another path", slim)
    if not isinstance(facts, dict):
        raise ValueError(f"{file}: expected a JSON object, as Karpathy's and COCO's files are")
    return facts
