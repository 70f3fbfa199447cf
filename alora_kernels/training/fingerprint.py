"""A fingerprint of the base model: prefixes computed by other weights must not be found again.

Nothing is remembered from one call to the next: optimizers, `.data`, numpy, DLPack and swapped
storages change weights without a trace, so every byte is looked at in every call.
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

# Attributes of modules that decide no value.
_STATES = ("training", "gradient_checkpointing")


def fingerprint(model: nn.Module, extra: str = "") -> str:
    """A hex name that changes when a weight or a setting changes.

    Where weights are sharded every rank has to call it: each looks at its own shards.

    Raises:
        ValueError: a weight lies on the meta device and nothing tells its bytes.
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
    """Every tensor of the base model: parameters, buffers, plain attributes, and what quantised
    weights keep beside their packed numbers (this rank's shard under FSDP2)."""
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
            continue  # what it keeps beside its base layer is the adapters'
        for name, value in vars(module).items():
            if not name.startswith(("_", "alora_")):
                yield from _kept(lead + name, value, seen)


def _known(module: nn.Module, name: str, value: Tensor) -> Tensor:
    """The tensor itself, or where accelerate keeps it while the module does not run."""
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
    """The plain tensors that a tensor consists of, and those that hang on it."""
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
    """Tensors in an attribute: itself, a dict or list of them, a quantiser's state."""
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
    elif type(value).__name__ == "QuantState":  # of bitsandbytes, 4 bits
        inside = vars(value)
    elif type(value).__name__ == "MatmulLtState":  # 8 bits; the rest of it belongs to one call
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
    """What beside the weights decides keys and values, as text."""
    import transformers

    peft = unwrap(model)
    base = peft.get_base_model()
    kinds = [p.device.type for p in peft.parameters() if not p.is_meta]  # meta: offloaded
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
    """torch's switches for how products and attention are computed."""
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
    """Each module's class, its numbers and words (an epsilon, a window, a scale).

    Code that others put into a model is not told here: no prefix is kept then (`foreign`).
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
