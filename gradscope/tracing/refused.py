"""A forward pass that autograd refuses to go on with: which call offends it, and what made that so."""

from __future__ import annotations

import dataclasses

from gradscope.errors import first_line
from gradscope.tracing.cuts import FREED, Cut, blamed, cut_at
from gradscope.tracing.diagnose import diagnose
from gradscope.tracing.recording import Recording, Site

# What autograd says when a forward pass offends it, the rule that this is, and where its cause lies: at the call
# itself, where an inference tensor was made, or where the gradient was lost before.
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
    ("modified by an inplace operation", "GS603", "here"),
    ("cannot resize variables that require grad", "GS603", "here"),
    ("Can't detach views in-place", "GS201", "here"),
    ("only change requires_grad flags of leaf", "GS204", "here"),
    ("refusing to serialize non-leaf", "GS303", "here"),
    (FREED, "GS603", "here"),
    ("does not require grad", "GS201", "before"),
    ("doesn't require gradient", "GS201", "before"),
    ("can't retain_grad on Tensor that has requires_grad=False", "GS201", "before"),
    ("not have been used in the graph", "GS201", "before"),
)


def is_autograds(error: BaseException) -> bool:
    """Tell whether an exception of a forward pass is autograd's refusal."""
    return any(words.lower() in str(error).lower() for words, _, _ in REFUSED_CALLS)


def crash_cuts(recording: Recording) -> dict[Site, Cut]:
    """Return what made autograd refuse a call of the forward pass."""
    pending, said = recording.pending, str(recording.error).lower()
    found = next(((rule, where) for words, rule, where in REFUSED_CALLS if words.lower() in said), None)
    if recording.error is None or pending is None or found is None:
        return {}
    rule, where = found
    cuts: dict[Site, Cut] = {}
    if where == "inference":
        makers = {value: op for op in recording.operations for value in op.outputs}
        for value in pending.inputs:
            maker = makers.get(value)
            if maker is not None and recording.values[value].inference:
                blamed(cuts, recording, maker)
    elif where == "before":
        before = dataclasses.replace(recording, sinks=pending.inputs, error=None)
        cuts = {site: cut for site, cut in diagnose(before).cuts.items() if cut.sources}
    if not cuts and pending.place is not None:
        if where == "inference" and any(recording.values[value].inference for value in pending.inputs):
            rule = "GS601" if any(recording.values[value].leaf for value in pending.inputs
                                  if recording.values[value].inference) else "GS602"  # fmt: skip
        cut = cut_at(cuts, recording, pending)
        cut.rule, cut.words = rule, f"autograd refuses this call: {first_line(recording.error)}"
    return cuts
