"""The composition root: a run config becomes a trainer. Nothing else knows all the parts."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.errors import CheckpointError
from megatron.config.deepspeed_json import read_deepspeed_json
from megatron.config.sections import RunConfig
from megatron.data.tokenizer.build import build_tokenizer
from megatron.data.tokenizer.interface import Tokenizer
from megatron.engine.interface import Engine
from megatron.engine.launchers import RankEnvironment
from megatron.engine.settings import build_settings
from megatron.kernels.attention.interface import AttentionBackend, AttentionRequest
from megatron.kernels.attention.pick import pick_attention
from megatron.kernels.choice import PLAIN, Kernels, choose_kernels
from megatron.model.flops import model_flops_per_token
from megatron.model.gpt import GPT, padded_vocab_size
from megatron.model.init import draw_parameters, initialize_parameters
from megatron.parallel.groups import ParallelGroups
from megatron.parallel.sharding import describe_sharding
from megatron.training.batch_size import BatchSize
from megatron.training.checkpoint import (
    CheckpointWriter,
    find_checkpoint,
    read_checkpoint,
    read_streams,
    refuse_foreign,
)
from megatron.training.inputs import Inputs, open_inputs
from megatron.training.memory import MemoryPlan, plan_memory
from megatron.training.metrics import SpeedModel, peak_tflops
from megatron.training.param_groups import build_param_groups
from megatron.training.params_norm import params_norm
from megatron.training.pipeline import balance_stages, describe_pipeline
from megatron.training.place import Place, join_ranks
from megatron.training.recompute import Recompute, build_recompute, unit_shape
from megatron.training.report import Reporter, build_reporter
from megatron.training.resume import check_fits, check_layout
from megatron.training.schedule import build_learning_rate, build_weight_decay, training_length
from megatron.training.state import TrainState
from megatron.training.stop import SignalFlag, StopRules
from megatron.training.trainer import Cadence, Plan, Trainer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Resume:
    """A checkpoint that was found whole and fits this run."""

    path: Path
    state: TrainState


def build_trainer(config: RunConfig, environment: RankEnvironment) -> Trainer:
    """Join the other ranks and make everything a run needs, from a checkpoint where there is one to resume.

    Raises:
        UserError: something the user can put right, with the sentence that says how.
    """
    started = time.monotonic()
    with ExitStack() as resources:
        place = join_ranks(config.parallel, config.training.seed, environment)
        tokenizer = build_tokenizer(config.data)
        config = with_partition(config, tokenizer.vocab_size)
        attention, reason = pick_attention(config.kernels.attention_backend, _attention_request(config, place.device))
        recompute = plan_recompute(config, place.groups, attention)
        plan = build_plan(config, tokenizer.vocab_size, place, recompute)
        reporter = _open_reporter(config, plan, place)
        resources.callback(reporter.close)
        resume = _find_resume(config, place, reporter.say)
        state = TrainState() if resume is None else resume.state
        inputs = _open_inputs(config, plan, place, tokenizer, attention, reporter.say)
        kernels, kernels_reason = choose_kernels(config.kernels, place.device.type)
        pipelined = place.groups.pipeline.size > 1
        in_parts = pipelined or config.engine.zero_stage == 3  # no rank ever holds the whole model
        model_device = torch.device("meta") if in_parts else place.device
        model = build_model(config, tokenizer.vocab_size, place.groups, attention, recompute, model_device, kernels)
        memory = predict_memory(config, tokenizer.vocab_size, place.groups, recompute, fused=kernels is not PLAIN)
        compiled = "; blocks compiled" if config.kernels.compile else ""
        choices = [
            f" attention: {attention.name}, {reason}",
            f" kernels: {kernels_reason}{compiled}",
            recompute.describe(),
            memory.describe() if place.device.type == "cuda" else None,  # of a process on a CPU it is a part
        ]
        for sentence in _describe(config, plan, place, model, choices):
            reporter.say(sentence)
        engine = (_build_pipeline if pipelined else _build_flat)(config, model, place)
        resources.callback(engine.close)
        if resume is not None:
            _restore(resume, engine, place, with_streams=not config.checkpoint.no_load_rng)
        reporter.start({"world_size": place.groups.world.size, "predicted_gib": memory.peak_gib, **state.to_json()})
        signals = SignalFlag(enabled=config.training.exit_signal_handler)
        return Trainer(
            plan,
            state=state,
            engine=engine,
            training_batches=inputs.training(state.consumed_samples),
            held_out=inputs.held_out(),
            rules=StopRules(config.training, place.control, signals, started=started),
            signals=signals,
            reporter=reporter,
            checkpoints=_build_checkpoints(config, place),
            params_norm=partial(params_norm, engine.module, place.groups, place.control)
            if config.reporting.log_params_norm
            else None,
            resources=resources.pop_all(),
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
    """Make the model, in fp32, with empty weights: without any memory on the device "meta"."""
    with device:
        model = GPT(
            config.model,
            vocab_size=vocab_size,
            groups=groups,
            attention=attention,
            sequence_parallel=config.parallel.sequence_parallel,
            recompute_policy=recompute.policies[groups.pipeline.rank],
            loss_chunk_size=config.kernels.loss_chunk_size,
            kernels=kernels,
        )
    if config.kernels.compile:
        model.compile_blocks()
    return model


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


def build_plan(config: RunConfig, vocab_size: int, place: Place, recompute: Recompute) -> Plan:
    """Make the schedules and the constants of a run."""
    training, seq_length = config.training, config.data.seq_length
    batch_size = BatchSize.ramped(training.global_batch_size, training.rampup_batch_size)
    steps_to = {
        "iterations": lambda limit: limit,
        "samples": batch_size.iterations_of,
        "tokens": lambda limit: batch_size.iterations_of(-(-limit // seq_length)),
    }
    total_iterations = min((steps_to[unit](limit) for unit, limit in training_length(training).items()), default=None)
    return Plan(
        batch_size=batch_size,
        learning_rate=build_learning_rate(config.optimizer, training),
        weight_decay=build_weight_decay(config.optimizer, training),
        speed=_speed_model(config, vocab_size, place, recompute),
        cadence=Cadence(
            log=config.reporting.log_interval,
            evaluate=training.eval_interval,
            save=config.checkpoint.save_interval,
        ),
        samples_per_micro_step=training.micro_batch_size * place.groups.data.size,
        evaluation_steps=training.eval_iters,
        total_iterations=total_iterations,
        total_samples=None if total_iterations is None else batch_size.samples_of(total_iterations),
        lowest_loss_scale=training.loss_scale or training.min_loss_scale if training.precision == "fp16" else 1.0,
    )


def plan_recompute(config: RunConfig, groups: ParallelGroups, attention: AttentionBackend) -> Recompute:
    """Make the policies of all pipeline stages."""
    itemsize = DTYPES[config.training.precision].itemsize
    shape = unit_shape(config.model, config.training, config.data, groups, attention, itemsize)
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
    )


def _speed_model(config: RunConfig, vocab_size: int, place: Place, recompute: Recompute) -> SpeedModel:
    seq_length = config.data.seq_length
    rows = padded_vocab_size(vocab_size, config.model.make_vocab_size_divisible_by)
    model_flops = model_flops_per_token(config.model, rows, seq_length)
    peak = config.reporting.peak_tflops
    if peak is None and place.device.type == "cuda":
        peak = peak_tflops(torch.cuda.get_device_name(place.device), config.training.precision)
    return SpeedModel(
        tokens_per_sample=seq_length,
        model_flops_per_sample=seq_length * model_flops,
        hardware_flops_per_sample=seq_length * (model_flops + recompute.flops_per_token()),
        num_devices=place.groups.world.size,
        peak_tflops=peak,
    )


def _open_reporter(config: RunConfig, plan: Plan, place: Place) -> Reporter:
    return build_reporter(
        config.reporting,
        is_first=place.control.is_first,
        save=config.checkpoint.save,
        total_iterations=plan.total_iterations,
        config=config.to_json(),
    )


def _open_inputs(
    config: RunConfig,
    plan: Plan,
    place: Place,
    tokenizer: Tokenizer,
    attention: AttentionBackend,
    say: Callable[[str], None],
) -> Inputs:
    return open_inputs(
        config.data,
        plan,
        place,
        micro_batch_size=config.training.micro_batch_size,
        seed=config.training.seed,
        trains=not config.training.skip_train,
        tokenizer=tokenizer,
        attention=attention,
        say=say,
    )


def _find_resume(config: RunConfig, place: Place, say: Callable[[str], None]) -> Resume | None:
    checkpoint = config.checkpoint
    path = None if checkpoint.load is None else find_checkpoint(Path(checkpoint.load), place.control, say)
    if path is None and checkpoint.load is not None and not checkpoint.load_if_exists:
        raise CheckpointError(
            f"--load {checkpoint.load} holds no checkpoint: correct the folder, or add --load-if-exists to start from "
            "scratch when there is none"
        )
    if checkpoint.save is not None:
        refuse_foreign(Path(checkpoint.save), path, place.control)
    if path is None:
        return None
    saved = read_checkpoint(path)
    check_layout(saved.state, place.layout)
    changes = check_fits(saved.config, json.loads(json.dumps(config.to_json())))
    state = TrainState.from_json(saved.state["counters"])
    say(f" resuming {path}: iteration {state.iteration}, {state.consumed_samples} samples")
    if changes:
        say(f" changed since that checkpoint: {', '.join(changes)}")
    return Resume(path=path, state=state)


def _restore(resume: Resume, engine: Engine, place: Place, *, with_streams: bool) -> None:
    engine.load(resume.path)
    if with_streams:
        place.streams.load_state_dict(read_streams(resume.path, place.control.rank))


def _attention_request(config: RunConfig, device: torch.device) -> AttentionRequest:
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


def _build_checkpoints(config: RunConfig, place: Place) -> CheckpointWriter | None:
    if config.checkpoint.save is None:
        return None
    return CheckpointWriter(
        Path(config.checkpoint.save),
        config=config.to_json(),
        layout=place.layout,
        control=place.control,
        streams=place.streams,
        keep_last=config.checkpoint.keep_last,
    )


def _describe(config: RunConfig, plan: Plan, place: Place, model: GPT, choices: Sequence[str | None]) -> Iterator[str]:
    """Say once, at the start, what was chosen."""
    size = sum(math.prod(sharding.logical_shape) for sharding in describe_sharding(model).values())
    training = config.training
    yield (
        f" {size:,} parameters, {training.precision}, ZeRO-{config.engine.zero_stage}, "
        f"{place.groups.world.size} x {place.device.type}, torch {torch.__version__}"
    )
    if layout := [f"{name} {size}" for name, size in place.layout.items() if size > 1]:
        shards = ", sequence_parallel" if config.parallel.sequence_parallel else ""
        yield f" layout: {', '.join(layout)}{shards}"
    yield from place.rank_table
    yield from filter(None, choices)
    if config.parallel.stage_blocks is not None:
        yield describe_pipeline(config.parallel.stage_blocks, training.global_batch_size // plan.samples_per_micro_step)
    if plan.total_samples is not None:
        yield (
            f" training: {plan.total_iterations} iterations of {training.global_batch_size} x {config.data.seq_length} "
            f"tokens, {plan.total_samples * config.data.seq_length:,} tokens in all"
        )
