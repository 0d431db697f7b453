"""SentencePiece models (`.model` files), BPE or unigram.

Decoding gives the text back exactly when the model was trained with byte fallback, identity normalisation and no dummy
prefix, as `tools/train_tokenizer.py` does; except for U+2581, which SentencePiece uses for a space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.data.tokenizer.files import TokenizerError, fingerprint, read_vocabulary, wrong_kind

EOD_PIECES = ("<eod>", "<EOD>", "<|endoftext|>")
"""Pieces that end a document, where a model has one; else its end of sentence (`</s>`) does."""


class SentencePieceTokenizer:
    """A SentencePiece model.

    Args:
        model_file: path of the `.model` file, named by `--tokenizer-model`.

    Raises:
        TokenizerError: no such file, another kind of file, or a model without an end of document.
    """

    name = "SentencePieceTokenizer"

    def __init__(self, model_file: str) -> None:
        content = read_vocabulary("--tokenizer-model", model_file)
        self._processor = _load(model_file, content)
        self.vocab_size: int = self._processor.get_piece_size()
        self.eod_id = _find_eod(self._processor, model_file)
        self.fingerprint = fingerprint(self.name, self.eod_id, [content])

    def encode(self, text: str) -> list[int]:
        """Ids of a text; pieces that mark begin or end are not recognised in it."""
        ids: list[int] = self._processor.encode(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        ids: list[list[int]] = self._processor.encode(list(texts), num_threads=1)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; begin and end decode to nothing."""
        text: str = self._processor.decode([int(id) for id in ids])
        return text


def _load(model_file: str, content: bytes) -> Any:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    try:
        loaded = bool(content) and processor.LoadFromSerializedProto(content)
    except RuntimeError:
        loaded = False
    if not loaded or processor.get_piece_size() == 0:
        raise wrong_kind("--tokenizer-model", model_file, content, "a SentencePiece model")
    return processor


def _find_eod(processor: Any, model_file: str) -> int:
    for piece in EOD_PIECES:
        piece_id: int = processor.piece_to_id(piece)
        if piece_id != processor.unk_id() and processor.id_to_piece(piece_id) == piece:
            return piece_id
    eos_id: int = processor.eos_id()
    if eos_id < 0:
        raise TokenizerError(
            f"--tokenizer-model {model_file} has no end of document ({', '.join(EOD_PIECES)} or </s>): "
            "train it with an end-of-sentence piece."
        )
    return eos_id
