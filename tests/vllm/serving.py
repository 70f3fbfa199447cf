"""A tiny model with a tokenizer, adapters beside it, and a real server on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "examples" / "data" / "chat_template.jinja"
BLOCK = 32
INVOCATION = "<start_of_turn>judge\n"
RANK = 8


def make_model(folder: Path) -> Path:
    """The tiny model of the examples."""
    from tiny_model import make_tiny_model

    return make_tiny_model(folder)


def make_adapter(
    model: Path,
    folder: Path,
    invocation: str | None,
    *,
    rank: int = RANK,
    seed: int = 0,
    **more: Any,
) -> Path:
    """An adapter with random B, saved by PEFT; an aLoRA if it has an invocation."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = None
    if invocation is not None:
        tokens = AutoTokenizer.from_pretrained(model).encode(invocation, add_special_tokens=False)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, alora_invocation_tokens=tokens,
        **{"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], **more},
    )  # fmt: skip
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    torch.manual_seed(100 + seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    made.save_pretrained(folder)
    return folder


@dataclass
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def client(self) -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def post(self, path: str, **body: Any) -> tuple[int, str]:
        """Status and text of a POST, whatever the status is."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        """The sum of a Prometheus counter over its labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        found = [
            float(x.rpartition(" ")[2]) for x in lines if x.startswith((name + "{", name + " "))
        ]
        assert found, f"no metric {name}"
        return sum(found)

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False


@contextlib.contextmanager
def serve(
    model: Path, log: Path, adapters: dict[str, Path], *options: str, parallel: int = 1
) -> Iterator[Server]:
    """vLLM's OpenAI server on a free port of loopback; ended with all of its processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cores = sorted(os.sched_getaffinity(0))
    # One core for each worker: threads that wait for each other on a busy machine wait long.
    bind = "|".join(str(cores[i % len(cores)]) for i in range(parallel))
    env = {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": bind,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--max-model-len", "1024", "--block-size", str(BLOCK),
        "--enable-prefix-caching", "--enable-lora", "--max-lora-rank", str(RANK),
        "--max-loras", "4", "--chat-template", str(TEMPLATE), "--enable-prompt-tokens-details",
        "--tensor-parallel-size", str(parallel), *options,
    ]  # fmt: skip
    if adapters:
        command += ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=env, start_new_session=True, cwd=log.parent
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        deadline = time.monotonic() + 300
        while not server.healthy():
            tail = log.read_text(errors="replace")[-3000:]
            assert process.poll() is None, f"the server ended:\n{tail}"
            assert time.monotonic() < deadline, f"the server did not start:\n{tail}"
            time.sleep(0.5)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
