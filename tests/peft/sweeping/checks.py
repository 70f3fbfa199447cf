"""What `accelerate`, `Session` and `prefix_forward` answer, compared with the definition.

Each check runs the accelerated model, and the base model alone in the same way. So it is known
whether transformers itself agrees with a forward from scratch there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from alora_kernels.inference import Session
from alora_kernels.peft import accelerate
from alora_kernels.training import prefix_forward

from .models import VOCAB
from .subject import INVOCATIONS, LENGTH, START, Subject, adapted
from .verdict import Verdict, describe, distance, failure, judge

ANSWER = 6
CARRIED = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")


class Ids:
    """A tokenizer for sessions that are given token ids alone."""

    eos_token_id, pad_token_id, bos_token_id, chat_template = -1, 0, None, None

    def __len__(self) -> int:
        return VOCAB

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return " ".join(map(str, ids))


def forward(subject: Subject) -> Verdict:
    """Whole rows without a cache."""
    return judge(
        lambda model: model(input_ids=subject.ids, use_cache=False).logits,
        subject,
        _scratch(subject),
        _scratch(subject, base=True),
    )


def left(subject: Subject) -> Verdict:
    """A batch padded on the left: each row as it is alone."""
    return _padded(subject, "left")


def right(subject: Subject) -> Verdict:
    """A batch padded on the right: each row as it is alone."""
    return _padded(subject, "right")


def _padded(subject: Subject, side: str) -> Verdict:
    gap = 4
    short = subject.ids[1:, gap:]
    padding = torch.zeros(1, gap, dtype=torch.long)
    parts = [padding, short] if side == "left" else [short, padding]
    ids = torch.cat([subject.ids[:1], torch.cat(parts, 1)])
    mask = (ids != 0).long()
    begin = gap if side == "left" else 0
    starts = [START, START + 1 - gap + begin]

    def way(model: Any) -> Tensor:
        out = model(input_ids=ids, use_cache=False, **subject.positions(mask)).logits
        return torch.cat([out[0], out[1, begin : begin + LENGTH - gap]])

    with torch.no_grad():
        wanted, base = (
            torch.cat(
                [
                    subject.definition.logits(subject.ids[:1], names, [START])[0],
                    subject.definition.logits(short, names, [START + 1 - gap])[0],
                ]
            )
            for names in (["ask"], [None])
        )
    hooked = lambda: subject.definition.running(["ask"] * 2, starts)  # noqa: E731
    verdict = judge(way, subject, wanted, base, hooked)
    if "NaN" in verdict.detail and wanted.dtype is torch.float64:
        # Eager attention's mask overflows in float64 where a row sees nothing.
        return _padded(Subject(subject.arch, subject.seed, torch.float32), side)
    return verdict


def generate(subject: Subject) -> Verdict:
    """Greedy decoding with the cache that transformers makes."""
    prompt = subject.ids[:, : START + 4]

    def way(model: Any) -> Tensor:
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=ANSWER,
            do_sample=False,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(out.logits, 1)

    wanted = subject.definition.greedy(prompt, ["ask"] * 2, subject.starts, ANSWER)
    base = subject.definition.greedy(prompt, [None] * 2, [None] * 2, ANSWER)
    hooked = lambda: subject.definition.running(["ask"] * 2, subject.starts, True)  # noqa: E731
    return judge(way, subject, wanted, base, hooked)


def chunks(subject: Subject) -> Verdict:
    """A loop over a cache: two chunks, single tokens, a chunk; an invocation lies in one chunk."""

    def way(model: Any) -> Tensor:
        carried: dict[str, Any] = {}
        outputs = []
        for begin, end in ((0, 9), (9, 17), (17, 18), (18, 19), (19, LENGTH)):
            out = model(input_ids=subject.ids[:, begin:end], use_cache=True, **carried)
            outputs.append(out.logits)
            known = [name for name in CARRIED if out.get(name) is not None]
            carried = {name: out[name] for name in known[:1]}  # one of two names for a cache
            if not carried:
                raise LookupError("the model returns no cache")
        return torch.cat(outputs, 1)

    hooked = lambda: subject.definition.running(["ask"] * 2, subject.starts, True)  # noqa: E731
    return judge(way, subject, _scratch(subject), _scratch(subject, base=True), hooked)


def session(subject: Subject) -> Verdict:
    """`Session.generate`: an adapter, one that is kept, and another behind it."""
    ids = subject.ids[0].tolist()
    context, prompt = ids[:9], ids[17:]

    def way(model: Any) -> Tensor:
        talk = Session(model, Ids())
        talk.extend(context)
        said = []
        for adapter in INVOCATIONS if isinstance(model, PeftModel) else [None]:
            answer = talk.generate(adapter, prompt, keep=True, max_new_tokens=ANSWER)
            said += answer.token_ids
        return torch.tensor(said)

    def wanted(answer: Answers) -> Tensor:
        seen, said = list(context), []
        for name, tokens in INVOCATIONS.items():
            seen += [*prompt, *tokens]
            new = answer(seen, name, len(seen) - len(tokens))
            said, seen = [*said, *new], [*seen, *new]
        return torch.tensor(said)

    def base(answer: Answers) -> Tensor:
        return torch.tensor(answer([*context, *prompt], None, None))

    return _judge_answers(way, subject, wanted, base)


def ask(subject: Subject) -> Verdict:
    """`Session.ask`: two adapters and the base model in one batch."""
    ids = subject.ids[0].tolist()
    context, prompt = ids[:9], ids[17:]

    def way(model: Any) -> Tensor:
        talk = Session(model, Ids())
        talk.extend(context)
        adapters = ["ask", None, "sum"] if isinstance(model, PeftModel) else [None, None]
        answers = talk.ask(adapters, prompt, max_new_tokens=ANSWER)
        return torch.tensor([a.token_ids for a in answers])

    def wanted(answer: Answers) -> Tensor:
        rows = []
        for name in ("ask", None, "sum"):
            seen = [*context, *prompt, *(INVOCATIONS[name] if name else [])]
            rows.append(answer(seen, name, len(context) + len(prompt)))
        return torch.tensor(rows)

    def base(answer: Answers) -> Tensor:
        return torch.tensor([answer([*context, *prompt], None, None)] * 2)

    return _judge_answers(way, subject, wanted, base)


Answers = Callable[[list[int], str | None, int | None], list[int]]  # ids, adapter, start


def _judge_answers(
    way: Callable[[Any], Tensor],
    subject: Subject,
    wanted: Callable[[Answers], Tensor],
    base: Callable[[Answers], Tensor],
) -> Verdict:
    """As `judge`, for the ids of answers.

    Where transformers' own `generate` differs from a forward from scratch, the answers of
    `generate` on the definition count as well.
    """

    def scratch(ids: list[int], name: str | None, start: int | None) -> list[int]:
        logits = subject.definition.greedy(torch.tensor([ids]), [name], [start], ANSWER)
        return logits[0].argmax(-1).tolist()

    def generated(ids: list[int], name: str | None, start: int | None) -> list[int]:
        with torch.no_grad(), subject.definition.running([name], [start], True) as model:
            row = torch.tensor([ids])
            out = model.generate(
                row, attention_mask=torch.ones_like(row), max_new_tokens=ANSWER, do_sample=False
            )
        return out[0, len(ids) :].tolist()

    expected, alone = wanted(scratch), base(scratch)
    if torch.equal(expected, wanted(lambda ids, name, start: scratch(ids, None, None))):
        return Verdict("error", "the adapters change no token here, so nothing is tested")
    try:
        stock = "" if torch.equal(base(generated), alone) else "differs"
    except Exception as error:
        stock = f"fails: {describe(error)}"
    try:
        plain = torch.equal(way(copy.deepcopy(subject.base)), alone)
    except Exception:
        plain = False
    try:
        got = way(subject.accelerated())
    except Exception as error:
        failed = failure(error)
        if failed.kind == "error" and stock.startswith("fails"):
            return Verdict("base fails", f"generate of the base model alone {stock}")
        return failed
    if torch.equal(got, expected):
        return Verdict("equal")
    if stock == "differs":
        if torch.equal(got, wanted(generated)):
            return Verdict("as base", "generate of the base model alone differs")
        if not plain:
            return Verdict("base differs", "generate and a session of the base alone differ")
    return Verdict(
        "WRONG",
        f"expected {expected.tolist()}, got {got.tolist()}; a session of the base model alone is "
        f"{'equal' if plain else 'wrong'}",
    )


def prefix(subject: Subject) -> Verdict:
    """`prefix_forward`: the loss and every gradient, in training mode."""
    labels = subject.ids.clone()
    for row, start in enumerate(subject.starts):
        labels[row, : start + 3] = -100
    weights = subject.definition.adapters["ask"]
    leaves = [m.requires_grad_() for a, b, _ in weights.values() for m in (a, b)]
    subject.base.train()
    try:
        logits = subject.definition.logits(subject.ids, ["ask"] * 2, subject.starts)
        again = subject.definition.logits(subject.ids, ["ask"] * 2, subject.starts)
    finally:
        subject.base.eval()
    wanted = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten()
    )
    expected = torch.autograd.grad(wanted, leaves, allow_unused=True)
    for leaf in leaves:
        leaf.requires_grad_(False)
    try:
        model = subject.accelerated().train()
        loss = prefix_forward(model, subject.ids, None, labels, "no_grad").loss
        loss.backward()
    except Exception as error:
        return failure(error)
    if not torch.equal(logits, again):
        return Verdict("as base", "the base model draws random numbers in training")
    gap = distance(loss.detach(), wanted.detach())
    if gap > subject.near / 20:
        return Verdict("WRONG", f"loss {loss.item():.5f} for {wanted.item():.5f}")
    layers = model.get_base_model()
    largest = max(float(g.abs().max()) for g in expected if g is not None)
    mine = []
    for path in weights:
        layer = layers.get_submodule(path)
        mine += [layer.lora_A["ask"].weight.grad, layer.lora_B["ask"].weight.grad]
    for (path, which), got, want in zip(
        ((p, m) for p in weights for m in "AB"), mine, expected, strict=True
    ):
        zero = torch.zeros(1)
        gap = float(((zero if got is None else got) - (zero if want is None else want)).abs().max())
        if not gap <= subject.near * largest:
            return Verdict("WRONG", f"gradient of {which} in {path} by {gap / largest:.1e}")
    return Verdict("equal")


def others(subject: Subject) -> Verdict:
    """Adapters on layers that do not read the tokens' rows: nobody can tell which are active."""
    if not subject.strays:
        return Verdict("none")
    try:
        model = accelerate(adapted(subject.base, list(subject.strays)))
        with torch.no_grad():
            got = model(input_ids=subject.ids, use_cache=False).logits
            base = subject.base(input_ids=subject.ids, use_cache=False).logits
    except Exception as error:
        return failure(error)
    if distance(got, base) <= subject.near:
        return Verdict("base", "they run the base model")
    return Verdict("WRONG", f"adapted without a word: {next(iter(subject.strays.items()))}")


def _scratch(subject: Subject, base: bool = False) -> Tensor:
    names, starts = ([None] * 2, [None] * 2) if base else (["ask"] * 2, subject.starts)
    with torch.no_grad():
        return subject.definition.logits(subject.ids, names, starts)


CHECKS: dict[str, Callable[[Subject], Verdict]] = {
    "forward": forward,
    "left": left,
    "right": right,
    "generate": generate,
    "chunks": chunks,
    "session": session,
    "ask": ask,
    "prefix": prefix,
    "others": others,
}
