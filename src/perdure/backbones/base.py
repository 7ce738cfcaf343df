"""What every pre-trained model offers: features of a batch, and the layers that can be adapted."""

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, Self, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.backbones.preprocess import Preprocess
from perdure.backbones.sites import OneTower as OneTower
from perdure.backbones.sites import Tower as Tower
from perdure.backbones.sites import block_numbers, sites_in, stack_of_blocks, words_of
from perdure.backbones.sites import named_towers as named_towers
from perdure.options.ranges import without_effect
from perdure.options.spec import Spec, parse_one
from perdure.types import Batch, Site

# Tokenizers are switched for a call, and learners share them.
_TOKENISING = threading.Lock()


class Backbone(nn.Module):
    """A pre-trained encoder: `batch -> features`, (B, dim) float.

    Subclasses set `dim`, `preprocess` and `spec` (the text that rebuilds them) and implement `encode_pixels`; those
    with a text tower also set `scale` and implement `tokenise`, `embed_tokens` and `counted`.
    """

    dim: int
    preprocess: Preprocess
    spec: str
    scale: float | None = None
    """Inverse temperature of image-text scores as it was published: weights in bfloat16 would round it by 0.6 %."""
    layers: int | None = None
    means: bool = True
    """How many blocks features are taken from, and what of each; see `reading`."""
    folds: bool = True
    """Whether finished updates are written into the weights, of which a copy is kept, see `adapters.injection`."""
    published: str = ""
    changed: str = ""
    """Of one that reads larger images or longer texts: the fingerprint without, and what is different."""
    text_mask: Tensor | None = None
    """While texts are encoded: bool (n, L), which of their tokens count; None outside, and where all of them do."""

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S) to features (B, dim)."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Tensor:
        """Features (B, dim) of `batch["image"]`, uint8 (B, 3, S, S)."""
        pixels = self.normalise(batch["image"])
        return self.encode_pixels(pixels) if self.layers is None else self._tokens_of_blocks(pixels)

    @final
    def reading(self, layers: int | None, means: bool = True) -> Self:
        """This model, whose features are now the tokens of its last `layers` vision blocks; None changes nothing.

        What separates classes is not all in a pre-trained encoder's last layer, least of all for data unlike its own:
        LayUP (Ahrens et al., TMLR 2024, arXiv:2312.08888), whose classifier is `ranpac(dim=0)`. Differs: beside each
        block's first token (the class token where the model has one) stands, with `means`, the mean of the others, and
        each is normalised to mean 0 and deviation 1, since blocks differ in scale by orders of magnitude.

        Raises:
            ValueError: when there are not so many blocks, or `means=False` has no effect.
        """
        if layers is None:
            without_effect("without layers", means=None if means else False)
            return self
        if layers > (depth := len(self.blocks())):
            raise ValueError(f"layers={layers}: expected 1 to {depth}, the blocks of {self.spec}")
        self.layers, self.means = layers, means
        self.dim = self.sites("q", "0")[0].fan_in * (1 + means) * layers
        spec, more = parse_one(self.spec), () if means else (("means", False),)
        self.spec = str(Spec(spec.name, (*spec.kwargs, ("layers", layers), *more)))
        return self

    def _tokens_of_blocks(self, pixels: Tensor) -> Tensor:
        """Normalised tokens of the last blocks (B, dim), the lowest block first."""
        taken: list[Tensor] = []

        def take(_block: object, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            taken.extend([hidden[:, 0], hidden[:, 1:].mean(1)] if self.means else [hidden[:, 0]])

        names = self.blocks()[-(self.layers or 0) :]
        handles = [self.get_submodule(name).register_forward_hook(take) for name in names]
        try:
            self.encode_pixels(pixels)
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat([F.layer_norm(token.float(), token.shape[1:]) for token in taken], dim=1)

    def token_groups(self, layer: str) -> list[Tensor] | None:
        """While something is encoded: which tokens that `layer` reads count, bool (n, L) for each kind of them.

        None where all tokens count, which are of one kind.
        """
        return None if self.text_mask is None else [self.text_mask]

    def sample(self) -> Batch:
        """Something small to look at, by which attention that takes no more tokens is found out: a black image."""
        side = self.preprocess.size
        return {"image": next(self.parameters()).new_zeros(1, 3, side, side, dtype=torch.uint8)}

    def prepare(self, batch: Batch) -> Batch:
        """`batch` as it was read with what `forward` needs beside it, such as tokens; called on the reading thread."""
        return batch

    def normalise(self, image: Tensor) -> Tensor:
        """uint8 images to the pixel values the model was trained on, in the precision of its weights."""
        pixels = image.to(torch.float32, copy=True)
        # In place and with plain numbers: no temporaries, and on a GPU no copy of constants that waits for the stream.
        for channel, (mean, std) in enumerate(zip(self.preprocess.mean, self.preprocess.std, strict=True)):
            pixels[:, channel].mul_(1 / (255 * std)).sub_(mean / std)
        return pixels.to(next(self.parameters()).dtype)

    def towers(self) -> dict[str, str]:
        """Tower -> dotted name of its module; every backbone has `vision`, CLIP-like ones `text` too."""
        return {"vision": ""}

    @final
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (n, dim) of `texts`, in the space of the features, not normalised; what is too long is cut off."""
        if not texts and "text" in self.towers():
            return next(self.parameters()).new_zeros(0, self.dim)
        return self.encode_tokens(self.tokenised(texts))

    @final
    def tokenised(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What `tokenise` gives of `texts`, on the model's device."""
        device = next(self.parameters()).device
        with _TOKENISING:
            tokens = self.tokenise(texts)
        return {name: value.to(device) for name, value in tokens.items()}

    @final
    def encode_tokens(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Embeddings (n, dim) of what `tokenise` gave, moved to the model's device."""
        self.text_mask = self.counted(tokens)
        try:
            return self.embed_tokens(tokens)
        finally:
            self.text_mask = None

    def tokenise(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`texts` as the text tower reads them: integers (n, L) on the CPU, L as the longest of them needs."""
        raise self._without_text()

    def unread(self, texts: Sequence[str]) -> list[str]:
        """Why some of `texts` mean nothing to the text tower, a line each; none where they can be read."""
        return []

    def embed_tokens(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """What `encode_tokens` gives, which is the one to call."""
        raise self._without_text()

    def counted(self, tokens: Mapping[str, Tensor]) -> Tensor | None:
        """Which tokens are more than padding, bool (n, L); None when all shape the embeddings."""
        raise self._without_text()

    @property
    def logit_scale(self) -> Tensor:
        """Inverse temperature, a positive float32 scalar: image-text scores are `logit_scale * cosine`.

        Raises:
            ValueError: when there is no text tower.
        """
        if self.scale is None:
            raise self._without_text()
        return torch.tensor(self.scale, dtype=torch.float32, device=next(self.parameters()).device)

    def _without_text(self) -> ValueError:
        return ValueError(
            f"{self.spec} has no text tower; zero-shot and retrieval need a CLIP-like backbone such as clip(path=...)"
        )

    def set_attention(self, implementation: Literal["eager", "sdpa"]) -> None:
        """Choose how attention is computed; the result is the same up to rounding."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """sha256 of the pre-trained weights: says whether a checkpoint belongs to this backbone.

        Of one that reads larger images or longer texts, that of the published weights, and behind it what changed.
        """
        if self.changed:
            return f"{self.published} {self.changed}"
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # of a shard
            digest.update(whole.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def check_finite(self) -> None:
        """Look at all weights once, and at what they make of a black image and a short text.

        Raises:
            ValueError: when any of it is not finite: everything that is learnt from it would be worth nothing.
        """
        self._check_weights()
        with torch.no_grad():
            found = [self(self.sample())]
            if "text" in self.towers():
                found.append(self.encode_text(["a"]))
        if not all(features.isfinite().all() for features in found):
            raise self._not_finite("the model gives features that are")

    def _check_weights(self) -> None:
        for name, weight in self.named_parameters():
            # two numbers, where isfinite would write as many as there are; a NaN is its own least and greatest
            if weight.numel() and not torch.stack(torch.aminmax(weight)).isfinite().all():
                raise self._not_finite(f"the weight {name} is")

    def _not_finite(self, what: str) -> ValueError:
        return ValueError(
            f"{self.spec}: {what} not finite (NaN or infinite): its weights are damaged, or overflow; "
            "get the model again"
        )

    def blocks(self, tower: str = "vision") -> list[str]:
        """Dotted names of the transformer blocks of `tower`, bottom first.

        Raises:
            ValueError: when there is no such tower, or it has none, such as the EfficientNet of ALIGN.
        """
        if tower not in self.towers():
            raise ValueError(f"{self.spec} has no {tower} tower; it has: {', '.join(self.towers())}")
        if names := self._blocks(tower):
            return names
        others = [f"tower={other!r}" for other in self.towers() if other != tower and self._blocks(other)]
        remedy = f"use {others[0]}, which has one, or a ViT" if others else "use a ViT"
        raise ValueError(f"{self.spec}: the {tower} tower has no stack of transformer blocks to adapt; {remedy}")

    def has_blocks(self, tower: str = "vision") -> bool:
        """Whether `tower` has transformer blocks, which can be adapted."""
        return bool(self._blocks(tower))

    def _blocks(self, tower: str) -> list[str]:
        root = self.towers()[tower]
        return [root] if tower == "projector" else stack_of_blocks(self, root)

    def before(self, block: int, batch: Batch) -> Tensor:
        """What vision block number `block` reads, (B, tokens, width); nothing above it is computed."""
        return reached(self.get_submodule(self.blocks()[block]), lambda: self(batch))

    @contextmanager
    def entering(self, block: int, hidden: Tensor) -> Iterator[None]:
        """Within, vision blocks below number `block` are skipped, and it reads `hidden` (B, tokens, width) instead."""
        names = self.blocks()
        skipped = [self.get_submodule(name) for name in names[:block]]
        for each in skipped:
            each.forward = _pass_on
        entry = self.get_submodule(names[block])
        # first, so that prompt tokens join what is read here
        handle = entry.register_forward_pre_hook(lambda _block, args: (hidden, *args[1:]), prepend=True)
        try:
            yield
        finally:
            handle.remove()
            for each in skipped:
                del each.forward

    def sites(self, at: str, blocks: str | None = None, tower: Tower = "vision") -> list[Site]:
        """The layers that `at` names, in one notation for fused and separate projections.

        Args:
            at: letters of attention projections (`q`, `k`, `v`, `o`), or `fc1`, `fc2`, `gate` (where an MLP has one),
                `mlp` (all that there are), joined by commas: `"kv"`, `"qkvo,mlp"`.
            blocks: `"0-4"`, `"0,2,11"`, counted from the bottom; all when None.
            tower: which encoder; a projector is one block.

        Raises:
            ValueError: when a part of the request matches nothing, or would have no effect.
        """
        words, found = words_of(at), list[Site]()
        for each in named_towers(tower):
            names = self.blocks(each)
            for i in block_numbers(blocks, len(names)):
                found += sites_in(self, names[i], words, self.spec)
        return found

    def norm_before(self, site: Site) -> nn.Module | None:
        """The norm through which a block's MLP, whose first layer `site` is, reads the residual stream.

        It is the second of the two norms that stand in the block itself. None where norms come after the sums, as in a
        BERT: there the MLP reads the stream itself; and in language models, whose norms are of kinds of their own.
        """
        block = max(
            (name for t in self.towers() for name in self._blocks(t) if site.layer.startswith(f"{name}.")), key=len
        )
        norms = [m for m in self.get_submodule(block).children() if isinstance(m, nn.LayerNorm | nn.RMSNorm)]
        return norms[1] if len(norms) == 2 else None

    def sites_by_input(self, at: str, blocks: str | None = None, tower: Tower = "vision") -> dict[str, list[Site]]:
        """The same, grouped by what the layers read."""
        groups: dict[str, list[Site]] = {}
        for site in self.sites(at, blocks, tower):
            groups.setdefault(site.input, []).append(site)
        return groups

    def tower_parameters(self, tower: Tower) -> dict[str, nn.Parameter]:
        """Parameters of one encoder with its projection, without the logit scale; for full fine-tuning.

        Raises:
            ValueError: when there is no such tower.
        """
        found: dict[str, nn.Parameter] = {}
        for each in named_towers(tower):
            if each not in self.towers():
                raise ValueError(f"{self.spec} has no {each} tower; it has: {', '.join(self.towers())}")
            root = self.towers()[each]
            found |= {n: p for n, p in self.named_parameters() if not root or n.startswith(f"{root}.")}
        return found


class _Reached(Exception):
    """The watched block has been reached."""


def reached(block: nn.Module, compute: Callable[[], object]) -> Tensor:
    """What `block` reads first while `compute` runs, which goes no further."""
    found: list[Tensor] = []

    def hook(_block: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0].detach())
        raise _Reached

    handle = block.register_forward_pre_hook(hook, prepend=True)
    try:
        with suppress(_Reached):
            compute()
    finally:
        handle.remove()
    return found[0]


def _pass_on(hidden: Tensor, *_args: object, **_kwargs: object) -> Tensor:
    return hidden
