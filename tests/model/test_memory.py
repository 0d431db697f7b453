"""What formulas say of a rank's memory is what a model has: its parameters, and what its blocks keep for backward."""

import weakref
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.kernels.choice import PLAIN, Kernels
from megatron.kernels.fp8_products import Fp8Products
from megatron.model.gpt import GPT
from megatron.model.init import initialize_parameters
from megatron.model.memory import block_memory, head_memory, rank_parameters
from megatron.model.recompute_flops import UnitShape
from megatron.parallel.groups import Group, ParallelGroups, create_groups
from megatron.parallel.mesh import Mesh
from megatron.parallel.recompute import NONE
from tests.model.test_recompute import HIDDEN, SEQUENCE, TOKENS, bytes_of_a_block, formula
from tests.model.tiny import LLAMA, VOCAB_SIZE, backend_called, tiny_config, tiny_gpt
from tests.ranks import run_on_ranks

VARIANTS = {
    "gpt2": {},
    "llama": LLAMA,
    "norms of heads": {**LLAMA, "qk_layernorm": True},
    "grouped": {"num_key_value_heads": 2},
    "own head": {"untie_embeddings_and_output_weights": True},
}


def parameters(model, tensor_size=1):
    """Parameters of a model: as there are, and as the formula has them."""
    predicted = rank_parameters(
        model.config,
        model.padded_vocab_size,
        tensor_size=tensor_size,
        num_blocks=model.config.num_layers,
    )
    return sum(parameter.numel() for parameter in model.parameters()), predicted


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_parameters_are_counted(changes):
    there, predicted = parameters(tiny_gpt(**changes))
    assert predicted == there


def parameters_of_ranks():
    groups, found = create_groups(Mesh(tensor=2), dist.get_rank()), []
    for changes in (VARIANTS["gpt2"], VARIANTS["llama"]):
        for sharded in (False, True):
            model = GPT(
                tiny_config(**changes),
                vocab_size=VOCAB_SIZE,
                groups=groups,
                attention=backend_called("sdpa"),
                sequence_parallel=sharded,
            )
            found.append(parameters(model, tensor_size=2))
    return found


def test_parameters_of_tensor_ranks_are_counted():
    for of_rank in run_on_ranks(2, parameters_of_ranks):
        assert all(there == predicted for there, predicted in of_rank)


def test_pipeline_stages_hold_the_whole_and_a_second_tied_embedding():
    model = tiny_gpt()
    config, rows = model.config, model.padded_vocab_size
    whole = rank_parameters(config, rows, num_blocks=5, tensor_size=1)
    first = rank_parameters(config, rows, num_blocks=2, is_last=False, tensor_size=1)
    last = rank_parameters(config, rows, num_blocks=3, is_first=False, tensor_size=1)
    assert first + last == whole + rows * config.hidden_size


@pytest.mark.parametrize("backend", ["sdpa", "unfused"])
@pytest.mark.parametrize("changes", [{}, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("mlp_chunk_size", [0, 12])
def test_a_block_keeps_what_the_table_of_recompute_says(changes, backend, mlp_chunk_size):
    """In fp32; the table's CPU keeps one tensor more for each RMSNorm."""
    config = tiny_gpt(**changes).config
    attention = "fused" if backend == "sdpa" else "written out"
    shape = UnitShape(tokens=TOKENS, seq_length=SEQUENCE, itemsize=4, attention=attention, mlp_chunk=mlp_chunk_size)
    predicted = block_memory(config, shape, sequence_parallel=False, fused=False)
    of_norms = 2 * TOKENS * HIDDEN * 4 if config.normalization == "rmsnorm" else 0
    assert predicted.kept == formula(config, backend=backend, mlp_chunk_size=mlp_chunk_size) - of_norms
    assert predicted.stream == TOKENS * HIDDEN * 4


@pytest.mark.usefixtures("other_ranks_are_like_this_one")
def test_a_block_of_ulysses_ranks_keeps_the_result_of_attention_twice():
    config = tiny_config()
    shapes = [UnitShape(tokens=TOKENS, seq_length=SEQUENCE, itemsize=4, exchanged=both) for both in (False, True)]
    once, twice = (block_memory(config, shape, sequence_parallel=False, fused=False).kept for shape in shapes)
    assert twice - once == TOKENS * HIDDEN * 4
    ulysses = Group(ranks=(0, 1), rank=0, handle=None)
    assert bytes_of_a_block(NONE, groups=replace(ParallelGroups.alone(), ulysses=ulysses)) == twice


class Alive(TorchDispatchMode):
    """Counts the bytes of what torch's operations make for as long as it lives, and the most that there was."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    @property
    def total(self):
        return sum(self.sizes.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        self.peak = max(self.peak, self.total)
        return result


LONG = 512
"""Tokens of a sample, beside which the gradients of weights are small."""


def bytes_of_backward(tensor_size, changes, keep_gathered=False):
    """What a block keeps for backward, what that adds at most, in bytes, and the formulas' answers."""
    tensor = Group(ranks=tuple(range(tensor_size)), rank=0, handle=None)
    groups = replace(ParallelGroups.alone(), tensor=tensor)
    config, sharded = tiny_config(num_layers=1, **changes), tensor_size > 1
    model = GPT(
        config,
        vocab_size=VOCAB_SIZE,
        groups=groups,
        attention=backend_called("sdpa"),
        sequence_parallel=sharded,
        keep_gathered=keep_gathered,
    )
    initialize_parameters(model, 1, 0.2, 1)
    hidden = torch.randn(LONG // tensor_size, 2, HIDDEN, requires_grad=True)
    with Alive() as alive:
        result = model.stages()[2](hidden, model.context(torch.zeros(2, LONG, dtype=torch.long)))
        alive.peak, before = 0, alive.total
        torch.autograd.backward(result, torch.randn_like(result))
    shape = UnitShape(tokens=2 * LONG, seq_length=LONG, tensor_size=tensor_size, itemsize=4)
    predicted = block_memory(config, shape, sequence_parallel=sharded, fused=False, keep_gathered=keep_gathered)
    return before, alive.peak - before, predicted


@pytest.mark.parametrize("changes", [{}, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("tensor_size", [1, 2])
@pytest.mark.usefixtures("other_ranks_are_like_this_one")
def test_backward_of_a_block_adds_what_the_formula_says(changes, tensor_size):
    _, added, predicted = bytes_of_backward(tensor_size, changes)
    assert added == pytest.approx(predicted.working, rel=0.05)


@pytest.mark.parametrize("changes", [{}, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.usefixtures("other_ranks_are_like_this_one")
def test_gathered_inputs_that_are_kept_are_kept_whole_and_not_made_again(changes):
    again, _, by_formula = bytes_of_backward(2, changes)
    kept, added, predicted = bytes_of_backward(2, changes, keep_gathered=True)
    assert added == pytest.approx(predicted.working, rel=0.05)
    assert kept - again == predicted.kept - by_formula.kept == 2 * LONG * HIDDEN * 4 > 0


def test_fused_kernels_and_tensor_ranks_keep_less():
    config = tiny_gpt(**LLAMA, hidden_dropout=0.1).config

    def kept(tensor_size=1, **switches):
        shape = UnitShape(tokens=TOKENS, seq_length=SEQUENCE, tensor_size=tensor_size)
        return block_memory(config, shape, **switches).kept

    plain, fused = kept(sequence_parallel=False, fused=False), kept(sequence_parallel=False, fused=True)
    inner, rotated = config.ffn_hidden_size, config.hidden_size * 3 // 2
    assert plain - fused == TOKENS * (2 * inner + 2 * rotated + 2 * HIDDEN)  # activated gate, copies of heads, masks
    assert kept(2, sequence_parallel=True, fused=True) == fused // 2
    assert fused // 2 < kept(2, sequence_parallel=False, fused=True) < fused


def bytes_kept_by_a_block(kernels, changes):
    """Of a block in bf16: the storages that autograd saves, those of parameters aside."""
    model = tiny_gpt(kernels=kernels, **changes).bfloat16()
    block, hidden = model.stages()[3], torch.randn(SEQUENCE, 2, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        result = block(hidden, model.context(torch.zeros(2, SEQUENCE, dtype=torch.long)))
    assert result.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


@pytest.mark.parametrize("changes", [{}, LLAMA], ids=["gpt2", "llama"])
def test_products_in_8_bits_keep_as_much_less_as_the_formula_says(changes):
    config = tiny_gpt(**changes).config
    shape = UnitShape(tokens=2 * SEQUENCE, seq_length=SEQUENCE)
    predicted = [
        block_memory(config, shape, sequence_parallel=False, fused=False, fp8=fp8).kept for fp8 in (False, True)
    ]
    found = [bytes_kept_by_a_block(kernels, changes) for kernels in (PLAIN, Kernels(products=Fp8Products()))]
    scales = 4 * 4  # one number for each of the four inputs, which the formula leaves out
    assert found[0] - found[1] + scales == predicted[0] - predicted[1] > 0


def test_chunks_of_the_loss_bound_the_logits():
    config = tiny_gpt().config

    def head(tokens, chunk_size):
        shape = UnitShape(tokens=tokens, seq_length=tokens)
        return head_memory(config, shape, 50304, sequence_parallel=False, chunk_size=chunk_size, fused=True)

    per_token = 2 * 50304
    assert head(4096, 0) - head(2048, 0) == 2048 * (per_token + 3 * 2 * HIDDEN)
    assert head(4096, 1024) - head(2048, 1024) == 2048 * (2 * 2 + 4) * HIDDEN, "the gradient is in fp32"
    assert head(4096, 2048) - head(4096, 1024) == 1024 * (per_token + 2 * 2 * HIDDEN)
