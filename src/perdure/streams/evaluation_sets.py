"""Public evaluation sets, read from local copies of their files: MME, MME-RealWorld and Video-MME.

They are asked, never taught. Sources: Fu et al., "MME", arXiv 2306.13394; Zhang et al., "MME-RealWorld", ICLR 2025,
arXiv 2408.13257; Fu et al., "Video-MME", CVPR 2025, arXiv 2405.21075. Prompts are the authors'.
"""

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from string import ascii_uppercase
from typing import Annotated, Literal

import torch

from perdure.backbones.preprocess import is_image
from perdure.formatting import shortened
from perdure.options.ranges import Range, checked
from perdure.scoring import Grade, Reference, measure, score_of
from perdure.scoring.normalise import has_han
from perdure.streams.conversations import Conversation, messages
from perdure.streams.question_rows import EncodedImage, QuestionRow, Stored, read_rows
from perdure.types import Batch, Stream, Task

_RELEASE = "MME_Benchmark_release_version"
_LISTED, _LISTED_CN = "The choices are listed below: ", "选项如下所示:"
_ASKED = (
    "Select the best answer to the above multiple-choice question based on the image. Respond with only the letter "
    "(A, B, C, D, or E) of the correct option.\nThe best answer is:"
)
_ASKED_CN = "根据图像选择上述多项选择题的最佳答案。只需回答正确选项的字母（A, B, C, D 或 E）。\n最佳答案为："
_ASKED_VIDEO = (
    "Select the best answer to the following multiple-choice question based on the video. Respond with only the letter "
    "(A, B, C, or D) of the correct option."
)
_TIME = re.compile(r"(\d+):(\d+):(\d+)[,.](\d+)\s*-->\s*(\d+):(\d+):(\d+)[,.](\d+)")
_MARKUP = re.compile(r"<[^>]*>")


@dataclass(frozen=True)
class Question:
    """One question of an evaluation set.

    Args:
        prompt: what the model is asked, without marks of images.
        images: shown before the prompt, in order; the frames of a video.
        reference: the truth, with the question's categories.
        where: file and line, for people.
    """

    prompt: str
    images: tuple[EncodedImage, ...]
    reference: Reference
    where: str

    def pictures(self) -> list[Path | bytes]:
        """The encoded images, or their files; what is stored in a table is read now."""
        return [image.read() if isinstance(image, Stored) else image for image in self.images]

    def conversation(self) -> Conversation:
        """The question as a model is asked it: the images, then the prompt."""
        truth = self.reference
        return Conversation(
            messages([("user", (*[None] * len(self.images), self.prompt))]),
            self.pictures(),
            truth.answers,
            truth.options,
            where=self.where,
            names=(truth.image,),
            categories=truth.categories,
        )


@dataclass(frozen=True)
class EvaluationSet:
    """Questions, and how their answers are scored.

    Args:
        name: with all that the score depends on.
        score: of `perdure.scoring`.
        questions: in the order of the file.
        remarks: what a reader of the numbers must know.

    Raises:
        ValueError: for a question that the score cannot be asked of.
    """

    name: str
    score: str
    questions: tuple[Question, ...]
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        score = score_of(self.score)
        for question in self.questions:
            try:
                score.check(question.reference)
            except ValueError as error:
                raise ValueError(f"{question.where}: {error}") from error

    @property
    def references(self) -> list[Reference]:
        """The truths, one a question."""
        return [question.reference for question in self.questions]

    def grade(self, answers: Sequence[str]) -> Grade:
        """The score of answers, one a question; `official` by the authors' rules, `lenient` by the guarded ones."""
        return score_of(self.score).grade(answers, self.references)

    def measure(self, answers: Sequence[str]) -> dict[str, float]:
        """The same as numbers by name, such as `official/perception`."""
        return measure(answers, self.references, self.score)

    def stream(self) -> Stream:
        """One task with test questions only, whose images are read when they are asked about."""
        digest = sha256()
        for question in self.questions:
            digest.update(repr((question.prompt, question.reference)).encode())
        remarks = (*self.remarks, *self.grade([""] * len(self.questions)).remarks)
        notes = {"conversations": len(self.questions), "digest": digest.hexdigest(), "remarks": list(remarks)}
        task = Task(0, self.name, (0,), (self.name,), 1, test=_Asked(self.questions), score=self.score)
        return Stream(self.name, "task", (task,), notes)


class _Asked:
    """Questions as `perdure.types.Data`."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self.questions = questions
        self.labels = torch.zeros(len(questions), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def offers_options(self) -> bool:
        """Whether there is something to choose from in a question."""
        return any(each.reference.options for each in self.questions)

    def identities(self) -> set[str]:
        """The whole paths of the images; those within a table are told from none."""
        return {str(image.absolute()) for each in self.questions for image in each.images if isinstance(image, Path)}

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        asked = [self.questions[i].conversation() for i in positions]
        return {"label": self.labels[list(positions)], "conversation": asked}


def mme(path: str) -> EvaluationSet:
    """MME: yes/no questions, two an image, in 14 subtasks.

    Args:
        path: the release's folder, with a folder a subtask (images and texts side by side, or in `images/` and
            `questions_answers_YN/`); or a parquet or TSV file of it.

    Raises:
        ValueError: when files are not as expected, in one line with the file and the line.
    """
    root = Path(path) / _RELEASE if (Path(path) / _RELEASE).is_dir() else Path(path)
    folders = [f for f in sorted(root.iterdir()) if f.is_dir() and _texts(f)] if root.is_dir() else []
    found = [q for folder in folders for q in _mme_folder(folder)] or _mme_rows(read_rows(root, ("image",)))
    return EvaluationSet("mme", "mme", tuple(found))


def mme_realworld(path: str, images: str | None = None) -> EvaluationSet:
    """MME-RealWorld, its Chinese part and its Lite version: five options each, the last one "not in the image".

    Args:
        path: `MME_RealWorld.json` or `MME_RealWorld_CN.json` with paths of images; or JSON, TSV or parquet with images
            in it; or the folder of one of them. A file with Chinese questions is asked in Chinese.
        images: folder to which paths of images are relative; that of the file when None.

    Raises:
        ValueError: when files are not as expected, in one line with the file and the line.
    """
    rows = read_rows(Path(path), ("Image", "bytes", "image"), None if images is None else Path(images))
    chinese = 2 * sum(has_han(row.text("Text", "question")) for row in rows) > len(rows)
    name = "mme_realworld, Chinese" if chinese else "mme_realworld"
    return EvaluationSet(name, "mme_realworld", tuple(_real_world_row(row, chinese) for row in rows))


@checked
def video_mme(
    path: str,
    subtitles: bool = False,
    duration: Literal["short", "medium", "long"] | None = None,
    count: Annotated[int, Range(1, 4096)] = 8,
    rate: Annotated[float, Range(0, 1000, above=True)] = 1.0,
    frames: str | None = None,
) -> EvaluationSet:
    """Video-MME: four options, three questions a video; a video is shown as frames that were extracted before.

    Args:
        path: folder of the release, with the parquet file of questions and `subtitle/<videoID>.srt`.
        subtitles: whether what is said while the shown frames are seen is told.
        duration: of the videos; all when None.
        count: number of frames shown, evenly spaced from the first to the last.
        rate: frames a second of those that were extracted; decides which subtitles belong to one.
        frames: folder with a folder of images for each video, named by its `videoID`; `frames` in `path` when None.

    Raises:
        ValueError: when files are not as expected, in one line with the file and the line.
    """
    root = Path(path) if Path(path).is_dir() else Path(path).parent
    rows = [row for row in read_rows(Path(path), ()) if duration in (None, row.text("duration"))]
    if not rows:
        raise ValueError(f"path={path!r} has no questions of duration={duration!r}; choose another one")
    shown = Path(frames) if frames is not None else root / "frames"
    videos = {row.text("videoID"): row.where for row in reversed(rows)}
    files = {video: _frames(shown / video, count, where) for video, where in videos.items()}
    spoken: dict[str, str | None] = {}
    if subtitles:
        for video, chosen in files.items():
            spoken[video] = _spoken(root / "subtitle" / f"{video}.srt", [number / rate for number, _ in chosen])
    silent = sum(text is None for text in spoken.values())
    questions = []
    for row in rows:
        video = row.text("videoID")
        questions.append(_video_row(row, tuple(file for _, file in files[video]), spoken.get(video)))
    name = f"video_mme, {count} frames, {'with' if subtitles else 'without'} subtitles"
    remarks = (f"{silent} of {len(videos)} videos have no subtitles: asked without",) if silent else ()
    return EvaluationSet(name, "video_mme", tuple(questions), remarks)


EVALUATION_SETS: dict[str, Callable[..., EvaluationSet]] = {
    "mme": mme,
    "mme_realworld": mme_realworld,
    "video_mme": video_mme,
}
"""Name -> factory; its named parameters are the options a user may write."""


def _texts(folder: Path) -> list[Path]:
    within = folder / "questions_answers_YN"
    return sorted((within if within.is_dir() else folder).glob("*.txt"))


def _mme_folder(folder: Path) -> Iterator[Question]:
    pictured = folder / "images" if (folder / "images").is_dir() else folder
    images = {file.stem: file for file in sorted(pictured.iterdir()) if is_image(file.name)}
    for file in _texts(folder):
        if file.stem not in images:
            raise ValueError(f"{file}: no image {file.stem}.jpg or .png in {pictured}; copy it there")
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
        asked = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
        if len(asked) != 2:
            raise ValueError(f"{file}: expected 2 questions, got {len(asked)}; MME pairs them")
        for number, line in asked:
            question, tab, answer = line.rpartition("\t")
            if not tab:
                raise ValueError(f"{file}, line {number}: expected a question, a tab and Yes or No, got {line!r:.60}")
            image = images[file.stem]
            yield _yes_no(question, answer, image, image.name, folder.name, f"{file}, line {number}")


def _mme_rows(rows: Sequence[QuestionRow]) -> list[Question]:
    images = [(row.text("category"), row.text("image_path", "question_id")) for row in rows]
    times = Counter(images)
    for row, (subtask, image) in zip(rows, images, strict=True):
        if (n := times[subtask, image]) != 2:
            raise ValueError(f"{row.where}: expected 2 questions on image {image!r} of {subtask!r}, got {n}")
    return [
        _yes_no(row.text("question"), row.text("answer"), row.image("image"), image, subtask, row.where)
        for row, (subtask, image) in zip(rows, images, strict=True)
    ]


def _yes_no(question: str, answer: str, image: EncodedImage, name: str, subtask: str, where: str) -> Question:
    reference = Reference((answer.strip(),), question=question, image=name, categories=(subtask,))
    return Question(question, (image,), reference, where)


def _real_world_row(row: QuestionRow, chinese: bool) -> Question:
    question, options = row.text("Text", "question"), _options(row, 5)
    if "Subtask" in row.cells:
        task, subtask, category = row.text("Task"), row.text("Subtask"), row.text("Category")
    else:
        task, subtask = (row.text("category").split("/")[i] for i in (0, -1))
        category = row.text("l2-category")
    category = category.lower()
    if "attribute" in category:  # so the authors' tool
        category = f"{category.split('/')[0]}/attribute"
    listed, asked = (_LISTED_CN, _ASKED_CN) if chinese else (_LISTED, _ASKED)
    reference = Reference(
        (row.text("Ground truth", "answer"),),
        options,
        question,
        categories=(task.capitalize(), subtask, category),
    )
    prompt = "\n".join((f"{question} {listed}", *options, asked))
    return Question(prompt, (row.image("Image", "bytes", "image"),), reference, row.where)


def _video_row(row: QuestionRow, frames: tuple[Path, ...], spoken: str | None) -> Question:
    question, options = row.text("question"), _options(row, 4)
    categories = tuple(map(row.text, ("duration", "domain", "sub_category", "task_type")))
    told = ("This video's subtitles are listed below:", spoken) if spoken else ()
    prompt = "\n".join((*told, _ASKED_VIDEO, question, *options, "The best answer is:"))
    reference = Reference((row.text("answer"),), options, question, row.text("videoID"), categories=categories)
    return Question(prompt, frames, reference, row.where)


def _options(row: QuestionRow, count: int) -> tuple[str, ...]:
    """The options with their letters: a list, the text of a list in Python, or a column each without letters."""
    known = ("Answer choices", "multi-choice options", "options")
    given = next((row.cells[name] for name in known if name in row.cells), None)
    if given is None and "A" in row.cells:
        return tuple(f"({letter}) {row.text(letter)}" for letter in ascii_uppercase[:count])
    if isinstance(given, str):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):  # refused below
            given = ast.literal_eval(given)
    if not isinstance(given, list | tuple) or len(given) != count or not all(isinstance(g, str) for g in given):
        raise ValueError(f"{row.where}: expected {count} options, got {shortened(repr(given), 60)}")
    return tuple(option.strip() for option in given)


def _frames(folder: Path, count: int, where: str) -> list[tuple[int, Path]]:
    """Frames evenly spaced from the first to the last, each with its number; all where there are fewer."""
    names = [file.name for file in folder.iterdir() if is_image(file.name)] if folder.is_dir() else []
    names.sort(key=lambda name: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)])
    if not names:
        raise ValueError(
            f"{where}: no frames of video {folder.name!r}; extract them to {folder} as images, one a second, "
            "or give frames="
        )
    chosen = (i * (len(names) - 1) // max(count - 1, 1) for i in range(count))
    return [(i, folder / names[i]) for i in dict.fromkeys(chosen)]


def _spoken(file: Path, times: Iterable[float]) -> str | None:
    """What is said at these seconds, a line each; None where there are no subtitles."""
    if not file.is_file():
        return None
    lines: list[tuple[float, float, str]] = []
    for block in re.split(r"\n\s*\n", file.read_text(encoding="utf-8-sig", errors="replace")):
        if found := _TIME.search(block):
            h, m, s, ms, *end = map(int, found.groups())
            text = " ".join(_MARKUP.sub("", block[found.end() :]).split())
            lines.append(
                (3600 * h + 60 * m + s + ms / 1000, 3600 * end[0] + 60 * end[1] + end[2] + end[3] / 1000, text)
            )
    told = (i for time in times for i, (start, stop, _) in enumerate(lines) if start <= time < stop)
    return "\n".join(lines[i][2] for i in dict.fromkeys(told))
