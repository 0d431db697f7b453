"""Hidden states that ranks share are dropped alike, shards of the sequence are dropped apart."""

import torch
import torch.distributed as dist

from megatron.kernels.choice import FUSED, Kernels
from megatron.model.dropout import HiddenDropout
from megatron.parallel.groups import create_groups
from megatron.parallel.mesh import Mesh
from tests.ranks import run_on_ranks


def masks():
    tensor = create_groups(Mesh(tensor=2), dist.get_rank()).tensor
    torch.manual_seed(3)
    hidden = torch.ones(8, 2, 16)
    apart = HiddenDropout(0.5, shards=tensor.sequence_shards(True))
    alike = HiddenDropout(0.5, shards=tensor.sequence_shards(False))
    answer = [layer(hidden) for layer in (apart, alike, apart)]
    state = torch.get_rng_state()
    for idle in (apart.eval(), HiddenDropout(0.0, shards=tensor)):
        assert idle(hidden) is hidden
    assert torch.equal(torch.get_rng_state(), state), "without dropout nothing is drawn"
    return answer


def test_shards_are_dropped_apart_and_shared_states_alike():
    (first_apart, first_alike, first_again), (second_apart, second_alike, _) = run_on_ranks(2, masks)
    assert torch.equal(first_alike, second_alike)
    assert not torch.equal(first_apart, second_apart)
    assert not torch.equal(first_apart, first_again)
    assert set(first_apart.unique().tolist()) == {0.0, 2.0}


def parts_of_a_mask():
    """On two ranks: the part of each, and the mask of the whole, which one rank draws from the same random state."""
    tensor = create_groups(Mesh(tensor=2), dist.get_rank()).tensor
    kernels = Kernels(**FUSED["dropout"])
    hidden = torch.ones(8, 2, 16)
    masks = []
    for shards, part in ((tensor, hidden[:4]), (tensor.sequence_shards(False), hidden)):
        layer = HiddenDropout(0.5, shards=shards, kernels=kernels)
        torch.manual_seed(3)
        masks.append([layer(part), layer(part, part)])
    return masks


def test_fused_the_parts_of_a_sequence_are_dropped_as_the_whole_is_on_one_rank():
    (first, whole), (second, same) = run_on_ranks(2, parts_of_a_mask)
    for low, high, all_of_it, again in zip(first, second, whole, same, strict=True):
        assert torch.equal(torch.cat((low, high)), all_of_it)
        assert torch.equal(all_of_it, again)
    assert set(whole[0].unique().tolist()) == {0.0, 2.0}
    assert set(whole[1].unique().tolist()) == {1.0, 3.0}
