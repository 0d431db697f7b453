"""Rules of activation recompute."""

# ruff: noqa: D401 - the docstring of a rule states what holds, not what the function does

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.kernels import KernelsConfig
from megatron.config.model import ModelConfig
from megatron.config.parallel import ParallelConfig

OF_BLOCKS = ("full", "products")
"""Granularities that recompute units of blocks."""


def options_of_units_have_units(kernels: KernelsConfig) -> Iterator[str]:
    """What says how blocks are recomputed needs blocks that are."""
    if kernels.recompute_granularity in OF_BLOCKS:
        return
    given = []
    if kernels.recompute_method is not None:
        given.append(f"--recompute-method {kernels.recompute_method}")
    if kernels.recompute_num_layers != 1:
        given.append(f"--recompute-num-layers {kernels.recompute_num_layers}")
    if kernels.distribute_saved_activations:
        given.append("--distribute-saved-activations")
    if kernels.recompute_inputs_on_host:
        given.append("--recompute-inputs-on-host")
    for said in given:
        yield (
            f"{said} has no effect with --recompute-granularity {kernels.recompute_granularity}, which recomputes no "
            f"whole blocks: drop it, or choose full or products."
        )


def kept_products_have_a_budget(kernels: KernelsConfig) -> Iterator[str]:
    """Products are kept within a budget, and nothing else is."""
    granularity, budget = kernels.recompute_granularity, kernels.recompute_budget_gib
    if granularity == "products" and budget == 0:
        yield (
            "--recompute-granularity products keeps no product with --recompute-budget-gib 0: say how much memory a "
            "rank has for them, or choose full, which is the same without."
        )
    if granularity != "products" and budget > 0:
        yield (
            f"--recompute-budget-gib {budget:g} has no effect with --recompute-granularity {granularity}: drop it, or "
            f"choose products, which alone keeps to a budget."
        )


def recomputed_units_fit_the_stages(
    model: ModelConfig, parallel: ParallelConfig, kernels: KernelsConfig
) -> Iterator[str]:
    """No more blocks are recomputed, or form a unit, than the largest pipeline stage has."""
    stages, asked = parallel.pipeline_model_parallel_size, kernels.recompute_num_layers
    try:
        largest = max(parallel.stage_blocks or (model.num_layers - stages + 1,))
    except ValueError:  # the partition's own rule tells
        return
    if kernels.recompute_granularity in OF_BLOCKS and asked > largest >= 1:
        limit = f"the {largest} blocks that a pipeline stage can have" if stages > 1 else f"--num-layers {largest}"
        yield f"--recompute-num-layers {asked} is more than {limit}: use at most {largest}."


def saved_activations_are_the_same_on_tensor_ranks(parallel: ParallelConfig, kernels: KernelsConfig) -> Iterator[str]:
    """Inputs are divided over ranks that would keep the same ones otherwise."""
    if not kernels.distribute_saved_activations:
        return
    if parallel.tensor_model_parallel_size == 1:
        yield (
            "--distribute-saved-activations has no effect with --tensor-model-parallel-size 1: there is no other rank "
            "to keep a share; drop it."
        )
    elif parallel.sequence_parallel:
        yield (
            "--distribute-saved-activations with --sequence-parallel: each tensor rank keeps its own shard of the "
            "sequence already; drop --distribute-saved-activations."
        )
