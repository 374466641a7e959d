"""The recorder by itself: what it hands to the mode of the run, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import torch

from gradscope.tracing.recorder import Recorder


def test_questions_to_a_tensor_do_not_go_through_the_mode_of_the_run() -> None:
    ran: list[str] = []

    def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ran.append(func.__name__)
        return func(*args, **kwargs)

    tensor = torch.ones(2, 3)
    with Recorder(run):
        tensor.requires_grad_()
        assert (tensor.size(), tensor.dim(), tensor.is_inference()) == ((2, 3), 2, False)
        room = torch.empty_like(tensor)
        room + tensor
    assert ran == ["empty_like", "add"]
