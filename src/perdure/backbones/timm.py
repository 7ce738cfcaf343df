"""Vision transformers from timm, with weights from the hub or from a local safetensors file."""

import difflib
import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from perdure.backbones import pretrained
from perdure.backbones.base import Backbone
from perdure.backbones.positions import Side, elastic
from perdure.backbones.preprocess import Preprocess
from perdure.options.ranges import Count, checked
from perdure.options.spec import Spec

_HUB = "hf-hub:"
_LOCAL = "local-dir:"


@checked
def timm(
    name: str,
    checkpoint: str | None = None,
    input_norm: str = "model",
    layers: Count | None = None,
    means: bool = True,
    size: Side | None = None,
) -> "Timm":
    """A model of the timm library by its name; adapters need one with transformer blocks.

    Features are what the model's own classifier would read: of a ViT, the class token after the last norm.

    Args:
        name: as in `timm.list_models()`, for example "vit_base_patch16_224.augreg_in21k"; "hf-hub:" and a hub name; or
            a folder with config.json and model.safetensors, as timm saves them.
        checkpoint: a local .safetensors file with the weights; from the folder or the hub when None.
        input_norm: "model" for the mean and deviation the weights were trained with, "none" for raw pixels in [0, 1],
            as the published results of InfLoRA used.
        layers: features are tokens of the last so many blocks in place of the model's own, see `Backbone.reading`.
        means: with `layers`, the mean of a block's other tokens beside its first.
        size: side of images in pixels, a multiple of the patch; positions are interpolated. Its own when None.

    Raises:
        ValueError: when there is no such model or file, or the weights do not fit.
    """
    pretrained.check_norm(input_norm)
    local = _local(name)
    options: dict[str, str] = {"name": name if local is None else str(local)}
    file = None
    if checkpoint is not None:
        file = pretrained.local_weights(checkpoint, "leave it out to take the weights from the hub")
        options["checkpoint"] = str(file)
    if input_norm != "model":
        options["input_norm"] = input_norm
    folder = Path(pretrained.fetch(name.removeprefix(_HUB))) if name.startswith(_HUB) else local
    with pretrained.reading(str(folder or name)):
        model = _create(name, folder)
        weights = pretrained.read_weights(file or _weights(name, folder, model))
        _fill(model, weights, str(file or name))
        made = Timm(model, _preprocess(name, model, input_norm), str(Spec("timm", tuple(options.items()))))
        return elastic(made, size).reading(layers, means)


class Timm(Backbone):
    """See `timm`.

    Args:
        model: a timm model without classifier.
        preprocess: its image processor.
        spec: the text that rebuilds this backbone.
    """

    def __init__(self, model: Any, preprocess: Preprocess, spec: str) -> None:
        super().__init__()
        self.model: Any = pretrained.frozen(model)
        self.preprocess = preprocess
        self.spec = spec
        self.eval()
        self.dim = pretrained.features_of(self)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S) to features (B, dim)."""
        features: Tensor = self.model.forward_head(self.model.forward_features(pixels), pre_logits=True)
        return features

    def towers(self) -> dict[str, str]:
        """Tower -> dotted name of its module."""
        return {"vision": "model"}

    def set_attention(self, implementation: pretrained.Attention) -> None:
        """Choose how attention is computed; the result is the same up to rounding."""
        pretrained.check_attention(implementation)
        for module in self.model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = implementation == "sdpa"


def _local(name: str) -> Path | None:
    """The folder that `name` leads to, if it is one; a folder goes before a model of the same name."""
    folder = Path(name.removeprefix(_LOCAL)).expanduser()
    if not folder.is_dir():
        if name.startswith(_LOCAL):
            raise ValueError(f"name={name!r}: there is no such folder; give one with config.json and model.safetensors")
        return None
    pretrained.check_model_folder(f"name={name!r}", folder)
    return folder.absolute()


def _create(name: str, folder: Path | None) -> Any:
    import timm

    if folder is not None:
        _check_architecture(name, folder)
        return timm.create_model(f"{_LOCAL}{folder}", pretrained=False, num_classes=0)
    bare = name.removeprefix("timm/")
    if bare != name and timm.is_model(bare):
        raise ValueError(f"name={name!r}: leave out 'timm/', or write {_HUB + name!r}")
    if not timm.is_model(name):
        # Names carry the tag of their weights after a dot; people misspell either half.
        near = difflib.get_close_matches(bare.partition(".")[0], timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models(), or give a folder"
        raise ValueError(f"name={name!r}: timm has no such model; {hint}")
    return timm.create_model(name, pretrained=False, num_classes=0)


def _check_architecture(name: str, folder: Path) -> None:
    """Raise a ValueError unless the configuration in a folder is one of timm."""
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = facts.get("architecture") or facts["pretrained_cfg"]["architecture"]
    except (ValueError, KeyError, TypeError, AttributeError):
        architecture = None
    if not isinstance(architecture, str):
        raise ValueError(
            f"name={name!r}: its config.json names no architecture of timm; of a Hugging Face model write "
            f"vision(path={str(folder)!r})"
        )


def _weights(name: str, folder: Path | None, model: Any) -> Path:
    """The file with the weights of a folder, or those that the library knows on the hub."""
    if folder is None:
        where = model.pretrained_cfg.get("hf_hub_id")
        if not where:
            raise ValueError(
                f"name={name!r}: timm knows no weights on the hub for it; add their tag, as in "
                "'vit_base_patch16_224.augreg_in21k', or give checkpoint="
            )
        folder = Path(pretrained.fetch(where))
    files = sorted(folder.glob("*.safetensors"))
    if folder / "model.safetensors" not in files and len(files) != 1:
        raise ValueError(f"name={name!r} has {len(files)} safetensors files: say which with checkpoint=")
    return folder / "model.safetensors" if folder / "model.safetensors" in files else files[0]


def _fill(model: Any, weights: dict[str, Tensor], source: str) -> None:
    classifier = model.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ([classifier] if isinstance(classifier, str) else classifier))
    own = model.state_dict()
    kept = {key: value for key, value in weights.items() if key in own or not key.startswith(heads)}
    pretrained.fill(model, kept, source, "give the weights of exactly this timm model, under timm's names")


def _preprocess(name: str, model: Any, input_norm: str) -> Preprocess:
    from timm.data import resolve_model_data_config

    facts = resolve_model_data_config(model)
    channels, height, width = facts["input_size"]
    if channels != 3 or height != width or facts["crop_mode"] not in ("center", "squash"):
        raise ValueError(
            f"name={name!r} reads images of {facts['input_size']} with crop mode {facts['crop_mode']!r}; expected 3 "
            "channels, a square, and 'center' or 'squash': choose another model"
        )
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if input_norm == "model":
        mean, std = facts["mean"], facts["std"]
    resize = math.floor(height / facts["crop_pct"])
    return Preprocess(height, resize, mean, std, facts["interpolation"], facts["crop_mode"] == "squash", "round")
