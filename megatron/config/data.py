"""Text: where its token ids lie, how they are split and packed, and which tokenizer made them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron.config.flags import DERIVED, NOT_NEGATIVE, POSITIVE, at_least, flag


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Datasets, samples and tokenizer."""

    title: ClassVar[str] = "data"

    data_path: tuple[str, ...] = flag(
        (),
        num_values="+",
        metavar="[WEIGHT] PREFIX",
        help="prefixes of .bin/.idx pairs, split by --split; several are blended, with a weight before each or evenly",
    )
    split: str = flag("969,30,1", help="shares of train, validation and test documents of --data-path")
    train_data_path: tuple[str, ...] = flag(
        (), num_values="+", metavar="[WEIGHT] PREFIX", help="training data, instead of --data-path"
    )
    valid_data_path: tuple[str, ...] = flag(
        (), num_values="+", metavar="[WEIGHT] PREFIX", help="validation data, instead of --data-path"
    )
    test_data_path: tuple[str, ...] = flag(
        (), num_values="+", metavar="[WEIGHT] PREFIX", help="test data, instead of --data-path"
    )
    mock_data: bool = flag(False, help="train on synthetic tokens that need no files (needs --vocab-size)")
    data_cache_path: str | None = flag(None, help="folder of the sample indices (default: `cache` beside the data)")
    data_cache_timeout_minutes: float = flag(
        30.0, range=POSITIVE, help="minutes a rank waits for another to build a sample index"
    )
    seq_length: int = flag(1024, range=at_least(1), help="tokens of one sample")
    num_workers: int = flag(
        2, range=NOT_NEGATIVE, help="processes that prepare batches, per rank; 0 prepares them in the training process"
    )
    reset_position_ids: bool = flag(False, help="positions start anew after each end-of-document token")
    reset_attention_mask: bool = flag(False, help="tokens attend inside their own document only")
    eod_mask_loss: bool = flag(False, help="leave end-of-document tokens out of the loss")

    tokenizer_type: str = flag(
        DERIVED,
        choices=(
            "SentencePieceTokenizer",
            "GPT2BPETokenizer",
            "HuggingFaceTokenizer",
            "TikTokenizer",
            "NullTokenizer",
        ),
        help="kind of tokenizer",
        derived="NullTokenizer when only --vocab-size is given",
    )
    tokenizer_model: str | None = flag(
        None, help="SentencePiece .model, Hugging Face tokenizer.json (or its folder), or tiktoken file or name"
    )
    vocab_file: str | None = flag(None, help="GPT-2 BPE: vocab.json")
    merge_file: str | None = flag(None, help="GPT-2 BPE: merges.txt")
    vocab_size: int | None = flag(
        None,
        range=at_least(1),
        help="size of the model's vocabulary: NullTokenizer and --mock-data need it, else it is the tokenizer's, and "
        "may be larger where a model has rows that no token uses",
    )
