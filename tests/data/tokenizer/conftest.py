"""One tiny tokenizer of each kind, made once."""

import pytest

from tests.tokenizer_files import write_gpt2_files, write_sentencepiece, write_tiktoken, write_tokenizer_json


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory):
    return write_sentencepiece(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="session")
def gpt2_files(tmp_path_factory):
    return write_gpt2_files(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory):
    return write_tokenizer_json(tmp_path_factory.mktemp("hugging_face"))


@pytest.fixture(scope="session")
def tiktoken_file(tmp_path_factory):
    return write_tiktoken(tmp_path_factory.mktemp("tiktoken"))
