"""A real server on loopback, driven by the `openai` client."""

from __future__ import annotations

import concurrent.futures
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("openai")

import openai

from .bad_adapters import BAD, make_bad
from .serving import BLOCK, INVOCATION, Server, make_adapter, make_model, serve

pytestmark = pytest.mark.vllm

OTHER = "<start_of_turn>rewrite\n"
ADAPTERS = {"judge": INVOCATION, "rewrite": OTHER, "plain": None}
# Of each adapter, the folders that a server is asked to load under tensor parallelism as well.
DEADLY = ("no configuration", "cut safetensors", "too high a rank", "another model's sizes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its adapters; `plain` has the tensors of `judge`."""
    root = tmp_path_factory.mktemp("serving")
    make_model(root / "model")
    for name, invocation in ADAPTERS.items():
        make_adapter(root / "model", root / name, invocation, seed=name == "rewrite")
    return root


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    adapters = {name: folder / name for name in ADAPTERS}
    with serve(folder / "model", folder / "server.log", adapters) as running:
        yield running


def words(count: int) -> str:
    """Fresh text of `count` letters, a token each."""
    return "".join(random.SystemRandom().choices("abcdefghij klmnop", k=count - 1)) + "."


def complete(server: Server, model: str, prompt: str, **more: Any) -> Any:
    options = {"max_tokens": 8, "temperature": 0.0, **more}
    return server.client().completions.create(model=model, prompt=prompt, **options)


def cached(answer: Any) -> int:
    return answer.usage.prompt_tokens_details.cached_tokens or 0


def test_the_models_are_listed(server: Server) -> None:
    assert {m.id for m in server.client().models.list()} == {"base", *ADAPTERS}


def test_completions_take_the_base_models_blocks(server: Server) -> None:
    context = words(4 * BLOCK + 5)
    base = complete(server, "base", context)
    start = base.usage.prompt_tokens
    judged = complete(server, "judge", context + INVOCATION)
    assert cached(judged) == start // BLOCK * BLOCK
    assert cached(complete(server, "rewrite", context + OTHER)) == start // BLOCK * BLOCK
    assert cached(complete(server, "plain", context + INVOCATION)) == 0
    # The adapter is on: the base model says something else after the same prompt.
    again = complete(server, "base", context + INVOCATION)
    assert again.choices[0].text != judged.choices[0].text
    # What the cache held does not show in the answer.
    salted = complete(
        server, "judge", context + INVOCATION, extra_body={"cache_salt": "a key of its own"}
    )
    assert cached(salted) == 0
    assert salted.choices[0].text == judged.choices[0].text


def test_chat_takes_the_blocks_of_the_base_models_turn(server: Server) -> None:
    chat = server.client().chat.completions
    messages = [{"role": "user", "content": words(3 * BLOCK)}]
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0}
    base = chat.create(model="base", messages=messages, **options)
    assert base.choices[0].message.role == "assistant"
    # The template knows no role of this name, so the invocation stands in the text.
    asked = [*messages, {"role": "judge", "content": "x"}]
    with pytest.raises(openai.BadRequestError):
        chat.create(model="judge", messages=asked, **options)
    prompt = [{"role": "user", "content": messages[0]["content"] + INVOCATION + "x"}]
    judged = chat.create(model="judge", messages=prompt, **options)
    # <bos>, the turn's head, and the content up to the invocation.
    start = len("__user_") + 3 * BLOCK - 1
    assert cached(judged) == start // BLOCK * BLOCK
    assert chat.create(model="base", messages=prompt, **options).choices[0].message.content != (
        judged.choices[0].message.content
    )


@pytest.mark.parametrize("model", ["base", "judge", "plain"])
def test_streams_say_what_whole_answers_say(server: Server, model: str) -> None:
    prompt = words(2 * BLOCK) + INVOCATION
    whole = complete(server, model, prompt, max_tokens=12)
    parts = list(complete(server, model, prompt, max_tokens=12, stream=True))
    assert len(parts) > 1
    assert "".join(p.choices[0].text for p in parts if p.choices) == whole.choices[0].text


def test_a_prompt_without_the_invocation_is_the_base_models(server: Server) -> None:
    prompt = words(BLOCK)
    base, judged = complete(server, "base", prompt), complete(server, "judge", prompt)
    assert base.choices[0].text == judged.choices[0].text


def test_32_mixed_requests_at_once_say_what_they_say_alone(server: Server) -> None:
    context = words(3 * BLOCK + 7)
    tails = {"base": "", "judge": INVOCATION, "rewrite": OTHER, "plain": ""}
    asked = [
        (model, f"{context[: 40 + 3 * i]}{tail}{'abcd'[i % 4]}")
        for i in range(8)
        for model, tail in tails.items()
    ]
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda a: complete(server, *a).choices[0].text, asked))
    assert len(together) == 32
    fresh = {"extra_body": {"cache_salt": words(12)}}
    alone = [complete(server, *a, **fresh).choices[0].text for a in asked]
    # In float32 a different batch rounds differently: a near tie may fall the other way.
    assert sum(a != b for a, b in zip(together, alone)) <= 1
    assert len(set(together)) > 16


def test_an_aborted_stream_leaves_the_server_and_its_blocks(server: Server) -> None:
    context = words(3 * BLOCK)
    base = complete(server, "base", context)
    stream = complete(server, "judge", context + INVOCATION, max_tokens=600, stream=True)
    assert next(iter(stream)) is not None
    stream.close()
    whole = complete(server, "judge", context + INVOCATION)
    assert cached(whole) >= base.usage.prompt_tokens // BLOCK * BLOCK
    for _ in range(100):
        if server.metric("vllm:num_requests_running") == 0:
            break
    assert server.metric("vllm:num_requests_running") == 0
    assert server.healthy()


def test_metrics_show_the_hit_rate(server: Server) -> None:
    context = words(4 * BLOCK + 1)
    complete(server, "base", context)
    names = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"
    before = [server.metric(n) for n in names]
    answer = complete(server, "judge", context + INVOCATION)
    queries, hits = (server.metric(n) - b for n, b in zip(names, before))
    assert queries == answer.usage.prompt_tokens
    assert hits == cached(answer) == 4 * BLOCK


@pytest.mark.parametrize("what", BAD)
def test_a_bad_adapter_is_the_clients_error(
    server: Server, folder: Path, tmp_path: Path, what: str
) -> None:
    _, status, words_of_it = BAD[what]
    bad = make_bad(folder / "judge", tmp_path / "bad", what)
    code, text = server.post("/v1/load_lora_adapter", lora_name="bad", lora_path=str(bad))
    assert (code, words_of_it in text) == (status, True), text
    assert server.healthy()


def test_adapters_come_and_go_at_run_time(server: Server, folder: Path) -> None:
    context = words(2 * BLOCK) + INVOCATION
    path = str(folder / "judge")
    code, text = server.post("/v1/load_lora_adapter", lora_name="late", lora_path=path)
    assert code == 200, text
    late = complete(server, "late", context).choices[0].text
    assert late == complete(server, "judge", context).choices[0].text
    code, text = server.post("/v1/unload_lora_adapter", lora_name="late")
    assert code == 200, text
    with pytest.raises(openai.NotFoundError):
        complete(server, "late", context)


def test_two_workers_outlive_bad_adapters(folder: Path, tmp_path: Path) -> None:
    """Under tensor parallelism stock vLLM dies of these."""
    log = tmp_path / "server.log"
    with serve(folder / "model", log, {"judge": folder / "judge"}, parallel=2) as server:
        context = words(3 * BLOCK + 3)
        complete(server, "base", context)
        first = complete(server, "judge", context + INVOCATION)
        assert cached(first) == 3 * BLOCK
        for number, what in enumerate(DEADLY):
            bad = make_bad(folder / "judge", tmp_path / str(number), what)
            code, text = server.post("/v1/load_lora_adapter", lora_name="bad", lora_path=str(bad))
            assert code == BAD[what][1], text
        again = complete(server, "judge", context + INVOCATION)
        assert again.choices[0].text == first.choices[0].text
        code, text = server.post(
            "/v1/load_lora_adapter", lora_name="plain", lora_path=str(folder / "plain")
        )
        assert code == 200, text
        assert cached(complete(server, "plain", context + INVOCATION)) == 0
