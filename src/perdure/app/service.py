"""What the page and the HTTP interface share: one learner that answers many, and is taught beside it."""

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from perdure.api.abilities import TOKENS
from perdure.api.chat import Talk
from perdure.api.folders import go_on, refuse_without_effect, teach_folder
from perdure.api.given import shown
from perdure.api.learner import Learner
from perdure.api.lesson_source import give_up, lesson_paths, unfinished
from perdure.app.lessons import Lesson, Lessons, Outcome, new_id
from perdure.app.uploads import Limits, Store
from perdure.app.waiting import WaitingLesson
from perdure.core import checkpoint
from perdure.formatting import shortened
from perdure.objectives.zeroshot import class_texts
from perdure.reporting.runs import RunResults
from perdure.reporting.tables import markdown, tabulate
from perdure.storage.schema import SPECIALISTS
from perdure.streams import ImageSet
from perdure.streams.folders import pictures
from perdure.training.config import RunConfig

_AT_ONCE = 32
"""Pictures of a folder that are looked at before others may ask something."""


@dataclass(frozen=True)
class Found:
    """A picture that was searched for."""

    name: str
    picture: Image.Image
    cosine: float


class Service:
    """A learner in a folder, asked by many at once.

    Args:
        folder: the learner's; it need not be there yet.
        config: of a new learner.
        given: what of `config` the user asked for.
        store: where uploads that are taught are kept.
        images: a folder to search in.
        runs: a folder of grids to compare.
        device: to compute on; the learner's own when None.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        given: dict[str, Any],
        store: Path,
        limits: Limits | None = None,
        images: Path | None = None,
        runs: Path | None = None,
        device: str | None = None,
    ) -> None:
        self.folder, self.config, self.given, self.device = folder, config, given, device
        self.limits = limits or Limits()
        self.store = Store(store, self.limits)
        self.images, self.runs = images, runs
        self.learner = self._load()
        refuse_without_effect(folder, self.learner.config, given)
        self.gallery = _Gallery(images) if images else None
        self.lessons = Lessons(self._give_up, self._shown)
        self._take_over()

    def _take_over(self) -> None:
        """Put in the queue what a process that is no more has left: the lesson that it had begun, then those behind."""
        begun = self._begun()
        lessons = self.store.left(self.folder, lesson_paths(self.folder))
        if begun:
            mine = next((each for each in lessons if str(each.where) == begun), None)
            title, id = (mine.title, mine.id) if mine else (Path(begun).name, "")
            self.lessons.put(title, self._go_on, lambda: self._tidy(Path(begun)), id, again=True)
        for each in lessons:
            if str(each.where) != begun:
                self._put(each, again=True)

    def _load(self) -> Learner:
        if (self.folder / SPECIALISTS).exists():
            raise ValueError(
                f"{self.folder} holds several learners: the app serves one, so give the folder of a member"
            )
        if (self.folder / "run.json").exists():
            known = bool(checkpoint.whole(self.folder))
            return Learner.load(self.folder, self.device) if known else Learner.untaught(self.folder, self.device)
        return Learner.of(self.config)

    def _begun(self) -> str:
        """Where the lesson lies that is unfinished in the learner's folder; empty when there is none."""
        if not (self.folder / "run.json").exists():
            return ""
        begun = unfinished(self.folder, checkpoint.whole(self.folder))
        return begun["folder"] if begun else ""

    def _give_up(self, lesson: Lesson, stopped: bool) -> None:
        """Forget what a lesson that is not learnt has begun; what another process began is its own, until stopped."""
        if (begun := self._begun()) and (stopped or begun == lesson.source):
            give_up(self.folder)

    def _shown(self, text: str) -> str:
        """A text without where the learner and its uploads lie on this machine."""
        text = self.store.unplaced(text)
        for folder in sorted({self.folder.absolute(), self.folder.resolve()}, key=lambda each: -len(str(each))):
            text = text.replace(str(folder), folder.name) if folder.name else text
        return text

    @property
    def asks(self) -> str:
        """What it learns: classes, captions or conversations."""
        return min(self.learner.objective.asks)

    def describe(self) -> dict[str, Any]:
        """As JSON; without paths."""
        learner = self.learner
        tasks = [{"name": task.name, "classes": list(task.names)} for task in learner.tasks[: learner.learnt]]
        return {"learner": self.folder.name, "learns": self.asks, "method": learner.method.spec, "tasks": tasks}

    def names(self) -> list[str]:
        """Of the classes that were taught, each once, though several tasks taught it."""
        learner = self.learner
        return list(dict.fromkeys(name for task in learner.tasks[: learner.learnt] for name in task.names))

    def predict(
        self, images: Sequence[Image.Image], top: int = 5, classes: Sequence[str] = ()
    ) -> list[list[tuple[str, float]]]:
        """See `Learner.predict`."""
        return self.learner.predict(images, top, classes=classes or None)

    def unread(self, texts: Sequence[str]) -> list[str]:
        """See `Learner.unread`."""
        return self.learner.unread(texts)

    def search(self, wanted: str | Image.Image, top: int = 12) -> list[Found]:
        """Pictures of the folder that fit words, or another picture, best.

        Raises:
            ValueError: without a folder to search, or where the learner cannot compare them.
        """
        learner = self.learner
        learner.check_sees("search")
        if self.gallery is None:
            raise ValueError("there is no folder to search: start the app with --images FOLDER")
        if top < 1:
            raise ValueError(f"top={top}: expected 1 or more")
        if isinstance(wanted, str) and not wanted.strip():
            raise ValueError("the text to search for is empty: say what to look for")
        known = self.gallery.embedded(learner)
        if isinstance(wanted, str):
            with learner.inference():
                sought = class_texts(learner, [wanted], ("{}",))
        else:
            sought = _embedded(shown([wanted], learner), learner)
        if sought.shape[1] != known.shape[1]:
            raise ValueError("this learner's features cannot be compared with words: search by a picture")
        best = (known @ sought[0]).topk(min(top, len(known)))
        return [
            Found(self.gallery.names[row], self.gallery.data.source.read(row), cosine)
            for row, cosine in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def ask(self, images: Sequence[Image.Image], question: str, tokens: int = TOKENS) -> str:
        """See `Learner.ask`."""
        return self.learner.ask(list(images) or None, question, tokens)

    def talk(self, before: Talk | None) -> Talk:
        """A talk that goes on, with the learner as it is now."""
        if before is None:
            return Talk(self.learner)
        before.learner = self.learner
        return before

    def give(
        self,
        pictures: Sequence[tuple[str, Sequence[tuple[str, bytes | Path]]]],
        archive: tuple[str, Path] | None = None,
        captions: str = "",
        questions: str = "",
        skip_bad: bool = False,
    ) -> Lesson:
        """Have uploads taught.

        Args:
            pictures: what each class is called, with its files; without classes all files in one.
            archive: what a zip archive is called, and where it lies.
            captions: a line for each file, for a learner of captions.
            questions: a line for each file, for one that answers in words.
            skip_bad: leave unreadable pictures out.

        Raises:
            ValueError: when they cannot be taught, or would have no effect.
        """
        beside = {"captions": captions.strip(), "conversations": questions.strip()}
        if idle := [what for what, text in beside.items() if text and (what != self.asks or archive)]:
            raise ValueError(
                f"the lines of {idle[0]} have no effect: this learner learns {self.asks}, or has an archive"
            )
        if archive:
            if pictures:
                raise ValueError("pictures beside an archive have no effect: give one of the two")
            where = self.store.archive(*archive, tables=self.asks != "classes")
        elif self.asks == "classes":
            where = self.store.classes(pictures)
        else:
            files = [file for _, some in pictures for file in some]
            where = (self.store.captioned if self.asks == "captions" else self.store.asked)(files, beside[self.asks])
        return self.teach(where, where.stem if where.is_file() else where.name, skip_bad)

    def teach(self, where: Path, title: str, skip_bad: bool = False) -> Lesson:
        """Have the folder or file `where` taught once all lessons before are; see `perdure learn`."""
        try:
            noted = WaitingLesson(new_id(), shortened(title, 80), where, skip_bad, self.folder, time.time())
            self.store.note(noted)
            return self._put(noted)
        except ValueError:
            self.store.drop(where)
            raise

    def _put(self, noted: WaitingLesson, again: bool = False) -> Lesson:
        where, skip_bad = noted.where, noted.skip_bad
        return self.lessons.put(
            noted.title,
            lambda lesson: self._teach(where, lesson, skip_bad),
            lambda: self._tidy(where),
            noted.id,
            again,
        )

    def _tidy(self, where: Path) -> None:
        """Remove the upload of a lesson that is over, unless the learner refers to it."""
        try:
            kept = lesson_paths(self.folder)
        except (ValueError, OSError):  # what cannot be read is believed to
            kept = [str(where)]
        self.store.drop(where, kept)

    def _teach(self, where: Path, lesson: Lesson, skip_bad: bool) -> Outcome:
        if (begun := self._begun()) and self.store.upload_of(begun) and not Path(begun).exists():
            lesson.note(f"{begun}, begun before, is given up: its pictures are gone")
            give_up(self.folder)
            begun = ""
        source = str(where.resolve())
        lesson.source = source if source != begun else ""
        with _told(begun):
            teach_folder(where, self.folder, self.config, self.given, lesson, skip_bad)
        return self._learnt()

    def _go_on(self, lesson: Lesson) -> Outcome:
        begun = self._begun()
        lesson.source = begun if self.store.upload_of(begun) else ""
        with _told("" if lesson.source else begun):
            go_on(self.folder, lesson, self.device)
        return self._learnt()

    def _learnt(self) -> Outcome:
        self.learner = self._load()
        found = RunResults.read(self.folder)
        return Outcome(tuple(found.names()), found.matrix())

    def taught(self) -> bool:
        """Whether anything was learnt."""
        return self.learner.learnt > 0

    def grids(self) -> dict[str, list[Path]]:
        """Name -> runs of all finished grids in the folder of runs."""
        if self.runs is None or not self.runs.is_dir():
            return {}
        found: dict[str, list[Path]] = {}
        for file in sorted(self.runs.rglob("summary.json")):
            run, grid = file.parent, file.parent.parent
            within = self.runs not in (run, grid)  # it may be a grid itself, or one run
            found.setdefault(str(grid.relative_to(self.runs)) if within else self.runs.resolve().name, []).append(run)
        return found

    def compared(self, grid: str) -> str:
        """The table of a grid, as Markdown."""
        return markdown(tabulate([(run.method, run) for run in map(RunResults.read, self._grid(grid))]))

    def reported(self, grid: str | None) -> list[Path]:
        """Folders of the runs to report: those of a grid, or the learner's own."""
        if grid is not None:
            return self._grid(grid)
        if not self.taught():
            raise ValueError("this learner has learnt nothing yet: teach it something first")
        return [self.folder]

    def _grid(self, name: str) -> list[Path]:
        grids = self.grids()
        if name not in grids:
            raise ValueError(f"there is no grid {shortened(name, 80)!r}: there are {', '.join(grids) or 'none'}")
        return grids[name]


class _Gallery:
    """A folder to search in; what was computed of its pictures is kept until the learner is another."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder: give one with pictures to search in")
        self.names = pictures(folder, Counter())
        if not self.names:
            raise ValueError(f"{folder} has no image: give a folder of some")
        self.folder = folder
        self._lock = threading.Lock()
        self._of: Learner | None = None
        self._embedded = torch.empty(0)
        self.data: ImageSet

    def embedded(self, learner: Learner) -> Tensor:
        """Unit-length features (n, dim) of all pictures that can be read."""
        with self._lock:
            if self._of is not learner:
                files = [self.folder / name for name in self.names]
                data = ImageSet.queries(files, learner.backbone.preprocess).readable()
                self.names = [self.names[row] for row in data.rows.tolist()]
                if not self.names:
                    raise ValueError(f"no picture of {self.folder.name} can be read: give a folder of some")
                files = [self.folder / name for name in self.names]
                self.data = ImageSet.queries(files, learner.backbone.preprocess)
                self._embedded, self._of = _embedded(self.data, learner), learner
            return self._embedded


@contextmanager
def _told(begun: str) -> Iterator[None]:
    """Mistakes about the lesson `begun` by another process say how the app goes on with it."""
    try:
        yield
    except ValueError as error:
        if begun and begun in str(error):
            raise ValueError(f"{error}; to go on with {begun}, have it as it was and start the app again") from error
        raise


def _embedded(data: ImageSet, learner: Learner) -> Tensor:
    """A few at a time: whoever asks something else meanwhile waits for these only."""
    starts = range(0, len(data), _AT_ONCE)
    parts = (data.subset(torch.arange(start, min(start + _AT_ONCE, len(data)))) for start in starts)
    return torch.cat([F.normalize(learner.features(part)[0], dim=1) for part in parts])
