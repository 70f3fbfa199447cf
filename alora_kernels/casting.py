"""Casts of frozen tensors, made once per version of the tensor instead of once per call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# source tensor -> {dtype: (data_ptr, version, copy)}; an entry goes with its tensor.
_copies: WeakIdKeyDictionary = WeakIdKeyDictionary()


def cast_frozen(tensor: Tensor, dtype: torch.dtype, *, cache: bool = True) -> Tensor:
    """`tensor` in `dtype`, without a gradient.

    The copy is kept until the tensor is written in place, moved or freed. With `cache=False`
    (a tensor that an optimizer changes every step) nothing is kept.
    """
    if tensor.dtype == dtype:
        return tensor
    if torch.compiler.is_compiling() or not cache or tensor.is_inference():
        return tensor.detach().to(dtype)
    by_dtype = _copies.get(tensor)
    if by_dtype is None:
        by_dtype = _copies[tensor] = {}
    kept = by_dtype.get(dtype)
    key = (tensor.data_ptr(), tensor._version)
    if kept is None or kept[:2] != key:
        kept = by_dtype[dtype] = (*key, tensor.detach().to(dtype))
    return kept[2]
