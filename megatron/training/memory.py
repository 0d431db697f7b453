"""The most memory that a run will hold on one rank, predicted from its config before anything is allocated.

A step has its peak at one of five moments, and each is the sum of what exists then:

- loss: forward has kept its activations, and head and loss work;
- backward: the first block that backward enters (and recomputes) has its activations and gradients in the work;
- end of backward: so has the last one, of which nothing else is kept, and the gradients of the others are there;
- reduction: backward is done, and DeepSpeed copies gradients into buckets;
- step: the optimizer has its temporaries.

What DeepSpeed holds for each parameter under which stage was measured; tests/training/test_memory.py and
test_memory_gpu.py measure it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron.config.engine import EngineConfig
from megatron.config.kernels import KernelsConfig
from megatron.config.training import TrainingConfig
from megatron.model.flops import block_parameters
from megatron.model.memory import BlockMemory, block_memory, core_bytes, head_memory, rank_parameters
from megatron.model.recompute_flops import kept_products
from megatron.parallel.recompute import RecomputePolicy
from megatron.training.recompute import GIB, Recompute, micro_batches_in_flight

WORKSPACE_BYTES = 2**26
"""Of the library that multiplies matrices, on a GPU."""

FOUND = frozenset({"attention", "scores", "weighted values", "up"})
"""Products whose results backward of a block reads as they are."""

LIVE_PARAMETERS = 1_000_000_000
"""Gathered weights that ZeRO-3 keeps at most, as `engine.settings` writes it."""


@dataclass(frozen=True, kw_only=True)
class StateMemory:
    """What DeepSpeed holds of a rank's parameters, in bytes.

    Attributes:
        weights: in the dtype of forward, with those that ZeRO-3 gathers.
        gradients: those that are there when the backward pass of a later micro-batch starts.
        optimizer: the fp32 copy and the optimizer's own.
        buckets: buffers that stay.
        made: gradients that a backward pass adds.
        reducing: what the reduction adds to all that.
        stepping: what the optimizer's step adds.
        first_made: of the optimizer's own, what is made in the first step.
    """

    weights: float
    gradients: float
    optimizer: float
    buckets: float = 0
    made: float = 0
    reducing: float = 0
    stepping: float = 0
    first_made: float = 0

    @property
    def total(self) -> float:
        """Bytes when backward starts."""
        return self.weights + self.gradients + self.optimizer + self.buckets


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The fullest rank of a run.

    Attributes:
        parameters: on it, before ZeRO divides them.
        state: DeepSpeed's.
        activations: kept by all blocks, of all micro-batches in flight.
        moments: bytes at each moment, by its name.
        stage: its pipeline stage.
        host: bytes of the host's memory that inputs of recomputed units wait in.
    """

    parameters: int
    state: StateMemory
    activations: int
    moments: dict[str, float]
    stage: int = 0
    host: int = 0

    @property
    def peak(self) -> float:
        """Bytes at the fullest moment."""
        return max(self.moments.values())

    @property
    def first_peak(self) -> float:
        """Bytes at the fullest moment of the first step, at whose end the optimizer makes its own numbers."""
        return max(size - self.state.first_made * (name != "step") for name, size in self.moments.items())

    @property
    def peak_gib(self) -> float:
        """GiB at that moment."""
        return self.peak / GIB

    @property
    def moment(self) -> str:
        """Name of the fullest moment."""
        return max(self.moments, key=lambda name: self.moments[name])

    def to_json(self) -> dict[str, float]:
        """Give the parts in GiB."""
        parts = {
            "weights": self.state.weights,
            "gradients": self.state.gradients,
            "optimizer": self.state.optimizer,
            "buckets": self.state.buckets,
            "activations": self.activations,
            "peak": self.peak,
            "host": self.host,
        }
        return {name: size / GIB for name, size in parts.items()}

    def describe(self) -> str:
        """Say it in one line."""
        parts = self.to_json()
        names = ("weights", "gradients", "optimizer", "activations")
        listed = ", ".join(f"{name} {parts[name]:.2f}" for name in names)
        host = f"; on the host {parts['host']:.2f} GiB of pinned memory" if self.host else ""
        return f" memory: predicted peak {parts['peak']:.2f} GiB, at the {self.moment} ({listed}){host}"


def plan_memory(
    recompute: Recompute,
    *,
    kernels: KernelsConfig,
    training: TrainingConfig,
    engine: EngineConfig,
    optimizer_slots: int,
    padded_vocab_size: int,
    replicas: int,
    sequence_parallel: bool,
    fused: bool,
    keep_gathered: bool = False,
) -> MemoryPlan:
    """Predict the peak of every pipeline stage, and return the highest.

    Args:
        recompute: the policies of the stages, with the model and the shape of a rank's micro-batch.
        kernels: of which the chunks of the loss count, whether products take 8 bits, and whether blocks are recorded.
        training: of which precision and the dtype of the sums count.
        engine: ZeRO's stage, offload and buckets.
        optimizer_slots: numbers that the optimizer keeps of each parameter: 2 for Adam, 1 for momentum.
        padded_vocab_size: v.
        replicas: ranks over which ZeRO divides, data and Ulysses together.
        sequence_parallel: whether tensor ranks have shards of the sequence.
        fused: whether the fused kernels run.
        keep_gathered: whether blocks keep what they gather of these shards.
    """
    block = block_memory(
        recompute.config,
        recompute.shape,
        sequence_parallel=sequence_parallel,
        fused=fused,
        fp8=kernels.fp8,
        keep_gathered=keep_gathered,
    )
    plans = []
    last = len(recompute.stage_blocks) - 1
    for stage, blocks in enumerate(recompute.stage_blocks):
        parameters = rank_parameters(
            recompute.config,
            padded_vocab_size,
            tensor_size=recompute.shape.tensor_size,
            num_blocks=blocks,
            is_first=stage == 0,
            is_last=stage == last,
        )
        state = state_memory(
            parameters, training, engine, replicas, optimizer_slots, recompute.num_micro_batches > 1 or last > 0
        )
        if kernels.fp8 and engine.zero_stage < 3:  # both copies of each weight, for the length of a step
            copies = 2 * blocks * block_parameters(recompute.config) / recompute.shape.tensor_size
            state = replace(state, weights=state.weights + copies)
        head = 0
        if stage == last:
            head = head_memory(
                recompute.config,
                recompute.shape,
                padded_vocab_size,
                sequence_parallel=sequence_parallel,
                chunk_size=kernels.loss_chunk_size,
                fused=fused,
            )
        plans.append(_plan_stage(recompute, stage, block, parameters, state, head, graphed=kernels.cuda_graph))
    return max(plans, key=lambda plan: plan.peak)


def _plan_stage(
    recompute: Recompute,
    stage: int,
    block: BlockMemory,
    parameters: int,
    state: StateMemory,
    head: int,
    *,
    graphed: bool,
) -> MemoryPlan:
    num_stages = len(recompute.stage_blocks)
    in_flight = micro_batches_in_flight(stage, num_stages, recompute.num_micro_batches)
    of_blocks = _activations(recompute, stage, block)
    between = block.stream * (2 * in_flight if num_stages > 1 else 1)  # what stages send, or the final norm's input
    activations = in_flight * of_blocks.kept + between
    at_start = state.total + WORKSPACE_BYTES
    # Activations go as gradients come: there is most of both at one end or the other.
    left = activations - of_blocks.kept + of_blocks.leaving
    moments = {
        "loss": at_start + activations + head,
        "backward": at_start + activations + of_blocks.entering,
        "end of backward": at_start + left + state.made * of_blocks.share_behind,
        "reduction": at_start + state.made + state.reducing,
        "step": at_start + state.made + state.stepping,
    }
    if graphed:  # what the blocks take at their fullest is never given back
        pool = max(activations + of_blocks.entering, left + state.made)
        moments["loss"] = at_start + pool + head
        moments["reduction"] += pool
        moments["step"] += pool
    return MemoryPlan(
        parameters=parameters,
        state=state,
        activations=activations,
        moments=moments,
        stage=stage,
        host=recompute.host_bytes(stage),
    )


class _Activations(NamedTuple):
    """Of one micro-batch in the blocks of a stage, in bytes.

    Attributes:
        kept: by all blocks between forward and backward.
        entering: what backward of its first unit adds.
        leaving: all that there is in backward of its last unit.
        share_behind: of the blocks, those whose backward is done by then.
    """

    kept: int
    entering: int
    leaving: int
    share_behind: float


def _activations(recompute: Recompute, stage: int, block: BlockMemory) -> _Activations:
    policy, blocks = recompute.policies[stage], recompute.stage_blocks[stage]
    units = [unit.end - unit.first for unit in policy.units(blocks) if unit.is_recomputed]
    last = units[0] if units else 1
    leaving, behind = last * block.kept + block.working, 1 - last / blocks
    if policy.recomputes_attention:
        core = core_bytes(recompute.config, recompute.shape) // recompute.shape.tensor_size
        return _Activations(blocks * (block.kept - core), core + block.working, leaving, behind)
    whole = (blocks - sum(units)) * block.kept
    if not units:
        return _Activations(whole, block.working, leaving, behind)
    inputs = 0 if policy.on_host else recompute.input_bytes
    products = [_kept_bytes(recompute, policy, size) for size in units]
    # A unit's input is kept already, and is not on the host, from where that of the next one comes beside the work.
    entering = max(units) * block.kept - products[-1].found + block.working
    entering += recompute.input_bytes if policy.on_host else -block.stream
    kept = whole + len(units) * inputs + sum(of_unit.kept for of_unit in products)
    return _Activations(kept, entering, leaving, behind)


class _KeptBytes(NamedTuple):
    """Of the products that a unit keeps, in bytes.

    Attributes:
        kept: by all of them.
        found: by those that are what blocks keep anyway. The others are made into that.
    """

    kept: int
    found: int


def _kept_bytes(recompute: Recompute, policy: RecomputePolicy, size: int) -> _KeptBytes:
    if policy.granularity != "products":
        return _KeptBytes(0, 0)
    products = kept_products(recompute.config, recompute.shape, size, policy.budget_bytes).values()
    found = sum(product.num_bytes for product in products if product.result in FOUND)
    return _KeptBytes(sum(product.num_bytes for product in products), found)


def state_memory(
    parameters: int,
    training: TrainingConfig,
    engine: EngineConfig,
    replicas: int,
    optimizer_slots: int,
    accumulates: bool,
) -> StateMemory:
    """Count what DeepSpeed holds for a rank's parameters.

    Args:
        parameters: of the rank, before ZeRO divides them.
        training: precision, and the dtype of the sums of gradients.
        engine: stage, offload and buckets.
        replicas: ranks over which ZeRO divides.
        optimizer_slots: numbers that the optimizer keeps of each parameter.
        accumulates: whether a step has several micro-batches, so that gradients are there when backward starts.
    """
    item = 4 if training.precision == "fp32" else 2
    in_fp32 = training.accumulate_allreduce_grads_in_fp32
    bucket = min(parameters, engine.zero_reduce_bucket_size)
    optimizer = 0 if engine.cpu_optimizer else (1 + optimizer_slots) * 4 * parameters / replicas
    first_made = optimizer * optimizer_slots / (1 + optimizer_slots)
    if engine.zero_stage == 0:
        gradients = 4 * parameters * accumulates
        return StateMemory(
            weights=4 * parameters,
            gradients=gradients,
            optimizer=optimizer_slots * 4 * parameters,
            made=4 * parameters - gradients,
            first_made=optimizer_slots * 4 * parameters,
        )
    if engine.zero_stage == 1 and training.precision == "bf16" and in_fp32 and not engine.cpu_optimizer:
        # The sums are there from the start; a micro-batch's own gradients are freed once they are added.
        own, gathering = 2 * parameters, 2 * min(parameters, engine.zero_allgather_bucket_size)
        return StateMemory(
            weights=2 * parameters,
            gradients=4 * parameters,
            optimizer=optimizer,
            made=own,
            reducing=max(4 * bucket - own, 0),
            stepping=max(gathering - own, 0) if replicas > 1 else 0,
            first_made=first_made,
        )
    state = _partitioned(parameters, item, 4 if in_fp32 else item, engine, replicas, optimizer, accumulates)
    return replace(state, first_made=first_made)


def _partitioned(
    parameters: int,
    item: int,
    sum_item: int,
    engine: EngineConfig,
    replicas: int,
    optimizer: float,
    accumulates: bool,
) -> StateMemory:
    """Count what ZeRO's own optimizers hold, which fill a bucket while backward runs; `item`s are bytes of a number."""
    bucket, own = engine.zero_reduce_bucket_size, parameters / replicas
    divides_gradients = engine.zero_stage >= 2
    kept = sum_item * (own if divides_gradients else parameters)
    if engine.cpu_optimizer and divides_gradients:
        kept = 0.0
    weights: float = item * parameters
    if engine.zero_stage == 3:
        is_away = engine.remote_device == "cpu"
        gathered = min(parameters, LIVE_PARAMETERS) if is_away or replicas > 1 else 0
        weights = (0 if is_away else item * own) + item * gathered
    return StateMemory(
        weights=weights,
        gradients=kept * accumulates,
        optimizer=optimizer,
        buckets=0 if engine.zero_stage == 2 else 4 * bucket,  # stage 2 makes them as backward goes
        made=kept * (not accumulates),
        reducing=(item + 4) * bucket,
        stepping=0 if engine.cpu_optimizer else 4 * own,
    )
