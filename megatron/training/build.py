"""The composition root: a run config becomes a trainer. Nothing else knows all the parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from megatron.checkpoint.store import CheckpointStore
from megatron.config.sections import RunConfig
from megatron.data.tokenizer.build import build_tokenizer
from megatron.data.tokenizer.interface import Tokenizer
from megatron.engine.interface import Engine
from megatron.engine.launchers import RankEnvironment
from megatron.kernels.attention.interface import AttentionBackend
from megatron.kernels.attention.pick import pick_attention
from megatron.kernels.choice import choose_kernels
from megatron.model.flops import model_flops_per_token
from megatron.model.gpt import GPT, padded_vocab_size
from megatron.parallel.sharding import describe_sharding
from megatron.training.batch_size import BatchSize, steps_left
from megatron.training.build_engine import (
    attention_request,
    build_engine,
    build_model,
    plan_recompute,
    predict_memory,
    with_partition,
)
from megatron.training.checkpoint import CheckpointWriter
from megatron.training.hugging_face import HuggingFaceCopies, SavesCheckpoints, build_export
from megatron.training.inputs import Inputs, Lookahead, open_inputs
from megatron.training.memory import MemoryPlan
from megatron.training.metrics import SpeedModel, peak_tflops
from megatron.training.params_norm import params_norm
from megatron.training.pipeline import describe_pipeline
from megatron.training.place import Place, join_ranks, takes_halves
from megatron.training.progress import PlainConsole
from megatron.training.proof import NextSamples, Proof, describe_run
from megatron.training.recompute import Recompute
from megatron.training.report import Reporter, build_reporter
from megatron.training.resume import Resume, continue_schedule, find_resume, restore
from megatron.training.schedule import Schedule, build_learning_rate, build_weight_decay, training_length
from megatron.training.start_up import StartUp
from megatron.training.state import TrainState
from megatron.training.stop import SignalFlag, StopRules
from megatron.training.trainer import Cadence, Plan, Trainer
from megatron.training.verify import build_watch


def build_trainer(config: RunConfig, environment: RankEnvironment, began: float | None = None) -> Trainer:
    """Join the other ranks and make everything a run needs, from a checkpoint where there is one to resume.

    Args:
        config: the run's.
        environment: this process's rank.
        began: when the process began, by `time.monotonic`; None: now.

    Raises:
        UserError: something the user can put right, with the sentence that says how.
    """
    start = StartUp(began, "imports")
    with ExitStack() as resources:
        place = join_ranks(config.parallel, config.training.seed, environment)
        start.passed("ranks")
        tokenizer = build_tokenizer(config.data)
        config = with_partition(config, tokenizer.vocab_size)
        trains = not config.training.skip_train
        say_early = PlainConsole(None).say if place.control.is_first else lambda text: None
        resume = find_resume(config.checkpoint, config.to_json(), place, tokenizer, trains=trains, say=say_early)
        state = TrainState() if resume is None else resume.state
        attention, why = pick_attention(config.kernels.attention_backend, attention_request(config, place.device))
        recompute = plan_recompute(config, place.groups, attention)
        plan = build_plan(config, tokenizer.vocab_size, place, recompute, state)
        plan = replace(plan, schedule=continue_schedule(plan.schedule, resume, config.checkpoint, say_early))
        reporter = _open_reporter(config, plan, place)
        resources.callback(reporter.close)
        inputs = _open_inputs(config, plan, place, tokenizer, attention, resume, reporter.say)
        start.passed("data")
        engine, memory = _build_engine(config, tokenizer, place, attention, why, recompute, plan, reporter.say, start)
        resources.callback(_close, engine)
        if resume is not None:
            restore(resume, engine, place, config.training.seed, drops=config.model.drops, say=reporter.say)
            start.passed("checkpoint")
        batches = inputs.training(state.consumed_samples)
        proof = _build_proof(config, plan, place, tokenizer, inputs, engine, batches, attention.name)
        watch = build_watch(config.checkpoint, resume, engine, proof, place, state, reporter.say)
        resources.callback(watch.close)
        reporter.start({"world_size": place.groups.world.size, "predicted_gib": memory.peak_gib, **state.to_json()})
        checkpoints = _build_checkpoints(config, place, proof, resume, reporter.say)
        if checkpoints is not None:
            resources.callback(checkpoints.close)
        signals = SignalFlag(enabled=config.training.exit_signal_handler)
        return Trainer(
            plan,
            state=state,
            engine=engine,
            training_batches=batches,
            held_out=inputs.held_out(),
            rules=StopRules(config.training, place.control, signals, started=start.began),
            signals=signals,
            reporter=reporter,
            checkpoints=checkpoints,
            params_norm=partial(params_norm, engine.module, place.groups, place.control)
            if config.reporting.log_params_norm
            else None,
            watch=watch.saw,
            start=start,
            resources=resources.pop_all(),
        )


def _build_engine(
    config: RunConfig,
    tokenizer: Tokenizer,
    place: Place,
    attention: AttentionBackend,
    attention_reason: str,
    recompute: Recompute,
    plan: Plan,
    say: Callable[[str], None],
    start: StartUp,
) -> tuple[Engine, MemoryPlan]:
    """Make the model, predict what it will hold, say what was chosen, and hand it to the engine."""
    kernels, reason = choose_kernels(config.kernels, place.device.type)
    start.passed("kernels")
    memory = predict_memory(config, tokenizer.vocab_size, place.groups, recompute, fused=kernels.are_fused)
    model = build_model(config, tokenizer.vocab_size, place.groups, attention, recompute, place.device, kernels)
    compiled = "; blocks compiled" if config.kernels.compile else ""
    graphed = "; blocks recorded as CUDA graphs" if config.kernels.cuda_graph else ""
    choices = [
        f" attention: {attention.name}, {attention_reason}",
        " each half of a micro-batch computes while shards of the other travel"
        if takes_halves(config.parallel)
        else None,
        " products begin while shards travel between tensor ranks by copy engines"
        if place.groups.tensor.copies
        else None,
        f" kernels: {reason}{compiled}{graphed}",
        recompute.describe(),
        memory.describe() if place.device.type == "cuda" else None,  # of a process on a CPU it is a part
    ]
    for sentence in _describe(config, plan, place, model, choices):
        say(sentence)
    engine = build_engine(config, model, place)
    start.passed("model and engine")
    return engine, memory


def _close(engine: Engine) -> None:
    if isinstance(engine.module, GPT):
        engine.module.release_graphs()  # NCCL ends a group only when no graph has its collectives any more
    engine.close()


def build_plan(config: RunConfig, vocab_size: int, place: Place, recompute: Recompute, state: TrainState) -> Plan:
    """Make the schedules and the constants of a run that goes on from `state`."""
    training = config.training
    batch_size = BatchSize.ramped(training.global_batch_size, training.rampup_batch_size)
    iterations_left = steps_left(training_length(training), batch_size, config.data.seq_length, state)
    return Plan(
        batch_size=batch_size,
        schedule=Schedule(
            learning_rate=build_learning_rate(config.optimizer, training),
            weight_decay=build_weight_decay(config.optimizer, training),
        ),
        speed=_speed_model(config, vocab_size, place, recompute),
        cadence=Cadence(
            log=config.reporting.log_interval,
            evaluate=training.eval_interval,
            save=config.checkpoint.save_interval,
        ),
        samples_per_micro_step=training.micro_batch_size * place.groups.data.size,
        evaluation_steps=training.eval_iters,
        total_iterations=None if iterations_left is None else state.iteration + iterations_left,
        total_samples=None
        if iterations_left is None
        else state.consumed_samples + batch_size.samples_of(iterations_left, state.consumed_samples),
        lowest_loss_scale=training.loss_scale or training.min_loss_scale if training.precision == "fp16" else 1.0,
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
    resume: Resume | None,
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
        continued=None if resume is None else resume.continued(override=config.checkpoint.override_data),
        say=say,
    )


def _build_proof(
    config: RunConfig,
    plan: Plan,
    place: Place,
    tokenizer: Tokenizer,
    inputs: Inputs,
    engine: Engine,
    batches: Lookahead,
    attention: str,
) -> Proof:
    device = torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else place.device.type
    samples = NextSamples(engine, batches, micro_batch_size=config.training.micro_batch_size, data=place.groups.data)
    run = describe_run(
        config.to_json(),
        place.layout,
        plan.schedule,
        inputs.order,
        {"torch": torch.__version__, "device": device, "attention": attention},
    )
    return Proof(
        # That of the first rank: what is compared decides whether all measure together, and a path may differ by rank.
        run=place.control.of_first(run),
        vocab_size=tokenizer.vocab_size,
        samples=None if config.training.skip_train else samples,
    )


def _build_checkpoints(
    config: RunConfig, place: Place, proof: Proof, resume: Resume | None, say: Callable[[str], None]
) -> SavesCheckpoints | None:
    checkpoint = config.checkpoint
    if checkpoint.save is None:
        return None
    store = CheckpointStore(
        Path(checkpoint.save),
        config=config.to_json(),
        ranks=place.control,
        keep_last=checkpoint.keep_last,
        keep_every=checkpoint.keep_every,
        background=checkpoint.async_save,
        time_limit=60.0 * config.parallel.distributed_timeout_minutes,
    )
    streams = None if checkpoint.no_save_rng else place.streams
    optimizer = not checkpoint.no_save_optim
    writer = CheckpointWriter(store, layout=place.layout, streams=streams, save_optimizer=optimizer, more=proof.facts)
    if resume is not None:
        writer.tidy(resume.path)
    if checkpoint.save_hf:
        export = build_export(config.model, config.data, config.training.precision)
        return HuggingFaceCopies(writer, Path(checkpoint.save), export, say) if place.control.is_first else writer
    return writer


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
