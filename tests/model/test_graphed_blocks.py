"""Recorded blocks: what trains repeats them, what evaluates does not, and a micro-batch of its own kind is refused."""

import shlex

import pytest
import torch

from megatron.config.run import parse_run_config
from megatron.kernels.attention.interface import AttentionRequest
from megatron.kernels.attention.pick import pick_attention
from megatron.model.gpt import GPT
from megatron.model.init import initialize_parameters
from megatron.parallel import graphed
from megatron.parallel.groups import ParallelGroups
from tests.emulated_graphs import Emulated, emulate_without_a_gpu
from tests.model.test_halves import on_tensor_ranks
from tests.ranks import run_on_ranks

FLAGS = shlex.split(
    """
    --mock-data --vocab-size 64 --num-layers 3 --hidden-size 32 --num-attention-heads 2 --seq-length 16
    --micro-batch-size 2 --train-iters 1 --lr 1e-3 --hidden-dropout 0.2 --attention-dropout 0 --precision fp32
    """
)


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def device(request, monkeypatch):
    emulate_without_a_gpu(request.param, monkeypatch)
    return request.param


def build(device):
    request = AttentionRequest(
        head_size=16, dtype=torch.float32, device_type=device, dropout=0.0, gqa=False, documents=False
    )
    attention, _ = pick_attention("unfused", request)
    with torch.device(device):
        model = GPT(parse_run_config(FLAGS).model, vocab_size=64, groups=ParallelGroups.alone(), attention=attention)
    initialize_parameters(model, seed=1, std=0.1, num_layers=3)
    return model


def losses_and_gradients(model, device, steps=3):
    """Losses of some micro-batches, and gradients that add up over them."""
    torch.manual_seed(0)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(64, (2, 16), device=device)
        loss = model(tokens, tokens)
        loss.backward()
        losses.append(loss.detach().clone())
    return [*losses, *(parameter.grad for parameter in model.parameters())]


def test_recorded_blocks_train_the_same_model(device):
    expected = losses_and_gradients(build(device), device)
    model = build(device)
    model.graph_blocks()
    for found, exact in zip(losses_and_gradients(model, device), expected, strict=True):
        assert torch.equal(found, exact)
    assert model._graphed_blocks._recording.passes == 2 * 3


def recorded_tensor_ranks_train_the_same_model(in_halves):
    device = torch.get_default_device()
    if device.type == "cpu":
        graphed._Recording = Emulated
    expected = losses_and_gradients(on_tensor_ranks(in_halves=in_halves), device)
    model = on_tensor_ranks(in_halves=in_halves)
    model.graph_blocks()
    for found, exact in zip(losses_and_gradients(model, device), expected, strict=True):
        assert torch.equal(found, exact)
    assert model._graphed_blocks._recording.passes == 2 * 3
    model.release_graphs()


@pytest.mark.parametrize("in_halves", [False, True])
def test_recorded_blocks_of_tensor_ranks_train_the_same_model(in_halves):
    run_on_ranks(2, recorded_tensor_ranks_train_the_same_model, in_halves)


def test_what_evaluates_does_not_repeat_what_was_recorded(device):
    model = build(device)
    tokens = torch.zeros((1, 8), dtype=torch.int64, device=device)
    with torch.no_grad():
        expected = model.eval()(tokens, tokens)
        model.graph_blocks()
        assert torch.equal(model(tokens, tokens), expected)
        model.train()(tokens, tokens)
    assert model._graphed_blocks._recording is None


def test_a_micro_batch_with_positions_of_its_own_is_refused(device):
    model = build(device)
    model.graph_blocks()
    tokens = torch.zeros((2, 16), dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="take no positions, masks, documents or cache of their own"):
        model(tokens, tokens, position_ids=torch.zeros_like(tokens))
