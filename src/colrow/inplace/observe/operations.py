"""What ATen's operations do with divided values, and where the model's code asks for them.

An operation shows every change of its input unless it selects (a maximum, a comparison, a
saturating activation). Only those named here are taken to show it; all others may hide it.
"""

from __future__ import annotations

import linecache
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def _names(*lists: str) -> frozenset[str]:
    return frozenset(name for names in lists for name in names.split())


# Element by element, and analytic, or with another derivative but never with none.
_ELEMENTWISE = """
add sub rsub mul div neg positive exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal pow
square tanh sigmoid silu gelu mish erf erfc erfinv sin cos tan asin acos atan sinh cosh asinh acosh
atanh atan2 softplus elu celu selu leaky_relu prelu _prelu_kernel log_sigmoid log_sigmoid_forward
addcmul addcdiv lerp abs xlogy hypot logaddexp logaddexp2 sinc lgamma digamma polar complex real
imag conj _conj view_as_complex view_as_real resolve_conj resolve_neg glu
"""

# Sums, products, norms.
_MIXING = """
sum mean var std var_mean std_mean norm linalg_vector_norm logsumexp logcumsumexp _softmax softmax
_log_softmax log_softmax _safe_softmax prod cumsum cumprod trace dot vdot mv mm bmm addmm baddbmm
addbmm addmv addr ger outer matmul linear einsum convolution _convolution mkldnn_convolution
_grouped_mm scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu
_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention
_scaled_dot_product_attention_math _scaled_dot_product_cudnn_attention native_layer_norm layer_norm
native_group_norm group_norm native_batch_norm _native_batch_norm_legit
_native_batch_norm_legit_no_training batch_norm _fused_rms_norm rms_norm avg_pool1d avg_pool2d
avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d mean_dim _fft_r2c _fft_c2c
_fft_c2r cdist _cdist_forward _linalg_solve_ex linalg_inv_ex linalg_solve_triangular
triangular_solve col2im im2col index_add scatter_add bilinear _euclidean_dist
"""

# Elements in other places.
_MOVING = """
view _unsafe_view reshape _reshape_alias alias transpose t permute slice select expand unsqueeze
squeeze cat stack split split_with_sizes chunk unbind narrow index_select gather index
_unsafe_index take embedding clone copy detach contiguous _to_copy constant_pad_nd reflection_pad1d
reflection_pad2d replication_pad1d replication_pad2d flip roll repeat as_strided unfold diagonal
tril triu movedim swapaxes flatten unflatten fill zero index_put _unsafe_index_put index_copy
scatter slice_scatter select_scatter slice_backward lift_fresh lift pixel_shuffle pixel_unshuffle
native_dropout dropout upsample_nearest1d upsample_nearest2d set
"""

_SHOWING = _names(_ELEMENTWISE, _MIXING, _MOVING)

# Of a tensor's shape and dtype alone.
_SHAPE_ONLY = _names("""
zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones
new_empty new_full new_empty_strided empty_strided sym_size sym_numel sym_stride
sym_storage_offset is_pinned is_same_size
""")

# With truth values as results, element by element.
_TRUTH = _names("""
eq ne lt le gt ge isnan isinf isfinite isposinf isneginf signbit logical_and logical_or
logical_xor logical_not bitwise_and bitwise_or bitwise_xor bitwise_not __and__ __or__ __xor__
_to_copy
""")

# With sizes of results that depend on the values of these arguments, by their place.
_SIZING = {"index": 1, "masked_select": 1, "repeat_interleave": 0, "nonzero": 0}


def name_of(operation: Any) -> str:
    """An operation's name without its namespace, its overload, and the mark of writing."""
    name: str = operation.name().partition("::")[2].partition(".")[0]
    return name if name.endswith("__") else name.rstrip("_")


def shows(operation: Any) -> bool:
    """Whether any change of its input changes the result."""
    name = name_of(operation)
    if name == "div" and "mode" in operation.name():
        return False
    return bool(operation.name().startswith("aten::")) and name in _SHOWING


def uses_shape_only(operation: Any) -> bool:
    """Whether its result depends on no values."""
    return name_of(operation) in _SHAPE_ONLY


def overwrites(operation: Any) -> bool:
    """Whether it writes into its first argument, whatever that held."""
    return operation.name().startswith("aten::") and name_of(operation) in ("copy", "fill", "zero")


def reads_no_values(operation: Any) -> bool:
    """Whether its result is a view of its input's memory, or depends on no values."""
    return bool(operation.is_view) or name_of(operation) == "detach" or uses_shape_only(operation)


def gives_truth(operation: Any) -> bool:
    """Whether it gives a truth value for each element, if its result is one."""
    return name_of(operation) in _TRUTH


def is_elementwise(operation: Any) -> bool:
    """Whether each element of the result comes from the elements in the same place."""
    return torch.Tag.pointwise in getattr(operation, "tags", ()) or name_of(operation) in {
        "clone",
        "detach",
        "_to_copy",
        "alias",
    }


def reads(operation: Any) -> bool:
    """Whether it makes a Python number of a tensor, or asserts something of it."""
    tags = getattr(operation, "tags", ())
    return torch.Tag.data_dependent_output in tags or "assert" in name_of(operation)


def sizing(operation: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """The arguments whose values decide the shape of the result."""
    if torch.Tag.dynamic_output_shape not in getattr(operation, "tags", ()):
        return []
    place = _SIZING.get(name_of(operation))
    if place is None:
        return [x for x in args if isinstance(x, Tensor)]
    if len(args) <= place:
        return []
    given = args[place]
    if isinstance(given, Tensor):
        return [given]
    return [
        x for x in given or [] if isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)
    ]


# Attributes and methods of tensors that tell nothing of their values.
_ABOUT = _names("""
dim ndimension size stride numel nelement element_size data_ptr get_device storage_offset type
untyped_storage storage __hash__ register_hook requires_grad_ retain_grad
register_post_accumulate_grad_hook __set__ __setitem__ __delattr__ __dlpack_device__ can_cast
result_type promote_types backward dense_dim sparse_dim sym_size has_torch_function itemsize
nbytes broadcast_shapes _assert_async
""")

_SIZES = frozenset({"size", "numel", "nelement", "__len__"})
COPIES = frozenset({"tensor", "as_tensor", "asarray", "new_tensor", "__deepcopy__"})


def tells_values(function: Any) -> bool:
    """Whether a function of tensors that gives none tells something of their values."""
    name = getattr(function, "__name__", "")
    if name == "__get__" or name.startswith(("is_", "has_", "_is_", "_has_")):
        return False
    return name not in _ABOUT | {"__len__", "__iter__"}


def tells_size(function: Any) -> bool:
    """Whether it tells how many elements there are."""
    name = getattr(function, "__name__", "")
    return name in _SIZES or function == Tensor.shape.__get__  # type: ignore[attr-defined]


BACKWARD = "watched_gradients"
"""The function in which a watched backward pass runs."""

_OWN = (str(Path(torch.__file__).parent), str(Path(__file__).parents[2]), "<frozen", "<string>")


def place_in_code() -> str:
    """File, line and text of the code of the model that runs now, in parentheses.

    Of a backward pass nothing, unless the model's own code runs in it.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_OWN):
        if frame.f_code.co_name == BACKWARD:
            return ""
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return ""
    path, line = frame.f_code.co_filename, frame.f_lineno
    code = linecache.getline(path, line).strip()
    return f" ({Path(path).name}:{line}{f': {code[:80]}' if code else ''})"
