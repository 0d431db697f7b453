"""The comparison that all tests of this floor make: a layer spread over ranks against the plain layer."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.parallel.groups import Group, create_groups
from megatron.parallel.mesh import Mesh
from megatron.parallel.sharding import sharding_of, slice_of


def tensor_group() -> Group:
    """All running ranks as one tensor group."""
    return create_groups(Mesh(tensor=dist.get_world_size()), dist.get_rank()).tensor


def logical(seed: int, *shape: int) -> Tensor:
    """A tensor that is the same on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(device())


def device() -> torch.device:
    """Where the rank's default device is: a function that runs over gloo and over NCCL names none."""
    return torch.get_default_device()


def fill(module: nn.Module) -> nn.Module:
    """Give each parameter this rank's slice of a logical tensor that only its position in the module decides."""
    for index, param in enumerate(module.parameters()):
        sharding = sharding_of(param)
        param.data.copy_(slice_of(logical(index, *sharding.logical_shape), sharding))
    return module


def own(whole: Tensor, group: Group, dim: int | None) -> Tensor:
    """This rank's slice along `dim`; everything when `dim` is None."""
    return whole if dim is None else whole.chunk(group.size, dim)[group.rank]


def assert_matches_dense(
    layer: nn.Module,
    dense: nn.Module,
    input: Tensor,
    group: Group,
    *,
    input_dim: int | None = None,
    output_dim: int | None = None,
) -> None:
    """Output, gradient of the input and gradient of each parameter equal the plain layer's.

    `input_dim` and `output_dim` are the dimensions along which the layer takes and gives slices.
    """
    fill(layer)
    fill(dense)
    floating = input.is_floating_point()
    whole_input = input.clone().requires_grad_(floating)
    own_input = own(input, group, input_dim).clone().requires_grad_(floating)
    whole_output = dense(whole_input)
    own_output = layer(own_input)
    torch.testing.assert_close(own_output, own(whole_output, group, output_dim))

    upstream = logical(99, *whole_output.shape)
    whole_output.backward(upstream)
    own_output.backward(own(upstream, group, output_dim))
    if floating:
        torch.testing.assert_close(own_input.grad, own(whole_input.grad, group, input_dim))
    for param, plain in zip(layer.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(param.grad, slice_of(plain.grad, sharding_of(param)))
