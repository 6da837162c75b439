"""The weights of some modules, to be asked at every call whether one has changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn


class WeightState:
    """The parameters of ``modules`` as they are now, whatever was loaded into them or cast since."""

    def __init__(self, modules: Sequence[nn.Module | None]) -> None:
        parts = [part for module in modules if module is not None for part in module.modules()]
        self._tables = [part._parameters for part in parts]  # looked at for every decode: traversal would take longer

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for table in self._tables for parameter in table.values() if parameter is not None)

    def now(self) -> list[tuple[int, int]]:
        """Another list after every change of a weight; none is read for it."""
        return [(parameter.data_ptr(), _version(parameter)) for parameter in self.parameters()]


def _version(parameter: nn.Parameter) -> int:
    """How often it was changed in place; of what was made under ``torch.inference_mode`` PyTorch keeps no count."""
    try:
        return parameter._version
    except RuntimeError:
        return 0
