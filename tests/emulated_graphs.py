"""CUDA graphs made of Python, for machines without a GPU."""

from types import SimpleNamespace

import torch

from megatron.parallel import graphed


class Emulated(graphed._Recording):
    """Replays by calling the function again, with results in the place of those before, as a graph has them.

    Forward destroys the gradients: their place in a graph's memory is that of activations.
    """

    def __init__(self, of, x):
        self.passes, self._parameters = 0, tuple(of.parameters())
        function, leaves = of.with_stand_ins()
        start = x.detach().clone().requires_grad_()
        wanted = (start, *leaves)
        self._start, self._end = start.detach(), torch.empty_like(start)
        self._grad_end = torch.empty_like(self._end)
        self._grad_start, *self._gradients = [torch.empty_like(one) for one in wanted]
        live = []

        def forward():
            for place in (self._grad_start, *self._gradients):
                place.fill_(torch.nan)
            with torch.enable_grad():
                live[:] = [function(start)]
            self._end.copy_(live[0])

        def backward():
            found = torch.autograd.grad(live.pop(), wanted, self._grad_end)
            for place, gradient in zip((self._grad_start, *self._gradients), found, strict=True):
                place.copy_(gradient)

        self._forward, self._backward = SimpleNamespace(replay=forward), SimpleNamespace(replay=backward)


def emulate_without_a_gpu(device, monkeypatch):
    """Let what is recorded on a CPU be repeated by Python, until the test ends."""
    if device == "cpu":
        monkeypatch.setattr(graphed, "_Recording", Emulated)
