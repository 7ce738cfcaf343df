"""A tiny seeded transformer with image and text tower, the same on every machine: for tests and examples."""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.backbones.base import Backbone, Tower
from perdure.backbones.preprocess import Preprocess
from perdure.options.ranges import Count, Range, Seed, checked
from perdure.options.spec import Spec

_HEADS = 4
_PATCH = 4  # side, in pixels
_LENGTH = 48  # characters of a text that are read


@checked
def tiny(
    dim: Annotated[int, Range(_HEADS, 512)] = 32,
    depth: Annotated[int, Range(1, 16)] = 2,
    size: Annotated[int, Range(_PATCH, 128)] = 16,
    seed: Seed = 7,
    fused: bool = True,
    text: bool = False,
    layers: Count | None = None,
    means: bool = True,
) -> "Tiny":
    """A ViT of random weights, for tests: milliseconds a step, no files.

    Args:
        dim: width, and number of features; a multiple of 4.
        depth: number of blocks.
        size: side of the images, in pixels; a multiple of 4.
        seed: of the weights; the random state of torch is left alone.
        fused: one `qkv` layer as in timm, or `q_proj`, `k_proj`, `v_proj` as in Hugging Face; same features.
        text: add a text tower, as CLIP has.
        layers: features are tokens of the last so many blocks in place of the model's own, see `Backbone.reading`.
        means: with `layers`, the mean of a block's other tokens beside its first.
    """
    for name, value, unit in (("dim", dim, _HEADS), ("size", size, _PATCH)):
        if value % unit:
            raise ValueError(f"{name}={value}: expected a multiple of {unit}, for example {name}={4 * unit}")
    model = Tiny(dim, depth, size, seed, fused, text)
    return model.eval().requires_grad_(False).reading(layers, means)


class Tiny(Backbone):
    """See `tiny`."""

    def __init__(self, dim: int, depth: int, size: int, seed: int, fused: bool, text: bool) -> None:
        super().__init__()
        options = {"dim": dim, "depth": depth, "size": size, "seed": seed, "fused": fused, "text": text}
        self.dim = dim
        self.preprocess = Preprocess(size=size, resize=size, interpolation="bilinear")
        self.spec = str(Spec("tiny", tuple(options.items())))
        # Modules draw their default weights from the global generator; on "meta" they draw nothing.
        with torch.device("meta"):
            self.vision = _VisionTower(dim, depth, size, fused)
            self.text = _TextTower(dim, depth, fused) if text else None
        self.float().to_empty(device="cpu")
        _fill(self, seed)
        if self.text is not None:
            self.scale = float(self.text.scale.detach().exp())

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (B, 3, size, size) to features (B, dim): the class token after the last norm."""
        features: Tensor = self.vision(pixels)
        return features

    def tokenise(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Numbers of the characters, 0 where a text has ended."""
        return super().tokenise(texts) if self.text is None else {"ids": _characters(texts)}

    def embed_tokens(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """The mean over characters after the last block, normed."""
        embeddings: Tensor = super().embed_tokens(tokens) if self.text is None else self.text(tokens["ids"])
        return embeddings

    def counted(self, tokens: Mapping[str, Tensor]) -> Tensor | None:
        """Where there is a character."""
        return tokens["ids"] > 0

    def towers(self) -> dict[str, str]:
        """Tower -> dotted name of its module."""
        return {"vision": "vision"} if self.text is None else {"vision": "vision", "text": "text"}

    def tower_parameters(self, tower: Tower) -> dict[str, nn.Parameter]:
        """Parameters of one encoder; never the logit scale."""
        return {name: p for name, p in super().tower_parameters(tower).items() if name != "text.scale"}

    def set_attention(self, implementation: Literal["eager", "sdpa"]) -> None:
        """Choose how attention is computed; the result is the same up to rounding."""
        if implementation not in ("eager", "sdpa"):
            raise ValueError(f"attention={implementation!r}: expected 'eager' or 'sdpa'")
        for module in self.modules():
            if isinstance(module, _Attention):
                module.implementation = implementation


class _VisionTower(nn.Module):
    """Normalised pixels to the class token's features."""

    def __init__(self, dim: int, depth: int, size: int, fused: bool) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, _PATCH, _PATCH)
        self.token = nn.Parameter(torch.empty(1, 1, dim))
        self.position = nn.Parameter(torch.empty(1, 1 + (size // _PATCH) ** 2, dim))
        self.blocks = nn.ModuleList(_Block(dim, fused) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(patches), -1, -1), patches], 1) + self.position
        for block in self.blocks:
            x = block(x, None)
        features: Tensor = self.norm(x[:, 0])
        return features


class _TextTower(nn.Module):
    """Character ids, 0 where the text has ended, to embeddings."""

    def __init__(self, dim: int, depth: int, fused: bool) -> None:
        super().__init__()
        self.character = nn.Embedding(256, dim)
        self.position = nn.Parameter(torch.empty(1, _LENGTH, dim))
        self.blocks = nn.ModuleList(_Block(dim, fused) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.scale = nn.Parameter(torch.empty(()))

    def forward(self, ids: Tensor) -> Tensor:
        real = ids > 0
        x = self.character(ids) + self.position[:, : ids.shape[1]]
        for block in self.blocks:
            x = block(x, real[:, None, None])
        weight = (real / real.sum(1, keepdim=True)).unsqueeze(-1).to(x.dtype)
        embeddings: Tensor = self.norm((x * weight).sum(1))
        return embeddings


class _Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = _Attention(dim, fused), _Mlp(dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class _Attention(nn.Module):
    """Self-attention with one fused or three separate input projections."""

    def __init__(self, dim: int, fused: bool) -> None:
        super().__init__()
        self.implementation, self.num_heads = "sdpa", _HEADS
        self.fused = fused
        if fused:
            self.qkv = nn.Linear(dim, 3 * dim)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        parts = self.qkv(x).chunk(3, -1) if self.fused else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (part.unflatten(-1, (_HEADS, -1)).transpose(1, 2) for part in parts)
        if self.implementation == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            out = (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1) @ v
        projected: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return projected


class _Mlp(nn.Module):
    """The two layers after attention."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


def _characters(texts: Sequence[str]) -> Tensor:
    codes = [[1 + ord(c) % 255 for c in text[:_LENGTH]] or [1] for text in texts]
    longest = max(map(len, codes), default=1)
    return torch.tensor([row + [0] * (longest - len(row)) for row in codes], dtype=torch.int64).view(-1, longest)


def _fill(model: nn.Module, seed: int) -> None:
    """Set every parameter from the seed and its name, so that fused and separate projections get the same values."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if ".norm" in name:
                parameter.fill_(float(name.endswith("weight")))
            elif name == "text.scale":
                parameter.fill_(math.log(10))
            elif ".qkv." in name:
                for part, letter in zip(parameter.chunk(3), "qkv", strict=True):
                    _draw(part, name.replace("qkv", f"{letter}_proj"), seed)
            else:
                _draw(parameter, name, seed)


def _draw(tensor: Tensor, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    fan_in = tensor[0].numel() if name.endswith("weight") and "character" not in name else 1
    spread = 0.02 if name.endswith("bias") else 0.5 if name.endswith("position") else 1 / math.sqrt(fan_in)
    tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * spread)
