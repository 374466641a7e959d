"""Make the three classic failed attempts on the real package and print what gradscope says of each."""

from __future__ import annotations

from typing import Any

import torch
from deepseek_ocr_encoder import DeepSeekOCREncoder
from PIL import Image
from torch import nn

from gradscope.session import Session
from gradscope.targets.deepseek_towers import build_towers
from gradscope.tracing.subject import Built, Subject, Workshop
from gradscope.tracing.tracer import trace_subject
from gradscope.tracing.workshops import open_workshop

ATTEMPTS = {
    "Remove one's own `no_grad` around `encode`": "own_no_grad",
    "Give the padding `requires_grad=True`": "padding",
    "Call `_forward_core` directly": "inner_method",
}


def own_no_grad(encoder: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Call ``encode`` with nothing around it."""
    tokens: torch.Tensor = encoder.encode(Image.new("RGB", (1024, 1024), "white"))
    return tokens


def padding(encoder: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Pad the tokens with zeros that require a gradient."""
    tokens = own_no_grad(encoder, pixels)
    pad = torch.zeros(1, 8, 1024, device=tokens.device, dtype=tokens.dtype, requires_grad=True)
    return torch.cat([tokens, pad], dim=1)


def inner_method(encoder: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Go round ``encode``."""
    tokens: torch.Tensor = encoder._forward_core(pixels)
    return tokens


def trace_attempt(name: str) -> Session:
    """Trace one attempt in structural mode."""
    attempt = globals()[name]

    def prepare(workshop: Workshop) -> nn.Module:
        return workshop.materialise(lambda filled: build_towers("full", initialise=filled))

    def build(workshop: Workshop, towers: nn.Module) -> Built:
        encoder = DeepSeekOCREncoder(towers, device=workshop.device, dtype=workshop.dtype, eager_to_device=False)
        pixels = workshop.tensor(torch.zeros(1, 3, 1024, 1024))
        return Built(encoder, lambda: attempt(encoder, pixels))

    subject = Subject(name, "", prepare, build, absorbed=frozenset({"pin_memory"}))
    return trace_subject(subject, open_workshop("structural", "cuda"))


def main() -> None:
    """Print the Markdown of the page's section."""
    for title, name in ATTEMPTS.items():
        session = trace_attempt(name)
        cuts = [f"`{f.rule}` at `{f.path}:{f.line}` (`{f.function}`)" for f in session.findings if f.fix]
        print(f"### {title}\n")
        print(f"`{session.verdict}`: {session.count('blocked')} of {len(session.sources)} parameters get no gradient.")
        print(f"Stopped by {' and, behind it, '.join(cuts)}.\n")


if __name__ == "__main__":
    main()
