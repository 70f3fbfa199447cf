"""What is measured: layers of the shapes of real models, with active rows from real text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alora_kernels import Activation
from alora_kernels.contract import Problem

CHATS = Path(__file__).parents[1] / "data" / "chats.jsonl"
ADAPTERS = ("summary", "certainty", "rewrite", "safety")

# (in_features, out_features) of each adapted projection, from the models' published configurations.
# Projections of one shape share a line, since their costs are equal.
MODELS: dict[str, dict[str, tuple[int, int]]] = {
    "Gemma-3-270M": {
        "q": (640, 1024),
        "k,v": (640, 256),
        "o": (1024, 640),
        "gate,up": (640, 2048),
        "down": (2048, 640),
    },
    "Llama-3.2-3B": {
        "q,o": (3072, 3072),
        "k,v": (3072, 1024),
        "gate,up": (3072, 8192),
        "down": (8192, 3072),
    },
    "Granite-3.3-8B": {
        "q,o": (4096, 4096),
        "k,v": (4096, 1024),
        "gate,up": (4096, 12800),
        "down": (12800, 4096),
    },
    "Mistral-7B": {
        "q,o": (4096, 4096),
        "k,v": (4096, 1024),
        "gate,up": (4096, 14336),
        "down": (14336, 4096),
    },
}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Rows:
    """The tokens of one batch, and which of them are active.

    Every sequence is active from its invocation to its end. PEFT's layer knows no other case, so
    it can run these rows, too.
    """

    batch: int
    seq_len: int
    active: str  # where they come from: "text", or a fraction
    activation: Activation
    offsets: tuple[int, ...]  # active tokens at the end of each sequence: PEFT's alora_offsets

    @property
    def num_rows(self) -> int:
        return self.batch * self.seq_len

    @property
    def num_active(self) -> int:
        return sum(self.offsets)


@dataclass(frozen=True)
class Case:
    """One linear layer at one size, either forward only or forward + backward."""

    model: str
    layer: str
    in_features: int  # K
    out_features: int  # N
    rank: int  # R
    rows: Rows
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    backward: bool
    prefix_grad: bool = True
    dropout_p: float = 0.0
    scaling: float = 1.0

    @property
    def dtype_name(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    @property
    def pass_name(self) -> str:
        return "fwd+bwd" if self.backward else "fwd"

    @property
    def passes(self) -> tuple[bool, ...]:
        """For each of its passes, whether it is a backward."""
        return (False, True) if self.backward else (False,)

    def problem(self, device: str, arch: int, backward: bool) -> Problem:
        """One pass as the dispatcher sees it."""
        return Problem(
            rows=self.rows.num_rows,
            in_features=self.in_features,
            out_features=(self.out_features,),
            ranks=(self.rank,),
            active=self.rows.num_active,
            dtype=self.dtype,
            adapter_dtype=self.adapter_dtype,
            device=device,
            arch=arch,
            backward=backward,
        )

    def but(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)

    def flops(self, adapted: bool) -> float:
        """The floating-point operations that the result needs, with or without the adapter's.

        A multiply-add counts as two. The base takes 2MNK forward and 2MNK for dx (of active rows
        only with `prefix_grad=False`). The adapter takes 2fMR(K + N) forward, and twice that
        backward.
        """
        rows, active = self.rows.num_rows, self.rows.num_active
        base = 2.0 * rows * self.in_features * self.out_features
        total = base
        if self.backward:
            total += base if self.prefix_grad or not adapted else base * active / rows
        if adapted:
            low_rank = 2.0 * active * self.rank * (self.in_features + self.out_features)
            total += low_rank * (3 if self.backward else 1)
        return total

    def bytes(self, adapted: bool) -> float:
        """The bytes on the memory bus if every operand and every result crosses it once."""
        size, adapter_size = self.dtype.itemsize, self.adapter_dtype.itemsize
        rows, active = self.rows.num_rows, self.rows.num_active
        inputs, outputs = self.in_features, self.out_features
        total = size * (rows * inputs + inputs * outputs + rows * outputs)
        if self.backward:
            dx_rows = rows if self.prefix_grad or not adapted else active
            total += size * (dx_rows * outputs + inputs * outputs + rows * inputs)
        if adapted:
            adapter = adapter_size * self.rank * (inputs + outputs)
            # Backward reads the adapter again, writes its gradients, and reads the active x.
            total += adapter * (3 if self.backward else 1)
            total += size * active * inputs if self.backward else 0
        return float(total)


@dataclass(frozen=True)
class Tensors:
    """The operands of a case. All variants use the same ones, so their results can be compared."""

    x: Tensor  # [B, T, K]
    weight: Tensor  # [N, K]
    lora_a: Tensor  # [R, K]
    lora_b: Tensor  # [N, R]
    dy: Tensor  # [B, T, N]
    seed: Tensor  # int64 [1], dropout's


def make_tensors(case: Case, seed: int) -> Tensors:
    """Random operands like a trained layer's: x, base output and delta have a scale of about 1."""
    device = case.rows.activation.device
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device) * scale
        return values.to(dtype)

    batch, seq_len = case.rows.batch, case.rows.seq_len
    inputs, outputs, rank = case.in_features, case.out_features, case.rank
    return Tensors(
        x=normal(batch, seq_len, inputs),
        weight=normal(outputs, inputs, scale=inputs**-0.5),
        lora_a=normal(rank, inputs, scale=inputs**-0.5, dtype=case.adapter_dtype),
        lora_b=normal(outputs, rank, scale=rank**-0.5, dtype=case.adapter_dtype),
        dy=normal(batch, seq_len, outputs),
        seed=torch.tensor([seed], dtype=torch.int64, device=device),
    )


# ---------------------------------------------------------------------- text


def load_chats(adapter: str | None = None) -> list[dict[str, Any]]:
    """The conversations of bench/data/chats.jsonl: all, or those that call one adapter."""
    with CHATS.open(encoding="utf-8") as file:
        chats = [json.loads(line) for line in file]
    return [chat for chat in chats if adapter is None or chat["adapter"] == adapter]


def text_of(chat: dict[str, Any], with_answer: bool = True) -> str:
    """A conversation as one string: its messages, its invocation and, if wanted, its answer."""
    turns = "".join(f"<|{m['role']}|>\n{m['content']}<|end|>\n" for m in chat["messages"])
    return turns + chat["invocation"] + (chat["answer"] + "<|end|>\n" if with_answer else "")


def tokens_of(text: str) -> list[int]:
    """Tokens of bytes: each UTF-8 byte plus one, so that 0 can be the padding."""
    return [byte + 1 for byte in text.encode("utf-8")]


def rows_from_text(
    batch: int, seq_len: int, device: torch.device | str = "cpu", adapter: str = "certainty"
) -> Rows:
    """A training batch of conversations: padded on the left, the last `seq_len` tokens kept.

    Conversations that need no padding come first. Otherwise they have the order of the file.
    """
    chats = load_chats(adapter)
    if batch > len(chats):
        raise ValueError(
            f"--batch {batch}: text holds {len(chats)} conversations for the adapter {adapter!r}; "
            f"use --batch {len(chats)} or less, or --active with a fraction"
        )
    chats = sorted(chats, key=lambda chat: -min(seq_len, len(tokens_of(text_of(chat)))))[:batch]
    input_ids = torch.zeros(batch, seq_len, dtype=torch.int64)
    for row, chat in enumerate(chats):
        tokens = tokens_of(text_of(chat))[-seq_len:]
        input_ids[row, seq_len - len(tokens) :] = torch.tensor(tokens)
    invocation = tokens_of(chats[0]["invocation"])
    activation = Activation.from_input_ids(input_ids, invocation)
    offsets = activation.mask.view(batch, seq_len).sum(1).tolist()
    if 0 in offsets:
        raise ValueError(
            f"--seq-len {seq_len}: the answer of a conversation is longer than that, so its "
            "invocation would be cut away; use 512 or more"
        )
    return Rows(batch, seq_len, "text", activation.to(device), tuple(offsets))


def rows_from_fraction(
    batch: int, seq_len: int, fraction: float, device: torch.device | str = "cpu"
) -> Rows:
    """A batch whose sequences are each active in the last `fraction` of their tokens."""
    return rows_from_offset(batch, seq_len, round(fraction * seq_len), device, f"{fraction:g}")


def rows_from_offset(
    batch: int,
    seq_len: int,
    offset: int,
    device: torch.device | str = "cpu",
    active: str | None = None,
) -> Rows:
    """A batch whose sequences are each active in their last `offset` tokens."""
    offsets = (offset,) * batch
    activation = Activation.from_offsets(offsets, seq_len, device=device)
    return Rows(batch, seq_len, active or f"{offset / seq_len:.3g}", activation, offsets)


def layer_cases(
    shapes: Sequence[tuple[str, str, int, int]],  # model, layer, in_features, out_features
    rows: Sequence[Rows],
    *,
    rank: int,
    dtypes: Sequence[torch.dtype],
    adapter_dtype: torch.dtype | None,
) -> Iterator[Case]:
    """The forward + backward case of every combination of shape, rows and dtype."""
    for model, layer, inputs, outputs in shapes:
        for dtype in dtypes:
            for batch in rows:
                yield Case(
                    model=model,
                    layer=layer,
                    in_features=inputs,
                    out_features=outputs,
                    rank=rank,
                    rows=batch,
                    dtype=dtype,
                    adapter_dtype=adapter_dtype or dtype,
                    backward=True,
                )
