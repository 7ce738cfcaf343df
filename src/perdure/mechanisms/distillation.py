"""A teacher: the learner as it was, kept as a snapshot of what is trained; no second backbone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.adapters.state import BufferDict
from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.types import Batch, Task

Likeliest = tuple[Tensor, Tensor]
"""Tokens int64 (n, k) and the logarithms of their probabilities, float32 (n, k + 1), the last of all other tokens."""
EXPERTS, EXPERTS_OF = "experts", "experts_of"
"""In a batch that brings it: what finished specialists say of each class, as logarithms of shares (B, classes); and the
number of the one who says it, int64 (B, classes), the same in every row."""
_TOP = 64
_LEAST = -60.0  # logarithm of a probability that counts as none


class Teacher(nn.Module):
    """What the learner answered when `snapshot` was called, although it has been trained since.

    Only parameters in training are kept, while the task lasts; everything else does not change in it.

    Args:
        name: under which what it says is kept.
        outputs: what it says of single examples, see `Objective.output`.
    """

    def __init__(self, name: str, outputs: Sequence[str] = ()) -> None:
        super().__init__()
        self.name, self.outputs = name, tuple(outputs)
        self.weights = BufferDict()  # name of a parameter of the learner -> its value

    def snapshot(self, learner: Core) -> None:
        """Take the learner as it is."""
        self.clear()
        for name, parameter in learner.trainable().items():
            self.weights[name] = parameter.contiguous()

    def clear(self) -> None:
        """Drop the snapshot."""
        self.weights.clear()

    def precompute(self, learner: Core, batch: Batch) -> Batch:
        """What it says of each example of a training set, (B, ...), for `Method.precompute`."""
        said = self(learner, batch) if self.weights and learner.training else {}
        return {f"{self.name}/{output}": value for output, value in said.items()}

    def forward(self, learner: Core, batch: Batch) -> Batch:
        """Its `outputs` for `batch`, by name, as they were computed before or else asked for now; without gradients."""
        names = {output: f"{self.name}/{output}" for output in self.outputs}
        if batch.keys() >= set(names.values()):
            return {output: batch[name] for output, name in names.items()}
        return self.ask(learner, batch)

    def distributions(self, learner: Core, batch: Batch, old: bool = False) -> list[Tensor]:
        """What the objective answered by, see `Objective.distributions`."""
        if self.outputs:
            return learner.objective.distributions(None, batch | self(learner, batch), old)
        with self.swapped_in(learner):
            return learner.objective.distributions(learner.encode(batch), batch, old)

    def tokens(self, learner: Core, batch: Batch, top: int | None, temperature: float) -> list[Likeliest]:
        """Of answers in words its `top` likeliest tokens at each place of each answer; None is 64."""
        if (known := f"{self.name}/tokens") in batch:
            found: list[Likeliest] = batch[known]
            return found
        (scores,) = self.distributions(learner, batch)
        counts = torch.bincount(learner.objective.owners(batch), minlength=len(batch["label"])).tolist()
        return [likeliest(each, top or _TOP, temperature) for each in torch.split(scores, counts)]

    def precompute_tokens(self, learner: Core, batch: Batch, top: int | None, temperature: float) -> Batch:
        """The same of each example of a training set, for `Method.precompute`."""
        asked = self.weights and learner.training
        return {f"{self.name}/tokens": self.tokens(learner, batch, top, temperature)} if asked else {}

    def ask(self, learner: Core, batch: Batch) -> Batch:
        """The same, asked for now."""
        with self.swapped_in(learner):
            return {output: learner.objective.output(learner, batch, output) for output in self.outputs}

    @contextmanager
    def swapped_in(self, learner: Core) -> Iterator[None]:
        """Within, `learner` answers as it did: in evaluation mode, without gradients; then it is what it has become."""
        # by pointer, not by torch.func: some parts hold parameters of others, which a call with other values misses
        now = dict(learner.named_parameters())  # which within a step of meta-learning are no parameters, but tensors
        swapped = [(now[name], self.weights[name]) for name in sorted(self.weights)]
        present, training = [parameter.data for parameter, _ in swapped], learner.training
        try:
            for parameter, value in swapped:
                parameter.data = value
            learner.eval()
            with torch.no_grad():
                yield
        finally:
            learner.train(training)
            for (parameter, _), value in zip(swapped, present, strict=True):
                parameter.data = value


def distillation(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), the mean over rows (Hinton et al., 2015, arXiv:1503.02531).

    The factor T² keeps gradients of about the same size at any temperature.

    Args:
        teacher: scores (n, k).
        student: scores (n, k), which get the gradient.
        temperature: T, positive; a higher one counts small scores more.
    """
    wanted, given = (F.log_softmax(scores / temperature, dim=1) for scores in (teacher, student))
    return temperature**2 * F.kl_div(given, wanted, reduction="batchmean", log_target=True)


def likeliest(scores: Tensor, top: int, temperature: float) -> Likeliest:
    """The `top` likeliest columns of each row of softmax(scores / T), kept on the CPU."""
    tokens = scores.topk(min(top, scores.shape[1]), dim=1).indices
    return tokens.cpu(), _grouped(tokens, scores, temperature).cpu()


def held_to(said: Sequence[Likeliest], student: Tensor, temperature: float) -> Tensor:
    """`distillation` where of the teacher only the likeliest columns are known, and all others count as one.

    Args:
        said: by the teacher, of n places in all.
        student: scores (n, columns), which get the gradient.
        temperature: of both.
    """
    tokens, wanted = (torch.cat(each).to(student.device) for each in zip(*said, strict=True))
    given = _grouped(tokens, student, temperature)
    return temperature**2 * F.kl_div(given, wanted, reduction="batchmean", log_target=True)


def _grouped(tokens: Tensor, scores: Tensor, temperature: float) -> Tensor:
    logs = F.log_softmax(scores.float() / temperature, dim=1)
    rest = logs.scatter(1, tokens, -torch.inf).logsumexp(1, keepdim=True)
    # a vocabulary that is kept as a whole leaves no rest, whose logarithm would have no gradient
    return torch.cat([logs.gather(1, tokens), rest.clamp_min(_LEAST)], dim=1)


class Distillation(Method):
    """Base of methods that hold what a teacher says, from the second task on; `strength` is the weight.

    Args:
        outputs: what the teacher is asked for, see `Objective.output`.
    """

    protects = "encoder"
    strength: float

    def __init__(self, outputs: Sequence[str] = ()) -> None:
        super().__init__()
        self.teacher = Teacher(self.name)
        self.ask_for(outputs)

    def ask_for(self, outputs: Sequence[str]) -> None:
        """Settle what the teacher says."""
        self.teacher.outputs = tuple(outputs)

    def holds(self, task: Task) -> bool:
        """Whether there is anything to keep in `task`: what the pre-trained model knows, where labels teach nothing."""
        return bool(self.strength and (task.index or task.pretext))

    def begin_task(self, learner: Core, task: Task) -> None:
        """Take the learner as teacher."""
        if self.holds(task):
            self.teacher.snapshot(learner)

    def check(self, learner: Core, task: Task) -> None:
        """Refuse a task in which nothing moves; known when all parts have grown."""
        if self.holds(task):
            check_moves(learner, task, self)

    def precompute(self, learner: Core, batch: Batch) -> Batch:
        """What the teacher says of each example."""
        return self.teacher.precompute(learner, batch)

    def end_task(self, learner: Core, task: Task) -> None:
        """Let the teacher go."""
        self.teacher.clear()


def check_moves(learner: Core, task: Task, part: Method) -> None:
    """Raise `ValueError` when `part` holds an encoder that `task` does not train."""
    if not trains_encoder(learner):
        raise ValueError(
            f"task {task.number}: {part.name} has no effect where no part trains the encoder any more: take one that "
            f"does in every task, as in 'lora + {part.name}', or leave {part.name} out"
        )


def trains_encoder(learner: Core) -> bool:
    """Whether the current task trains more than heads: if not, what a teacher says of features is what they are."""
    heads = {id(p) for p in learner.objective.parameters()}
    return any(id(p) not in heads for p in learner.trainable().values())


@contextmanager
def specialised(learner: Core, task: Task, epochs: int, lr: float, batch_size: int) -> Iterator[None]:
    """Within, `learner` is what becomes of it when `task` alone is trained, by the objective's loss; then as before.

    Args:
        learner: in training, grown for `task`.
        task: with its training data.
        epochs: passes over it.
        lr: learning rate of Adam.
        batch_size: examples a step.

    Raises:
        ValueError: when a parameter is not finite in the end.
    """
    trained = list(learner.trainable().values())
    before = [p.detach().clone() for p in trained]
    groups = [{"params": each["params"], "lr": lr * each["scale"]} for each in learner.param_groups()]
    optimizer, step = torch.optim.Adam(groups, lr), 0
    try:
        for epoch in range(epochs):
            order = torch.randperm(len(task.train), generator=learner.generator("expert order", epoch))
            for batch in learner.batches(task.train, batch_size, order):
                batch = learner.augment(batch, learner.generator("expert augment", step))
                loss = learner.plain_loss(batch)
                optimizer.zero_grad()
                with learner.undivided():  # what is encoded once more on the way back is all here
                    learner.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                learner.processes.average_gradients(trained)
                learner.scaler.step(optimizer)
                learner.scaler.update()
                step += 1
        if not all(torch.isfinite(p).all() for p in trained):
            raise ValueError(f"task {task.number}: its specialist diverged: give a lower lr than {lr:g}")
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(trained, before, strict=True):
                p.copy_(old)
                p.grad = None
