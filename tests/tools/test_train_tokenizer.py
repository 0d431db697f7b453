import json

from megatron.data.tokenizer.sentencepiece import SentencePieceTokenizer
from tests.tokenizer_files import HARD_TEXTS, TEXTS


def write_corpus(path):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 20))


def test_the_model_gives_texts_back_and_is_the_same_each_time(tmp_path, run_tool):
    write_corpus(tmp_path / "a.jsonl")
    for name in ("one.model", "two.model"):
        run = run_tool("train_tokenizer.py", "--input", "a.jsonl", "--output", name, "--vocab-size", 400)
        assert run.returncode == 0, run.stderr
        assert "400 bpe pieces learned from" in run.stdout
    assert (tmp_path / "one.model").read_bytes() == (tmp_path / "two.model").read_bytes()
    tokenizer = SentencePieceTokenizer(str(tmp_path / "one.model"))
    assert tokenizer.vocab_size == 400
    for text in TEXTS + HARD_TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 3


def test_a_sample_of_a_larger_text_is_enough(tmp_path, run_tool):
    write_corpus(tmp_path / "a.jsonl")
    run = run_tool(
        *("train_tokenizer.py", "--input", "a.jsonl", "--output", "t.model", "--vocab-size", 300),
        *("--sample-megabytes", 0.002),
    )
    assert run.returncode == 0, run.stderr


def test_a_text_too_short_for_the_vocabulary_is_one_sentence(tmp_path, run_tool):
    (tmp_path / "a.txt").write_text("short\n")
    run = run_tool("train_tokenizer.py", "--input", "a.txt", "--output", "t.model")
    assert run.returncode == 2
    assert "train_tokenizer: error: --vocab-size 8000 does not go with this text" in run.stderr
    assert not (tmp_path / "t.model").exists()
