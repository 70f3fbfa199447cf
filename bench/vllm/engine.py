"""A vLLM engine in a process of its own, driven by lines of JSON.

vLLM has an environment of its own, and an engine with the plugin and one without it need two
processes. engine_process.py is the other end of the pipe.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROCESS = Path(__file__).with_name("engine_process.py")


@dataclass(frozen=True)
class Request:
    """Token ids, an adapter's name (None: the base model), and how many tokens to generate."""

    ids: list[int]
    adapter: str | None = None
    tokens: int = 1


@dataclass(frozen=True)
class Answer:
    """Seconds to the first token and to the end, prompt tokens from the cache, and token ids."""

    first: float
    total: float
    cached: int
    ids: list[int]


@dataclass(frozen=True)
class Served:
    """What an engine serves, and how. engine_process.py reads these fields."""

    model: str
    adapters: dict[str, str]  # folders by name
    rank: int
    targets: list[str]
    block_size: int
    max_len: int
    cores: list[int]
    clock: str


class Engine:
    """A running engine in the Python `python`. Its output goes to the file `log`."""

    def __init__(self, python: str, served: Served, log: Path, plugin: bool = True) -> None:
        env = {
            **os.environ,
            # One process, with one OpenMP thread on each core. vLLM's own binding needs a worker
            # process, and the engine would then poll that process on one of these few cores.
            "OMP_NUM_THREADS": str(len(served.cores)),
            "OMP_PLACES": ",".join(f"{{{core}}}" for core in served.cores),
            "OMP_PROC_BIND": "true",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        if not plugin:
            env["VLLM_PLUGINS"] = ""
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [python, str(PROCESS), json.dumps(asdict(served))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=env,
            )
        self.started: dict[str, Any] = self._receive()

    def ask(self, **message: Any) -> Any:
        """Send one message, and wait for its answer."""
        assert self.process.stdin is not None
        print(json.dumps(message), file=self.process.stdin, flush=True)
        return self._receive()["result"]

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        """Send all requests at once, and wait for their answers."""
        answers = self.ask(do="run", requests=[asdict(r) for r in requests])
        return [Answer(**a) for a in answers]

    def reset(self) -> None:
        """Forget every cached block."""
        if not self.ask(do="reset"):
            raise RuntimeError("the engine could not reset its prefix cache")

    def _receive(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text().splitlines()[-25:])
            raise RuntimeError(f"the engine ended (code {self.process.wait()}):\n{tail}")
        return json.loads(line)

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
