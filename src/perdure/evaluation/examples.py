"""examples.json of a run: what whoever reads the report is shown of the model's work, with pictures."""

import base64
import io
from pathlib import Path

from PIL import Image
from torch import Tensor

from perdure.core import checkpoint
from perdure.storage import schema
from perdure.storage.schema import Examples

EXAMPLES = "examples.json"
_SIDE = 160  # of a thumbnail, in pixels


def read_examples(out: Path) -> Examples:
    """What was noted in the folder of a run.

    Raises:
        Damaged: when it is not what was written.
    """
    dated = "format" in checkpoint.read_record(out)
    found = schema.read_typed(out / EXAMPLES, Examples, "restore it, or remove it: only the report shows it", dated)
    shown = [name for question in found.get("questions", ()) for name in question["pictures"]]
    if found["pictures"]:  # those of searches come last
        for query in found.get("queries", ()):
            shown += map(str, (query["pair"], *query["before"], *query.get("after", ())))
    if missing := [name for name in shown if name not in found["pictures"]]:
        raise schema.Damaged(
            f"{out / EXAMPLES} is damaged: it has no picture of {missing[0]}; restore it, or remove it"
        )
    return found


def encoded(image: Tensor) -> str:
    """PNG in base64 of an image as the model reads it, uint8 (3, H, W)."""
    return _base64(Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()), "PNG")


def thumbnail(image: Image.Image) -> str:
    """JPEG in base64 of an image of any size."""
    small = image.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    return _base64(small, "JPEG")


def _base64(image: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return base64.b64encode(file.getvalue()).decode()
