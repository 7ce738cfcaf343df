"""What a language model says after prompts; what several of them begin with is read once.

Questions about the same images, as in most data of questions, differ only after these. The keys and values of such a
beginning, images and what stands before them, are computed once and serve all that begin so.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perdure.backbones import image_features
from perdure.backbones.dialogue import Tokens, collate

_IDS, _MASK = "input_ids", "attention_mask"


class Beginning(NamedTuple):
    """How a prompt begins: tokens up to the last one of an image, and what stands for them and for what is shown."""

    length: int
    content: bytes


@dataclass(frozen=True)
class Answering:
    """How a model is asked.

    Args:
        model: of transformers.
        read: prompts as the model reads them, padded on the left.
        reading: a context in which it does.
        pictures: the tokens that stand for images.
        pad: the padding token; it also stands between a beginning and a shorter rest.
    """

    model: Any
    read: Callable[[Sequence[Tokens]], dict[str, Tensor]]
    reading: Callable[[dict[str, Tensor]], AbstractContextManager[None]]
    pictures: Sequence[int]
    pad: int

    def beginning(self, example: Tokens) -> Beginning:
        """That of `example`; of length 0 where it has no image."""
        ids = example.inputs[_IDS][0, : example.prompt]
        shown = torch.isin(ids, ids.new_tensor(self.pictures)).nonzero()
        length = int(shown.max()) + 1 if len(shown) else 0
        digest = hashlib.sha256(ids[:length].numpy().data)
        for part in (example.seen, *image_features.pixels(example)) if length else ():
            if isinstance(part, Tensor):
                digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return Beginning(length, digest.digest())

    def said(self, asked: Sequence[Tokens], begins: Sequence[Beginning], **options: Any) -> list[Tensor]:
        """New tokens after each of `asked`; those that begin alike are answered with their beginnings read once.

        Args:
            asked: prompts.
            begins: how each begins; empty where all are to be read whole.
            options: of `generate` of the model.
        """
        runs: dict[int, list[int]] = {}
        for place, begin in enumerate(begins):
            if begin.length and begins.count(begin) > 1:
                runs.setdefault(begin.length, []).append(place)
        found: dict[int, Tensor] = {}
        for run in runs.values():
            found |= zip(run, self._after([asked[i] for i in run], [begins[i] for i in run], options), strict=True)
        if rest := [i for i in range(len(asked)) if i not in found]:
            inputs = self.read([asked[i] for i in rest])
            with self.reading(inputs):
                whole = self.model.generate(**inputs, **options)
            found |= zip(rest, whole[:, inputs[_IDS].shape[1] :], strict=True)
        return [found[i] for i in range(len(asked))]

    def _after(self, asked: Sequence[Tokens], begins: Sequence[Beginning], options: dict[str, Any]) -> Tensor:
        """New tokens after prompts whose beginnings are of one length."""
        length, kinds = begins[0].length, list(dict.fromkeys(begins))
        begun = self.read([_some(asked[begins.index(kind)], slice(length)) for kind in kinds])
        ids, mask = begun[_IDS], begun[_MASK]
        with self.reading(begun):
            read = self.model.base_model(**begun, use_cache=True)
        name = next(each for each in _CACHES if getattr(read, each, None) is not None)
        owners = torch.tensor([kinds.index(each) for each in begins], device=ids.device)
        getattr(read, name).batch_select_indices(owners)
        rest = collate([_some(each, slice(length, None)) for each in asked], "left", self.pad)
        whole = {
            _IDS: torch.cat([ids[owners], rest[_IDS].to(ids.device)], 1),
            _MASK: torch.cat([mask[owners], rest[_MASK].to(mask.device)], 1),
        }
        with self.reading(dict(whole)):
            said: Tensor = self.model.generate(**whole, **{name: getattr(read, name)}, **options)
        return said[:, whole[_IDS].shape[1] :]

    def holds(self, asked: Sequence[Tokens]) -> bool:
        """Whether the model answers `asked`, of which some begin alike, as it does when each is read whole.

        Not where images see what comes after them, and not where positions are counted otherwise than by the mask.
        """
        if hasattr(self.model.base_model, "get_rope_index"):
            return False
        begins = [self.beginning(each) for each in asked]

        def first(begins: Sequence[Beginning]) -> Tensor:
            logits: list[Tensor] = []

            def watch(_ids: Tensor, scores: Tensor) -> Tensor:
                logits.append(scores.float())
                return scores

            self.said(asked, begins, max_new_tokens=1, use_cache=True, logits_processor=[watch])
            return torch.cat(logits)

        try:
            with torch.no_grad():
                whole, shared = first([]), first(begins)
        except (AttributeError, IndexError, RuntimeError, StopIteration, TypeError, ValueError):  # a family of its own
            return False
        return torch.allclose(whole, shared, atol=1e-2 * float(whole.abs().max()), rtol=1e-2)


_CACHES = "cache", "past_key_values"
"""What transformers calls keys and values: the first since 5.24."""


def alike_together(begins: Sequence[Beginning]) -> list[int] | None:
    """Places of prompts, those that begin alike next to each other, the longest beginnings first; None without any."""
    return sorted(range(len(begins)), key=lambda i: begins[i], reverse=True) if begins else None


def _some(example: Tokens, of: slice) -> Tokens:
    """Some of the tokens of `example`: the first ones with its images, the last ones without."""
    shows = of.start is None
    inputs = {
        name: value[:, of] if example.spans(value) else value
        for name, value in example.inputs.items()
        if shows or example.spans(value)
    }
    return Tokens(inputs, inputs[_IDS].shape[1], seen=example.seen if shows else None)
