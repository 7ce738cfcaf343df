"""Export: another library gives the learner's features and scores, or the export is refused."""

import functools
import json
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import timm as timm_library
import torch
import transformers
from peft import AutoPeftModel, PeftModel
from PIL import ExifTags, Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.adapters.injection import Adapter, attach
from perdure.api.learner import Learner
from perdure.backbones import BACKBONES
from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.export.model import export
from perdure.methods.inflora import InfLoRA
from perdure.options.spec import parse_one
from perdure.storage.files import locked
from perdure.streams import build_stream
from perdure.training.loop import TrainConfig, fit_task
from perdure.types import Batch

# PEFT 0.21 reads a property that transformers 5.23 calls deprecated; it says nothing about the export.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

VISION = {"clip": "CLIPVisionModel", "vit": "ViTModel", "deit": "DeiTModel", "dinov2": "Dinov2Model"}
VISION["siglip"] = "SiglipVisionModel"
TIMM = "test_vit"


def pictures(side: int, n: int = 4, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(seed)).byte()


def taught(
    backbone: str, method: str, objective: str = "classify()", tasks: int = 3, precision: str = "fp32"
) -> Learner:
    """A learner after some tasks of two classes each, moved far enough for mistakes to show."""
    options = {"epochs": 2, "lr": 0.02, "batch_size": 4, "precision": precision, "attention": "sdpa", "device": "cpu"}
    learner = Learner.create(backbone, method, objective, **options)
    for task in range(tasks):
        teach(learner, task)
    return learner


def teach(learner: Learner, task: int) -> None:
    images = pictures(learner.backbone.preprocess.size, seed=task)
    learner.learn(images, [f"class {2 * task + i % 2}" for i in range(len(images))])


known = functools.cache(taught)
"""The same for tests that only export, which leaves a learner as it is."""


def spec(family: str, /, **options: str) -> str:
    return f"{family}({', '.join(f'{key}={value!r}' for key, value in options.items())})"


def pixels(learner: Core) -> Tensor:
    return learner.backbone.normalise(pictures(learner.backbone.preprocess.size, seed=9)).float()


def features(learner: Core) -> Tensor:
    with learner.inference():
        return learner.encode({"image": pictures(learner.backbone.preprocess.size, seed=9)}).clone()


def example(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the names in the example of an export's README hold after it was run."""
    code = re.search("```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code
    monkeypatch.chdir(folder)
    found: dict[str, Any] = {}
    exec(code[1], found)
    return found


def scores(learner: Core, images: Tensor) -> Tensor:
    with learner.inference():
        return learner({"image": images}).clone()


def plain(learner: Learner) -> nn.Module:
    """The learner's pre-trained model as its own library loads it."""
    options = dict(parse_one(learner.backbone.spec).kwargs)
    if "name" in options:
        model = timm_library.create_model(options["name"], num_classes=0)
        weights = load_file(options["checkpoint"])
        model.load_state_dict({k: v for k, v in weights.items() if not k.startswith("head.")})
        return model.eval()
    more = {"add_pooling_layer": False} if "/vit" in options["path"] or "/deit" in options["path"] else {}
    kind = type(learner.backbone.model).__name__
    return getattr(transformers, kind).from_pretrained(options["path"], **more)


@torch.no_grad()
def answer(learner: Learner, model: nn.Module) -> Tensor:
    """Features that a plain model gives of the same images."""
    return type(learner.backbone).encode_pixels(Bare(learner.backbone, model), pixels(learner))


class Bare:
    """What `encode_pixels` needs of a backbone, around another model."""

    def __init__(self, backbone: Any, model: nn.Module) -> None:
        self.model, self.pooled = model, getattr(backbone, "pooled", None)


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def rank_of(folder: Path) -> set[int]:
    return {len(v) for k, v in load_file(folder / "adapter_model.safetensors").items() if "lora_A" in k}


@pytest.fixture
def families(saved: dict[str, Path], timm_file: Path) -> dict[str, str]:
    specs = {kind: spec("vision", path=str(saved[kind])) for kind in VISION}
    specs["clip_tower"] = specs.pop("clip")
    return specs | {
        "clip": spec("clip", path=str(saved["clip"])),
        "timm": spec("timm", name=TIMM, checkpoint=str(timm_file)),
    }


FAMILIES = ["clip", "clip_tower", "vit", "deit", "dinov2", "siglip", "timm"]
METHODS_ = ["inflora(rank=3)", "lora(rank=3, at='qkvo,mlp', alpha=6)"]


# A LoRA for PEFT


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS_)
def test_peft_gives_the_features_of_the_learner(
    families: dict[str, str], family: str, method: str, tmp_path: Path
) -> None:
    learner = known(families[family], method)
    folder = learner.export(tmp_path / "lora", "peft")
    model = plain(learner)
    before = answer(learner, model)
    adapted = PeftModel.from_pretrained(model, folder)
    same(answer(learner, adapted), features(learner))
    assert (before - features(learner)).abs().max() > 1e-2  # else equality would say nothing
    assert rank_of(folder) == ({9} if method.startswith("inflora") else {3, 9} if family == "timm" else {3})


def test_auto_classes_of_peft_find_the_pretrained_model(families: dict[str, str], tmp_path: Path) -> None:
    learner = known(families["clip"], "inflora(rank=3)")
    learner.export(tmp_path / "lora", "peft")
    same(answer(learner, AutoPeftModel.from_pretrained(tmp_path / "lora")), features(learner))


def test_rows_of_a_fused_layer_that_learnt_nothing_are_zero(families: dict[str, str], tmp_path: Path) -> None:
    learner = known(families["timm"], "inflora(rank=3, at='kv')")
    learner.export(tmp_path / "lora", "peft")
    up = load_file(tmp_path / "lora" / "adapter_model.safetensors")["base_model.model.blocks.0.attn.qkv.lora_B.weight"]
    width = len(up) // 3
    assert not up[:width].any()
    assert up[width : 2 * width].any()
    assert up[2 * width :].any()


@pytest.fixture
def stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let two methods adapt the same layers, which a third party's may; InfLoRA's promise is no subject of export."""
    monkeypatch.setattr(InfLoRA, "sole_adapter", False)


@pytest.mark.usefixtures("stacked")
def test_two_methods_on_the_same_layers_are_stacked(families: dict[str, str], tmp_path: Path) -> None:
    for family in ("clip", "timm"):
        learner = known(families[family], "lora(rank=2) + inflora(rank=3)")
        folder = learner.export(tmp_path / family, "peft")
        same(answer(learner, PeftModel.from_pretrained(plain(learner), folder)), features(learner))
        assert rank_of(folder) == ({2 + 9} if family == "clip" else {2 + 2 + 9})


@pytest.mark.usefixtures("stacked")
def test_layers_of_different_rank_keep_their_scale(families: dict[str, str], tmp_path: Path) -> None:
    learner = known(families["clip"], "lora(rank=4, at='fc1', alpha=2) + inflora(rank=3)")
    folder = learner.export(tmp_path / "lora", "peft")
    same(answer(learner, PeftModel.from_pretrained(plain(learner), folder)), features(learner))
    assert rank_of(folder) == {4, 9}


def test_updates_that_are_kept_dense_are_exported_in_full(families: dict[str, str], tmp_path: Path) -> None:
    learner = known(families["clip"], "inflora(rank=10)")
    assert "adapters.model/vision_model/encoder/layers/0:qkv.merged.dense/0" in learner.method.state_dict()
    folder = learner.export(tmp_path / "lora", "peft")
    same(answer(learner, PeftModel.from_pretrained(plain(learner), folder)), features(learner))
    assert rank_of(folder) == {32}


# Merged weights


@pytest.mark.usefixtures("stacked")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["inflora(rank=3)", "lora(rank=2) + inflora(rank=3)", "finetune(backbone_lr=0.5)"])
def test_merged_weights_give_the_features_of_the_learner(
    families: dict[str, str], family: str, method: str, tmp_path: Path
) -> None:
    learner = known(families[family], method)
    before, kept = answer(learner, plain(learner)), {k: v.clone() for k, v in learner.backbone.state_dict().items()}
    folder = learner.export(tmp_path / "model", "merged")
    if family == "timm":
        model = timm_library.create_model(f"local-dir:{folder}", pretrained=True).eval()
    else:
        more = {"add_pooling_layer": False} if family in ("vit", "deit") else {}
        model = transformers.AutoModel.from_pretrained(folder, **more)
        assert type(model) is type(learner.backbone.model)
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        assert tuple(processor.image_mean) == learner.backbone.preprocess.mean
    same(answer(learner, model), features(learner))
    assert (before - features(learner)).abs().max() > 1e-2
    assert all(torch.equal(v, kept[k]) for k, v in learner.backbone.state_dict().items())


def test_merged_clip_is_whole_with_tokenizer_and_adapted_texts(families: dict[str, str], tmp_path: Path) -> None:
    learner = known(families["clip"], "lora(rank=3, tower='both')", "zeroshot()")
    folder = learner.export(tmp_path / "model", "merged")
    model = transformers.CLIPModel.from_pretrained(folder)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(["a photo of a class 3."], return_tensors="pt")
    with torch.no_grad(), learner.inference():
        text = model.get_text_features(**tokens).pooler_output
        same(text, learner.backbone.encode_text(["a photo of a class 3."]))
    head = load_file(folder / "head.safetensors")
    same(F.normalize(text, dim=1), head["weight"][[3]])


@pytest.mark.parametrize("family", ["clip", "timm"])
def test_learner_in_bfloat16_exports_float32_that_lost_nothing(
    families: dict[str, str], family: str, tmp_path: Path
) -> None:
    learner = known(families[family], "inflora(rank=3)", precision="bf16")
    assert next(learner.backbone.parameters()).dtype == torch.bfloat16
    folder = learner.export(tmp_path / "model", "merged")
    assert {v.dtype for v in load_file(folder / "model.safetensors").values()} == {torch.float32}
    kind = transformers.CLIPModel.from_pretrained
    merged = kind(folder) if family == "clip" else timm_library.create_model(f"local-dir:{folder}", True).eval()
    lora = PeftModel.from_pretrained(plain(learner), learner.export(tmp_path / "lora", "peft"))
    same(answer(learner, merged), answer(learner, lora))
    torch.testing.assert_close(answer(learner, merged), features(learner), atol=0.1, rtol=0)


# Classifier, labels and README


@pytest.mark.parametrize("to", ["peft", "merged"])
@pytest.mark.parametrize("family", ["clip", "pocket"])
def test_what_learnt_captions_is_exported_with_both_towers(
    families: dict[str, str], family: str, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    method = "lora(rank=2, blocks='0', tower='both')"
    learner = Learner.create(families.get(family, "pocket()"), method, "retrieve()", precision="fp32", device="cpu")
    stream = build_stream("captions_synthetic(tasks=1)", learner.backbone.preprocess, 0)
    learner.grow(stream.tasks[0])
    fit_task(learner, stream.tasks[0], TrainConfig(epochs=2, lr=0.02, batch_size=4))
    folder = learner.export(tmp_path / "it", to)
    photo = Image.fromarray(pictures(learner.backbone.preprocess.resize, n=1)[0].permute(1, 2, 0).numpy())
    photo.save(folder / "photo.jpg", "PNG")
    found = example(folder, monkeypatch)
    with learner.inference():
        texts = learner.backbone.encode_text(found["labels"])
        image = learner.encode({"image": learner.backbone.preprocess(photo)[None]})
        same(found["scores"], learner.objective.similarity(image, texts))
    assert capsys.readouterr().out.strip() in found["labels"]


@pytest.mark.parametrize("to", ["peft", "merged"])
@pytest.mark.parametrize(
    ("family", "more", "method", "objective"),
    [
        ("clip", "", "inflora(rank=3)", "classify()"),
        ("clip", "", "lora(rank=3, tower='both')", "zeroshot(templates=('a {}', 'one {}'))"),
        ("siglip", "", "lora(rank=3) + ncm", "classify()"),
        ("deit", "", "inflora(rank=3)", "classify()"),
        ("vit", ", input_norm='none'", "inflora(rank=3)", "classify()"),
        ("timm", "", "inflora(rank=3)", "classify()"),
        ("timm", ", input_norm='none'", "inflora(rank=3)", "classify()"),
        ("pocket", "", "lora(rank=2, blocks='0')", "zeroshot()"),
        ("pocket", "", "lora(rank=2, blocks='0')", "classify(cosine=True)"),
        ("pocket", "", "sd_lora(rank=2, blocks='0')", "classify()"),
        ("pocket", "", "fm_lora(rank=2, blocks='0', prompts=0, drs='fixed')", "classify()"),
    ],
)
def test_example_of_the_readme_gives_the_scores_of_the_learner(
    families: dict[str, str],
    family: str,
    more: str,
    method: str,
    objective: str,
    to: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    learner = known(families.get(family, "pocket()")[:-1] + more + ")", method, objective)
    folder = learner.export(tmp_path / "it", to)
    # Of the size that needs no resizing, in which libraries round differently.
    photo = Image.fromarray(pictures(learner.backbone.preprocess.resize, n=1)[0].permute(1, 2, 0).numpy())
    lying = Image.Exif()
    lying[ExifTags.Base.Orientation] = 6
    photo.save(folder / "photo.jpg", "PNG", exif=lying)
    photo = photo.transpose(Image.Transpose.ROTATE_270)
    found = example(folder, monkeypatch)
    same(found["scores"], scores(learner, learner.backbone.preprocess(photo)[None]))
    assert found["labels"] == [f"class {i}" for i in range(6)]
    assert (folder / "MODEL_CARD.md").exists() == (family == "pocket" and to == "merged")
    assert capsys.readouterr().out.strip() == learner.predict([photo], top=1)[0][0][0]


def test_labels_say_where_the_export_comes_from(families: dict[str, str], tmp_path: Path) -> None:
    learner = known(families["clip"], "inflora(rank=3)")
    facts = json.loads((learner.export(tmp_path / "it", "peft") / "labels.json").read_text(encoding="utf-8"))
    assert facts["labels"] == list(learner.known)
    assert facts["fingerprint"] == BACKBONES["clip"](path=families["clip"][len("clip(path='") : -2]).fingerprint()
    assert facts["backbone"] == families["clip"]
    assert facts["method"] == "inflora(rank=3)"
    assert facts["objective"] == "classify()"
    assert facts["preprocess"] == learner.backbone.preprocess.describe()
    head = load_file(tmp_path / "it" / "head.safetensors")
    assert {k: tuple(v.shape) for k, v in head.items()} == {"weight": (6, 16), "bias": (6,)}


@pytest.mark.parametrize(
    ("method", "to"), [("inflora(rank=3)", "peft"), ("lora(rank=3)", "merged"), ("finetune", "merged")]
)
def test_loaded_learner_exports_the_same_bytes(families: dict[str, str], method: str, to: str, tmp_path: Path) -> None:
    learner = taught(families["clip"], method, tasks=0)
    for task in range(3):
        teach(learner, task)
        learner.save(tmp_path / "saved")
    one = learner.export(tmp_path / "one", to)
    other = Learner.load(tmp_path / "saved").export(tmp_path / "other", to)
    names = sorted(file.name for file in one.iterdir())
    assert names == sorted(file.name for file in other.iterdir())
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_learning_goes_on_after_an_export_as_if_there_was_none(families: dict[str, str], tmp_path: Path) -> None:
    for to in ("peft", "merged"):
        exported, other = (taught(families["clip"], "inflora(rank=3)", tasks=2) for _ in range(2))
        exported.export(tmp_path / to, to)
        for learner in (exported, other):
            teach(learner, 2)
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in exported.state_dict().items())


# Whole or not at all


@pytest.mark.parametrize(("to", "sizes"), [("merged", (0, 500, 5_000, 50_000)), ("peft", (500, 2_000))])
def test_an_export_that_does_not_fit_on_the_disk_is_one_line_and_leaves_nothing(
    to: str, sizes: tuple[int, ...], families: dict[str, str], tmp_path: Path, no_file_above: Any
) -> None:
    learner = known(families["clip"], "lora(rank=3)", tasks=1)
    for size in sizes:
        with no_file_above(size), pytest.raises(ValueError, match=r"it cannot be written \(.*ile too large") as error:
            learner.export(tmp_path / "it", to)
        assert "\n" not in str(error.value)
        assert "resume" not in str(error.value)
        assert list(tmp_path.iterdir()) == []
    learner.export(tmp_path / "it", to)
    assert [p.name for p in tmp_path.iterdir()] == ["it"]


def test_the_next_export_removes_what_killed_ones_left_but_not_what_others_are_writing(
    families: dict[str, str], tmp_path: Path
) -> None:
    learner = known(families["clip"], "lora(rank=3)", tasks=1)
    child = multiprocessing.get_context("fork").Process(target=export_and_die, args=(learner, tmp_path / "killed"))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == [".killed.draft"]
    (tmp_path / ".emptied.draft").mkdir()  # killed when all but the folder was removed
    with locked(tmp_path / ".busy.draft"):
        learner.export(tmp_path / "it", "peft")
        assert sorted(p.name for p in tmp_path.iterdir()) == [".busy.draft", "it"]
        with pytest.raises(ValueError, match="another process is working in"):
            learner.export(tmp_path / "busy", "peft")
        assert (tmp_path / ".busy.draft").exists()


def export_and_die(learner: Any, folder: Path) -> None:
    """The body of a child process, which is killed when the classifier is written."""

    def heard(event: str, details: tuple[Any, ...]) -> None:
        if event == "open" and str(details[0]).endswith("labels.json.draft"):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(heard)
    learner.export(folder, "merged")


def test_draft_of_a_killed_export_is_replaced(families: dict[str, str], tmp_path: Path) -> None:
    learner = known(families["clip"], "lora(rank=3)", tasks=1)
    (tmp_path / ".it.draft").mkdir()
    (tmp_path / ".it.draft" / "stray.txt").write_text("")
    (tmp_path / "it").mkdir()  # empty folders are taken
    learner.export(tmp_path / "it", "peft")
    assert [p.name for p in tmp_path.iterdir()] == ["it"]
    assert sorted(p.name for p in (tmp_path / "it").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "head.safetensors",
        "labels.json",
    ]


@pytest.mark.skipif(os.name != "posix", reason="file modes are of POSIX")
def test_all_files_can_be_read_by_those_who_can_read_one(families: dict[str, str], tmp_path: Path) -> None:
    folder = known(families["clip"], "lora(rank=3)", tasks=1).export(tmp_path / "it", "merged")
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


# Refusals


class Strange(Method):
    name = "strange"


class Prompting(Strange):
    treats = frozenset({"vision"})


class Wording(Strange):
    treats = frozenset({"text"})


class Voting(Strange):
    def predict(self, learner: Core, batch: Batch) -> Tensor:
        return learner.objective.scores(learner.encode(batch)).square()


class Bottleneck(Adapter):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(32, 32))

    def forward(self, x: Tensor, y: Tensor, part: int) -> Tensor:
        return y + F.relu(x @ self.weight)

    def delta(self, part: int, branches: bool) -> Tensor | None:
        return None


def refused(learner: Core, folder: Path, to: str, *words: str) -> None:
    words_in_one_line = "".join(f"(?=.*{re.escape(word)})" for word in words) + r"[^\n]*\Z"
    with pytest.raises(ValueError, match=words_in_one_line):
        export(learner, folder, to)
    assert not folder.exists() or folder.is_file() or any(folder.iterdir())
    assert not list(folder.parent.glob(".*"))


def test_export_is_refused_when_peft_cannot_hold_it(families: dict[str, str], tmp_path: Path) -> None:
    for method in ("finetune", "joint"):
        refused(known(families["clip"], method, tasks=1), tmp_path / "it", "peft", "trained", "merged")
    for method in ("probe", "ncm"):
        refused(known(families["clip"], method, tasks=1), tmp_path / "it", "peft", "no LoRA", "merged")


def test_export_is_refused_when_the_folder_holds_something(families: dict[str, str], tmp_path: Path) -> None:
    learner = known(families["clip"], "lora(rank=3)", tasks=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for name in ("full", "file"):
        refused(learner, tmp_path / name, "merged", str(tmp_path / name), "new")
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"


def test_export_is_refused_with_the_near_name_when_the_target_is_unknown(
    families: dict[str, str], tmp_path: Path
) -> None:
    learner = known(families["clip"], "lora(rank=3)", tasks=1)
    refused(learner, tmp_path / "it", "merge", "'merge'", "did you mean 'merged'?")
    refused(learner, tmp_path / "it", "gguf", "'gguf'", "'merged'")


def test_export_is_refused_when_nothing_was_learnt(tmp_path: Path) -> None:
    refused(Learner.create("tiny()", "lora(rank=3)", device="cpu"), tmp_path / "it", "merged", "learnt nothing")


def test_export_is_refused_when_no_library_has_the_model(tmp_path: Path) -> None:
    for to in ("peft", "merged"):
        refused(known("tiny()", "lora(rank=3)", tasks=1), tmp_path / "it", to, "tiny", "pocket()", "save")


def test_export_is_refused_when_the_method_does_what_no_file_can_say(families: dict[str, str], tmp_path: Path) -> None:
    for method, word in ((Prompting(), "features"), (Wording(), "features"), (Voting(), "predicts")):
        learner = taught(families["clip"], "probe", tasks=1)
        learner.method = method
        refused(learner, tmp_path / "it", "merged", "strange", word, "save")
    learner = taught(families["clip"], "probe", tasks=1)
    attach(learner.backbone, learner.backbone.sites("q", blocks="0"), Bottleneck())
    for to in ("peft", "merged"):
        refused(learner, tmp_path / "it", to, "Bottleneck", "layers.0.self_attn.q_proj", "save")
