"""Decides which adapters, models and layers this package serves, and says why it refuses others."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import ALoraLinearVariant
from torch import nn

from ..invocation import invocation_of
from .stream import CROSS, Stream

# Initialisations that change the base weights, after which the base model's cache is not valid.
REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")
OLD_KEYS = ("invocation_string", "alora_invocation_string")


def check_config(name: str, config: Any, unsuited: str | None = None) -> None:
    """Refuse an adapter whose results would be wrong without an error.

    Args:
        name: the adapter's name.
        config: a `LoraConfig`.
        unsuited: why the base model cannot run an activated LoRA (see `why_unsuited`), or None.

    Raises:
        ValueError: the message says which adapter, why, and what to do.
    """
    for key in OLD_KEYS:
        if getattr(config, key, None):
            raise ValueError(_old_format(f"adapter {name!r}", key))
    tokens = invocation_of(config)
    if tokens is None:
        return
    if not tokens:
        raise ValueError(
            f"adapter {name!r}: alora_invocation_tokens is empty, which PEFT runs as a plain LoRA "
            "on every token; give the token ids of the invocation, or None for a plain LoRA"
        )
    if any(isinstance(t, bool) or not isinstance(t, int) for t in tokens):
        raise ValueError(
            f"adapter {name!r}: alora_invocation_tokens must be a flat list of token ids, "
            f"got {tokens!r}"
        )
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(REWRITING):
        raise ValueError(
            f"adapter {name!r}: init_lora_weights={start!r} changes the base weights, so tokens "
            "before the invocation no longer run the base model and its KV cache cannot be "
            "shared; use True, 'gaussian' or 'eva'"
        )
    if unsuited is not None:
        raise ValueError(
            f"adapter {name!r}: an activated LoRA needs one sequence of tokens that attend to the "
            f"past alone; {unsuited}"
        )


def why_unsuited(root: nn.Module) -> str | None:
    """Why this model cannot run an activated LoRA, or None.

    If tokens attend to later tokens, the tokens before the invocation depend on the adapter.
    """
    kind = type(root).__name__
    config = getattr(root, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return (
            f"{kind} is an encoder-decoder model: the tokens of the encoder see the invocation "
            "before it is active"
        )
    ask = getattr(config, "get_text_config", None)
    text = ask() if callable(ask) else config
    if getattr(text, "model_type", None) == "blt":
        return f"{kind} runs most of its layers over patches of bytes, not over tokens"
    found = _bidirectional(root, text)
    if found is None:
        return None
    return f"the attention of {kind} is bidirectional ({found}): tokens before it see the adapter"


# Models whose tokens attend to later tokens although no flag says so.
BIDIRECTIONAL = {"xlnet": "its masks are given by perm_mask", "cpmant": "its prompt sees itself"}


def _bidirectional(root: nn.Module, config: Any) -> str | None:
    """What shows that the model's tokens attend to later tokens; None if nothing does."""
    if getattr(config, "is_causal", True) is False:
        return "config.is_causal=False"
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return f"config.use_bidirectional_attention={config.use_bidirectional_attention!r}"
    if getattr(config, "causal", True) is False:
        return "config.causal=False"
    if getattr(config, "model_type", None) in BIDIRECTIONAL:
        return BIDIRECTIONAL[config.model_type]
    flags = [
        (path, module.__dict__.get("is_decoder"), module.__dict__.get("is_causal"))
        for path, module in root.named_modules()
        if not CROSS.search(path)
    ]
    if not any(decoder is False or causal is False for _, decoder, causal in flags):
        return None
    stream = Stream(root)
    own = [flag for flag in flags if not stream.beside(flag[0])]
    decoders = {decoder for _, decoder, _ in own if decoder is not None}
    causals = {causal for _, _, causal in own if causal is not None}
    if decoders == {False} and getattr(config, "is_decoder", False) is False:
        return "config.is_decoder=False; set it to True to make it causal"
    if causals == {False} and True not in decoders:
        return "is_causal=False in its attention layers"
    return None


def check_adapter_folder(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read `adapter_config.json` in `folder`; refuse an adapter that PEFT would load wrongly.

    Returns the configuration. IBM's older aLoRA format names its invocation in
    `invocation_string`. PEFT drops that key without a word and would run the adapter on every
    token.

    Raises:
        ValueError: the adapter has the older format, or empty invocation tokens.
        FileNotFoundError: the folder has no configuration.
    """
    path = os.path.join(folder, "adapter_config.json")
    with open(path, encoding="utf-8") as file:
        config: Mapping[str, Any] = json.load(file)
    for key in OLD_KEYS:
        if config.get(key) and not config.get("alora_invocation_tokens"):
            raise ValueError(_old_format(path, key))
    if config.get("alora_invocation_tokens") == []:
        raise ValueError(f"{path}: alora_invocation_tokens is empty; it needs token ids")
    return dict(config)


def check_arriving(name: str, folder: Any, configs: Mapping[str, Any]) -> None:
    """Refuse the adapter in `folder` before it is loaded as `name` into a model with `configs`.

    If the model already has an adapter of that name, PEFT loads the new weights and keeps the old
    configuration, so the new adapter would run at the old invocation. A folder that is not on this
    machine (a name on the Hub) is not checked.

    Raises:
        ValueError: as `check_adapter_folder`; or the model's adapter of that name has another
            invocation.
    """
    if folder is None or not os.path.isfile(os.path.join(str(folder), "adapter_config.json")):
        return
    new = check_adapter_folder(str(folder)).get("alora_invocation_tokens")
    if name in configs and new != invocation_of(configs[name]):
        raise ValueError(
            f"adapter {name!r}: the one in {folder} has alora_invocation_tokens={new}, but the "
            f"model's adapter of that name has {invocation_of(configs[name])}, and its "
            "configuration would stay; load it under another name, or delete the old one first"
        )


def _old_format(where: str, key: str) -> str:
    return (
        f"{where}: {key!r} marks an adapter in the older aLoRA format, which PEFT runs on every "
        "token. It was trained to begin one token later, so it cannot run unchanged: retrain it, "
        "or set alora_invocation_tokens to the token ids of that string and measure its quality"
    )


# ---------------------------------------------------------------------- layers

# PEFT's layers over a quantised or foreign base. There the base runs its own forward, and only the
# adapter's part is ours.
FOREIGN = (
    "Linear4bit",
    "Linear8bitLt",
    "TorchaoLoraLinear",
    "HqqLoraLinear",
    "GPTQLoraLinear",
    "AwqLoraLinear",
    "EetqLoraLinear",
    "AqlmLoraLinear",
    "IncLoraLinear",
)


def why_not_served(layer: Any) -> str | None:
    """Why this LoRA layer keeps PEFT's forward, or None."""
    kind = getattr(type(layer), "alora_kind", type(layer))
    if not isinstance(layer, LoraLayer):
        return "it is not a LoRA layer"
    if kind is not LoraLinear and kind.__name__ not in FOREIGN:
        return f"lora.{kind.__name__} is not a linear layer"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance (a dispatch or offload hook)"
    if getattr(layer, "ephemeral_gpu_offload", False):
        return "ephemeral_gpu_offload moves its weights for every call"
    strange = strange_adapters(layer)
    if strange and len(strange) == len(layer.lora_A):
        return "; ".join(f"adapter {name!r}: {reason}" for name, reason in strange.items())
    return None


def strange_adapters(layer: Any) -> dict[str, str]:
    """The adapters of `layer` that keep PEFT's forward, each with the reason."""
    reasons = {name: why_not_adapter(layer, name) for name in layer.lora_A}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def why_not_adapter(layer: Any, name: str) -> str | None:
    """Why this adapter of `layer` keeps PEFT's forward, or None."""
    variant = layer.lora_variant.get(name)
    if variant is not None and not isinstance(variant, ALoraLinearVariant):
        return f"the variant {type(variant).__name__} is not LoRA"
    for part in (layer.lora_A[name], layer.lora_B[name]):
        if not isinstance(part, nn.Linear):
            return f"its weight is held by a {type(part).__name__}"
    drop = layer.lora_dropout[name]
    if not isinstance(drop, nn.Identity | nn.Dropout) or getattr(drop, "p", 0.0) >= 1.0:
        return f"its dropout is {drop}"
    return None
