"""The fused attention of OpenCLIP taken apart, so that its projections can be adapted."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.backbones.pretrained import Attention as Implementation


class Attention(nn.Module):
    """What `nn.MultiheadAttention` computes for one input, with projections that are layers of their own."""

    def __init__(self, fused: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = fused.num_heads
        self.implementation: Implementation = "sdpa"
        weights = fused.in_proj_weight.chunk(3)
        biases = (None,) * 3 if fused.in_proj_bias is None else fused.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = _linear(fused.out_proj.weight, fused.out_proj.bias)

    def forward(
        self, x: Tensor, _key: Tensor, _value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """(B, L, width) to the same; keys and values are those of `x`, which stands there three times."""
        parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mask = None if attn_mask is None else attn_mask.to(q.dtype)
        if self.implementation == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            out = (scores if mask is None else scores + mask).softmax(-1) @ v
        projected: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return projected, None


def split_attention(model: nn.Module) -> None:
    """Replace the fused attention of every block that reads one input by `Attention`, with the same weights."""
    from open_clip.transformer import ResidualAttentionBlock, Transformer

    for module in list(model.modules()):
        if isinstance(module, Transformer):
            module.batch_first = True
        elif isinstance(module, ResidualAttentionBlock) and not hasattr(module, "ln_1_kv"):
            module.attn = Attention(module.attn)


def fused_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model that was unpacked, under the library's own names."""
    weights = model.state_dict()
    for name, module in model.named_modules():
        if not isinstance(module, Attention):
            continue
        for kind in ("weight", "bias"):
            parts = [weights.pop(f"{name}.{part}_proj.{kind}", None) for part in "qkv"]
            if all(part is not None for part in parts):
                weights[f"{name}.in_proj_{kind}"] = torch.cat(parts)
    return weights


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer
