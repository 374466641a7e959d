"""What torch's calls do to a gradient, by name: the vocabulary of ``values.py``.

Source: torch's derivatives (``tools/autograd/derivatives.yaml`` marks these outputs non-differentiable)
and the tensor methods that return no tensor.
"""

from __future__ import annotations

import re

# The result holds indices, truth values or integers: no gradient can pass, whatever the mode.
INDEX_VALUED = frozenset(
    "argmax argmin argsort nonzero multinomial bincount bucketize searchsorted one_hot randint randperm isnan isinf "
    "isfinite isin eq ne lt le gt ge equal allclose any all logical_and logical_or logical_not logical_xor "
    "long int bool short byte linear_sum_assignment count_nonzero histc nms batched_nms box_iou unique "
    "unique_consecutive greater less greater_equal less_equal".split()
)
INTEGER_TYPES = frozenset(
    f"torch.{name}" for name in "bool uint8 int8 int16 int32 int64 short int long LongTensor IntTensor".split()
)
# The gradient exists and is zero.
PIECEWISE_CONSTANT = frozenset(["round", "floor", "ceil", "trunc", "sign", "sgn", "frac_", "bernoulli"])
# A new tensor that takes shape, dtype or device of another and none of its numbers.
SHAPE_ONLY = frozenset(
    "zeros ones full empty rand randn arange linspace eye zeros_like ones_like empty_like full_like rand_like "
    "randn_like new_zeros new_ones new_empty new_full tril_indices triu_indices meshgrid is_tensor get_device "
    "manual_seed Generator device finfo iinfo".split()
)
# What gives a sequence of tensors of several lengths, which has its numbers under ``data``.
PACKING = frozenset(["pack_padded_sequence", "pack_sequence", "PackedSequence"])
# Methods that take the dtype, device or shape of another tensor and none of its numbers.
LIKE_ANOTHER = frozenset("to type_as view_as expand_as reshape_as".split())
# Methods by which no model is run: those of tensors, and a module's own.
RUN_NOTHING = frozenset(
    "to cuda cpu float double half bfloat16 type view view_as reshape flatten permute transpose t unsqueeze squeeze "
    "repeat expand clone contiguous detach sum mean std var min max amax amin norm pow sqrt exp log abs clamp chunk "
    "split unbind gather index_select masked_fill softmax log_softmax sigmoid tanh matmul mm bmm dot add sub mul div "
    "item numpy tolist backward requires_grad_ argmax argmin round floor long int bool size dim new_tensor "
    "type_as parameters named_parameters modules named_modules children buffers state_dict load_state_dict eval train "
    "zero_grad step".split()
)
# Derivatives, which are constants to autograd unless create_graph says otherwise.
DERIVATIVES = frozenset(
    [
        "torch.autograd.grad",
        *(f"torch.autograd.functional.{name}" for name in "jacobian hessian vjp jvp vhp hvp".split()),
    ]
)
# What these make of a tensor is an array: they take none that requires a gradient.
ARRAY_LIBRARIES = ("numpy.", "cv2.", "scipy.")
# Methods and attributes that answer with plain Python.
PLAIN_METHODS = frozenset(
    "size dim numel stride ndimension element_size nelement is_contiguous is_floating_point is_complex data_ptr "
    "storage_offset type_as_ get_device is_inference keys format join split strip lower upper startswith endswith "
    "append extend pop update setdefault".split()
)
PLAIN_ATTRIBUTES = frozenset(
    "shape dtype device ndim requires_grad is_cuda grad_fn layout names itemsize nbytes is_leaf training config".split()
)
PLAIN_FUNCTIONS = frozenset(
    "len isinstance hasattr print range type id str repr bool callable issubclass enumerate_ open format "
    "vars dir hash super".split()
)
WEIGHTS = frozenset("weight bias in_proj_weight in_proj_bias out_proj_weight running_mean running_var grad".split())
# Where settings are kept, and no tensors.
SETTINGS = frozenset("config cfg conf args opt opts hparams flags FLAGS params settings".split())
# Modules of torch.nn that hold no parameter, whatever they are made with.
_WEIGHTLESS = re.compile(
    r"Identity|(?:Unf|F)latten|(?:Unf|F)old|Upsampl(?:e|ing\w+)|\w+Shuffle|\w*Unshuffle|\w*(?:Pool|Unpool|Pad)\dd|"
    r"\w*Dropout(?:\dd)?|(?:Leaky|R|)ReLU6?|[CSG]?ELU|GLU|SiLU|Mish|(?:Log)?Sigmoid|Tanh(?:shrink)?|Soft\w+|LogSoftmax|"
    r"Hard\w+|Threshold|CosineSimilarity|PairwiseDistance|LocalResponseNorm|(?!Linear|Adaptive)\w+Loss\w*"
)


def is_weightless(name: str) -> bool:
    """Tell whether a module of torch.nn holds no parameter: a pool, an activation, a loss."""
    return _WEIGHTLESS.fullmatch(name) is not None


# Methods that list what a module holds, and what that is.
LISTS = {
    **dict.fromkeys("parameters named_parameters buffers named_buffers get_parameters".split(), "tensor"),
    **dict.fromkeys("modules named_modules children named_children".split(), "module"),
}
# Own vocabulary of parameter names that hold integers, truth values or settings.
INTEGER_NAMES = (
    r"(?:^|_)(?:ids?|idx|index|indices|mask|masks|labels?|position|positions|pos|length|lengths|lens|size|sizes|shape|"
    r"shapes|num|nums|count|counts|dtype|device|config|name|names|path|seed|generator|dim|dims|axis|step|steps|timestep|"
    r"timesteps|t|offset|offsets|stride|grid|thw|targets?|verbose|kwargs|args|epoch|batch_idx|seqlens?|dict|info|"
    r"gts?|gt_\w+|ground_truths?|height|width|h|w|seq_len|length|cls|self|logger|optimizer|filename|image_sizes|spatial_shapes|start|end)$"
)
INTEGER_ANNOTATIONS = (
    r"Long|Int(?!er)|Bool|\bint\b|\bfloat\b|\bbool\b|\bstr\b|\bdtype\b|\bdevice\b|PretrainedConfig|Config\b|Path|dict"
)
