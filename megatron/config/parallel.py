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
    ds_sequence_parallel_size: int = flag(1, range=at_least(1), help="ranks that share each sequence (Ulysses)")
    sequence_parallel: bool = flag(
        False, help="shard the activations outside the sharded products over the tensor ranks (Megatron's)"
    )
    distributed_timeout_minutes: float = flag(
        10.0, range=POSITIVE, help="minutes a rank waits for the others before it gives up"
    )
