from __future__ import annotations

import ast
import time
from pathlib import Path

import pytest

from megatron.config import rules
from megatron.config.errors import ConfigError
from megatron.config.rules import broken_rules
from megatron.config.run import load_run_config
from megatron.config.sections import all_flags
from tests.config.command_lines import LEGAL, legal


def sentences(words: list[str], world_size: int | None = None) -> list[str]:
    return list(broken_rules(load_run_config(words, world_size).config, world_size))


BROKEN: list[tuple[str, str, str]] = [
    # words, flags left out of the legal line, what the one sentence names
    ("--loss-chunk-size 1 --micro-batch-size 2", "", "--loss-chunk-size 1 & --micro-batch-size 2 & 2 tokens"),
    ("--fp8 --precision fp16", "", "--fp8 & --precision fp16 & --precision bf16"),
    ("--fp8-format hybrid", "", "--fp8-format hybrid & --fp8:"),
    ("--fp8 --compile", "", "--fp8 & --compile"),
    ("--fp8 --mlp-chunk-size 64", "", "--fp8 & --mlp-chunk-size 64"),
    ("--fp8 --ffn-hidden-size 200", "", "--ffn-hidden-size 200 & 200 features & multiples of 16"),
    (
        "--fp8 --tensor-model-parallel-size 2 --ffn-hidden-size 208",
        "",
        "--ffn-hidden-size 208 & --tensor-model-parallel-size 2 & 104 features",
    ),
    ("--mlp-chunk-size 1 --micro-batch-size 2", "", "--mlp-chunk-size 1 & --micro-batch-size 2 & 2 tokens"),
    ("--num-attention-heads 5", "", "--hidden-size 64 & --num-attention-heads 5 & --kv-channels"),
    ("--num-key-value-heads 3", "", "--num-attention-heads 4 & --num-key-value-heads 3"),
    ("--position-embedding-type rope --kv-channels 15", "", "--kv-channels 15 & --rotary-percent 1"),
    ("--position-embedding-type rope --rotary-percent 0.1", "", "--kv-channels 16 & --rotary-percent 0.1"),
    ("--position-embedding-type rope --rotary-percent 1.5", "", "--rotary-percent 1.5 & in (0, 1]"),
    ("--max-position-embeddings 16", "", "--max-position-embeddings 16 & --seq-length 32"),
    ("--rotary-base 500000", "", "--rotary-base 500000 & --position-embedding-type learned_absolute"),
    ("--rotary-interleaved", "", "--rotary-interleaved & --position-embedding-type rope"),
    ("--rotary-scaling-factor 4", "", "--rotary-scaling-factor 4 & --rotary-scaling-type"),
    (
        "--position-embedding-type rope --rotary-scaling-type ntk",
        "",
        "--rotary-scaling-type ntk & --rotary-scaling-factor 1",
    ),
    (
        "--position-embedding-type rope --rotary-scaling-type llama3 --rotary-scaling-factor 8 "
        "--rotary-low-freq-factor 4",
        "",
        "--rotary-low-freq-factor 4 & --rotary-high-freq-factor 4",
    ),
    (
        "--position-embedding-type rope --rotary-scaling-type yarn --rotary-scaling-factor 8 --rotary-beta-slow 40",
        "",
        "--rotary-beta-slow 40 & --rotary-beta-fast 32",
    ),
    ("--rotary-beta-fast 16", "", "--rotary-beta-fast 16 & --rotary-scaling-type none & yarn"),
    (
        "--position-embedding-type rope --rotary-scaling-type linear --rotary-scaling-factor 2 "
        "--rotary-high-freq-factor 8",
        "",
        "--rotary-high-freq-factor 8 & --rotary-scaling-type linear & llama3",
    ),
    ("--recompute-num-layers 2", "", "--recompute-num-layers 2 & --recompute-granularity none & full or products"),
    ("--recompute-method block", "", "--recompute-method block & --recompute-granularity none & full or products"),
    (
        "--recompute-granularity selective --recompute-method uniform",
        "",
        "--recompute-method uniform & --recompute-granularity selective & full or products",
    ),
    (
        "--recompute-granularity selective --recompute-inputs-on-host",
        "",
        "--recompute-inputs-on-host & --recompute-granularity selective",
    ),
    (
        "--recompute-granularity selective --distribute-saved-activations --tensor-model-parallel-size 2",
        "",
        "--distribute-saved-activations & --recompute-granularity selective",
    ),
    ("--recompute-granularity products", "", "--recompute-granularity products & --recompute-budget-gib 0"),
    (
        "--recompute-granularity full --recompute-budget-gib 2",
        "",
        "--recompute-budget-gib 2 & --recompute-granularity full & products",
    ),
    ("--recompute-budget-gib -1", "", "--recompute-budget-gib -1.0 & at least 0"),
    ("--recompute-granularity full --recompute-num-layers 5", "", "--recompute-num-layers 5 & --num-layers 4"),
    (
        "--recompute-granularity full --recompute-num-layers 4 --pipeline-model-parallel-size 2",
        "",
        "--recompute-num-layers 4 & the 3 blocks & at most 3",
    ),
    (
        "--recompute-granularity full --recompute-method block --recompute-num-layers 3 "
        "--pipeline-model-parallel-size 2 --pipeline-partition 2,2",
        "",
        "--recompute-num-layers 3 & the 2 blocks & at most 2",
    ),
    (
        "--recompute-granularity full --distribute-saved-activations",
        "",
        "--distribute-saved-activations & --tensor-model-parallel-size 1",
    ),
    (
        "--recompute-granularity full --distribute-saved-activations --tensor-model-parallel-size 2 "
        "--sequence-parallel",
        "",
        "--distribute-saved-activations & --sequence-parallel",
    ),
    ("--attention-dropout 1.0", "", "--attention-dropout 1.0 & in [0, 1)"),
    ("--hidden-dropout -0.5", "", "--hidden-dropout -0.5 & in [0, 1)"),
    ("--adam-beta2 1", "", "--adam-beta2 1.0 & in [0, 1)"),
    ("--norm-epsilon 0", "", "--norm-epsilon 0.0 & above 0"),
    ("--eval-iters -1", "", "--eval-iters -1 & at least 0"),
    ("--log-interval 0", "", "--log-interval 0 & at least 1"),
    ("--lr nan", "--lr", "--lr nan & at least 0"),
    ("--clip-grad inf", "", "--clip-grad inf & at least 0"),
    ("", "--train-iters", "--train-iters & --train-samples & --train-tokens & --skip-train"),
    ("--skip-train --eval-iters 0", "--train-iters", "--skip-train & --eval-iters 0"),
    ("--micro-batch-size 4 --global-batch-size 6", "", "--global-batch-size 6 & --micro-batch-size 4"),
    ("--rampup-batch-size 8 2 100 --global-batch-size 4", "", "--rampup-batch-size & 8 & --global-batch-size 4"),
    (
        "--rampup-batch-size 1 2 100 --global-batch-size 4",
        "",
        "--rampup-batch-size & steps of 2 & --global-batch-size 4",
    ),
    (
        "--rampup-batch-size 1 1 100 --global-batch-size 4 --loss-scale 2",
        "",
        "--loss-scale 2 & --precision bf16",
    ),
    (
        "--rampup-batch-size 3 3 9 --global-batch-size 12 --micro-batch-size 3 --rampup-batch-size 6 2 9",
        "",
        "--rampup-batch-size & increment 2 & --micro-batch-size 3",
    ),
    ("--fp16 --loss-scale 100", "", "--loss-scale 100 & power of two"),
    ("--fp16 --initial-loss-scale 1000", "", "--initial-loss-scale 1000 & power of two"),
    ("--fp16 --min-loss-scale 3", "", "--min-loss-scale 3 & power of two"),
    ("--initial-loss-scale 2 --min-loss-scale 4", "", "--initial-loss-scale 2 & --min-loss-scale 4"),
    ("--zero-stage 0", "", "--zero-stage 0 & --precision bf16 & fp32"),
    ("--fp16 --zero-stage 0", "", "--zero-stage 0 & --precision fp16"),
    ("--fp32 --zero-stage 0 --cpu-optimizer", "", "--cpu-optimizer & --zero-stage is 0"),
    ("--remote-device cpu", "", "--remote-device cpu & --zero-stage is 1 & --zero-stage 3"),
    ("--pipeline-model-parallel-size 5", "", "--pipeline-model-parallel-size 5 & --num-layers 4"),
    ("--pipeline-partition 4", "", "--pipeline-partition 4 & --pipeline-model-parallel-size 1"),
    ("--pipeline-model-parallel-size 2 --pipeline-partition 4,0", "", "--pipeline-partition 4,0 & positive"),
    ("--pipeline-model-parallel-size 2 --pipeline-partition 2,x", "", "--pipeline-partition 2,x & whole numbers"),
    ("--pipeline-model-parallel-size 2 --pipeline-partition 2,1,1", "", "--pipeline-partition 2,1,1 & 3 & is 2"),
    ("--pipeline-model-parallel-size 2 --pipeline-partition 2,3", "", "--pipeline-partition 2,3 & --num-layers is 4"),
    (
        "--pipeline-model-parallel-size 2 --zero-stage 3",
        "",
        "--zero-stage 3 & --zero-stage 1 with these 2 stages & --pipeline-model-parallel-size 1 with --zero-stage 3",
    ),
    ("--pipeline-model-parallel-size 2 --zero-stage 2", "", "--zero-stage 2 & --zero-stage 1 with these 2 stages"),
    ("--pipeline-model-parallel-size 2 --zero-stage 0 --fp32", "", "--zero-stage 0 & --zero-stage 1"),
    ("--tensor-model-parallel-size 8", "", "--num-attention-heads 4 & --tensor-model-parallel-size 8"),
    (
        "--tensor-model-parallel-size 6 --num-attention-heads 12 --num-key-value-heads 4 --kv-channels 8 "
        "--ffn-hidden-size 96 --make-vocab-size-divisible-by 6 --max-position-embeddings 36",
        "",
        "--num-key-value-heads 4 & --tensor-model-parallel-size 6",
    ),
    (
        "--tensor-model-parallel-size 2 --ffn-hidden-size 99",
        "",
        "--ffn-hidden-size 99 & --tensor-model-parallel-size 2",
    ),
    (
        "--tensor-model-parallel-size 2 --make-vocab-size-divisible-by 25",
        "",
        "--make-vocab-size-divisible-by 25 & --tensor-model-parallel-size 2",
    ),
    (
        "--tensor-model-parallel-size 2 --sequence-parallel --seq-length 33 --max-position-embeddings 34",
        "--seq-length",
        "--seq-length 33 & --tensor-model-parallel-size 2 & --seq-length 34",
    ),
    (
        "--tensor-model-parallel-size 4 --num-key-value-heads 1 --kv-channels 7",
        "",
        "--kv-channels 7 & --tensor-model-parallel-size 4 & --num-key-value-heads 1",
    ),
    (
        "--tensor-model-parallel-size 2 --max-position-embeddings 33",
        "",
        "--max-position-embeddings 33 & --tensor-model-parallel-size 2",
    ),
    ("--ds-sequence-parallel-size 8", "", "--num-attention-heads 4 & --ds-sequence-parallel-size 8"),
    (
        "--tensor-model-parallel-size 2 --ds-sequence-parallel-size 4",
        "",
        "--num-attention-heads 4 & --tensor-model-parallel-size 2 & --ds-sequence-parallel-size 4",
    ),
    (
        "--ds-sequence-parallel-size 2 --seq-length 33",
        "--seq-length",
        "--seq-length 33 & --ds-sequence-parallel-size 2 & --seq-length 34",
    ),
    ("--lr-warmup-samples 9 --lr-decay-iters 90", "", "--lr-warmup-samples 9 & --lr-decay-iters 90 & one unit"),
    ("--lr-warmup-fraction 0.1 --lr-warmup-iters 9", "", "--lr-warmup-fraction 0.1 & --lr-warmup-iters 9"),
    ("--lr-warmup-samples 9", "", "--lr-decay-style linear & --lr-decay-samples & --train-samples"),
    ("--lr-warmup-iters 100", "", "--lr-warmup-iters 100 & --train-iters 100"),
    ("--lr-warmup-iters 60 --lr-decay-iters 50", "", "--lr-warmup-iters 60 & --lr-decay-iters 50"),
    ("--lr-decay-style WSD", "", "--lr-decay-style WSD & --lr-wsd-decay-iters"),
    (
        "--lr-decay-style WSD --lr-wsd-decay-iters 95 --lr-warmup-iters 10",
        "",
        "--lr-wsd-decay-iters 95 & --lr-warmup-iters & 100",
    ),
    ("--lr-wsd-decay-iters 5", "", "--lr-wsd-decay-iters 5 & --lr-decay-style linear"),
    ("--min-lr 0.1", "", "--min-lr 0.1 & --lr 0.001"),
    ("--lr-warmup-init 0.1", "", "--lr-warmup-init 0.1 & --lr 0.001"),
    ("--end-weight-decay 0.3", "", "--end-weight-decay 0.3 & --weight-decay 0.01 & --weight-decay-incr-style"),
    ("--weight-decay-incr-style cosine", "", "--weight-decay-incr-style cosine & --start-weight-decay"),
    ("", "--mock-data", "--data-path & --train-data-path & --mock-data"),
    ("--data-path a", "", "--data-path & --mock-data & 2 sources"),
    ("--data-path a --train-data-path b", "--mock-data", "--data-path & --train-data-path"),
    ("--valid-data-path b", "--mock-data", "--valid-data-path & --train-data-path"),
    ("--split 1,2,3,4", "", "--split '1,2,3,4'"),
    ("--split 0,0", "", "--split '0,0'"),
    ("--split 9,x", "", "--split '9,x'"),
    ("--data-path a", "--mock-data --vocab-size", "--tokenizer-type & --vocab-size"),
    ("--data-path a --tokenizer-type NullTokenizer", "--mock-data --vocab-size", "NullTokenizer & --vocab-size"),
    ("--tokenizer-type SentencePieceTokenizer", "", "SentencePieceTokenizer & --tokenizer-model"),
    ("--tokenizer-type GPT2BPETokenizer --vocab-file v", "", "GPT2BPETokenizer & --merge-file"),
    ("--tokenizer-type HuggingFaceTokenizer", "", "HuggingFaceTokenizer & --tokenizer-model"),
    ("--tokenizer-type TikTokenizer", "", "TikTokenizer & --tokenizer-model"),
    ("--tokenizer-type TikTokenizer --tokenizer-model t", "--vocab-size", "--mock-data & --vocab-size"),
    ("--save-interval 5", "", "--save-interval 5 & --save"),
    ("--compile --zero-stage 3", "", "--compile & --zero-stage 3"),
    ("--compile --recompute-granularity full", "", "--compile & --recompute-granularity full"),
    ("--compile --mlp-chunk-size 64", "", "--compile & --mlp-chunk-size 64"),
    ("--compile --tensor-model-parallel-size 2", "", "--compile & --tensor-model-parallel-size 2"),
    ("--keep-last 2", "", "--keep-last 2 & --save"),
    ("--async-save", "", "--async-save & --save"),
    ("--save d --keep-every 2", "", "--keep-every 2 & --keep-last"),
    ("--load-if-exists", "", "--load-if-exists & --load"),
    ("--no-load-rng", "", "--no-load-rng & --load"),
    ("--no-load-optim", "", "--no-load-optim & --load"),
    ("--load-tag step_0000005", "", "--load-tag step_0000005 & --load."),
    ("--finetune", "", "--finetune & --load"),
    ("--verify-resume", "", "--verify-resume & --load"),
    ("--use-checkpoint-opt_param-scheduler", "", "--use-checkpoint-opt-param-scheduler & --load"),
    ("--no-save-optim", "", "--no-save-optim & --save"),
    ("--no-save-rng", "", "--no-save-rng & --save"),
    ("--load d --load-if-exists --exit-on-missing-checkpoint", "", "--load-if-exists & --exit-on-missing-checkpoint"),
    (
        "--load d --override-opt_param-scheduler --use-checkpoint-opt_param-scheduler",
        "",
        "--override-opt-param-scheduler & --use-checkpoint-opt-param-scheduler",
    ),
    ("--load d --finetune --use-checkpoint-opt_param-scheduler", "", "--finetune & --use-checkpoint-opt-param"),
    ("--load d --finetune --verify-resume", "", "--verify-resume & --finetune"),
    ("--load d --no-load-optim --verify-resume", "", "--verify-resume & --no-load-optim"),
    ("--load d --skip-train --verify-resume", "", "--verify-resume & --skip-train"),
    ("--log-timers-to-tensorboard", "", "--log-timers-to-tensorboard & --tensorboard-dir"),
    ("--wandb-exp-name x", "", "--wandb-exp-name x & --wandb-project"),
    ("--wandb-save-dir x", "", "--wandb-save-dir x & --wandb-project"),
]


@pytest.mark.parametrize(("words", "without", "named"), BROKEN)
def test_broken_rule_is_one_sentence_that_names_values_and_flags(words: str, without: str, named: str) -> None:
    told = sentences(legal(*words.split(), without=without))
    assert len(told) == 1, told
    assert told[0].endswith(".")
    for part in named.split(" & "):
        assert part in told[0]


def test_at_least_forty_combinations_are_refused() -> None:
    assert len(BROKEN) >= 40


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--kv-channels 20 --num-attention-heads 3",
        "--num-key-value-heads 1",
        "--position-embedding-type rope --rotary-percent 0.5 --rotary-base 5e5",
        "--position-embedding-type rope --rotary-scaling-type llama3 --rotary-scaling-factor 8",
        "--zero-stage 0 --fp32",
        "--fp16 --loss-scale 128",
        "--fp16 --loss-scale 0.5",
        "--cpu-optimizer --zero-stage 2",
        "--fp8 --fp8-format e4m3 --zero-stage 3 --recompute-granularity full",
        "--train-samples 100 --train-tokens 5e9",
        "--lr-decay-style WSD --lr-wsd-decay-iters 10 --lr-warmup-iters 90",
        "--lr-decay-style constant --lr-warmup-samples 10",
        "--lr-decay-style cosine --lr-decay-samples 100 --lr-warmup-fraction 0.1",
        "--weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 0.1",
        "--rampup-batch-size 2 2 100 --global-batch-size 8 --micro-batch-size 2",
        "--lr 0 --lr-decay-style constant",
        "--split 1 --eval-iters 0",
        "--skip-train",
        "--save d --save-interval 3 --keep-last 2 --load d --load-if-exists",
        "--override-opt_param-scheduler --exit-on-missing-checkpoint --override-data",
        "--load d --load-tag t --finetune --no-load-optim --no-load-rng --override-opt_param-scheduler",
        "--save d --load d --load-if-exists --verify-resume --no-save-rng --no-save-optim",
        "--clip-grad 0",
        "--pipeline-model-parallel-size 4",
        "--pipeline-model-parallel-size 3 --pipeline-partition 1,2,1 --cpu-optimizer",
    ],
)
def test_legal_combination_breaks_no_rule(words: str) -> None:
    assert sentences(legal(*words.split())) == []


def test_three_broken_rules_are_told_at_once() -> None:
    words = "--num-attention-heads 5 --attention-dropout 1.5 --zero-stage 0"
    told = "\n".join(sentences(legal(*words.split())))
    assert len(told.splitlines()) == 3
    assert all(f in told for f in ("--num-attention-heads 5", "--attention-dropout 1.5", "--zero-stage 0"))


def test_illegal_zero_hides_no_other_sentence() -> None:
    told = "\n".join(sentences(legal("--num-key-value-heads", "0", "--micro-batch-size", "0", "--min-lr", "1")))
    assert all(f in told for f in ("--num-key-value-heads 0", "--micro-batch-size 0", "--min-lr 1"))


class TestWorldSize:
    def test_batch_must_be_divisible_by_all_ranks(self) -> None:
        words = legal("--micro-batch-size", "2", "--global-batch-size", "12")
        assert sentences(words, world_size=3) == []
        assert "2 x 4 data-parallel ranks = 8" in sentences(words, world_size=4)[0]

    def test_ramp_must_be_divisible_by_all_ranks(self) -> None:
        words = legal("--rampup-batch-size", "4", "2", "100", "--global-batch-size", "16")
        told = sentences(words, world_size=4)
        assert len(told) == 1
        assert "increment 2" in told[0]

    def test_axes_must_divide_the_world(self) -> None:
        told = sentences(legal("--tensor-model-parallel-size", "3"), world_size=4)
        assert any("4 ranks" in sentence and "--tensor-model-parallel-size 3" in sentence for sentence in told)


def test_every_public_function_of_the_rule_modules_is_run() -> None:
    in_source = [
        node.name
        for module in rules.RULE_MODULES
        for node in ast.parse(Path(str(module.__file__)).read_text()).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    assert [rule.__name__ for rule in rules.rules()] == in_source
    assert len(in_source) > 30


def test_rule_modules_on_disk_are_all_run() -> None:
    folder = Path(str(rules.__file__)).parent
    assert {file.stem for file in folder.glob("*_rules.py")} == {
        module.__name__.rpartition(".")[2] for module in rules.RULE_MODULES
    }


def test_every_number_has_a_range_or_a_reason_for_none() -> None:
    numbers = [flag for flag in all_flags().values() if flag.type in (int, float) and not flag.info.choices]
    assert [flag.name for flag in numbers if flag.info.range is None] == []


def test_check_rules_raises_every_sentence() -> None:
    config = load_run_config(legal("--min-lr", "1", "--split", "x")).config
    with pytest.raises(ConfigError) as raised:
        rules.check_rules(config)
    assert len(raised.value.messages) == 2


def test_rules_take_far_less_than_a_second() -> None:
    config = load_run_config(LEGAL).config
    start = time.process_time()
    rules.check_rules(config)
    assert time.process_time() - start < 0.5


def test_refused_zero_stage_of_a_pipeline_names_the_ranks_of_the_layout_without_one() -> None:
    (told,) = sentences(legal("--pipeline-model-parallel-size", "2", "--zero-stage", "3"), world_size=8)
    assert "--zero-stage 3 over 8 data-parallel ranks" in told
