"""What backward computes again under each policy: the products of a unit of blocks, those kept and those repeated.

Legend: s sequence, b micro-batch, t tensor ranks, u Ulysses ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megatron.config.model import ModelConfig
from megatron.model.flops import attention_flops, block_parameters
from megatron.parallel.recompute import RecomputePolicy
from megatron.parallel.recompute_products import Product, ProductBudget

AttentionProducts = Literal["fused", "written out", "opaque"]
"""How the core of attention appears among a unit's products: as one that may be kept, as two, or not at all."""


@dataclass(frozen=True, kw_only=True)
class UnitShape:
    """Sizes of what one rank computes of one micro-batch.

    Attributes:
        tokens: b x s / u, the rows of each product of a weight, with sequence parallelism as without.
        seq_length: s.
        tensor_size: t.
        parts: into how many equal parts blocks cut the micro-batch, each with products of its own.
        itemsize: bytes of an element.
        keys: that a fused kernel's FLOPs are of, of each query on average; None: half of the sequence, as causality
            leaves.
        mlp_chunk: tokens for which the inside of the MLP exists at a time, 0 for all.
        exchanged: whether Ulysses trades heads for tokens around attention.
        attention: "opaque" also for a fused kernel that draws the numbers of dropout itself and has to draw them again.
    """

    tokens: int
    seq_length: int
    tensor_size: int = 1
    parts: int = 1
    itemsize: int = 2
    keys: float | None = None
    mlp_chunk: int = 0
    exchanged: bool = False
    attention: AttentionProducts = "fused"


def unit_products(config: ModelConfig, shape: UnitShape, num_blocks: int) -> dict[int, Product]:
    """List the products of a unit in the order in which they run, as `ProductBudget` sees them; results are names."""
    block = list(_block_products(config, shape))
    return {layer * len(block) + n: product for layer in range(num_blocks) for n, product in enumerate(block)}


def kept_products(config: ModelConfig, shape: UnitShape, num_blocks: int, budget_bytes: int) -> dict[int, Product]:
    """Choose from them what the policy "products" keeps, once it knows how far recompute goes."""
    products = unit_products(config, shape, num_blocks)
    budget = ProductBudget(budget_bytes)
    of_last_mlp = 2 * len(_chunks(_part(shape))) if shape.mlp_chunk else 1
    budget.note_reach(len(products), len(products) - (of_last_mlp if config.hidden_dropout == 0 else 0))
    return budget.choose(products, len(products))


def recomputed_flops_per_token(
    config: ModelConfig,
    seq_length: int,
    num_blocks: int,
    policy: RecomputePolicy,
    shape: UnitShape | None = None,
    *,
    causal: bool = False,
) -> float:
    """Count what backward computes again of one token in the blocks of one pipeline stage.

    The second pass over a unit of blocks ends as soon as backward has all it needs. Only dropout needs the output of
    the unit's last product; without it that product is not run again, nor any of an MLP in chunks, whose own backward
    runs its first product again in any case. Where blocks cut the micro-batch, that spares the last part alone. Under
    "selective" the whole core of attention is counted, as a fused kernel repeats it; one that is written out ends
    before its second product.

    Args:
        config: the architecture.
        seq_length: s.
        num_blocks: blocks of the stage.
        policy: of the stage.
        shape: needed under "products", to tell which are kept, and for an MLP in chunks.
        causal: count the half of attention that a causal model needs.
    """
    core = attention_flops(config, seq_length, causal=causal)
    in_chunks = shape is not None and shape.mlp_chunk > 0
    down = 2 * config.hidden_size * config.ffn_hidden_size
    up = down * (2 if config.gated else 1)
    of_chunks = num_blocks * up if in_chunks else 0
    if policy.recomputes_attention:
        return num_blocks * core + of_chunks
    units = [unit.end - unit.first for unit in policy.units(num_blocks) if unit.is_recomputed]
    flops = sum(units) * (2 * block_parameters(config) + core) + of_chunks
    if config.hidden_dropout == 0:
        flops -= len(units) * (up + down if in_chunks else down) / (1 if shape is None else shape.parts)
    if shape is not None and policy.budget_bytes:
        kept = [kept_products(config, shape, size, policy.budget_bytes) for size in units]
        flops -= sum(_flops_per_token(product, shape, core) for unit in kept for product in unit.values())
    return flops


def _flops_per_token(product: Product, shape: UnitShape, core: float) -> float:
    """Count a product on all tensor ranks, attention in the convention in which `core` counts it."""
    shares_of_core = {"attention": 1.0, "scores": 0.5, "weighted values": 0.5}
    if product.result in shares_of_core:
        return shares_of_core[product.result] * core
    return product.flops * shape.tensor_size / shape.tokens


def _part(shape: UnitShape) -> UnitShape:
    """Give the sizes of one part of the micro-batch."""
    return replace(shape, tokens=shape.tokens // shape.parts, parts=1)


def _block_products(config: ModelConfig, shape: UnitShape) -> Iterator[Product]:
    for products in (_products_of_attention, _products_of_mlp):  # all parts take turns in each
        for _ in range(shape.parts):
            yield from products(config, _part(shape))


def _product(name: str, shape: UnitShape, tokens: int, in_features: int, out_features: int) -> Product:
    elements = tokens * out_features
    return Product(name, 2 * elements * in_features, elements * shape.itemsize)


def _products_of_attention(config: ModelConfig, shape: UnitShape) -> Iterator[Product]:
    heads = config.num_attention_heads * config.kv_channels // shape.tensor_size
    key_value = 2 * config.num_key_value_heads * config.kv_channels // shape.tensor_size
    yield _product("qkv", shape, shape.tokens, config.hidden_size, heads + key_value)
    yield from _core_products(config, shape)
    yield _product("attention output", shape, shape.tokens, heads, config.hidden_size)


def _products_of_mlp(config: ModelConfig, shape: UnitShape) -> Iterator[Product]:
    inner = config.ffn_hidden_size // shape.tensor_size
    for tokens in _chunks(shape):
        yield _product("up", shape, tokens, config.hidden_size, (2 if config.gated else 1) * inner)
        yield _product("down", shape, tokens, inner, config.hidden_size)


def _chunks(shape: UnitShape) -> list[int]:
    """List the tokens of each chunk of the MLP."""
    size = shape.mlp_chunk or shape.tokens
    whole, rest = divmod(shape.tokens, size)
    return [size] * whole + [rest] * (rest > 0)


def _core_products(config: ModelConfig, shape: UnitShape) -> Iterator[Product]:
    rows = shape.tokens * config.num_attention_heads // shape.tensor_size  # the exchange leaves their number alone
    pairs = rows * shape.seq_length
    flops, output_bytes = 2 * pairs * config.kv_channels, rows * config.kv_channels * shape.itemsize
    if shape.attention == "fused":
        statistics = 4 * rows  # the logarithm of each row's sum, in fp32
        keys = shape.seq_length / 2 if shape.keys is None else shape.keys
        yield Product("attention", round(4 * rows * keys * config.kv_channels), output_bytes + statistics)
    elif shape.attention == "written out":
        yield Product("scores", flops, pairs * shape.itemsize)
        yield Product("weighted values", flops, output_bytes)
