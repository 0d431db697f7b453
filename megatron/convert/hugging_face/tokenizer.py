"""Tokenizer files beside a model: what a run takes of theirs, and what an export takes of a run's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron.config.data import DataConfig
from megatron.convert.hugging_face.config_file import CONFIG, GENERATION_CONFIG, read_object
from megatron.data.tokenizer.build import build_tokenizer

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
"""Files of a tokenizer; none of them is code."""

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def tokenizer_flags(folder: Path, vocab_size: int) -> dict[str, Any]:
    """Give the fields of the data's section that read the tokenizer of a folder, and the size of its vocabulary."""
    fields: dict[str, Any] = {"vocab_size": vocab_size}
    sentencepiece = folder / "tokenizer.model"
    if (folder / "tokenizer.json").is_file():
        return fields | {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(folder.resolve())}
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        files = {"vocab_file": "vocab.json", "merge_file": "merges.txt"}
        paths = {name: str((folder / file).resolve()) for name, file in files.items()}
        return fields | {"tokenizer_type": "GPT2BPETokenizer", **paths}
    if sentencepiece.is_file() and sentencepiece.open("rb").read(1) == b"\n":
        return fields | {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": str(sentencepiece.resolve())}
    return fields | {"tokenizer_type": "NullTokenizer"}


def tokenizer_folder(data: DataConfig) -> Path | None:
    """Find the folder of the run's tokenizer, where all of its files may lie; None where it has no files here."""
    file = data.tokenizer_model or data.vocab_file
    if file is None or data.tokenizer_type == "TikTokenizer":
        return None
    path = Path(file)
    folder = path if path.is_dir() else path.parent
    return folder if folder.is_dir() else None


def copy_tokenizer(data: DataConfig, target: Path) -> list[str]:
    """Copy the run's tokenizer into an exported model, under the names that transformers looks for; returns these.

    The rest of a Hugging Face tokenizer's folder that belongs to it comes along. A tokenizer of another kind gets the
    little file that says which class reads it.
    """
    folder = tokenizer_folder(data)
    copies: dict[str, Path] = {}
    if folder is None:
        return []
    if data.tokenizer_type == "HuggingFaceTokenizer":
        copies = {name: folder / name for name in FILES}
        copies["tokenizer.json"] = _file(data.tokenizer_model, "tokenizer.json")
    elif data.tokenizer_type == "GPT2BPETokenizer":
        copies = {"vocab.json": Path(str(data.vocab_file)), "merges.txt": Path(str(data.merge_file))}
    elif data.tokenizer_type == "SentencePieceTokenizer":
        copies = {"tokenizer.model": Path(str(data.tokenizer_model))}
    copied = [name for name, path in copies.items() if path.is_file()]
    for name in copied:
        shutil.copyfile(copies[name], target / name)
    kind = {"GPT2BPETokenizer": "GPT2Tokenizer", "SentencePieceTokenizer": "LlamaTokenizer"}.get(
        str(data.tokenizer_type)
    )
    if kind is not None and copied:
        (target / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}, indent=2) + "\n")
        copied.append("tokenizer_config.json")
    return copied


def their_neighbours(data: DataConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read config.json and generation_config.json of the folder that the run's tokenizer lies in, where it has them."""
    folder = tokenizer_folder(data)
    found = [None if folder is None else folder / name for name in (CONFIG, GENERATION_CONFIG)]
    config, generation = ({} if path is None or not path.is_file() else read_object(path) for path in found)
    return config, generation


def special_tokens(data: DataConfig) -> dict[str, int]:
    """Give the ids that begin and end a text for a model whose tokenizer lies in no folder of theirs.

    Raises:
        TokenizerError: the tokenizer's files are gone.
    """
    if data.tokenizer_type in (None, "NullTokenizer") or tokenizer_folder(data) is None:
        return {}
    end = build_tokenizer(data).eod_id
    return {"bos_token_id": end, "eos_token_id": end}


def _file(path: str | None, name: str) -> Path:
    given = Path(str(path))
    return given / name if given.is_dir() else given
