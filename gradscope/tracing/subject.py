"""What is to be traced: the model, the call to make, and how to build both."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import torch
from torch import nn

from gradscope.errors import UsageError
from gradscope.findings import listed, matches
from gradscope.session import Remedy
from gradscope.tracing.inventory import Inventory

Module = TypeVar("Module", bound=nn.Module)

MOST_SHOWN = 8

# Runs one torch function: ``(function, args, kwargs) -> result``.
Caller: TypeAlias = "Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]"


class Workshop(Protocol):
    """Builds modules and inputs for the mode of the run (real, or structural on a pretended device)."""

    mode: Literal["real", "structural"]
    device: torch.device
    dtype: torch.dtype

    @property
    def goes_backward(self) -> bool:
        """Whether a backward pass can be run here."""
        ...

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one torch function as the mode has it."""
        ...

    def materialise(self, factory: Callable[[bool], Module]) -> Module:
        """Build a module; the factory is told whether to give the weights values."""
        ...

    def tensor(self, real: torch.Tensor) -> torch.Tensor:
        """Bring an input tensor to the device and dtype of the run."""
        ...

    def like(self, real: torch.Tensor, *, given: bool = False) -> torch.Tensor:
        """Bring an input tensor to the run as it is, with its own dtype; one that a caller has given may stay there."""
        ...

    def lent(
        self, model: Inventory, given: tuple[Any, ...] = ()
    ) -> AbstractContextManager[Callable[[torch.Tensor], None]]:
        """Use a caller's model for a while and give it back as it was; yields what to call before a write."""
        ...


@dataclass(slots=True)
class Built:
    """A model and one call of it, ready to run.

    ``call`` runs the forward pass and returns its outputs, ``inputs`` are the tensors among its
    arguments that a gradient can be wanted for (name to tensor), ``wanted`` those that the caller
    asked for (their ``requires_grad`` was on).
    """

    model: nn.Module
    call: Callable[[], Any]
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    wanted: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Subject:
    """A named target: ``prepare`` makes what the recorder should not see, ``build`` the rest.

    ``build`` gets what ``prepare`` returned and runs under the recorder, so that what a constructor
    detaches is seen as well. ``borrowed`` says that the model is the caller's and has to stay as it is.
    ``wrt`` and ``trainable`` are patterns of source names (``fnmatch``): what is asked about, and which
    parameters count as trained; ``loss`` turns the result into what is differentiated. ``given`` are the
    caller's arguments: objects among them are put back after a run. ``takes`` says, when asked, in a sentence what the
    model takes, ``weight`` how many bytes it will need once it is built for real.
    """

    name: str
    entry: str
    prepare: Callable[[Workshop], nn.Module]
    build: Callable[[Workshop, nn.Module], Built]
    inputs: tuple[str, ...] = ()
    remedy: Remedy | None = None
    remarks: tuple[str, ...] = ()
    absorbed: frozenset[str] = frozenset()
    borrowed: bool = False
    wrt: tuple[str, ...] = ()
    trainable: tuple[str, ...] = ()
    loss: Callable[[Any], Any] | None = None
    given: tuple[Any, ...] = ()
    takes: Callable[[], str] = str
    weight: int = 0

    def asked_for(
        self, names: Iterable[str], parameters: set[str], frozen: set[str], wanted: frozenset[str]
    ) -> frozenset[str]:
        """Return the sources whose gradient is wanted: those that ``wrt`` names; else what trains.

        An input counts where its ``requires_grad`` was on. Where nothing trains, everything is asked about.
        """
        names = list(names)
        for option, patterns, known in (("wrt", self.wrt, names), ("trainable", self.trainable, sorted(parameters))):
            found = {pattern: any(matches(name, (pattern,)) for name in known) for pattern in patterns}
            _refuse_unknown(patterns, found, option, known)
        if self.wrt:
            return frozenset(name for name in names if matches(name, self.wrt))
        trained = {name for name in parameters if not self.is_frozen(name, frozen)} | wanted
        return frozenset(trained or names)

    def is_frozen(self, name: str, frozen: set[str]) -> bool:
        """Tell whether a parameter counts as frozen: ``trainable`` says so, else its ``requires_grad``."""
        return not matches(name, self.trainable) if self.trainable else name in frozen


def _refuse_unknown(patterns: tuple[str, ...], matching: dict[str, bool], option: str, names: list[str]) -> None:
    """Raise where a pattern names no source: what was asked about would silently be something else."""
    unknown = [pattern for pattern in patterns if not matching[pattern]]
    if unknown:
        raise UsageError(f"No source matches {option} {unknown[0]!r}.", hint=f"There are: {listed(names, MOST_SHOWN)}.")
