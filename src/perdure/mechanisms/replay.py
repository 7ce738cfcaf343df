"""Replay: which old examples are remembered, how they are read again, and gradients on them."""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from perdure.adapters.state import BufferDict
from perdure.core.caching import READ
from perdure.core.forgetting import Forgotten
from perdure.core.learner import Core
from perdure.core.method import Method, check_trained
from perdure.formatting import count_bytes
from perdure.mechanisms import selection_scores
from perdure.mechanisms.frame_budget import by_turns, frames_of, in_random_order, within_room
from perdure.mechanisms.references import BufferView, gone, lies_elsewhere, read_references, refer
from perdure.mechanisms.selection_scores import Position, last_layer, of_answers
from perdure.options.ranges import without_effect
from perdure.streams.augment import AUGMENTS, Augment
from perdure.types import Batch, Data, Task, to


class ReplayBuffer(nn.Module):
    """At most `size` past examples; of examples that show the same image in a task, as many as there are, as one.

    With `counts_frames`, a sequence of frames counts as so many.

    Args:
        size: number of examples, or of images.
        selection: `reservoir`: a uniform sample of everything seen (Vitter's algorithm R, each example offered once);
            `class_balanced`: the same number of each class, the first in the order in which they are offered.
    """

    def __init__(self, size: int, selection: Literal["reservoir", "class_balanced"]) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size={size}: expected at least 1 example to remember")
        self.size, self.selection = size, selection
        self.counts_frames = False
        # refs (n, 3): task, position, class; offered (1,); pairs (n,) of what shows images; where there are sequences,
        # their frames (n,), and where these count, salt (1,), of their random order
        self.references = BufferDict()

    def __len__(self) -> int:
        return len(self.refs)

    @property
    def refs(self) -> Tensor:
        """What is kept: int64 (n, 3) of task index, position in its training set, class.

        Class-balanced examples of one class stand in the order in which they were offered, so that a smaller share
        drops the last.
        """
        return self.references.get("refs", torch.empty(0, 3, dtype=torch.int64))

    def add(self, task: Task, generator: torch.Generator, order: Tensor | None = None) -> None:
        """Offer training examples of `task`: those of `order` (positions, best first), or all in random order."""
        if order is None:
            order = torch.randperm(len(task.train), generator=generator)
        new, old = refer(task, order), self.refs.cpu()
        shown: Tensor | None = getattr(task.train, "pairs", None)
        if shown is None:
            self.references["refs"] = self._chosen(old, new, generator)
        else:
            self._add_shown(old, new, shown.cpu()[order.cpu()], frames_of(task.train)[order.cpu()], generator)

    def forget(self, left: Forgotten) -> None:
        """Let go of the examples of classes."""
        stays = left.stays(self.refs[:, 2])
        for name in ("refs", "pairs", "frames"):
            if name in self.references:
                self.references[name] = self.references[name][stays.to(self.references[name].device)]

    @property
    def images(self) -> int:
        """Number of different images that are referred to, of which several examples may be kept.

        A sequence is its frames, whatever it counts as; what two of them share is counted twice.
        """
        if "pairs" not in self.references:
            return len(self)
        pairs = self.references["pairs"].cpu()
        shown, place = torch.unique(pairs, return_inverse=True)
        if "frames" not in self.references:
            return len(shown)
        return int(torch.zeros(len(shown), dtype=torch.int64).scatter(0, place, self.references["frames"].cpu()).sum())

    def _add_shown(self, old: Tensor, new: Tensor, shown: Tensor, frames: Tensor, generator: torch.Generator) -> None:
        """Choose images, and keep all that is asked about them: several questions about one cost one image.

        Args:
            old: references (n, 3) that are kept so far.
            new: references (m, 3) that are offered, in their order.
            shown: identities (m,) of what new ones show.
            frames: how many images each of them shows, (m,).
            generator: of the choice.
        """
        every = torch.cat([old, new])
        pairs = torch.cat([self.references.get("pairs", torch.arange(len(old))).cpu(), shown])
        images = torch.unique(torch.stack([every[:, 0], pairs], 1), dim=0, return_inverse=True)[1]
        rows = torch.cat([every, images.unsqueeze(1)], dim=1)
        first = torch.full((len(rows),), len(rows)).scatter_reduce(0, images, torch.arange(len(rows)), "amin")
        heads = first[images] == torch.arange(len(rows))
        late = torch.arange(len(rows)) >= len(old)
        known = self.references.get("frames", torch.ones(len(old), dtype=torch.int64)).cpu()
        frames = torch.cat([known, frames])
        several = bool((frames > 1).any())
        if self.counts_frames and several:
            kept = self._fitting(rows[heads], pairs[heads], frames[heads], generator)[:, 3]
        else:
            kept = self._chosen(rows[heads & ~late], rows[heads & late], generator)[:, 3]
        place = torch.full((len(rows),), len(rows)).scatter(0, kept, torch.arange(len(kept)))[images]
        members = place.argsort(stable=True)[: int((place < len(rows)).sum())]
        self.references["refs"], self.references["pairs"] = every[members], pairs[members]
        if several:
            self.references["frames"] = frames[members]

    def _fitting(self, rows: Tensor, pairs: Tensor, frames: Tensor, generator: torch.Generator) -> Tensor:
        """Which of `rows` are kept where each costs its `frames`; `pairs` are their identities."""
        if "salt" not in self.references:
            self.references["salt"] = torch.randint(2**31, (1,), generator=generator)
        if self.selection == "reservoir":
            order = in_random_order(pairs, int(self.references["salt"]))
        else:
            order = by_turns(rows[:, 2])
        return rows[within_room(order, frames, self.size)]

    def _chosen(self, old: Tensor, new: Tensor, generator: torch.Generator) -> Tensor:
        """Which rows are kept, of those that were and of those that are offered now."""
        return self._reservoir(old, new, generator) if self.selection == "reservoir" else self._balanced(old, new)

    def _reservoir(self, old: Tensor, new: Tensor, generator: torch.Generator) -> Tensor:
        offered = int(self.references["offered"]) if "offered" in self.references else 0
        if len(old) > self.size:  # images became larger, and fewer have room in as many bytes
            old = old[torch.randperm(len(old), generator=generator)[: self.size].sort().values]
        room = self.size - len(old)
        kept = torch.cat([old, new[:room]])
        late = torch.arange(len(new))[room:]
        slots = (torch.rand(len(late), generator=generator, dtype=torch.float64) * (offered + late + 1)).long()
        for position, slot in zip(late.tolist(), slots.tolist(), strict=True):
            if slot < self.size:
                kept[slot] = new[position]
        self.references["offered"] = torch.tensor([offered + len(new)])
        return kept

    def _balanced(self, old: Tensor, new: Tensor) -> Tensor:
        everything = torch.cat([old, new])
        classes = torch.unique(everything[:, 2]).tolist()
        share, extra = divmod(self.size, len(classes))
        picks = []
        for i, c in enumerate(classes):
            # those of its tasks in turn: else a class that comes again would never replace its first
            mine = everything[everything[:, 2] == c]
            picks.append(mine[by_turns(mine[:, 0])][: share + (i < extra)])
        return torch.cat(picks)

    def pick(self, n: int, generator: torch.Generator) -> Tensor:
        """Rows (n,) of `refs`, drawn with replacement."""
        return torch.randint(len(self), (n,), generator=generator)


Selection = Literal["reservoir", "class_balanced", "herding", "kmeans", "el2n", "grand", "influence"]

_SIZE = 2000
_SCORED = ("el2n", "grand", "influence")


class ExemplarBuffer(ReplayBuffer):
    """Past images, chosen by what the learner makes of them at the end of their task.

    All selections but `reservoir` keep equally many of each class seen, and drop the last of each class's order when
    classes are added. Scores are those of the model at the end of the task, in closed form from features and logits.

    Args:
        size: number of images; None is 2000, or what `bytes` allow.
        bytes: of uint8 pixels at the size the model sees, as a number or a text such as "50MB", in place of `size`; a
            sequence of frames takes those of all its frames, and one that does not fit is left out.
        selection: `reservoir`: a uniform sample of everything seen; `class_balanced`: random within the class;
            `herding`: their mean follows the class's; `kmeans`: nearest to the centroids of as many clusters as there
            is room for; `el2n`, `grand`, `influence`: by the length of the error, by the length of the last layer's
            gradient, and by its product with those of the whole class.
        position: with `el2n`, `grand` and `influence`: `top` keeps the highest scores, `offset` too but for the
            highest tenth, `mid` those around the median, `bottom` the lowest. None is `mid`.
    """

    def __init__(
        self,
        size: int | None = None,
        bytes: float | str | None = None,
        selection: Selection = "reservoir",
        position: Position | None = None,
    ) -> None:
        if size is not None and bytes is not None:
            raise ValueError(f"size={size} and bytes={bytes!r} are two budgets for one memory: give one of them")
        if selection not in _SCORED:
            without_effect(f"with selection={selection!r}, which has no scores", position=position)
        super().__init__(_SIZE if size is None else size, "reservoir" if selection == "reservoir" else "class_balanced")
        self.budget = None if bytes is None else count_bytes(bytes)
        self.counts_frames = self.budget is not None
        self.chooses: Selection = selection
        self.position: Position = position or "mid"
        self._ready: tuple[int, Data] | None = None  # task and what was computed once of the images kept

    def grow(self, learner: Core) -> None:
        """Turn bytes into a number of images.

        Raises:
            ValueError: when no image fits.
        """
        if self.budget is not None:
            each = learner.image_bytes
            if self.budget < each:
                raise ValueError(
                    f"bytes={self.budget}: expected at least {each}, what one image takes at the size the model sees"
                )
            self.size = self.budget // each

    def begin(self, learner: Core) -> None:
        """Refuse, at a task's start, what would otherwise fail when the first lost image is drawn.

        Raises:
            ValueError: when a task's data is not at hand any more, or no sequence of frames would fit.
        """
        if self.budget is not None and len(learner.task.train):
            shortest = int(frames_of(learner.task.train).min())
            if shortest > self.size:
                raise ValueError(
                    f"bytes={self.budget}: expected at least {shortest * learner.image_bytes}, what the shortest "
                    f"sequence of {shortest} frames takes at the size the model sees"
                )
        for index in torch.unique(self.refs[:, 0]).tolist():
            task = learner.tasks[index]
            if not len(task.train) or lies_elsewhere(task.train):
                raise gone(task)

    def check(self, learner: Core) -> None:
        """Refuse a choice that is another one in disguise; known when all parts have grown.

        Raises:
            ValueError: for `grand` where the last layer's inputs all have the same length.
        """
        if self.chooses == "grand" and not learner.objective.linear:
            raise ValueError(
                "selection='grand' is 'el2n' here: class vectors are compared by direction, and features of unit "
                "length give every gradient the error's length; write selection='el2n'"
            )
        if learner.online and self.chooses not in ("reservoir", "class_balanced"):
            raise ValueError(
                f"selection={self.chooses!r} chooses among all images of a task, which --online never tells: write "
                "selection='reservoir' or 'class_balanced'"
            )
        if self.chooses == "influence" and not learner.objective.one_row:
            raise ValueError(
                "selection='influence' multiplies gradients of a head, which are too large where it "
                "is a vocabulary: write selection='el2n'"
            )

    def remember(self, learner: Core, task: Task) -> None:
        """Offer the task's training examples, at its end; without borders those of the step, after it."""
        if learner.online:
            return self.add(task, learner.generator("memory", learner.step), torch.tensor(learner.newest))
        generator = learner.generator("memory")
        order = None if self.chooses in ("reservoir", "class_balanced") else self._order(learner, task, generator)
        self.add(task, generator, order)
        self._ready = None
        return None

    def recall(self, learner: Core, rows: Tensor, like: Batch, view: Augment | None = None) -> Batch:
        """The images at `rows` of `refs`, with all that the batch `like` holds.

        What the encoder's constant part makes of them is computed once a task, unless a `view` changes them.

        Args:
            learner: with the tasks' data at hand.
            rows: (n,).
            like: a batch in training.
            view: how the images are changed, anew in every step.
        """
        kept = like.keys() - READ or any(getattr(each, "seen", None) is not None for each in like.get("tokens", ()))
        if view is None and kept and not learner.online:  # else it would be another set in every step
            old = self._prepared(learner).__getitems__(rows.tolist())
        else:
            old = read_references(learner.tasks, self.refs[rows])
        old = to(learner.backbone.prepare(old), learner.device)
        if view is not None:
            old = view(old, learner.generator("view of old images", learner.step))
        return learner.cache.complete(old, like)

    def seen(self, learner: Core, rows: Tensor, like: Batch) -> Batch:
        """The images at `rows` as training sees new ones: changed as the run changes images, else computed once."""
        return self.recall(learner, rows, like, None if learner.augment is AUGMENTS["none"] else learner.augment)

    def measures(self, learner: Core) -> dict[str, float]:
        """Bytes of the images that are referred to, at the size the model sees."""
        return {"referenced_bytes": float(self.images * learner.image_bytes)}

    def _prepared(self, learner: Core) -> Data:
        if self._ready is None or self._ready[0] != learner.task.index:
            kept = BufferView(learner.tasks, self.refs)
            self._ready = learner.task.index, learner.cache.of(kept, passes=2)
        return self._ready[1]

    def _order(self, learner: Core, task: Task, generator: torch.Generator) -> Tensor:
        """Positions of the task's examples, of each class as many as it may keep, best first."""
        if learner.objective.one_row:
            features, labels = learner.features(task.train)
            residuals, inputs = last_layer(learner, features, labels)
        else:
            features, residuals = of_answers(learner, task.train)
            labels, inputs = task.train.labels.to(features.device), features
        most = -(-self.size // len(torch.unique(torch.cat([self.refs[:, 2].to(labels.device), labels]))))
        found = []
        for c in torch.unique(labels).tolist():
            mine = (labels == c).nonzero().flatten()
            if self.chooses == "herding":
                best = selection_scores.herding(features[mine], most)
            elif self.chooses == "kmeans":
                best = selection_scores.kmeans(features[mine], most, generator)
            else:
                best = selection_scores.by_score(self._scores(residuals[mine], inputs[mine]), self.position)
            found.append(mine.cpu()[best[:most]])
        return torch.cat(found)

    def _scores(self, residuals: Tensor, inputs: Tensor) -> Tensor:
        if self.chooses == "el2n":
            return selection_scores.el2n(residuals)
        if self.chooses == "grand":
            return selection_scores.grand(residuals, inputs)
        return selection_scores.influence(residuals, inputs)


class Rehearsal(Method):
    """Base of methods that remember old examples; the memory refers to the tasks' training sets.

    Args:
        memory: which examples.
    """

    lacks: ClassVar[str] = "nothing to teach"
    """What it has where nothing is trained."""

    def __init__(self, memory: ExemplarBuffer) -> None:
        super().__init__()
        self.memory = memory

    def grow(self, learner: Core, task: Task) -> None:
        """Make room in the memory."""
        self.memory.grow(learner)

    def check(self, learner: Core, task: Task) -> None:
        """Refuse what would have no effect; known when all parts have grown."""
        check_trained(learner, self, self.lacks)
        self.memory.check(learner)

    def begin_task(self, learner: Core, task: Task) -> None:
        """Draw what is recalled."""
        self.memory.begin(learner)

    def after_step(self, learner: Core, batch: Batch) -> None:
        """Without borders, offer the step's new examples to the memory."""
        if learner.online:
            self.remember(learner, learner.task)

    def end_task(self, learner: Core, task: Task) -> None:
        """Offer the task's examples to the memory; those without labels are none of its classes."""
        if not (learner.online or task.pretext):
            self.remember(learner, task)

    def remember(self, learner: Core, task: Task) -> None:
        """Offer what was learnt last, see `ExemplarBuffer.remember`."""
        self.memory.remember(learner, task)

    def measures(self, learner: Core) -> dict[str, float]:
        """Bytes of the images that the memory refers to, at the size the model sees."""
        return self.memory.measures(learner)
