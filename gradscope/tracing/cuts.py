"""The cut: one place where gradients end, and which place is to blame for what a recording shows."""

from __future__ import annotations

from dataclasses import dataclass, field

from gradscope.tracing.calls import COLLECTIVES, DERIVES, SHARES_MEMORY
from gradscope.tracing.frames import code_name, source_site
from gradscope.tracing.recording import Loss, Operation, Recording, Refusal, Site

_COMPARISONS = "eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__ isclose bucketize searchsorted"
_INDICES = "argmax argmin argsort multinomial one_hot nonzero topk sort max min histc bincount"
_SCALARS = "item tolist __float__ __int__ __index__"

# How an operation that stops the gradient by itself is called in the catalogue.
RULE_OF_OPERATION = {
    **dict.fromkeys(("detach", "detach_"), "GS201"),
    **dict.fromkeys(("data", "__set__"), "GS202"),
    **dict.fromkeys(("tensor", "new_tensor", "Parameter", "shared memory", "pickle", "__deepcopy__"), "GS203"),
    **dict.fromkeys(("load_state_dict", "as_tensor", "asarray", "Tensor", "as_subclass"), "GS203"),
    **dict.fromkeys(("sample",), "GS205"),
    **dict.fromkeys((*COLLECTIVES, "distributed"), "GS206"),
    DERIVES: "GS207",
    **dict.fromkeys(SHARES_MEMORY, "GS301"),
    **dict.fromkeys(_SCALARS.split(), "GS302"),
    **dict.fromkeys(_INDICES.split(), "GS401"),
    **dict.fromkeys(_COMPARISONS.split(), "GS402"),
    **dict.fromkeys(("long", "int", "short", "char", "byte", "bool", "to", "type"), "GS403"),
}
# What an exported program has in the place of a switch (``torch.ops.higher_order``).
EXPORTED_SWITCH = "wrap_with_set_grad_enabled"
SWITCHES = frozenset({"no_grad", "inference_mode", "set_grad_enabled", "enable_grad", EXPORTED_SWITCH})
RULE_OF_REGION = {
    ("inference_mode", "decorator"): "GS101",
    ("no_grad", "decorator"): "GS102",
    ("inference_mode", "block"): "GS103",
    ("no_grad", "block"): "GS104",
}

# A custom function that autograd links to something else.
NOT_GIVEN = "it uses tensors that apply() was not given one by one (of a module, in a list): they get no gradient."
GIVE_IT = "Pass each of them to {mechanism}.apply as an argument of its own, and return a gradient for it."

# A module of which nothing is seen inside.
LOOK_INSIDE = (
    "Trace the Python that it was made of, where every line is seen; a script keeps what that switches off or detaches."
)

# What a reentrant checkpoint does not connect.
UNRECORDED = "no tensor that it is given requires a gradient, and then a reentrant checkpoint records nothing."
GIVE_TENSORS = "Pass use_reentrant=False, or give back tensors, one or a tuple of them."
UNLOOKED = "what it gives out lies in a list, a dict or an object, where a reentrant checkpoint does not look."

# A derivative that torch does not have, the first or the second.
SECOND = "what it gives out is derived once more, and a call in between has no second derivative in torch."
DERIVABLE = (
    "Compute what is derived with calls that have one (attention: torch.nn.attention.sdpa_kernel(SDPBackend.MATH)), or "
    "do without the second derivative."
)

# A backward pass through a graph that another one has freed, in torch's words, and in ours.
FREED = "backward through the graph a second time"
FREES = "it frees the graph that the backward pass goes through again."
KEEP_IT = "Pass retain_graph=True to {mechanism}, or create_graph=True where its result is trained on."
USES_FREED = (
    "the graph behind what it takes in was freed before: by a backward pass in this call, or after an earlier one."
)
STEP_LATER = "Step after the last backward pass that goes through these weights, or compute the forward pass anew."
LET_GO = "detach() what is kept from call to call (a state, a running sum), or compute it anew for each backward pass."


@dataclass(slots=True)
class Cut:
    """One place where gradients end: a region or a single operation.

    ``partial`` are the sources that lose only one of their paths here, ``flat`` says that the operation
    has no useful derivative, ``escape`` that the numbers went through Python, where they are not followed.
    ``zero``, ``nonfinite`` and ``wrong`` are the sources whose gradient arrives and is that; ``words`` says more,
    ``error`` is what the exception says, and ``raises`` that the backward pass ends here with it. By finite
    differences: ``stepped`` sources matter in steps only, ``benign`` ones miss nothing by this cut, and ``certain``
    says that ``wrong`` was shown. ``advice`` is better than what the rule advises in general. ``via`` is the function
    of torch that the user called, where the call that stops the gradient lies inside it. ``elsewhere`` are the sources
    that lose all of one backward pass here, and that another one reaches.
    """

    site: Site
    rule: str
    sources: set[str] = field(default_factory=set)
    partial: set[str] = field(default_factory=set)
    chain: tuple[str, ...] = ()
    outer: Site | None = None
    module: str = ""
    flat: bool = False
    escape: bool = False
    zero: set[str] = field(default_factory=set)
    nonfinite: set[str] = field(default_factory=set)
    wrong: set[str] = field(default_factory=set)
    words: str = ""
    error: str = ""
    raises: bool = False
    stepped: set[str] = field(default_factory=set)
    benign: set[str] = field(default_factory=set)
    certain: bool = False
    advice: str = ""
    via: str = ""
    elsewhere: set[str] = field(default_factory=set)

    @property
    def touched(self) -> set[str]:
        """Return every source that something happens to here."""
        return self.sources | self.partial | self.zero | self.nonfinite | self.wrong | self.benign | self.elsewhere


def blamed(cuts: dict[Site, Cut], recording: Recording, operation: Operation) -> list[Cut]:
    """Attribute a lost gradient to the regions that were active, outermost first, or to the call."""
    if operation.refusal is not None:
        cut = _cut_of_refusal(cuts, recording, operation, operation.refusal)
        return [cut] if cut is not None else []
    if not operation.regions:
        return [_cut_of_call(cuts, recording, operation)] if operation.place is not None else []
    found: list[Cut] = []
    outer: Site | None = None
    for region in operation.regions:
        rule = "GS107" if region.site in recording.leaked else rule_of_region(region.site)
        found.append(cuts.setdefault(region.site, Cut(region.site, rule, chain=region.chain, outer=outer)))
        outer = region.site
    return found


def _cut_of_call(cuts: dict[Site, Cut], recording: Recording, operation: Operation) -> Cut:
    cut = cut_at(cuts, recording, operation)
    if cut.rule == "GS604":
        takes = any(recording.values[value].connected for value in operation.inputs[: operation.given])
        cut.words, cut.advice = (UNLOOKED, GIVE_TENSORS) if takes else (UNRECORDED, "")
    elif operation.given is not None and any(recording.values[value].connected for value in operation.outputs):
        cut.words, cut.advice = NOT_GIVEN, GIVE_IT
    return cut


def _cut_of_refusal(cuts: dict[Site, Cut], recording: Recording, operation: Operation, refusal: Refusal) -> Cut | None:
    """Blame the write that spoiled what was saved; else the operation that autograd has no derivative for."""
    culprit = operation if refusal.write is None else recording.operations[refusal.write]
    if culprit.place is None:
        return None
    cut = cut_at(cuts, recording, culprit)
    cut.rule = cut.rule if cut.rule == "GS206" else refusal.rule  # some backends' collectives warn in backward
    cut.words, cut.error, cut.advice = refusal.message, refusal.error, refusal.advice
    if culprit.name == DERIVES and refusal.write is None:
        cut.words, cut.advice = SECOND, DERIVABLE
    if recording.training.has_step(culprit.index):
        cut.via, cut.advice = "optimizer.step", STEP_LATER
    cut.raises = cut.raises or refusal.raises
    return cut


def cut_at(cuts: dict[Site, Cut], recording: Recording, operation: Operation) -> Cut:
    assert operation.place is not None
    site = source_site(operation.place, operation.name)
    rule = (
        _rule_of_custom(recording, operation)
        if operation.custom
        else RULE_OF_OPERATION.get(operation.name.partition(".")[0], "GS503")
    )
    cut = cuts.setdefault(site, Cut(site, rule, chain=operation.chain or (code_name(operation.place.code),)))
    cut.module, cut.via = _module_path(recording, operation), operation.via
    if operation.custom and operation.name.endswith(".forward"):
        cut.advice = cut.advice or LOOK_INSIDE
    return cut


def _rule_of_custom(recording: Recording, operation: Operation) -> str:
    if operation.name == "CheckpointFunction":
        return "GS604"
    if operation.name.endswith(".forward"):  # a scripted module, taken as one
        return "GS503"
    inference = any(recording.values[value].inference for value in operation.outputs)
    return "GS601" if inference else "GS501"


def rule_of_region(site: Site) -> str:
    if site.mechanism not in SWITCHES:  # torch's own function switches recording off
        return RULE_OF_OPERATION.get(site.mechanism, "GS104")
    how = "decorator" if site.how == "decorator" else "block"
    return RULE_OF_REGION.get((site.mechanism, how), "GS105")


def _module_path(recording: Recording, operation: Operation) -> str:
    named = [scope.module for scope in recording.ancestors(operation.scope) if scope.module]
    return named[-1] if named else ""


def cut_of_loss(cuts: dict[Site, Cut], recording: Recording, loss: Loss) -> Cut | None:
    operation = recording.operations[loss.operation] if loss.operation is not None else None
    if loss.what.startswith("hook"):
        place = next((recording.hooks[value] for value in operation.outputs if value in recording.hooks), None) \
            if operation is not None else next(
                (recording.hooks[recording.leaves[name]] for name in loss.sources
                 if recording.leaves.get(name) in recording.hooks), None)  # fmt: skip
        if place is not None:
            site = source_site(place, "register_hook")
            cut = cuts.setdefault(site, Cut(site, "GS606", chain=(code_name(place.code),)))
            cut.words = "the hook raises an exception." if loss.what == "hook raises" else cut.words
            return cut
    if operation is None or operation.place is None:
        return None
    if loss.what == "raises" and FREED in recording.backward_error:
        return _cut_of_freed(cuts, recording, operation)
    if loss.what == "raises" and operation.refusal is not None and operation.refusal.raises:
        return _cut_of_refusal(cuts, recording, operation, operation.refusal)
    cut = cut_at(cuts, recording, operation)
    rules = {"zero": "GS404", "nonfinite": "GS607", "hook zero": "GS606", "hook nonfinite": "GS606"}
    hooked = operation.name == "BackwardHookFunction"
    cut.rule = "GS606" if hooked else rules.get(loss.what, "GS501" if operation.custom else "GS502")
    return cut


def _cut_of_freed(cuts: dict[Site, Cut], recording: Recording, operation: Operation) -> Cut:
    """Blame the derivative that was taken of a graph after the operation; else the operation that uses it again."""
    after = recording.operations[operation.index :]
    derived = next((each for each in after if each.name == DERIVES and each.place is not None), None)
    cut = cut_at(cuts, recording, derived or operation)
    if derived is not None:
        cut.words, cut.advice = FREES, KEEP_IT
    else:
        cut.rule, cut.words, cut.advice = "GS608", USES_FREED, LET_GO
    return cut
