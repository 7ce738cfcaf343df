"""Models of the OpenCLIP library, with projections that can be adapted."""

import difflib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perdure.backbones import pretrained
from perdure.backbones.base import Backbone, Tower
from perdure.backbones.open_clip_attention import Attention, split_attention
from perdure.backbones.positions import Positions, Side, TextLength, elastic
from perdure.backbones.preprocess import Interpolation, Preprocess
from perdure.options.ranges import Count, checked
from perdure.options.spec import Spec
from perdure.storage import schema

_HUB = "hf-hub:"
CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"


@checked
def open_clip(
    name: str,
    checkpoint: str | None = None,
    input_norm: str = "model",
    layers: Count | None = None,
    means: bool = True,
    size: Side | None = None,
    length: TextLength | None = None,
    positions: Positions | None = None,
) -> "OpenClip":
    """A model of the OpenCLIP library; install it with `pip install "perdure[open_clip]"`.

    Features are the projected image embeddings, not normalised to unit length. The name decides on the activation:
    weights that were trained with QuickGELU, such as OpenAI's, need one that ends in "-quickgelu".

    Args:
        name: as in `open_clip.list_models()`, for example "ViT-B-32-quickgelu", which needs `checkpoint`; a folder
            with open_clip_config.json, open_clip_model.safetensors and, where it is not the library's, the tokenizer;
            the path of such a config; or "hf-hub:" and a hub name.
        checkpoint: a local .safetensors file with the weights; those beside the config when None.
        input_norm: "model" for the mean and deviation the weights were trained with, "none" for raw pixels in [0, 1].
        layers: features are tokens of the last so many blocks in place of the model's own, see `Backbone.reading`.
        means: with `layers`, the mean of a block's other tokens beside its first.
        size: side of images in pixels, a multiple of the patch; positions are interpolated. Its own when None.
        length: of texts in tokens, not below its own, which it is when None.
        positions: with `length`, how positions become more, see `perdure.backbones.positions`: "stretch" keeps the
            first 20 as they are (Long-CLIP), "interpolate" none; "stretch" when None.

    Raises:
        ValueError: when the library is missing, there is no such model or file, or the weights do not fit.
    """
    pretrained.check_norm(input_norm)
    source = locate_model(name, checkpoint)
    options = {"name": source.name}
    if checkpoint is not None:
        options["checkpoint"] = str(source.weights)
    if input_norm != "model":
        options["input_norm"] = input_norm
    with pretrained.reading(str(source.folder or name)):
        model = _create(source)
        _fill(model, source.weights)
        preprocess = _preprocess(source, model, input_norm)
        spec = str(Spec("open_clip", tuple(options.items())))
        made = OpenClip(model, _tokenizer(source), preprocess, spec)
        return elastic(made, size, length, positions).reading(layers, means)


class OpenClip(Backbone):
    """See `open_clip`.

    Args:
        model: a CLIP or CustomTextCLIP of the library; its fused attention is replaced by `Attention`.
        tokenizer: texts to numbers (n, L).
        preprocess: its image processor.
        spec: the text that rebuilds this backbone.
    """

    def __init__(self, model: Any, tokenizer: Any, preprocess: Preprocess, spec: str) -> None:
        super().__init__()
        split_attention(model)
        self.model: Any = pretrained.frozen(model)
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.spec = spec
        self.eval()
        self.dim = pretrained.features_of(self)
        self.length, self.first_position = int(self.model.context_length), 0
        self.scale = float(self.model.logit_scale.exp())  # SigLIP's additional bias is left out

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S) to projected image embeddings (B, dim), not normalised to unit length."""
        embeddings: Tensor = self.model.encode_image(pixels)
        return embeddings

    def tokenise(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What the library's tokenizer gives; where padding has no effect, it is cut off as far as possible."""
        ids: Tensor = self.tokenizer(list(texts))
        counted = self.counted({"ids": ids})
        longest = ids.shape[1] if counted is None else int(counted.any(0).nonzero().max()) + 1
        return {"ids": ids[:, :longest]}

    def embed_tokens(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Projected embeddings (n, dim), not normalised to unit length."""
        ids, text = tokens["ids"], self._text
        embeddings: Tensor
        if not self._reads_to_the_end:
            embeddings = self.model.encode_text(ids)
            return embeddings
        # As the library does, which insists on full length.
        length = ids.shape[1]
        hidden = text.token_embedding(ids) + text.positional_embedding[:length]
        hidden = text.ln_final(text.transformer(hidden, attn_mask=text.attn_mask[:length, :length]))
        embeddings = hidden[torch.arange(len(ids), device=ids.device), self._end(ids)]
        projection = text.text_projection
        if isinstance(projection, nn.Linear):
            embeddings = projection(embeddings)
        elif projection is not None:
            embeddings = embeddings @ projection
        return embeddings

    def counted(self, tokens: Mapping[str, Tensor]) -> Tensor | None:
        """Up to the end of the text where each token reads only those before it, and what is no padding in a BERT."""
        ids = tokens["ids"]
        if self._reads_to_the_end:
            return torch.arange(ids.shape[1], device=ids.device) <= self._end(ids)[:, None]
        if not self._hugging_face:
            return None
        counted: Tensor = ids != self._text.config.pad_token_id
        return counted

    def lengthened(self, length: int) -> None:
        """Masks of what a token sees, and the tokenizer."""
        self.tokenizer.context_length = length
        for holder in {id(each): each for each in (self.model, self._text)}.values():
            holder.context_length = length
            if (mask := getattr(holder, "attn_mask", None)) is not None:
                holder.attn_mask = torch.full((length, length), -torch.inf, dtype=mask.dtype).triu_(1).to(mask.device)

    def towers(self) -> dict[str, str]:
        """Tower -> dotted name of its module."""
        return {"vision": "model.visual", "text": "model.text" if hasattr(self.model, "text") else "model.transformer"}

    def tower_parameters(self, tower: Tower) -> dict[str, nn.Parameter]:
        """Parameters of one encoder with its projection; never the logit scale."""
        every = {n: p for n, p in self.named_parameters() if not n.startswith("model.logit_")}
        seen = {n: p for n, p in every.items() if n.startswith("model.visual.")}
        if tower == "both":
            return every
        return seen if tower == "vision" else {n: p for n, p in every.items() if n not in seen}

    def set_attention(self, implementation: pretrained.Attention) -> None:
        """Choose how attention is computed; the result is the same up to rounding."""
        pretrained.check_attention(implementation)
        for module in self.model.modules():
            if isinstance(module, Attention):
                module.implementation = implementation
            elif hasattr(module, "fused_attn"):
                module.fused_attn = implementation == "sdpa"
        if self._hugging_face:
            pretrained.set_attention(self._text.transformer, implementation)

    @property
    def _text(self) -> Any:
        return getattr(self.model, "text", self.model)

    @property
    def _hugging_face(self) -> bool:
        return hasattr(self._text, "pooler")

    @property
    def _pool(self) -> str:
        return str(getattr(self._text, "text_pool_type", getattr(self._text, "pool_type", "")))

    @property
    def _reads_to_the_end(self) -> bool:
        """Whether the embedding is read at the text's last token, which sees only those before it."""
        causal = getattr(self._text, "attn_mask", None) is not None
        return causal and self._pool in ("argmax", "eos")

    def _end(self, ids: Tensor) -> Tensor:
        if self._pool == "argmax":
            return ids.argmax(1)
        eos: int = getattr(self._text, "text_eos_id", getattr(self._text, "eos_id", -1))
        return ids.eq(eos).int().argmax(1)


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from; without a folder, `name` is one of the library's."""

    name: str
    folder: Path | None
    facts: Mapping[str, Any]
    weights: Path

    @property
    def model(self) -> dict[str, Any]:
        """How the library builds it."""
        return deepcopy(dict(self.facts.get("model_cfg", self.facts)))


def locate_model(name: str, checkpoint: str | None = None) -> ModelSource:
    """Where a model's config and weights are; arguments and errors as of `open_clip`."""
    library = _library()
    given = None
    if checkpoint is not None:
        given = pretrained.local_weights(checkpoint, "give a file that exists")
    path = Path(name).expanduser()
    if name.startswith(_HUB):
        folder = Path(pretrained.fetch(name.removeprefix(_HUB), config=CONFIG, weights=(WEIGHTS,)))
        return ModelSource(name, folder, _read(folder / CONFIG), given or folder / WEIGHTS)
    if path.exists() or path.suffix == ".json" or name.startswith((".", "/", "~")):
        file = path.absolute() / CONFIG if path.is_dir() else path.absolute()
        if not file.is_file():
            raise ValueError(f"name={name!r}: there is no {file.name}; give a folder of OpenCLIP, or a name it knows")
        return ModelSource(str(path.absolute()), file.parent, _read(file), given or _beside(name, file.parent))
    known = library.list_models()
    if name not in known:
        near = difflib.get_close_matches(name.replace("/", "-"), known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see open_clip.list_models()"
        raise ValueError(f"name={name!r}: OpenCLIP has no such model; {hint}")
    if given is None:
        raise ValueError(f"name={name!r} has no weights of its own: add checkpoint=, or give name='hf-hub:...'")
    return ModelSource(name, None, library.get_model_config(name), given)


def _library() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise ValueError("open_clip needs the OpenCLIP library: pip install 'perdure[open_clip]'") from error
    return open_clip


def _read(file: Path) -> dict[str, Any]:
    facts = schema.read_typed(file, dict[str, Any], "get it again")
    model = facts.get("model_cfg", facts)
    if not isinstance(model, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(model):
        raise ValueError(f"{str(file)!r} describes no model of OpenCLIP: it needs embed_dim, vision_cfg and text_cfg")
    return facts


def _beside(name: str, folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if folder / WEIGHTS in files or len(files) == 1:
        return folder / WEIGHTS if folder / WEIGHTS in files else files[0]
    if files:
        raise ValueError(f"name={name!r} has {len(files)} safetensors files beside it: say which with checkpoint=")
    pickled = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        raise ValueError(
            f"name={name!r} has its weights only as {pickled[0]}, a pickle, which can run foreign code when read: "
            f"convert it to {WEIGHTS} on a machine you trust, with safetensors.torch.save_file"
        )
    raise ValueError(f"name={name!r} has no {WEIGHTS} beside it: add it, or give checkpoint=")


def _create(source: ModelSource) -> Any:
    from open_clip import CLIP, CustomTextCLIP
    from open_clip.transformer import CustomResidualAttentionBlock

    facts = source.model
    if "multimodal_cfg" in facts:
        raise ValueError(f"name={source.name!r} is a CoCa, which also writes texts: choose a model of two towers")
    vision, text = facts["vision_cfg"], facts["text_cfg"]
    # The weights come afterwards; those of a single tower would be downloaded, as pickles at times.
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
    own_text = facts.pop("custom_text", False) or "hf_model_name" in text
    try:
        model = (CustomTextCLIP if own_text else CLIP)(**facts)
    except (TypeError, KeyError, AssertionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"name={source.name!r}: OpenCLIP cannot build it ({reason}); correct its config") from error
    if any(isinstance(module, CustomResidualAttentionBlock) for module in model.modules()):
        raise ValueError(f"name={source.name!r} has attention with normalised or scaled heads: choose another model")
    if getattr(getattr(model, "text", None), "cls_emb", None) is not None:
        raise ValueError(f"name={source.name!r} has the text tower of a CoCa (embed_cls): choose another model")
    return model


def _fill(model: Any, file: Path) -> None:
    from open_clip.model import convert_to_custom_text_state_dict

    weights = pretrained.read_weights(file)
    if "positional_embedding" in weights and not hasattr(model, "positional_embedding"):
        weights = convert_to_custom_text_state_dict(weights)
    for name in ("logit_scale", "logit_bias"):
        own = getattr(model, name)
        if own is not None and name in weights and weights[name].numel() == 1:
            weights[name] = weights[name].reshape(own.shape)
    if model.logit_bias is not None:
        weights.setdefault("logit_bias", torch.zeros_like(model.logit_bias))
    # Older versions of transformers saved what is no weight.
    weights.pop("text.transformer.embeddings.position_ids", None)
    pretrained.fill(model, weights, str(file), "give the weights of exactly this OpenCLIP model, under its names")


def _tokenizer(source: ModelSource) -> Any:
    from open_clip import SimpleTokenizer, get_tokenizer
    from open_clip.tokenizer import HFTokenizer

    try:
        if source.folder is None:
            return get_tokenizer(source.name)
        text = source.model["text_cfg"]
        length, options = text.get("context_length", 77), text.get("tokenizer_kwargs") or {}
        if not text.get("hf_tokenizer_name"):
            return SimpleTokenizer(context_length=length, **options)
        mode = text.get("tokenizer_mode")
        return HFTokenizer(str(source.folder), context_length=length, tokenizer_mode=mode, **options)
    except (OSError, ValueError, TypeError) as error:
        where = f"in {str(source.folder)!r}" if source.folder else "here, and the hub gave none"
        raise ValueError(
            f"name={source.name!r}: there is no usable tokenizer {where}; give a folder with open_clip_config.json "
            "and the tokenizer of the original model"
        ) from error


def _preprocess(source: ModelSource, model: Any, input_norm: str) -> Preprocess:
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    overlay = source.facts.get("preprocess_cfg") or {}
    facts = merge_preprocess_dict(PreprocessCfg(), overlay if source.folder else _usual(source.name))
    size = model.visual.image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    if height != width or facts["resize_mode"] not in ("shortest", "squash"):
        raise ValueError(
            f"name={source.name!r} reads images of {height} × {width} with resize_mode={facts['resize_mode']!r}; "
            "expected a square, and 'shortest' or 'squash': choose another model"
        )
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if input_norm == "model":
        mean, std = tuple(facts["mean"]), tuple(facts["std"])
    # As the library has it: any other word means bicubic.
    kind: Interpolation = "bilinear" if facts["interpolation"] == "bilinear" else "bicubic"
    return Preprocess(height, height, mean, std, kind, facts["resize_mode"] == "squash", "round")


def _usual(name: str) -> dict[str, Any]:
    """How images are prepared for all weights of this name that the library knows; nothing where they differ."""
    from open_clip import list_pretrained_tags_by_model
    from open_clip.pretrained import get_pretrained_cfg

    every = [get_pretrained_cfg(name, tag) for tag in list_pretrained_tags_by_model(name)]
    return {
        key: every[0][key]
        for key in ("mean", "std", "interpolation", "resize_mode")
        if every and len({json.dumps(each.get(key)) for each in every}) == 1
    }
