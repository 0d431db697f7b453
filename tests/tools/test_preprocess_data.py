import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron.data.tokenizer.sentencepiece import SentencePieceTokenizer
from tests.tokenizer_files import TEXTS
from tests.tools.conftest import TOOLS

DOCUMENTS = [f"{TEXTS[i % 3]}{i}\n" * (i % 5) for i in range(60)]


def write_jsonl(path, documents=DOCUMENTS):
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents)))
    return path


@pytest.fixture
def flags(tokenizer_model):
    return ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tokenizer_model, "--workers", "1"]


def outputs(folder, prefix="out", key="text"):
    names = [f"{prefix}_{key}_document.{ending}" for ending in ("bin", "idx", "meta.json")]
    return [(folder / name).read_bytes() for name in names]


def test_documents_are_tokenized_in_order_and_end_with_eod(tmp_path, run_tool, flags, tokenizer_model):
    write_jsonl(tmp_path / "a.jsonl")
    run = run_tool("preprocess_data.py", "--input", "a.jsonl", "--output-prefix", "sub/out", "--append-eod", *flags)
    assert run.returncode == 0, run.stderr
    tokenizer = SentencePieceTokenizer(tokenizer_model)
    expected = [[*tokenizer.encode(text), tokenizer.eod_id] for text in DOCUMENTS if text]
    dataset = IndexedDataset(tmp_path / "sub/out_text_document")
    assert [list(map(int, dataset[i])) for i in range(len(dataset))] == expected
    assert dataset.dtype == np.uint16
    meta = dataset.meta
    assert (meta.documents, meta.tokens) == (len(expected), sum(map(len, expected)))
    assert meta.max_token_id == max(map(max, expected))
    assert meta.tokenizer.fingerprint == tokenizer.fingerprint
    assert (meta.tokenizer.name, meta.tokenizer.vocab_size) == ("SentencePieceTokenizer", tokenizer.vocab_size)
    assert "48 documents" in run.stdout
    assert "12 empty texts left out" in run.stdout
    assert "tokens/s" in run.stderr
    assert [path.name for path in (tmp_path / "sub").glob("*") if "document" not in path.name] == []


def test_output_is_the_same_for_any_number_of_workers_and_size_of_shards(tmp_path, run_tool, flags):
    write_jsonl(tmp_path / "a.jsonl")
    results = []
    for workers, megabytes in ((1, 64), (1, 0.003), (3, 0.002)):
        run = run_tool(
            *("preprocess_data.py", "--input", "a.jsonl", "--output-prefix", "out", "--overwrite", *flags),
            *("--workers", workers, "--shard-megabytes", megabytes),
        )
        assert run.returncode == 0, run.stderr
        results.append(outputs(tmp_path))
    assert results[0] == results[1] == results[2]


def test_packed_and_parquet_inputs_equal_the_plain_one(tmp_path, run_tool, flags):
    import pyarrow
    import pyarrow.parquet
    import zstandard

    plain = write_jsonl(tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(plain))
    pyarrow.parquet.write_table(pyarrow.table({"body": DOCUMENTS}), tmp_path / "a.parquet", row_group_size=13)
    results = []
    for name, more in (
        ("a.jsonl", []),
        ("a.jsonl.gz", []),
        ("a.jsonl.zst", []),
        ("a.parquet", ["--parquet-column", "body"]),
    ):
        run = run_tool(
            *("preprocess_data.py", "--input", name, "--output-prefix", name, *flags, *more),
            *("--shard-megabytes", 0.003),
        )
        assert run.returncode == 0, run.stderr
        results.append(outputs(tmp_path, name))
    assert all(result == results[0] for result in results)


def test_each_key_has_an_output_of_its_own(tmp_path, run_tool, flags):
    (tmp_path / "a.jsonl").write_text('{"title": "one", "body": "def area"}\n{"title": "two", "body": ""}\n')
    run = run_tool(
        "preprocess_data.py", "--input", "a.jsonl", "--output-prefix", "out", "--json-keys", "title", "body", *flags
    )
    assert run.returncode == 0, run.stderr
    assert len(IndexedDataset(tmp_path / "out_title_document")) == 2
    assert len(IndexedDataset(tmp_path / "out_body_document")) == 1


# --- malformed lines ---


def write_with_bad_lines(folder):
    lines = (json.dumps({"text": f"line {i} " * 9}) for i in range(1, 41))
    content = [*lines]
    content[2], content[29] = '{"text": "unfinished', '{"other": 1}'
    (folder / "bad.jsonl").write_text("\n".join(content) + "\n")
    write_jsonl(folder / "good.jsonl")


@pytest.mark.parametrize("megabytes", [64, 0.001])
def test_malformed_lines_are_skipped_counted_and_listed_with_file_and_line(tmp_path, run_tool, flags, megabytes):
    write_with_bad_lines(tmp_path)
    run = run_tool(
        *("preprocess_data.py", "--input", "good.jsonl", "bad.jsonl", "--output-prefix", "out", *flags),
        *("--shard-megabytes", megabytes),
    )
    assert run.returncode == 0, run.stderr
    assert "2 malformed lines left out, all of them in out.errors.jsonl" in run.stdout
    assert "bad.jsonl:3: not JSON (Unterminated string" in run.stdout
    assert "bad.jsonl:30: no key 'text'" in run.stdout
    errors = [json.loads(line) for line in (tmp_path / "out.errors.jsonl").read_text().splitlines()]
    assert [(error["file"], error["line"]) for error in errors] == [("bad.jsonl", 3), ("bad.jsonl", 30)]
    assert errors[0]["begins"] == '{"text": "unfinished'
    assert len(IndexedDataset(tmp_path / "out_text_document")) == 48 + 38


@pytest.mark.parametrize("megabytes", [64, 0.001])
def test_stop_ends_at_a_malformed_line_with_file_and_line_and_no_output(tmp_path, run_tool, flags, megabytes):
    write_with_bad_lines(tmp_path)
    command = ("preprocess_data.py", "--input", "bad.jsonl", "--output-prefix", "out", *flags)
    run = run_tool(*command, "--on-error", "stop", "--shard-megabytes", megabytes)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("preprocess_data: error: bad.jsonl:3: not JSON (Unterminated string")
    assert not list(tmp_path.glob("out_text_document*"))


def test_stop_does_not_pass_over_what_an_earlier_run_has_skipped(tmp_path, run_tool, flags, tokenizer_model):
    write_with_bad_lines(tmp_path)
    command = ("preprocess_data.py", "--input", "bad.jsonl", "--output-prefix", "out", *flags)
    command += ("--shard-megabytes", 0.001)
    interrupt(tmp_path, command, "skip")
    run = run_tool(*command, "--on-error", "stop")
    assert run.returncode == 2
    assert "bad.jsonl:3: not JSON" in run.stderr


def interrupt(folder, command, on_error):
    """Leave finished parts behind, as a run does that is killed before it joins them."""
    from megatron.data.preprocess import run as job
    from tools.preprocess_data import build_settings, parse_arguments

    class KilledError(Exception):
        pass

    def die(*arguments):
        raise KilledError

    settings = build_settings(parse_arguments([*map(str, command[1:]), "--on-error", on_error]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(job, "_join", die)
        with pytest.raises(KilledError):
            job.preprocess(settings)


def test_inputs_without_a_single_document_are_an_error(tmp_path, run_tool, flags):
    (tmp_path / "a.jsonl").write_text('nonsense\n{"text": ""}\n')
    run = run_tool("preprocess_data.py", "--input", "a.jsonl", "--output-prefix", "out", *flags)
    assert run.returncode == 2
    assert "1 of 2 lines are malformed, 1 texts are empty; a.jsonl:1: not JSON" in run.stderr
    assert [path.name for path in tmp_path.glob("out*")] == ["out.errors.jsonl"]


def test_words_that_are_no_ids_are_malformed_documents_of_the_null_tokenizer(tmp_path, run_tool):
    (tmp_path / "a.jsonl").write_text('{"text": "1 2 3"}\n{"text": "4 five"}\n{"text": "6"}\n')
    run = run_tool(
        *("preprocess_data.py", "--input", "a.jsonl", "--output-prefix", "out", "--workers", 1),
        *("--tokenizer-type", "NullTokenizer", "--vocab-size", 10),
    )
    assert run.returncode == 0, run.stderr
    assert "a.jsonl:2: 'five' is not an id below the vocabulary size 10" in run.stdout
    assert IndexedDataset(tmp_path / "out_text_document").tokens.tolist() == [1, 2, 3, 6]


# --- kills ---


def test_run_killed_at_any_moment_goes_on_to_the_same_bytes(tmp_path, run_tool, flags):
    write_jsonl(tmp_path / "a.jsonl", DOCUMENTS * 5)
    command = ["preprocess_data.py", "--input", "a.jsonl", *flags, "--workers", 2, "--shard-megabytes", 0.001]
    assert run_tool(*command, "--output-prefix", "whole").returncode == 0
    killed_words = [sys.executable, TOOLS / command[0], *command[1:], "--output-prefix", "out"]
    wait_for = random.Random(1)
    kills = 0
    for parts in (2, 8, 14):
        run = subprocess.Popen([*map(str, killed_words)], cwd=tmp_path, stderr=subprocess.DEVNULL)
        while run.poll() is None and len(list(tmp_path.glob("out.parts/0*[0-9].json"))) < parts:
            time.sleep(0.002)
        time.sleep(wait_for.uniform(0, 0.02))
        run.send_signal(signal.SIGKILL)
        kills += run.wait() == -signal.SIGKILL
        assert not (tmp_path / "out_text_document.idx").exists() or run.returncode == 0
    assert kills == 3
    run = run_tool(*command, "--output-prefix", "out")
    assert run.returncode == 0, run.stderr
    assert outputs(tmp_path, "out") == outputs(tmp_path, "whole")
    assert not (tmp_path / "out.parts").exists()


def test_run_killed_while_it_joins_the_parts_leaves_nothing_behind(tmp_path, run_tool, flags):
    write_jsonl(tmp_path / "a.jsonl")
    command = ("preprocess_data.py", "--input", "a.jsonl", "--output-prefix", "out", *flags)
    interrupt(tmp_path, command, "skip")
    IndexedDatasetWriter(tmp_path / "out_text_document", np.uint16)  # it is killed while this is open
    IndexedDatasetWriter(tmp_path / "other_text_document", np.uint16)
    assert run_tool(*command).returncode == 0
    assert not list(tmp_path.glob(".out*"))
    assert len(list(tmp_path.glob(".other*"))) == 3


def test_finished_parts_are_not_made_again(tmp_path, run_tool, flags):
    write_jsonl(tmp_path / "a.jsonl")
    command = ("preprocess_data.py", "--input", "a.jsonl", "--output-prefix", "out", *flags, "--shard-megabytes", 0.004)
    interrupt(tmp_path, command, "skip")
    for ending in ("text.bin", "text.idx", "text.meta.json"):  # a finished part that says something else
        (tmp_path / f"out.parts/00000000.{ending}").write_bytes(
            (tmp_path / f"out.parts/00000001.{ending}").read_bytes()
        )
    second = IndexedDataset(tmp_path / "out.parts/00000001.text").tokens.tolist()
    assert run_tool(*command).returncode == 0
    assert IndexedDataset(tmp_path / "out_text_document").tokens[: len(second)].tolist() == second


def test_unfinished_run_of_other_flags_is_not_taken_over(tmp_path, run_tool, flags):
    write_jsonl(tmp_path / "a.jsonl")
    command = ("preprocess_data.py", "--input", "a.jsonl", "--output-prefix", "out", *flags)
    interrupt(tmp_path, command, "skip")
    run = run_tool(*command, "--append-eod", "--text-document", "line")
    assert run.returncode == 2
    assert "holds an unfinished run that differs in: --append-eod, --text-document" in run.stderr
    assert run_tool(*command, "--append-eod", "--overwrite").returncode == 0


def test_worker_that_dies_is_an_error_without_output(tmp_path, run_tool, flags, tokenizer_model):
    write_jsonl(tmp_path / "a.jsonl", DOCUMENTS * 10)
    command = [sys.executable, TOOLS / "preprocess_data.py", "--input", "a.jsonl", "--output-prefix", "out", *flags]
    run = subprocess.Popen(
        [*map(str, command), "--shard-megabytes", "0.002"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob("out.parts/0*[0-9].json")):
        time.sleep(0.002)
    for worker in worker_processes(run.pid):
        os.kill(worker, signal.SIGKILL)
    error = run.communicate(timeout=60)[1]
    assert run.returncode == 2
    assert "error: A worker was ended by SIGKILL (out of memory?): the same command goes on from here." in error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("out_text_document*"))


def worker_processes(parent):
    with open(f"/proc/{parent}/task/{parent}/children") as file:
        children = [int(word) for word in file.read().split()]
    for child in children:
        with open(f"/proc/{child}/cmdline") as file:
            if "spawn_main" in file.read():
                yield child


def test_two_runs_do_not_write_the_same_output(tmp_path, run_tool, flags):
    from pathlib import Path

    from megatron.data.preprocess.parts import PartFolder

    write_jsonl(tmp_path / "a.jsonl")
    with PartFolder(Path(tmp_path / "out.parts")).lock():
        run = run_tool("preprocess_data.py", "--input", "a.jsonl", "--output-prefix", "out", *flags)
    assert run.returncode == 2
    assert "is in use by another run" in run.stderr


def test_output_that_is_there_is_replaced_only_when_told(tmp_path, run_tool, flags):
    write_jsonl(tmp_path / "a.jsonl")
    command = ("preprocess_data.py", "--input", "a.jsonl", "--output-prefix", "out", *flags)
    assert run_tool(*command).returncode == 0
    before = outputs(tmp_path)
    run = run_tool(*command, "--append-eod")
    assert run.returncode == 2
    assert "out_text_document.idx is there already: replace it with --overwrite" in run.stderr
    assert outputs(tmp_path) == before
    assert run_tool(*command, "--append-eod", "--overwrite").returncode == 0
    assert outputs(tmp_path) != before


# --- the command itself ---


def test_neither_torch_nor_deepspeed_is_imported_by_the_tool_or_its_workers(tmp_path, run_tool, flags):
    for name in ("torch", "deepspeed"):
        (tmp_path / "barred" / name).mkdir(parents=True)
        (tmp_path / "barred" / name / "__init__.py").write_text(f"raise RuntimeError('{name} was imported')")
    write_jsonl(tmp_path / "a.jsonl")
    run = run_tool(
        *("preprocess_data.py", "--input", "a.jsonl", "--output-prefix", "out", *flags),
        env={**os.environ, "PYTHONPATH": str(tmp_path / "barred")},
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("tool", ["preprocess_data.py", "merge_datasets.py", "train_tokenizer.py"])
def test_help_imports_nothing_heavy(tool):
    command = [sys.executable, "-X", "importtime", str(TOOLS / tool), "--help"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0
    assert "usage:" in run.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in run.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "numpy", "rich", "sentencepiece", "tokenizers", "multiprocessing"}


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--workers", "0"], "--workers 0 is too small"),
        (["--shard-megabytes", "0"], "--shard-megabytes 0.0 is too small"),
        (["--json-keys", "a", "b", "--parquet-column", "c"], "--parquet-column names one column"),
        (["--input", "missing.jsonl"], "--input missing.jsonl does not exist"),
        (["--tokenizer-model", "missing.model"], "--tokenizer-model missing.model does not exist"),
        (["--vocab-size", "5"], "--vocab-size 5 is less than"),
    ],
)
def test_wrong_flags_are_one_sentence_and_exit_code_2(tmp_path, run_tool, flags, more, sentence):
    write_jsonl(tmp_path / "a.jsonl")
    run = run_tool("preprocess_data.py", "--input", "a.jsonl", "--output-prefix", "out", *flags, *more)
    assert run.returncode == 2
    assert sentence in run.stderr
    assert "Traceback" not in run.stderr
    assert not list(tmp_path.glob("out*"))
