"""A scaled-down run is legal, small, and has what the layout treats in its own way."""

import shlex

import pytest

from megatron.config.rules import check_rules
from megatron.config.run import load_run_config
from megatron.config.scaled_down import (
    describe_changes,
    on_one_rank,
    scale_down,
    showing_gradients,
    smallest_world,
    with_dropout,
    with_gentle_adam,
    without_flags,
)

LARGE = "--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --seq-length 4096 --lr 3e-4 --train-iters 100"
DATA = "--data-path corpus --vocab-size 50257"

RUNS = [
    "",
    "--tensor-model-parallel-size 4 --sequence-parallel --num-key-value-heads 8 --precision fp32",
    "--tensor-model-parallel-size 8 --num-key-value-heads 4 --position-embedding-type rope --rotary-percent 0.25",
    "--tensor-model-parallel-size 4 --ds-sequence-parallel-size 4 --num-key-value-heads 1 --normalization rmsnorm",
    "--ds-sequence-parallel-size 8 --num-key-value-heads 4 --max-position-embeddings 8192 --reset-attention-mask",
    "--pipeline-model-parallel-size 4 --pipeline-partition 9,9,9,5 --micro-batch-size 4 --global-batch-size 64",
    "--pipeline-model-parallel-size 3 --recompute-granularity full --recompute-num-layers 4",
    "--pipeline-model-parallel-size 2 --pipeline-partition 16,16 --recompute-granularity full --recompute-num-layers 4",
    "--zero-stage 3 --cpu-optimizer --optimizer sgd --clip-grad 0 --rampup-batch-size 8 8 1000 --global-batch-size 64",
    "--position-embedding-type rope --rotary-scaling-type llama3 --rotary-scaling-factor 8 --disable-bias-linear",
    "--precision fp16 --lr-decay-style WSD --lr-wsd-decay-iters 10 --lr-warmup-iters 10 --kv-channels 96 --save out",
    "--num-layers 1 --hidden-size 64 --num-attention-heads 1 --tokenizer-type TikTokenizer --tokenizer-model gpt2",
]


def run_of(flags: str, world_size: int | None = None):
    config = load_run_config(shlex.split(f"{LARGE} {DATA} {flags}")).config
    check_rules(config, world_size)
    return config


def small_of(flags: str, steps: int = 5):
    config = run_of(flags)
    world = smallest_world(config.parallel, config.engine.zero_stage)
    parallel = config.parallel
    others = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    data = world // (others * parallel.ds_sequence_parallel_size)
    return config, scale_down(config, data_size=data, steps=steps, data_prefix="text"), world


@pytest.mark.parametrize("flags", RUNS)
def test_a_scaled_down_run_breaks_no_rule_in_any_of_its_forms(flags):
    _, small, world = small_of(flags)
    check_rules(small, world)
    check_rules(showing_gradients(small), world)
    check_rules(with_dropout(small, run_of(flags).model), world)
    for precision in {"fp32", small.training.precision}:
        alone = on_one_rank(small, precision=precision)
        check_rules(alone, 1)
        check_rules(with_gentle_adam(showing_gradients(alone), 1.0, 1000), 1)
        assert alone.training.precision == precision
        assert alone.training.global_batch_size == small.training.global_batch_size


@pytest.mark.parametrize("flags", RUNS)
def test_a_scaled_down_model_is_small_and_treated_in_the_same_way(flags):
    config, small, world = small_of(flags)
    before, after = config.model, small.model
    tensor, ulysses = config.parallel.tensor_model_parallel_size, config.parallel.ds_sequence_parallel_size
    assert world <= 32
    assert after.num_layers <= 7
    assert after.hidden_size <= 512
    assert after.hidden_size * after.num_layers < before.hidden_size * before.num_layers or before.hidden_size == 64
    groups = [model.num_attention_heads // model.num_key_value_heads for model in (before, after)]
    assert groups[0] == groups[1]
    assert (before.num_key_value_heads % tensor == 0) == (after.num_key_value_heads % tensor == 0)
    assert (before.num_key_value_heads < tensor) == (after.num_key_value_heads < tensor)
    assert after.num_attention_heads % (tensor * ulysses) == 0
    for name in ("normalization", "activation_function", "position_embedding_type", "rotary_percent", "rotary_base"):
        assert getattr(before, name) == getattr(after, name)
    assert before.untie_embeddings_and_output_weights == after.untie_embeddings_and_output_weights
    assert (before.max_position_embeddings > config.data.seq_length) == (
        after.max_position_embeddings > small.data.seq_length
    )
    assert small.data.vocab_size % after.make_vocab_size_divisible_by  # there is padding
    assert small.data.eod_mask_loss
    assert small.checkpoint.save is None


def test_a_step_has_several_micro_batches_and_a_pipeline_more_than_stages():
    for flags, count in (("", 2), ("--pipeline-model-parallel-size 4 --pipeline-partition 9,9,9,5", 5)):
        _, small, _ = small_of(flags)
        data_ranks = 2
        assert small.training.global_batch_size == small.training.micro_batch_size * data_ranks * count


def test_uneven_stages_stay_uneven_and_hold_a_unit_of_recompute():
    stages = "--pipeline-model-parallel-size 4 --pipeline-partition 9,9,9,5"
    _, small, _ = small_of(stages)
    assert small.parallel.stage_blocks == (2, 2, 2, 1)
    _, small, _ = small_of(f"{stages} --recompute-granularity full --recompute-num-layers 3")
    assert small.parallel.stage_blocks == (3, 3, 3, 2)
    assert small.kernels.recompute_num_layers == 2


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        ("", 2),
        ("--zero-stage 0 --precision fp32", 2),
        ("--zero-stage 0 --precision fp32 --tensor-model-parallel-size 2", 2),
        ("--tensor-model-parallel-size 2", 4),
        ("--ds-sequence-parallel-size 2", 2),
        ("--ds-sequence-parallel-size 2 --pipeline-model-parallel-size 2", 4),
    ],
)
def test_the_smallest_world_shows_every_axis_and_two_ranks_to_zero(flags, ranks):
    config = run_of(flags)
    assert smallest_world(config.parallel, config.engine.zero_stage) == ranks


def test_a_window_keeps_its_share_of_the_sequence():
    _, small, _ = small_of("--attention-window 1024")
    assert (small.model.attention_window, small.data.seq_length) == (8, 32)
    _, small, _ = small_of("")
    assert small.model.attention_window == 0


def test_what_flags_own_leaves_the_deepspeed_dictionary():
    user = {
        "train_batch_size": 512,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "overlap_comm": False},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "amsgrad": True}},
    }
    assert without_flags(user) == {
        "zero_optimization": {"overlap_comm": False},
        "optimizer": {"params": {"amsgrad": True}},
    }


def test_adam_s_epsilon_only_grows_and_plain_sgd_has_none():
    config = run_of("--clip-grad 0.5")
    assert with_gentle_adam(config, 100.0, 10_000).optimizer.adam_eps == pytest.approx(0.1 * 0.5 / 100)
    large = run_of("--adam-eps 0.5")
    assert with_gentle_adam(large, 100.0, 10_000) == large
    plain = run_of("--optimizer sgd")
    assert with_gentle_adam(plain, 100.0, 10_000) == plain


def test_the_changes_are_told_with_both_values():
    config, small, _ = small_of("")
    told = list(describe_changes(config, small))
    assert "hidden_size 4096 -> 16" in told
    assert "hidden_dropout 0.1 -> 0" in told
