"""Blocks compiled one by one: a single whole graph, fused operations kept, the same numbers."""

from dataclasses import replace

import pytest
import torch

from megatron.config.run import parse_run_config
from megatron.kernels.attention.interface import AttentionRequest
from megatron.kernels.attention.pick import pick_attention
from megatron.kernels.choice import FUSED, PLAIN
from megatron.model.gpt import GPT
from megatron.model.init import initialize_parameters
from megatron.parallel.groups import ParallelGroups

SHAPE = "--mock-data --vocab-size 64 --num-layers 3 --hidden-size 32 --num-attention-heads 2 --seq-length 16"
FLAGS = f"{SHAPE} --micro-batch-size 2 --train-iters 1 --lr 1e-3 --hidden-dropout 0 --attention-dropout 0".split()
LLAMA = ["--swiglu", "--normalization", "rmsnorm", "--position-embedding-type", "rope", "--disable-bias-linear"]


def loss_and_gradients(model, device):
    torch.manual_seed(0)
    tokens = torch.randint(64, (2, 16)).to(device)
    loss = model(tokens, tokens)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
@pytest.mark.parametrize("more", [[], LLAMA])
def test_compiled_blocks_are_one_graph_and_train_the_same_model(device, more):
    config = parse_run_config([*FLAGS, *more]).model
    dtype = torch.float32
    request = AttentionRequest(head_size=16, dtype=dtype, device_type=device, dropout=0.0, gqa=False, documents=False)
    attention, _ = pick_attention("sdpa", request)
    kernels = PLAIN
    for fused in FUSED.values():
        kernels = replace(kernels, **fused)
    with torch.device(device):
        model = GPT(config, vocab_size=64, groups=ParallelGroups.alone(), attention=attention, kernels=kernels)
    initialize_parameters(model, seed=1, std=0.1, num_layers=3)
    expected = loss_and_gradients(model, device)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_blocks()
    for found, exact in zip(loss_and_gradients(model, device), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=2e-4, atol=2e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
