"""What every command is: a frozen dataclass whose fields are the flags and whose docstrings are the help."""

from dataclasses import dataclass

from perdure.cli.console import Screen


@dataclass(frozen=True, kw_only=True)
class Command:
    """Flags that every command has."""

    json: bool = False
    """One JSON object per event or result, for programs."""

    def __call__(self, screen: Screen) -> None:
        """Do it."""
        raise NotImplementedError
