"""The engine's half of the composition root: model, plans of recompute and of memory, engine, from the config."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megatron.config.deepspeed_json import read_deepspeed_json
from megatron.config.errors import ConfigError
from megatron.config.sections import RunConfig
from megatron.engine.interface import Engine
from megatron.engine.settings import build_settings
from megatron.kernels.attention.interface import AttentionBackend, AttentionRequest
from megatron.kernels.choice import PLAIN, Kernels
from megatron.model.gpt import GPT, padded_vocab_size
from megatron.model.init import draw_parameters, initialize_parameters
from megatron.parallel.chunks import SequenceChunks
from megatron.parallel.groups import ParallelGroups
from megatron.training.memory import MemoryPlan, plan_memory
from megatron.training.param_groups import build_param_groups
from megatron.training.pipeline import balance_stages
from megatron.training.place import Place, takes_halves
from megatron.training.recompute import Recompute, build_recompute, unit_shape
from megatron.training.watched_engine import SteadyWeights

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def with_partition(config: RunConfig, vocab_size: int) -> RunConfig:
    """Divide the blocks over the pipeline stages, where there are some and the flags leave it open."""
    parallel, model = config.parallel, config.model
    if parallel.pipeline_model_parallel_size == 1 or parallel.pipeline_partition is not None:
        return config
    counts = balance_stages(
        model,
        padded_vocab_size=padded_vocab_size(vocab_size, model.make_vocab_size_divisible_by),
        seq_length=config.data.seq_length,
        num_stages=parallel.pipeline_model_parallel_size,
    )
    return replace(config, parallel=replace(parallel, pipeline_partition=",".join(map(str, counts))))


def attention_request(config: RunConfig, device: torch.device) -> AttentionRequest:
    """Say what a run asks of its attention backend."""
    return AttentionRequest(
        head_size=config.model.kv_channels,
        dtype=DTYPES[config.training.precision],
        device_type=device.type,
        dropout=config.model.attention_dropout,
        gqa=config.model.num_key_value_heads != config.model.num_attention_heads,
        documents=config.data.reset_attention_mask,
        window=config.model.attention_window > 0,
        softcap=config.model.attention_softcap > 0,
        sequence_length=config.data.seq_length,
    )


def plan_recompute(config: RunConfig, groups: ParallelGroups, attention: AttentionBackend) -> Recompute:
    """Make the policies of all pipeline stages."""
    itemsize = DTYPES[config.training.precision].itemsize
    size, sharded = config.kernels.mlp_chunk_size, config.parallel.sequence_parallel
    chunks = SequenceChunks(group=groups.tensor, size=size, sequence_parallel=sharded) if size else None
    parts = 2 if takes_halves(config.parallel) else 1
    shape = unit_shape(config.model, config.training, config.data, groups, attention, itemsize, chunks, parts)
    training = config.training
    return build_recompute(
        config.kernels,
        config.model,
        shape,
        stage_blocks=config.parallel.stage_blocks or (config.model.num_layers,),
        num_micro_batches=training.global_batch_size // (training.micro_batch_size * groups.data.size),
        tensor=groups.tensor,
        sequence_parallel=config.parallel.sequence_parallel,
    )


def predict_memory(
    config: RunConfig, vocab_size: int, groups: ParallelGroups, recompute: Recompute, *, fused: bool
) -> MemoryPlan:
    """Predict the most memory that a rank will hold; `fused` says whether the fused kernels run."""
    return plan_memory(
        recompute,
        kernels=config.kernels,
        training=config.training,
        engine=config.engine,
        optimizer_slots=2 if config.optimizer.optimizer == "adam" else int(config.optimizer.sgd_momentum > 0),
        padded_vocab_size=padded_vocab_size(vocab_size, config.model.make_vocab_size_divisible_by),
        replicas=groups.replicas.size,
        sequence_parallel=config.parallel.sequence_parallel,
        fused=fused,
        keep_gathered=config.parallel.keep_gathered_inputs,
    )


def require_gpu(device: torch.device) -> None:
    """Check that there can be graphs.

    Raises:
        ConfigError: there is none.
    """
    if device.type != "cuda":
        raise ConfigError(
            [f"--cuda-graph is work that a GPU repeats, and this run computes on a {device.type}: drop it"]
        )


def build_model(
    config: RunConfig,
    vocab_size: int,
    groups: ParallelGroups,
    attention: AttentionBackend,
    recompute: Recompute,
    device: torch.device,
    kernels: Kernels = PLAIN,
) -> GPT:
    """Make the model, in fp32, with empty weights; without any memory where no rank will hold the whole of it.

    Raises:
        ConfigError: a graph is to be recorded without a GPU.
    """
    if config.kernels.cuda_graph:
        require_gpu(device)
    in_parts = groups.pipeline.size > 1 or config.engine.zero_stage == 3
    with torch.device("meta") if in_parts else device:
        model = GPT(
            config.model,
            vocab_size=vocab_size,
            groups=groups,
            attention=attention,
            sequence_parallel=config.parallel.sequence_parallel,
            keep_gathered=config.parallel.keep_gathered_inputs,
            recompute_policy=recompute.policies[groups.pipeline.rank],
            loss_chunk_size=config.kernels.loss_chunk_size,
            mlp_chunk_size=config.kernels.mlp_chunk_size,
            in_halves=takes_halves(config.parallel),
            kernels=kernels,
        )
    if config.kernels.compile:
        model.compile_blocks()
    if config.kernels.cuda_graph:
        model.graph_blocks()
    return model


def build_engine(config: RunConfig, model: GPT, place: Place) -> Engine:
    """Give the model its weights and hand it to DeepSpeed, whole or in stages."""
    engine = (_build_pipeline if place.groups.pipeline.size > 1 else _build_flat)(config, model, place)
    products = model.kernels.products
    if products is None or config.engine.zero_stage == 3:  # which gathers weights and puts them away again
        return engine
    return SteadyWeights(engine, products.weights_stay)


def _build_flat(config: RunConfig, model: GPT, place: Place) -> Engine:
    from megatron.engine.flat import build_flat_engine  # DeepSpeed prints when it is imported; `start` has, quietly

    settings = _settings(config, place)
    if config.engine.zero_stage == 3:
        from megatron.engine.zero import divide_weights

        divide_weights(model, draw_parameters(model, place.device, **_initial(config)), settings, place.groups)
    else:
        initialize_parameters(model, **_initial(config))
    groups = build_param_groups(model.named_parameters())
    return build_flat_engine(model, groups, settings, place.groups, place.device)


def _build_pipeline(config: RunConfig, model: GPT, place: Place) -> Engine:
    from megatron.engine.pipeline import build_pipeline_engine, build_stage

    stage = build_stage(model, config.parallel.stage_blocks or (), place.groups, place.device)
    initialize_parameters(stage, **_initial(config))
    groups = build_param_groups(stage.named_parameters())
    return build_pipeline_engine(stage, groups, _settings(config, place), place.groups, place.device)


def _initial(config: RunConfig) -> dict[str, Any]:
    """Say how the weights start."""
    model = config.model
    return {"seed": config.training.seed, "std": model.init_method_std, "num_layers": model.num_layers}


def _settings(config: RunConfig, place: Place) -> dict[str, Any]:
    file = config.engine.deepspeed_config
    return build_settings(
        config,
        None if file is None else read_deepspeed_json(file),
        data_parallel_size=place.groups.data.size,
        device_type=place.device.type,
    )
