"""The model on two tensor ranks is the model on one: same initial weights, loss and gradients."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.config.errors import ConfigError
from megatron.model.gpt import GPT
from megatron.model.head import whole_logits
from megatron.parallel.groups import Group, ParallelGroups, create_groups
from megatron.parallel.mesh import Mesh
from megatron.parallel.recompute import FULL
from megatron.parallel.sharding import sharding_of, slice_of
from tests.model.tiny import LLAMA, VOCAB_SIZE, backend_called, random_tokens, tiny_config, tiny_gpt
from tests.ranks import run_on_ranks

VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {**LLAMA, "qk_layernorm": True, "recompute_policy": FULL},
}


def differences_from_one_rank():
    """Names of what differs on this rank, for each variant: logits, loss, weights or gradients."""
    groups = create_groups(Mesh(tensor=2), dist.get_rank())
    return {name: differences(groups, changes) for name, changes in VARIANTS.items()}


def differences(groups, changes):
    dense, sharded = tiny_gpt(**changes), tiny_gpt(groups=groups, **changes)
    tokens = random_tokens(length=17)
    losses = [model(tokens[:, :-1], labels=tokens[:, 1:]) for model in (dense, sharded)]
    for loss in losses:
        loss.backward()
    logits = [whole_logits(model(tokens).detach(), model.groups.tensor, VOCAB_SIZE) for model in (dense, sharded)]
    pairs = {"loss": losses, "logits": logits}
    ours = dict(sharded.named_parameters())
    for name, param in dense.named_parameters():
        sharding = sharding_of(ours[name])
        pairs[f"{name}: weight"] = [slice_of(param.detach(), sharding), ours[name].detach()]
        pairs[f"{name}: gradient"] = [slice_of(param.grad, sharding), ours[name].grad]
    return [name for name, (a, b) in pairs.items() if not torch.allclose(a, b, atol=1e-5, rtol=1e-4)]


def test_two_tensor_ranks_equal_one():
    assert run_on_ranks(2, differences_from_one_rank) == [{"gpt2": [], "llama": []}] * 2


@pytest.mark.parametrize("length", [1, 17])
def test_a_sequence_that_the_tensor_ranks_cannot_divide_is_refused_in_one_sentence(length):
    groups = dataclasses.replace(ParallelGroups.alone(), tensor=Group(ranks=(0, 1), rank=0, handle=None))
    with torch.device("meta"):
        model = GPT(
            tiny_config(),
            vocab_size=VOCAB_SIZE,
            groups=groups,
            attention=backend_called("sdpa"),
            sequence_parallel=True,
        )
    with pytest.raises(ConfigError) as caught:
        model(random_tokens(length=length))
    (sentence,) = caught.value.messages
    assert f"{length} tokens cannot be divided over 2 tensor ranks" in sentence
    assert f"make it {length + 1} tokens long" in sentence
