import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.parallel import collectives
from megatron.parallel.groups import Group, create_groups
from megatron.parallel.mesh import Mesh
from tests.ranks import run_on_ranks


def tensor_group() -> Group:
    return create_groups(Mesh(tensor=dist.get_world_size()), dist.get_rank()).tensor


def own_tensor(seed: int) -> Tensor:
    """Six rows of four, different on each rank."""
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(10 * seed + dist.get_rank()))


def inner_products(forward: str, conjugate: str, dims: tuple[int, ...]) -> list[tuple[float, float]]:
    """<A x, y> and <x, A^T y> over all ranks together, where A is a collective and A^T its conjugate."""
    group = tensor_group()
    products = []
    for dim in dims or (None,):
        extra = () if dim is None else (dim,)
        x = own_tensor(1).requires_grad_()
        output = getattr(collectives, forward)(x, group, *extra)
        y = torch.randn(output.shape, generator=torch.Generator().manual_seed(dist.get_rank()))
        back = getattr(collectives, conjugate)(y, group, *extra)
        output.backward(y)
        assert torch.equal(x.grad, back)
        both = torch.stack([(output.detach() * y).sum(), (x.detach() * back).sum()])
        dist.all_reduce(both)
        products.append(tuple(both.tolist()))
    return products


@pytest.mark.parametrize(
    ("forward", "conjugate"),
    [
        ("all_gather_sequence", "reduce_scatter_sequence"),
        ("reduce_scatter_sequence", "all_gather_sequence"),
    ],
)
def test_backward_of_a_sequence_collective_is_its_conjugate_and_its_adjoint(forward, conjugate):
    for products in run_on_ranks(2, inner_products, forward, conjugate, ()):
        for there, back in products:
            assert there == pytest.approx(back, rel=1e-5)
