"""Conversations as a language model reads them: the model's own processor and chat template, answers told from prompts.

Every conversation is tokenised by itself and put into batches later: what processors give of a whole batch cannot be
split again in most families (Qwen joins the patches of all images, InternVL their tiles).
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from perdure.backbones.preprocess import decode

T = TypeVar("T")
Conversation = Any
"""A mapping, or an object, with

- `messages`: each with `role` and `content`, a text or parts such as {"type": "text", "text": ...}, {"type": "image"};
- `images`: paths, encoded bytes or Pillow images, in the order of their parts; `videos`, lists of images, likewise;
- `answer`: a text, or several of which the first is taught; none where it is not known;
- `where`: file and line, for errors; may be missing.
"""

_PROMPTED = "input_ids"
_LOCK = threading.Lock()  # fast tokenizers change their padding and truncation for a call


@dataclass(frozen=True)
class Tokens:
    """One conversation as the model reads it.

    Args:
        inputs: what the processor gave, as if the conversation were a batch of its own: `input_ids` int64 (1, L),
            others of that shape beside it, and whatever the family makes of images.
        prompt: how many of the L tokens are the prompt; the answer's come after them.
        cut: whether the answer was longer than there was room for.
        seen: what is made of its images, in place of them (`backbones.image_features`); None where they are here.
    """

    inputs: Mapping[str, Tensor]
    prompt: int
    cut: bool = False
    seen: Tensor | None = None

    def __len__(self) -> int:
        return self.inputs[_PROMPTED].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all that it holds."""
        return sum(value.nbytes for value in (*self.inputs.values(), self.seen) if value is not None)

    @property
    def answer(self) -> Tensor:
        """The answer's tokens, with that which ends it: int64 (n,)."""
        return self.inputs[_PROMPTED][0, self.prompt :]

    def with_answer(self, answer: Sequence[int], cut: bool = False) -> "Tokens":
        """The same prompt with another answer, none for an empty one."""
        more = torch.tensor([answer], dtype=torch.int64)
        fill = {_PROMPTED: more, "attention_mask": torch.ones_like(more)}
        inputs = {
            name: torch.cat([value[:, : self.prompt], fill.get(name, torch.zeros_like(more)).to(value.dtype)], 1)
            if self.spans(value)
            else value
            for name, value in self.inputs.items()
        }
        return Tokens(inputs, self.prompt, cut, self.seen)

    def spans(self, value: Tensor) -> bool:
        """Whether `value` says something of every token."""
        return value.shape == self.inputs[_PROMPTED].shape and not value.is_floating_point()


def collate(examples: Sequence[Tokens], side: Literal["left", "right"], pad: int) -> dict[str, Tensor]:
    """What the model reads of several conversations: texts padded on `side`, images one after another.

    Args:
        examples: at least one.
        side: "left" before answers are generated, "right" where all tokens are known: positions are then as they are
            without padding.
        pad: the padding token.
    """
    longest = max(map(len, examples))
    columns: dict[str, list[Tensor]] = {}
    for each in examples:
        for name, value in each.inputs.items():
            if each.spans(value):
                room = longest - value.shape[1]
                fill = pad if name == _PROMPTED else 0
                value = F.pad(value, (room, 0) if side == "left" else (0, room), value=fill)
            columns.setdefault(name, []).append(value)
    return {name: _stacked(values) for name, values in columns.items()}


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """One after another; tiles of images are padded with zeros to as many as the batch needs, as processors do."""
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padded = []
    for value in values:
        missing = [(0, most - size) for most, size in zip(shape, value.shape[1:], strict=True)]
        padded.append(F.pad(value, [side for pair in reversed(missing) for side in pair]) if shape else value)
    return torch.cat(padded)


class Dialogue:
    """A model's processor with its chat template.

    Args:
        processor: of transformers.
        stops: ids of tokens that end an answer.
        source: what the user calls the model, for errors.
        length: most tokens of a conversation with its answer, image tokens included; None is `most`.
        most: how many the model has positions for.

    Raises:
        ValueError: when there is no chat template, or no position for so many tokens.
    """

    def __init__(self, processor: Any, stops: Sequence[int], source: str, length: int | None, most: int) -> None:
        if length and length > most:
            raise ValueError(
                f"length={length}: {source} has positions for {most} tokens; give {most} or fewer, or stretch them: "
                "mllm(rope=, factor=)"
            )
        self.processor, self.length, self.source = processor, length or most, source
        self.tokenizer = processor.tokenizer
        if not getattr(processor, "chat_template", None):
            raise ValueError(
                f"{source!r} has no chat template, so it is not known how a question is put to it: use a model that "
                "was taught instructions, or put its chat_template.jinja into the folder"
            )
        self.stops = sorted(set(stops))
        self._ends = [self.tokenizer.convert_ids_to_tokens(stop) for stop in self.stops]
        added = self.tokenizer.added_tokens_decoder.values()
        self._control = sorted({str(token.content) for token in added if token.special and len(token.content) > 2})

    @property
    def pad(self) -> int:
        """The token that fills up."""
        found = self.tokenizer.pad_token_id
        return int(self.stops[0] if found is None else found)

    def __call__(self, conversation: Conversation) -> Tokens:
        """The conversation with its answer, where it has one; the tokens of the answer are found in the context.

        Raises:
            ValueError: for an image that cannot be read, images that do not match their places, an empty answer, or a
                prompt that leaves no room for an answer; says where the conversation is from, if that is known.
        """
        try:
            return self._read(conversation)
        except ValueError as error:
            where, reason = _of(conversation, "where"), " ".join(str(error).split())
            raise ValueError(f"{where}: {reason}" if where else reason) from error

    def _read(self, conversation: Conversation) -> Tokens:
        messages, answer = self._turns(conversation)
        images, videos = _pictures(conversation, messages, "image"), _pictures(conversation, messages, "video")
        text = self._text(messages, True)
        with _LOCK:
            given: dict[str, Any] = {"images": [images]} if images else {}
            given |= {"videos": [videos], "do_sample_frames": False} if videos else {}
            if videos and getattr(self.processor, "video_processor", None) is None:
                raise ValueError(f"{self.source!r} reads no videos: give their frames as images")
            inputs = dict(self.processor(text=[text], return_tensors="pt", **self._words(text), **given))
        asked = Tokens({name: value for name, value in inputs.items() if isinstance(value, Tensor)}, 0)
        asked = Tokens(asked.inputs, len(asked))
        if len(asked) >= self.length:
            raise ValueError(
                f"a conversation takes {len(asked)} tokens, those of its {len(images)} images included, and there is "
                f"room for {self.length} with an answer: shorten it, leave it out, or use a model that reads more"
            )
        return asked if answer is None else self.answered(asked, conversation, answer)

    def answered(self, asked: Tokens, conversation: Conversation, answer: str, end: bool = True) -> Tokens:
        """`asked` with another answer.

        Args:
            asked: what was made of the conversation.
            conversation: the same.
            answer: what the assistant says.
            end: whether the token that ends the answer is part of it.

        Raises:
            ValueError: for an answer without any text.
        """
        if not answer.strip():
            raise ValueError("an answer is empty: there is nothing to learn from it; leave the conversation out")
        messages, _ = self._turns(conversation)
        ids = self._answer(messages, answer, end)
        room = self.length - asked.prompt
        return asked.with_answer(ids[:room], cut=len(ids) > room)

    def _answer(self, messages: list[dict[str, Any]], answer: str, end: bool) -> list[int]:
        """Ids of `answer` as they follow the prompt, up to and with the first token that ends it."""
        prompt = self._text(messages, True)
        whole = self._text([*messages, _message("assistant", self._plain(answer))], False)
        # where a template writes an answer otherwise than it asks for one, the prompt is what the model will see
        rest = whole[len(prompt) :] if whole.startswith(prompt) else self._plain(answer)
        found = [(rest.find(stop), stop) for stop in self._ends if stop in rest]
        said, stop = (rest[: min(found)[0]], min(found)[1]) if found else (rest.rstrip(), self.tokenizer.eos_token)
        with _LOCK:
            before = self._ids(prompt)
            ids = self._ids(prompt + said)
            if ids[: len(before)] != before:  # the border runs through a token
                before, ids = [], self.tokenizer(said, add_special_tokens=False, verbose=False)["input_ids"]
        after = [int(self.tokenizer.convert_tokens_to_ids(stop))] if end else []
        return [*ids[len(before) :], *after]

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, **self._words(text))["input_ids"]
        return found

    def _words(self, text: str) -> dict[str, bool]:
        """How `text` becomes tokens: with one begin token; too many are told by `_read`, not by the tokenizer."""
        begin = self.tokenizer.bos_token
        special = {"add_special_tokens": False} if begin is not None and text.startswith(begin) else {}
        return special | {"verbose": False}

    def _text(self, messages: list[dict[str, Any]], asking: bool) -> str:
        text: str = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=asking)
        return text

    def _plain(self, text: str) -> str:
        """`text` in which no control token of the model stands: a user's "<image>" is no image, and ends no turn."""
        for token in self._control:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def _turns(self, conversation: Conversation) -> tuple[list[dict[str, Any]], str | None]:
        """The turns before the last answer, as templates read them, and that answer."""
        messages = []
        for turn in _of(conversation, "messages"):
            content = _of(turn, "content")
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
            clean = [
                p | {"text": self._plain(p["text"])} if p["type"] == "text" else {"type": p["type"]} for p in parts
            ]
            messages.append({"role": _of(turn, "role"), "content": clean})
        answer = _of(conversation, "answer")
        if answer is not None and not isinstance(answer, str):
            answer = next(iter(answer), None)
        if messages and messages[-1]["role"] == "assistant":
            said = messages.pop()["content"]
            answer = answer if answer is not None else "".join(part.get("text", "") for part in said)
        return messages, answer


def _pictures(conversation: Conversation, messages: Sequence[Mapping[str, Any]], kind: str) -> list[Any]:
    """The conversation's images, or the frames of its videos, decoded; as many as it has places for."""
    given = list(_of(conversation, f"{kind}s") or ())
    places = sum(part["type"] == kind for turn in messages for part in turn["content"])
    if places != len(given):
        raise ValueError(f"a conversation has {places} places for {kind}s and {len(given)} {kind}s: they must match")
    if kind == "video":
        return [[_image(frame) for frame in frames] for frames in given]
    return [_image(each) for each in given]


def _image(source: Any) -> Image.Image:
    return decode(source, f"'{source}'" if not isinstance(source, bytes | Image.Image) else "of a conversation")


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _of(given: Any, name: str) -> Any:
    return given.get(name) if isinstance(given, Mapping) else getattr(given, name, None)


def by_length(
    examples: Sequence[Tokens],
    ask: Callable[[Sequence[int]], list[T]],
    size: int,
    order: Sequence[int] | None = None,
) -> list[T]:
    """What `ask` says of each example, in their order; `size` is halved until they fit.

    Args:
        examples: at least one.
        ask: with the places of some of them.
        size: how many are asked together.
        order: in which they are asked; None: the longest come first.
    """
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i])) if order is None else order
    found: dict[int, T] = {}
    while len(found) < len(order):
        some = order[len(found) : len(found) + size]
        try:
            found |= zip(some, ask(some), strict=True)
        except RuntimeError as error:
            if size == 1 or not should_reduce_batch_size(error):
                raise
            clear_device_cache(garbage_collection=True)
            size //= 2
    return [found[i] for i in range(len(examples))]
