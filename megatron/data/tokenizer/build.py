"""Builds the tokenizer that the flags name."""

from __future__ import annotations

from collections.abc import Callable

from megatron.config.data import DataConfig
from megatron.data.tokenizer.files import TokenizerError
from megatron.data.tokenizer.interface import Tokenizer


def build_tokenizer(config: DataConfig) -> Tokenizer:
    """Build the tokenizer of `--tokenizer-type` from its files.

    `--vocab-size`, where it is given, is the size of the model's vocabulary: that of the tokenizer, or more when a
    model has rows that no token uses. `NullTokenizer` has no other.

    Raises:
        TokenizerError: no type, a flag that the type needs is missing or one that it does not read is given, a file is
            missing or of another kind, or the size is less than the tokenizer's.
    """
    if config.tokenizer_type is None:
        raise TokenizerError(f"--tokenizer-type is missing: give one of {', '.join(_BUILDERS)}.")
    flags, build = _BUILDERS[config.tokenizer_type]
    _check_flags(config, flags)
    tokenizer = build(config)
    if config.vocab_size is None:
        return tokenizer
    if config.vocab_size < tokenizer.vocab_size:
        raise TokenizerError(
            f"--vocab-size {config.vocab_size} is less than the {tokenizer.vocab_size} ids of the {tokenizer.name}: "
            "leave the flag out or give the right tokenizer."
        )
    tokenizer.vocab_size = config.vocab_size
    return tokenizer


def _check_flags(config: DataConfig, flags: tuple[str, ...]) -> None:
    for field in ("tokenizer_model", "vocab_file", "merge_file", "vocab_size"):
        spelling = "--" + field.replace("_", "-")
        given = getattr(config, field) is not None
        if field in flags and not given:
            raise TokenizerError(f"--tokenizer-type {config.tokenizer_type} needs {spelling}.")
        if given and field not in (*flags, "vocab_size"):
            raise TokenizerError(f"--tokenizer-type {config.tokenizer_type} does not read {spelling}: leave it out.")


def _sentencepiece(config: DataConfig) -> Tokenizer:
    from megatron.data.tokenizer.sentencepiece import SentencePieceTokenizer

    return SentencePieceTokenizer(str(config.tokenizer_model))


def _gpt2_bpe(config: DataConfig) -> Tokenizer:
    from megatron.data.tokenizer.gpt2_bpe import GPT2BPETokenizer

    return GPT2BPETokenizer(str(config.vocab_file), str(config.merge_file))


def _hugging_face(config: DataConfig) -> Tokenizer:
    from megatron.data.tokenizer.hugging_face import HuggingFaceTokenizer

    return HuggingFaceTokenizer(str(config.tokenizer_model))


def _tiktoken(config: DataConfig) -> Tokenizer:
    from megatron.data.tokenizer.tiktoken import TikTokenTokenizer

    return TikTokenTokenizer(str(config.tokenizer_model))


def _null(config: DataConfig) -> Tokenizer:
    from megatron.data.tokenizer.null import NullTokenizer

    return NullTokenizer(config.vocab_size or 0)


_BUILDERS: dict[str, tuple[tuple[str, ...], Callable[[DataConfig], Tokenizer]]] = {
    "SentencePieceTokenizer": (("tokenizer_model",), _sentencepiece),
    "GPT2BPETokenizer": (("vocab_file", "merge_file"), _gpt2_bpe),
    "HuggingFaceTokenizer": (("tokenizer_model",), _hugging_face),
    "TikTokenizer": (("tokenizer_model",), _tiktoken),
    "NullTokenizer": (("vocab_size",), _null),
}
"""By `--tokenizer-type`: the flags it needs, and its builder."""
