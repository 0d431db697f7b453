"""A model computed by the fused operations is the model computed by plain torch."""

import dataclasses

import pytest
import torch

from megatron.kernels.choice import FUSED, PLAIN, Kernels
from megatron.model.context import Context
from megatron.model.gpt import GPT
from megatron.model.init import initialize_parameters
from megatron.parallel.groups import ParallelGroups
from tests.kernels.fused import DEVICES, kernels_on
from tests.model.tiny import LLAMA, VOCAB_SIZE, backend_called, tiny_config

ALL_FUSED = Kernels(**{part: function for parts in FUSED.values() for part, function in parts.items()})


def loss_and_gradients(kernels, device, **changes):
    config = tiny_config(hidden_size=64, **changes)
    model = GPT(
        config,
        vocab_size=VOCAB_SIZE,
        groups=ParallelGroups.alone(),
        attention=backend_called("unfused"),
        kernels=kernels,
    )
    initialize_parameters(model, seed=1, std=config.init_method_std, num_layers=config.num_layers)
    model.to(device)
    tokens = torch.randint(VOCAB_SIZE, (2, 17), generator=torch.Generator().manual_seed(0)).to(device)
    loss = model(tokens[:, :-1], labels=tokens[:, 1:])
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


GPT2 = {"activation_function": "gelu_tanh", "apply_layernorm_1p": True}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("changes", [GPT2, LLAMA, {**LLAMA, "qk_layernorm": True}], ids=["gpt2", "llama", "qk"])
def test_loss_and_gradients_are_those_of_plain_torch(changes, device):
    expected_loss, expected = loss_and_gradients(PLAIN, device, **changes)
    with kernels_on(device):
        loss, gradients = loss_and_gradients(ALL_FUSED, device, **changes)
    torch.testing.assert_close(loss, expected_loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_leaves_a_model_that_trains(device):
    with kernels_on(device):
        torch.manual_seed(0)
        loss, gradients = loss_and_gradients(ALL_FUSED, device, hidden_dropout=0.2)
        again, _ = loss_and_gradients(ALL_FUSED, device, hidden_dropout=0.2)
    assert loss != again
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values())


def test_one_part_may_be_plain_and_another_fused():
    mixed = dataclasses.replace(PLAIN, **FUSED["norm"])
    torch.testing.assert_close(loss_and_gradients(mixed, "cpu")[0], loss_and_gradients(PLAIN, "cpu")[0])


@pytest.mark.parametrize("changes", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_a_compiler_keeps_a_block_whole(changes):
    config = tiny_config(hidden_size=64, **changes)
    model = GPT(
        config,
        vocab_size=VOCAB_SIZE,
        groups=ParallelGroups.alone(),
        attention=backend_called("unfused"),
        kernels=ALL_FUSED,
    )
    initialize_parameters(model, seed=1, std=config.init_method_std, num_layers=config.num_layers)
    block, context = model.stages()[2], Context()
    hidden = torch.randn(16, 2, 64)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for function in (block, compiled):
        model.zero_grad()
        function(hidden, context).square().sum().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in block.named_parameters()}
        if function is block:
            expected = gradients
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)
