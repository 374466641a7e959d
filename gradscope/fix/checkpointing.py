"""Activation checkpointing of a tower's repeated blocks, safe with scripted functions inside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as checkpointed
from torch.utils.checkpoint import set_checkpoint_early_stop

from gradscope.errors import UsageError

# Blocks that have run once in this process; see _run_checkpointed.
_warm: WeakSet[nn.Module] = WeakSet()


def blocks_to_checkpoint(module: nn.Module, mode: str) -> tuple[nn.Module, ...]:
    """Return the blocks of ``sam`` (mode ``sam``), of ``sam`` and ``clip_tr`` (``all``), or none of them.

    Raises:
        UsageError: a tower has no list of blocks of one class.
    """
    towers = {"none": (), "sam": ("sam",), "all": ("sam", "clip_tr")}[mode]
    found: list[nn.Module] = []
    for tower in towers:
        blocks = _repeated_blocks(getattr(module, tower))
        if not blocks:
            raise UsageError(
                f"checkpoint={mode!r} finds no list of equal blocks in {tower}.",
                hint='Use checkpoint="none".',
            )
        found += blocks
    return tuple(found)


def _repeated_blocks(tower: nn.Module) -> list[nn.Module]:
    """Return the blocks of the outermost lists of one class (``sam.blocks``, ``clip_tr.layers``)."""
    if isinstance(tower, nn.ModuleList) and len({type(block) for block in tower}) == 1:
        return list(tower)
    return [block for child in tower.children() for block in _repeated_blocks(child)]


@contextmanager
def checkpointing(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Recompute every block in the backward pass of what runs inside; the blocks are restored on exit."""
    with ExitStack() as restore:
        # An early stop would throw through TorchScript where a block ends in a scripted function.
        restore.enter_context(set_checkpoint_early_stop(False))
        for block in blocks:
            own = block.__dict__.get("forward")
            inner = block.forward
            block.forward = partial(_run_checkpointed, block, inner)
            if own is None:
                restore.callback(block.__dict__.pop, "forward")
            else:
                restore.callback(block.__dict__.__setitem__, "forward", own)
        yield


def _run_checkpointed(block: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run one block so that only its input is kept.

    The very first call of a ``torch.jit.script`` function saves its tensors in another order than every
    later one. Checkpointing pairs them by order, so a first call in the forward pass and a second in the
    recomputation would swap them and give wrong gradients without an error: run each block once before.
    """
    if block not in _warm:
        cuda = [arg.device for arg in args if isinstance(arg, torch.Tensor) and arg.is_cuda][:1]
        with torch.no_grad(), torch.random.fork_rng(devices=cuda):
            inner(*args, **kwargs)
        _warm.add(block)
    return checkpointed(inner, *args, use_reentrant=False, **kwargs)
