"""What a language model is given of its images, in place of the images: computed once where nothing changes it.

Vision tower and projector look at each conversation by itself here, so what they see never depends on a batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from perdure.backbones.dialogue import Tokens

PIXELS = ("pixel_values", "pixel_attention_mask")
"""What processors call images; all else that they give says how many and how large these are."""


class _Seen(Exception):
    """The images have been looked at; what the language tower makes of it is not wanted."""


@dataclass(frozen=True)
class Form:
    """How a model hands on what it sees: the class of transformers, and which features are lists, an image each."""

    kind: type
    listed: tuple[bool, ...]


def seen_of(body: Any, compute: Callable[[], object]) -> tuple[Tensor, Form] | None:
    """What `body`, a model of transformers without its head, makes of images while `compute` runs.

    Returns:
        (image tokens, 1 + deep features, dim), and in which form it was handed on; None without images.
    """
    found: list[Any] = []

    def watch(look: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        found.append(look(*args, **kwargs))
        raise _Seen

    with replaced(body, watch), suppress(_Seen), torch.no_grad():
        compute()
    if not found:
        return None
    shallow = found[0].pooler_output
    deep = getattr(found[0], "deepstack_features", None) or ()
    features = [shallow, *deep]
    form = Form(type(found[0]), tuple(not isinstance(each, Tensor) for each in features))
    return torch.stack([_rows(each) for each in features], 1), form


@contextmanager
def replaced(body: Any, answer: Callable[..., Any]) -> Iterator[None]:
    """Within, `answer` is asked for what `body` sees of images, with the way to look at them before its arguments."""
    look = body.get_image_features

    @wraps(look)  # transformers goes by the names of its arguments
    def asked(*args: Any, **kwargs: Any) -> Any:
        return answer(look, *args, **kwargs)

    body.get_image_features = asked
    try:
        yield
    finally:
        del body.get_image_features


def given(body: Any, seen: Tensor, form: Form) -> AbstractContextManager[None]:
    """Within, `seen` (image tokens, 1 + deep features, dim) is what `body` sees of images, whatever is shown to it."""
    handed = zip(seen.unbind(1), form.listed, strict=True)
    shallow, *deep = ([rows] if listed else rows for rows, listed in handed)
    fields: dict[str, Any] = {"deepstack_features": deep} if deep else {}
    return replaced(body, lambda *_, **__: form.kind(pooler_output=shallow, **fields))


def has_images(example: Tokens) -> bool:
    """Whether there is an image in `example` to look at."""
    return any(name in example.inputs for name in PIXELS)


def pixels(example: Tokens) -> list[str | Tensor]:
    """All that says what the images of a conversation show, with its names."""
    images = {name: value for name, value in example.inputs.items() if not example.spans(value)}
    return [part for name in sorted(images) for part in (name, images[name])]


def instead(example: Tokens, seen: Tensor | None) -> Tokens:
    """`example` with what is `seen` in place of its images."""
    rest = {name: value for name, value in example.inputs.items() if name not in PIXELS}
    return Tokens(rest, example.prompt, example.cut, seen)


def all_seen(examples: Sequence[Tokens], device: torch.device) -> Tensor | None:
    """What is seen in all of `examples`, one after another; None where it is known of none."""
    known = [each.seen for each in examples if each.seen is not None]
    return torch.cat([each.to(device, non_blocking=True) for each in known]) if known else None


def _rows(given: Any) -> Tensor:
    whole = given if isinstance(given, Tensor) else torch.cat(list(given))
    return whole.reshape(-1, whole.shape[-1]).detach()
