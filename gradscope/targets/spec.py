"""From the name of a target to its subject: libraries, what can be imported, and the presets that are installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, TypeAlias

from gradscope.errors import UsageError
from gradscope.targets.request import Request

if TYPE_CHECKING:
    from gradscope.tracing.subject import Subject

PRESET_GROUP = "gradscope.presets"

Preset: TypeAlias = "Callable[[Request], Subject]"

EXAMPLES = {"timm": "timm:resnet50", "torchvision": "torchvision:vit_b_16", "hf": "hf:FOLDER or hf:ID"}
LIBRARIES = tuple(EXAMPLES)


def load_target(target: str, request: Request) -> Subject:
    """Return the subject of a TARGET: ``timm:NAME``, ``torchvision:NAME``, ``hf:ID``, or what can be imported."""
    library, _, name = target.partition(":")
    if library in LIBRARIES:
        if not name:
            raise UsageError(f"{library}: names no model.", hint=f"Write {EXAMPLES[library]}.")
        from gradscope.targets.libraries import library_subject

        return library_subject(library, name, request)
    from gradscope.targets.modules import module_subject

    return module_subject(target, request)


def preset_names() -> list[str]:
    """Return the names of the installed presets."""
    return sorted({point.name for point in entry_points(group=PRESET_GROUP)})


def load_preset(name: str) -> Preset:
    """Return the preset of this name; other packages add theirs through entry points.

    Raises:
        UsageError: no such preset is installed, or it cannot be imported.
    """
    points = [point for point in entry_points(group=PRESET_GROUP) if point.name == name]
    if not points:
        known = ", ".join(preset_names()) or "none"
        raise UsageError(f"There is no preset called {name!r}.", hint=f"Presets found here: {known}.")
    try:
        preset: Preset = points[0].load()
    except ImportError as error:
        raise UsageError(
            f"The preset {name!r} cannot be loaded: {error}.",
            hint=f"Install what it needs: pip install 'torch-gradscope[{name}]'.",
        ) from error
    return preset
