"""Trains a SentencePiece model that gives every text back exactly, source code with its indentation included."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron.data.atomic import atomic_writer
from megatron.data.tokenizer.files import TokenizerError

LINES_OF_SENTENCE = 8
"""Lines that are learned from as one, so that pieces may span the end of a line and the indentation after it."""
MAX_SENTENCE_BYTES = 1 << 16
THREADS = 4
"""Fixed: the result must not depend on the machine."""


def train_sentencepiece(
    texts: Iterable[str], output: Path, *, vocab_size: int, model_type: str = "bpe", keep_one_in: int = 1
) -> None:
    """Train a model on texts and write it, atomically; the same texts give the same file.

    Nothing is normalised, no space is put in front, runs of spaces may be pieces, and a character that has no piece is
    spelled in bytes.

    Args:
        texts: what to learn from.
        output: the `.model` file.
        vocab_size: number of pieces, the 256 bytes and `<unk>`, `<s>`, `</s>` among them.
        model_type: `bpe` or `unigram`.
        keep_one_in: learn from one of so many runs of lines, evenly spread.

    Raises:
        TokenizerError: the texts are too few for so many pieces, or so few pieces do not hold their characters.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts, keep_one_in),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            character_coverage=0.9995,
            max_sentence_length=MAX_SENTENCE_BYTES,
            num_threads=THREADS,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise TokenizerError(
            f"--vocab-size {vocab_size} does not go with this text ({reason}): give more text, or another size."
        ) from error
    with atomic_writer(output) as file:
        file.write(model.getvalue())


def _sentences(texts: Iterable[str], keep_one_in: int) -> Iterator[str]:
    """Cut texts into runs of lines; a NUL character, which the trainer does not take, ends one."""
    number = 0
    for text in texts:
        lines = text.replace("\0", "\n").splitlines(keepends=True)
        for first in range(0, len(lines), LINES_OF_SENTENCE):
            if number % keep_one_in == 0:
                yield "".join(lines[first : first + LINES_OF_SENTENCE])
            number += 1
