"""A row may be a token: a tiny LLaVA, put together here, learns with the same methods as an image classifier."""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from perdure.backbones import Backbone
from perdure.backbones.preprocess import Preprocess
from perdure.core.learner import Core
from perdure.core.objective import Objective
from perdure.training.config import make_method
from perdure.training.loop import TrainConfig, fit_task
from perdure.types import Batch, Data, Task, Union, join, take, to

VOCABULARY, IMAGE, DIM = 96, 95, 16
CONFIG = TrainConfig(epochs=2, batch_size=4, lr=1e-2)


class Llava(Backbone):
    """Features are the hidden states in front of answer tokens."""

    spec, dim, preprocess = "llava", DIM, Preprocess(size=8, resize=8)

    def __init__(self) -> None:
        super().__init__()
        block = {"hidden_size": DIM, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**block, image_size=8, patch_size=4),
            text_config=LlamaConfig(**block, vocab_size=VOCABULARY, max_position_embeddings=32),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = LlavaForConditionalGeneration(config).eval()

    def towers(self) -> dict[str, str]:
        parts = {"vision": "vision_tower", "projector": "multi_modal_projector", "language": "language_model"}
        return {tower: f"model.model.{name}" for tower, name in parts.items()}

    def prepare(self, batch: Batch) -> Batch:
        return batch | {"tokens": [torch.tensor([IMAGE] * 4 + prompt + said) for prompt, said in batch["conversation"]]}

    def forward(self, batch: Batch) -> Tensor:
        ids = torch.nn.utils.rnn.pad_sequence(batch["tokens"], batch_first=True)
        hidden = self.model.model(ids, self.normalise(batch["image"])).last_hidden_state
        answers = zip(hidden, map(len, batch["tokens"]), batch["conversation"], strict=True)
        return torch.cat([row[end - 1 - len(said) : end - 1] for row, end, (_, said) in answers])


class Answers(Objective):
    """Cross-entropy of answer tokens over the vocabulary."""

    asks, towers, outputs = frozenset({"conversations"}), frozenset({"vision", "projector", "language"}), ()
    one_row = vectorised = False

    def bind(self, learner: Core) -> None:
        self._learner = [learner]

    def scores(self, features: Tensor) -> Tensor:
        return self._learner[0].backbone.model.lm_head(features)

    def targets(self, batch: Batch) -> Tensor:
        return torch.tensor([token for _, said in batch["conversation"] for token in said])

    def owners(self, batch: Batch) -> Tensor:
        return torch.tensor([i for i, (_, said) in enumerate(batch["conversation"]) for _ in said])

    def only_task_classes(self, batch: Batch) -> bool:
        return False

    def distributions(self, features: Tensor | None, batch: Batch, old: bool = False) -> list[Tensor]:
        return [self.scores(features)]

    def chance_loss(self, batch: Batch, only_task: bool) -> float:
        return math.log(VOCABULARY)

    def evaluate(self, learner: Core, tasks: Sequence[Task], size: int = 256) -> list[dict[str, float]]:
        with learner.inference():
            return [{"accuracy": self._share(learner, task, size)} for task in tasks]

    def _share(self, learner: Core, task: Task, size: int) -> float:
        read = list(learner.batches(learner.cache.test(task.test), size))
        right = [self.scores(learner.encode(batch)).argmax(1) == self.targets(batch) for batch in read]
        return float(torch.cat(right).float().mean())


class Conversations:
    """Questions of one or two tokens about noise, of one kind a task; answers of one to three tokens."""

    def __init__(self, kind: int, count: int = 8) -> None:
        generator = torch.Generator().manual_seed(kind)
        self.images = torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
        self.labels = torch.full((count,), kind)
        self.said = [([kind + 1] * (1 + i % 2), [10 + kind + i % 3] * (1 + i % 3)) for i in range(count)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        picked = list(positions)
        return {
            "image": self.images[picked],
            "label": self.labels[picked],
            "conversation": [self.said[i] for i in picked],
        }


def tasks() -> list[Task]:
    return [Task(i, f"kind {i}", (i,), (str(i),), 2, Conversations(i), Conversations(i, 6)) for i in range(2)]


def learner(method: str) -> Core:
    return Core(Llava(), Answers(), make_method(method))


def taught(method: str, save: Callable[..., None] | None = None) -> Core:
    pupil = learner(method)
    for task in tasks():
        pupil.grow(task)
        fit_task(pupil, task, CONFIG, save_step=save and (lambda *at: save(pupil, *at)))
    return pupil


LANGUAGE = "tower='language'"
# every method through the real loaders: tests/contract/test_language.py
METHODS = [
    f"lora(rank=2, {LANGUAGE})",
    *(f"lora(rank=2, {LANGUAGE}) + {part}" for part in ("ewc", "lwf", "derpp(size=6)")),
]


def loss_on(pupil: Core, task: Task) -> float:
    (batch,) = pupil.batches(task.test, 99)
    with torch.no_grad():
        return float(pupil.objective.loss(pupil.encode(batch), batch))


@pytest.mark.parametrize("method", METHODS)
def test_a_language_model_learns_its_answers_and_goes_on_after_a_stop_bit_for_bit(method: str) -> None:
    saved: list[Any] = []

    def save(pupil: Core, step: int, optimizer: torch.optim.Optimizer) -> None:
        if pupil.task.index == 1 and step == 2:
            saved.extend(deepcopy([pupil.learnt_state(), optimizer.state_dict()]))

    straight, resumed = taught(method, save), learner(method)
    for task in tasks():
        resumed.grow(task)
    assert loss_on(straight, task) < loss_on(resumed, task)
    resumed.learnt = 1
    resumed.load_state_dict(saved[0], strict=False)
    fit_task(resumed, resumed.task, CONFIG, resumed=(2, lambda optimizer: optimizer.load_state_dict(saved[1])))
    wanted, found = straight.learnt_state(), resumed.learnt_state()
    assert wanted.keys() == found.keys()
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []


class Largest(TorchDispatchMode):
    """The most numbers that any tensor has whose last dimension is the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple | list) else [found]:
            if isinstance(each, Tensor) and each.shape[-1:] == (VOCABULARY,):
                self.most = max(self.most, each[..., 0].numel())
        return found


@pytest.mark.parametrize("method", [METHODS[0], f"{METHODS[0]} + lwf", f"{METHODS[0]} + derpp(size=6)"])
def test_logits_are_made_of_answer_tokens_only(method: str) -> None:
    pupil, (_, task) = taught(method), tasks()
    (batch,) = pupil.batches(task.train, 99)
    with Largest() as seen:
        pupil.loss(batch).backward()
    rows = len(pupil.objective.owners(batch))
    assert rows <= seen.most < 2 * rows + 9 < sum(map(len, batch["tokens"]))


@pytest.mark.parametrize(
    ("method", "constant"),
    [
        ("probe", True),
        (f"lora(rank=2, {LANGUAGE})", False),
        ("lora(rank=2, at='mlp', tower='projector')", False),
        ("lora(rank=2, tower='vision')", False),
    ],
)
def test_features_are_constant_only_where_no_tower_that_is_read_is_adapted(method: str, constant: bool) -> None:
    pupil = learner(method)
    pupil.grow(tasks()[0])
    assert pupil.constant_encoder == constant
    assert pupil.constant_blocks == 0
    assert pupil.cache.test(tasks()[0].test).__getitems__([0]).keys() == {"image", "label", "conversation"}


@pytest.mark.parametrize("tower", ["text", "both"])
def test_a_text_tower_that_is_adapted_leaves_features_of_images_constant_and_no_embedding(tower: str, lab: Any) -> None:
    pupil = lab.but(objective="zeroshot").learner(f"lora(rank=2, tower={tower!r})")
    pupil.grow(lab.stream().tasks[0])
    assert (pupil.constant_encoder, pupil.constant_texts) == (tower == "text", False)


def test_batches_of_tensors_and_python_values_are_joined_taken_and_moved_alike() -> None:
    data: list[Data] = [Conversations(0), Conversations(1)]
    whole, rows = join([each.__getitems__(range(8)) for each in data]), torch.tensor([9, 0, 3])
    taken = to(take(whole, rows), torch.device("cpu"))
    assert taken["conversation"] == [data[1].said[1], data[0].said[0], data[0].said[3]]
    read = Union(data).__getitems__(rows.tolist())
    assert read.keys() == taken.keys()
    assert all(torch.equal(torch.as_tensor(read[name]), taken[name]) for name in ("image", "label"))
    assert read["conversation"] == taken["conversation"]
