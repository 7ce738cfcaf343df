"""A continual-learning method: a handful of hooks, every one optional."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from perdure.backbones.sites import Tower, named_towers
from perdure.core.objective import Head
from perdure.options.ranges import checked, without_effect
from perdure.types import AnyLearner, Batch, Data, Task

METHODS: dict[str, type[Method]] = {}
"""Every method by name; a class registers itself by `class Mine(Method, name="mine")`."""

FORMER_HOOKS = {"encode": "applied", "embed": "applied", "record": "precompute", "concludes": "finalize"}
"""What a class may define no more -> the hook in its place."""
_EXCLUSIVE = ("predict", "data", "backward")


class Method(nn.Module):
    """Base of all methods; by itself, trains the head on frozen features.

    `__init__` stores options, checked against its annotations (see `options.ranges`) before it is called. Everything a
    method remembers is a parameter, a submodule or in `BufferDict`, so that `state_dict()` is its whole memory and a
    stopped run can go on exactly. Randomness comes from `learner.generator(purpose)`. Hooks return; they never write
    into the trainer.
    """

    name: ClassVar[str]
    spec: str = ""
    """The text it was made from, where it was; a checkpoint of another one is refused."""
    changes_encoder: ClassVar[bool] = False
    """Whether it changes what the encoder gives."""
    trains_shared: bool = False
    """Whether tasks train the same encoder parameters: those that regularisers can protect."""
    sole_adapter: ClassVar[bool] = False
    """Whether what it promises, or relies on, breaks when another part changes the encoder too."""
    protects: ClassVar[Literal["", "shared_parameters", "encoder"]] = ""
    """What a method that only guards other parts needs one of them to do: share parameters, or adapt at all."""

    needs: ClassVar[tuple[str, ...]] = ()
    """Of what its objective must ask for one, if it needs any: `classes`, `captions`, `conversations`."""
    rehearses: ClassVar[Literal["", "some", "all"]] = ""
    """Which examples of old tasks it trains on, if any; one part that does is enough."""
    gradient_projection: ClassVar[bool] = False
    """Whether it only keeps steps from raising the loss on old examples, which training on all of them does too."""
    derived: ClassVar[tuple[str, ...]] = ()
    """Attributes with tensors that are made anew wherever they are missing, and so need not be saved."""
    carrier: ClassVar[bool] = False
    """Whether messages name it where a part that trains the encoder is missing."""
    unlabelled: Literal["", "untaught", "any"] = ""
    """Whether it can stand in a step of pre-training, which has no labels: only before classes are taught, or any."""
    follows_task: ClassVar[bool] = False
    """Whether it answers by what a task has taught where a batch says which one, under `task`."""
    trains: bool = True
    """Whether anything is trained by it alone: heads, or what makes features."""
    borderless: bool = False
    """Whether it can learn in one pass in which no task is announced: see `Core.online`."""
    batchwise: bool = False
    """Whether what it makes of an example depends on the others: several processes, or parts, cannot share a batch."""
    encodes_once: bool = False
    """Whether it counts what is encoded in a step, which is not to be encoded anew for its gradients."""
    divides: bool = False
    """Whether it sets parts of a batch against each other, and so learns plainly from one example."""
    learns_aside: bool = False
    """Whether what learns computes in training mode only, and answers go by former tasks until the task has ended."""
    treats: frozenset[str] = frozenset()
    """Towers that compute in another way within `applied`."""

    def __init_subclass__(cls, name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if former := [hook for hook in FORMER_HOOKS if hook in vars(cls)]:
            raise TypeError(f"{cls.__name__}.{former[0]} is a hook no more: define {FORMER_HOOKS[former[0]]!r} instead")
        if name:
            if name in METHODS and METHODS[name].__qualname__ != cls.__qualname__:
                raise ValueError(f"two methods are named {name!r}: {METHODS[name]} and {cls}; rename one")
            cls.name, METHODS[name] = name, cls
            if "__init__" in vars(cls):
                cls.__init__ = checked(cls.__init__)  # type: ignore[method-assign]

    def __iter__(self) -> Iterator[Method]:
        """Its parts; a method by itself is its own only part."""
        yield self

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Those of its parameters that all tasks train: all when it `trains_shared`, unless it says otherwise."""
        return self.parameters() if self.trains_shared else ()

    # Structure: a function of the task's description alone, so that a resumed run can replay it.
    def grow(self, learner: AnyLearner, task: Task) -> None:
        """Make room for `task`: new branches, heads, prompts; decide what is trained."""

    def check(self, learner: AnyLearner, task: Task) -> None:
        """Raise `ValueError` for what cannot be, or would have no effect, in a task that all parts have grown for.

        Depends on descriptions only: a run asks for all of its tasks before the first. Training asks again.
        """

    # Task boundaries: may read the task's data.
    def data(self, learner: AnyLearner, task: Task) -> Data:
        """What the task is trained on; its own training set unless a method says otherwise."""
        return task.train

    def begin_task(self, learner: AnyLearner, task: Task) -> None:
        """Prepare from the task's data, before the first step."""

    def finalize(self, learner: AnyLearner, task: Task) -> None:
        """Decide what the trained parameters will be, after the last step: all parts do before any `end_task`."""

    def end_task(self, learner: AnyLearner, task: Task) -> None:
        """Remember what later tasks need, of the parameters as they will be."""

    def measures(self, learner: AnyLearner) -> dict[str, float]:
        """Facts about the method itself after a task, for results and report: `{"free_dimension/<input>": 120}`."""
        return {}

    # Steps, in the order in which they run.
    def precompute(self, learner: AnyLearner, batch: Batch) -> Batch:
        """What it wants to know of each example beside it, as `{name: (B, ...)}`: what no training of the task changes.

        Asked of each part of a composition. Computed once for a training set where images stay as they are, else in
        every step; what `batch` holds already is not computed again. In evaluation mode it may give only what never
        changes: a test set's is kept for good.
        """
        return {}

    def batch(self, learner: AnyLearner, batch: Batch) -> Batch:
        """The batch that is trained on, e.g. with old examples mixed in."""
        return batch

    def penalty(self, learner: AnyLearner, batch: Batch, features: Tensor) -> Tensor | float:
        """What is added to the objective's loss."""
        return 0.0

    def backward(self, learner: AnyLearner, loss: Tensor, batch: Batch) -> None:
        """Fill the gradients from the loss of `batch`; at most one part of a composition may define it."""
        loss.backward()  # type: ignore[no-untyped-call]

    def after_backward(self, learner: AnyLearner) -> None:
        """Change gradients."""

    def after_step(self, learner: AnyLearner, batch: Batch) -> None:
        """Look at, or change, parameters after the optimizer's step."""

    def param_groups(self, learner: AnyLearner) -> dict[str, float]:
        """Names of trainable parameters whose learning rate differs -> factor."""
        return {}

    # Inference.
    def applied(self, learner: AnyLearner, batch: Batch, tower: str) -> AbstractContextManager[None]:
        """Within, `tower` computes on `batch` as this method has it: features, embeddings, and what a model generates.

        For what adapters and prompts in the tower do not do by themselves, such as prompts that each input chooses.

        Args:
            learner: whose backbone.
            batch: what the tower reads, on its device; of texts what `tokenise` gave, and in training `label` (n,)
                where classes are known.
            tower: one of the backbone's; those that a method `treats` are all that it is asked for.
        """
        return nullcontext()

    def predict(self, learner: AnyLearner, batch: Batch) -> Tensor:
        """Scores (B, seen classes) of a batch; must not depend on which examples share the batch. Of one part.

        Reads features with `learner.encode`: where these are known already, as in an evaluation, images are gone.
        """
        scores: Tensor = learner.objective.scores(learner.encode(batch))
        return scores

    def head(self, learner: AnyLearner) -> Head:
        """What an export needs to give what `predict` does; who defines that and not this cannot be exported."""
        raise NotImplementedError


class Compose(Method):
    """Several methods as one: additive hooks run in the order written, exclusive ones have one owner.

    At a task's end those that treat a tower come first, so that the others see the features that will be used.

    Raises:
        ValueError: when two parts define the same exclusive hook, a part stands twice, or a part that guards others
            has none to guard.
    """

    def __init__(self, parts: Sequence[Method]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        names = [part.name for part in parts]
        if twice := [n for n in names if names.count(n) > 1]:
            raise ValueError(f"{twice[0]} stands twice in {' + '.join(names)}; write each part once")
        for hook in _EXCLUSIVE:
            owners = [p for p in parts if _defines(p, hook)]
            if len(owners) > 1:
                clash = " and ".join(p.name for p in owners)
                raise ValueError(f"{clash} cannot be combined: each defines {hook!r}; keep one of them")

    def _owner(self, hook: str) -> Method | None:
        return next((p for p in self if _defines(p, hook)), None)

    def __iter__(self) -> Iterator[Method]:
        for part in self.parts:
            assert isinstance(part, Method)
            yield part

    def grow(self, learner: AnyLearner, task: Task) -> None:
        """See `Method.grow`."""
        for part in self:
            part.grow(learner, task)

    def check(self, learner: AnyLearner, task: Task) -> None:
        """See `Method.check`."""
        for part in self:
            part.check(learner, task)

    def data(self, learner: AnyLearner, task: Task) -> Data:
        """See `Method.data`."""
        owner = self._owner("data")
        return task.train if owner is None else owner.data(learner, task)

    def begin_task(self, learner: AnyLearner, task: Task) -> None:
        """See `Method.begin_task`; parts that change the encoder come first, so that others see it as it will train."""
        for part in sorted(self, key=lambda part: not part.changes_encoder):
            part.begin_task(learner, task)

    def finalize(self, learner: AnyLearner, task: Task) -> None:
        """See `Method.finalize`."""
        for part in self:
            part.finalize(learner, task)

    def end_task(self, learner: AnyLearner, task: Task) -> None:
        """See `Method.end_task`."""
        for part in sorted(self, key=lambda part: not part.treats):
            part.end_task(learner, task)

    def measures(self, learner: AnyLearner) -> dict[str, float]:
        """See `Method.measures`; what two parts measure adds up."""
        facts: Counter[str] = Counter()
        for part in self:
            facts.update(part.measures(learner))
        return dict(facts)

    def batch(self, learner: AnyLearner, batch: Batch) -> Batch:
        """See `Method.batch`."""
        for part in self:
            batch = part.batch(learner, batch)
        return batch

    def penalty(self, learner: AnyLearner, batch: Batch, features: Tensor) -> Tensor | float:
        """See `Method.penalty`."""
        total: Tensor | float = 0.0
        for part in self:
            total = total + part.penalty(learner, batch, features)
        return total

    def after_backward(self, learner: AnyLearner) -> None:
        """See `Method.after_backward`."""
        for part in self:
            part.after_backward(learner)

    def after_step(self, learner: AnyLearner, batch: Batch) -> None:
        """See `Method.after_step`."""
        for part in self:
            part.after_step(learner, batch)

    def param_groups(self, learner: AnyLearner) -> dict[str, float]:
        """See `Method.param_groups`."""
        return {k: v for part in self for k, v in part.param_groups(learner).items()}

    def backward(self, learner: AnyLearner, loss: Tensor, batch: Batch) -> None:
        """See `Method.backward`."""
        owner = self._owner("backward")
        return super().backward(learner, loss, batch) if owner is None else owner.backward(learner, loss, batch)

    def predict(self, learner: AnyLearner, batch: Batch) -> Tensor:
        """See `Method.predict`."""
        owner = self._owner("predict")
        return super().predict(learner, batch) if owner is None else owner.predict(learner, batch)


def parts_of(method: Method) -> tuple[Method, ...]:
    """The parts of a composition; a method by itself is its own only part."""
    return tuple(method)


def compose(parts: Sequence[Method]) -> Method:
    """One method from its parts, refused when it could have no effect.

    Raises:
        ValueError: see `Compose`, or when a part would protect nothing.
    """
    for guard in (p for p in parts if p.protects):
        shared = guard.protects == "shared_parameters"
        if not any(p.trains_shared if shared else p.changes_encoder for p in parts):
            lacks = "trains parameters that tasks share" if shared else "changes the encoder"
            written = " + ".join(p.spec or p.name for p in parts)
            raise ValueError(
                f"{guard.name} has nothing to protect in {written!r}: no part {lacks}. Write {_carried(guard)}"
            )
    if len(twice := [p.name for p in parts if p.rehearses]) > 1:
        raise ValueError(
            f"{twice[0]} cannot be combined with {twice[1]}: each trains on images of old tasks; keep one of them"
        )
    every = [p.name for p in parts if p.rehearses == "all"]
    if every and (idle := [p.name for p in parts if p.gradient_projection]):
        raise ValueError(
            f"{idle[0]} has nothing to protect beside {every[0]}, which trains on all old images: keep one of them"
        )
    for promise in (p for p in parts if p.sole_adapter):
        if free := [p.name for p in parts if p.changes_encoder and p is not promise]:
            raise ValueError(
                f"{promise.name} cannot be combined with {free[0]}, which changes what the encoder gives wherever it "
                f"likes: what {promise.name} protects or relies on would be void. Use one of the two"
            )
    return parts[0] if len(parts) == 1 else Compose(parts)


def _carried(part: Method) -> str:
    """Sums of `part` with one that trains the encoder, as they would be written."""
    return " or ".join(f"'{name} + {part.name}'" for name in sorted(METHODS, reverse=True) if METHODS[name].carrier)


def check_tower(learner: AnyLearner, part: Method, tower: Tower) -> None:
    """Raise `ValueError` when `part` is asked for a tower that the objective never reads with."""
    read = learner.objective.towers
    if deaf := [each for each in named_towers(tower) if each not in read]:
        remedy = "use --objective zeroshot or retrieve, or tower='vision'"
        if deaf[0] != "text":
            remedy = f"write tower={min(read)!r}"
        what = "no texts" if deaf[0] == "text" else f"nothing of the {deaf[0]} tower"
        raise ValueError(f"{part.name}(tower={tower!r}): this objective reads {what}: {remedy}")


def check_mask(learner: AnyLearner, mask: bool | None) -> None:
    """Raise `ValueError` when an option `mask` was given and would change nothing."""
    if "classes" not in learner.objective.asks:
        competing = "tokens" if "conversations" in learner.objective.asks else "pairs"
        without_effect(f"where {competing} compete, and not classes", mask=mask)
    if learner.scenario == "domain":
        without_effect("where every task has all classes", mask=mask)
    if mask and not learner.objective.masked_loss:
        without_effect("beside a part that lets all seen classes compete", mask=mask)


def _defines(part: Method, hook: str) -> bool:
    return getattr(type(part), hook) is not getattr(Method, hook)


def penalises(method: Method) -> bool:
    """Whether a part adds to the objective's loss."""
    return any(_defines(part, "penalty") for part in parts_of(method))


def treated(method: Method) -> frozenset[str]:
    """Towers of which a part replaces what the backbone plainly computes."""
    return frozenset(tower for part in parts_of(method) for tower in part.treats)


def follows_task(method: Method) -> bool:
    """Whether a part answers by what a task has taught, where it is told which one."""
    return any(part.follows_task for part in parts_of(method))


def predicts(method: Method) -> bool:
    """Whether a part replaces the objective's scores, which for classes not yet learnt it may not have."""
    return any(_defines(part, "predict") for part in parts_of(method))


def check_trained(learner: AnyLearner, part: Method, lacks: str) -> None:
    """Raise `ValueError` when nothing is trained that answers depend on, so that `part` has no effect.

    Args:
        learner: with a task begun.
        part: who asks.
        lacks: what it then has not, as "no gradient to project".
    """
    deaf = next((p.name for p in parts_of(learner.method) if predicts(p)), None)
    if all(deaf and name.startswith("objective.") for name in learner.trainable()):
        why = f"{deaf} answers without the heads, and nothing else" if deaf else "nothing"
        raise ValueError(f"{part.name} has {lacks}: {why} is trained. Write {_carried(part)}")
