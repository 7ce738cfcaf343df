"""Export to OpenCLIP: a folder that `open_clip.create_model_and_transforms("local-dir:...")` loads."""

from pathlib import Path

from safetensors.torch import save_file

from perdure.backbones.open_clip import CONFIG, WEIGHTS, OpenClip, locate
from perdure.backbones.open_clip_attention import packed
from perdure.core.checkpoint import write_json
from perdure.export.files import TERMS, TOKENIZER, copy, options_of


def write_open_clip(backbone: OpenClip, folder: Path) -> None:
    """Write config, weights under the library's names, and the tokenizer where it came with the model."""
    options = options_of(backbone)
    source = locate(options["name"], options.get("checkpoint"))
    preprocess = backbone.preprocess
    reading = {
        "size": preprocess.size,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "interpolation": preprocess.interpolation,
        "resize_mode": "squash" if preprocess.squash else "shortest",
    }
    write_json(folder / CONFIG, {"model_cfg": source.model, "preprocess_cfg": reading})
    weights = packed(backbone.model)
    save_file({name: tensor.detach().cpu().clone() for name, tensor in weights.items()}, folder / WEIGHTS)
    copy(source.folder, (*TERMS, *TOKENIZER), folder)
    if source.folder is None and hasattr(backbone.tokenizer, "tokenizer"):  # one of transformers, from the hub
        backbone.tokenizer.tokenizer.save_pretrained(folder)
