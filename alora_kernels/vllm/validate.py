"""Touched place: a bad adapter is refused before any worker opens it.

vLLM hands the path of an adapter to its workers. If one of several workers fails on it (tensor
parallelism), the whole engine dies, and with it the requests of every user. So the process that
talks to clients examines the folder first: the path, the configuration, the rank, and the names,
types and shapes of all tensors against the base model's layers. It reads no weights. The verdict is
kept until one of the adapter's files changes.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from .patch import Touch, wrap

logger = logging.getLogger("alora_kernels.vllm")

_WHY = "a bad adapter folder must not reach the workers: under tensor parallelism they die of it"
LOADING = Touch(
    "vllm.entrypoints.openai.models.serving.OpenAIServingModels._check_load_lora_adapter_request",
    "(self, request)",
    _WHY,
)
ASYNC = Touch("vllm.v1.engine.async_llm.AsyncLLM.add_lora", "(self, lora_request)", _WHY)
OFFLINE = Touch("vllm.v1.engine.llm_engine.LLMEngine.add_lora", "(self, lora_request)", _WHY)
REQUEST = Touch(
    "vllm.v1.engine.input_processor.InputProcessor._validate_lora", "(self, lora_request)", _WHY
)
TOUCHED: tuple[Touch, ...] = (LOADING, ASYNC, OFFLINE, REQUEST)

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
OTHER_TENSORS = ("adapter_model.bin", "adapter_model.pt")


class BadAdapter(ValueError):
    """The folder holds no adapter that this engine can load."""

    def __init__(self, message: str, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing  # there is nothing, rather than something wrong


def install() -> None:
    """Puts the check in front of the four ways in which an adapter reaches the engine."""
    wrap(LOADING, _checked_loading)
    wrap(ASYNC, _checked_async)
    wrap(OFFLINE, _checked_offline)
    wrap(REQUEST, _checked_request)


def check(path: str, lora_config: Any, model_config: Any) -> None:
    """Raises BadAdapter unless the workers can load the adapter at `path`.

    Args:
        path: a folder, or the name of a hub repository, which is then fetched as the workers do.
        lora_config, model_config: vLLM's.
    """
    folder = _folder(path)
    files = tuple(
        (name, os.stat(os.path.join(folder, name)).st_mtime_ns)
        for name in (CONFIG, TENSORS, *OTHER_TENSORS)
        if os.path.isfile(os.path.join(folder, name))
    )
    problem = _problem(folder, files, _By(lora_config), _By(model_config))
    if problem is not None:
        raise BadAdapter(*problem)


class _By:
    """Compares a value by identity, as a key of a cache. The cache keeps the value alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _By) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _folder(path: str) -> str:
    from vllm.lora.utils import get_adapter_absolute_path

    try:
        folder = get_adapter_absolute_path(path)
    except Exception as error:  # no network, a gated or unknown repository
        raise BadAdapter(f"no folder {path}, and the hub says: {error}", missing=True) from error
    if not os.path.isdir(folder):
        raise BadAdapter(f"{folder} is not a folder", missing=True)
    return folder


@functools.lru_cache(maxsize=256)
def _problem(
    folder: str, files: tuple[tuple[str, int], ...], lora_config: _By, model_config: _By
) -> tuple[str, bool] | None:
    try:
        _examine(folder, [name for name, _ in files], lora_config.value, model_config.value)
    except BadAdapter as error:
        return str(error), error.missing
    return None


def _examine(folder: str, files: list[str], lora_config: Any, model_config: Any) -> None:
    from vllm.lora.peft_helper import PEFTHelper

    if CONFIG not in files:
        raise BadAdapter(f"{folder} holds no {CONFIG}", missing=True)
    try:
        with open(os.path.join(folder, CONFIG), encoding="utf-8") as file:
            config = json.load(file)
        if not isinstance(config, dict):
            raise ValueError("expected a JSON object")
        if type(config.get("r")) is not int:
            raise ValueError(f"expected a whole number as rank r, got {config.get('r')!r}")
        helper = PEFTHelper.from_local_dir(folder, None)
        helper.validate_legal(lora_config)
    except Exception as error:
        # The server shows "<path>" in place of a path, so the file is named apart from its folder.
        raise BadAdapter(f"{CONFIG} of {folder}: {error}") from error
    if TENSORS in files:
        shapes = _shapes(os.path.join(folder, TENSORS))
        _examine_tensors(folder, shapes, helper, _layers(_By(model_config)))
    elif not any(name in files for name in OTHER_TENSORS):
        raise BadAdapter(f"{folder} holds no {TENSORS}")
    else:
        _examine_pickle(folder, files, helper, model_config)


def _shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, read from the file's header."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        folder, name = os.path.split(path)
        raise BadAdapter(
            f"{name} of {folder} is not a readable safetensors file: {error}"
        ) from error


def _examine_pickle(folder: str, files: list[str], helper: Any, model_config: Any) -> None:
    """Older adapters are in torch's format. It has no header, so the file itself is opened."""
    import torch

    path = os.path.join(folder, next(name for name in OTHER_TENSORS if name in files))
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    except Exception as error:
        name = os.path.basename(path)
        raise BadAdapter(
            f"{name} of {folder} is not a readable file of tensors: {error}"
        ) from error
    _examine_tensors(folder, shapes, helper, _layers(_By(model_config)))


def _examine_tensors(
    folder: str,
    shapes: dict[str, tuple[int, ...]],
    helper: Any,
    layers: dict[str, tuple[int, int]],
) -> None:
    """Check that every A has its B, of the configured rank, and that both fit their layer."""
    from vllm.lora.utils import is_base_embedding_weights, parse_fine_tuned_lora_name

    if not shapes:
        raise BadAdapter(f"{folder} holds no tensors")
    saved = set(helper.modules_to_save or ())
    kinds = {name.rpartition(".")[2] for name in layers}
    pairs: dict[str, dict[bool, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if is_base_embedding_weights(name):
            continue
        try:
            module, is_a = parse_fine_tuned_lora_name(name)
        except ValueError as error:
            raise BadAdapter(f"{folder}: {error}") from error
        if module not in saved:
            pairs.setdefault(module, {})[is_a] = shape
    for module, pair in pairs.items():
        if len(pair) != 2:
            raise BadAdapter(f"{folder}: {module} has lora_{'A' if True in pair else 'B'} alone")
        a, b = pair[True], pair[False]
        if ".experts" in module:  # fused experts stack their matrices in more than one way
            continue
        rank = helper.get_rank_and_scaling(module)[0]
        if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            raise BadAdapter(
                f"{folder}: {module} has lora_A {list(a)} and lora_B {list(b)}; expected "
                f"[{rank}, in_features] and [out_features, {rank}], as {CONFIG} says r={rank}"
            )
        if layers and module.rpartition(".")[2] not in kinds:
            raise BadAdapter(f"{folder}: vLLM adapts no layer like {module} in this model")
        wanted = layers.get(module)
        if wanted is not None and (b[0], a[1]) != wanted:
            raise BadAdapter(
                f"{folder}: {module} has lora_A {list(a)} and lora_B {list(b)}, but the base "
                f"model's layer is [{wanted[0]}, {wanted[1]}]: another model's adapter?"
            )


@functools.lru_cache(maxsize=4)
def _layers(model_config: _By) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every layer of the base model, by PEFT's name for it.

    They come from the model's class in transformers, built without memory. If there is no such
    class, the result is empty, and shapes are compared with the configuration alone. Multimodal
    checkpoints name their layers in several ways. A name that is not in the result is compared by
    its last component only, as vLLM does.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config.value.hf_config)
    except Exception as error:
        logger.info("adapters are checked without the base model's shapes: %s", error)
        return {}
    looked_up = _embeddings(model_config.value)
    layers = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
            continue
        ends = module in (model.get_input_embeddings(), model.get_output_embeddings())
        if ends and name.rpartition(".")[2] not in looked_up:
            continue
        out, into = weight.shape
        # GPT-2's Conv1D keeps its weight transposed. An embedding looks up its rows in A.
        turned = type(module).__name__ == "Conv1D" or module is model.get_input_embeddings()
        layers[name] = (into, out) if turned else (out, into)
    return layers


def _embeddings(model_config: Any) -> set[str]:
    """The input and output embeddings that vLLM's class of this model can adapt, by name."""
    from vllm.model_executor.model_loader import get_model_architecture

    return set(getattr(get_model_architecture(model_config)[0], "embedding_modules", None) or ())


def _checked_loading(function: Callable[..., Any]) -> Callable[..., Any]:
    async def _check_load_lora_adapter_request(self: Any, request: Any) -> Any:
        refused = await function(self, request)
        config = self.engine_client.vllm_config
        if refused is not None or config.lora_config is None:
            return refused
        from vllm.entrypoints.serve import create_error_response

        try:
            # This may fetch a repository, so it must not block the loop that answers everybody.
            await asyncio.to_thread(
                check, request.lora_path, config.lora_config, config.model_config
            )
        except BadAdapter as error:
            return create_error_response(
                message=f"Loading lora {request.lora_name} failed: {error}",
                err_type="NotFoundError" if error.missing else "BadRequestError",
                status_code=HTTPStatus.NOT_FOUND if error.missing else HTTPStatus.BAD_REQUEST,
            )
        return None

    return _check_load_lora_adapter_request


def _checked_async(function: Callable[..., Any]) -> Callable[..., Any]:
    async def add_lora(self: Any, lora_request: Any) -> bool:
        await asyncio.to_thread(_check_request, lora_request, self.vllm_config)
        return await function(self, lora_request)

    return add_lora


def _checked_offline(function: Callable[..., Any]) -> Callable[..., Any]:
    def add_lora(self: Any, lora_request: Any) -> bool:
        _check_request(lora_request, self.vllm_config)
        return function(self, lora_request)

    return add_lora


def _checked_request(function: Callable[..., Any]) -> Callable[..., Any]:
    def _validate_lora(self: Any, lora_request: Any) -> None:
        function(self, lora_request)
        if lora_request is None:
            return
        # Checked once: as in vLLM, a loaded adapter still works when its folder is removed.
        known = self.__dict__.setdefault("_alora_accepted", set())
        key = (lora_request.lora_int_id, lora_request.lora_name, lora_request.lora_path)
        if key not in known or lora_request.load_inplace:
            _check_request(lora_request, self.vllm_config)
            known.add(key)

    return _validate_lora


def _check_request(lora_request: Any, vllm_config: Any) -> None:
    """Runs `check`, and turns BadAdapter into the error that vLLM reports to the client."""
    if vllm_config.lora_config is None:
        return
    from vllm.exceptions import VLLMValidationError

    try:
        check(lora_request.lora_path, vllm_config.lora_config, vllm_config.model_config)
    except BadAdapter as error:
        raise VLLMValidationError(
            f"Loading lora {lora_request.lora_name} failed: {error}", parameter="lora_path"
        ) from error
