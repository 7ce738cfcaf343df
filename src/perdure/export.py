"""Export of a learner for other libraries."""

from pathlib import Path

from perdure.learner import Core


def export(learner: Core, folder: Path, to: str) -> Path:
    """Placeholder."""
    raise ValueError(to)
