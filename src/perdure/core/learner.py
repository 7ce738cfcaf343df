"""The one module that is trained, saved, used and exported: backbone + objective + method."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import chain, islice
from typing import Any, Self, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch.amp import GradScaler

from perdure.adapters.injection import adapted, fold
from perdure.backbones.base import Backbone
from perdure.backbones.language import Language
from perdure.backbones.model_parts import beside_language
from perdure.core.caching import FEATURES, LOWER_BLOCKS, Cache
from perdure.core.data_parallel import SharedOut
from perdure.core.feature_store import FeatureStore
from perdure.core.method import Method, parts_of, penalises, predicts, treated
from perdure.core.objective import Objective, asking
from perdure.core.pretext import Pretext, begin_pretext
from perdure.core.temperature import Temperature
from perdure.process import Turn, plain, seeded
from perdure.streams.augment import AUGMENTS, Augment
from perdure.types import Batch, Data, Scenario, Stream, Task, to

T = TypeVar("T")


class Core(SharedOut):
    """A backbone, what is asked of it, and how it learns; knows the tasks that it has grown for.

    Args:
        backbone: the pre-trained model; frozen here, a method may thaw it.
        objective: loss, scores and evaluation.
        method: the algorithm.
        scenario: which classes may be answered at test time.
        seed: all randomness derives from it.
    """

    def __init__(
        self, backbone: Backbone, objective: Objective, method: Method, scenario: Scenario = "class", seed: int = 0
    ) -> None:
        super().__init__()
        if deaf := [p for p in parts_of(method) if p.needs and objective.asks.isdisjoint(p.needs)]:
            name, needs = deaf[0].name, " or ".join(deaf[0].needs)
            raise ValueError(
                f"{name} needs {needs}, and {objective.name} learns {' and '.join(objective.asks)}: leave it out of "
                f"{method.spec or name!r}, or use --objective {asking(*deaf[0].needs)}"
            )
        if backbone.layers and objective.open_vocabulary and not predicts(method):
            raise ValueError(
                f"{backbone.spec} gives features that class names and captions cannot be compared with: use "
                "--objective classify, or add ncm or ranpac"
            )
        self.backbone = backbone.requires_grad_(False).eval()
        self.fingerprint = backbone.fingerprint()  # now, before anything is learnt
        self.objective, self.method = objective, method
        self.pretext: Pretext | None
        self.register_module("pretext", None)  # what takes the objective's place in a step of pre-training
        self.scenario, self.seed = scenario, seed
        self.tasks: list[Task] = []
        self.tested: Sequence[Task] | None = None  # of these as much of their tests as is measured now; None for all
        self.learnt = 0  # number of tasks behind us
        self.step = 0  # within the current task
        self.online = False  # whether it learns in one pass, without being told where a task begins or ends
        self.newest = range(0)  # then: where the new examples of the step stand in the task's training set
        self.last_epoch = False  # whether that step belongs to the task's last
        self.precision = torch.float32  # of the encoder
        self.scaler = GradScaler("cpu", enabled=False)  # of the loss, made anew for every task; for float16 only
        self.looked: Callable[[int], None] | None = None  # told of each batch that is read: how many examples it has
        self.augment: Augment = AUGMENTS["none"]
        self.calibrate = 0.0  # share of each task's images that are set apart to fit the temperature to
        self.temperature = Temperature()
        self.kept: dict[int, tuple[Data, Data]] = {}  # by identity: test sets with what never changes of them
        self.still: dict[int, tuple[Data, Data]] = {}  # and with features, while no task moves these
        self.store: FeatureStore | None = None  # of features on disk
        self.turn = Turn()
        self._answering = False

    @property
    def stream(self) -> Stream:
        """The tasks grown so far, as a stream."""
        return Stream("", self.scenario, tuple(self.tasks))

    @property
    def task(self) -> Task:
        """The task last grown for."""
        return self.tasks[-1]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.backbone.parameters()).device

    def train(self, mode: bool = True) -> Self:
        """As in `nn.Module`; the backbone always stays in evaluation mode (no dropout, as in the published codes)."""
        super().train(mode)
        self.backbone.eval()
        return self

    def generator(self, purpose: str, step: int | None = None) -> torch.Generator:
        """Randomness derived from what it is for, never carried along; so it needs no saving."""
        index = self.task.index if self.tasks else 0
        return torch.Generator().manual_seed(derived_seed(self.seed, index, purpose, step))

    def grow(self, task: Task, over: bool = False) -> None:
        """Make room for `task`, which may be `over`. Depends on descriptions only, so a resumed run can replay it."""
        self.tasks.append(task)
        with plain(), seeded(derived_seed(self.seed, task.index, "grow")):
            if len(self.tasks) == 1:  # before, the method adapted nothing: what was asked then was no constant
                self.kept.clear()
                self.still.clear()
            self.objective.grow(self, task)
            self.method.grow(self, task)
            self.objective.grown(self)
            self.pretext = begin_pretext(self, task) if task.pretext and not over else None
        self.to(self.device)

    def encode(self, batch: Batch) -> Tensor:
        """Features (B, dim) in float32."""
        if FEATURES in batch:
            known: Tensor = batch[FEATURES]
            return known
        owners = None if self.objective.one_row else self.objective.owners
        features = self.shared_out(batch, self.in_parts(self._encode), owners)
        return self._checked(features, "features of images")

    def _encode(self, batch: Batch) -> Tensor:
        entered = batch.get(LOWER_BLOCKS)
        with (
            self.computing(),
            nullcontext() if entered is None else self.backbone.entering(self.constant_blocks, entered),
            self.applied(batch),
        ):
            features: Tensor = self.backbone(batch)
        return features.float()

    def embed_texts(self, texts: Sequence[str], labels: Tensor | None = None, task: Task | None = None) -> Tensor:
        """Embeddings (n, dim) in float32 of `texts`, in the space of the features, not normalised.

        Args:
            texts: any number of them.
            labels: class of each, int64 (n,), where it is known; used in training only.
            task: which they belong to, where that is known.
        """
        if not texts:
            return torch.zeros(0, self.backbone.dim, dtype=torch.float32, device=self.device)
        tokens = self.backbone.tokenised(texts)
        known = tokens | {"label": labels} if self.training and labels is not None else tokens
        if task is not None:
            known = known | {"task": torch.full((len(texts),), task.index, device=self.device)}

        def embed(known: Batch) -> Tensor:
            with self.computing(), self.applied(known, "text"):
                return self.backbone.encode_tokens({name: known[name] for name in tokens}).float()

        return self._checked(self.shared_out(known, self.in_parts(embed)), "embeddings of texts")

    @contextmanager
    def applied(self, batch: Batch, *towers: str) -> Iterator[None]:
        """Within, `towers`, or those that make features, compute on `batch` as the method has it: `Method.applied`."""
        with ExitStack() as stack:
            for part in parts_of(self.method):
                for tower in towers or self.encoder:
                    if tower in part.treats:
                        stack.enter_context(part.applied(self, batch, tower))
            yield

    @property
    def applies_alike(self) -> bool:
        """Whether towers that make features compute alike, whichever example they read: no part chooses by it."""
        parts = [part for part in parts_of(self.method) if type(part).applied is not Method.applied]
        return not any(tower in part.treats for part in parts for tower in self.encoder)

    @property
    def encoder(self) -> tuple[str, ...]:
        """The towers that make features: those that the objective reads, but one of texts, which embeds by itself."""
        return tuple(t for t in self.backbone.towers() if t in self.objective.towers and t != "text")

    def _checked(self, answer: Tensor, what: str) -> Tensor:
        """`answer`, which is finite wherever it is asked for; in training a whole task is looked at, see `train`."""
        if self._answering and not torch.isfinite(answer).all():
            remedy = "go back to an earlier task, or learn again with a lower lr"
            raise ValueError(f"{what} are not finite (NaN or infinite), so there is no answer: {remedy}")
        return answer

    def forward_towers(self, batch: Batch) -> None:
        """Let each tower read what it reads in a step: images, and texts where the objective has any."""
        self.encode(batch)
        texts, labels = self.objective.texts(self, batch)
        if texts:
            self.embed_texts(texts, labels)

    def computing(self) -> Any:
        """The context in which the encoder runs.

        A frozen encoder is itself in the run's precision (see `prepare`). One that is trained stays in float32 and its
        matrix products are cast.
        """
        if self.precision == torch.float32 or not self.tunes_backbone:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.precision)

    @property
    def image_bytes(self) -> int:
        """Bytes of an image in uint8, at the size the model sees."""
        return 3 * self.backbone.preprocess.size**2

    @property
    def tunes_backbone(self) -> bool:
        """Whether pre-trained weights themselves are trained."""
        return any(p.requires_grad for p in self.backbone.parameters())

    def prepare(self) -> None:
        """Make ready for training: a frozen encoder in the run's precision, finished updates in its weights.

        With frozen weights and activations in bfloat16 a step on a CPU is faster than under autocast, which casts
        weights, residuals and norms again and again (benchmarks/speed.py). What is trained, heads and scores stay in
        float32. Before the first task the encoder stays as it came, for adapters copy the weights to fold into then.
        """
        if self.precision != torch.float32 and self.tasks and not self.tunes_backbone:
            self.backbone.to(self.precision)
        fold(self.backbone, branches=False)

    def loss(self, batch: Batch) -> Tensor:
        """Objective, or pretext, plus penalty."""
        if self.pretext is not None:
            loss = self.pretext.loss(self, batch)
            return loss + self.method.penalty(self, batch, self.encode(batch)) if penalises(self.method) else loss
        features, batch = self.encode(batch), self.objective.embed_texts(self, batch)
        return self.objective.loss(features, batch) + self.method.penalty(self, batch, features)

    def plain_loss(self, batch: Batch) -> Tensor:
        """The objective's alone."""
        features, batch = self.encode(batch), self.objective.embed_texts(self, batch)
        return self.objective.loss(features, batch)

    def forward(self, batch: Batch) -> Tensor:
        """Scores (B, seen classes)."""
        return self.method.predict(self, batch)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that the current task trains."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def shared(self) -> dict[str, nn.Parameter]:
        """Trainable parameters that outlive the task: not the branches that a method opens for one task only."""
        parts = parts_of(self.method)
        own = {id(p) for part in parts for p in part.parameters()}
        own -= {id(p) for part in parts for p in part.shared_parameters()}
        own |= {id(p) for p in self.pretext.parameters()} if self.pretext is not None else set()
        return {name: p for name, p in self.trainable().items() if id(p) not in own}

    def learnt_state(self) -> dict[str, Tensor]:
        """All that was learnt: the state without the frozen backbone."""
        tuned = {f"backbone.{n}" for n, p in self.backbone.named_parameters() if p.requires_grad}
        return {k: v for k, v in self.state_dict().items() if not k.startswith("backbone.") or k in tuned}

    @property
    def cache(self) -> Cache:
        """What is computed once."""
        return Cache(self)

    @property
    def constant_encoder(self) -> bool:
        """Whether features can never change: nothing in the towers that make them is trained or adapted."""
        return not self.tunes_backbone and all(map(self._constant, self.encoder))

    @property
    def constant_texts(self) -> bool:
        """Whether embeddings of texts can never change: nothing in the text tower is trained or adapted."""
        trained = any(p.requires_grad for p in self.backbone.tower_parameters("text").values())
        return not trained and self._constant("text")

    @property
    def constant_sight(self) -> bool:
        """Whether what a language model is given of images can never change: all but its language tower is constant."""
        if not isinstance(self.backbone, Language) or treated(self.method) & {"vision", "projector"}:
            return False
        parts = beside_language(self.backbone.model)
        return not any(adapted(part) or any(p.requires_grad for p in part.parameters()) for part in parts)

    def _constant(self, tower: str) -> bool:
        module = self.backbone.get_submodule(self.backbone.towers()[tower])
        return not adapted(module) and tower not in treated(self.method)

    @property
    def constant_blocks(self) -> int:
        """How many of the lowest vision blocks are neither trained nor adapted, and give no features by themselves."""
        backbone = self.backbone
        if self.tunes_backbone or self.encoder != ("vision",) or treated(self.method) or not backbone.has_blocks():
            return 0
        names = backbone.blocks()
        names = names[: len(names) - (backbone.layers or 0)]
        return next((i for i, n in enumerate(names) if adapted(backbone.get_submodule(n))), len(names))

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Evaluation mode, no gradients, all linear updates folded into the weights; other threads wait their turn."""
        with self.turn, plain():
            within, training, self._answering = self._answering, self.training, True
            try:
                if not within:
                    self.eval()
                    self.prepare()
                    fold(self.backbone, branches=True)
                    self.objective.refresh()
                with torch.inference_mode():
                    yield
            finally:
                if not within:
                    self._answering = False
                    fold(self.backbone, branches=False)
                    self.train(training)

    def scores_of(self, data: Data, size: int = 256) -> Tensor:
        """Scores (n, seen classes) of all of `data`; a batch that does not fit the device's memory is halved."""
        return self._checked(torch.cat(self.each_batch(data, self, size)), "scores")

    def each_batch(self, data: Data, ask: Callable[[Batch], T], size: int = 256) -> list[T]:
        """What `ask` says of each batch of `data`; all are halved when one does not fit the device's memory."""
        while True:
            try:
                return [ask(batch) for batch in self.batches(data, size)]
            except RuntimeError as error:
                if size == 1 or not should_reduce_batch_size(error):
                    raise
            # only now: collecting garbage takes longer than predicting a small set
            clear_device_cache(garbage_collection=True)
            size //= 2

    def features(self, data: Data, size: int = 256) -> tuple[Tensor, Tensor]:
        """Features (n, dim) and labels (n,) of all of `data`, without augmentation."""
        with self.inference():
            pieces = [self.encode(batch) for batch in self.batches(data, size)]
        # cloned: tensors made under inference_mode may not take part in training
        return torch.cat(pieces).clone(), data.labels.to(self.device)

    def training_views(self, data: Data, most: int, purpose: str, size: int = 64) -> Iterator[Batch]:
        """At most `most` random training examples as the training sees them (augmented), in batches."""
        order = torch.randperm(len(data), generator=self.generator(purpose))[:most]
        for number, batch in enumerate(self.batches(data, size, order)):
            yield self.augment(batch, self.generator(purpose, number))

    def param_groups(self) -> list[dict[str, Any]]:
        """What is trained, by its learning rate's factor, for an optimizer: `params` and `scale`."""
        scales = self.method.param_groups(self)
        groups: dict[float, list[nn.Parameter]] = {}
        for name, p in self.trainable().items():
            groups.setdefault(scales.get(name, 1.0), []).append(p)
        return [{"params": params, "scale": scale} for scale, params in groups.items()]

    def batches(self, data: Data, size: int, order: Tensor | None = None) -> Iterator[Batch]:
        """`data` in batches on the learner's device, in `order` (positions) or as it stands."""
        positions: Sequence[int] = range(len(data)) if order is None else order.tolist()
        chunks = (positions[start : start + size] for start in range(0, len(positions), size))
        for batch in _ahead(lambda chunk: self.backbone.prepare(data.__getitems__(chunk)), chunks):
            yield to(batch, self.device)
            if self.looked:
                self.looked(len(batch["label"]))


def _ahead(read: Callable[[Sequence[int]], Batch], chunks: Iterator[Sequence[int]]) -> Iterator[Batch]:
    """`read` of each chunk, one chunk ahead of its use: decoding overlaps with computing.

    The reading thread has its own grad and inference modes, so what data sets keep can be trained on. A single chunk
    overlaps with nothing and is read here.
    """
    ready = list(islice(chunks, 2))
    if len(ready) < 2:
        for chunk in ready:
            with torch.inference_mode(False), torch.enable_grad():
                batch = read(chunk)
            yield batch
        return
    with ThreadPoolExecutor(1, "perdure-read") as pool:
        waiting: deque[Future[Batch]] = deque()
        for chunk in chain(ready, chunks):
            waiting.append(pool.submit(read, chunk))
            if len(waiting) == 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def derived_seed(seed: int, task: int, purpose: str, step: int | None = None) -> int:
    """A seed for one purpose at one place of a run."""
    text = f"{seed}/{task}/{purpose}/{step}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
