"""Blocks over two halves of a micro-batch: what travels beside what, and that no number depends on it."""

from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.model import halves
from megatron.model.context import Context, KeyValueCache
from megatron.model.gpt import GPT
from megatron.model.halves import alternate, run_in_halves
from megatron.model.init import initialize_parameters
from megatron.parallel import collectives, gradient_sums
from megatron.parallel.groups import Group, create_groups
from megatron.parallel.mesh import Mesh
from megatron.parallel.recompute import NONE, RecomputePolicy
from tests.model.tiny import LLAMA, VOCAB_SIZE, backend_called, random_tokens, tiny_config
from tests.ranks import run_on_ranks

KINDS = {
    "gpt2": {},
    "llama": {**LLAMA, "qk_layernorm": True},
    "one key/value head": {**LLAMA, "num_key_value_heads": 1},
}
POLICIES = {
    "none": NONE,
    "full": RecomputePolicy(granularity="full", num_layers=2),
    "selective": RecomputePolicy(granularity="selective"),
    "products": RecomputePolicy(granularity="products", budget_bytes=4_000),
}


def on_tensor_ranks(*, in_halves, policy=NONE, mlp_chunk_size=0, **changes):
    config = tiny_config(**changes)
    model = GPT(
        config,
        vocab_size=VOCAB_SIZE,
        groups=create_groups(Mesh(tensor=2), dist.get_rank()),
        attention=backend_called("unfused"),
        sequence_parallel=True,
        recompute_policy=policy,
        mlp_chunk_size=mlp_chunk_size,
        in_halves=in_halves,
    )
    initialize_parameters(model, seed=1, std=0.2, num_layers=config.num_layers)
    return model


def inputs(batch):
    """Tokens with positions, documents and padding that differ from sample to sample."""
    tokens = random_tokens(batch, 17).to(torch.get_default_device())
    starts = torch.arange(batch)[:, None]
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "position_ids": torch.arange(16) + starts,
        "document_ids": (torch.arange(16) + 3 * starts) // 7,
        "attention_mask": (torch.arange(16) >= starts % 2)[:, None, None, :].expand(batch, 1, 16, 16)
        | torch.eye(16).bool(),
    }


def loss_and_gradients(model, batch):
    loss = model(**inputs(batch))
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def halves_change_no_number(kind, batch, mlp_chunk_size):
    torch.set_default_dtype(torch.float64)  # in which what halves add up in another order is no difference
    for policy in POLICIES.values():
        found, expected = (
            loss_and_gradients(
                on_tensor_ranks(in_halves=x, policy=policy, mlp_chunk_size=mlp_chunk_size, **KINDS[kind]), batch
            )
            for x in (True, False)
        )
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("kind", "batch", "mlp_chunk_size"),
    [("gpt2", 4, 0), ("llama", 2, 0), ("one key/value head", 6, 0), ("llama", 4, 24)],
)
def test_halves_change_no_number_whatever_is_recomputed(kind, batch, mlp_chunk_size):
    run_on_ranks(2, halves_change_no_number, kind, batch, mlp_chunk_size)


class Recording(TorchDispatchMode):
    """Notes products, and for each half what it starts (+) and what it waits for (-), in order."""

    def __init__(self):
        super().__init__()
        self.events = []
        self.half = None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.events.append("product")
        return function(*args, **(kwargs or {}))

    def exchange(self, group, made=collectives.Exchange):
        exchange, half = made(group), self.half
        watched = mock.Mock(group=group)
        watched.put = lambda pending: self.events.append(f"{half}+") or exchange.put(pending)
        watched.take = lambda: self.events.append(f"{half}-") or exchange.take()
        return watched

    def alternate(self, first, second):
        return alternate(self._named("a", first), self._named("b", second))

    def _named(self, name, turns):
        while True:
            self.half = name
            try:
                next(turns)
            except StopIteration as end:
                return end.value
            yield


def events_of_two_blocks():
    """What happens in forward, and in backward, of blocks whose weights get no gradient, so that products are few."""
    model = on_tensor_ranks(in_halves=True, **LLAMA)
    blocks = model.stages()[2:4]
    for block in blocks:
        block.requires_grad_(False)
    context = model.context(torch.zeros(2, 16, dtype=torch.long))
    hidden = torch.ones(8, 2, 32, requires_grad=True)
    with Recording() as recording, ExitStack() as patches:
        patches.enter_context(mock.patch.object(collectives, "Exchange", recording.exchange))
        patches.enter_context(mock.patch.object(halves, "alternate", recording.alternate))
        output = run_in_halves(blocks, hidden, context, group=model.groups.tensor)
        forward, recording.events = recording.events, []
        output.backward(torch.ones_like(output))
    return forward, recording.events


ENTER_FIRST, ENTER = ["+"], ["-", "+"]
PROJECT = ["-", "product"]
REST = ["product", "+"]
LEAVE = ["-"]


def of(half, *turns):
    return [event if event == "product" else half + event for turn in turns for event in turn]


def test_each_half_waits_no_sooner_than_a_turn_of_the_other_after_it_has_started_something():
    a, b = (lambda *turns, half=half: of(half, *turns) for half in "ab")
    one = [*b(ENTER), *a(REST), *b(PROJECT), *a(ENTER), *b(REST), *a(PROJECT)]  # attention or MLP, but for the first
    forward = [
        *a(ENTER_FIRST, PROJECT),
        *b(ENTER_FIRST),
        *one[2:],
        *one * 2,
        *b(ENTER),
        *a(REST),
        *b(PROJECT),
        *a(LEAVE),
        *b(REST, LEAVE),
    ]
    other_way = {"a+": "a-", "a-": "a+", "b+": "b-", "b-": "b+", "product": "product"}
    backward = [other_way[event] for event in reversed(forward)]
    for found in run_on_ranks(2, events_of_two_blocks):
        assert found == (forward, backward)


@contextmanager
def noted_sums_of_small_gradients():
    """Gives a list of over how many elements each collective sums the gradients of norms and biases."""
    start, sizes = gradient_sums.start_all_reduce, []
    with mock.patch.object(
        gradient_sums, "start_all_reduce", lambda grad, group: sizes.append(grad.numel()) or start(grad, group)
    ):
        yield sizes


def sums_of_small_gradients():
    model = on_tensor_ranks(in_halves=True)
    blocks, context = model.stages()[2:4], model.context(torch.zeros(2, 16, dtype=torch.long))
    with noted_sums_of_small_gradients() as sizes:
        run_in_halves(blocks, torch.ones(8, 2, 32), context, group=model.groups.tensor).sum().backward()
    return sizes


def sums_of_small_gradients_of_whole_micro_batches():
    found = []
    for policy in POLICIES.values():
        with noted_sums_of_small_gradients() as sizes:
            loss_and_gradients(on_tensor_ranks(in_halves=False, policy=policy, num_layers=3), 2)
        found.append(sizes)
    return found


def test_gradients_of_norms_and_biases_of_all_blocks_and_both_halves_are_summed_by_one_collective():
    of_a_block = 32 * 6  # weight and bias of two norms, and two biases
    assert run_on_ranks(2, sums_of_small_gradients) == [[2 * of_a_block]] * 2


def test_gradients_of_norms_and_biases_of_a_whole_micro_batch_are_summed_by_one_collective_a_block():
    final_norm, of_a_block = 32 * 2, 32 * 6
    expected = [[final_norm, *[of_a_block] * 3]] * len(POLICIES)
    assert run_on_ranks(2, sums_of_small_gradients_of_whole_micro_batches) == [expected] * 2


def test_the_first_half_is_a_turn_ahead():
    order = []

    def turns(half):
        for turn in range(3):
            order.append(f"{half}{turn}")
            yield
        order.append(f"{half} ends")
        return half

    assert alternate(turns("a"), turns("b")) == ["a", "b"]
    assert order == ["a0", "a1", "b0", "a2", "b1", "a ends", "b2", "b ends"]


def micro_batches_taken_in_halves():
    model = on_tensor_ranks(in_halves=True)
    tokens = random_tokens(2, 16)
    cached = model.context(tokens, cache=KeyValueCache(num_layers=3, max_length=16))
    return [model.context(random_tokens(batch, 16)).halves is not None for batch in (1, 2, 3)], cached.halves


def test_an_uneven_micro_batch_and_one_with_a_cache_are_taken_whole():
    assert run_on_ranks(2, micro_batches_taken_in_halves) == [([False, True, False], None)] * 2


def test_halves_without_contexts_of_their_own_are_refused():
    with pytest.raises(ValueError, match="one for each"):
        run_in_halves([], torch.ones(2, 2, 2), Context(), group=Group.alone())
