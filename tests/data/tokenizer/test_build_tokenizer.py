import shutil
import subprocess
import sys

import pytest

from megatron.config.data import DataConfig
from megatron.config.errors import UserError
from megatron.data.tokenizer.build import build_tokenizer
from tests.tokenizer_files import HARD_TEXTS, TEXTS


@pytest.fixture(scope="session")
def configs(sentencepiece_file, gpt2_files, tokenizer_json, tiktoken_file):
    vocab, merges = map(str, gpt2_files)
    return {
        "SentencePieceTokenizer": DataConfig(
            tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(sentencepiece_file)
        ),
        "GPT2BPETokenizer": DataConfig(tokenizer_type="GPT2BPETokenizer", vocab_file=vocab, merge_file=merges),
        "HuggingFaceTokenizer": DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tokenizer_json)),
        "TikTokenizer": DataConfig(tokenizer_type="TikTokenizer", tokenizer_model=str(tiktoken_file)),
        "NullTokenizer": DataConfig(tokenizer_type="NullTokenizer", vocab_size=100),
    }


TEXT_KINDS = ("SentencePieceTokenizer", "GPT2BPETokenizer", "HuggingFaceTokenizer", "TikTokenizer")


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_decoding_gives_the_text_back(configs, kind):
    tokenizer = build_tokenizer(configs[kind])
    for text in TEXTS + HARD_TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_batch_equals_one_at_a_time_and_ids_are_below_the_vocabulary_size(configs, kind):
    tokenizer = build_tokenizer(configs[kind])
    texts = TEXTS + HARD_TEXTS
    batch = tokenizer.encode_batch(texts)
    assert batch == [tokenizer.encode(text) for text in texts]
    assert all(type(id) is int and 0 <= id < tokenizer.vocab_size for ids in batch for id in ids)
    assert 0 <= tokenizer.eod_id < tokenizer.vocab_size


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "GPT2BPETokenizer", "TikTokenizer"])
def test_a_document_cannot_spell_its_own_end(configs, kind):
    tokenizer = build_tokenizer(configs[kind])
    for text in ("<|endoftext|>", "</s>", "a<|endoftext|>b"):
        assert tokenizer.eod_id not in tokenizer.encode(text)


def test_fingerprints_depend_on_kind_and_content_and_not_on_the_path(configs, sentencepiece_file, tmp_path):
    fingerprints = {kind: build_tokenizer(config).fingerprint for kind, config in configs.items()}
    assert len(set(fingerprints.values())) == len(fingerprints)
    copy = shutil.copy(sentencepiece_file, tmp_path / "copy.model")
    copied = build_tokenizer(DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(copy)))
    assert copied.fingerprint == fingerprints["SentencePieceTokenizer"]


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_the_right_vocab_size_passes_or_a_larger_one_and_a_smaller_is_refused(configs, kind):
    size = build_tokenizer(configs[kind]).vocab_size
    flags = {name: getattr(configs[kind], name) for name in ("tokenizer_model", "vocab_file", "merge_file")}
    assert build_tokenizer(DataConfig(tokenizer_type=kind, vocab_size=size, **flags)).vocab_size == size
    larger = build_tokenizer(DataConfig(tokenizer_type=kind, vocab_size=size + 9, **flags))
    assert larger.vocab_size == size + 9
    assert larger.fingerprint == build_tokenizer(configs[kind]).fingerprint
    with pytest.raises(UserError, match=f"--vocab-size 7 is less than the {size} ids of the {kind}"):
        build_tokenizer(DataConfig(tokenizer_type=kind, vocab_size=7, **flags))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({}, "--tokenizer-type is missing"),
        ({"tokenizer_type": "SentencePieceTokenizer"}, "needs --tokenizer-model"),
        ({"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "v"}, "needs --merge-file"),
        ({"tokenizer_type": "NullTokenizer"}, "needs --vocab-size"),
        ({"tokenizer_type": "NullTokenizer", "vocab_size": 9, "merge_file": "m"}, "does not read --merge-file"),
        ({"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "/no/such"}, "/no/such does not exist"),
        ({"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "/no/such"}, "/no/such does not exist"),
        ({"tokenizer_type": "TikTokenizer", "tokenizer_model": "/no/such"}, "neither a file nor one of .*cl100k_base"),
        ({"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "/no/v", "merge_file": "m"}, "--vocab-file /no/v does"),
    ],
)
def test_missing_and_unread_flags_are_told_in_one_sentence(flags, sentence):
    with pytest.raises(UserError, match=sentence) as raised:
        build_tokenizer(DataConfig(**flags))
    assert "\n" not in str(raised.value)


WRONG = [
    (kind, file)
    for kind in ("SentencePieceTokenizer", "HuggingFaceTokenizer", "TikTokenizer")
    for file in ("SentencePieceTokenizer", "HuggingFaceTokenizer", "TikTokenizer", "GPT2BPETokenizer")
    if kind != file
]


@pytest.mark.parametrize(("kind", "file"), WRONG)
def test_a_file_of_another_kind_is_refused_with_the_kind_it_looks_like(configs, kind, file):
    path = configs[file].tokenizer_model or configs[file].vocab_file
    with pytest.raises(UserError, match=f"is not a.*it looks like a.*use --tokenizer-type {file}") as raised:
        build_tokenizer(DataConfig(tokenizer_type=kind, tokenizer_model=path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"hello world\n", b"{", b"[1]", bytes(range(256))])
@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer", "TikTokenizer"])
def test_a_file_of_no_kind_is_refused(kind, content, tmp_path):
    path = tmp_path / "vocabulary"
    path.write_bytes(content)
    with pytest.raises(UserError, match=str(path)) as raised:
        build_tokenizer(DataConfig(tokenizer_type=kind, tokenizer_model=str(path)))
    assert "\n" not in str(raised.value)


def test_tokenizer_libraries_are_imported_only_where_they_are_used():
    program = (
        "import sys, megatron.data.tokenizer.build, megatron.data.tokenizer.sentencepiece, "
        "megatron.data.tokenizer.hugging_face, megatron.data.tokenizer.tiktoken, megatron.data.tokenizer.gpt2_bpe\n"
        "print([name for name in ('torch', 'numpy', 'sentencepiece', 'tokenizers', 'tiktoken') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
