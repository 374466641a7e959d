"""Sessions of packages that nobody here wrote, made once for all tests of reports."""

from __future__ import annotations

import functools
import warnings

import pytest

import gradscope
from gradscope.session import Session


@functools.cache
def scanned() -> Session:
    """Scan the source of deepseek-ocr-encoder."""
    return gradscope.scan("deepseek_ocr_encoder", cache=False)


@functools.cache
def traced(**options: object) -> Session:
    """Trace the deepseek-ocr preset; ``head=True`` puts a layer behind it, and autograd refuses the run."""
    from gradscope.targets.deepseek_ocr import preset
    from gradscope.targets.request import Request
    from gradscope.tracing.tracer import trace_subject
    from gradscope.tracing.workshops import open_workshop

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trace_subject(preset(Request(**options)), open_workshop("structural", "auto", None))  # type: ignore[arg-type]


@functools.cache
def detected() -> Session:
    """Compute torchvision's Faster R-CNN, whose proposals are detached on purpose."""
    pytest.importorskip("torchvision")
    from gradscope.targets.request import Request
    from gradscope.targets.spec import load_target
    from gradscope.tracing.library import trace_in_mode

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subject = load_target("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", Request())
        return trace_in_mode(subject, "real", "cpu", verify=False)


REAL = {"scan": scanned, "trace": traced, "crash": lambda: traced(head=True), "detection": detected}
