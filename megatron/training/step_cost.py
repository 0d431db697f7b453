"""How long an optimizer step takes, predicted from shapes and a few rates: for more GPUs than there are at hand.

A pipeline of p stages that takes m micro-batches in turns of one forward and one backward (1F1B; Narayanan et al. 2021,
arXiv:2104.04473) is as slow as its slowest stage, and fills once: (m - 1) x slowest + sum of all. A micro-batch on a
stage costs its products, what tensor, Ulysses and pipeline ranks tell each other for it, of which nothing is hidden but
by --tp-comm-overlap copies, or the host's time, or what ZeRO-2 and 3 send beside it, whichever takes longest. After the
last one ZeRO-0 and 1 sum gradients, and ZeRO-1 and 2 gather weights.

Not in it: noise between ranks, congestion of a network, the optimizer's arithmetic (it is in the rate of one GPU, which
does all of it, and ranks share it), products that are slower because they are narrower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.config.derived import data_parallel_size
from megatron.config.errors import ConfigError
from megatron.config.sections import RunConfig
from megatron.model.flops import attention_flops, block_parameters
from megatron.model.memory import rank_parameters
from megatron.model.recompute_flops import recomputed_flops_per_token
from megatron.parallel.mesh import AXES, Axis, Coordinates, Mesh
from megatron.training.cluster import Cluster, Placed
from megatron.training.recompute import Recompute

PARTS = ("compute", "tensor", "ulysses", "sends", "data", "waiting", "host")
"""What a step's seconds are for; see `StepCost`."""


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Seconds of a step on the slowest pipeline stage, by what they are for; all but the last add up.

    Attributes:
        compute: products and all that goes with them.
        tensor: collectives of tensor ranks.
        ulysses: exchanges of Ulysses ranks.
        sends: messages between pipeline stages.
        waiting: for other stages.
        data: sums of gradients and gathering of weights that nothing hides.
        host: the GPU waits for the host's launches.
        ideal: what the step would take if all GPUs computed all the time.
    """

    compute: float
    tensor: float
    ulysses: float
    sends: float
    waiting: float
    data: float
    host: float
    ideal: float

    @property
    def seconds(self) -> float:
        """Time of the step."""
        return sum(getattr(self, part) for part in PARTS)

    @property
    def efficiency(self) -> float:
        """Tokens a second and GPU over those of a GPU that does nothing but compute."""
        return self.ideal / self.seconds

    @property
    def communication(self) -> float:
        """Share of the step in which ranks tell each other something and do nothing else."""
        return (self.tensor + self.ulysses + self.sends + self.data) / self.seconds


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """Seconds of one micro-batch on a pipeline stage."""

    compute: float
    tensor: float
    ulysses: float
    sends: float
    beside: float
    host: float

    @property
    def working(self) -> float:
        return self.compute + self.tensor + self.ulysses + self.sends

    @property
    def seconds(self) -> float:
        return max(self.working, self.beside, self.host)


def predict_step(
    config: RunConfig, padded_vocab_size: int, recompute: Recompute, world_size: int, cluster: Cluster
) -> StepCost:
    """Predict a step of a run on so many ranks.

    Args:
        config: the run, its pipeline's stages divided.
        padded_vocab_size: v.
        recompute: the policies of its stages.
        world_size: number of ranks.
        cluster: where they are.

    Raises:
        ConfigError: the optimizer or weights are on the host, whose speed no rate here tells, or ranks that copy into
            each other's memory on several.
    """
    engine = config.engine
    for flag, given in (("--cpu-optimizer", engine.cpu_optimizer), ("--remote-device", engine.remote_device != "none")):
        if given:
            raise ConfigError([f"{flag} makes a step as slow as the host and its links: measure it; here leave it out"])
    shape = _Shape(config, padded_vocab_size, recompute, world_size, cluster)
    stages = [shape.stage(index) for index in range(shape.mesh.pipeline)]
    slowest, m = max(stages, key=lambda stage: stage.seconds), recompute.num_micro_batches
    return StepCost(
        compute=m * slowest.compute,
        tensor=m * slowest.tensor,
        ulysses=m * slowest.ulysses,
        sends=m * slowest.sends,
        waiting=sum(stage.seconds for stage in stages) - slowest.seconds,
        data=shape.once() + m * (slowest.seconds - max(slowest.working, slowest.host)),
        host=m * max(0.0, slowest.host - slowest.working),
        ideal=m * sum(stage.compute for stage in stages) / len(stages),
    )


class _Shape:
    """A run's sizes, in the terms of the formulas."""

    def __init__(
        self, config: RunConfig, padded_vocab_size: int, recompute: Recompute, world_size: int, cluster: Cluster
    ) -> None:
        parallel, training = config.parallel, config.training
        self.config = config
        self.rows = padded_vocab_size
        self.recompute = recompute
        self.cluster = cluster
        self.mesh = Mesh(
            pipeline=parallel.pipeline_model_parallel_size,
            data=data_parallel_size(parallel, world_size),
            ulysses=parallel.ds_sequence_parallel_size,
            tensor=parallel.tensor_model_parallel_size,
        )
        self.weight_bytes = 4 if training.precision == "fp32" else 2
        self.gradient_bytes = 4 if training.accumulate_allreduce_grads_in_fp32 else self.weight_bytes
        self.tokens = training.micro_batch_size * config.data.seq_length / self.mesh.ulysses
        self.hidden_bytes = self.tokens * config.model.hidden_size * self.weight_bytes

    def stage(self, index: int) -> _Stage:
        blocks = self.recompute.stage_blocks[index]
        return _Stage(
            compute=self._flops(index) / self.cluster.flops,
            tensor=self._tensor(index),
            ulysses=blocks * self._ulysses(index),
            sends=self._sends(index),
            beside=self._beside(blocks),
            host=self.cluster.host_seconds,
        )

    def once(self) -> float:
        """Add up what follows the last micro-batch: sums of gradients, then shares of weights to all."""
        stage, seconds = self.config.engine.zero_stage, 0.0
        if stage < 2:
            seconds += self._in_buckets("zero_reduce_bucket_size", self.gradient_bytes, reduce=True)
        if stage in (1, 2):
            seconds += self._in_buckets("zero_allgather_bucket_size", self.weight_bytes, reduce=False)
        return seconds

    def _place(self, *axes: Axis) -> Placed:
        """Find where the first rank's group along the axes is."""
        sizes = [size if axis in axes else 1 for axis, size in zip(AXES, self.mesh.sizes, strict=True)]
        everywhere = Mesh(*sizes)
        return self.cluster.place(
            self.mesh.rank_at(Coordinates(*everywhere.coordinates(rank))) for rank in range(everywhere.world_size)
        )

    def _is_last(self, index: int) -> bool:
        return index == self.mesh.pipeline - 1

    def _flops(self, index: int) -> float:
        """Count a micro-batch's FLOPs on one rank of a stage, recompute among them, attention as causal."""
        model, length, blocks = self.config.model, self.config.data.seq_length, self.recompute.stage_blocks[index]
        head = self.rows * model.hidden_size if self._is_last(index) else 0
        products = 2 * (blocks * block_parameters(model) + head)
        attention = blocks * attention_flops(model, length, causal=True)
        again = recomputed_flops_per_token(
            model, length, blocks, self.recompute.policies[index], self.recompute.shape, causal=True
        )
        return self.tokens * (3 * (products + attention) + again) / self.mesh.tensor

    def _recomputed(self, index: int) -> tuple[int, int]:
        """Count the blocks that a stage recomputes, and the sums at the end of a unit that are not made again."""
        policy, blocks = self.recompute.policies[index], self.recompute.stage_blocks[index]
        units = [unit.end - unit.first for unit in policy.units(blocks) if unit.is_recomputed]
        return sum(units), 0 if self.config.model.hidden_dropout else len(units)

    def _tensor(self, index: int) -> float:
        """Add up the collectives of a micro-batch between tensor ranks: of blocks, embedding and head."""
        parallel, group = self.config.parallel, self._place("tensor")
        if group.size == 1:
            return 0.0
        blocks, last = self.recompute.stage_blocks[index], self._is_last(index)
        again, spared = self._recomputed(index)
        if not parallel.sequence_parallel:  # two sums forward, two backward; one of the embedding, one of the head
            return (4 * blocks + 2 * again - spared + (index == 0) + last) * group.all_reduce(self.hidden_bytes)
        regathered = 0 if parallel.keep_gathered_inputs else 2
        moved = group.gather(self.hidden_bytes)
        ends = (2 * (index == 0) + 3 * last) * moved  # the head gathers its input again for its weight's gradient
        if parallel.tp_comm_overlap == "copies" and group.hosts > 1:
            raise ConfigError(
                [
                    f"--tp-comm-overlap copies: {group.size} tensor ranks would be on {group.hosts} hosts, and copies "
                    "go between GPUs of one; use --tp-comm-overlap none, or fewer tensor ranks"
                ]
            )
        if parallel.tp_comm_overlap != "copies":
            return (blocks * (8 + regathered) + 4 * again - spared) * moved + ends
        return (
            blocks * self._left_of_copies(moved, twice=True) + again * self._left_of_copies(moved, twice=False) + ends
        )

    def _left_of_copies(self, moved: float, *, twice: bool) -> float:
        """Find what products leave of the copies beside them in one block.

        Args:
            moved: seconds that the other ranks' shards travel.
            twice: backward as well, where copies go the other way beside the products of the inputs' gradients.
        """
        model, ranks = self.config.model, self.mesh.tensor
        heads = model.num_attention_heads * model.kv_channels
        keys = 2 * model.num_key_value_heads * model.kv_channels
        widths = (heads + keys, heads, model.ffn_hidden_size * (2 if model.gated else 1), model.ffn_hidden_size)
        products = (2 * self.tokens * model.hidden_size * width / ranks / self.cluster.flops for width in widths)
        return (2 if twice else 1) * sum(max(0.0, moved - product * (ranks - 1) / ranks) for product in products)

    def _ulysses(self, index: int) -> float:
        """Add up the exchanges of one block: queries, keys and values; what attention gives; backward the same."""
        model, group = self.config.model, self._place("ulysses")
        heads = model.num_attention_heads * model.kv_channels
        keys = model.num_key_value_heads * model.kv_channels
        size = self.tokens * self.weight_bytes / self.mesh.tensor
        once = group.exchange(size * (heads + 2 * keys)) + group.exchange(size * heads)
        blocks, (again, _) = self.recompute.stage_blocks[index], self._recomputed(index)
        return once * (2 + again / blocks)

    def _sends(self, index: int) -> float:
        """Hidden states to the next stage, gradients to the one before, each sent and received."""
        if self.mesh.pipeline == 1:
            return 0.0
        sharded = self.config.parallel.sequence_parallel
        message = self.hidden_bytes / (self.mesh.tensor if sharded else 1)
        neighbours = (index > 0) + (not self._is_last(index))
        return 2 * neighbours * self._place("pipeline").link.seconds(message)

    def _parameters(self) -> int:
        """Count those of the fullest stage's rank."""
        last = self.mesh.pipeline - 1
        return max(
            rank_parameters(
                self.config.model,
                self.rows,
                tensor_size=self.mesh.tensor,
                num_blocks=blocks,
                is_first=index == 0,
                is_last=index == last,
            )
            for index, blocks in enumerate(self.recompute.stage_blocks)
        )

    def _in_buckets(self, bucket: str, itemsize: int, *, reduce: bool) -> float:
        """All of a rank's parameters between the ranks that hold the same ones, a bucket of elements at a time."""
        group, parameters = self._place("data", "ulysses"), self._parameters()
        number = math.ceil(parameters / getattr(self.config.engine, bucket))
        part = parameters / number * itemsize
        return number * (group.all_reduce(part) if reduce else group.gather(part))

    def _beside(self, blocks: int) -> float:
        """Add up what ZeRO-2 and 3 send beside a micro-batch: sums of gradients; 3 also weights, by blocks, twice."""
        stage = self.config.engine.zero_stage
        if stage == 2:
            return self._in_buckets("zero_reduce_bucket_size", self.gradient_bytes, reduce=True)
        if stage < 3:
            return 0.0
        group, part = self._place("data", "ulysses"), self._parameters() / (blocks + 2)
        weights = group.gather(part * self.weight_bytes)
        return (blocks + 2) * (2 * weights + group.gather(part * self.gradient_bytes))
