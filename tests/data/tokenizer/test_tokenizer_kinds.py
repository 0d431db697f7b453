import json
import sys

import pytest

from megatron.config.errors import UserError
from megatron.data.tokenizer.gpt2_bpe import GPT2BPETokenizer
from megatron.data.tokenizer.hugging_face import HuggingFaceTokenizer
from megatron.data.tokenizer.null import NullTokenizer
from megatron.data.tokenizer.sentencepiece import SentencePieceTokenizer
from megatron.data.tokenizer.tiktoken import TikTokenTokenizer
from tests.tokenizer_files import (
    HARD_TEXTS,
    TEXTS,
    write_gpt2_files,
    write_sentencepiece,
    write_tiktoken,
    write_tokenizer_json,
)

# --- GPT-2 ---


def gpt2_reference(vocab_file):
    """Build GPT-2's algorithm as tiktoken implements it, from the same vocabulary."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(unprintable)}
    vocab = json.loads(vocab_file.read_text())
    eod = vocab.pop("<|endoftext|>")
    ranks = {bytes(byte_of[character] for character in token): id for token, id in vocab.items()}
    return tiktoken.Encoding("tiny", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": eod})


def test_gpt2_ids_equal_those_of_an_independent_implementation(gpt2_files):
    tokenizer, reference = GPT2BPETokenizer(*map(str, gpt2_files)), gpt2_reference(gpt2_files[0])
    for text in [*TEXTS, *HARD_TEXTS, "a<|endoftext|>b", "x  y   z", " 's 've", "tabs\t\tand  \n spaces "]:
        assert tokenizer.encode(text) == reference.encode_ordinary(text)
    assert tokenizer.eod_id == 0
    assert tokenizer.vocab_size == reference.n_vocab


def test_gpt2_merges_of_another_vocabulary_are_refused(gpt2_files, tmp_path):
    _, other_merges = write_gpt2_files(tmp_path, vocab_size=360)
    with pytest.raises(UserError, match=r"merges .* has no .* two files of one tokenizer"):
        GPT2BPETokenizer(str(gpt2_files[0]), str(other_merges))


def test_gpt2_files_given_the_wrong_way_round_are_refused(gpt2_files):
    vocab, merges = map(str, gpt2_files)
    with pytest.raises(UserError, match=r"--vocab-file .*merges\.txt is not a vocab\.json; it looks like a merges.txt"):
        GPT2BPETokenizer(merges, vocab)


def test_gpt2_vocabulary_without_end_of_text_is_refused(gpt2_files, tmp_path):
    vocab = json.loads(gpt2_files[0].read_text())
    del vocab["<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(UserError, match=r"has no <\|endoftext\|>"):
        GPT2BPETokenizer(str(tmp_path / "vocab.json"), str(gpt2_files[1]))


# --- SentencePiece ---


def test_sentencepiece_ends_a_document_with_the_end_of_sentence(sentencepiece_file):
    assert SentencePieceTokenizer(str(sentencepiece_file)).eod_id == 2


def test_sentencepiece_prefers_a_piece_made_to_end_documents(tmp_path):
    from sentencepiece import SentencePieceTrainer

    with (tmp_path / "eod.model").open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS * 20),
            model_writer=file,
            vocab_size=330,
            byte_fallback=True,
            control_symbols=["<eod>"],
            minloglevel=2,
        )
    tokenizer = SentencePieceTokenizer(str(tmp_path / "eod.model"))
    assert tokenizer.eod_id == 3
    assert 3 not in tokenizer.encode("<eod>")


def test_sentencepiece_without_an_end_of_document_is_refused(tmp_path):
    from sentencepiece import SentencePieceTrainer

    with (tmp_path / "none.model").open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS * 20), model_writer=file, vocab_size=70, eos_id=-1, minloglevel=2
        )
    with pytest.raises(UserError, match="has no end of document"):
        SentencePieceTokenizer(str(tmp_path / "none.model"))


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_twice_gives_the_same_file(tmp_path, model_type):
    contents = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        contents.append(write_sentencepiece(tmp_path / name, 330, model_type=model_type).read_bytes())
    assert contents[0] == contents[1]


def test_training_more_pieces_than_the_text_holds_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="--vocab-size 9000 does not go with this text") as raised:
        write_sentencepiece(tmp_path, vocab_size=9000)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


# --- Hugging Face ---


def test_hugging_face_folder_and_file_are_the_same_tokenizer(tokenizer_json):
    folder, file = HuggingFaceTokenizer(str(tokenizer_json.parent)), HuggingFaceTokenizer(str(tokenizer_json))
    assert folder.fingerprint == file.fingerprint
    assert folder.encode(TEXTS[0]) == file.encode(TEXTS[0])


def test_hugging_face_ids_equal_those_of_transformers(tokenizer_json):
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_json))
    tokenizer = HuggingFaceTokenizer(str(tokenizer_json))
    for text in [*TEXTS, *HARD_TEXTS, "a<|endoftext|>b"]:
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False, truncation=False)


def test_hugging_face_ignores_truncation_stored_in_the_file(tokenizer_json):
    assert len(HuggingFaceTokenizer(str(tokenizer_json)).encode(TEXTS[0])) > 3


@pytest.mark.parametrize("eos_token", ["</s>", {"content": "</s>", "lstrip": False}])
def test_hugging_face_end_of_document_is_the_one_the_settings_name(tmp_path, eos_token):
    path = write_tokenizer_json(tmp_path, ["<|endoftext|>", "</s>"], eos_token)
    assert HuggingFaceTokenizer(str(path)).eod_id == 1


def test_hugging_face_end_of_document_is_guessed_from_well_known_tokens(tmp_path):
    assert HuggingFaceTokenizer(str(write_tokenizer_json(tmp_path, ["<pad>", "<|end_of_text|>"]))).eod_id == 1


def test_hugging_face_without_an_end_of_document_is_refused(tmp_path):
    path = write_tokenizer_json(tmp_path, ["<pad>"])
    with pytest.raises(UserError, match="has no token that ends a document"):
        HuggingFaceTokenizer(str(path))


def test_hugging_face_settings_that_name_an_unknown_end_are_refused(tmp_path):
    path = write_tokenizer_json(tmp_path, ["</s>"], "<end>")
    with pytest.raises(UserError, match="names '<end>' as eos_token"):
        HuggingFaceTokenizer(str(path))


def test_hugging_face_folder_without_a_tokenizer_json_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is a folder without a tokenizer\.json"):
        HuggingFaceTokenizer(str(tmp_path))


# --- tiktoken ---


def test_tiktoken_family_is_known_by_the_number_of_ranks(tiktoken_file):
    tokenizer = TikTokenTokenizer(str(tiktoken_file))
    assert (tokenizer.eod_id, tokenizer.vocab_size) == (50256, 50257)


def test_tiktoken_file_of_unknown_size_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds 300 ranks, but how words are cut is known for 50256"):
        TikTokenTokenizer(str(write_tiktoken(tmp_path, num_ranks=300)))


def test_tiktoken_missing_is_one_sentence_naming_the_extra(tiktoken_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UserError, match=r"pip install 'megatron-deepspeed\[data\]'"):
        TikTokenTokenizer(str(tiktoken_file))


# --- null ---


def test_null_tokenizer_reads_ids_and_ends_documents_with_the_last():
    tokenizer = NullTokenizer(10)
    assert tokenizer.encode(" 1 2\n9 ") == [1, 2, 9]
    assert tokenizer.decode([1, 2, 9]) == "1 2 9"
    assert tokenizer.eod_id == 9
    assert NullTokenizer(11).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize("text", ["1 x", "10", "-1", "1.5", "²"])
def test_null_tokenizer_refuses_what_is_not_an_id(text):
    with pytest.raises(ValueError, match="is not an id below the vocabulary size 10"):
        NullTokenizer(10).encode(text)
