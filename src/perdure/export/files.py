"""What stands beside the weights of an export: tokenizer and processors, and a README that says how to use them."""

import dataclasses
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from perdure.backbones.base import Backbone
from perdure.backbones.clip import Clip
from perdure.backbones.open_clip import OpenClip
from perdure.backbones.timm import Timm
from perdure.backbones.vision import Vision
from perdure.core.learner import Core
from perdure.core.objective import Head
from perdure.formatting import counted
from perdure.options.spec import parse_one
from perdure.version import __version__

TERMS = ("LICENSE*", "MODEL_CARD.md")
"""What may be done with a model."""
TOKENIZER = ("*token*", "vocab*", "merges.txt", "*.model")


def copy(source: Path | None, patterns: tuple[str, ...], folder: Path, before: str = "") -> None:
    """Copy the files of `source` that fit one of `patterns`, with `before` in front of their names, into `folder`."""
    for file in (file for pattern in patterns if source for file in source.glob(pattern)):
        shutil.copyfile(file, folder / (before + file.name))


@dataclasses.dataclass(frozen=True)
class Use:
    """Lines of Python that end in `features` of `image` in the plain library; those on texts where it reads any."""

    library: str
    imports: tuple[str, ...]
    load: tuple[str, ...]
    pixels: str
    features: str
    tokenizer: tuple[str, ...] = ()
    tokens: str = ""
    texts: str = ""


def use_of(backbone: Backbone, to: str) -> Use:
    """How the export of `backbone` to `to` is used."""
    if isinstance(backbone, Timm):
        return _use_timm(backbone, to == "peft")
    return _USE_OPEN_CLIP if isinstance(backbone, OpenClip) else _use_transformers(backbone, to == "peft")


def options_of(backbone: Backbone) -> dict[str, Any]:
    """What is written in the parentheses of the backbone's spec."""
    return dict(parse_one(backbone.spec).kwargs)


_PEFT = "from peft import PeftModel", "model = PeftModel.from_pretrained(model, folder)"
_USE_OPEN_CLIP = Use(
    "open_clip_torch",
    ("import open_clip",),
    (
        'model, _, transform = open_clip.create_model_and_transforms("local-dir:" + folder)',
        "model.eval()",
    ),
    "transform(image)[None]",
    "model.encode_image(pixels)",
    ('tokenizer = open_clip.get_tokenizer("local-dir:" + folder)',),
    "tokenizer(labels)",
    "model.encode_text(tokens)",
)


def _use_timm(backbone: Timm, peft: bool) -> Use:
    options = options_of(backbone)
    made, facts = '"local-dir:" + folder, pretrained=True', "timm.data.resolve_model_data_config(model)"
    if peft:
        made = f"{options['name']!r}, pretrained=True, num_classes=0"
        if "checkpoint" in options:
            made += f", pretrained_cfg_overlay={ {'file': options['checkpoint'], 'custom_load': False} }"
        if options.get("input_norm") == "none":  # merged: the exported files say so
            facts += " | {'mean': (0, 0, 0), 'std': (1, 1, 1)}"
    imports, lora = ((_PEFT[0],), (_PEFT[1],)) if peft else ((), ())
    load = (f"model = timm.create_model({made}).eval()", f"facts = {facts}", *lora)
    pixels = "timm.data.create_transform(**facts)(image)[None]"
    return Use("timm", ("import timm", *imports), load, pixels, "model(pixels)")


def _use_transformers(backbone: Any, peft: bool) -> Use:
    options = options_of(backbone)
    kind, source, more, raw = type(backbone.model).__name__, "folder", "", ""
    imports, lora = ((_PEFT[0],), (_PEFT[1],)) if peft else ((), ())
    if peft:
        source, more = repr(options.get("path")), ", dtype=torch.float32"
        if "path" not in options:
            source, imports = "CLIP", (*imports, "from perdure_pocket import CLIP")
        if options.get("input_norm") == "none":  # merged: the exported files say so
            raw = ", do_normalize=False"
    if getattr(backbone.model, "pooler", 0) is None:
        more += ", add_pooling_layer=False"
    features = "model(pixel_values=pixels).last_hidden_state[:, 0]"
    if isinstance(backbone, Clip):
        features = "model.get_image_features(pixel_values=pixels).pooler_output"
    elif isinstance(backbone, Vision) and backbone.pooled:
        features = "model(pixel_values=pixels).pooler_output"
    processor = f"AutoImageProcessor.from_pretrained({source}{raw})"
    load = (f"model = {kind}.from_pretrained({source}{more})", *lora, f"processor = {processor}")
    imports = (*imports, f"from transformers import AutoImageProcessor, {kind}")
    pixels = 'processor(image, return_tensors="pt")["pixel_values"]'
    if not isinstance(backbone, Clip):
        return Use("transformers", imports, load, pixels, features)
    tokenizer = (
        "from transformers import AutoTokenizer",
        f"tokenizer = AutoTokenizer.from_pretrained({source})",
    )
    texts = "model.get_text_features(**tokens).pooler_output"
    return Use("transformers", imports, load, pixels, features, tokenizer, backbone.tokens, texts)


def readme(learner: Core, to: str, use: Use, head: Head) -> str:
    """The text of README.md."""
    spec, captioned = learner.backbone.spec, "captions" in learner.objective.asks
    what = f"a LoRA for {spec}; it needs {use.library} and peft"
    if to == "merged":
        what = f"{spec} with what was learnt added to its weights; it needs {use.library}"
    code = [
        "import json",
        "from pathlib import Path",
        "import torch",
        "from PIL import Image, ImageOps",
        "from safetensors.torch import load_file",
        *use.imports,
        "",
        'folder = "."  # where this file stands',
        *use.load,
        'head = load_file(folder + "/head.safetensors")',
        *_words(captioned, use),
        'image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")',
        f"pixels = {use.pixels}",
        "with torch.inference_mode():",
        f"    features = {use.features}",
        *([f"    texts = {use.texts}"] if captioned else []),
        f"    scores = {head.scores}",
        "print(labels[int(scores.argmax())])",
    ]
    learnt = "Images and captions" if captioned else counted(len(learner.objective.names), "class", "classes")
    return (
        f"# {learnt}, learnt in {counted(learner.learnt, 'task')}\n\n"
        f"Written by perdure {__version__}: {what}.\n"
        f"The classifier is {head.what}. `labels.json` says the rest.\n\n"
        "```python\n" + "\n".join(code) + "\n```\n"
    )


def _words(captioned: bool, use: Use) -> list[str]:
    """Lines that say what is to be told apart."""
    if not captioned:
        return ['labels = json.loads(Path(folder, "labels.json").read_text(encoding="utf-8"))["labels"]']
    return [
        *use.tokenizer,
        'labels = ["a red car", "two dogs on a beach"]  # any sentences',
        f"tokens = {use.tokens}",
    ]


def finish(folder: Path) -> None:
    """Let all files be read by those who can read one, and lie on the disk."""
    for file in (each for each in folder.rglob("*") if each.is_file()):
        shutil.copymode(folder / "README.md", file)  # safetensors writes files that only their owner may read
    force_to_disk([*folder.rglob("*"), folder])


def force_to_disk(paths: Iterable[Path]) -> None:
    """Wait until files and folders lie on the disk."""
    for path in paths:
        if path.is_dir() and os.name != "posix":  # Windows cannot open a folder
            continue
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
