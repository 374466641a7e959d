"""A forward pass that autograd refuses to go on with: which call offends it, and what made that so."""

from __future__ import annotations

import dataclasses

from gradscope.errors import first_line
from gradscope.findings import listed
from gradscope.tracing.cuts import FREED, LET_GO, USES_FREED, Cut, blamed, cut_at
from gradscope.tracing.diagnose import diagnose
from gradscope.tracing.propagation import linked_sources
from gradscope.tracing.recording import Operation, Recording, Site

# What torch.autograd.grad says of a tensor that what it derives does not depend on.
UNUSED = "not have been used in the graph"
ENABLE = "Take the derivative under torch.enable_grad(), of inputs that were detached and made to require a gradient."
# Two backward passes in one call of the target.
GOES_TWICE = "it goes backward from what another backward pass went through before, which freed its graph."
KEEP_GRAPH = "Go backward once, from the sum; or compute the loss anew; or pass retain_graph=True to the first pass."
SHARED = (
    "Go backward once, from the sum of the losses; or pass retain_graph=True to the first pass; or detach() what this "
    "loss is not to train."
)

# What autograd says when a forward pass offends it, the rule that this is, and where its cause lies: at the call
# itself, where an inference tensor was made, where the gradient was lost before, where what backward needs was written,
# or where a graph is gone on with that was freed.
REFUSED_CALLS = (
    ("inference tensor", "GS601", "inference"),
    ("Can't call numpy() on Tensor that requires grad", "GS301", "here"),
    ("Can't export tensors that require gradient", "GS301", "here"),
    ("on Variable that requires grad", "GS301", "here"),  # apply_, map_, __cuda_array_interface__
    ("is not differentiable with respect to argument", "GS502", "here"),
    ("don't support automatic differentiation", "GS603", "here"),
    ("support the deepcopy protocol", "GS203", "here"),
    ("a leaf Variable that requires grad", "GS603", "here"),
    ("is being modified inplace", "GS603", "here"),
    ("modified by an inplace operation", "GS603", "write"),
    ("cannot resize variables that require grad", "GS603", "here"),
    ("Can't detach views in-place", "GS201", "here"),
    ("only change requires_grad flags of leaf", "GS204", "here"),
    ("refusing to serialize non-leaf", "GS303", "here"),
    (FREED, "GS608", "freed"),
    ("does not require grad", "GS201", "before"),
    ("doesn't require gradient", "GS201", "before"),
    ("can't retain_grad on Tensor that has requires_grad=False", "GS201", "before"),
    (UNUSED, "GS702", "before"),
    ("dtype can require gradients", "GS403", "before"),
)
# What helps where the rule's own advice would not, by what autograd says.
ADVICE_BY_WORDS = (
    ("a leaf Variable that requires grad", "Where the write is an update of the weight (a clip, a step), make it under "
     "torch.no_grad(); where it is part of the model, write into a clone(), or use the form that makes a new tensor. "
     "A buffer that is written into needs no requires_grad=True."),
    ("support the deepcopy protocol", "The module keeps a tensor with a history: detach() it where it is kept, or set "
     "it to None before the copy."),
    ("Can't call numpy()", "Compute this with torch. Where it is for a log or a metric alone, detach() first: no "
     "gradient comes back through it."),
    (UNUSED, "Ask about the tensor that was used itself (not x[0], -x or x.clone() of it), leave out what is not used, "
     "or pass allow_unused=True and mind the None."),
    ("dtype can require gradients", "Make it a floating-point tensor (1.0 in place of 1, .float()); an index or a "
     "count cannot be trained."),
)  # fmt: skip


def is_autograds(error: BaseException) -> bool:
    """Tell whether an exception of a forward pass is autograd's refusal."""
    return any(words.lower() in str(error).lower() for words, _, _ in REFUSED_CALLS)


def _makers_of_inference(recording: Recording, pending: Operation) -> list[Operation]:
    """Return the calls that made the inference tensors that a call takes in; a view of one only hands it on."""
    makers = {value: op for op in recording.operations for value in op.outputs}
    found: list[Operation] = []
    for taken in pending.inputs:
        value, maker = taken, makers.get(taken)
        while maker is not None and not maker.regions:
            before = next((each for each in maker.inputs if recording.values[each].inference), None)
            if before is None:
                break
            value, maker = before, makers.get(before)
        if maker is not None and recording.values[value].inference:
            found.append(maker)
    return found


def crash_cuts(recording: Recording) -> dict[Site, Cut]:
    """Return what made autograd refuse a call of the forward pass."""
    pending, said = recording.pending, str(recording.error).lower()
    found = next(((rule, where) for words, rule, where in REFUSED_CALLS if words.lower() in said), None)
    if recording.error is None or pending is None or found is None:
        return {}
    rule, where = found
    cuts = _causes(recording, pending, where)
    if not cuts and pending.place is not None:
        if where == "inference" and any(recording.values[value].inference for value in pending.inputs):
            rule = "GS601" if any(recording.values[value].leaf for value in pending.inputs
                                  if recording.values[value].inference) else "GS602"  # fmt: skip
        cut = cut_at(cuts, recording, pending)
        cut.rule, cut.words = rule, f"autograd refuses this call: {first_line(recording.error)}"
        cut.advice = next((advice for words, advice in ADVICE_BY_WORDS if words.lower() in said), "")
        if UNUSED in said:
            _say_what_is_unused(recording, pending, cut)
    return cuts


def _causes(recording: Recording, pending: Operation, where: str) -> dict[Site, Cut]:
    """Return the cuts that lie before the call that is refused; none where it is the cause itself."""
    cuts: dict[Site, Cut] = {}
    if where == "inference":
        for maker in _makers_of_inference(recording, pending):
            blamed(cuts, recording, maker)
    elif where == "before" and recording.raised_in is not None and recording.raised_in[1] is recording.error:
        _blame_function(cuts, recording, pending, recording.raised_in[0])
    elif where == "before":
        before = dataclasses.replace(recording, sinks=pending.inputs, error=None)
        cuts = {site: cut for site, cut in diagnose(before).cuts.items() if cut.sources}
    elif where == "write":
        for operation in recording.operations:
            if operation.refusal is not None and operation.refusal.raises:
                blamed(cuts, recording, operation)
    elif where == "freed":
        _blame_what_is_kept(cuts, recording, pending)
    return cuts


def _blame_function(cuts: dict[Site, Cut], recording: Recording, pending: Operation, function: str) -> None:
    if pending.place is not None:
        cut = cut_at(cuts, recording, pending)
        cut.rule, cut.advice = "GS501", ENABLE
        cut.words = f"inside {function} nothing is recorded, as in every custom function."


def _blame_what_is_kept(cuts: dict[Site, Cut], recording: Recording, pending: Operation) -> None:
    """Blame the first call that goes on with what an earlier backward pass went through; else this pass itself."""
    passes = recording.training.passes
    since, earlier = (passes[-1].since, passes[-1].values) if passes else (0, ())
    if pending.place is None or set(pending.inputs) & set(earlier):
        if pending.place is not None:
            cut = cut_at(cuts, recording, pending)
            cut.rule, cut.words, cut.advice = "GS608", GOES_TWICE, KEEP_GRAPH
        return
    made = {value for operation in recording.operations[since:] for value in operation.outputs}
    leads = set(pending.inputs)
    first = None
    for operation in reversed(recording.operations[since:]):
        if leads.intersection(operation.outputs):
            leads.update(operation.inputs)
            old = [value for value in operation.inputs if value not in made and _has_graph(recording, value)]
            first = operation if old and operation.place is not None else first
    if first is not None:
        cut = cut_at(cuts, recording, first)
        again = any(each.place == first.place for each in recording.operations[:since])  # in another round of a loop
        cut.rule, cut.words = "GS608", USES_FREED
        cut.advice = LET_GO if again else SHARED


def _has_graph(recording: Recording, number: int) -> bool:
    value = recording.values[number]
    return value.connected and not value.leaf


def _say_what_is_unused(recording: Recording, pending: Operation, cut: Cut) -> None:
    """Name the sources that a derivative was asked of and that what is derived does not depend on."""
    asked = {value: name for name, value in recording.leaves.items() if value in pending.inputs}
    derived = dataclasses.replace(recording, sinks=tuple(each for each in pending.inputs if each not in asked))
    unused = sorted(set(asked.values()) - linked_sources(derived))
    if unused and len(derived.sinks) < len(pending.inputs):
        cut.words = f"what is derived does not depend on {listed(unused)}: {first_line(recording.error or Exception())}"
