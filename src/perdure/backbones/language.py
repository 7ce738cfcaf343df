"""A multimodal language model: rows are the tokens of answers, and answers are said in words.

`forward` gives the hidden states in front of answer tokens, `head` their logits. So the logits of images and questions,
gigabytes for a large vocabulary, are never computed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from perdure.adapters.injection import prompted
from perdure.backbones import image_features, pretrained
from perdure.backbones.answering import Answering, alike_together
from perdure.backbones.base import Backbone, reached
from perdure.backbones.dialogue import Dialogue, Tokens, by_length, collate
from perdure.backbones.model_parts import checkpointed, image_tokens, preprocess_of, projectors, unread
from perdure.backbones.sites import Tower, named_towers
from perdure.types import Batch, Site, take

T = TypeVar("T")
Within = Callable[[Batch], AbstractContextManager[None]]
_SEEN = "seen"
_SIZE = 64
"""Conversations that are answered together, unless they do not fit."""


def _plainly(_batch: Batch) -> AbstractContextManager[None]:
    return nullcontext()


class Language(Backbone):
    """A model of transformers with its processor, see `mllm`.

    Args:
        model: of transformers, with `get_decoder` and `get_encoder("image")`.
        processor: its processor, with a chat template.
        spec: the text that rebuilds this backbone.
        length: see `mllm`.
        hashed: what identifies the weights; of a model without files, None computes it.
    """

    def __init__(
        self, model: Any, processor: Any, spec: str, length: int | None = None, hashed: str | None = None
    ) -> None:
        super().__init__()
        self.model: Any = model.eval().requires_grad_(False)
        self.spec, self._hashed = spec, hashed
        # bfloat16 rounds a small update away when it is added to a weight, and quantised weights cannot be written
        self.folds = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
        text = model.config.get_text_config()
        self.dim = int(text.hidden_size)
        self.checkpointing = False
        self._projectors = projectors(self)
        self._unread = unread(model.config)
        self._pictures = image_tokens(model.config)
        self.image_mask: Tensor | None = None
        self._sees_once = self._tried = False
        self._shares: bool | None = None  # None: not tried yet
        self._form: image_features.Form | None = None  # of what the model sees; None: not known yet
        self.preprocess = preprocess_of(model.config)
        stops = _ids(model.generation_config.eos_token_id) + _ids(processor.tokenizer.eos_token_id)
        most = getattr(text, "max_position_embeddings", None)
        self.dialogue = Dialogue(processor, stops, spec, length, most or 2**20)
        # what checkpoints bring along (sampling, penalties of repetition) would change what is greedy
        kept = {"eos_token_id": self.dialogue.stops, "pad_token_id": self.dialogue.pad}
        model.generation_config = type(model.generation_config)(**kept, do_sample=False, num_beams=1)

    def towers(self) -> dict[str, str]:
        """Tower -> dotted name of its module: `vision`, `projector` and `language`."""
        names = {id(module): name for name, module in self.named_modules()}
        body = self.model.base_model
        found = {"vision": names[id(body.get_encoder("image"))], "language": names[id(body.get_decoder())]}
        return found | ({"projector": self._projectors[0]} if self._projectors else {})

    def sites(self, at: str, blocks: str | None = None, tower: Tower = "vision") -> list[Site]:
        """See `Backbone.sites`; the "mlp" of a projector is all of its linear layers, in each family one to eight."""
        if "+" in tower:
            return [site for each in named_towers(tower) for site in self.sites(at, blocks, each)]
        if tower != "projector" or at != "mlp" or blocks is not None:
            return super().sites(at, blocks, tower)
        inside = [(n, m) for n, m in self.named_modules() if isinstance(m, nn.Linear) and self._projects(n)]
        return [Site(name, name, name, layer.in_features, (0, layer.out_features)) for name, layer in inside] or (
            super().sites(at, blocks, tower)
        )

    def _blocks(self, tower: str) -> list[str]:
        """Those that are read: of LLaVA's vision tower the last one is not."""
        names = super()._blocks(tower)
        return names[: len(names) - self._unread] if tower == "vision" else names

    def tower_parameters(self, tower: Tower) -> dict[str, nn.Parameter]:
        """Parameters of one tower; the projector's are not the vision tower's, though they may stand in it."""
        if "+" in tower:
            return {n: p for each in named_towers(tower) for n, p in self.tower_parameters(each).items()}
        if tower == "projector":
            return {name: p for name, p in self.named_parameters() if self._projects(name)}
        found = {name: p for name, p in super().tower_parameters(tower).items() if not self._projects(name)}
        idle = super()._blocks(tower)[len(self._blocks(tower)) :]
        return {name: p for name, p in found.items() if not name.startswith(tuple(f"{block}." for block in idle))}

    def _projects(self, name: str) -> bool:
        return any(name.startswith(f"{root}.") for root in self._projectors)

    def prepare(self, batch: Batch) -> Batch:
        """`batch` with the tokens of each of its conversations, which the reading thread makes, once.

        Raises:
            ValueError: for a conversation that cannot be read, see `Dialogue`.
        """
        if "tokens" in batch or "conversation" not in batch:
            return batch
        return batch | {"tokens": [self.dialogue(each) for each in batch["conversation"]]}

    def tokens(self, batch: Batch) -> list[Tokens]:
        """What `prepare` makes of the conversations of `batch`, where it has not been made yet."""
        return list(self.prepare(batch)["tokens"])

    def forward(self, batch: Batch) -> Tensor:
        """Hidden states in front of the answers' tokens, (R, dim): one conversation's after another's.

        Raises:
            ValueError: when a conversation has no answer: there is nothing to be learnt from it.
        """
        examples = self.tokens(batch)
        if any(not len(each.answer) for each in examples):
            raise ValueError("a conversation without an answer cannot be learnt: leave it out")
        hidden = self._hidden(self._inputs(examples, "right"))
        places = [torch.arange(each.prompt - 1, len(each) - 1) for each in examples]
        return hidden[_owners(examples).to(hidden.device), torch.cat(places).to(hidden.device)]

    def head(self, rows: Tensor) -> Tensor:
        """Logits (R, vocabulary) in float32 of hidden states (R, dim)."""
        head = self.model.get_output_embeddings()
        logits: Tensor = head(rows.to(head.weight.dtype) if head.weight.is_floating_point() else rows).float()
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def targets(self, batch: Batch) -> Tensor:
        """The token that each row is to give, int64 (R,)."""
        return torch.cat([each.answer for each in self.tokens(batch)]).to(self._device)

    def owners(self, batch: Batch) -> Tensor:
        """The conversation of each row, int64 (R,)."""
        return _owners(self.tokens(batch)).to(self._device)

    def generate(
        self, batch: Batch, tokens: int = 32, size: int = _SIZE, within: Within = _plainly, alike: bool = False
    ) -> list[str]:
        """What the model says, greedily, in each conversation of `batch`.

        Args:
            batch: with `conversation`; answers that it holds are not looked at.
            tokens: most tokens of an answer.
            size: conversations that are answered together; fewer where they do not fit into memory.
            within: in which context each part of the batch is answered, see `Method.applied`.
            alike: whether that context is the same for all examples, so that what some of them begin with is read once.
        """
        asked = [each.with_answer(()) for each in self.tokens(batch)]
        # what joins in front would join again with every token that is said; and where all is read again, an image's
        # token that was said would want an image
        again = prompted(self.get_submodule(self.towers()["language"]))
        options: dict[str, Any] = {"use_cache": not again, "max_new_tokens": tokens}
        if again and self._pictures:
            options["suppress_tokens"] = self._pictures
        answering = self._answering
        begins = list(map(answering.beginning, asked)) if alike and not again and self._begins_once() else []

        def say(some: Sequence[int]) -> list[str]:
            with torch.no_grad(), within(take(batch, torch.tensor(some))):
                new = answering.said([asked[i] for i in some], [begins[i] for i in some if begins], **options)
            texts: list[str] = self.dialogue.tokenizer.batch_decode(new, skip_special_tokens=True)
            return [text.strip() for text in texts]

        return by_length(asked, say, size, alike_together(begins))

    def likelihoods(
        self,
        batch: Batch,
        options: Sequence[Sequence[str]],
        size: int = _SIZE,
        per: Literal["token", "option"] = "token",
        within: Within = _plainly,
    ) -> list[Tensor]:
        """How likely each of the options is as the answer to its conversation: log-probabilities, (options,) each.

        The token that ends an answer is left out, so that of single letters the most likely first token wins.

        Args:
            batch: with `conversation`.
            options: of each conversation.
            size: answers that are read together; fewer where they do not fit into memory.
            per: the mean over the option's tokens, or their sum, which favours short ones.
            within: see `generate`.
        """
        prompts, conversations = self.tokens(batch), batch["conversation"]
        owners = [i for i, own in enumerate(options) for _ in own]
        said = [option for own in options for option in own]
        asked = [
            self.dialogue.answered(prompts[i], conversations[i], option, end=False)
            for i, option in zip(owners, said, strict=True)
        ]

        def score(some: Sequence[int]) -> list[Tensor]:
            read = take(batch, torch.tensor([owners[i] for i in some])) | {"tokens": [asked[i] for i in some]}
            with torch.no_grad(), within(read):
                found = -nn.functional.cross_entropy(self.head(self(read)), self.targets(read), reduction="none")
            pieces = torch.split(found.cpu(), [len(asked[i].answer) for i in some])
            return [piece.mean() if per == "token" else piece.sum() for piece in pieces]

        scores = torch.stack(by_length(asked, score, size)) if asked else torch.empty(0)
        return list(torch.split(scores, [len(own) for own in options]))

    @torch.no_grad()
    def pooled(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the language tower is given of each conversation of `batch`, without its answer, before it computes.

        Returns:
            means over the tokens of its images, as vision tower and projector make them, and over the embeddings of its
            words: float32 (B, dim) each, of unit length; zeros where there are none.
        """
        inputs = self._inputs([each.with_answer(()) for each in self.tokens(batch)], "right")
        block = self.get_submodule(self.blocks("language")[0])
        read = reached(block, lambda: self._hidden(inputs)).float()
        self._forget_positions()
        shown = torch.isin(inputs["input_ids"], inputs["input_ids"].new_tensor(self._pictures))
        said = inputs["attention_mask"].bool() & ~shown
        sums = [(read * tokens.unsqueeze(-1)).sum(1) for tokens in (shown, said)]
        return nn.functional.normalize(sums[0], dim=1), nn.functional.normalize(sums[1], dim=1)

    def see(self, example: Tokens) -> Tokens:
        """`example` with what vision tower and projector make of its images, by themselves, in place of these."""
        if not image_features.has_images(example):
            return example
        asked = [example.with_answer(())]
        found = image_features.seen_of(self.model.base_model, lambda: self._hidden(self._inputs(asked, "right")))
        assert found is not None
        seen, self._form = found
        return image_features.instead(example, seen)

    def sees_once(self) -> bool:
        """Whether all that the model reads of images is what `see` finds: tried on a short conversation, once."""
        if not self._tried:
            self._tried = True
            batch = self.sample()
            try:
                with torch.no_grad():
                    alone = [self.see(each) for each in self.tokens(batch)]
                    self._sees_once = torch.equal(self(batch), self({"tokens": alone}))
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # a family of its own kind
                self._sees_once = False
        return self._sees_once

    def _begins_once(self) -> bool:
        """Whether questions about one image may be answered together, see `Answering.holds`: tried once."""
        if self._shares is None:
            self._shares = self._answering.holds(self.tokens(self.sample("a", "a a a a", answer=None)))
        return self._shares

    @property
    def _answering(self) -> Answering:
        def read(examples: Sequence[Tokens]) -> dict[str, Tensor]:
            self._forget_positions()
            return self._inputs(examples, "left")

        return Answering(self.model, read, self._reading, self._pictures, self.dialogue.pad)

    def token_groups(self, layer: str) -> list[Tensor] | None:
        """See `Backbone.token_groups`: of images, and of words."""
        if self.text_mask is None or not layer.startswith(f"{self.towers()['language']}."):
            return None
        assert self.image_mask is not None
        return [self.text_mask & self.image_mask, self.text_mask & ~self.image_mask]

    def sample(self, *words: str, answer: str | None = "a") -> Batch:
        """Short conversations about a black image, one with each of `words`, or one with "a"."""
        shown = {"images": [Image.new("RGB", (self.preprocess.size,) * 2)], "answer": answer}
        parts = [[{"type": "image"}, {"type": "text", "text": each}] for each in words or ("a",)]
        return {"conversation": [shown | {"messages": [{"role": "user", "content": each}]} for each in parts]}

    def set_attention(self, implementation: pretrained.Attention) -> None:
        """Choose how attention is computed; the result is the same up to rounding."""
        pretrained.check_attention(implementation)
        self.model.set_attn_implementation(implementation)

    def fingerprint(self) -> str:
        """Of the files' hashes: weights that take gigabytes are not read once more."""
        return f"{self._hashed} {self.changed}".rstrip() if self._hashed else super().fingerprint()

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Refused: an image by itself is not asked about.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{self.spec} answers questions and has no features of images: use a stream of conversations with "
            "the objective generate(), or another backbone"
        )

    def check_finite(self) -> None:
        """Look at all weights once, and at what they make of a short conversation.

        Raises:
            ValueError: when any of it is not finite, or the model is none whose answers are read from left to right.
        """
        self._check_weights()
        asked = self.dialogue({"messages": [{"role": "user", "content": "a"}]})
        first, other = (asked.with_answer([token, token, last]) for token, last in ((0, 1), (0, 2)))
        with torch.no_grad():
            rows = self({"tokens": [first]})
            again = self({"tokens": [first.with_answer(other.answer.tolist())]})
            inputs = self._inputs([first], "right")
            whole = self.model(**inputs).logits[0, first.prompt - 1 : -1].float()
            logits = self.head(rows)
        if not logits.isfinite().all():
            raise self._not_finite("the model gives logits that are")
        if not torch.equal(rows[:-1], again[:-1]) and not torch.allclose(rows[:-1], again[:-1], atol=1e-2, rtol=1e-2):
            raise ValueError(
                f"{self.spec}: the tokens of an answer see those that come after them: not a model to teach"
            )
        if not torch.allclose(logits, whole, atol=1e-2 * float(whole.abs().max()), rtol=1e-2):
            raise ValueError(f"{self.spec}: its logits are more than its head makes of its last hidden states")

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def _inputs(self, examples: Sequence[Tokens], side: Literal["left", "right"]) -> dict[str, Tensor]:
        if any(each.seen is not None for each in examples):  # beside old ones, of which it is not known
            examples = [self.see(each) if image_features.has_images(each) else each for each in examples]
        found = collate(examples, side, self.dialogue.pad)
        if hasattr(self.model.base_model, "get_rope_index") and "mm_token_type_ids" not in found:
            raise ValueError(
                f"{self.spec}: its processor does not say which tokens are of images (mm_token_type_ids), by which "
                "positions are counted: get the processor's files again"
            )
        dtype = self.model.get_input_embeddings().weight.dtype
        inputs = {
            name: value.to(self._device, dtype if value.is_floating_point() else None, non_blocking=True)
            for name, value in found.items()
        }
        if (seen := image_features.all_seen(examples, self._device)) is not None:
            # the pixels are there to be asked for, and not read
            inputs |= {_SEEN: seen, image_features.PIXELS[0]: seen.new_zeros(1)}
        return inputs

    def _hidden(self, inputs: dict[str, Tensor]) -> Tensor:
        """Last hidden states (B, L, dim)."""
        self._forget_positions()
        with self._reading(inputs), checkpointed(self.model, self.checkpointing):
            hidden: Tensor = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        return hidden

    @contextmanager
    def _reading(self, inputs: dict[str, Tensor]) -> Iterator[None]:
        """Within, `text_mask` says which tokens are more than padding, and `image_mask` which are an image's."""
        self.text_mask = inputs["attention_mask"].bool()
        self.image_mask = torch.isin(inputs["input_ids"], inputs["input_ids"].new_tensor(self._pictures))
        seen, form = inputs.pop(_SEEN, None), self._form
        try:
            with (
                nullcontext()
                if form is None or seen is None
                else image_features.given(self.model.base_model, seen, form)
            ):
                yield
        finally:
            self.text_mask = self.image_mask = None

    def _forget_positions(self) -> None:
        """Drop what Qwen's models keep of the last call's positions."""
        if hasattr(self.model.base_model, "rope_deltas"):
            self.model.base_model.rope_deltas = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Language":
        """As in `nn.Module`; frequencies of positions stay in float32, where bfloat16 would confuse far tokens."""
        kept = {name: buffer for name, buffer in self.named_buffers() if name.endswith("inv_freq")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in kept.items():
            owner, _, own = name.rpartition(".")
            moved = self.get_buffer(name)
            setattr(self.get_submodule(owner), own, buffer.to(moved.device))
        return self


def _owners(examples: Sequence[Tokens]) -> Tensor:
    counts = torch.tensor([len(each.answer) for each in examples])
    return torch.repeat_interleave(torch.arange(len(counts)), counts)


def _ids(given: int | Sequence[int] | None) -> list[int]:
    return [] if given is None else [given] if isinstance(given, int) else list(given)
