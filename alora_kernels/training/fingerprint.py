"""A fingerprint of the base model: prefixes computed by other weights must not be found again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .guard import is_adapter, text_config, unwrap

_SAMPLES = 64  # elements of each tensor that every step looks at


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of the base model (this rank's shard under FSDP2)."""
    peft = unwrap(model)
    for named in (peft.named_parameters(), peft.named_buffers()):
        for name, tensor in named:
            if not is_adapter(name):
                local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                yield name, local.detach()


def settings(model: nn.Module, extra: str = "") -> str:
    """What beside the weights decides keys and values, as text."""
    import transformers

    config = text_config(model)
    device = next(unwrap(model).parameters()).device.type
    autocast = torch.is_autocast_enabled(device) and str(torch.get_autocast_dtype(device))
    quantised = getattr(unwrap(model).get_base_model().config, "quantization_config", None)
    return json.dumps(
        [
            config.to_dict(),
            str(getattr(config, "_attn_implementation", None)),
            str(quantised),
            str(autocast),
            device,
            transformers.__version__,
            extra,
        ],
        sort_keys=True,
        default=str,
    )


class Fingerprint:
    """Follows the base weights of a model and names their present content.

    Args:
        content: hash every byte (needed when prefixes outlive the process); otherwise 64
            elements of each tensor stand for it.
        always: look at every byte at every call, which finds any edit and costs a pass over the
            weights. Otherwise a call looks at addresses, version counters and the same 64
            elements, which finds every in-place operation, and an edit behind autograd's back
            (`p.data`, numpy) as far as it meets a sampled element.
    """

    def __init__(self, content: bool = False, always: bool = False) -> None:
        self.content = content or always
        self.always = always
        self._seen: Any = None
        self._views: dict[torch.dtype, list[Tensor]] = {}
        self._identity: Any = None
        self._name = ""

    def __call__(self, model: nn.Module, extra: str = "") -> str:
        """A hex name that changes when the weights or the settings change."""
        seen = (*self._look(model), settings(model, extra))
        if seen != self._seen or self.always:
            self._seen = seen
            digest = hashlib.blake2b(seen[2].encode(), digest_size=16)
            if self.content:
                for name, tensor in base_tensors(model):
                    digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
                    digest.update(_bytes(tensor))
            else:
                # Versions and addresses take part: an edit between the samples is a change too.
                digest.update(repr(seen[0]).encode())
                digest.update(seen[1])
            self._name = digest.hexdigest()
        return self._name

    def _look(self, model: nn.Module) -> tuple[Any, bytes]:
        tensors = [t for _, t in base_tensors(model)]
        identity = [(t.data_ptr(), t.dtype, tuple(t.shape), t.stride()) for t in tensors]
        versions = [t._version for t in tensors]
        if identity != self._identity:
            self._identity = identity
            self._views = {}
            for t in tensors:
                if t.numel():
                    flat = t.reshape(-1) if t.is_contiguous() else t.contiguous().reshape(-1)
                    step = max(t.numel() // _SAMPLES, 1)
                    self._views.setdefault(t.dtype, []).append(flat[::step][:_SAMPLES])
        sample = b"".join(_bytes(torch.cat(views)) for views in self._views.values())
        return (identity, versions), sample


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
