"""Export of language models: plain transformers, with PEFT or without, gives the learner's logits and answers."""

import json
import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from perdure.adapters.task_branches import routed
from perdure.api.learner import Learner

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LORA = "lora(rank=4, alpha=8, at='qv,mlp', tower='language', per_task=True)"
FAMILIES = ["llava", *(pytest.param(f, marks=pytest.mark.slow) for f in ("llava_onevision", "qwen2_vl", "qwen2_5_vl"))]
FAMILIES += [pytest.param(f, marks=pytest.mark.slow) for f in ("qwen3_vl", "internvl", "smolvlm")]


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8))


def taught(backbone: str, method: str = LORA) -> Learner:
    """A learner of two tasks, moved far enough for mistakes to show."""
    options = {"epochs": 8, "lr": 2e-2, "batch_size": 4, "precision": "fp32", "device": "cpu"}
    learner = Learner.create(backbone, method, "generate()", **options)
    for answer in ("a red dog", "two cats"):
        learner.learn(conversations=[{"image": picture(i), "question": "What?", "answer": answer} for i in range(4)])
    return learner


@pytest.fixture
def path(request: pytest.FixtureRequest, tiny_mllms: Callable[[str], Path]) -> str:
    return str(tiny_mllms(request.param))


def logits(model: Any, source: str) -> Tensor:
    """Of a question about two images and one about none, as plain transformers has it."""
    processor, found = AutoProcessor.from_pretrained(source), []
    for images in ([picture(8), picture(9)], []):
        content = [*[{"type": "image"}] * len(images), {"type": "text", "text": "What is it?"}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        shown = {"images": [images]} if images else {}
        inputs = processor(text=[text], return_tensors="pt", **shown)
        with torch.inference_mode():
            found.append(model(**inputs).logits[0])
    return torch.cat(found)


def of(learner: Learner, source: str) -> Tensor:
    with learner.inference():
        return logits(learner.backbone.model, source).clone()


def said_by_the_example(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    code = re.search("```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code
    monkeypatch.chdir(folder)
    picture(5).save("photo.jpg")
    capsys.readouterr()
    exec(code[1].replace("max_new_tokens=256", "max_new_tokens=12"), {})
    return capsys.readouterr().out.removesuffix("\n")


@pytest.mark.parametrize("path", FAMILIES, indirect=True)
def test_plain_transformers_and_peft_give_the_logits_and_answers_of_the_learner(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    learner = taught(f"mllm(path={path!r})")
    ours, plain = of(learner, path), AutoModelForImageTextToText.from_pretrained(path).eval()
    assert (ours - logits(plain, path)).abs().max() > 1e-2, "else equality would say nothing"
    lora = learner.export(tmp_path / "lora", "peft")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain, lora).eval(), path), ours, atol=1e-4, rtol=0)
    merged = learner.export(tmp_path / "merged", "transformers")
    whole = AutoModelForImageTextToText.from_pretrained(merged).eval()
    torch.testing.assert_close(logits(whole, str(merged)), ours, atol=1e-4, rtol=0)
    for folder in (lora, merged):
        said = said_by_the_example(folder, monkeypatch, capsys)
        assert said == learner.ask(folder / "photo.jpg", "What is this?", tokens=12)


def test_a_model_that_was_made_here_is_exported_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    learner = taught("tiny_mllm()")
    merged = learner.export(tmp_path / "merged", "merged")
    said = said_by_the_example(merged, monkeypatch, capsys)
    assert said == learner.ask(merged / "photo.jpg", "What is this?", tokens=12)


@pytest.mark.parametrize("path", ["llava"], indirect=True)
def test_the_folder_of_a_lora_is_one_of_peft(path: str, tmp_path: Path) -> None:
    learner = taught(f"mllm(path={path!r})", "lora(rank=3, at='mlp', tower='projector')")
    lora = learner.export(tmp_path / "lora", "peft")
    assert {each.name for each in lora.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md", "learnt.json")
    }
    config = json.loads((lora / "adapter_config.json").read_text())
    names = [name for name, _ in AutoModelForImageTextToText.from_pretrained(path).named_modules()]
    assert set(config["target_modules"]) <= set(names)
    assert (config["peft_type"], config["task_type"], config["r"], config["lora_alpha"]) == ("LORA", "CAUSAL_LM", 3, 3)
    assert config["base_model_name_or_path"] == path
    keys = {f"base_model.model.{name}.lora_{side}.weight" for name in config["target_modules"] for side in "AB"}
    assert set(load_file(lora / "adapter_model.safetensors")) == keys
    ours, plain = of(learner, path), AutoModelForImageTextToText.from_pretrained(path).eval()
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain, lora).eval(), path), ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize("path", ["llava"], indirect=True)
def test_experts_are_adapters_that_peft_loads_by_name_and_each_answers_as_where_the_task_is_told(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(4):
        picture(i).save(tmp_path / f"{i}.png")
    learner = Learner.create(
        f"mllm(path={path!r})", "lora_experts(rank=3, alpha=6, at='qv,mlp')", "generate()", epochs=8, lr=2e-2,
        batch_size=4, precision="fp32", device="cpu",
    )  # fmt: skip
    for name, answer in (("lora", "a red dog"), ("up down?", "two cats")):
        told = [{"image": f"{i}.png", "question": "What?", "answer": answer} for i in range(4)]
        (tmp_path / f"{name}.json").write_text(json.dumps(told))
        learner.learn(tmp_path / f"{name}.json")
    folder = learner.export(tmp_path / "experts", "peft")
    second = learner.tasks[1].name
    names = ["0_lora", "1_up_down"]
    assert json.loads((folder / "learnt.json").read_text())["adapters"] == names
    assert sorted(each.name for each in folder.iterdir()) == [*names, "README.md", "learnt.json"]
    picture(5).save(folder / "photo.jpg")
    plain = AutoModelForImageTextToText.from_pretrained(path).eval()
    untouched = logits(plain, path)
    model = PeftModel.from_pretrained(plain, folder / names[0], adapter_name=names[0]).eval()
    model.load_adapter(folder / names[1], adapter_name=names[1])
    found = []
    for task, name in enumerate(names):
        model.set_adapter(name)
        found.append(logits(model, path))
        with routed(list(learner.method.experts), torch.tensor([task])):
            torch.testing.assert_close(found[-1], of(learner, path), atol=1e-4, rtol=0)
    assert min((a - b).abs().max() for a, b in combinations([untouched, *found], 2)) > 1e-2, "else it says nothing"
    said = said_by_the_example(folder, monkeypatch, capsys)
    assert said == learner.ask(folder / "photo.jpg", "What is this?", tokens=12, task=second)


@pytest.mark.parametrize("path", ["llava"], indirect=True)
def test_weights_in_bfloat16_are_merged_in_float32(path: str, tmp_path: Path) -> None:
    learner = taught(f"mllm(path={path!r}, dtype='bfloat16')")
    assert {p.dtype for p in learner.backbone.parameters()} == {torch.bfloat16}
    merged = learner.export(tmp_path / "merged", "merged")
    plain = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    whole = AutoModelForImageTextToText.from_pretrained(merged).eval()
    assert whole.dtype == torch.float32
    lora = PeftModel.from_pretrained(plain, learner.export(tmp_path / "lora", "peft")).eval()
    torch.testing.assert_close(logits(whole, path), logits(lora, path), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("method", "to", "why"),
    [
        ("prompt(tower='language')", "peft", "prompts take part in the encoder, which no weights can hold"),
        (
            "lora_experts(rank=2)",
            "transformers",
            "an expert of its own.*export to 'peft', which writes a LoRA for each",
        ),
        ("hide_lora(rank=2)", "peft", "adds up what it learnt of all tasks in part: keep this learner with save"),
        ("smolora(rank=2)", "peft", "changes features as no weights can express"),
        ("disco(rank=2)", "peft", "no folder has it for a LoRA; keep this learner with save"),
        ("lora_experts(rank=2)", "peft", "no folder has it for a LoRA; keep this learner with save"),
        ("lora(tower='language')", "peft", "no folder has it for a LoRA; export to 'merged'"),
        ("finetune(tower='projector')", "peft", "which a LoRA cannot hold"),
        ("probe", "peft", "no layer of the encoder was adapted"),
    ],
)
def test_what_no_weights_can_hold_is_refused(method: str, to: str, why: str, tmp_path: Path) -> None:
    learner = Learner.create("tiny_mllm()", method, "generate()", epochs=1, precision="fp32", device="cpu")
    learner.learn(conversations=[{"image": picture(0), "question": "What?", "answer": "a dog"}])
    with pytest.raises(ValueError, match=why):
        learner.export(tmp_path / "it", to)
