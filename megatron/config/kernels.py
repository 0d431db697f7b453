"""Which implementation computes an operation, and which activations are kept or recomputed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron.config.flags import NOT_NEGATIVE, at_least, flag


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Choice of kernels and of activation recompute."""

    title: ClassVar[str] = "kernels"

    attention_backend: str = flag(
        "auto",
        choices=(
            "auto",
            "unfused",
            "sdpa",
            "sdpa_flash",
            "sdpa_cudnn",
            "flash_triton",
            "flash_v1",
            "flash_v2",
            "flash_v4",
        ),
        help="implementation of attention; auto takes the fastest that can honour the request and says why",
    )
    no_fused_kernels: bool = flag(
        False, help="leave every operation to plain torch on a GPU too, where CUDA kernels of this project are the rule"
    )
    no_norm_fusion: bool = flag(False, help="leave norms and the residual sums before them to plain torch")
    no_rope_fusion: bool = flag(False, help="leave rotary embedding to plain torch")
    no_bias_gelu_fusion: bool = flag(False, help="leave the MLP's nonlinearity, whichever it is, to plain torch")
    no_bias_dropout_fusion: bool = flag(False, help="leave hidden dropout and the residual sum to plain torch")
    no_masked_softmax_fusion: bool = flag(
        False, help="leave the softmax of --attention-backend unfused, the only one that has it apart, to plain torch"
    )
    no_cross_entropy_loss_fusion: bool = flag(
        False, help="leave cross entropy to plain torch; the kernel writes the gradient in the place of the logits"
    )
    loss_chunk_size: int = flag(
        0,
        range=NOT_NEGATIVE,
        help="tokens whose logits exist at a time: the output head and the loss are computed as one, a chunk after the "
        "other, which the fused loss makes as large as the hidden size, where it is smaller; 0: all logits at once",
    )
    fp8: bool = flag(
        False,
        help="compute the matrix products of the blocks in 8 bits, a scale for each matrix; weights, activations and "
        "gradients between them stay bf16, and so do attention, norms, embedding and output head",
    )
    fp8_format: str | None = flag(
        None,
        choices=("hybrid", "e4m3"),
        help="of gradients under --fp8: hybrid, E5M2, or e4m3, like inputs and weights (default: hybrid)",
    )
    mlp_chunk_size: int = flag(
        0,
        range=NOT_NEGATIVE,
        help="tokens for which the inside of an MLP exists at a time, and is made again in backward; 0: all at once",
    )
    compile: bool = flag(
        False,
        help="compile the blocks by torch.compile, one graph for all, fused operations kept as they are; on "
        "data-parallel ranks alone, without recompute",
    )
    cuda_graph: bool = flag(
        False,
        help="record the blocks' work of a micro-batch once and let the GPU repeat it, for kernels that end before the "
        "host has launched the next; on data-parallel and tensor ranks, ZeRO 1 in bf16, without recompute",
    )
    recompute_granularity: str = flag(
        "none",
        choices=("none", "full", "selective", "products"),
        help="activations that backward computes again instead of keeping: none; those of whole blocks; the core of "
        "attention; those of whole blocks but for the dearest matrix products, within --recompute-budget-gib",
    )
    recompute_method: str | None = flag(
        None,
        choices=("uniform", "block"),
        help="which blocks full and products recompute: all, in units of --recompute-num-layers, or the first "
        "--recompute-num-layers of each pipeline stage one by one (default: uniform)",
    )
    recompute_num_layers: int = flag(
        1, range=at_least(1), help="blocks of a unit (uniform), or blocks that are recomputed (block)"
    )
    recompute_budget_gib: float = flag(
        0.0, range=NOT_NEGATIVE, help="GiB that the matrix products kept under products may take on a rank"
    )
    distribute_saved_activations: bool = flag(
        False, help="divide the kept inputs of recomputed units over the tensor ranks"
    )
    recompute_inputs_on_host: bool = flag(
        False, help="keep the inputs of recomputed units in the host's memory until backward needs them"
    )
