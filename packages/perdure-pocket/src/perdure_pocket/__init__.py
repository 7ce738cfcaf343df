"""Where the small weights lie that perdure can be tried with: research use only, see LICENSE.md."""

from pathlib import Path

CLIP = Path(__file__).parent / "clip"
"""A CLIP in the format of transformers."""
