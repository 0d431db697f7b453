"""The tokenizer of a model comes along, in and out."""

import dataclasses
import json

import pytest

from megatron.checkpoint.fragments import open_tensors
from megatron.config.data import DataConfig
from megatron.convert.hugging_face.exporting import export_model
from megatron.convert.hugging_face.importing import import_model
from megatron.convert.hugging_face.tokenizer import copy_tokenizer, tokenizer_flags
from megatron.data.tokenizer.build import build_tokenizer
from tests.convert.hugging_face.models import change_json, write_model
from tests.tokenizer_files import write_gpt2_files, write_sentencepiece, write_tokenizer_json

transformers = pytest.importorskip("transformers")

END = "<|endoftext|>"
TEXT = "def area(width): return width * 3"


@pytest.fixture
def theirs(tmp_path):
    """A Mistral without a window, which could be a Llama, with its tokenizer, of fewer tokens than it has rows."""
    folder = write_model(tmp_path / "theirs", "mistral without a window")
    write_tokenizer_json(folder, eos_token=END)
    change_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "modeling_own.py").write_text("raise SystemExit\n")
    return folder


def test_family_tokenizer_and_special_tokens_of_the_folder_come_back(theirs, tmp_path):
    made = import_model(theirs, tmp_path / "ours")
    change_json(theirs / "generation_config.json", temperature=0.7)
    again = export_model(open_tensors(made.path), tmp_path / "again", model=made.model, data=made.data)
    assert again.model_type == "mistral"
    assert again.tokenizer == ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    for name in (*again.tokenizer, "generation_config.json"):
        assert (again.path / name).read_bytes() == (theirs / name).read_bytes() or name == "generation_config.json"
    assert json.loads((again.path / "generation_config.json").read_text())["temperature"] == 0.7
    assert not (again.path / "modeling_own.py").exists()
    config = json.loads((again.path / "config.json").read_text())
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, 0]


def test_a_model_may_have_more_rows_than_its_tokenizer_has_tokens(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    write_tokenizer_json(folder)
    size = build_tokenizer(DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder))).vocab_size
    data = DataConfig(**tokenizer_flags(folder, size + 44))
    assert data.tokenizer_type == "HuggingFaceTokenizer"
    assert build_tokenizer(data).vocab_size == size + 44


def exported_tokenizer(data, folder):
    folder.mkdir()
    copy_tokenizer(data, folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_gpt2_files_become_a_tokenizer_of_theirs(tmp_path):
    vocab, merges = write_gpt2_files(tmp_path)
    data = DataConfig(tokenizer_type="GPT2BPETokenizer", vocab_file=str(vocab), merge_file=str(merges))
    assert dataclasses.replace(DataConfig(**tokenizer_flags(tmp_path, 1)), vocab_size=None) == data
    theirs = exported_tokenizer(data, tmp_path / "again")
    assert theirs(TEXT)["input_ids"] == build_tokenizer(data).encode(TEXT)


def test_a_tokenizer_json_is_read_by_theirs(tmp_path):
    write_tokenizer_json(tmp_path, eos_token=END)
    change_json(tmp_path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    data = DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "tokenizer.json"))
    theirs = exported_tokenizer(data, tmp_path / "again")
    assert theirs(TEXT, truncation=False)["input_ids"] == build_tokenizer(data).encode(TEXT)
    assert theirs.eos_token == END


def test_a_sentencepiece_model_is_taken_and_copied(tmp_path):
    path = write_sentencepiece(tmp_path).rename(tmp_path / "tokenizer.model")
    flags = tokenizer_flags(tmp_path, 400)
    assert (flags["tokenizer_type"], flags["tokenizer_model"]) == ("SentencePieceTokenizer", str(path))
    (tmp_path / "again").mkdir()
    assert copy_tokenizer(DataConfig(**flags), tmp_path / "again") == ["tokenizer.model", "tokenizer_config.json"]
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == path.read_bytes()


def test_no_tokenizer_is_ids_alone(tmp_path):
    assert tokenizer_flags(tmp_path, 77) == {"vocab_size": 77, "tokenizer_type": "NullTokenizer"}
    assert copy_tokenizer(DataConfig(**tokenizer_flags(tmp_path, 77)), tmp_path) == []
