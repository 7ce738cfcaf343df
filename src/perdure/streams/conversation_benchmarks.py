"""Public benchmarks of continual instruction tuning and visual questions by name, from a copy of their files.

Each task keeps the name of its authors' rule; where their tools take right answers from another file than the
questions, so does this.
"""

import functools
import importlib.resources
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from perdure.formatting import meant
from perdure.scoring import BENCHMARK_SCORES
from perdure.scoring.benchmarks import NOT_LOCAL
from perdure.storage.schema import decode_json
from perdure.streams.conversation_files import Reader, read_json
from perdure.streams.conversation_rows import Columns
from perdure.streams.conversation_stream import find
from perdure.streams.conversation_tasks import ConversationOptions, Dialogues, Part, arrange_conversations, by_topic
from perdure.streams.conversations import Record
from perdure.streams.naming import role_of
from perdure.streams.options import stream

Amend = Callable[[Any, int], Any]
"""From an entry of a test file and its number to the same with its right answers."""


@stream(arrange_conversations, "share_images")
def coin(options: ConversationOptions, path: str, images: str | None = None) -> Callable[[bool], Dialogues]:
    """CoIN (Chen et al. 2024, arXiv:2403.08350): ScienceQA, TextVQA, ImageNet, GQA, VizWiz, Grounding, VQAv2, OCRVQA.

    Right answers of TextVQA are ten people's, from `TextVQA_0.5.1_val.json`; options of ScienceQA, and answers where
    the test file has none, are those of `problems.json`. Both lie beside the test file or in the folder of the images.

    Args:
        options: the common ones of conversations; the order is the published one when None.
        path: the folder of instructions, with `ScienceQA/train.json`, `ScienceQA/test.json` and so on.
        images: the folder that images' paths are relative to, in the authors' scripts `cl_dataset`; None: looked for.

    Raises:
        ValueError: when a file is missing or not as expected.
    """
    return _plan("coin", _COIN, options, path, images)


@stream(arrange_conversations, "share_images")
def ucit(options: ConversationOptions, path: str, images: str | None = None) -> Callable[[bool], Dialogues]:
    """UCIT (Guo et al. 2025, arXiv:2503.12941): ImageNet-R, ArxivQA, VizWiz, IconQA, CLEVR-Math, Flickr30k.

    References of the two caption tasks are those of `val_coco_type_3000.json`, which follow the order of the test file.
    The published score of captions is a mean of seven, one of which needs Java; here it is CIDEr.

    Args:
        options: the common ones of conversations; the order is the published one when None.
        path: the folder of instructions, with `ArxivQA/train_4w.json`, `ArxivQA/test_3000.json` and so on.
        images: the folder that images' paths are relative to, the authors' `datasets`; None: looked for.

    Raises:
        ValueError: when a file is missing or not as expected.
    """
    return _plan("ucit", _UCIT, options, path, images)


@stream(arrange_conversations, "share_images")
def mllm_dcl(options: ConversationOptions, path: str) -> Callable[[bool], Dialogues]:
    """MLLM-CL, domains (Zhao et al. 2025, arXiv:2506.05453): remote sensing, medicine, driving, science, finance.

    Args:
        options: the common ones of conversations; the order is the published one when None.
        path: the folder with `RS/train.json`, `RS/test.json`, `RS/images` and so on.

    Raises:
        ValueError: when a file is missing or not as expected.
    """
    return _plan("mllm_dcl", _DCL, options, path, None)


@stream(arrange_conversations, "share_images")
def mllm_acl(options: ConversationOptions, path: str) -> Callable[[bool], Dialogues]:
    """MLLM-CL, abilities (Zhao et al. 2025, arXiv:2506.05453), those that are scored by a rule: OCR and VP (counting).

    Math is judged by a language model, APP on the authors' server: both are left out, and refused by name.

    Args:
        options: the common ones of conversations; the order is the published one when None.
        path: the folder with `OCR/train.json`, `OCR_test/test.json` and so on, images beside each file.

    Raises:
        ValueError: when a file is missing or not as expected.
    """
    refused = {name: NOT_LOCAL[score] for name, score in BENCHMARK_SCORES["mllm_acl"].items() if score in NOT_LOCAL}
    for name in options.only or ():
        if name in refused:
            raise ValueError(f"only: {name!r} of mllm_acl is not here: {refused[name]}")
    remarks = [f"{name} is left out: {why.partition(':')[0]}" for name, why in refused.items()]
    return _plan("mllm_acl", _ACL, options, path, None, remarks)


@stream(arrange_conversations)
def daquar(options: ConversationOptions, path: str) -> Callable[[bool], Dialogues]:
    """DAQUAR (Malinowski and Fritz 2014, arXiv:1410.0210): questions about indoor scenes, one task a kind.

    Tasks: "objects", "counting" ("how many ...") and "colours". Differs: answers are compared as texts, not by their
    distance in WordNet; underscores in names are blanks. A tenth of the answers are several names, divided by commas.

    Args:
        options: the common ones of conversations.
        path: a folder of parquet files `train` and `test` with columns `image`, `questions` and `answers`.

    Raises:
        ValueError: when a file is missing or not as expected.
    """

    def read(measured: bool) -> Dialogues:
        (place, *_) = find(Path(path), measured)
        reader = Reader(Columns(), skip_bad=options.skip_bad)
        train, test = ([_scene(r) for file in files for r in reader.read(file)] for files in (place.train, place.test))
        parts = by_topic(Part("daquar", train, test or None, "exact"))
        return Dialogues("daquar", parts, reader.pictures, reader.left_out)

    return read


@stream(arrange_conversations)
def easy_vqa_questions(options: ConversationOptions) -> Callable[[bool], Dialogues]:
    """Questions about one coloured shape an image, from the package `easy-vqa` (MIT): six tasks, one a kind.

    48,248 questions about 5,000 images, in the package's own split: "colour" and "shape" ask for a name, "has colour"
    and "has shape" for yes or no, "lacks colour" and "lacks shape" the same with "no" or "not" in the question.

    Args:
        options: the common ones of conversations.

    Raises:
        ValueError: when the package is missing.
    """

    def read(measured: bool) -> Dialogues:
        try:
            folder = Path(str(importlib.resources.files("easy_vqa") / "data"))
        except ModuleNotFoundError as error:
            raise ValueError("the data of easy_vqa_questions is not installed: pip install 'perdure[demo]'") from error
        reader = Reader(Columns(by="kind"), skip_bad=options.skip_bad)
        train, test = (
            reader.read(folder / part / "questions.json", folder / part / "images", _shape)
            for part in ("train", "test")
        )
        parts = by_topic(Part("easy_vqa", train, test, "exact"))
        return Dialogues("easy_vqa", parts, reader.pictures, reader.left_out)

    return read


def _shape(row: Any, number: int) -> dict[str, str]:
    question, answer, image = row
    return {"question": question, "answer": answer, "image": f"{image}.png", "kind": _shape_kind(question)}


@functools.cache  # a few hundred different questions
def _shape_kind(question: str) -> str:
    if question.startswith("what"):
        return "colour" if re.search(r"\bcolor\b", question) else "shape"
    what = "shape" if re.search(r"\b(circle|rectangle|triangle)\b", question) else "colour"
    return f"lacks {what}" if re.search(r"\b(not|no)\b", question) else f"has {what}"


def _scene(record: Record) -> Record:
    question = " ".join(part for part in record.turns[-1][1] if part).lower()
    kind = "objects"
    if re.search(r"\bhow many\b", question):
        kind = "counting"
    elif re.search(r"\bcolou?rs?\b", question):
        kind = "colours"
    return replace(record, topic=kind, answers=tuple(each.replace("_", " ") for each in record.answers))


@dataclass(frozen=True)
class _Places:
    """Where the files of a task are: its folder, the one of its test file, and those that hold images."""

    learnt: Path
    tested: Path
    images: Sequence[Path]

    def beside(self, pattern: str) -> Iterator[Path]:
        """Files of that name, beside the test file or the images."""
        for folder in (self.tested, *self.images, *(each / self.tested.name for each in self.images)):
            yield from sorted(folder.glob(pattern))


@dataclass(frozen=True)
class _Task:
    """A task of a benchmark: what its folders may be called, and where its right answers are."""

    name: str
    folders: tuple[str, ...] = ()
    tested: tuple[str, ...] = ()
    answers: Callable[[_Places], Amend | None] = lambda _: None


def _problems(places: _Places) -> Amend | None:
    file = next(places.beside("problems.json"), None)
    if file is None:
        return None
    problems = _object(file)

    def amend(row: Any, number: int) -> Any:
        found = problems.get(str(row.get("question_id"))) if isinstance(row, Mapping) else None
        if not isinstance(found, Mapping):
            return row
        right, choices = found.get("answer"), found.get("choices")
        if isinstance(right, int) and not (isinstance(choices, list) and 0 <= right < min(len(choices), 26)):
            raise ValueError(
                f"{file}: of question {row['question_id']!r} the answer {right} is no number of its choices"
            )
        letter = ascii_uppercase[right] if isinstance(right, int) else None
        return {"answer": letter, **row, "options": choices}

    return amend


def _people(places: _Places) -> Amend:
    file = next(places.beside("TextVQA*_val.json"), None)
    if file is None:
        raise ValueError(f"{places.tested}: TextVQA is scored by ten people's answers; add TextVQA_0.5.1_val.json")
    listed = _object(file).get("data")
    if not isinstance(listed, list):
        raise ValueError(f"{file}: expected an object with `data`, a list; get the file again")
    answers = {str(each.get("question_id")): each.get("answers") for each in listed if isinstance(each, Mapping)}

    def amend(row: Any, number: int) -> Any:
        name = str(row.get("question_id")) if isinstance(row, Mapping) else ""
        if name not in answers:
            raise ValueError(f"question {name!r} has no answers in {file}; get matching files")
        return {**row, "answer": answers[name]}

    return amend


def _captions(places: _Places) -> Amend | None:
    file = next(places.beside("*coco*.json"), None)
    if file is None:
        return None
    captions: dict[int, list[Any]] = {}
    for each in _object(file).get("annotations") or ():
        if not isinstance(each, Mapping):
            raise ValueError(f"{file}: an annotation is {each!r:.60}, and no object; get the file again")
        captions.setdefault(each.get("image_id", -1), []).append(each.get("caption"))

    def amend(row: Any, number: int) -> Any:
        if number + 1 not in captions:
            raise ValueError(f"{file} has no caption of the image {number + 1}; get matching files")
        return {**row, "answer": captions[number + 1]}

    return amend


def _box(places: _Places) -> Amend:
    def amend(row: Any, number: int) -> Any:
        box = row.get("answer_bbox") if isinstance(row, Mapping) else None
        return row if box is None else {**row, "answer": str(box)}

    return amend


_COIN = (
    _Task("ScienceQA", answers=_problems),
    _Task("TextVQA", answers=_people),
    _Task("ImageNet"),
    _Task("GQA"),
    _Task("VizWiz"),
    _Task("Grounding", answers=_box),
    _Task("VQAv2"),
    _Task("OCRVQA", ("OCR-VQA",)),
)
_UCIT = (
    _Task("ImageNet-R"),
    _Task("ArxivQA"),
    _Task("VizWiz", ("VizWiz-caption",), answers=_captions),
    _Task("IconQA"),
    _Task("CLEVR", ("CLEVR-Math",)),
    _Task("Flickr30k", ("Flickr30k-cap",), answers=_captions),
)
_DCL = (
    _Task("RS", ("RemoteSensing",)),
    _Task("Med", ("Medical",)),
    _Task("AD", ("AD/DriveLM",)),
    _Task("Sci"),
    _Task("Fin"),
)
_ACL = (_Task("OCR", tested=("OCR_test",)), _Task("VP", tested=("VP_test",)))


def _plan(
    name: str,
    tasks: Sequence[_Task],
    options: ConversationOptions,
    path: str,
    images: str | None,
    remarks: Sequence[str] = (),
) -> Callable[[bool], Dialogues]:
    known = [task.name for task in tasks]
    for each in options.only or ():
        if each not in known:
            raise ValueError(f"only: {name} has no task {each!r}{meant(each, known)}; it has: {', '.join(known)}")

    def read(measured: bool) -> Dialogues:
        root = _instructions(Path(path), tasks)
        reader = Reader(Columns(), skip_bad=options.skip_bad)
        wanted = [task for task in tasks if options.only is None or task.name in options.only]
        parts = [_part(reader, root, task, images, measured, BENCHMARK_SCORES[name][task.name]) for task in wanted]
        return Dialogues(name, parts, reader.pictures, reader.left_out, True, list(remarks), published=True)

    return read


def _instructions(path: Path, tasks: Sequence[_Task]) -> Path:
    """The folder that holds the tasks' folders: `path`, or one in it that is called like instructions."""
    if not path.is_dir():
        raise ValueError(f"path={str(path)!r} is no folder; give the one with {tasks[0].name}/train.json and so on")
    names = {each for task in tasks for each in (task.name, *task.folders)}
    inside = [each for each in sorted(path.iterdir()) if each.name.lower().startswith("instruction") and each.is_dir()]
    if len(inside) > 1:
        shown = ", ".join(each.name for each in inside)
        raise ValueError(f"path={str(path)!r} holds {shown}; give path= of one of them")
    return inside[0] if inside and not any((path / name / "train.json").is_file() for name in names) else path


def _part(reader: Reader, root: Path, task: _Task, images: str | None, measured: bool, score: str) -> Part:
    learnt = _folder(root, (task.name, *task.folders))
    tested = _folder(root, task.tested) if task.tested else learnt
    if images is None:
        candidates = [learnt, *(base / name for base in (root, root.parent) for name in ("datasets", "cl_dataset", ""))]
    else:
        candidates = [Path(images)]
    files = [_file(learnt, "train"), _file(tested, "test")]
    places = _Places(learnt, tested, candidates)
    roots = [_images(file, [file.parent, *candidates] if images is None else candidates) for file in files]
    amend = task.answers(places)
    train = [] if measured else reader.read(files[0], roots[0])
    return Part(task.name, train, reader.read(files[1], roots[1], amend), score)


def _folder(root: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    near = meant(names[0], [each.name for each in root.iterdir()])
    raise ValueError(f"{root} has no folder {names[0]!r}{near}; add it, or write only= with the tasks that are there")


def _file(folder: Path, part: str) -> Path:
    """The file of a part: `train_4w.json`, and `val.json` where there is no test file; COCO's form is another thing."""
    listed = [each for each in sorted(folder.glob("*.json")) if "coco" not in each.name]
    for role in (part, "val") if part == "test" else (part,):
        found = [each for each in listed if role_of(each.stem, whole=False) == role]
        if len(found) > 1:
            raise ValueError(f"{folder} holds {', '.join(each.name for each in found)}; keep the one to use")
        if found:
            return found[0]
    raise ValueError(f"{folder} holds no {part}.json; add it")


def _images(file: Path, folders: Sequence[Path]) -> Path:
    """The first of the folders that holds the first image that a file names."""
    for entry in read_json(file):
        if isinstance(entry.value, Mapping) and isinstance(named := entry.value.get("image"), str):
            return next((each for each in folders if (each / named).is_file()), folders[0])
    return folders[0]


def _object(file: Path) -> dict[str, Any]:
    found = decode_json(file.read_bytes(), str(file), "get the file again")
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected a JSON object; get the file again")
    return found
