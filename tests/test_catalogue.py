"""The rule catalogue: every rule has its page, every page its parts, and every example does what it says."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib import resources

import pytest
import torch

from gradscope.errors import UsageError
from gradscope.rules import FAMILIES, RULES, find_rule, load_rule_page, rule_family, rule_name

HEADINGS = [
    "What it is",
    "Why the gradient stops",
    "How it shows at run time",
    "Example",
    "What to do",
    "What does not help",
    "References",
]
# These two are no fault of the model: there is nothing to mend in it.
WITHOUT_A_FIX = {"GS901", "GS902"}


def examples(code: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", load_rule_page(code), flags=re.DOTALL | re.MULTILINE)


ALL_EXAMPLES = [
    pytest.param(source, id=f"{code}-{number}") for code in RULES for number, source in enumerate(examples(code))
]


@pytest.fixture
def default_state() -> Iterator[None]:
    """Undo whatever an example switches: some exist to show a switch that is left on."""
    dtype = torch.get_default_dtype()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_grad_enabled(True)
    torch.set_default_dtype(dtype)
    assert not torch.is_inference_mode_enabled()


def test_every_rule_has_a_page_and_every_page_a_rule() -> None:
    pages = {entry.name for entry in resources.files("gradscope.catalogue").iterdir() if entry.name.endswith(".md")}
    assert pages == {f"{code}.md" for code in RULES}


def test_codes_and_names_are_unique_and_well_formed() -> None:
    assert list(RULES) == sorted(RULES)
    assert len(set(RULES.values())) == len(RULES)
    assert all(re.fullmatch(r"GS\d{3}", code) for code in RULES)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", name) for name in RULES.values())
    assert {rule_family(code) for code in RULES} == set(FAMILIES.values())


@pytest.mark.parametrize("code", RULES)
def test_a_page_has_its_title_and_its_parts_in_order(code: str) -> None:
    prose = re.sub(r"^```.*?^```$", "", load_rule_page(code), flags=re.DOTALL | re.MULTILINE)
    title, blank, summary = prose.splitlines()[:3]
    assert title == f"# {code} {rule_name(code)}"
    assert blank == "" and summary.strip()
    assert re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE)[1:] == HEADINGS
    assert all(part.strip() for part in re.split(r"^## .*$", load_rule_page(code), flags=re.MULTILINE))


@pytest.mark.parametrize("code", RULES)
def test_a_page_shows_the_problem_and_the_fix_and_fits_a_terminal(code: str) -> None:
    sources = examples(code)
    assert len(sources) == (1 if code in WITHOUT_A_FIX else 2)
    for source in sources:
        assert source.splitlines()[-1].startswith("assert ")
        assert max(map(len, source.splitlines())) <= 78


@pytest.mark.parametrize("source", ALL_EXAMPLES)
@pytest.mark.usefixtures("default_state")
def test_an_example_does_what_it_says(source: str) -> None:
    code = compile(source, "<example>", "exec", dont_inherit=True)
    exec(code, {"__name__": "example"})


@pytest.mark.parametrize("text", ["GS101", "gs101", "inference-mode-decorator", "Inference_Mode_Decorator", " GS101 "])
def test_a_rule_is_found_by_code_and_by_name(text: str) -> None:
    assert find_rule(text) == "GS101"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("detatch", "Did you mean GS201 detach?"),
        ("numpy", "GS301 numpy-escape"),
        ("no_grad", "GS102 no-grad-decorator or GS104 no-grad-block"),
        ("GS110", "GS107 grad-mode-leak"),
        ("", "`gradscope explain` lists all rules."),
    ],
)
def test_an_unknown_rule_gets_a_hint(text: str, hint: str) -> None:
    with pytest.raises(UsageError, match="There is no rule called") as caught:
        find_rule(text)
    assert hint in caught.value.hint


def test_a_page_of_an_unknown_code_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="GS000"):
        load_rule_page("GS000")


def test_the_catalogue_needs_no_torch() -> None:
    code = "import sys, gradscope.rules as r; [r.load_rule_page(c) for c in r.RULES]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
