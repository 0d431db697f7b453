import os
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.errors import DataError, MissingDataError
from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter, smallest_token_type

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12, 65, 40]]


def megatron_index_bytes(code, item_bytes, lengths, document_index):
    """The format stated once more, field by field, with nothing shared with the package."""
    pointers = [item_bytes * sum(lengths[:i]) for i in range(len(lengths))]
    return (
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)
        + struct.pack("<B", code)
        + struct.pack("<Q", len(lengths))
        + struct.pack("<Q", len(document_index))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(pointers)}q", *pointers)
        + struct.pack(f"<{len(document_index)}q", *document_index)
    )


@pytest.mark.parametrize(("dtype", "code", "letter"), [(np.uint16, 8, "H"), (np.int32, 4, "i"), (np.uint8, 1, "B")])
def test_written_files_are_megatrons_byte_for_byte(write_pair, dtype, code, letter):
    prefix = write_pair(DOCUMENTS, dtype=dtype)
    ids = [token for document in DOCUMENTS for token in document]
    with open(prefix + ".idx", "rb") as index, open(prefix + ".bin", "rb") as tokens:
        assert index.read() == megatron_index_bytes(code, np.dtype(dtype).itemsize, [3, 1, 6], [0, 1, 2, 3])
        assert tokens.read() == struct.pack(f"<{len(ids)}{letter}", *ids)


def test_a_megatron_file_of_several_sequences_a_document_opens(tmp_path):
    (tmp_path / "old.idx").write_bytes(megatron_index_bytes(3, 2, [2, 0, 3], [0, 2, 3]))
    (tmp_path / "old.bin").write_bytes(struct.pack("<5h", 1, 2, 3, 4, 5))
    old = IndexedDataset(tmp_path / "old")
    assert [old[i].tolist() for i in range(3)] == [[1, 2], [], [3, 4, 5]]
    assert (len(old), old.num_documents, old.num_tokens, old.meta) == (3, 2, 5, None)


def test_a_writer_that_ends_documents_itself_writes_several_sequences_a_document(tmp_path):
    with IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        for sequence in ([1, 2], [3]):
            writer.add_sequence(sequence)
        writer.end_document()
    assert (tmp_path / "a.idx").read_bytes() == megatron_index_bytes(8, 2, [2, 1], [0, 2])


def test_get_gives_a_part_of_a_document_and_refuses_to_leave_it(write_pair):
    indexed = IndexedDataset(write_pair(DOCUMENTS))
    assert indexed.get(2, 1, 3).tolist() == [10, 11, 12]
    assert indexed.get(2, 4).tolist() == [65, 40]
    assert indexed.get(0, 3).tolist() == []
    with pytest.raises(IndexError):
        indexed.get(0, 1, 3)
    with pytest.raises(IndexError):
        indexed.get(0, -1, 2)


def test_a_dataset_travels_to_another_process_by_name(write_pair):
    indexed = IndexedDataset(write_pair(DOCUMENTS))
    state = pickle.dumps(indexed)
    assert len(state) < 1000
    assert [list(document) for document in pickle.loads(state)] == DOCUMENTS  # noqa: S301


def test_a_file_without_documents_opens(write_pair):
    indexed = IndexedDataset(write_pair([]))
    assert (len(indexed), indexed.num_tokens, indexed.meta.max_token_id) == (0, 0, -1)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 65499), max_size=9), max_size=12), st.integers(0, 12))
def test_merging_equals_writing_everything_at_once(tmp_path_factory, documents, cut):
    folder = tmp_path_factory.mktemp("merge")
    for name, part in (("all", documents), ("a", documents[:cut]), ("b", documents[cut:])):
        with IndexedDatasetWriter(folder / name, np.uint16) as writer:
            for document in part:
                writer.add_document(document)
    with IndexedDatasetWriter(folder / "merged", np.uint16) as writer:
        writer.add_index(folder / "a")
        writer.add_index(folder / "b")
    for ending in (".idx", ".bin"):
        assert (folder / f"merged{ending}").read_bytes() == (folder / f"all{ending}").read_bytes()
    merged, whole = IndexedDataset(folder / "merged").meta, IndexedDataset(folder / "all").meta
    assert merged == whole


def test_merging_changes_the_token_type_or_refuses_what_does_not_fit(write_pair, tmp_path):
    wide = write_pair([[1, 70000]], name="wide", dtype=np.int32)
    narrow = write_pair([[3]], name="narrow", dtype=np.uint16)
    with IndexedDatasetWriter(tmp_path / "both", np.int32) as writer:
        writer.add_index(narrow)
        writer.add_index(wide)
    assert IndexedDataset(tmp_path / "both").tokens.tolist() == [3, 1, 70000]
    with (
        pytest.raises(DataError, match=r"70000.*vocabulary size"),
        IndexedDatasetWriter(tmp_path / "no", np.uint16) as writer,
    ):
        writer.add_index(wide)
    assert not list(tmp_path.glob("*no.*"))


@pytest.mark.parametrize("ids", [[-1], [65536], [1.5], [[1]]])
def test_a_writer_refuses_what_is_not_a_row_of_ids_and_leaves_nothing(tmp_path, ids):
    def write():
        with IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
            writer.add_document([1])
            writer.add_document(ids)

    with pytest.raises(DataError):
        write()
    assert os.listdir(tmp_path) == []


def test_a_killed_writer_leaves_the_older_pair_as_it_was(write_pair, tmp_path):
    prefix = write_pair(DOCUMENTS)
    code = (
        "import os, sys, numpy as np\n"
        "from megatron.data.indexed import IndexedDatasetWriter\n"
        "writer = IndexedDatasetWriter(sys.argv[1], np.uint16)\n"
        "writer.add_document([1] * 100000)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, prefix], check=False)
    assert done.returncode == -9
    assert [list(document) for document in IndexedDataset(prefix)] == DOCUMENTS


def test_the_token_type_follows_megatrons_threshold():
    assert smallest_token_type(65499) == np.uint16
    assert smallest_token_type(65500) == np.int32
    with pytest.raises(DataError, match="float32"):
        IndexedDatasetWriter("nowhere/at/all", np.float32)
    assert not os.path.exists("nowhere")


# Damage: each case changes the two files of a sound pair; none may open, with or without the side file.

HEADER_BYTES = 34
TOKENS = list(range(100, 148))
LENGTHS = [3, 10, 1, 30, 4]


def _poke(index, position, kind, value):
    return index[:position] + struct.pack(kind, value) + index[position + struct.calcsize(kind) :]


SIZES_AT, POINTERS_AT, DOCUMENTS_AT = HEADER_BYTES, HEADER_BYTES + 4 * 5, HEADER_BYTES + 12 * 5
FOREIGN_INDEX = megatron_index_bytes(4, 4, [7, 9], [0, 1, 2])
SWAPPED_POINTERS = struct.pack("<2q", 4 * 13, 4 * 3)

DAMAGE = {
    "index cut in half": lambda i, t: (i[: len(i) // 2], t),
    "index cut inside the header": lambda i, t: (i[:20], t),
    "index one byte short": lambda i, t: (i[:-1], t),
    "index without its last document": lambda i, t: (i[:-8], t),
    "index empty": lambda i, t: (b"", t),
    "index longer by a byte": lambda i, t: (i + b"\0", t),
    "index longer by an entry": lambda i, t: (i + struct.pack("<q", 5), t),
    "index with modes": lambda i, t: (i + b"\0" * 5, t),
    "magic": lambda i, t: (b"X" + i[1:], t),
    "older format": lambda i, t: (b"TNTIDX\0\0" + i[8:], t),
    "version": lambda i, t: (_poke(i, 9, "<Q", 2), t),
    "token type int32 to uint16": lambda i, t: (_poke(i, 17, "<B", 8), t),
    "token type int32 to int64": lambda i, t: (_poke(i, 17, "<B", 5), t),
    "token type int32 to uint8": lambda i, t: (_poke(i, 17, "<B", 1), t),
    "token type float, code 6": lambda i, t: (_poke(i, 17, "<B", 6), t),
    "token type float, code 7": lambda i, t: (_poke(i, 17, "<B", 7), t),
    "token type 0": lambda i, t: (_poke(i, 17, "<B", 0), t),
    "token type 200": lambda i, t: (_poke(i, 17, "<B", 200), t),
    "more sequences than there are": lambda i, t: (_poke(i, 18, "<Q", 6), t),
    "fewer sequences than there are": lambda i, t: (_poke(i, 18, "<Q", 4), t),
    "an absurd number of sequences": lambda i, t: (_poke(i, 18, "<Q", 2**63), t),
    "fewer documents than there are": lambda i, t: (_poke(i, 26, "<Q", 5), t),
    "sequences and documents traded": lambda i, t: (_poke(_poke(i, 18, "<Q", 3), 26, "<Q", 9), t),
    "negative length": lambda i, t: (_poke(i, SIZES_AT + 4, "<i", -10), t),
    "a length one larger": lambda i, t: (_poke(i, SIZES_AT, "<i", 4), t),
    "the last length one larger": lambda i, t: (_poke(i, SIZES_AT + 16, "<i", 5), t),
    "the last length one smaller": lambda i, t: (_poke(i, SIZES_AT + 16, "<i", 3), t),
    "two pointers traded": lambda i, t: (i[: POINTERS_AT + 8] + SWAPPED_POINTERS + i[POINTERS_AT + 24 :], t),
    "a pointer off by a token": lambda i, t: (_poke(i, POINTERS_AT + 8, "<q", 16), t),
    "a pointer past the end": lambda i, t: (_poke(i, POINTERS_AT + 32, "<q", 1 << 40), t),
    "first pointer not 0": lambda i, t: (_poke(i, POINTERS_AT, "<q", 4), t),
    "document index not monotone": lambda i, t: (_poke(i, DOCUMENTS_AT + 8, "<q", 4), t),
    "document index does not begin at 0": lambda i, t: (_poke(i, DOCUMENTS_AT, "<q", 1), t),
    "document index past the end": lambda i, t: (_poke(i, DOCUMENTS_AT + 40, "<q", 6), t),
    "document index ends early": lambda i, t: (_poke(i, DOCUMENTS_AT + 40, "<q", 4), t),
    "tokens cut in half": lambda i, t: (i, t[: len(t) // 2]),
    "tokens a byte short": lambda i, t: (i, t[:-1]),
    "tokens 100 bytes longer": lambda i, t: (i, t + b"\0" * 100),
    "tokens empty": lambda i, t: (i, b""),
    "another file's index": lambda i, t: (FOREIGN_INDEX, t),
    "another file's tokens": lambda i, t: (i, struct.pack("<10i", *range(10))),
    "negative ids": lambda i, t: (i, struct.pack("<48i", *[-token for token in TOKENS])),
}


def _sound_pair(folder, side_file):
    with IndexedDatasetWriter(folder / "text", np.int32) as writer:
        start = 0
        for length in LENGTHS:
            writer.add_document(TOKENS[start : start + length])
            start += length
    if not side_file:
        (folder / "text.meta.json").unlink()
    IndexedDataset(folder / "text")


@pytest.mark.parametrize("side_file", [True, False])
@pytest.mark.parametrize("name", DAMAGE)
def test_no_damaged_pair_opens(tmp_path, name, side_file):
    _sound_pair(tmp_path, side_file)
    index, tokens = tmp_path / "text.idx", tmp_path / "text.bin"
    damaged_index, damaged_tokens = DAMAGE[name](index.read_bytes(), tokens.read_bytes())
    assert (damaged_index, damaged_tokens) != (index.read_bytes(), tokens.read_bytes())
    index.write_bytes(damaged_index)
    tokens.write_bytes(damaged_tokens)
    with pytest.raises(DataError) as refusal:
        IndexedDataset(tmp_path / "text")
    sentence = str(refusal.value)
    assert str(tmp_path / "text.") in sentence
    assert "tools/preprocess_data.py" in sentence or "--dataset-impl mmap" in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("dtype", "code", "change"),
    [
        (np.int32, 4, lambda tokens: np.frombuffer(tokens, "<i4")[::-1].tobytes()),
        (np.int32, 4, lambda tokens: tokens[:-1] + b"\x01"),
        (np.uint16, 3, lambda tokens: tokens),
    ],
    ids=["tokens of another file of equal length", "last byte changed", "unsigned read as signed"],
)
def test_damage_that_keeps_every_size_is_seen_by_the_side_file(write_pair, tmp_path, dtype, code, change):
    prefix = write_pair([TOKENS], dtype=dtype)
    index, tokens = tmp_path / "text.idx", tmp_path / "text.bin"
    index.write_bytes(_poke(index.read_bytes(), 17, "<B", code))
    tokens.write_bytes(change(tokens.read_bytes()))
    with pytest.raises(DataError, match=r"not the file that .*text\.meta\.json was written for"):
        IndexedDataset(prefix)


def test_a_missing_file_is_named(write_pair, tmp_path):
    prefix = write_pair(DOCUMENTS)
    (tmp_path / "text.bin").unlink()
    with pytest.raises(MissingDataError, match=r"text\.bin does not exist"):
        IndexedDataset(prefix)
    with pytest.raises(MissingDataError, match=r"other\.idx does not exist: give the prefix"):
        IndexedDataset(tmp_path / "other")


INDEX_BYTES = HEADER_BYTES + 12 * len(LENGTHS) + 8 * (len(LENGTHS) + 1)


@pytest.mark.parametrize(
    ("side_file", "checked_bytes"), [(False, HEADER_BYTES + 12 * len(LENGTHS)), (True, INDEX_BYTES)]
)
def test_no_index_with_a_changed_byte_opens(tmp_path, side_file, checked_bytes):
    """Without a side file a document may move its end by a sequence: nothing else in the files says where it was."""
    _sound_pair(tmp_path, side_file)
    path = tmp_path / "text.idx"
    sound = path.read_bytes()
    assert len(sound) == INDEX_BYTES

    @settings(max_examples=300, deadline=None)
    @given(position=st.integers(0, checked_bytes - 1), flipped=st.integers(1, 255))
    def refuses(position, flipped):
        path.write_bytes(sound[:position] + bytes([sound[position] ^ flipped]) + sound[position + 1 :])
        with pytest.raises(DataError):
            IndexedDataset(tmp_path / "text")

    refuses()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": 9}', '{"format": 1, "tokenizer": null}'])
def test_a_side_file_that_is_none_is_refused_by_name(write_pair, tmp_path, content):
    prefix = write_pair(DOCUMENTS)
    (tmp_path / "text.meta.json").write_text(content)
    with pytest.raises(DataError, match=r"text\.meta\.json"):
        IndexedDataset(prefix)
