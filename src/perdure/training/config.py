"""What a run is asked to do: one frozen dataclass, which is the command line's help and run.json's content."""

import dataclasses
import math
import shlex
from collections.abc import Container, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from perdure.formatting import Aside, meant, shortened
from perdure.options.own_methods import import_own_methods
from perdure.options.paths import anchored
from perdure.options.ranges import (
    BatchSize,
    Bytes,
    Count,
    Epochs,
    Factor,
    Range,
    Rate,
    Seed,
    check_fields,
    hints_of,
    refuse,
    without_effect,
)
from perdure.options.rates import RATES, RETRIEVING, SPEAKING, USUAL, own_rate
from perdure.options.spec import Spec, build, parse, parse_one
from perdure.training.defaults import usual

if TYPE_CHECKING:  # what only asks, as the command line's help does, waits for no torch
    from perdure.backbones.preprocess import Preprocess
    from perdure.core.method import Method
    from perdure.core.objective import Objective
    from perdure.types import Stream


Precision = Literal["auto", "fp32", "bf16", "fp16"]
Attention = Literal["auto", "eager", "sdpa"]
_DECAY = 0.1
_WARMUP = 0.1
EARLY_SHARE = 0.1
"""Of each class's training images, what early stopping holds out unless told otherwise."""
_BRACKETS = str.maketrans("", "", "()[] ")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How each task is trained."""

    epochs: Epochs = 5
    """Passes over each task's training set."""
    batch_size: BatchSize = 64
    """New examples per step, of all processes together."""
    accumulate: Count = 1
    """Parts in which a step encodes its examples: with the same result, a part takes memory, and a third more time."""
    lr: Rate | None = None
    """Learning rate at the start of each task; the method's own when left out, see `perdure list methods`."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Made anew for every task; sgd has momentum 0.9."""
    weight_decay: Annotated[float, Range(0, 1e4)] = 0.0
    """Of the optimizer; above 0 it also shrinks what old tasks learnt and share."""
    schedule: Literal["cosine", "warmup-cosine", "cosine-epoch", "step", "constant"] = "cosine"
    """Learning rate in a task: half a cosine, a step at a time; the same after a warm-up over a tenth of the steps; a
    quarter, an epoch at a time; a fall at milestones."""
    milestones: str = ""
    """With step: the epochs after which the rate is multiplied by decay, as 4,6,8."""
    decay: Factor | None = None
    """With step: by how much at each of the milestones; 0.1 unless given."""

    early_stop: Annotated[int, Range(0, 10**6)] = 0
    """Epochs without a lower loss on held-out training images after which a task ends; 0 trains all epochs on all
    images."""
    early_stop_share: Annotated[float, Range(0.01, 0.5)] | None = None
    """With early_stop: the share of each class's training images that is held out; 0.1 unless given."""

    def __post_init__(self) -> None:
        # a list or tuple of numbers too, as Python's users write it
        object.__setattr__(self, "milestones", str(self.milestones).translate(_BRACKETS).rstrip(","))
        check_fields(self)
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate={self.accumulate}: expected at most batch_size={self.batch_size}, of which it is parts"
            )
        if not self.early_stop:
            without_effect("without early_stop", early_stop_share=self.early_stop_share)
        elif self.early_stop >= self.epochs:
            raise ValueError(
                f"early_stop={self.early_stop} has no effect within epochs={self.epochs}: give fewer, or more epochs"
            )
        if self.schedule != "step":
            why = f"with schedule={self.schedule!r}, but with 'step'"
            without_effect(why, milestones=self.milestones or None, decay=self.decay)
            if self.schedule == "cosine-epoch" and self.epochs == 1:
                raise ValueError("schedule='cosine-epoch' has no effect in 1 epoch: give more, or 'cosine'")
            return
        if not self._milestones() or sorted({0, *self._milestones()}) != [0, *self._milestones()]:
            raise ValueError(f"milestones={self.milestones!r}: expected numbers of epochs, rising, such as 4,6,8")
        if self._milestones()[-1] >= self.epochs:
            raise ValueError(
                f"milestones={self.milestones!r}: the last has no effect within epochs={self.epochs}: leave it out, or "
                "give more epochs"
            )
        if self.decay == 1:
            raise ValueError(f"decay={self.decay}: expected a factor other than 1, such as 0.1")

    @property
    def held_out(self) -> float:
        """Share of each class's training images that early stopping holds out; 0 without it."""
        share = EARLY_SHARE if self.early_stop_share is None else self.early_stop_share
        return share if self.early_stop else 0.0

    def _milestones(self) -> list[int]:
        words = self.milestones.split(",")
        return [int(word) for word in words] if all(word.isascii() and word.isdecimal() for word in words) else []

    def but(self, **changes: Any) -> Self:
        """The same with changes; another schedule leaves its milestones behind, too few epochs the early stop."""
        refuse({name: value for name, value in changes.items() if name == "epochs"}, hints_of(type(self)))
        if changes.get("epochs", self.epochs) <= self.early_stop:
            changes = {"early_stop": 0, "early_stop_share": None} | changes
        if changes.get("schedule", self.schedule) != self.schedule:
            changes = {"milestones": "", "decay": None} | changes
        return dataclasses.replace(self, **changes)

    @property
    def peak(self) -> float:
        """Learning rate at the start of each task."""
        return USUAL if self.lr is None else self.lr

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a task's step number `step` (from 0) of `steps`."""
        epoch = step * self.epochs // steps
        if self.schedule == "warmup-cosine":
            rising = math.ceil(_WARMUP * steps)
            if step < rising:
                return self.peak * (step + 1) / (rising + 1)
            return self.peak * (0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1))))
        if self.schedule == "cosine":
            return self.peak * (0.5 * (1 + math.cos(math.pi * (step / steps))))
        if self.schedule == "cosine-epoch":
            return self.peak * math.cos(99 * math.pi * epoch / (200 * (self.epochs - 1)))
        fallen = sum(epoch >= milestone for milestone in self._milestones()) if self.schedule == "step" else 0
        return self.peak * (_DECAY if self.decay is None else self.decay) ** fallen


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrainConfig):
    """One method on one stream."""

    stream: str
    """What is learnt, as 'cifar100(tasks=10)' or 'images(path="my/photos", tasks=5)'; see `perdure list streams`."""
    backbone: str = "pocket()"
    """The pre-trained model, such as 'clip(path="openai/clip-vit-base-patch16")'; see `perdure list backbones`."""
    method: str = "inflora(rank=10)"
    """How, such as 'inflora(rank=10) + replay(size=2000)'; see `perdure list methods`."""
    objective: str = "classify()"
    """What is asked: classify() learns heads, zeroshot() compares with class names, retrieve() images with captions;
    generate() lets a language model answer."""
    augment: Literal["none", "flip", "crop", "zoom"] = "none"
    """Random views of training images."""
    calibrate: Annotated[float, Range(0, 0.5)] = 0.0
    """Share of each class's training images set apart, for `predict --calibrated`; with 0 all are trained on."""
    seed: Seed = 0
    """All randomness, and the order of classes unless the stream fixes it; see vary."""
    vary: str = "order,start"
    """What the seed changes, with commas between: order (of classes or tasks), images (which train images per_class,
    per_task or shots keep), start (first values, batches, all else that is random). The rest is as with seed 0."""
    precision: Precision = "auto"
    """Of the encoder: auto takes bf16 where it is native and faster: on GPUs that have it, CPUs with AMX and AMD's with
    avx512_bf16. fp16 is for GPUs without it: the loss is scaled (GradScaler), and a step whose gradients overflow is
    left out."""
    attention: Attention = "auto"
    """auto takes sdpa; eager where a CPU computes in bf16 and an image, or a question about it, has <= 256 tokens."""
    device: str = "auto"
    """cpu, cuda, mps, ..."""
    shard: Literal["none", "blocks"] = "none"
    """With blocks, each of several processes holds a part of every block of the frozen encoder (FSDP2)."""
    compile: bool = False
    """Compute training steps with compiled vision blocks (torch.compile): the same results but for rounding."""
    save_every: Annotated[int, Range(0, 10**9)] = 0
    """Steps between snapshots within a task; 0 saves as often as costs at most 2 % of the time."""
    cache: str = ""
    """Folder in which what frozen parts of the model make of images is kept for other runs, whose results it does not
    change; without it, in memory, as far as that goes."""
    cache_bytes: Bytes = 20e9
    """Of that folder; what was not read for longest goes first."""

    online: bool = False
    """One pass over the whole stream, without telling where a task begins or ends; accuracy on each of its tasks is
    measured along the way. What needs borders is refused."""
    evaluate: str = "every"
    """After each task, old ones too: 'every', each on its whole test set; 'sample:500', on that many examples of each;
    'last', none. A task that was just learnt, and after the last task all, are measured whole."""
    retain: tuple[str, ...] = ()
    """Held-out data measured before the stream and after each task: with generate() evaluation sets such as
    'mme(path="MME")' and streams of questions; with a CLIP streams of images, by zero-shot accuracy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.cache and self.cache_bytes != 20e9:
            without_effect("without cache", cache_bytes=self.cache_bytes)
        if self.cache:
            object.__setattr__(self, "cache", str(Path(self.cache).absolute()))
        if self.online:
            if self.epochs not in (1, TrainConfig.epochs):
                raise ValueError(f"epochs={self.epochs} has no effect with --online, which is one pass: leave it out")
            object.__setattr__(self, "epochs", 1)
            why = "with --online, where no task is set apart"
            without_effect(why, calibrate=self.calibrate or None, early_stop=self.early_stop or None)
        # What is written down must lead to the same files wherever it is read.
        for name in ("stream", "backbone", "method"):
            object.__setattr__(self, name, anchored(getattr(self, name)))
        object.__setattr__(self, "retain", tuple(map(anchored, self.retain)))
        measured_between(self.evaluate)
        object.__setattr__(self, "vary", ",".join(_varied(self.vary)))

    def seed_of(self, what: str) -> int:
        """The seed of one of `VARIED`, which is this run's where it is varied."""
        return self.seed if what in self.vary.split(",") else 0

    def settled(self) -> Self:
        """The same with the learning rate that is taken where none is given."""
        return self if self.lr is not None else self.but(lr=self.recommended())

    def recommended(self) -> float:
        """The learning rate of its method: of classes by their names at most 1e-3, of texts that of its objective."""
        objective = parse_one(self.objective).name
        if usual(self.backbone):
            return SPEAKING
        if objective == "retrieve":
            return RETRIEVING
        own = own_rate(self.method)
        return min(own, USUAL) if objective == "zeroshot" else own

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


VARIED = {"order": "class order", "images": "images drawn", "start": "start"}
"""What a seed can change, and what tables call it."""


def _varied(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if wrong := [word for word in words if word not in VARIED]:
        raise ValueError(
            f"vary={text!r}: expected some of {','.join(VARIED)}, not {wrong[0]!r}{meant(wrong[0], VARIED)}"
        )
    return [word for word in VARIED if word in words]


def measured_between(evaluate: str) -> int | None:
    """How many test examples of an old task are measured between the first and the last task; None for all of them.

    Raises:
        ValueError: when `evaluate` is none of every, last, and sample with a number.
    """
    if evaluate in ("every", "last"):
        return None if evaluate == "every" else 0
    kind, _, count = evaluate.partition(":")
    if kind != "sample" or not (count.isascii() and count.isdecimal() and 0 < int(count) <= 10**9):
        raise ValueError(f"evaluate={evaluate!r}: expected every, last, or sample:500 with a number from 1 to 1e9")
    return int(count)


BESIDE_RESULTS = ("save_every", "cache", "cache_bytes")
"""Fields of `RunConfig` on which no result depends."""


def flags(values: Mapping[str, Any], without: Container[str] = ()) -> list[str]:
    """The flags of the command line that make a run's configuration: those whose values are not the defaults.

    Args:
        values: of `RunConfig`'s fields, by name; what is missing has its default.
        without: fields to leave out.
    """
    words = []
    for field in dataclasses.fields(RunConfig):
        value = values.get(field.name, field.default)
        several = isinstance(value, list | tuple)
        if field.name not in without and (value if several else value != field.default):
            words.append(f"--{field.name.replace('_', '-')}")
            words += [] if value is True else map(str, value if several else [value])
    return words


def register() -> None:
    """Import all methods and pretexts, which makes them known by name."""
    import_module("perdure.methods")
    import_module("perdure.pretraining")
    import_own_methods()


FORMER: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "cosine": ("objective", {"cosine": True}, {}),
    "layers": ("backbone", {"layers": 2}, {"last": "layers"}),
}
"""Former methods that are options of something else now, which a part of that name still sets: for one release.

Of what, what it always sets, and how options of the method that have another name now are called.
"""


def make_method(text: str) -> "Method":
    """A method from its spec: `lora(rank=8) + replay(size=200)`."""
    from perdure.core.method import METHODS, Method, compose

    register()
    specs = parse(text)
    # an empty part stands for a former one, so that saved learners keep the keys of the others
    empty = {name: type(name, (Method,), {"name": name}) for name in FORMER}
    parts = [empty[s.name]() if s.name in empty else build(s, METHODS, "method") for s in specs]
    for part, spec in zip(parts, specs, strict=True):
        part.spec = str(spec)
    method = compose(parts)
    method.spec = " + ".join(map(str, specs))
    return method


def make_objective(text: str, method: str = "") -> "Objective":
    """An objective from its spec, with what former parts of `method` set."""
    from perdure.objectives import OBJECTIVES

    return one(with_former(text, "objective", method), OBJECTIVES, "objective")  # type: ignore[no-any-return]


def with_former(text: str, kind: str, method: str) -> str:
    """The spec `text` of an objective, or what else a `kind` is, with the options that former parts of `method` set."""
    options: dict[str, Any] = {}
    for part in parse(method) if method else ():
        of, fixed, renamed = FORMER.get(part.name, ("", {}, {}))
        if of == kind:
            options |= fixed | {renamed.get(k, k): v for k, v in part.kwargs}
    if not options:
        return text
    own = parse_one(text)
    return str(Spec(own.name, tuple((dict(own.kwargs) | options).items()), own.parts))


def former_parts(config: RunConfig) -> str:
    """What to write in place of a method with former parts; empty where it has none."""
    parts = parse(config.method)
    if not (former := [part.name for part in parts if part.name in FORMER]):
        return ""
    rest = " + ".join(str(part) for part in parts if part.name not in FORMER) or "probe"
    kinds = dict.fromkeys(FORMER[name][0] for name in former)
    more = [f"--{each} {shlex.quote(with_former(getattr(config, each), each, config.method))}" for each in kinds]
    return " ".join([f"{former[0]} is no method any more, but an option: write --method {shlex.quote(rest)}", *more])


def said_of(config: RunConfig) -> list[str]:
    """What who begins with a configuration should know: what is written in an old way, and the rate that is taken."""
    taken, objective = config.recommended(), parse_one(config.objective).name
    rated = any(part.name in RATES for part in parse(config.method))
    whose = f"that of {shortened(config.method)}" if rated else "as for what has none of its own"
    if usual(config.backbone) or objective == "retrieve":
        whose = f"as for {'language models' if usual(config.backbone) else objective}"
    elif taken < own_rate(config.method):
        whose = f"the highest for {objective}"
    parts, heads = make_method(config.method), objective == "classify"
    trains = any(p.changes_encoder or p.rehearses == "all" or (p.trains and heads) for p in parts)
    rate = Aside(f"learning rate {taken:g}, {whose}; --lr gives another") if trains and config.lr is None else ""
    return [*filter(None, [former_parts(config), rate])]


def make_backbone(text: str, method: str = "") -> Any:
    """A backbone from its spec, with what former parts of `method` set.

    Raises:
        ValueError: when there is none, or its weights are not finite.
    """
    from perdure.backbones import BACKBONES

    backbone = one(with_former(text, "backbone", method), BACKBONES, "backbone")
    backbone.check_finite()
    return backbone


def make_stream(config: RunConfig, preprocess: "Preprocess") -> "Stream":
    """The stream of a run as it is learnt: in its order, with its images as `preprocess` says, one task if online."""
    from perdure.streams import build_stream
    from perdure.training.online import as_one

    draw = config.seed_of("images") if "images" in config.vary.split(",") else None
    stream = build_stream(config.stream, preprocess, config.seed_of("order"), draw=draw)
    return as_one(stream, config.seed_of("start")) if config.online else stream


def one(text: str, registry: Any, kind: str, **given: Any) -> Any:
    """What a spec without `+` names."""
    specs = parse(text)
    if len(specs) != 1:
        raise ValueError(f"--{kind} {text!r}: expected one {kind}, not a sum; only methods can be combined with +")
    return build(specs[0], registry, kind, **given)
