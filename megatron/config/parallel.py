"""How ranks share the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron.config.flags import POSITIVE, at_least, flag


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Degrees of the mesh (pipeline, data, Ulysses, tensor); the data degree is what remains of the world."""

    title: ClassVar[str] = "parallelism"

    tensor_model_parallel_size: int = flag(1, range=at_least(1), help="ranks that share each layer's weights")
    pipeline_model_parallel_size: int = flag(1, range=at_least(1), help="ranks that share the sequence of layers")
    pipeline_partition: str | None = flag(
        None,
        metavar="N,N,...",
        help="blocks of each pipeline stage, as in 6,8,8,2 (default: equal work, the output head counted)",
    )
    ds_sequence_parallel_size: int = flag(1, range=at_least(1), help="ranks that share each sequence (Ulysses)")
    sequence_parallel: bool = flag(
        False, help="shard the activations outside the sharded products over the tensor ranks (Megatron's)"
    )
    keep_gathered_inputs: bool = flag(
        False,
        help="with --sequence-parallel, keep for backward what tensor ranks gather before a product, all of a sequence "
        "and not a shard, instead of gathering it again: eight collectives of a block where there are ten",
    )
    tp_comm_overlap: str = flag(
        "none",
        choices=("none", "halves", "copies"),
        help="what computes while shards of the sequence travel between tensor ranks: the other half of the "
        "micro-batch; the product itself, a shard at a time, while copy engines carry the others (GPUs of one host); "
        "none: nothing in forward, and products of the same layer in backward",
    )
    distributed_timeout_minutes: float = flag(
        10.0, range=POSITIVE, help="minutes a rank waits for the others before it gives up"
    )

    @property
    def stage_blocks(self) -> tuple[int, ...] | None:
        """Blocks of each stage, as `pipeline_partition` says; None when it is not given.

        Raises:
            ValueError: it is no list of whole numbers.
        """
        if self.pipeline_partition is None:
            return None
        return tuple(int(word) for word in self.pipeline_partition.split(","))
