"""Recorded work: gradients of many passes, a wrong order of passes, other shapes; a CPU has graphs made of Python."""

import pytest
import torch

from megatron.kernels.dropout import dropout_add
from megatron.parallel.graphed import Graphed
from tests.emulated_graphs import emulate_without_a_gpu


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def device(request, monkeypatch):
    emulate_without_a_gpu(request.param, monkeypatch)
    return request.param


def parts(device):
    torch.manual_seed(1)
    first, second = (torch.nn.Linear(16, 16, device=device) for _ in range(2))

    def function(x):
        return second(dropout_add(first(x).tanh(), x, 0.5))

    return function, torch.nn.ModuleList([first, second])


def micro_batches(device, count=4):
    torch.manual_seed(2)
    return [torch.randn(8, 16, device=device, requires_grad=True) for _ in range(count)]


def train(function, modules, inputs):
    """Gradients that add up over the micro-batches, results, and gradients of the inputs."""
    results = []
    modules.zero_grad()
    torch.manual_seed(3)
    for x in inputs:
        result = function(2 * x)
        results.append(result.detach().clone())
        (result * result).sum().backward()
    return [*results, *(x.grad for x in inputs), *(parameter.grad for parameter in modules.parameters())]


def test_gradients_of_micro_batches_add_up_as_without_a_graph(device):
    function, modules = parts(device)
    expected = train(function, modules, micro_batches(device))
    found = train(Graphed(function, modules), modules, micro_batches(device))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_gradient_that_is_taken_at_once_is_not_copied(device):
    function, modules = parts(device)
    recorded = Graphed(function, modules)
    places = set()
    for x in micro_batches(device):
        recorded(x).sum().backward()
        places.add(tuple(parameter.grad.data_ptr() for parameter in modules.parameters()))
        modules.zero_grad()
    assert len(places) == 1


def test_an_engine_that_takes_gradients_hears_of_those_that_it_asked_for_alone(device):
    function, modules = parts(device)
    taken = []
    for parameter in modules.parameters():
        # As DeepSpeed does; on a GPU its stream is the one that is current now, which no recording may wait for.
        parameter.register_post_accumulate_grad_hook(lambda one: taken.append(one.grad.clone()))
        parameter.register_hook(taken.append)
    recorded = Graphed(function, modules)
    for x in micro_batches(device):
        recorded(x).sum().backward()
    assert len(taken) == 4 * 4 * 2


def test_backward_of_a_pass_that_another_has_overwritten_is_refused(device):
    function, modules = parts(device)
    recorded = Graphed(function, modules)
    first, second = (recorded(x).sum() for x in micro_batches(device, 2))
    with pytest.raises(RuntimeError, match="backward has to follow its forward pass"):
        first.backward()
    second.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward has to follow its forward pass"):
        second.backward()


def test_another_shape_is_refused(device):
    function, modules = parts(device)
    recorded = Graphed(function, modules)
    recorded(torch.ones(8, 16, device=device))
    with pytest.raises(ValueError, match=r"takes torch.float32 \(8, 16\), not torch.float32 \(4, 16\)"):
        recorded(torch.ones(4, 16, device=device))
