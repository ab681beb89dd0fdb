"""Settings of a module, which are its attributes."""

from __future__ import annotations

from typing import Any

from torch import nn


def settings_of(module: nn.Module, names: tuple[str, ...]) -> dict[str, Any]:
    """The attributes of these names."""
    return {name: getattr(module, name) for name in names}


def text_of(settings: dict[str, Any]) -> str:
    """Settings as ``print`` shows them."""
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())
