"""The groups of ranks as DeepSpeed asks for them: the object that it calls `mpu`.

DeepSpeed's own grid could serve, but it makes every group a second time, and for each a communicator, which is memory
on every GPU; and it knows no Ulysses axis. This class hands out the groups that exist already. The order of ranks is
the same (pipeline, data, tensor; the last one fastest), so that the grid of a pipelined engine and this one agree.
"""

from __future__ import annotations

import torch.distributed as dist

from megatron.parallel.groups import Group, ParallelGroups


class DeepSpeedGroups:
    """Answers what DeepSpeed's flat engine asks about its ranks.

    Ulysses ranks hold the same weights and other tokens, exactly as data-parallel ranks do, so to DeepSpeed both are
    one data-parallel axis, `ParallelGroups.replicas`: it shards optimizer state and averages gradients over all of
    them, in every ZeRO stage alike. Its own Ulysses support divides by other numbers at ZeRO 3 than below it and is
    never turned on: for that, no method here may be called `get_sequence_*`. Neither may one be called
    `initialize_sequence_parallel`: where DeepSpeed sees that, it ignores all groups.

    Args:
        groups: of this rank, with a single pipeline stage.
    """

    def __init__(self, groups: ParallelGroups) -> None:
        self._replicas = groups.replicas
        self._tensor = groups.tensor
        self._alone = _group_of_one(groups.world)

    def get_data_parallel_world_size(self) -> int:
        """Count the ranks between which gradients are averaged."""
        return self._replicas.size

    def get_data_parallel_rank(self) -> int:
        """Return this rank's index among them."""
        return self._replicas.rank

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Return their process group."""
        return self._replicas.handle or self._alone

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Return their global ranks."""
        return list(self._replicas.ranks)

    def get_model_parallel_world_size(self) -> int:
        """Count the ranks that share the weights: with a single stage the tensor ranks."""
        return self._tensor.size

    def get_model_parallel_rank(self) -> int:
        """Return this rank's index among them, which is in the names of checkpoint files."""
        return self._tensor.rank

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Return their process group, over which norms are summed and overflows agreed."""
        return self._tensor.handle or self._alone

    def get_tensor_model_parallel_world_size(self) -> int:
        """Count the tensor ranks."""
        return self._tensor.size

    def get_tensor_model_parallel_rank(self) -> int:
        """Return this rank's index among them; parameters that all hold alike count in the norm on the first only."""
        return self._tensor.rank

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """Return the process group of the tensor ranks."""
        return self._tensor.handle or self._alone

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Count the pipeline stages; the flat engine has one."""
        return 1

    def get_pipeline_model_parallel_rank(self) -> int:
        """Return the index of this rank's stage."""
        return 0


def _group_of_one(world: Group) -> dist.ProcessGroup:
    """Make a process group of this rank alone: to DeepSpeed None would mean all ranks."""
    own: dist.ProcessGroup = dist.new_group([world.rank], use_local_synchronization=True)
    return own
