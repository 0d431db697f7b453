import gzip
import json
import re

import pytest

from megatron.config.errors import UserError
from megatron.data.preprocess.documents import Document, Malformed, Piece, PieceReader, ReadingRules
from megatron.data.preprocess.inputs import find_inputs, kind_of, open_content
from megatron.data.preprocess.shards import ShardPlanner, lines_before


def read(path, **rules):
    return list(PieceReader(Piece(path=str(path)), ReadingRules(**rules)))


def texts(items):
    return [item.texts[0] for item in items if isinstance(item, Document)]


def zstd(content):
    import zstandard

    return zstandard.compress(content)


def write_parquet(path, **columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=7)
    return path


# --- JSON lines ---


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"{broken", r"not JSON \(Expecting property name enclosed in double quotes, column 2\)"),
        (b'["a"]', "not a JSON object"),
        (b'{"body": "a"}', "no key 'text'"),
        (b'{"text": 3}', "'text' is not text but int"),
        (b'{"text": null}', "'text' is not text but NoneType"),
        (b'{"text": "\\ud800"}', "'text' holds half a surrogate pair"),
        (b'{"text": "\xff"}', r"not UTF-8 \(byte 0xff\)"),
        (b"[" * 100_000, "not JSON that can be read"),
    ],
)
def test_malformed_line_is_told_with_its_line_and_reason(tmp_path, raw, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n\n' + raw + b'\n{"text": "last"}')
    first, malformed, last = read(path)
    assert (first, last) == (Document(1, ("first",)), Document(4, ("last",)))
    assert isinstance(malformed, Malformed)
    assert malformed.line == 3
    assert re.match(reason, malformed.reason)
    assert len(malformed.excerpt) <= 400


def test_several_keys_are_taken_in_their_order(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "1", "b": "2"}\n')
    assert read(path, keys=("b", "a")) == [Document(1, ("2", "1"))]


def test_text_has_no_keys(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="is text, which has no keys"):
        read(tmp_path / "a.txt", keys=("a", "b"))


# --- text ---


def test_text_file_is_one_document_with_every_byte_kept(tmp_path):
    path = tmp_path / "a.py"
    path.write_bytes(b"\r\n  a\n\n\tb\n")
    assert read(path) == [Document(1, ("\r\n  a\n\n\tb\n",))]


def test_text_by_line_and_by_blank_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\none\ntwo\r\n \nthree\n\n\nfour")
    assert texts(read(path, text_document="line")) == ["", "one", "two", " ", "three", "", "", "four"]
    assert read(path, text_document="blank-line") == [
        Document(2, ("one\ntwo",)),
        Document(5, ("three",)),
        Document(8, ("four",)),
    ]


def test_text_that_is_not_utf8_is_told_with_the_line_of_the_byte(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"one\ntwo\nthr\xe9e\n")
    for unit, line in (("file", 3), ("line", 3), ("blank-line", 3)):
        malformed = [item for item in read(path, text_document=unit) if isinstance(item, Malformed)]
        assert [(item.line, item.reason) for item in malformed] == [(line, "not UTF-8 (byte 0xe9)")]


# --- Parquet ---


def test_parquet_rows_are_documents_and_other_values_are_malformed(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", body=["one", None, "three"])
    first, malformed, last = read(path, columns=("body",))
    assert (first.texts, last.texts, last.line) == (("one",), ("three",), 3)
    assert malformed[:2] == (2, "'body' is not text but NoneType")


def test_parquet_without_the_column_names_those_there_are(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", body=["one"], title=["t"])
    with pytest.raises(UserError, match="no column 'text': name one of body, title with --parquet-column"):
        read(path)


def test_what_is_not_parquet_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="is not a Parquet file"):
        read(tmp_path / "a.parquet")


# --- compression ---

LINES = b"".join(json.dumps({"text": f"line {i} " * 50}).encode() + b"\n" for i in range(2000))


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".zst", zstd)])
def test_compressed_content_equals_the_plain_one_also_in_several_frames(tmp_path, ending, pack):
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(pack(LINES[:1000]) + pack(LINES[1000:]))
    with open_content(path) as content:
        assert content.read() == LINES
    assert len(read(path)) == 2000


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".zst", zstd)])
@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_cut_or_foreign_compressed_file_is_refused(tmp_path, ending, pack, damage):
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(pack(LINES)[:-20] if damage == "cut" else b"plain text, not packed")
    with pytest.raises(UserError, match=f"{path} is cut or damaged"):
        read(path)


# --- inputs ---


def test_kind_is_known_by_the_ending():
    names = {"a.jsonl": "jsonl", "a.json.gz": "jsonl", "a.PARQUET": "parquet", "a.txt.zst": "text", "README": "text"}
    assert {name: kind_of(name) for name in names} == names


def test_folders_and_patterns_are_sorted_and_files_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "d/b.py",
        "d/a.py",
        "d/sub/c.jsonl.gz",
        "d/.git/x.py",
        "d/picture.png",
        "z.txt",
        "y.txt",
        "d/out_text_document.meta.json",
        "d/out.errors.jsonl",
        "d/out.parts/00000000.json",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    assert list(map(str, find_inputs(["z.txt", "y.txt", "d"]))) == [
        "z.txt", "y.txt", "d/a.py", "d/b.py", "d/sub/c.jsonl.gz"
    ]  # fmt: skip
    assert list(map(str, find_inputs(["d/**/*.py"]))) == ["d/a.py", "d/b.py"]
    assert list(map(str, find_inputs(["d/**/*.json*"]))) == ["d/sub/c.jsonl.gz"]
    with pytest.raises(UserError, match=r"names d/a\.py twice"):
        find_inputs(["d/a.py", "d"])
    for nothing in ("no.txt", "*.cpp"):
        with pytest.raises(UserError, match="does not exist"):
            find_inputs([nothing])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"is a folder without a file that ends in \.jsonl"):
        find_inputs(["empty"])


# --- shards ---

PARAGRAPHS = "\n\n".join(f"paragraph {i}\n" + "more\n" * (i % 4) for i in range(40)).encode()


def shards_of(inputs, shard_bytes, folder, **rules):
    return list(ShardPlanner(inputs, ReadingRules(**rules), shard_bytes, folder, lambda number: False))


@pytest.mark.parametrize("shard_bytes", [1, 7, 50, 51, 52, 53, 333, 10_000])
@pytest.mark.parametrize("unit", ["line", "blank-line"])
@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_shards_hold_the_documents_of_the_whole_file_and_their_lines(tmp_path, shard_bytes, unit, ending):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstd}[ending]
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(pack(PARAGRAPHS))
    whole = read(path, text_document=unit)
    rules = ReadingRules(text_document=unit)
    shards = shards_of([path], shard_bytes, tmp_path, text_document=unit)
    assert [shard.number for shard in shards] == list(range(len(shards)))
    assert sum(shard.input_bytes for shard in shards) == path.stat().st_size
    found = []
    for shard in shards:
        for piece in shard.pieces:
            found += [Document(item.line + lines_before(piece), item.texts) for item in PieceReader(piece, rules)]
    assert found == whole
    if shard_bytes == 50:
        assert len(shards) > 5


def test_parquet_shards_are_row_groups(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", text=[f"row {i}" for i in range(30)])
    shards = shards_of([path], 1, tmp_path)
    assert [(shard.pieces[0].start, shard.pieces[0].end) for shard in shards] == [(i, i + 1) for i in range(5)]
    assert sum(shard.input_bytes for shard in shards) == path.stat().st_size
    rows = [
        (item.line + lines_before(shard.pieces[0]), item.texts[0])
        for shard in shards
        for item in PieceReader(shard.pieces[0], ReadingRules())
    ]
    assert rows == [(i + 1, f"row {i}") for i in range(30)]


def test_small_files_are_gathered_and_never_cut(tmp_path):
    paths = []
    for i in range(10):
        paths.append(tmp_path / f"{i}.txt")
        paths[-1].write_text("x" * 10)
    shards = shards_of(paths, 25, tmp_path)
    assert [len(shard.pieces) for shard in shards] == [3, 3, 3, 1]
    assert [piece.path for shard in shards for piece in shard.pieces] == list(map(str, paths))
