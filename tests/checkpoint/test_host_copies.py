"""Copies on the host are what the fragments were, in memory that is used again."""

from dataclasses import replace

import pytest
import torch

from megatron.checkpoint.host_copies import HostCopies
from tests.checkpoint import toy


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_copies_keep_what_the_next_step_changes(device):
    fragments = [replace(one, tensor=one.tensor.to(device)) for one in toy.fragments(3)]
    copies = HostCopies()
    needed = copies.missing_bytes(fragments)
    taken = copies.take(fragments)
    for one in fragments:
        one.tensor.zero_()
    assert copies.missing_bytes(fragments) == 0
    assert needed == sum(one.tensor.nbytes for one in taken)
    for copy, original in zip(taken, toy.fragments(3), strict=True):
        assert torch.equal(copy.tensor, original.tensor)
        assert copy.tensor.is_pinned() == (device == "cuda")
        assert (copy.name, copy.kind, copy.start) == (original.name, original.kind, original.start)
    again = copies.take(fragments)
    assert [one.tensor.data_ptr() for one in again] == [one.tensor.data_ptr() for one in taken]
    assert all(not one.tensor.any() for one in again)


def test_a_fragment_of_another_size_gets_memory_of_its_own():
    copies = HostCopies()
    copies.take(toy.fragments(1, size=1))
    halves = toy.fragments(1, rank=0, size=2)
    assert copies.missing_bytes(halves) == sum(one.tensor.nbytes for one in halves)
    assert torch.equal(copies.take(halves)[0].tensor, halves[0].tensor)
