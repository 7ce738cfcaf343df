"""Named parameters that are saved and loaded whatever their number and sizes."""

from typing import Any

from torch import Tensor, nn


class ParameterStore(nn.Module):
    """Parameters of which data decides how many there are; `BufferDict` holds what is trained no more."""

    def __getitem__(self, name: str) -> nn.Parameter:
        parameter = self._parameters[name]
        assert parameter is not None
        return parameter

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    @property
    def names(self) -> list[str]:
        """In alphabetical order."""
        return sorted(self._parameters)

    def put(self, name: str, value: Tensor) -> None:
        """A new parameter; it replaces one of that name."""
        self.take(name)
        self.register_parameter(name, nn.Parameter(value))

    def take(self, name: str) -> Tensor | None:
        """Remove a parameter, and return its value; None when there is none."""
        taken = self._parameters.pop(name, None)
        return None if taken is None else taken.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        self._parameters.clear()
        for key in sorted(key for key in state_dict if key.startswith(prefix)):
            self.put(key[len(prefix) :], state_dict[key].detach().clone())
