"""A memory of past images: how many it may hold, which are kept, and how they come back into training."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.byte_size import count_bytes
from perdure.core.learner import Core
from perdure.mechanisms import selection_scores as orders
from perdure.mechanisms.replay_buffer import BufferView, ReplayBuffer, gone, read
from perdure.mechanisms.selection_scores import Position
from perdure.objectives.classify import Classify
from perdure.options.ranges import without_effect
from perdure.streams.augment import AUGMENTS, Augment
from perdure.streams.image_set import ImageSet
from perdure.streams.sources import Files
from perdure.types import Batch, Data, Task

Selection = Literal["reservoir", "class_balanced", "herding", "kmeans", "el2n", "grand", "influence"]

_SIZE = 2000
_SCORED = ("el2n", "grand", "influence")


class ExemplarBuffer(ReplayBuffer):
    """Past images, chosen by what the learner makes of them at the end of their task.

    All selections but `reservoir` keep equally many of each class seen, and drop the last of each class's order when
    classes are added. Scores are those of the model at the end of the task, in closed form from features and logits.

    Args:
        size: number of images; None is 2000, or what `bytes` allow.
        bytes: of uint8 pixels at the size the model sees, as a number or a text such as "50MB", in place of `size`.
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
            ValueError: when a task's data is not at hand any more.
        """
        for index in torch.unique(self.refs[:, 0]).tolist():
            task = learner.tasks[index]
            if not len(task.train) or _moved(task.train):
                raise gone(task)

    def check(self, learner: Core) -> None:
        """Refuse a choice that is another one in disguise; known when all parts have grown.

        Raises:
            ValueError: for `grand` where the last layer's inputs all have the same length.
        """
        if self.chooses == "grand" and not _linear(learner):
            raise ValueError(
                "selection='grand' is 'el2n' here: class vectors are compared by direction, and features of unit "
                "length give every gradient the error's length; write selection='el2n'"
            )

    def remember(self, learner: Core, task: Task) -> None:
        """Offer the task's training examples, at its end."""
        generator = learner.generator("memory")
        order = None if self.chooses in ("reservoir", "class_balanced") else self._order(learner, task, generator)
        self.add(task, generator, order)
        self._ready = None

    def recall(self, learner: Core, rows: Tensor, like: Batch, view: Augment | None = None) -> Batch:
        """The images at `rows` of `refs`, with all that the batch `like` holds.

        What the encoder's constant part makes of them is computed once a task, unless a `view` changes them.

        Args:
            learner: with the tasks' data at hand.
            rows: (n,).
            like: a batch in training.
            view: how the images are changed, anew in every step.
        """
        if view is None and like.keys() - {"image", "label", "pair", "text"}:
            old = self._prepared(learner).__getitems__(rows.tolist())
        else:
            old = read(learner.tasks, self.refs[rows])
        old = {key: value.to(learner.device) for key, value in old.items()}
        if view is not None:
            old = view(old, learner.generator("view of old images", learner.step))
        return learner.completed(old, like) if like.keys() - old.keys() else {key: old[key] for key in like}

    def seen(self, learner: Core, rows: Tensor, like: Batch) -> Batch:
        """The images at `rows` as training sees new ones: changed as the run changes images, else computed once."""
        return self.recall(learner, rows, like, None if learner.augment is AUGMENTS["none"] else learner.augment)

    def measures(self, learner: Core) -> dict[str, float]:
        """Bytes of the images that are referred to, at the size the model sees."""
        return {"referenced_bytes": float(len(self) * learner.image_bytes)}

    def _prepared(self, learner: Core) -> Data:
        if self._ready is None or self._ready[0] != learner.task.index:
            kept = BufferView(learner.tasks, self.refs)
            self._ready = learner.task.index, learner.recorded(learner.prefixed(learner.encoded(kept)))
        return self._ready[1]

    def _order(self, learner: Core, task: Task, generator: torch.Generator) -> Tensor:
        """Positions of the task's examples, of each class as many as it may keep, best first."""
        features, labels = learner.features(task.train)
        residuals, inputs = last_layer(learner, features, labels)
        most = -(-self.size // len(torch.unique(torch.cat([self.refs[:, 2].to(labels.device), labels]))))
        found = []
        for c in torch.unique(labels).tolist():
            mine = (labels == c).nonzero().flatten()
            if self.chooses == "herding":
                best = orders.herding(features[mine], most)
            elif self.chooses == "kmeans":
                best = orders.kmeans(features[mine], most, generator)
            else:
                best = orders.by_score(self._scores(residuals[mine], inputs[mine]), self.position)
            found.append(mine.cpu()[best[:most]])
        return torch.cat(found)

    def _scores(self, residuals: Tensor, inputs: Tensor) -> Tensor:
        if self.chooses == "el2n":
            return orders.el2n(residuals)
        return (orders.grand if self.chooses == "grand" else orders.influence)(residuals, inputs)


def last_layer(learner: Core, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(f(x)) - onehot(y) over all seen classes, (n, classes), and what the last layer reads, (n, dim).

    The gradient of an example's loss in the last layer's weights is the outer product of the two. A linear head also
    reads a 1 for its bias; where classes are compared by direction (cosine heads, class names) it is the gradient in
    their unit vectors, up to a factor.
    """
    with learner.inference():
        residuals = F.softmax(learner.objective.scores(features), dim=1)
        residuals[torch.arange(len(labels)), learner.objective.columns(labels)] -= 1
    if _linear(learner):
        return residuals.clone(), F.pad(features, (0, 1), value=1.0)
    return residuals.clone(), F.normalize(features, dim=1)


def _moved(data: Data) -> bool:
    """Whether the folder that images would be read from is not there any more."""
    if not isinstance(data, ImageSet) or not isinstance(data.source, Files):
        return False
    return not data.cached and not data.source.root.is_dir()


def _linear(learner: Core) -> bool:
    return isinstance(learner.objective, Classify) and learner.objective.cosine is None
