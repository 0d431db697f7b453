"""Bytes of a model on one rank, from its shape: parameters, what a block keeps for backward, what the head takes.

docs/recompute.md has the activations as a table, docs/performance.md what is made of them. Legend: s sequence, b
micro-batch, h hidden, f width of the MLP, n query and k key/value heads, d head size, v padded vocabulary, t tensor
ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.model import ModelConfig
from megatron.model.recompute_flops import UnitShape
from megatron.parallel.linear_cross_entropy import tokens_at_a_time


@dataclass(frozen=True, kw_only=True)
class BlockMemory:
    """What a rank's activations are made of, in bytes of one micro-batch.

    Attributes:
        kept: by one block between forward and backward.
        stream: of one tensor of hidden states between blocks.
        working: gradients and copies that backward of one block holds at a time.
    """

    kept: int
    stream: int
    working: int


def block_memory(
    config: ModelConfig,
    shape: UnitShape,
    *,
    sequence_parallel: bool,
    fused: bool,
    fp8: bool = False,
    keep_gathered: bool = False,
) -> BlockMemory:
    """Count a block's activations.

    Args:
        config: the architecture.
        shape: of a rank's micro-batch.
        sequence_parallel: whether hidden states between the products are shards.
        fused: whether the fused kernels run, which keep less than plain torch does.
        fp8: whether the products keep their inputs in 8 bits, but for shards that backward gathers once more.
        keep_gathered: whether there are none of these, as the whole is kept.
    """
    rows, tensor, itemsize = shape.tokens, shape.tensor_size, shape.itemsize
    shards = tensor if sequence_parallel else 1
    stream_item = 4 if config.fp32_residual_connection else itemsize
    hidden, halves = config.hidden_size, 2 if config.gated else 1
    statistics = 8 if config.normalization == "layernorm" else 4
    operand = 1 if fp8 else itemsize
    norm = stream_item * hidden + statistics
    masks = 2 * hidden if config.hidden_dropout and not fused else 0
    gathered = 0 if shards == 1 or not keep_gathered else 1 if shape.mlp_chunk else 2  # chunks gather for themselves
    sharded = (2 - gathered) * hidden * (operand if shards == 1 else itemsize)
    whole = (2 * norm + masks + sharded) / shards + gathered * hidden * operand
    mlp = (2 * halves if config.gated and not fused else halves + 1) * config.ffn_hidden_size
    mlp_bytes = 0 if shape.mlp_chunk else itemsize * mlp - (itemsize - operand) * config.ffn_hidden_size
    attended = fp8 * config.num_attention_heads * config.kv_channels  # attention keeps its result in the other form
    divided = (_attention_bytes(config, shape, fused) + attended + mlp_bytes) / tensor
    return BlockMemory(
        kept=round(rows * (whole + divided)),
        stream=round(rows * stream_item * hidden / shards),
        working=round(
            _working_bytes(
                config,
                shape,
                rows * stream_item * hidden / shards,
                gathers=shards > 1,
                gathers_again=shards > 1 and not keep_gathered,
                fp8=fp8,
            )
        ),
    )


def _working_bytes(
    config: ModelConfig, shape: UnitShape, stream: float, *, gathers: bool, gathers_again: bool, fp8: bool
) -> float:
    """Count what backward of a block adds at most: in its MLP, or where that is in chunks, in either half."""
    itemsize, hidden, tensor = shape.itemsize, config.hidden_size, shape.tensor_size
    halves, inner = 2 if config.gated else 1, config.ffn_hidden_size / tensor
    if not shape.mlp_chunk:
        # Of the down product, the activation, the up product in turn: what came out of one is freed with the next.
        of_down = inner + hidden * gathers
        of_activation = halves * inner * (itemsize + 2 * fp8) / itemsize
        of_up = hidden * (1 + gathers_again) - inner
        return itemsize * shape.tokens * max(of_down, of_activation, of_up) + stream
    gathered = 2 * itemsize * hidden  # a product's whole input, and its gradient
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.kv_channels / tensor
    attention = shape.tokens * (2 * itemsize * heads + gathered) + stream  # the gradients of heads, apart and joined
    # The inside of a chunk and its gradients, and the sums of the weights' in fp32 beside what they are rounded to.
    widths = (halves + 1) * inner
    mlp = shape.mlp_chunk * (2 * itemsize * widths + 2 * gathered) + (4 + itemsize) * hidden * widths + 2 * stream
    return max(attention, mlp)


def _attention_bytes(config: ModelConfig, shape: UnitShape, fused: bool) -> float:
    """Count what attention keeps of one token, on all tensor ranks."""
    query = config.num_attention_heads * config.kv_channels
    key = config.num_key_value_heads * config.kv_channels
    rotates = config.position_embedding_type == "rope"
    elements = query + 2 * key  # the product's result, or the heads that a fused rotation cuts out of it
    if rotates and not (fused and not config.qk_layernorm):
        elements += query + key
    elif key < query and not rotates:
        elements += query
    if config.qk_layernorm:
        elements += query + key
    if shape.exchanged:  # the core keeps its result, and so does the product that takes it in after the exchange
        elements += query
    core = core_bytes(config, shape) / shape.tokens
    return core + shape.itemsize * (elements + query)


def core_bytes(config: ModelConfig, shape: UnitShape) -> int:
    """Count what the core of attention keeps on all tensor ranks: the logarithm of each row's sum, or s x s weights."""
    heads, dropout = config.num_attention_heads, config.attention_dropout > 0
    if shape.attention != "written out":
        return 4 * heads * shape.tokens
    result = shape.itemsize if dropout or shape.itemsize < 4 else 0  # else it is the softmax itself
    pairs = shape.tokens * shape.seq_length
    return heads * pairs * (4 + result + dropout) + shape.seq_length**2


def head_memory(
    config: ModelConfig,
    shape: UnitShape,
    padded_vocab_size: int,
    *,
    sequence_parallel: bool,
    chunk_size: int,
    fused: bool,
) -> int:
    """Count what final norm, output head and loss hold at most, in bytes.

    Args:
        config: the architecture.
        shape: of a rank's micro-batch.
        padded_vocab_size: v.
        sequence_parallel: whether the head gathers its input.
        chunk_size: tokens whose logits exist at a time; 0: all.
        fused: whether the gradient of the logits takes their place; plain torch has them in fp32 too, twice.
    """
    rows, tensor, itemsize, hidden = shape.tokens, shape.tensor_size, shape.itemsize, config.hidden_size
    shard = rows * itemsize * hidden // (tensor if sequence_parallel else 1)
    columns = padded_vocab_size // tensor
    weight, gathered = columns * hidden, rows * itemsize * hidden if sequence_parallel and tensor > 1 else 0
    logit_bytes = itemsize if fused else itemsize + 8
    norm = shard + rows * (4 if config.fp32_residual_connection else itemsize) * hidden // (
        tensor if sequence_parallel else 1
    )
    if not chunk_size:
        return norm + rows * columns * logit_bytes + gathered + rows * itemsize * hidden + itemsize * weight
    chunk = min(tokens_at_a_time(chunk_size, hidden, in_place=fused), rows)
    unit = 4 * rows * hidden if tensor == 1 else shard  # the input's gradient between forward and backward
    forward = unit + 4 * weight + chunk * (columns * logit_bytes + 2 * itemsize * hidden)
    scaling = unit + shard + (4 + itemsize) * weight
    return norm + max(forward, scaling)


def rank_parameters(
    config: ModelConfig,
    padded_vocab_size: int,
    *,
    tensor_size: int,
    num_blocks: int,
    is_first: bool = True,
    is_last: bool = True,
) -> int:
    """Count the parameters that a rank holds, biases and norms included, before ZeRO divides them.

    Args:
        config: the architecture.
        padded_vocab_size: v.
        tensor_size: t.
        num_blocks: blocks of the rank's pipeline stage.
        is_first: whether this is the first stage, which has the embeddings.
        is_last: whether it is the last one, which has final norm and head; a tied head is a copy unless it is both.
    """
    hidden = config.hidden_size
    norm = hidden * (2 if config.normalization == "layernorm" else 1)
    embedding = padded_vocab_size * hidden // tensor_size
    total = num_blocks * _block_rank_parameters(config, tensor_size, norm)
    if is_first:
        total += embedding
        if config.position_embedding_type == "learned_absolute":
            total += config.max_position_embeddings // tensor_size * hidden
    if is_last:
        total += norm + (embedding if config.untie_embeddings_and_output_weights or not is_first else 0)
    return total


def _block_rank_parameters(config: ModelConfig, tensor_size: int, norm: int) -> int:
    hidden, inner, halves = config.hidden_size, config.ffn_hidden_size, 2 if config.gated else 1
    query = config.num_attention_heads * config.kv_channels
    products = query + 2 * config.num_key_value_heads * config.kv_channels
    divided = hidden * (products + query) + (halves + 1) * hidden * inner
    divided += products if config.add_qkv_bias else 0
    whole = 2 * norm + (2 * norm * config.kv_channels // hidden if config.qk_layernorm else 0)
    if config.add_bias_linear:
        divided += halves * inner
        whole += 2 * hidden
    return divided // tensor_size + whole
