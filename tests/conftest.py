"""The laboratory: a tiny seeded backbone and a stream of random pictures, on one thread and without a network."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # where a test takes two threads, one must not spin for the other

import pytest
import torch
from perdure_pocket import CLIP
from safetensors.torch import load_file, save_file

from perdure.backbones.base import Backbone
from perdure.core.learner import Core
from perdure.streams import build_stream
from perdure.training.config import RunConfig, make_backbone, make_method, make_objective
from perdure.training.loop import Progress, Quiet, TrainConfig, fit_task
from perdure.training.run import resume, run
from perdure.types import Row, Scenario, Stream, Task

torch.set_num_threads(1)
# A power cut is not what these tests are about, and waiting for the disk is a tenth of a run; commands that are
# started as processes of their own do wait.
os.fsync = lambda _: None


def pytest_itemcollected(item: pytest.Item) -> None:
    """A file's tests share its fixtures, so one of several processes runs them all, unless grouped otherwise."""
    if item.get_closest_marker("xdist_group") is None:
        item.add_marker(pytest.mark.xdist_group(item.location[0]))


class Crash(Exception):
    """A power cut: nothing in the package knows this exception."""


class Breaks(Quiet):
    """Crashes at a step of a task, or once a task is learnt when the step is None."""

    def __init__(self, task: int, step: int | None = None) -> None:
        self.place, self.index = (task, step), -1

    def task(self, task: Task, tasks: int | None, epochs: int, steps: int) -> None:
        self.index = task.index

    def step(self, step: int, loss: torch.Tensor, images: int) -> None:
        if (self.index, step) == self.place:
            raise Crash

    def scores(self, task: Task, rows: list[Row]) -> None:
        if (task.index, None) == self.place:
            raise Crash


@dataclass(frozen=True)
class Laboratory:
    """How experiments are set up: milliseconds a step."""

    tasks: int = 3
    classes: int = 2
    per_class: int = 8
    noise: float = 0.7
    scenario: Scenario = "class"
    objective: str = "classify"
    dim: int = 16
    fused: bool = True
    layers: int | None = None
    lr: float = 1e-2
    epochs: int = 2
    seed: int = 0
    precision: str = "fp32"

    def but(self, **changes: Any) -> "Laboratory":
        """The same with changes."""
        return replace(self, **changes)

    @property
    def text(self) -> bool:
        return not self.objective.startswith("classify")

    def config(self, method: str, **more: Any) -> RunConfig:
        """What `run` takes; attention is fixed, for a measurement would make runs differ."""
        stream = (
            f"synthetic(tasks={self.tasks}, classes_per_task={self.classes}, per_class={self.per_class}, "
            f"test_per_class=4, noise={self.noise}, scenario={self.scenario!r})"
        )
        if self.objective.startswith("retrieve"):
            stream = f"captions_synthetic(tasks={self.tasks}, test_per_task=8, scenario={self.scenario!r})"
        if self.speaks:
            stream = f"as_questions({stream}, question='Which?')"
        settings = {
            "stream": stream,
            "backbone": self.backbone_spec,
            "objective": self.objective,
            "epochs": self.epochs,
            "batch_size": 8,
            "lr": self.lr,
            "seed": self.seed,
            "precision": self.precision,
            "attention": "sdpa",
            "device": "cpu",
            "save_every": 1000,
        }
        return RunConfig(method=method, **settings | more)

    def train_config(self, **more: Any) -> TrainConfig:
        return TrainConfig(**{"epochs": self.epochs, "batch_size": 8, "lr": self.lr} | more)

    @property
    def speaks(self) -> bool:
        return self.objective.startswith("generate")

    @property
    def backbone_spec(self) -> str:
        if self.speaks:
            return f"tiny_mllm(dim={self.dim})"
        return f"tiny(dim={self.dim}, fused={self.fused}, text={self.text}, layers={self.layers})"

    def backbone(self) -> Backbone:
        return make_backbone(self.backbone_spec)

    def stream(self) -> Stream:
        return build_stream(self.config("probe").stream, self.backbone().preprocess, self.seed)

    def learner(self, method: str) -> Core:
        objective = make_objective(self.objective, method)
        return Core(self.backbone(), objective, make_method(method), self.scenario, self.seed)

    def teach(self, learner: Core, tasks: Any, **more: Any) -> Core:
        """Learn `tasks` one after another, in memory."""
        for task in tasks:
            learner.grow(task)
            fit_task(learner, task, self.train_config(**more))
        return learner

    @staticmethod
    def descend(learner: Core, task: Task, steps: int = 4) -> None:
        """Train on a task that `learner` has grown for, without ending it."""
        learner.train()
        learner.prepare()
        learner.method.check(learner, task)
        learner.method.begin_task(learner, task)
        optimizer = torch.optim.Adam(learner.trainable().values(), 2e-2)
        batch = task.train.__getitems__(range(len(task.train)))
        for _ in range(steps):
            optimizer.zero_grad()
            learner.loss(batch).backward()
            optimizer.step()

    @staticmethod
    def close(learner: Core, task: Task) -> None:
        """End a task."""
        learner.method.finalize(learner, task)
        learner.method.end_task(learner, task)
        learner.prepare()
        learner.learnt += 1

    def taught(self, method: str, **more: Any) -> Core:
        """A learner that has learnt the whole stream."""
        return self.teach(self.learner(method), self.stream(), **more)

    def run(self, method: str, out: Path, **more: Any) -> dict[str, Any]:
        return run(self.config(method, **more), out)

    def stopped_run(self, method: str, out: Path, place: tuple[int, int | None], **more: Any) -> None:
        """A run that crashes at `place`, (task, step)."""
        with suppress(Crash):
            run(self.config(method, **more), out, Breaks(*place))

    def broken_run(self, method: str, out: Path, *places: tuple[int, int | None], **more: Any) -> None:
        """A run that crashes at each of `places`, (task, step), and is resumed each time.

        A method that trains nothing has no steps to crash at.
        """
        begin: Callable[[Progress], Any] = partial(run, self.config(method, **more), out)
        for place in places:
            with suppress(Crash):
                begin(Breaks(*place))
            torch.manual_seed(987)  # whatever happened before must not matter
            begin = partial(resume, out)
        begin(Quiet())


@pytest.fixture(scope="module", autouse=True)
def plain_figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Figures without ticks, and legends where they fall: these take matplotlib two thirds of a command's time."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name != "test_figures.py":
            patch.setattr("matplotlib.figure.Figure.set_layout_engine", lambda *_, **__: None)
            patch.setattr("matplotlib.axis.Axis.draw", lambda *_: None)
        yield


CERTAIN = ("learnt", "tasks", "rows", "sha256", "trainable_parameters")


def content(folder: Path) -> dict[str, Any]:
    """All of a run's folder that must not depend on how often it was stopped: measurements, tensors, files."""
    found: dict[str, Any] = {"results": (folder / "results.jsonl").read_bytes()}
    summary = json.loads((folder / "summary.json").read_text())
    timed = ("manifest", "seal")  # manifests say how long it took
    found["summary"] = {k: v for k, v in summary.items() if "second" not in k and "peak" not in k and k not in timed}
    for path in sorted(folder.glob("task-*/*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
            found |= {f"{name}: {k}": v.numpy().tobytes() for k, v in load_file(path).items()}
        else:
            kept = json.loads(path.read_text())
            keys = kept if path.name == "source.json" else CERTAIN
            found[name] = {k: kept[k] for k in keys}
    return found


@pytest.fixture(scope="session")
def lab() -> Laboratory:
    """The laboratory with its usual settings."""
    return Laboratory()


@pytest.fixture(scope="session")
def tiny_mllms(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family of multimodal language models -> folder of a tiny random one, as it would lie on the hub."""

    @cache
    def folder(family: str) -> Path:
        from tiny_mllms import build

        if family == "smolvlm":
            pytest.importorskip("num2words", reason="the processor of SmolVLM needs num2words")
        return build(family, tmp_path_factory.mktemp(family))

    return folder


@pytest.fixture(scope="session")
def content_of() -> Any:
    """See `content`."""
    return content


SQUARE = {"height": 32, "width": 32}
WIDTHS = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
TOWER = WIDTHS | {"num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
TEXT = WIDTHS | {"num_hidden_layers": 3, "max_position_embeddings": 24}
CLIP_WORDS = TEXT | {"vocab_size": 8192, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
EFFICIENT = {
    **{"image_size": 32, "hidden_dim": 16, "width_coefficient": 1.0, "depth_coefficient": 1.0, "depth_divisor": 4},
    **{"kernel_sizes": [3, 3], "in_channels": [32, 8], "out_channels": [8, 16], "strides": [1, 2]},
    **{"num_block_repeats": [1, 1], "expand_ratios": [1, 2]},
}


def hugging(kind: str) -> tuple[Any, Any]:
    """A small fresh model of transformers and its image processor."""
    import transformers as t

    words = TEXT | {"vocab_size": 200}
    cropped = {"size": {"height": 37, "width": 37}, "crop_size": SQUARE}
    made: dict[str, Callable[[], tuple[Any, Any]]] = {
        "vit": lambda: (t.ViTForImageClassification(t.ViTConfig(**TOWER)), t.ViTImageProcessor(size=SQUARE)),
        "deit": lambda: (
            t.DeiTModel(t.DeiTConfig(**TOWER), add_pooling_layer=False), t.DeiTImageProcessor(**cropped)
        ),
        "dinov2": lambda: (
            t.Dinov2Model(t.Dinov2Config(**TOWER)), t.BitImageProcessor(size={"shortest_edge": 37}, crop_size=SQUARE)
        ),
        "clip": lambda: (
            t.CLIPModel(t.CLIPConfig(text_config=CLIP_WORDS, vision_config=TOWER, projection_dim=16)),
            t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE),
        ),
        "siglip": lambda: (
            t.SiglipModel(t.SiglipConfig(text_config=CLIP_WORDS | {"projection_size": 32}, vision_config=TOWER)),
            t.SiglipImageProcessor(size=SQUARE),
        ),
        "align": lambda: (
            t.AlignModel(t.AlignConfig(text_config=words, vision_config=EFFICIENT, projection_dim=16)),
            t.EfficientNetImageProcessor(
                **cropped, do_center_crop=True, do_normalize=False, rescale_factor=1 / 127.5, rescale_offset=True,
                include_top=False,
            ),
        ),
        "dual": lambda: (
            t.VisionTextDualEncoderModel(
                t.VisionTextDualEncoderConfig(
                    vision_config=t.ViTConfig(**TOWER).to_dict(), text_config=t.BertConfig(**words).to_dict(),
                    projection_dim=16,
                )
            ),
            t.ViTImageProcessor(size=SQUARE),
        ),
        "chinese_clip": lambda: (
            t.ChineseCLIPModel(t.ChineseCLIPConfig(text_config=words, vision_config=TOWER, projection_dim=16)),
            t.ChineseCLIPImageProcessor(size=SQUARE, crop_size=SQUARE),
        ),
        "bert": lambda: (t.BertModel(t.BertConfig(**words)), None),
        "roberta": lambda: (t.RobertaForMaskedLM(t.RobertaConfig(**words | {"pad_token_id": 1})), None),
    }  # fmt: skip
    return made[kind]()


def shake(model: torch.nn.Module) -> None:
    """Biases and layer norms of a fresh model are trivial; a mix-up of them would not show."""
    for parameter in model.parameters():
        # Convolutions as small as a fresh model's, many on top of each other, tell no images apart.
        parameter.data += (0.5 if parameter.ndim == 4 else 0.05) * torch.randn(parameter.shape)


def write_words(folder: Path) -> None:
    """A vocabulary of single characters, as Chinese models have."""
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    (folder / "vocab.txt").write_text("\n".join([*marks, *letters, *(f"##{c}" for c in letters), *"一只猫狗,."]) + "\n")
    facts = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))


class Saved(dict[str, Path]):
    """Folders of small random models as transformers writes them, each made when it is first asked for."""

    shake, write_words = staticmethod(shake), staticmethod(write_words)

    def __init__(self, root: Path) -> None:
        self.root = root

    def __missing__(self, kind: str) -> Path:
        import transformers

        folder = self[kind] = self.root / kind
        transformers.utils.logging.disable_progress_bar()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, processor = hugging(kind)
            shake(model)
            model.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
        transformers.utils.logging.enable_progress_bar()
        if kind in ("chinese_clip", "align", "dual", "bert", "roberta"):
            write_words(folder)
        else:
            for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
                shutil.copy(CLIP / name, folder)
        return folder


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """See `Saved`; not to be changed."""
    return Saved(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def timm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of timm's test_vit with its classifier, as on the hub."""
    import timm

    file = tmp_path_factory.mktemp("timm") / "vit.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(timm.create_model("test_vit").state_dict(), file)
    return file
