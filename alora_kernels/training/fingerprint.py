"""A fingerprint of the base model, so that a prefix is never reused with other weights.

Every call reads every byte of the weights. Optimizers, `.data`, numpy, DLPack and swapped storages
can change weights without a trace, so nothing is remembered from one call to the next.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .checksum import checksums
from .guard import is_adapter, text_config, unwrap

# Attributes of modules that do not change what a module computes.
_STATES = ("training", "gradient_checkpointing")


def fingerprint(model: nn.Module, extra: str = "") -> str:
    """A hex string that changes if a weight or a setting changes.

    If the weights are sharded, every rank must call this function; each reads its own shards.

    Raises:
        ValueError: a weight is on the meta device, and its bytes are not known.
    """
    names, tensors = [], []
    for name, tensor in base_tensors(model):
        names.append(f"{name}{tuple(tensor.shape)}{tensor.dtype}")
        tensors.append(tensor)
    text = json.dumps([*zip(names, checksums(tensors)), settings(model, extra)])
    name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    if is_sharded(model):
        names = [""] * dist.get_world_size()
        dist.all_gather_object(names, name)
        name = hashlib.blake2b("".join(names).encode(), digest_size=16).hexdigest()
    return name


# ---------------------------------------------------------------------- weights


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the base model: parameters, buffers, plain attributes, and the state that
    quantised weights have beside their packed values. Under FSDP2, this rank's shards."""
    seen: set[int] = set()
    for path, module in unwrap(model).named_modules():
        lead = f"{path}." if path else ""
        if is_adapter(lead):
            continue
        own: dict[str, Any] = {**module._parameters, **module._buffers}
        for name, value in own.items():
            if value is not None and id(value) not in seen and not is_adapter(lead + name):
                seen.add(id(value))
                yield from _parts(lead + name, _known(module, name, value))
        if isinstance(module, BaseTunerLayer):
            continue  # its other attributes belong to the adapters
        for name, value in vars(module).items():
            if not name.startswith(("_", "alora_")):
                yield from _kept(lead + name, value, seen)


def _known(module: nn.Module, name: str, value: Tensor) -> Tensor:
    """The tensor itself, or the copy that Hugging Face's accelerate keeps of an offloaded one."""
    if not value.is_meta:
        return value
    weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    if weights is None:
        raise ValueError(
            f"PrefixStore: {name} of a {type(module).__name__} lies on the meta device, so whether "
            "it has changed cannot be seen; use prefix='no_grad', or load the model onto a device"
        )
    return weights[name]


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a tensor consists of, and those among its attributes."""
    if hasattr(tensor, "to_local"):
        yield from _parts(name, tensor.to_local())
        return
    if hasattr(tensor, "__tensor_flatten__"):
        for inner in tensor.__tensor_flatten__()[0]:
            yield from _parts(f"{name}.{inner}", getattr(tensor, inner))
        return
    yield name, tensor.detach()
    for key, value in getattr(tensor, "__dict__", {}).items():
        if not key.startswith("_"):
            yield from _kept(f"{name}.{key}", value, set())


def _kept(name: str, value: Any, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The tensors in an attribute: a tensor, a dict or list of tensors, a quantiser's state."""
    inside: dict[Any, Any] = {}
    if id(value) in seen:
        return
    if isinstance(value, Tensor):
        if not value.is_meta:
            seen.add(id(value))
            yield from _parts(name, value)
    elif isinstance(value, Mapping):
        inside = dict(value)
    elif isinstance(value, list | tuple):
        inside = dict(enumerate(value))
    elif type(value).__name__ == "QuantState":  # bitsandbytes with 4 bits
        inside = vars(value)
    elif type(value).__name__ == "MatmulLtState":  # 8 bits; its other fields belong to one call
        inside = {key: getattr(value, key, None) for key in ("CB", "SCB", "CxB")}
    if inside:
        seen.add(id(value))
    for key, inner in inside.items():
        yield from _kept(f"{name}.{key}", inner, seen)


def is_sharded(model: nn.Module) -> bool:
    """Whether every pass is a collective operation (FSDP2, tensor parallelism)."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    return dist.is_initialized() and (
        any(isinstance(m, FSDPModule) for m in model.modules())
        or any(isinstance(p, DTensor) for p in model.parameters())
    )


# ---------------------------------------------------------------------- settings


def settings(model: nn.Module, extra: str = "") -> str:
    """Everything except the weights that decides keys and values, as text."""
    import transformers

    peft = unwrap(model)
    base = peft.get_base_model()
    kinds = [p.device.type for p in peft.parameters() if not p.is_meta]  # offloaded ones are meta
    device = kinds[0] if kinds else "cpu"
    autocast = torch.is_autocast_enabled(device) and str(torch.get_autocast_dtype(device))
    return json.dumps(
        [
            base.config.to_dict(),
            str(getattr(text_config(model), "_attn_implementation", None)),
            str(getattr(base.config, "quantization_config", None)),
            str(autocast),
            device,
            _arithmetic(),
            list(_modules(base)),
            torch.__version__,
            transformers.__version__,
            extra,
        ],
        sort_keys=True,
        default=str,
    )


def _arithmetic() -> list[Any]:
    """torch's switches that change how matrix products and attention are computed."""
    cuda = torch.backends.cuda
    return [
        torch.get_float32_matmul_precision(),
        cuda.matmul.allow_tf32,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cudnn.allow_tf32,
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    ]


def _modules(base: nn.Module) -> Iterator[list[Any]]:
    """Each module's class, and its attributes that are numbers or strings (an epsilon, a scale).

    Code that others put into a model is not covered. `foreign` finds it, and then no prefix is
    kept.
    """
    for path, module in base.named_modules():
        if any(part.startswith("lora_") for part in path.split(".")):
            continue
        plain = [
            (name, value)
            for name, value in vars(module).items()
            if isinstance(value, bool | int | float | str)
            and name not in _STATES
            and not name.startswith(("_", "alora_"))
        ]
        forward = module.__dict__.get("forward")
        yield [
            path,
            type(module).__name__,
            sorted(plain),
            getattr(forward, "__qualname__", type(forward).__name__),
        ]
