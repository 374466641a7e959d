# ruff: noqa: E501 - sources under test stay on one line
"""From public callables to sites over several files: chains, verdicts, and what stays clean."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from gradscope.errors import UsageError
from gradscope.scanning.scanner import scan
from gradscope.session import Session

PACKAGE = {
    "__init__": "from .model import Model\n",
    "base": """
        import torch
        from torch import nn

        class Base(nn.Module):
            def encode(self, x):
                return self._core(x)

            @torch.inference_mode()
            def _core(self, x):
                return self.tower(x)
        """,
    "model": """
        from torch import nn
        from .base import Base
        from .helper import smooth

        class Model(Base):
            def __init__(self):
                super().__init__()
                self.tower = nn.Linear(4, 4)

            def embed(self, x):
                return super().encode(x)
        """,
    "helper": """
        import torch

        def smooth(model, x):
            with torch.no_grad():
                return model(x)
        """,
    "outer": """
        from torch import nn
        from pack import Model
        from .helper import smooth

        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = Model()
                self.head = nn.Linear(4, 4)

            def forward(self, x):
                return self.head(self.inner.embed(x))

        class Smoothed(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = nn.Linear(4, 4)

            def forward(self, x):
                return smooth(self.body, x)
        """,
}


def write(folder: Path, files: dict[str, str]) -> Path:
    package = folder / "pack"
    package.mkdir()
    for name, source in files.items():
        (package / f"{name}.py").write_text(dedent(source))
    return package


def entries(session: Session) -> dict[str, tuple[str, list[str]]]:
    return {
        entry["function"]: (entry["status"], [step["function"] for step in entry["chain"]]) for entry in session.entries
    }


def test_chains_cross_classes_modules_and_files(tmp_path: Path) -> None:
    session = scan(str(write(tmp_path, PACKAGE)), cache=False)
    found = entries(session)
    assert found["Base.encode"] == ("blocked", ["Base.encode", "Base._core"])
    assert found["Model.embed"] == ("blocked", ["Model.embed", "Base.encode", "Base._core"])
    assert found["Outer.forward"] == ("blocked", ["Outer.forward", "Model.embed", "Base.encode", "Base._core"])
    assert found["Smoothed.forward"] == ("blocked", ["Smoothed.forward", "smooth"])
    errors = {(each.function, each.rule) for each in session.findings if each.severity == "error"}
    assert errors == {("Base._core", "GS101"), ("smooth", "GS104")}


def test_an_entry_asks_about_itself_only(tmp_path: Path) -> None:
    package = str(write(tmp_path, PACKAGE))
    smoothed = scan(package, entry=("Smoothed.forward",), cache=False)
    assert [each.function for each in smoothed.findings] == ["smooth"]
    assert entries(smoothed) == {"Smoothed.forward": ("blocked", ["Smoothed.forward", "smooth"])}
    with pytest.raises(UsageError, match=r"Nothing\.here"):
        scan(package, entry=("Nothing.here",), cache=False)


def test_a_clean_entry_is_said_to_be_clean(tmp_path: Path) -> None:
    files = {"__init__": "", "net": """
        import torch
        from torch import nn

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, x):
                return self.layer(x)

            @torch.no_grad()
            def generate(self, x):
                return self.forward(x)
        """}  # fmt: skip
    package = str(write(tmp_path, files))
    session = scan(package, cache=False)
    assert entries(session)["Net.forward"] == ("clean", [])
    assert entries(session)["Net.generate"] == ("inference-only", ["Net.generate"])
    assert [(each.function, each.severity, each.fix) for each in session.findings] == [
        ("Net.generate", "warning", "Use forward where a gradient is wanted.")
    ]
    clean = scan(package, entry=("Net.forward",), cache=False)
    assert clean.findings == [] and clean.verdict == "flows" and entries(clean) == {"Net.forward": ("clean", [])}


NOTES = {
    "weights are initialised": "@torch.no_grad()\ndef _init_weights(self, module):\n    module.weight.normal_()\n    return module.weight",
    "a rotary table": "@torch.no_grad()\ndef forward(self, x, position_ids):\n    f = position_ids[..., None].float() * self.inv_freq\n    return f.cos().to(x.dtype), f.sin().to(x.dtype)",
    "a matcher": "@torch.no_grad()\ndef forward(self, outputs, targets):\n    cost = self.layer(outputs)\n    return [linear_sum_assignment(c) for c in cost]",
    "a returned index": "@torch.no_grad()\ndef forward(self, scores):\n    return torch.topk(self.layer(scores), 2)[1]",
    "declared integers": "@torch.no_grad()\ndef forward(self, scores: torch.Tensor) -> torch.LongTensor:\n    return self.choose(self.layer(scores))",
    "an update of averages": "@torch.no_grad()\ndef update_ema(self, other):\n    for p, q in zip(self.parameters(), other.parameters()):\n        p.lerp_(q, 0.1)\n    return p",
    "packed integers": "@torch.no_grad()\ndef forward(self, packed):\n    return functional.dequantize_4bit(packed, self.state)",
    "codes of another model": "def forward(self, x, codec):\n    with torch.no_grad():\n        codes = codec.index_quantize(x)\n    return self.layer(codes)",
    "ids that a method gives": "def forward(self, x):\n    with torch.no_grad():\n        codes = self.get_codebook_indices(x)\n    return self.layer(codes)\ndef get_codebook_indices(self, x):\n    return self.layer(x)",
    "rows and columns": "def forward(self, x):\n    with torch.no_grad():\n        row_offsets, column_indices = locate(self.layer(x))\n    return self.layer(x, row_offsets, column_indices)",
    "a teacher": "def forward(self, x):\n    with torch.no_grad():\n        goal = self.target_encoder(x)\n    return self.layer(x) - goal",
    "a momentum encoder": "def forward(self, x):\n    with torch.no_grad():\n        goal = self.text_encoder_m(x)\n    return self.layer(x) - goal",
    "another momentum encoder": "def forward(self, x):\n    with torch.no_grad():\n        goal = self.backbone_mmt(x)\n    return self.layer(x) - goal",
    "a step along a derivative": "def forward(self, x):\n    step = torch.autograd.grad(self.layer(x).sum(), x)[0]\n    with torch.no_grad():\n        x.add_(step)\n    return self.layer(x)",
    "only outside training": "def forward(self, x):\n    y = self.layer(x)\n    if self.training:\n        return y\n    with torch.no_grad():\n        return self.layer(y)",
    "a teacher in a method of its own": "@torch.no_grad()\ndef encode(self, x):\n    return self.clip_teacher(x)\ndef forward(self, x):\n    return self.layer(x) - self.encode(x)",
    "an average that is kept": "def forward(self, x):\n    with torch.no_grad():\n        goal = self.ema.model.extract(x)\n    return self.layer(x) - goal",
    "the truth": "def forward(self, x, gt_boxes):\n    with torch.no_grad():\n        boxes = gt_boxes.float()\n    return self.layer(x) - boxes",
    "a matching": "@torch.no_grad()\ndef compute_matching(self, x):\n    return x.exp() / x.exp().sum()\ndef forward(self, x, y):\n    return self.layer(x) - self.compute_matching(y)",
    "weights to draw by": "def forward(self, x):\n    sims = self.layer(x)\n    with torch.no_grad():\n        chances = sims.softmax(-1)\n    pick = torch.multinomial(chances, 1).item()\n    return sims * x[pick]",
    "an alignment": "def forward(self, x):\n    with torch.no_grad():\n        path = self.maximum_path(self.layer(x))\n    return self.layer(x), path",
    "assignments to prototypes": "def forward(self, x):\n    return self.layer(x) - sinkhorn(x)\n\n@torch.no_grad()\ndef sinkhorn(x):\n    return x.exp() / x.exp().sum()",
    "adapters put into weights": "@torch.no_grad()\ndef net_merge_lora_weights(self, x):\n    return self.layer(x)",
    "a shape through a method": "@torch.no_grad()\ndef forward(self, x):\n    return self.table(x)\n\ndef table(self, x):\n    return torch.arange(x.shape[0])",
}


@pytest.mark.parametrize("case", NOTES)
def test_what_is_meant_to_be_without_gradients_is_a_note(tmp_path: Path, case: str) -> None:
    inside, _, outside = NOTES[case].partition("\n\n@")
    body = "\n".join(f"    {line}" for line in inside.split("\n")) + (f"\n\n@{outside}" if outside else "")
    source = (
        "import torch\nfrom torch import nn\nfrom scipy.optimize import linear_sum_assignment\n\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.layer = nn.Linear(4, 4)\n"
        f"        self.register_buffer('inv_freq', torch.ones(2))\n\n{body}\n"
    )
    package = write(tmp_path, {"__init__": "", "net": source})
    assert {each.severity for each in scan(str(package), cache=False).findings} == {"note"}


@pytest.mark.parametrize(
    "name",
    [
        "PostProcess",
        "PostProcessMasks",
        "BeamSearcher",
        "RandomAttack",
        "MaskExplainer",
        "DurationCalculator",
        "SpecAugment",
        "ChannelAugment",
        "SpecCutout",
        "PairMiner",
    ],
)
def test_what_is_applied_to_a_trained_model_is_a_note(tmp_path: Path, name: str) -> None:
    source = f"""
        import torch
        from torch import nn

        class {name}(nn.Module):
            def __init__(self, model):
                super().__init__()
                self.model = model

            @torch.no_grad()
            def forward(self, x):
                return self.model(x)
        """
    package = write(tmp_path, {"__init__": "", "net": source})
    assert [each.severity for each in scan(str(package), cache=False).findings] == ["note"]


@pytest.mark.parametrize(("base", "severity"), [("nn.Module", "error"), ("Preparation", "note")])
def test_a_feature_extractor_that_is_a_module_is_a_network(tmp_path: Path, base: str, severity: str) -> None:
    source = f"""
        import torch
        from torch import nn

        class Preparation:
            pass

        class FeatureExtractor({base}):
            def __init__(self, backbone):
                super().__init__()
                self.backbone = backbone

            @torch.no_grad()
            def forward(self, images: torch.Tensor):
                return self.backbone(images)
        """
    package = write(tmp_path, {"__init__": "", "net": source})
    assert [each.severity for each in scan(str(package), cache=False).findings] == [severity]


def test_what_is_offered_instead_exists_and_keeps_the_gradient(tmp_path: Path) -> None:
    """No accessor, no tool, no method that is stopped itself; parts are those kept on self, by what they are."""
    files = {"__init__": "", "net": """
        import torch
        from functools import partial
        from torch import nn
        from elsewhere import Solver

        @torch.no_grad()
        def smooth(layer, x):
            return layer(x)

        class Tower(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 4)

            @torch.no_grad()
            def forward(self, x):
                return self.layer(x)

        class Net(Solver, nn.Module):
            def __init__(self, tower: Tower, second: Tower | None, layer_class):
                super().__init__()
                self.tower = tower.eval()
                self.second = second.eval() if second is not None else None
                self.third = Tower.from_pretrained("x").to("cpu")
                self.smooth = partial(smooth, nn.Linear(4, 4))
                self.layer_class = layer_class
                self.head = nn.Linear(4, 4)

            @torch.no_grad()
            def encode(self, x):
                x = self.head(self.tower(self.second(self.third(self.smooth(x)))))
                return self.from_the_solver(self.layer_class(x))

            def get_head(self):
                return self.head

            def load_weights(self, path):
                return self.head.load_state_dict(path)

            @torch.no_grad()
            def logits(self, x):
                return self.head(x).tolist()

            FORWARD
        """}  # fmt: skip
    shut = {**files, "net": files["net"].replace("FORWARD", "")}
    session = scan(str(write(tmp_path, shut)), cache=False)
    assert next(entry["clean"] for entry in session.entries if entry["function"] == "Net.encode") == ["head"]
    forward = "def forward(self, x, quiet=False):\n                y = self.head(x)\n                if quiet:\n                    with torch.no_grad():\n                        y = y + self.head(x)\n                return y"
    (tmp_path / "pack" / "net.py").write_text(dedent(files["net"].replace("FORWARD", forward)))
    session = scan(str(tmp_path / "pack"), cache=False)
    offered = {entry["function"]: entry["alternatives"] for entry in session.entries}
    assert offered["Net.encode"] == ["forward (while the condition of its switch does not hold)"]


def test_a_mode_opens_nothing_behind_a_switch_that_is_always_off(tmp_path: Path) -> None:
    source = """
        import torch
        from torch import nn

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 4)

            @torch.inference_mode()
            def encode(self, x):
                return self.run(x)

            def run(self, x):
                if not self.training:
                    return self.quick(x)
                return self.layer(x)

            @torch.no_grad()
            def quick(self, x):
                return self.layer(x)

            def forward(self, x):
                return self.layer(x)
        """
    session = scan(str(write(tmp_path, {"__init__": "", "net": source})), cache=False)
    offered = {entry["function"]: entry["alternatives"] for entry in session.entries}
    assert offered["Net.encode"] == ["forward"]
    assert offered["Net.run"] == ["run (in the other mode, train or eval)"]


def test_a_method_that_is_asked_about_is_not_excused_by_its_purpose(tmp_path: Path) -> None:
    source = """
        import torch
        from torch import nn

        class Predictor:
            def __init__(self, model: nn.Module):
                self.model = model

            @torch.no_grad()
            def set_reference(self, x):
                self.features = self.model(x)
        """
    package = str(write(tmp_path, {"__init__": "", "net": source}))
    assert [each.severity for each in scan(package, cache=False).findings] == ["note"]
    session = scan(package, entry=("Predictor.set_reference",), cache=False)
    assert [each.severity for each in session.findings] == ["error"]
    assert session.findings[0].message.endswith("runs under no_grad: what comes out of it carries no gradient.")


def test_a_switch_in_both_branches_is_no_matter_of_the_mode(tmp_path: Path) -> None:
    source = """
        import torch
        from torch import nn

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def predict(self, x, stream=False):
                if stream:
                    return self.stream_inference(x)
                else:
                    return list(self.stream_inference(x))

            @torch.inference_mode()
            def stream_inference(self, x):
                return self.layer(x)
        """
    session = scan(str(write(tmp_path, {"__init__": "", "net": source})), cache=False)
    assert {entry["function"]: entry["status"] for entry in session.entries}["Net.predict"] == "blocked"


def test_targets_and_teachers_block_no_entry(tmp_path: Path) -> None:
    files = {"__init__": "", "net": """
        import torch
        from torch import nn

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 4)
                self.target_encoder = nn.Linear(4, 4)

            def forward(self, x):
                with torch.no_grad():
                    goal = self.target_encoder(x)
                return self.layer(x) - goal

            @torch.no_grad()
            def generate(self, x):
                return self.layer(x)
        """}  # fmt: skip
    session = scan(str(write(tmp_path, files)), cache=False)
    assert entries(session) == {
        "Net.forward": ("clean", []), "Net.generate": ("inference-only", ["Net.generate"]),
    }  # fmt: skip


HALVES = {
    "it calls forward": "@torch.inference_mode()\ndef embed(self, x):\n    return self.forward(x)",
    "its heir has one": "def normalise(self, x):\n    with torch.no_grad():\n        return self.norm(x)",
}


@pytest.mark.parametrize("case", HALVES)
def test_half_a_class_has_its_way_in_in_a_subclass(tmp_path: Path, case: str) -> None:
    source = """
        import torch
        from torch import nn

        class Base(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm1d(4)

            {}

        class Full(Base):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, x):
                return self.layer(x)
        """
    half = dedent(source).format(HALVES[case].replace("\n", "\n    "))
    package = write(tmp_path, {"__init__": "", "net": half})
    assert [each.severity for each in scan(str(package), cache=False).findings] == ["warning"]
    (package / "net.py").write_text(half.replace("(Base)", "(nn.Module)").replace("forward(x)", "norm(x)"))
    assert [each.severity for each in scan(str(package), cache=False).findings] == ["error"]


def test_an_inherited_forward_calls_what_the_subclass_puts_in(tmp_path: Path) -> None:
    files = {"__init__": "", "base": """
        from torch import nn

        class Conditioner(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = nn.Linear(4, 4)

            def embed(self, x):
                raise NotImplementedError

            def forward(self, x):
                return self.head(self.embed(x))
        """, "child": """
        import torch
        from torch import nn
        from .base import Conditioner

        class Chroma(Conditioner):
            def __init__(self):
                super().__init__()
                self.tower = nn.Linear(4, 4)

            @torch.no_grad()
            def embed(self, x):
                return self.tower(x)
        """}  # fmt: skip
    session = scan(str(write(tmp_path, files)), cache=False)
    errors = [(each.function, each.chain, each.message) for each in session.findings if each.severity == "error"]
    assert errors == [(
        "Chroma.embed", ("Conditioner.forward", "Chroma.embed"),
        "Chroma.embed runs under no_grad: training through Chroma.forward loses the gradient here.",
    )]  # fmt: skip


def test_a_name_alone_excuses_nothing(tmp_path: Path) -> None:
    """A rotary class that runs a layer over its float input, and a forward pass that is all teacher, are errors."""
    source = """
        import torch
        from torch import nn

        class RotaryEmbedding(nn.Module):
            def __init__(self):
                super().__init__()
                self.project = nn.Linear(4, 4)

            @torch.no_grad()
            def forward(self, x, position_ids):
                return self.project(x)

        class Target(nn.Module):
            def __init__(self, teacher):
                super().__init__()
                self.teacher = teacher

            def forward(self, x):
                with torch.no_grad():
                    return self.teacher(x)
        """
    package = write(tmp_path, {"__init__": "", "net": source})
    assert [each.severity for each in scan(str(package), cache=False).findings] == ["error", "error"]


def test_an_attribute_that_shadows_nothing_is_followed_through_super_and_properties(tmp_path: Path) -> None:
    source = """
        import torch
        from torch import nn

        class Inner(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, x):
                with torch.inference_mode():
                    return self.layer(x)

        class Middle(nn.Module):
            def __init__(self, inner: Inner):
                super().__init__()
                self.inner = inner

            def forward(self, x):
                return self.inner(x)

        class Child(Middle):
            def forward(self, x):
                return super().forward(x) + 1
        """
    found = entries(scan(str(write(tmp_path, {"__init__": "", "net": source})), cache=False))
    assert found["Middle.forward"] == ("blocked", ["Middle.forward", "Inner.forward"])
    assert found["Child.forward"] == ("blocked", ["Child.forward", "Middle.forward", "Inner.forward"])


MUTUAL = """
    import torch
    from torch import nn

    class Walker(nn.Module):
        def __init__(self):
            super().__init__()
            self.left = nn.Linear(4, 4)

        @torch.no_grad()
        def forward(self, x):
            return self.left(x)

        def ahead(self, x):
            return self.back(x) if x.ndim > 1 else self.leaf(x)

        def back(self, x):
            return self.ahead(x[0])

        def leaf(self, x):
            return self.left(x)
    """


def test_what_methods_on_a_cycle_do_depends_on_no_order(tmp_path: Path) -> None:
    found = entries(scan(str(write(tmp_path, {"walker": MUTUAL})), cache=False))
    ways = ["ahead", "back", "leaf"]
    assert {name: found[f"Walker.{name}"] for name in ways} == dict.fromkeys(ways, ("clean", []))
    assert found["Walker.forward"][0] == "blocked"


PREDICTOR = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def forward(self, x):
            return x * 2

    class Predictor:
        def __init__(self, net: Net):
            self.net = net

        @torch.no_grad()
        def set_image(self, image: torch.Tensor):
            self.features = self.net(image)

        @torch.no_grad()
        def set_threshold(self, value: torch.Tensor):
            self.threshold = self.net(value)

        def predict(self, points: torch.Tensor):
            return self._predict(points)

        @torch.no_grad()
        def _predict(self, points: torch.Tensor):
            return self.net(points)

        @torch.no_grad()
        def _unused(self, points: torch.Tensor):
            return self.net(points)
    """


def test_a_predictor_is_for_inference_also_where_the_switch_is_inside_it(tmp_path: Path) -> None:
    session = scan(str(write(tmp_path, {"predictor": PREDICTOR})), cache=False)
    found = {each.function.rpartition(".")[2]: each for each in session.findings}
    assert {name: each.severity for name, each in found.items()} == {
        "set_image": "warning", "set_threshold": "note", "_predict": "warning", "_unused": "note",
    }  # fmt: skip
    assert found["_predict"].chain == ("Predictor.predict", "Predictor._predict")


CALLED = """
    import torch
    from torch import nn

    @torch.no_grad()
    def best(values, extra=None):
        return values.amax() if extra is None else values.amax() + extra.amax()

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        @torch.no_grad()
        def measure(self, x):
            return self.inner(x)

    class Net(nn.Module):
        def __init__(self, parts, settings: int):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.other = nn.Linear(4, 4)
            self.part = Part()
            self.parts = parts
            self.register_buffer("base", torch.ones(4))

        def prepare(self, values):
            if values is not None:
                self.register_buffer("later", values)

        @torch.no_grad()
        def scale(self, x):
            return self.layer(x).std()

        @torch.no_grad()
        def embed(self, x):
            return self.other(x)

        def shifted(self, x):
            return self.layer(x) - best(x)

        def handed_on(self, x):
            return self.scale(x)

        def forward(self, x, z, ids, *more):
            {}
    """
LOST_IN_PART = {
    "in evaluation": "if self.training:\n    return self.layer(x)\nreturn self.handed_on(x)",
    "in evaluation, or where a setting says so": "if x is not None and (not self.training or self.more):\n    return self.handed_on(x)\nreturn self.layer(x)",
    "a scale": "return self.layer(x) / self.scale(x)",
    "a call further": "return self.layer(x) / self.handed_on(x)",
    "a function": "y = self.layer(x)\nreturn y - best(y)",
    "in between": "return self.shifted(x)",
    "through a call that was given it": "return self.layer(x) * self.layer(best(self.layer(x)))",
    "a statistic beside the result": "y = self.layer(x)\nreturn y, accuracy(best(y), ids)",
    "by a keyword": "y = self.layer(x)\nreturn y - best(extra=y, values=self.base)",
    "all that is gathered": "return torch.cat(more) - best(*more)",
}
LOST_WHOLE = {
    "in both modes": "if self.training:\n    return self.handed_on(x)\nreturn self.scale(x)",
    "one way or the other": "if len(x) > 1:\n    return self.layer(x)\nreturn self.handed_on(x)",
    "in training": "if not self.training:\n    return self.layer(x)\nreturn self.handed_on(x)",
    "a layer of its own": "return self.layer(x) + self.embed(x)",
    "a layer of another object": "return self.layer(x) + self.part.measure(x)",
    "nothing else": "return self.layer(self.scale(x))",
    "a result of its own": "return self.layer(x), self.scale(x)",
    "an item of its own": "out = {'y': self.layer(x)}\nout['scale'] = self.scale(x)\nreturn out",
    "one of its inputs": "return self.layer(x) - best(self.layer(x), z)",
    "on one of two ways": "return self.shifted(x), best(self.layer(x))",
    "handed over in a list": "return self.layer(x) + best(*[self.other(x)])",
}
NOT_LOST = {
    "a buffer": "return self.layer(x) - best(self.base)",
    "a buffer registered later": "return self.layer(x) - best(self.later)",
    "a buffer that is worked on": "return self.layer(x) - best(values=self.base.exp() * 2)",
    "integers": "return self.layer(x) - best(x.argmax(-1))",
}


@pytest.mark.parametrize(
    ("severity", "case", "body"),
    [
        (severity, case, body)
        for severity, bodies in (("warning", LOST_IN_PART), ("error", LOST_WHOLE), ("note", NOT_LOST))
        for case, body in bodies.items()
    ],
)
def test_what_a_caller_loses_decides(tmp_path: Path, severity: str, case: str, body: str) -> None:
    """A call of a stopped function is to its caller what a block is: lost is what is given to it and nothing else."""
    source = dedent(CALLED).format(body.replace("\n", "\n        "))
    found = scan(str(write(tmp_path, {"__init__": "", "net": source})), cache=False).findings
    reached = [each for each in found if each.chain[:1] == ("Net.forward",) or "no forward pass hands" in each.message]
    assert {each.severity for each in reached} == {severity}


def test_a_part_that_calls_itself_loses_what_its_callers_lose(tmp_path: Path) -> None:
    source = """
        import torch
        from torch import nn

        class Tree(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 4)

            @torch.no_grad()
            def leaf(self, x):
                return self.layer(x)

            def walk(self, x):
                return self.step(x) if len(x) > 1 else self.leaf(x)

            def step(self, x):
                return self.walk(x[0])

            def forward(self, x):
                return self.layer(x) * self.walk(x)
        """
    found = scan(str(write(tmp_path, {"__init__": "", "net": source})), cache=False).findings
    assert [(each.severity, each.chain) for each in found] == [("warning", ("Tree.forward", "Tree.walk", "Tree.leaf"))]


BESIDE = {
    "a sampler": ("@torch.no_grad()\ndef draw(model, x):\n    return step(model(x), x)\n\ndef step(a, b):\n    return a - b", "warning"),
    "a model that is handed on": ("@torch.no_grad()\ndef decode(model, x):\n    return Task(model).run(x)", "warning"),
    "a part of a model": ("@torch.no_grad()\ndef detect(model, x):\n    return model.head(x)", "warning"),
    "something else that is handed on": ("@torch.no_grad()\ndef decode(audio, x):\n    return Task(audio).run(x)", "note"),
    "a step of its own": ("@torch.no_grad()\ndef draw(a, b):\n    return step(a, b)\n\ndef step(a, b):\n    return a - b", "note"),
    "a density": ("class Posterior:\n    def __init__(self, net):\n        self.net = net\n    @torch.no_grad()\n    def log_prob(self, x):\n        return self.net(x)", "warning"),
    "a log": ("class Posterior:\n    def __init__(self, net):\n        self.net = net\n    @torch.no_grad()\n    def log_images(self, x):\n        return self.net(x)", "note"),
    "a grid made finer": ("class Grid(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.plane = nn.Parameter(torch.ones(4))\n    @torch.no_grad()\n    def upsample(self, size: int):\n        self.plane = finer(self.plane, size)", "note"),
    "an image looked at": ("class Grid(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.plane = nn.Parameter(torch.ones(4))\n    @torch.no_grad()\n    def look(self, image):\n        self.seen = finer(self.plane, image)", "warning"),
}  # fmt: skip


@pytest.mark.parametrize("case", BESIDE)
def test_what_no_forward_pass_calls_is_for_inference_where_it_runs_a_model(tmp_path: Path, case: str) -> None:
    source, severity = BESIDE[case]
    package = write(tmp_path, {"__init__": "", "net": f"import torch\nfrom torch import nn\n\n{source}\n"})
    found = scan(str(package), cache=False).findings
    assert [each.severity for each in found if each.rule == "GS102"] == [severity]
