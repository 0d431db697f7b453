"""Activation recompute of a run: the policy of each pipeline stage, and what is told of it at the start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

from megatron.config.data import DataConfig
from megatron.config.errors import ConfigError
from megatron.config.kernels import KernelsConfig
from megatron.config.model import ModelConfig
from megatron.config.training import TrainingConfig
from megatron.kernels.attention.interface import AttentionBackend
from megatron.model.recompute_flops import AttentionProducts, UnitShape, kept_products, recomputed_flops_per_token
from megatron.parallel.chunks import SequenceChunks
from megatron.parallel.groups import Group, ParallelGroups
from megatron.parallel.recompute import Granularity, Method, RecomputePolicy, Unit
from megatron.parallel.recompute_inputs import pinned_bytes

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """What every pipeline stage recomputes.

    Attributes:
        config: the architecture.
        shape: of a rank's micro-batch.
        stage_blocks: blocks of each stage; all of them where there is no pipeline.
        policies: of each stage.
        num_micro_batches: micro-batches of a step.
        input_bytes: what the input of one unit takes on a rank.
    """

    config: ModelConfig
    shape: UnitShape
    stage_blocks: tuple[int, ...]
    policies: tuple[RecomputePolicy, ...]
    num_micro_batches: int
    input_bytes: int

    def flops_per_token(self) -> float:
        """Count what backward computes again of one token, on all stages."""
        return sum(
            recomputed_flops_per_token(self.config, self.shape.seq_length, blocks, policy, self.shape)
            for blocks, policy in zip(self.stage_blocks, self.policies, strict=True)
        )

    def describe(self) -> str | None:
        """Say what is recomputed and what is kept where, on the first stage; None when nothing is recomputed."""
        policy, blocks = self.policies[0], self.stage_blocks[0]
        if policy.granularity == "none":
            return None
        where = " of the first stage" if len(self.policies) > 1 else ""
        if policy.recomputes_attention:
            text = f" recompute: the core of attention in {blocks} blocks{where}; kept: its queries, keys and values, "
            text += "and all around it"
            fused = self.shape.attention == "fused"
            return text + ("; this kernel keeps no s x s weights, so that little is saved" if fused else "")
        units = [unit for unit in policy.units(blocks) if unit.is_recomputed]
        count, of = units[-1].end, "" if units[-1].end == blocks else f" of {blocks}"
        size = f" in units of {units[0].end}" if units[0].end > 1 else ""
        return f" recompute: {count}{of} blocks{where}{size}; kept: {self._kept(units, all_blocks=not of)}"

    def host_bytes(self, stage: int) -> int:
        """Count the pinned memory of the host that the inputs of a rank of a stage wait in."""
        policy, blocks = self.policies[stage], self.stage_blocks[stage]
        if not policy.on_host:
            return 0
        units = sum(unit.is_recomputed for unit in policy.units(blocks))
        in_flight = micro_batches_in_flight(stage, len(self.policies), self.num_micro_batches)
        return units * in_flight * pinned_bytes(self.input_bytes)

    def _kept(self, units: Sequence[Unit], *, all_blocks: bool) -> str:
        """Name what is kept of the first stage's recomputed units, with its bytes in all micro-batches in flight."""
        policy = self.policies[0]
        count = len(units) * micro_batches_in_flight(0, len(self.policies), self.num_micro_batches)
        text = "their inputs"
        text += " in the host's memory" if policy.on_host else ""
        text += f", divided over {policy.split_over.size} tensor ranks" if policy.split_over.size > 1 else ""
        text += f" ({(self.host_bytes(0) or count * self.input_bytes) / GIB:.2f} GiB)"
        if policy.granularity == "products":
            kept = kept_products(self.config, self.shape, units[0].end, policy.budget_bytes).values()
            names = ", ".join(dict.fromkeys(product.result for product in kept))
            size = count * sum(product.num_bytes for product in kept)
            text += f", and of their products {names} ({size / GIB:.2f} GiB)"
        return text if all_blocks else f"{text}, and all of the others"


def unit_shape(
    config: ModelConfig,
    training: TrainingConfig,
    data: DataConfig,
    groups: ParallelGroups,
    attention: AttentionBackend,
    itemsize: int,
    mlp_chunks: SequenceChunks | None = None,
    parts: int = 1,
) -> UnitShape:
    """Put together the sizes of a rank's micro-batch.

    Args:
        config: the architecture.
        training: says how many samples a micro-batch has.
        data: says how long they are.
        groups: the ranks that share them.
        attention: the chosen backend.
        itemsize: bytes of an element.
        mlp_chunks: how an MLP goes through the sequence; None: it takes it whole.
        parts: into how many parts blocks cut the micro-batch.
    """
    batch = training.micro_batch_size // parts
    tokens = training.micro_batch_size * data.seq_length // groups.ulysses.size
    chunk = 0 if mlp_chunks is None else mlp_chunks.positions(batch) * batch * mlp_chunks.shards
    return UnitShape(
        tokens=tokens,
        mlp_chunk=min(chunk, tokens // parts),
        seq_length=data.seq_length,
        tensor_size=groups.tensor.size,
        parts=parts,
        itemsize=itemsize,
        keys=counted_keys(config, data, attention),
        exchanged=groups.ulysses.size > 1,
        attention=attention_in_products(attention, config.attention_dropout),
    )


def attention_in_products(backend: AttentionBackend, dropout: float) -> AttentionProducts:
    """Say how a backend's work appears among the products: as two of torch's own, as one that may be kept, or not."""
    if backend.in_products == "fused without dropout":
        return "opaque" if dropout else "fused"
    return backend.in_products


def counted_keys(config: ModelConfig, data: DataConfig, backend: AttentionBackend) -> float:
    """Count the keys of a query, on average, that a fused kernel's FLOPs are of.

    Formulas know causality, and a window that a kernel takes as such; they know no documents, and of a mask nothing.
    """
    window = config.attention_window if config.attention_window < data.seq_length else 0
    if backend.dense_document_mask and (data.reset_attention_mask or window):
        return float(data.seq_length)
    keys = window or data.seq_length
    return keys * (1 - keys / (2 * data.seq_length))


def build_recompute(
    kernels: KernelsConfig,
    config: ModelConfig,
    shape: UnitShape,
    *,
    stage_blocks: Sequence[int],
    num_micro_batches: int,
    tensor: Group,
    sequence_parallel: bool,
) -> Recompute:
    """Make the policies that the flags ask for.

    Args:
        kernels: the flags.
        config: the architecture.
        shape: of a rank's micro-batch.
        stage_blocks: blocks of each pipeline stage.
        num_micro_batches: micro-batches of a step, the most that there are during the run.
        tensor: the tensor group.
        sequence_parallel: whether its ranks hold shards of the sequence between blocks.

    Raises:
        ConfigError: a budget does not hold a single product of each unit.
    """
    split_over = tensor if kernels.distribute_saved_activations else Group.alone()
    common = RecomputePolicy(
        granularity=cast(Granularity, kernels.recompute_granularity),
        method=cast(Method, kernels.recompute_method or "uniform"),
        num_layers=kernels.recompute_num_layers,
        split_over=split_over,
        on_host=kernels.recompute_inputs_on_host,
    )
    policies = tuple(
        replace(
            common,
            budget_bytes=unit_budget_bytes(
                kernels.recompute_budget_gib,
                num_units=sum(unit.is_recomputed for unit in common.units(blocks)),
                stage=stage,
                num_stages=len(stage_blocks),
                num_micro_batches=num_micro_batches,
            ),
        )
        for stage, blocks in enumerate(stage_blocks)
    )
    shards = split_over.size * (tensor.size if sequence_parallel else 1)
    itemsize = 4 if config.fp32_residual_connection else shape.itemsize
    recompute = Recompute(
        config=config,
        shape=shape,
        stage_blocks=tuple(stage_blocks),
        policies=policies,
        num_micro_batches=num_micro_batches,
        input_bytes=-(-shape.tokens * config.hidden_size // shards) * itemsize,
    )
    if errors := list(_idle_budgets(recompute, kernels.recompute_budget_gib)):
        raise ConfigError(errors[:1])
    return recompute


def unit_budget_bytes(budget_gib: float, *, num_units: int, stage: int, num_stages: int, num_micro_batches: int) -> int:
    """Divide what the kept products of a rank may take among all units that keep some at the same time.

    Those are the units of the stage, once for each micro-batch in flight.

    Args:
        budget_gib: GiB of a rank.
        num_units: recomputed units of the stage; 0 gives 0.
        stage: index of the pipeline stage.
        num_stages: stages of the pipeline.
        num_micro_batches: micro-batches of a step.

    Returns:
        bytes of one unit in one micro-batch, rounded down.
    """
    in_flight = micro_batches_in_flight(stage, num_stages, num_micro_batches)
    return int(budget_gib * GIB) // (num_units * in_flight) if num_units else 0


def micro_batches_in_flight(stage: int, num_stages: int, num_micro_batches: int) -> int:
    """Count the micro-batches whose activations a stage holds at once, under 1F1B: p - i on stage i of p, or all.

    Stage i runs p - i forward passes before its first backward, then one of each in turn (Narayanan et al. 2019,
    "PipeDream").
    """
    return min(num_stages - stage, num_micro_batches)


def _idle_budgets(recompute: Recompute, budget_gib: float) -> Iterator[str]:
    for stage, (blocks, policy) in enumerate(zip(recompute.stage_blocks, recompute.policies, strict=True)):
        if policy.granularity != "products":
            continue
        units = [unit.end - unit.first for unit in policy.units(blocks) if unit.is_recomputed]
        if not kept_products(recompute.config, recompute.shape, units[0], policy.budget_bytes):
            in_flight = micro_batches_in_flight(stage, len(recompute.policies), recompute.num_micro_batches)
            yield (
                f"--recompute-budget-gib {budget_gib:g} leaves {policy.budget_bytes:,} bytes to each of {len(units)} "
                f"recomputed units x {in_flight} micro-batches in flight, and no product of a unit is that small: "
                f"raise it, or use --recompute-granularity full"
            )
