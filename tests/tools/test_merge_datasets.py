import numpy as np
import pytest

from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron.data.meta import TokenizerIdentity

ONE = TokenizerIdentity(name="SentencePieceTokenizer", vocab_size=100, fingerprint="1" * 64)
OTHER = TokenizerIdentity(name="GPT2BPETokenizer", vocab_size=100, fingerprint="2" * 64)


def write_pair(prefix, documents, dtype=np.uint16, tokenizer=ONE):
    with IndexedDatasetWriter(prefix, dtype, tokenizer=tokenizer) as writer:
        for document in documents:
            writer.add_document(document)


def documents_of(prefix):
    dataset = IndexedDataset(prefix)
    return [dataset[i].tolist() for i in range(len(dataset))]


@pytest.fixture
def pairs(tmp_path):
    write_pair(tmp_path / "b", [[1, 2], [3]])
    write_pair(tmp_path / "a", [[4, 5, 6]])


def test_documents_stand_in_the_order_given(tmp_path, run_tool, pairs):
    run = run_tool("merge_datasets.py", "--input", "b", "a.idx", "--output-prefix", "all")
    assert run.returncode == 0, run.stderr
    assert documents_of(tmp_path / "all") == [[1, 2], [3], [4, 5, 6]]
    meta = IndexedDataset(tmp_path / "all").meta
    assert (meta.tokenizer, meta.documents, meta.tokens, meta.max_token_id) == (ONE, 3, 6, 6)
    assert meta.made_by["merged"] == ["b", "a"]
    assert "3 documents, 6 uint16 tokens of 2 datasets" in run.stdout


def test_a_folder_stands_for_its_pairs_by_name(tmp_path, run_tool, pairs):
    run = run_tool("merge_datasets.py", "--input", ".", "--output-prefix", "sub/all")
    assert run.returncode == 0, run.stderr
    assert documents_of(tmp_path / "sub/all") == [[4, 5, 6], [1, 2], [3]]


def test_data_without_side_files_merges_without_a_tokenizer(tmp_path, run_tool, pairs):
    for name in ("a", "b"):
        (tmp_path / f"{name}.meta.json").unlink()
    assert run_tool("merge_datasets.py", "--input", "a", "b", "--output-prefix", "all").returncode == 0
    assert IndexedDataset(tmp_path / "all").meta.tokenizer is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["b", "foreign"], "b was made by a SentencePieceTokenizer of 100 ids (fingerprint 111111111111), and foreign "
                           "by a GPT2BPETokenizer of 100 ids (fingerprint 222222222222)"),
        (["b", "unknown"], "and unknown by an unknown tokenizer (no side file)"),
        (["b", "wide"], "b holds uint16 tokens and wide holds int32"),
        (["b", "missing"], "missing.idx does not exist"),
        (["b", "cut"], "cut.bin is cut"),
        (["b", "b"], "--input names b twice"),
        (["b", "all"], "--output-prefix all is one of the inputs"),
        (["empty"], "--input empty is a folder without an .idx file"),
    ],
)  # fmt: skip
def test_what_does_not_belong_together_is_refused_and_nothing_is_written(
    tmp_path, run_tool, pairs, arguments, sentence
):
    write_pair(tmp_path / "foreign", [[1]], tokenizer=OTHER)
    write_pair(tmp_path / "unknown", [[1]])
    (tmp_path / "unknown.meta.json").unlink()
    write_pair(tmp_path / "wide", [[1]], dtype=np.int32)
    write_pair(tmp_path / "cut", [[1, 2, 3]])
    (tmp_path / "cut.bin").write_bytes((tmp_path / "cut.bin").read_bytes()[:-2])
    (tmp_path / "empty").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    run = run_tool("merge_datasets.py", "--input", *arguments, "--output-prefix", "all")
    assert run.returncode == 2
    assert sentence in run.stderr
    assert "Traceback" not in run.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_pair_that_is_there_is_replaced_only_when_told(tmp_path, run_tool, pairs):
    write_pair(tmp_path / "all", [[9]])
    command = ("merge_datasets.py", "--input", "a", "b", "--output-prefix", "all")
    run = run_tool(*command)
    assert run.returncode == 2
    assert "all.idx is there already: replace it with --overwrite" in run.stderr
    assert documents_of(tmp_path / "all") == [[9]]
    assert run_tool(*command, "--overwrite").returncode == 0
    assert documents_of(tmp_path / "all") == [[4, 5, 6], [1, 2], [3]]
