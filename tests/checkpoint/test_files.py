"""Files of a checkpoint: what other readers see is what was written, and the digest is that of the bytes on disk."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.files import DTYPES, digest_of, read_json, write_json, write_tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_safetensors_reads_what_was_written(tmp_path, dtype):
    written = {
        "matrix": torch.arange(12).view(3, 4).to(dtype).t(),  # not contiguous
        "none": torch.empty(0, 3, dtype=dtype),
        "scalar": torch.ones((), dtype=dtype),
    }
    digest = write_tensors(tmp_path / "a.safetensors", written)
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == written.keys()
    for key, tensor in written.items():
        assert read[key].dtype == dtype
        assert torch.equal(read[key], tensor)
    assert digest == digest_of(tmp_path / "a.safetensors")


def test_the_digest_is_taken_over_all_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron.checkpoint.files.CHUNK_BYTES", 100)
    tensor = torch.randn(1001)
    digest = write_tensors(tmp_path / "a.safetensors", {"x": tensor}, {"step": "3"})
    data = (tmp_path / "a.safetensors").read_bytes()
    assert (digest.bytes, digest.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], tensor)


def test_a_dtype_without_a_name_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="x has the dtype torch"):
        write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1, dtype=torch.complex64)})


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000])
def test_what_is_no_json_object_is_named(tmp_path, text):
    path = tmp_path / "state.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        read_json(path)


def test_json_comes_back(tmp_path):
    digest = write_json(tmp_path / "state.json", {"a": [1, None]})
    assert read_json(tmp_path / "state.json") == {"a": [1, None]}
    assert digest == digest_of(tmp_path / "state.json")
