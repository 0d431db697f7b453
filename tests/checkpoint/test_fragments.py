"""Fragments that one layout wrote come back, bit for bit, in whatever parts another layout asks for."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.files import read_json, write_json
from megatron.checkpoint.fragments import Fragment, LogicalTensors, describe_tensors, open_tensors, write_fragments
from megatron.checkpoint.ranges import rectangles, shard_numel, shard_shape
from megatron.checkpoint.table import parse_tensors
from megatron.parallel.sharding import Sharding, slice_of

RANKS = (1, 2, 4, 8)


@st.composite
def divisions(draw):
    """A way to divide a tensor, for any of `RANKS` ranks."""
    kind = draw(st.sampled_from(("whole", "rows", "columns", "qkv", "gate and up", "vocabulary")))
    size, other = 8 * draw(st.integers(1, 3)), draw(st.integers(1, 7))
    if kind == "whole":
        return Sharding(logical_shape=(size,) if draw(st.booleans()) else (size, other), dim=None)
    if kind == "columns":
        return Sharding(logical_shape=(other, size), dim=1)
    if kind == "qkv":
        groups, queries = draw(st.sampled_from((1, 2, 4, 8))), draw(st.integers(1, 3))
        rows = groups * 8 * (queries + 2)
        shape = (rows, other) if draw(st.booleans()) else (rows,)
        return Sharding(logical_shape=shape, dim=0, blocks=(queries, 1, 1), groups=groups)
    if kind == "gate and up":
        return Sharding(logical_shape=(2 * size, other), dim=0, blocks=(1, 1))
    padding = draw(st.integers(0, size - 1)) if kind == "vocabulary" else 0
    return Sharding(logical_shape=(size, other), dim=0, padding=padding)


def over(sharding: Sharding, ranks: int, rank: int = 0) -> Sharding:
    return sharding if sharding.dim is None else replace(sharding, num_shards=ranks, rank=rank)


def shards(sharding, ranks):
    return [over(sharding, ranks, rank) for rank in range(1 if sharding.dim is None else ranks)]


def logical(sharding):
    return torch.arange(math.prod(sharding.logical_shape), dtype=torch.float32).view(sharding.logical_shape)


def write(folder, tensors, ranks, cuts, kind="weight"):
    """Write tensors as so many tensor ranks do, each shard cut at `cuts` (fractions) over replicas."""
    records = []
    for rank in range(ranks):
        fragments = []
        for name, (tensor, division) in tensors.items():
            if rank and division.dim is None:
                continue
            own = over(division, ranks, rank)
            flat = slice_of(tensor, own).contiguous().flatten()
            ends = sorted({0, flat.numel(), *(int(cut * flat.numel()) for cut in cuts)})
            for start, end in itertools.pairwise(ends):
                fragments.append(Fragment(name, kind, own, start, flat[start:end]))
        written, files = write_fragments(folder, rank, fragments)
        assert all((folder / file).stat().st_size == digest.bytes for file, digest in files.items())
        records += written
    write_json(folder / "tensors.json", describe_tensors(records))
    return open_tensors(folder)


@settings(max_examples=150, deadline=None)
@given(
    divisions(),
    st.sampled_from(RANKS),
    st.lists(st.floats(0, 1), max_size=4),
    st.sampled_from(RANKS),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_any_range_of_any_division_is_what_a_slice_of_the_logical_tensor_has(
    tmp_path_factory, division, saved, cuts, loaded, first, last
):
    tensor = logical(division)
    tensors = write(tmp_path_factory.mktemp("c"), {"w": (tensor, division)}, saved, cuts)
    for sharding in shards(division, loaded):
        shard = slice_of(tensor, sharding)
        assert shard.shape == shard_shape(sharding)
        start, end = sorted((int(first * shard.numel()), int(last * shard.numel())))
        for low, high in ((0, shard.numel()), (start, end)):
            expected = shard.contiguous().flatten()[low:high]
            assert torch.equal(tensors.read_range("w", "weight", sharding, low, high - low), expected)


@settings(max_examples=60, deadline=None)
@given(divisions(), st.sampled_from(RANKS), st.lists(st.floats(0, 1), max_size=4), st.floats(0, 1), st.floats(0, 1))
def test_bands_of_rows_are_those_of_the_logical_tensor(tmp_path_factory, division, saved, cuts, first, last):
    tensor = logical(division)
    tensors = write(tmp_path_factory.mktemp("c"), {"w": (tensor, division)}, saved, cuts)
    start, end = sorted((int(first * len(tensor)), int(last * len(tensor))))
    assert torch.equal(tensors.read("w", rows=range(start, end)), tensor[start:end])
    assert torch.equal(tensors.read("w"), tensor)
    assert tensors.shape("w") == tensor.shape
    assert tensors.padding("w") == division.padding


@settings(max_examples=100, deadline=None)
@given(divisions(), st.sampled_from(RANKS), st.floats(0, 1), st.floats(0, 1))
def test_rectangles_hold_every_entry_of_a_range_once(division, ranks, first, last):
    for sharding in shards(division, ranks):
        start, end = sorted((int(first * shard_numel(sharding)), int(last * shard_numel(sharding))))
        places = torch.zeros(end - start)
        for rectangle in rectangles(sharding, sharding.dim or 0, start, end - start):
            rectangle.of(places).add_(1)
        assert torch.equal(places, torch.ones(end - start))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 5),
    st.sampled_from(RANKS),
    st.sampled_from(RANKS),
    st.integers(0, 9),
    st.floats(0, 1),
)
def test_padding_may_be_another_than_it_was(tmp_path_factory, rows, width, saved, loaded, more, cut):
    def padded(ranks):
        size = -(-(rows + more * (ranks == loaded)) // ranks) * ranks
        return Sharding(logical_shape=(size, width), dim=0, padding=size - rows)

    before, after = padded(saved), padded(loaded)
    tensor = torch.zeros(before.logical_shape)
    tensor[:rows] = torch.rand(rows, width)
    tensors = write(tmp_path_factory.mktemp("c"), {"w": (tensor, before)}, saved, [cut])
    expected = torch.zeros(after.logical_shape)
    expected[:rows] = tensor[:rows]
    for sharding in shards(after, loaded):
        shard = slice_of(expected, sharding).flatten()
        assert torch.equal(tensors.read_range("w", "weight", sharding, 0, shard.numel()), shard)
    with pytest.raises(CheckpointError, match="in this model"):
        tensors.read_range("w", "weight", replace(after, padding=after.padding + 1), 0, 1)


QKV = Sharding(logical_shape=(64, 4), dim=0, blocks=(2, 1, 1), groups=4)


def test_a_range_within_one_fragment_is_read_without_a_copy(tmp_path):
    tensors = write(tmp_path, {"w": (logical(QKV), QKV)}, 2, [0.5])
    again = [tensors.read_range("w", "weight", over(QKV, 2, 1), 3, 20) for _ in range(2)]
    assert again[0].data_ptr() == again[1].data_ptr()


def test_kinds_and_dtypes_of_a_tensor_are_its_own(tmp_path):
    tensor = logical(QKV)
    own = over(QKV, 1)
    fragments = [
        Fragment("w", "exp_avg", own, 0, tensor.flatten().bfloat16()),
        Fragment("w", "weight", own, 0, tensor.flatten()),
        Fragment("odd", "weight", Sharding(logical_shape=(3,), dim=None), 0, torch.ones(3).bfloat16()),
    ]
    records, _ = write_fragments(tmp_path, 0, fragments)
    tensors = LogicalTensors(tmp_path, parse_tensors(describe_tensors(records)))
    assert tensors.names == ("odd", "w")
    assert set(tensors.kinds("w")) == {"exp_avg", "weight"}
    assert tensors.dtype("w", "exp_avg") == torch.bfloat16
    assert torch.equal(tensors.read("w", "exp_avg"), tensor.bfloat16())
    with pytest.raises(CheckpointError, match="no exp_avg_sq of w, only"):
        tensors.read("w", "exp_avg_sq")
    with pytest.raises(CheckpointError, match="no tensor x"):
        tensors.read("x")


def records_of(tmp_path):
    flat = logical(QKV).flatten()
    fragments = [Fragment("w", "weight", over(QKV, 1), start, flat[start : start + 64]) for start in range(0, 256, 64)]
    return write_fragments(tmp_path, 0, fragments)[0]


def test_missing_entries_are_named(tmp_path):
    records = records_of(tmp_path)
    with pytest.raises(CheckpointError, match=r"w \(weight\), shard 0 of 1: entries 64 to 127 are missing"):
        describe_tensors([records[0], *records[2:]])
    with pytest.raises(CheckpointError, match="entries 192 to 255 are missing"):
        describe_tensors(records[:3])


def test_entries_written_twice_are_named(tmp_path):
    records = records_of(tmp_path)
    with pytest.raises(CheckpointError, match=r"w \(weight\), shard 0 of 1: entry 64 is written twice"):
        describe_tensors([*records, {**records[1], "file": "tensors_00001_00.safetensors"}])


def test_a_list_of_tensors_with_a_hole_is_refused_when_it_is_read(tmp_path):
    write(tmp_path, {"w": (logical(QKV), QKV)}, 2, [0.5])
    content = read_json(tmp_path / "tensors.json")
    content["tensors"]["w"]["kinds"]["weight"]["fragments"].pop(1)
    write_json(tmp_path / "tensors.json", content)
    with pytest.raises(CheckpointError, match="entries 64 to 127 are missing"):
        open_tensors(tmp_path).read("w")


def test_ranks_that_divide_a_tensor_differently_are_refused(tmp_path):
    records = records_of(tmp_path)
    other = {**records[1], "sharding": {**records[1]["sharding"], "groups": 2}}
    with pytest.raises(CheckpointError, match="divided in one way"):
        describe_tensors([records[0], other])


def test_another_shape_is_refused_with_both(tmp_path):
    tensors = write(tmp_path, {"w": (logical(QKV), QKV)}, 2, [])
    other = replace(QKV, logical_shape=(64, 8))
    with pytest.raises(CheckpointError, match=r"\(64, 4\).*\(64, 8\)"):
        tensors.read_range("w", "weight", other, 0, 8)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("file", "../../etc/passwd"),
        ("file", "/etc/passwd"),
        ("file", ".hidden"),
        ("file", 7),
        ("start", -1),
        ("start", True),
        ("length", 0),
        ("length", 1.5),
        ("shard", 2),
        ("key", None),
    ],
)
def test_nonsense_in_the_list_of_tensors_is_refused(tmp_path, place, value):
    write(tmp_path, {"w": (logical(QKV), QKV)}, 2, [])
    content = read_json(tmp_path / "tensors.json")
    fragment = content["tensors"]["w"]["kinds"]["weight"]["fragments"][0]
    fragment[("shard", "start", "length", "file", "key").index(place)] = value
    with pytest.raises(CheckpointError, match="damaged"):
        parse_tensors(content)


def test_a_missing_truncated_or_swapped_file_is_named(tmp_path):
    write(tmp_path, {"w": (logical(QKV), QKV)}, 2, [])
    first, second = tmp_path / "tensors_00000_00.safetensors", tmp_path / "tensors_00001_00.safetensors"
    content = first.read_bytes()
    for damage in (lambda: first.unlink(), lambda: first.write_bytes(content[:-8]), lambda: first.write_bytes(b"")):
        damage()
        with pytest.raises(CheckpointError, match="tensors_00000_00"):
            open_tensors(tmp_path).read("w")
    write_fragments(tmp_path, 0, [Fragment("w", "weight", over(QKV, 2), 0, torch.zeros(5))])
    with pytest.raises(CheckpointError, match="instead of 128 entries"):
        open_tensors(tmp_path).read("w")
    assert second.exists()
