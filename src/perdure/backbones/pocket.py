"""The embedded default: a small real CLIP inside the package, loaded without network."""

from pathlib import Path

from perdure.backbones.clip import Clip, read

FOLDER = Path(__file__).parent / "pocket_clip"


def pocket() -> Clip:
    """A CLIP of 7 million parameters for images of 48 pixels; `pocket_clip/MODEL_CARD.md` says what it can do.

    The weights come from images that allow research use only.
    """
    return read(str(FOLDER), "pocket")
