"""What a torch call does to numbers, told by its name: carries them, takes them out, writes in place, only asks."""

from __future__ import annotations

import functools
from types import BuiltinFunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType
from typing import Any

import torch

from gradscope.tracing.control_flow import meaning_of

# ``torch.autograd.grad``; and the calls that give a derivative of what they take in (the other one in forward mode).
DERIVES = "grad"
DERIVATIVES = frozenset({DERIVES, "_unpack_dual"})
# How CuPy, Numba and others ask for the memory of a tensor on the GPU: an attribute.
CUDA_ARRAY = "__cuda_array_interface__"
# Calls that hand out the memory of a tensor: others can read it, and write into it.
SHARES_MEMORY = frozenset({"numpy", "__array__", "__dlpack__", CUDA_ARRAY})
# Those, and the other one, that take all numbers of a tensor; and all that leave the tensor world with some in hand.
WHOLE = SHARES_MEMORY | {"tolist"}
ESCAPES = WHOLE | {"item", "__float__", "__int__", "__index__", "pickle"}
# Calls that make a tensor of numbers that Python holds.
ENTRANCES = frozenset("tensor new_tensor as_tensor asarray full linspace logspace scalar_tensor".split())
# What is to be noted of beyond its result.
NOTED = ESCAPES | ENTRANCES | DERIVATIVES
# Calls that take a tensor and use none of its numbers: no data flows (timm's drop-path masks,
# ``x.new_empty(shape).bernoulli_(p)``, would be false alarms otherwise).
MAKES_ROOM = frozenset(
    "new_empty new_zeros new_ones new_full empty_like zeros_like ones_like full_like rand_like randn_like "
    "randint_like".split()
)
# Of these, the ones that are filled with a number of Python's, which may have been a tensor's.
FILLS = frozenset({"new_full", "full_like"})
SHAPE_ONLY = MAKES_ROOM | frozenset(
    "size stride dim numel is_floating_point is_complex is_contiguous is_inference requires_grad_ storage_offset "
    "untyped_storage is_same_size result_type retain_grad register_hook _set_grad_enabled __len__ ndimension "
    "element_size nelement is_nonzero data_ptr __hash__ __format__ __repr__ __dir__".split()
)
# Of those, the calls that autograd may refuse.
MAY_BE_REFUSED = frozenset({"requires_grad_", "register_hook", "retain_grad", "__set__"})
# And those that set ``requires_grad``, among other attributes.
SETS_FLAG = frozenset({"requires_grad_", "__set__"})
# Calls that take the shape or dtype of their second tensor, and numbers of the first one only.
AS_ANOTHER = frozenset({"reshape_as", "view_as", "expand_as", "type_as", "resize_as_", "to"})
# Property reads; ``data``, ``real``, ``imag``, ``T``, ``mT`` and ``H`` do carry numbers.
DATA_PROPERTIES = frozenset({"data", "real", "imag", "T", "mT", "H", "mH"})
# What a further run can do without: the call gives back its input instead.
REPLACEABLE = {
    "detach": 0, "detach_": 0, "data": 0, "tensor": 0, "new_tensor": 1, "CheckpointFunction": 0, "__deepcopy__": 0,
}  # fmt: skip
# And what it can call in another way: a derivative that is trained on needs a graph.
MENDABLE = frozenset({*REPLACEABLE, DERIVES})
IN_PLACE = frozenset(
    "__setitem__ __set__ __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __imod__ __ipow__ __imatmul__ __iand__ "
    "__ior__ __ixor__ __ilshift__ __irshift__".split()
)
# What adds or multiplies by a number of Python's, or goes along a dimension of that number, which is kept.
TAKES_NUMBERS = frozenset(
    "add add_ __add__ __radd__ __iadd__ sub sub_ subtract __sub__ __isub__ rsub __rsub__ mul mul_ multiply __mul__ "
    "__rmul__ __imul__ div div_ divide true_divide __truediv__ __itruediv__ sum nansum mean logsumexp cumsum amax amin "
    "max min softmax log_softmax softmin".split()
)
# What leaves nothing of the numbers that were there.
OVERWRITES = frozenset({"copy_", "fill_", "zero_", "__setitem__"})
# Calls that make memory of their own, into which others may write.
ROOMS = frozenset({"empty", "empty_strided", "zeros", "ones", "full"})
# What gathers for one rank writes into its second argument.
_GATHERS = frozenset({"distributed.gather", "gather_into_tensor", "gather_single"})
# Collectives else write into their first one, and give out nothing (``torch.distributed``; its ``nn`` has gradients).
COLLECTIVES = _GATHERS | frozenset(
    "all_gather all_gather_into_tensor all_gather_single all_gather_coalesced all_reduce all_reduce_coalesced "
    "broadcast distributed.scatter reduce_scatter reduce_scatter_tensor reduce_scatter_single all_to_all "
    "all_to_all_single".split()
)
# What has the name of a function of torch itself, which does something else.
_OF_DISTRIBUTED = frozenset({"gather", "scatter"})
# What gives out nothing: the result is the first argument.
WRITES_FIRST = frozenset({"__setitem__", "__set__"})
# What writes into more than its first argument: fused optimizers into their state, a gradient scaler into its own.
SEVERAL = ("_fused_", "_amp_")
# With a rounding mode these are piecewise constant.
ROUNDING = frozenset({"div", "div_", "divide", "true_divide"})
_STATISTICS = frozenset({"batch_norm", "instance_norm"})
_MAY_WRITE = COLLECTIVES | _STATISTICS | {"embedding"}


@functools.lru_cache(maxsize=4096)
def is_in_place(name: str) -> bool:
    """Tell by a call's name whether it changes its first argument."""
    return (name[-1] == "_" and name[-2:] != "__") or name in IN_PLACE


@functools.lru_cache(maxsize=4096)
def may_write(name: str) -> bool:
    """Tell by a call's name whether its arguments have to be looked at."""
    return is_in_place(name) or name in _MAY_WRITE or name.startswith("fused_moving_avg")


def _takes_statistics(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether a normalisation uses the statistics of its input: only then it updates the running ones."""
    if len(args) > 5:
        return bool(args[5])
    return bool(kwargs.get("training", False) if name == "batch_norm" else kwargs.get("use_input_stats", True))


def asks_to_write(name: str, kwargs: dict[str, Any]) -> bool:
    """Tell by its keywords whether a call that else only computes may write."""
    updates = name == "batch_norm" and kwargs.get("training", True)
    return bool(updates or "out" in kwargs or kwargs.get("inplace"))


def writes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Return the tensors that a call is about to change in place."""
    written: list[Any] = []
    if not kwargs and not may_write(name):
        return []
    if name in _STATISTICS and not _takes_statistics(name, args, kwargs):
        return []
    if is_in_place(name) or kwargs.get("inplace") is True:
        written = _flattened(args if name.startswith(SEVERAL) else args[:1])
    elif name in COLLECTIVES:
        written = _flattened((*args, *kwargs.values())[1:2] if name in _GATHERS else args[:1])
    elif name in _STATISTICS:  # running mean and variance
        written = [*args[1:3], kwargs.get("running_mean"), kwargs.get("running_var")]
    elif name == "embedding" and (kwargs.get("max_norm") is not None or (len(args) > 3 and args[3] is not None)):
        written = [kwargs.get("weight"), *args[1:2]]
    elif name.startswith("fused_moving_avg"):
        written = list(args)
    if "out" in kwargs:
        written += kwargs["out"] if isinstance(kwargs["out"], (tuple, list)) else [kwargs["out"]]
    return [tensor for tensor in written if isinstance(tensor, torch.Tensor)]


def mutated(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Return the tensors that an operator is about to change in place by its schema (``mutates_args``)."""
    places = mutates(func) if isinstance(func, OPERATORS) else ()
    written = [args[number] if number < len(args) else kwargs.get(name) for number, name in places]
    return [tensor for tensor in _flattened(tuple(written)) if isinstance(tensor, torch.Tensor)]


@functools.lru_cache(maxsize=4096)
def mutates(operator: Any) -> tuple[tuple[int, str], ...]:
    """Return the number and the name of every argument that an operator changes."""
    if isinstance(operator, torch._ops.OpOverloadPacket):
        operator = getattr(operator, operator.overloads()[0])  # type: ignore[no-untyped-call]
    arguments = enumerate(operator._schema.arguments)
    return tuple((number, each.name) for number, each in arguments if each.alias_info and each.alias_info.is_write)


def overwrites(name: str, args: tuple[Any, ...]) -> bool:
    """Tell whether a call writes its first argument from end to end, whatever was there."""
    where = args[1] if name == "__setitem__" else Ellipsis
    return name in OVERWRITES and (where is Ellipsis or (isinstance(where, slice) and where == slice(None)))


def _flattened(args: tuple[Any, ...]) -> list[Any]:
    """Return what is in the lists among arguments, and the others: an optimizer changes all parameters in one call."""
    return [item for each in args for item in (each if isinstance(each, (list, tuple)) else [each])]


def with_graph(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of ``torch.autograd.grad`` that ask for a graph of the derivative, and keep the one behind."""
    return {**kwargs, "create_graph": True, "retain_graph": None}


def made_by(name: str, args: tuple[Any, ...], result: Any, written: list[torch.Tensor]) -> Any:
    """Return what a call gives out: what it has written where it returns nothing.

    Of an optimizer's step over lists of tensors that is nothing: each of them depends on its own arguments only.
    """
    if name in WRITES_FIRST:
        return args[0]
    if name.startswith("_foreach_") and is_in_place(name):
        return None
    return written if result is None or name in COLLECTIVES else result


def operation_name(func: Any) -> str | None:
    """Return the name of a call that moves numbers, or None for one that does not."""
    try:
        return _NAMES[func]
    except (KeyError, TypeError):  # not met before, or not hashable
        name = _name_of(func)
    if is_lasting(func):
        _NAMES[func] = name
    return name


def is_lasting(func: Any) -> bool:
    """Tell a function that exists once however often it is called; one made in a function does not."""
    return isinstance(func, _LASTING) or "<" not in getattr(func, "__qualname__", "<")


_NAMES: dict[Any, str | None] = {}
# The types of torch's own functions.
_LASTING = (BuiltinFunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType)
# And of its operators, which have a schema.
OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)


def _name_of(func: Any) -> str | None:
    if isinstance(func, torch._ops.OpOverload):
        return str(func.overloadpacket.__name__)
    name = getattr(func, "__name__", None) or type(func).__name__
    if name in _OF_DISTRIBUTED and (getattr(func, "__module__", None) or "").startswith("torch.distributed"):
        return f"distributed.{name}"
    if name in ("__get__", "__set__"):
        owner = getattr(func, "__self__", None)  # of C, or a property, which has a name from Python 3.13 on
        attribute = getattr(owner, "__name__", "") or getattr(getattr(owner, "fget", None), "__name__", "")
        if name == "__set__":
            return name if attribute == "data" else None
        return attribute if attribute in DATA_PROPERTIES or attribute == CUDA_ARRAY else None
    return None if name in SHAPE_ONLY or meaning_of(func) is not None else str(name)


def instead_of(name: str, args: tuple[Any, ...]) -> torch.Tensor:
    """Return what a call among ``REPLACEABLE`` gives where it is taken away: its input, and of a copy one connected."""
    given = args[REPLACEABLE[name]]
    connected = torch.ops.aten.clone if name == "__deepcopy__" else torch.ops.aten.alias
    result: torch.Tensor = connected.default(given)
    return result
