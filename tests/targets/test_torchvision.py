"""What the models of torchvision are fed where nobody says."""

from __future__ import annotations

import pytest

from gradscope.targets.libraries import LIBRARIES
from gradscope.targets.request import Request
from gradscope.targets.spec import load_target
from gradscope.tracing.library import trace_in_mode
from gradscope.tracing.structural import hollow

pytest.importorskip("torchvision")


def test_a_model_is_fed_its_own_size_where_its_first_weights_have_another() -> None:
    factory, guess = LIBRARIES["torchvision"]("vit_h_14")  # its first weights are for 518 pixels
    found = guess(hollow(factory))
    assert found is not None
    assert found.args[0].shape == (2, 3, 224, 224)


def test_a_model_that_normalises_one_number_per_channel_runs() -> None:
    subject = load_target("torchvision:deeplabv3_mobilenet_v3_large", Request())
    assert trace_in_mode(subject, "structural", "cpu", verify=False).verdict == "flows"
