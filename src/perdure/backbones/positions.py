"""Larger images and longer texts than a model was trained on: its absolute positions, resampled."""

from typing import Annotated, Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from perdure.backbones.base import Backbone
from perdure.options.ranges import Range, without_effect
from perdure.options.spec import Spec, parse_one

Side = Annotated[int, Range(1, 16384)]
"""Of an image, in pixels."""
TextLength = Annotated[int, Range(1, 10**6)]
"""Tokens of a text."""
Positions = Literal["interpolate", "stretch"]
"""How positions of texts become more: all alike, or those behind the first 20 (Long-CLIP)."""

KEPT = 20
"""Positions that Long-CLIP leaves as they are: those that short captions have trained well (arXiv:2403.15378)."""
_NAMES = ("position_embeddings", "position_embedding", "positional_embedding", "pos_embed")
_SIDES = ("image_size", "img_size")


class Reads(Protocol):
    """A backbone whose text encoder has absolute positions."""

    length: int
    """Tokens of a text that are read."""
    first_position: int
    """Row of the table that is a text's first token's."""

    def lengthened(self, length: int) -> None:
        """Put right what else says how long a text may be, once the positions are there."""


B = TypeVar("B", bound=Backbone)


def elastic(backbone: B, size: int | None = None, length: int | None = None, positions: Positions | None = None) -> B:
    """`backbone`, which now reads images of `size` pixels and texts of `length` tokens; its own change nothing.

    Positions of patches are interpolated over their grid, bicubic and with antialiasing, as timm does it for
    fine-tuning at another resolution; rotary ones need nothing. Those of texts are interpolated linearly: `stretch`
    keeps the first 20 as they are, and is to the bit what Long-CLIP (Zhang et al., ECCV 2024, arXiv:2403.15378, §3.2)
    starts from. `fingerprint()` is that of the published weights, and says behind it what was changed.

    Args:
        backbone: as it was published.
        size: side of the images, a multiple of the patch; None for its own.
        length: of texts, not below its own; None for its own.
        positions: see `Positions`; None is `stretch`.

    Raises:
        ValueError: when the model cannot read images of that size or texts of that length.
    """
    if length is None:
        without_effect("without length", positions=positions)
    changes: list[tuple[str, Any]] = []
    published = backbone.fingerprint() if size or length else ""
    if size is not None and size != backbone.preprocess.size:
        _enlarge(backbone, size)
        changes.append(("size", size))
    if length is not None and length != (reader := _reader(backbone)).length:
        _lengthen(backbone, reader, length, positions or "stretch")
        changes.append(("length", length))
        changes += [("positions", positions)] if positions == "interpolate" else []
    if changes:
        backbone.published = published
        backbone.changed = ", ".join(f"{name}={value}" for name, value in changes)
        spec = parse_one(backbone.spec)
        backbone.spec = str(Spec(spec.name, (*spec.kwargs, *changes)))
    return backbone


def stretched(table: Tensor, length: int, kept: int) -> Tensor:
    """Positions (n, d) as (`length`, d): the first `kept` as they are, the others at even distances between theirs.

    Position j ≥ kept is read at kept + (j - kept) (n - kept) / (length - kept), linearly; behind the last one the line
    goes on.
    """
    count = len(table)
    if length == count:
        return table.clone()
    steps = torch.arange(length, dtype=torch.float64)
    places = torch.where(steps < kept, steps, kept + (steps - kept) * (count - kept) / (length - kept))
    low = places.floor().clamp(max=count - 2).long()
    share = (places - low).to(table).unsqueeze(1)
    return table[low] * (1 - share) + table[low + 1] * share


def _enlarge(backbone: Backbone, size: int) -> None:
    """Make the vision encoder read images of `size` pixels."""
    old = backbone.preprocess.size
    tower: Any = backbone.get_submodule(backbone.towers()["vision"])
    backbone.blocks()  # refuses what is no transformer
    tower = getattr(tower, "trunk", tower)  # of timm, within a model of OpenCLIP
    if hasattr(tower, "set_input_size"):
        try:
            tower.set_input_size(img_size=(size, size))
        except (AssertionError, ValueError, RuntimeError) as error:
            raise ValueError(f"size={size}: {backbone.spec} cannot read it ({error})") from error
    elif (found := _positions(tower)) is not None:
        owner, name, table = found
        side, patch = old, _patch(tower)
        if size % patch:
            near = -(-size // patch) * patch
            raise ValueError(f"size={size}: expected a multiple of {patch}, the side of a patch; write size={near}")
        _put(owner, name, _resampled(table, side // patch, size // patch))
        _say(tower, old, size, patch)
    for name in _SIDES:
        if hasattr(visual := backbone.get_submodule(backbone.towers()["vision"]), name):
            setattr(visual, name, _like(getattr(visual, name), size))
    backbone.preprocess = backbone.preprocess.at(size)


def _resampled(table: Tensor, old: int, new: int) -> Tensor:
    from timm.layers import resample_abs_pos_embed

    flat = table.reshape(1, -1, table.shape[-1])
    prefix = flat.shape[1] - old**2  # class token, registers
    found: Tensor = resample_abs_pos_embed(flat, (new, new), (old, old), num_prefix_tokens=prefix)
    return found.reshape(*table.shape[:-2], -1, table.shape[-1])


def _patch(tower: nn.Module) -> int:
    """Side of a patch: the stride of the convolution that cuts images up."""
    return next(int(m.stride[0]) for m in tower.modules() if isinstance(m, nn.Conv2d))


def _positions(tower: nn.Module) -> tuple[Any, str, Tensor] | None:
    """The module that holds the table of positions, its name there, and the table (..., n, d)."""
    for module in tower.modules():
        for name in _NAMES:
            held = getattr(module, name, None)
            if isinstance(held, nn.Embedding):
                return module, name, held.weight
            if isinstance(held, nn.Parameter):
                return module, name, held
    return None


def _put(owner: Any, name: str, table: Tensor) -> None:
    """Replace a table of positions, and the numbers by which it is read."""
    table, held = table.detach().clone(), getattr(owner, name)
    if isinstance(held, nn.Embedding):
        held.weight, held.num_embeddings = nn.Parameter(table, requires_grad=False), len(table)
    else:
        setattr(owner, name, nn.Parameter(table, requires_grad=False))
    for numbers in ("position_ids", "token_type_ids"):
        if isinstance(ids := getattr(owner, numbers, None), Tensor):
            every = torch.arange(table.shape[-2], device=ids.device)
            setattr(owner, numbers, (every if numbers == "position_ids" else every * 0).expand((1, -1)).to(ids.dtype))


def _say(tower: nn.Module, old: int, new: int, patch: int) -> None:
    """Put right what modules and configurations of `tower` say of the size of images."""
    counts = {"num_patches": (new // patch) ** 2 - (old // patch) ** 2}
    counts["num_positions"] = counts["num_patches"]
    seen: set[int] = set()
    for module in tower.modules():
        for holder in (module, getattr(module, "config", None)):
            if holder is None or id(holder) in seen:
                continue
            seen.add(id(holder))
            for name in _SIDES:
                if getattr(holder, name, None) in (old, (old, old), [old, old]):
                    setattr(holder, name, _like(getattr(holder, name), new))
            if isinstance(grid := getattr(holder, "grid_size", None), tuple) and grid == (old // patch,) * 2:
                holder.grid_size = (new // patch,) * 2
            for name, more in counts.items():
                if isinstance(getattr(holder, name, None), int):
                    setattr(holder, name, getattr(holder, name) + more)


def _like(value: Any, side: int) -> Any:
    return side if isinstance(value, int) else type(value)((side, side))


def _reader(backbone: Backbone) -> Reads:
    if "text" not in backbone.towers() or not hasattr(backbone, "lengthened"):
        raise ValueError(f"{backbone.spec} has no text encoder whose texts could become longer: leave out length")
    return backbone  # type: ignore[return-value]


def _lengthen(backbone: Backbone, reader: Reads, length: int, how: Positions) -> None:
    """Make the text encoder read `length` tokens."""
    if length < reader.length:
        raise ValueError(f"length={length}: expected {reader.length} or more, which {backbone.spec} reads by itself")
    # of a CLIP of OpenCLIP the table stands beside the tower
    root: Any = backbone.get_submodule(backbone.towers()["text"])
    found = _positions(root) or _positions(backbone.get_submodule("model"))
    if found is None:
        raise ValueError(f"{backbone.spec}: its text encoder has no absolute positions; leave out length")
    owner, name, table = found
    first, kept = reader.first_position, KEPT if how == "stretch" else 0
    if len(table) - first < kept + 2:
        raise ValueError(
            f"positions='stretch' keeps the first {kept} of {len(table) - first} positions: write "
            "positions='interpolate'"
        )
    if first + length > len(table):  # else it has been read as far as its tokenizer says, and has more positions
        _put(owner, name, torch.cat([table[:first], stretched(table[first:], length, kept)]))
        if (config := getattr(owner, "config", None) or getattr(root, "config", None)) is not None:
            config.max_position_embeddings = first + length
    reader.length = length
    reader.lengthened(length)
