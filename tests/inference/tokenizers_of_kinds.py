"""Tokenizers of the kinds that models have, trained on a few sentences."""

from __future__ import annotations

from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps.",
    "User: who is there?\nAnswer: the fox, and the dog.\n\nUser: why?",
    "hello world, hello there, helloworld; the hell of a low lowering",
    "Été à Paris: naïve café.\n\n\nNext paragraph, with numbers 12 and 345.",
] * 3
SPECIAL = ["<pad>", "<bos>", "<eos>", "<turn>"]
KINDS = (
    "bytes",
    "bytes, space first",
    "metaspace first",
    "metaspace always",
    "metaspace never",
    "unigram",
    "gemma",
    "words",
)


def tokenizer_of(kind: str, chat_template: str | None = None, bos: bool = True) -> Any:
    inner, trainer = _parts(kind)
    inner.train_from_iterator(CORPUS, trainer)
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=["<turn>"],
        chat_template=chat_template,
    )


def _parts(kind: str) -> tuple[Tokenizer, Any]:
    size: dict[str, Any] = {"vocab_size": 400, "special_tokens": SPECIAL, "show_progress": False}
    if kind.startswith("bytes"):
        inner = Tokenizer(models.BPE())
        first = kind.endswith("first")
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=first)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        return inner, trainers.BpeTrainer(initial_alphabet=alphabet, **size)
    if kind == "words":
        inner = Tokenizer(models.WordLevel(unk_token="<pad>"))
        inner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
        inner.decoder = decoders.Fuse()
        return inner, trainers.WordLevelTrainer(**size)
    if kind == "gemma":  # SentencePiece without a space at the front, over the text as one word
        inner = Tokenizer(models.BPE())
        inner.normalizer = normalizers.Replace(" ", "▁")
        inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
        inner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        return inner, trainers.BpeTrainer(**size)
    scheme = kind.split()[-1] if kind.startswith("metaspace") else "always"
    inner = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    inner.decoder = decoders.Metaspace(prepend_scheme=scheme)
    if kind == "unigram":
        return inner, trainers.UnigramTrainer(unk_token="<pad>", **size)
    return inner, trainers.BpeTrainer(**size)
