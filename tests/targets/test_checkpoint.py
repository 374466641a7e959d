"""``--weights``: a checkpoint with code of its own, as the hub has them, and everything that can be wrong with one."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

pytest.importorskip("deepseek_ocr_encoder")
transformers = pytest.importorskip("transformers")

from safetensors.torch import save_file  # noqa: E402

from gradscope.errors import NotAnalysedError, UsageError  # noqa: E402
from gradscope.session import Session  # noqa: E402
from gradscope.targets.deepseek_ocr import preset  # noqa: E402
from gradscope.targets.deepseek_towers import build_towers  # noqa: E402
from gradscope.targets.request import Request  # noqa: E402
from gradscope.tracing.tracer import trace_subject  # noqa: E402
from gradscope.tracing.workshops import open_workshop  # noqa: E402

CODE = """
from transformers import PretrainedConfig, PreTrainedModel
from gradscope.targets.deepseek_towers import SHAPES, SamTower, Vision

class TinyConfig(PretrainedConfig):
    model_type = "tiny-ocr"

class TinyModel(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.sam_model = SamTower(SHAPES["tiny"])
        self.vision_model = Vision(SHAPES["tiny"])
        self.post_init()

    def _init_weights(self, module):
        pass
"""


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "modeling_tiny.py").write_text(CODE)
    classes = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny-ocr", "auto_map": classes}))
    save_file(build_towers("tiny").state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def trace(folder: Path, mode: str, device: str) -> Session:
    request = Request(weights=str(folder), inputs=("1x3x256x256",))
    return trace_subject(preset(request), open_workshop(mode, device))


@pytest.mark.parametrize(("mode", "device"), [("real", "cpu"), ("structural", "cuda"), ("structural", "cpu")])
def test_a_checkpoint_is_loaded_and_traced(
    checkpoint: Path, mode: str, device: str, request: pytest.FixtureRequest
) -> None:
    if device == "cuda":
        request.getfixturevalue("pretended_cuda")
    session = trace(checkpoint, mode, device)
    assert session.verdict == "blocked"
    assert session.fix_verified
    assert {source.status for source in session.sources.values()} == {"blocked"}
    assert f"The weights are those of {checkpoint}." in session.remarks


@pytest.mark.parametrize("damage", ["weights", "code", "config"])
def test_a_damaged_checkpoint_is_not_analysed(checkpoint: Path, damage: str) -> None:
    if damage == "weights":
        (checkpoint / "model.safetensors").write_bytes(b"nothing")
    elif damage == "code":
        (checkpoint / "modeling_tiny.py").write_text(CODE + "\nraise LookupError('broken')\n")
    else:
        (checkpoint / "config.json").write_text("{}")
    with pytest.raises(NotAnalysedError, match="could not be loaded"):
        trace(checkpoint, "real", "cpu")


def test_a_checkpoint_of_another_model_is_not_analysed(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(NotAnalysedError, match=r"cannot be built around .*sam_model"):
        trace(tmp_path / "bert", "real", "cpu")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no checkpoint folder"):
        trace(tmp_path / "nothing", "real", "cpu")


def test_without_network_one_sentence_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object, **options: object) -> None:
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s [Retry 1/5].")
        raise OSError("We couldn't connect to 'https://huggingface.co'.\nCheck your connection.")

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", refuse)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    with pytest.raises(NotAnalysedError) as caught:
        trace(Path("nobody/nothing"), "real", "cpu")
    assert caught.value.message == (
        "The checkpoint nobody/nothing could not be loaded: We couldn't connect to 'https://huggingface.co'."
    )
    assert not caplog.records
