"""Where adapters can stand: one notation for towers, blocks and projections of all model families."""

import re
from collections.abc import Sequence
from typing import Literal, cast

from torch import nn

from perdure.types import Site

Tower = Literal[
    "vision",
    "text",
    "both",
    "language",
    "projector",
    "vision+projector",
    "vision+language",
    "projector+language",
    "vision+projector+language",
]
"""One encoder, or `both` of a pair: `vision` and `text`. A multimodal language model has `language`, `projector`
and sums of these."""
OneTower = Literal["vision", "text", "language", "projector"]

# Word -> names, inside a block, of its linear layer in the model families we know: timm, HF vision and CLIP, OpenCLIP,
# BERT (the text tower of Chinese-CLIP, ALIGN and dual encoders), Llama and its kin, projectors of LLaVA and Qwen.
_PROJECTIONS = {
    "q": re.compile(r"(.*\.)?(q_proj|query|q)"),
    "k": re.compile(r"(.*\.)?(k_proj|key|k)"),
    "v": re.compile(r"(.*\.)?(v_proj|value|v)"),
    "o": re.compile(r"(.*\.)?(out_proj|o_proj|proj|projection_layer|attention\.output\.dense)"),
    "fc1": re.compile(r"(.*\.)?(fc1|fc1_x|up_proj|intermediate\.dense|mlp\.c_fc|linear_fc1|linear_1|mlp\.0)"),
    "fc2": re.compile(r"(.*\.)?(fc2|down_proj|mlp\.c_proj|linear_fc2|linear_2|mlp\.2)|output\.dense"),
    "gate": re.compile(r"(.*\.)?(gate_proj|fc1_g)"),
}
_MLP = ("fc1", "fc2", "gate")
_OTHER_NAMES = {"up": "fc1", "down": "fc2"}
_FUSED = re.compile(r"(.*\.)?qkv")


def named_towers(tower: Tower) -> tuple[OneTower, ...]:
    """The encoders that `tower` names, `vision` first."""
    return ("vision", "text") if tower == "both" else cast(tuple[OneTower, ...], tuple(tower.split("+")))


def stack_of_blocks(model: nn.Module, root: str) -> list[str]:
    """Dotted names of the blocks of the deepest stack of transformer blocks within the module `root`, bottom first."""
    prefix = root + "." if root else ""
    stacks = [
        (name, len(stack))
        for name, stack in model.named_modules()
        if name.startswith(prefix) and isinstance(stack, nn.ModuleList | nn.Sequential) and _is_stack(stack)
    ]
    name, depth = max(stacks, key=lambda stack: stack[1], default=("", 0))
    return [f"{name}.{i}" for i in range(depth)]


def sites_in(model: nn.Module, block: str, words: Sequence[str], spec: str) -> list[Site]:
    """The layers of the module `block` that `words` name, as `words_of` gives them.

    Args:
        model: the backbone.
        block: dotted name.
        words: `q`, `k`, `v`, `o`, `fc1`, `fc2`, `gate`, and `mlp` for `fc1`, `fc2`, and `gate` where there is one.
        spec: of the model, for messages.

    Raises:
        ValueError: when a word matches nothing, or a layer that its model never calls.
    """
    linear = {name: layer for name, layer in model.get_submodule(block).named_modules() if isinstance(layer, nn.Linear)}
    found: list[Site] = []
    for word in words:
        for part in _MLP if word == "mlp" else (word,):
            site = _site(model, block, part, linear)
            if site is not None:
                found.append(site)
            elif part == word or part != "gate":
                have = ", ".join(linear) or "no linear layer"
                raise ValueError(f"{spec}: nothing matches at={part!r} in block {block!r}, which has: {have}")
    return found


def _site(model: nn.Module, block: str, word: str, linear: dict[str, nn.Linear]) -> Site | None:
    key = f"{block}:{word}"
    read = f"{block}:qkv" if word in "qkv" else f"{block}:fc1" if word == "gate" else key
    for short, layer in linear.items():
        name = f"{block}.{short}"
        if _PROJECTIONS[word].fullmatch(short):
            if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
                raise ValueError(
                    f"{name} is part of nn.MultiheadAttention, which never calls it: an adapter there would have "
                    "no effect; choose other sites, or a copy of the model that open_clip, clip or timm reads"
                )
            return Site(key, name, read, layer.in_features, (0, layer.out_features))
        if word in "qkv" and _FUSED.fullmatch(short):
            width, part = layer.out_features // 3, "qkv".index(word)
            return Site(key, name, read, layer.in_features, (part * width, (part + 1) * width))
    return None


def words_of(at: str) -> list[str]:
    """The words of `at`: `"qv,mlp"` is `q`, `v`, `mlp`.

    Raises:
        ValueError: for what cannot be read, and for a layer that is named twice.
    """
    words: list[str] = []
    for word in at.replace(" ", "").split(","):
        if word in (*_MLP, *_OTHER_NAMES, "mlp"):
            words.append(_OTHER_NAMES.get(word, word))
        elif word and set(word) <= set("qkvo"):
            words += list(word)
        else:
            raise ValueError(
                f"at={at!r}: cannot read {word!r}; write letters of qkvo, or fc1 (up), fc2 (down), gate, mlp: 'kv,mlp'"
            )
    layers = [part for word in words for part in (_MLP if word == "mlp" else (word,))]
    if len(set(layers)) < len(layers):
        raise ValueError(f"at={at!r} names a layer twice")
    return words


def block_numbers(blocks: str | None, depth: int) -> list[int]:
    """The numbers that `"0-4"` or `"0,2,11"` names of `depth` blocks, in order; all when None.

    Raises:
        ValueError: for what cannot be read, or does not exist.
    """
    if blocks is None:
        return list(range(depth))
    chosen: list[int] = []
    for word in str(blocks).replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if not match:
            raise ValueError(f"blocks={blocks!r}: cannot read {word!r}; write '0-4' or '0,2,5'")
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= depth or first > last:
            raise ValueError(f"blocks={blocks!r}: {word!r} is outside 0-{depth - 1}, the blocks of this model")
        chosen += range(first, last + 1)
    return sorted(set(chosen))


def _is_stack(modules: nn.Module) -> bool:
    """Whether the children are blocks with attention, all alike: neither an MLP's layers nor a pooling head."""
    children = list(modules.children())
    return len({type(child) for child in children}) == 1 and all(map(_has_attention, children))


def _has_attention(block: nn.Module) -> bool:
    return any(
        isinstance(module, nn.MultiheadAttention)
        or (isinstance(module, nn.Linear) and (_FUSED.fullmatch(name) or _PROJECTIONS["q"].fullmatch(name)))
        for name, module in block.named_modules()
    )
