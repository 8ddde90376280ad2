"""Tiles that were found best on one kind of device, beside the shipped ones."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import torch


class TunedTiles(dict[str, Any]):
    """Kernel -> its tiles: the tuned ones where device and triton are those that checked them, else the shipped ones,
    with a warning. Which, is decided at the first launch: to ask for the device starts CUDA."""

    def __init__(self, name: str, device: str, triton: str, tuned: dict[str, Any], shipped: dict[str, Any]) -> None:
        super().__init__()
        self.name, self.place = name, (device, triton)
        self.tuned, self.shipped = tuned, shipped

    def __missing__(self, kernel: str) -> Any:
        here = tuning_place()
        if here != self.place:
            (device, triton), (own, version) = self.place, here
            warnings.warn(
                f"{self.name}: its tiles were tuned on {device} with triton {triton}; this is {own} with triton "
                f"{version}, where the shipped ones run", stacklevel=2,
            )  # fmt: skip
        found = self.tuned if here == self.place else self.shipped
        self.update(found)
        return found[kernel]


def tuning_place() -> tuple[str, str]:
    """The device that kernels run on here, and the version of triton."""
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    return "interpreter" if interpreted else torch.cuda.get_device_name(), sys.modules["triton"].__version__
