"""What a user may ask wrongly, from the command line: one sentence, what to do next, and the exit code for it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from gradscope.cli.main import main

MODELS = """
    import sys
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 8)
            self.second = nn.Linear(8, 2)

        def forward(self, x):
            return self.second(self.first(x))

    class Mixed(Net):
        def forward(self, x):
            h = self.first(x)
            h = h * torch.ones(8)  # on the CPU
            return self.second(h)

    class Moved(Net):
        def forward(self, x):
            return self.second(self.first(x) * torch.ones(8).to(x.device))

    class Branching(Net):
        def forward(self, x):
            h = self.first(x)
            return self.second(h) if h.sum() > 0 else h

    class Exits(Net):
        def forward(self, x):
            sys.exit(5)

    class Asserts(Net):
        def forward(self, x):
            assert x.shape[0] == 77
            return x

    class Pipe:
        def __init__(self):
            self.net = Net()

        @torch.no_grad()
        def __call__(self, x):
            return self.net(x)

    pipe = Pipe()
    trained = Net()

    def step():
        loss = trained(torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss.item()

    def steps():
        return step

    def by_closure():
        optimizer = torch.optim.LBFGS(trained.parameters())

        def closure():
            optimizer.zero_grad()
            loss = trained(torch.ones(2, 4)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)

    def with_its_own_backward():
        class Twice(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * 2

            @staticmethod
            def backward(ctx, grad):
                return grad * 2

        class Scaled(Net):
            def forward(self, x):
                return Twice.apply(super().forward(x))

        return Scaled()

    def with_a_trainer():
        net = Net()
        net.train_once = lambda x: net(x).sum().backward()
        return net

    number = 3

    def raises():
        raise FileNotFoundError("weights.bin is not here.")

    def exits():
        sys.exit("no configuration given")

    def nothing():
        return None

    def no_input():
        return None

    def bad_input():
        return {}["x"]

    def bad_loss(out):
        return out["logits"]

    def loss_of_two(out, labels):
        return (out - labels).square().mean()

    def text_loss(out):
        return "lost"
"""


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    (tmp_path / "models.py").write_text(textwrap.dedent(MODELS))
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "models", raising=False)

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["gradscope", "trace", *args])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return run


def line_of(text: str) -> int:
    return next(i for i, line in enumerate(MODELS.splitlines(), start=1) if text in line)


BAD = [
    ("models.py:raises", 3, "cannot be built: FileNotFoundError: weights.bin is not here at models.py:LINE",
     "raise FileNotFound"),
    ("models.py:exits", 3, "SystemExit: no configuration given", ""),
    ("models.py:nothing", 2, "gives no nn.Module, but NoneType", ""),
    ("models.py:number", 2, "gives no nn.Module, but int", ""),
    ("models.py:absent", 2, "It has: Net, Mixed", ""),
    ("exits.py:f", 3, "exits.py ends the program when it is imported: SystemExit", ""),
    ("exits.py:f", 3, 'behind if __name__ == "__main__"', ""),
    ("models.py:Net --input 2x5", 3, "with 2x5 float32: RuntimeError: mat1 and mat2 shapes", ""),
    ("models.py:Net --input 2x5", 3, "at models.py:LINE", "return self.second(self.first(x))"),
    ("models.py:Net --input 2x5", 3, "first linear layer takes [..., 4]", ""),
    ("models.py:Net --input 2x4:float64", 3, "same dtype", ""),
    ("models.py:Net --input 2x4:float64 --mode structural", 3, "same dtype", ""),
    ("models.py:Net --input y=2x4", 3, "unexpected keyword argument 'y'", ""),
    ("models.py:Net --input 2x4 --entry absent", 2, "It has: forward.", ""),
    ("models.py:Net --input models.py:bad_input", 3, "failed: KeyError: 'x' at models.py:LINE", 'return {}["x"]'),
    ("models.py:Net --input models.py:no_input", 2, "gives None", ""),
    ("models.py:Net --input 2x4 --wrt encoder.*", 2, "There are: first.weight", ""),
    ("models.py:Net --input 2x4 --trainable encoder", 2, "No source matches trainable 'encoder'", ""),
    ("models.py:Net --input 2x4 --loss models.py:number", 2, "is no function", ""),
    ("models.py:Net --input 2x4 --loss models.py:bad_loss", 3, "at models.py:LINE", 'out["logits"]'),
    ("models.py:Net --input 2x4 --loss models.py:bad_loss", 3, "could not be computed of 2x2 float32: IndexErr", ""),
    ("models.py:Net --input 2x4 --loss models.py:loss_of_two", 3, "A loss is called with what the model gives out", ""),
    ("models.py:Net --input 2x4 --loss models.py:text_loss", 3, "The loss of models.py:Net returned no floating", ""),
    ("models.py:Net --input 99999999x99999999x4", 2, "does not fit into this machine's memory", ""),
    ("models.py:Exits --input 2x4", 3, "SystemExit: 5", ""),
    ("models.py:Asserts --input 2x4", 3, "AssertionError at models.py:LINE", "== 77"),
    ("models.py:Branching --input 2x4 --mode structural", 3, "needs computed numbers at models.py:LINE", "h.sum() > 0"),
    ("models.py:Mixed --input 2x4 --device cuda", 3, "mixes devices at models.py:LINE", "# on the CPU"),
    ("torchvision:resnet18 --entry absent", 2, "It has: forward.", ""),
    ("hf:", 2, "Write hf:FOLDER or hf:ID", ""),
    ("torchvision:", 2, "torchvision: names no model", ""),
    ("hf:./absent", 2, "no config.json", ""),
    ("torchvision:resnet19", 2, "Near it: resnet18", ""),
    ("torchvision:nothing-like-it", 2, "list_models() lists what there is", ""),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "code", "words", "line"), BAD)
def test_what_cannot_be_done_is_said_in_a_sentence(  # type: ignore[no-untyped-def]
    ask, request_: str, code: int, words: str, line: str, request: pytest.FixtureRequest
) -> None:
    if "cuda" in request_:
        request.getfixturevalue("pretended_cuda")
    if line:
        words = words.replace("LINE", str(line_of(line)))
    found, out, err = ask(*request_.split())
    assert (found, out) == (code, "")
    assert words in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 2, "what happened, and what to do next"


@pytest.mark.parametrize(
    ("request_", "why"), [("--mode real", "it is to run for real"), ("--input 1x4x64x64", "3 channels, but got 4")]
)
def test_what_does_not_fit_into_the_machine_is_not_computed(  # type: ignore[no-untyped-def]
    ask, monkeypatch: pytest.MonkeyPatch, request_: str, why: str
) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 1000)
    code, _, err = ask("torchvision:resnet18", *request_.split())
    assert code == 3
    assert "its weights alone take" in err and why in err


@pytest.mark.skipif(torch.backends.mps.is_built(), reason="needs a torch without mps")
def test_a_device_that_cannot_even_be_pretended_does_not_end_the_process(ask) -> None:  # type: ignore[no-untyped-def]
    code, _, err = ask("models.py:Net", "--input", "2x4", "--device", "mps")
    assert code == 2
    assert "without mps" in err


def test_falling_back_to_real_mode_says_why_and_where(ask) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = ask("models.py:Branching", "--input", "2x4")
    assert code == 0
    assert "real on cpu" in out
    assert f"it needs computed numbers at models.py:{line_of('h.sum() > 0')}" in " ".join(out.split())


@pytest.mark.parametrize("mode", ["structural", "real"])
def test_the_dtype_asked_for_is_that_of_the_model_and_its_inputs(ask, mode: str) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = ask("models.py:Net", "--input", "2x4", "--dtype", "bfloat16", "--mode", mode)
    assert code == 0
    assert "2x8 bfloat16" in out and f"{mode} on cpu, bfloat16" in " ".join(out.split())


@pytest.mark.usefixtures("pretended_cuda")
def test_a_pretended_device_takes_what_is_moved_to_it(ask) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = ask("models.py:Moved", "--input", "2x4", "--device", "cuda")
    assert code == 0
    assert "structural on cuda, float32" in " ".join(out.split())


def test_a_pipeline_is_a_target(ask) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = ask("models.py:pipe", "--input", "2x4")
    assert code == 1
    assert "GS102" in out and "Pipe.__call__" in out
    code, out, _ = ask("models.py:Pipe", "--input", "2x4")
    assert code == 1


@pytest.mark.parametrize("name", ["with_its_own_backward", "with_a_trainer"])
def test_a_builder_that_defines_a_backward_is_no_step(ask, name: str) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = ask(f"models.py:{name}", "--input", "2x4")
    assert code == 0 and f"models.py:{name}.forward(2x4 float32)" in out and "goes backward itself" not in out


@pytest.mark.parametrize("name", ["step", "steps", "by_closure"])
def test_a_step_of_training_is_a_target(ask, name: str) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = ask(f"models.py:{name}")
    assert code == 0
    assert "4 parameters: 4 flows" in out and "The target goes backward itself" in " ".join(out.split())


LLAMA = """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def build():
        config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=2, num_attention_heads=64,
                             num_key_value_heads=8, vocab_size=128_256)
        model = LlamaForCausalLM(config)
        model.model.embed_tokens.requires_grad_(False)
        return model, {"input_ids": torch.ones(1, 8, dtype=torch.long)}
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_a_large_model_of_a_factory_takes_no_memory(tmp_path: Path) -> None:
    """Two layers of the shape of Llama 70B are 15 GB of weights."""
    (tmp_path / "llama.py").write_text(textwrap.dedent(LLAMA))
    code = (
        "import atexit, re, sys; from gradscope.cli.main import main\n"
        "sys.argv = ['gradscope', 'trace', 'llama.py:build', '--format', 'json', '-q']\n"
        # Not ru_maxrss: that of a new process begins with its parent's.
        "peak = lambda: re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]\n"
        "atexit.register(lambda: print(peak(), file=sys.stderr))\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    session = json.loads(done.stdout)
    assert session["target"]["mode"] == "structural"
    assert {each["status"] for each in session["sources"]} == {"flows"}
    assert int(done.stderr.split()[-1]) < 2_000_000, "kilobytes at the most"


def test_a_class_that_transformers_does_not_have_is_not_replaced_by_another(ask, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "own").mkdir()
    config = {"model_type": "bert", "architectures": ["BertWithOurHead"], "hidden_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}  # fmt: skip
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    code, _, err = ask("hf:./own")
    assert code == 2
    assert "names the class BertWithOurHead" in err
    (tmp_path / "own" / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    assert ask("hf:./own")[0] == 0
