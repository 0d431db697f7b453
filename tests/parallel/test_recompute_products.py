from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.parallel.recompute import RecomputePolicy, recompute
from megatron.parallel.recompute_products import ATTENTION, Product, ProductBudget
from tests.parallel.logical import logical

WIDE, NARROW = 4 * 8 * 16, 4 * 8 * 4  # bytes of what each product of `mlp` makes, fp32


def mlp(hidden, up, down, dropout=0.5):
    """[8, 4] to [8, 16] and back: the product back is the dearer one for each byte."""
    return F.dropout(torch.tanh(F.dropout(hidden, dropout) @ up) @ down, dropout)


class Count(TorchDispatchMode):
    """Products that are really computed: the shapes of their results; and how often attention is."""

    def __init__(self):
        super().__init__()
        self.shapes = []
        self.attentions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.shapes.append(tuple(result.shape))
        self.attentions += func._overloadpacket in ATTENTION
        return result


def step(run, *, function=mlp, steps=1):
    """Output, gradients and a later draw of the last step, and what it computed."""
    for _ in range(steps):
        torch.manual_seed(1)
        inputs = [logical(seed, *shape).requires_grad_() for seed, shape in enumerate([(8, 4), (4, 16), (16, 4)])]
        # In one thread, so that the count sees what backward computes.
        with Count() as count, torch.autograd.set_multithreading_enabled(False):
            output = run(function, *inputs)
            output.square().sum().backward()
    return [output.detach(), *(x.grad for x in inputs), torch.rand(3)], count


def plainly(function, *args):
    return function(*args)


def within(budget_bytes):
    return partial(recompute, policy=RecomputePolicy(granularity="products", budget_bytes=budget_bytes))


@pytest.mark.parametrize("budget_bytes", [0, NARROW, WIDE, WIDE + NARROW])
def test_kept_products_change_neither_gradients_nor_later_draws(budget_bytes):
    expected, _ = step(plainly)
    actual, _ = step(within(budget_bytes), steps=2)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


@pytest.mark.parametrize(
    ("budget_bytes", "repeated"),
    [(0, [(8, 16), (8, 4)]), (NARROW, [(8, 16)]), (WIDE, [(8, 16)]), (WIDE + NARROW, [])],
)
def test_the_dearest_products_for_their_bytes_are_kept_first(budget_bytes, repeated):
    products_of_backward = 4
    shapes = step(within(budget_bytes))[1].shapes
    assert sorted(shapes) == sorted([*step(plainly)[1].shapes, *repeated])
    assert len(shapes) == 2 + products_of_backward + len(repeated)


def test_a_last_product_that_backward_does_not_need_is_left_out_once_that_is_known():
    without_dropout = partial(mlp, dropout=0.0)
    run = within(WIDE)
    assert (8, 16) in repeated_products(run, without_dropout)  # the budget went to the product back
    assert repeated_products(run, without_dropout) == []


def repeated_products(run, function):
    left = step(run, function=function)[1].shapes
    for shape in step(plainly, function=function)[1].shapes:
        left.remove(shape)
    return left


def changed_in_place(hidden, up, down):
    """What a linear layer of ZeRO-3 does with its bias: in place, on a view that does not share a version."""
    wide = torch.ops.aten._unsafe_view(torch.mm(hidden, up), (2, 4, 16))
    with torch.no_grad():
        wide += 1
    return torch.tanh(wide.flatten(0, 1)) @ down


def test_a_product_that_is_changed_in_place_is_computed_again():
    expected, _ = step(plainly, function=changed_in_place)
    actual, _ = step(within(10_000), function=changed_in_place)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def attention(hidden, up, down, dropout=0.0):
    heads = (hidden @ up).view(8, 1, 4, 4).permute(1, 2, 0, 3)
    context = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True, dropout_p=dropout)
    return F.dropout(context.permute(2, 0, 1, 3).reshape(8, 16) @ down, 0.5)


@pytest.mark.parametrize(("budget_bytes", "calls"), [(0, 2), (10_000, 1)])
def test_attention_is_kept_like_a_product(budget_bytes, calls):
    expected, _ = step(plainly, function=attention)
    actual, count = step(within(budget_bytes), function=attention)
    assert count.attentions == calls
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("dropout", "calls"), [(0.0, 1), (0.5, 2)])
def test_attention_that_drops_weights_is_computed_again_so_that_later_dropout_draws_the_same(dropout, calls):
    with torch.device("cuda"):
        function = partial(attention, dropout=dropout)
        expected, _ = step(plainly, function=function)
        actual, count = step(within(10_000), function=function)
    assert count.attentions == calls
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_what_fits_is_kept_by_flops_for_each_byte_and_earlier_ones_first():
    budget = ProductBudget(budget_bytes=10)
    products = {0: Product("cheap", 1, 4), 1: Product("big", 80, 9), 2: Product("dear", 40, 4), 3: Product("as", 40, 4)}
    assert list(budget.choose(products, total=4)) == [2, 3]
    budget.note_reach(total=4, reached=3)
    assert list(budget.choose(products, total=4)) == [2, 0]
    assert list(budget.choose(products, total=5)) == [2, 3]


def test_the_first_step_keeps_what_the_others_do_where_it_is_known_how_far_recompute_goes():
    products = {0: Product("cheap", 1, 4), 1: Product("last and dearest", 80, 4)}
    budget = ProductBudget(budget_bytes=4, unasked=1)
    assert list(budget.choose(products, total=2)) == [0]
    budget.note_reach(total=2, reached=2)
    assert list(budget.choose(products, total=2)) == [1]
