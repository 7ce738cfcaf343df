"""Export of language models: what stands beside a LoRA or merged weights, and what they need of PEFT.

The folder of a LoRA is what PEFT itself writes: `adapter_config.json` with the names of the layers,
`adapter_model.safetensors` with `base_model.model.<layer>.lora_A.weight` and `lora_B`. A classifier there is none: the
vocabulary is the model's. Experts that stay apart are several such folders, each called like the adapter in it, as PEFT
writes a model with several adapters.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perdure.adapters.injection import updates
from perdure.adapters.task_branches import TaskBranches
from perdure.backbones import pretrained
from perdure.backbones.language import Language
from perdure.core.learner import Core
from perdure.export.files import TERMS, TOKENIZER, copy, options_of
from perdure.formatting import counted
from perdure.options.paths import unplaced
from perdure.options.spec import Spec, parse_one
from perdure.storage.files import write_json, write_text
from perdure.version import __version__

READING = ("*processor_config.json", "chat_template*", "generation_config.json", *TOKENIZER)
"""How a model's conversations are read and its answers end."""


def whole_spec(backbone: Language) -> str:
    """The text of the same model in float32, to which updates can be added."""
    spec = parse_one(backbone.spec)
    kept = {name: value for name, value in spec.kwargs if name not in ("quantize", "checkpointing", "dtype")}
    if "path" in kept:  # what is made here is float32
        kept["dtype"] = "float32"
    return str(Spec(spec.name, tuple(kept.items())))


def write_reading(backbone: Language, folder: Path) -> None:
    """Processor, tokenizer and terms of use, as they came with the model."""
    if path := options_of(backbone).get("path"):
        copy(Path(pretrained.locate(path)[1]), (*READING, *TERMS), folder)
    else:
        backbone.dialogue.processor.save_pretrained(folder)


def experts(learner: Core) -> dict[int, str]:
    """Task -> name of the adapter that its expert becomes; empty where no experts stay apart.

    The number in front keeps names apart from each other, and from the beginnings of PEFT's own, such as "lora".
    """
    found = {task for _, each, _ in updates(learner.backbone) if isinstance(each, TaskBranches) for task in each.tasks}
    names = {task.index: re.sub(r"[^\w-]+", "_", task.name).strip("_")[:40] for task in learner.tasks}
    return {task: f"{task}_{names[task]}".removesuffix("_") for task in sorted(found)}


def lora_facts(backbone: Language) -> dict[str, Any]:
    """What `adapter_config.json` says of a language model, beside ranks and layers."""
    return {
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": options_of(backbone).get("path"),
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def describe(learner: Core, folder: Path, to: str) -> None:
    """`learnt.json`, what it was taught and how; `README.md`, how it is asked."""
    backbone, config = learner.backbone, getattr(learner, "config", None)
    assert isinstance(backbone, Language)
    apart = list(experts(learner).values())
    facts = {
        "tasks": [task.name for task in learner.tasks],
        **({"adapters": apart} if apart else {}),
        "objective": unplaced(config.objective) if config else learner.objective.name,
        "method": unplaced(config.method if config else learner.method.spec),
        "backbone": backbone.spec,
        "fingerprint": learner.fingerprint,
        "perdure": __version__,
    }
    write_json(folder / "learnt.json", facts)
    write_text(folder / "README.md", _readme(learner, backbone, to, apart))


def _readme(learner: Core, backbone: Language, to: str, apart: Sequence[str]) -> str:
    lora = to == "peft"
    source = repr(options_of(backbone).get("path")) if lora else "folder"
    what = f"a LoRA for {backbone.spec}; it needs transformers and peft"
    if not lora:
        what = f"{backbone.spec} with what was learnt added to its weights, in float32; it needs transformers"
    load = ["model = PeftModel.from_pretrained(model, folder).eval()"] if lora else []
    choice = ""
    if apart:
        what = f"a LoRA a task for {backbone.spec}, each in a folder of its name; it needs transformers and peft"
        choice = (
            "The router is not here: plain PEFT takes the adapter that it is told, for all it is asked, and\n"
            "`with model.disable_adapter():` the untouched model. The learner itself chooses by the question.\n\n"
        )
        load = [
            f"names = {apart!r}",
            "model = PeftModel.from_pretrained(model, f'{folder}/{names[0]}', adapter_name=names[0]).eval()",
            "for name in names[1:]:",
            "    model.load_adapter(f'{folder}/{name}', adapter_name=name)",
            "model.set_adapter(names[-1])  # the task of the question",
        ]
    code = [
        "import torch",
        *(["from peft import PeftModel"] if lora else []),
        "from PIL import Image, ImageOps",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        'folder = "."  # where this file stands',
        f"source = {source}",
        'model = AutoModelForImageTextToText.from_pretrained(source, dtype="auto").eval()',
        *load,
        "processor = AutoProcessor.from_pretrained(source)",
        'image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")',
        'content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]',
        'messages = [{"role": "user", "content": content}]',
        "text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)",
        "begin = processor.tokenizer.bos_token  # some templates write it, and it must not stand twice",
        'own = {"add_special_tokens": False} if begin and text.startswith(begin) else {}',
        'inputs = processor(text=[text], images=[image], return_tensors="pt", **own)',
        "with torch.inference_mode():",
        "    said = model.generate(**inputs, max_new_tokens=256, do_sample=False)",
        'new = said[0, inputs["input_ids"].shape[1] :]',
        "print(processor.decode(new, skip_special_tokens=True).strip())",
    ]
    names = ", ".join(task.name for task in learner.tasks)
    return (
        f"# Questions, learnt in {counted(learner.learnt, 'task')}\n\n"
        f"Written by perdure {__version__}: {what}.\n"
        f"It was taught, one after another: {names}. `learnt.json` says how.\n\n"
        f"{choice}```python\n" + "\n".join(code) + "\n```\n"
    )
