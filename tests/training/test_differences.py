"""What each flag that differs from the checkpoint's means to a resumed run."""

import json

import pytest

from megatron.config.run import load_run_config
from megatron.config.sections import SECTIONS
from megatron.training.differences import (
    KIND_OF_FIELD,
    KIND_OF_SECTION,
    STRETCHED,
    Kind,
    changed_values,
    find_differences,
)
from tests.config.command_lines import legal

ROPE = "--position-embedding-type rope"

TABLE = [
    # flags of both runs, of the earlier one, of this one, the kind of each difference by field
    ("", "", "--num-layers 6", {"num_layers": Kind.ARCHITECTURE}),
    (
        "",
        "",
        "--hidden-size 128 --kv-channels 16",
        {"hidden_size": Kind.ARCHITECTURE, "ffn_hidden_size": Kind.ARCHITECTURE},
    ),
    (
        "",
        "",
        "--num-attention-heads 8 --num-key-value-heads 4 --kv-channels 16",
        {"num_attention_heads": Kind.ARCHITECTURE},
    ),
    ("", "", "--num-key-value-heads 2", {"num_key_value_heads": Kind.ARCHITECTURE}),
    ("", "", "--ffn-hidden-size 100", {"ffn_hidden_size": Kind.ARCHITECTURE}),
    ("", "", "--normalization rmsnorm", {"normalization": Kind.ARCHITECTURE}),
    ("", "", "--norm-epsilon 1e-6", {"norm_epsilon": Kind.ARCHITECTURE}),
    ("", "", "--activation-function squared_relu", {"activation_function": Kind.ARCHITECTURE}),
    ("", "", "--untie-embeddings-and-output-weights", {"untie_embeddings_and_output_weights": Kind.ARCHITECTURE}),
    ("", "", "--disable-bias-linear", {"add_bias_linear": Kind.ARCHITECTURE, "add_qkv_bias": Kind.ARCHITECTURE}),
    ("", "", "--qk-layernorm", {"qk_layernorm": Kind.ARCHITECTURE}),
    ("", "", "--max-position-embeddings 64", {"max_position_embeddings": Kind.ARCHITECTURE}),
    ("", "", "--attention-window 8", {"attention_window": Kind.ARCHITECTURE}),
    (ROPE, "", "--rotary-base 5e5", {"rotary_base": Kind.ARCHITECTURE}),
    (ROPE, "", "--max-position-embeddings 64", {"max_position_embeddings": Kind.NOTED}),
    (ROPE, "", "--rotary-beta-fast 16", {}),
    ("", "", "--hidden-dropout 0", {"hidden_dropout": Kind.NOTED}),
    ("", "", "--attention-dropout 0.2", {"attention_dropout": Kind.NOTED}),
    ("", "", "--make-vocab-size-divisible-by 64", {"make_vocab_size_divisible_by": Kind.LAYOUT}),
    ("", "", "--optimizer sgd", {"optimizer": Kind.OPTIMIZER}),
    ("", "", "--adam-beta2 0.95", {"adam_beta2": Kind.NOTED}),
    ("", "", "--clip-grad 0.5", {"clip_grad": Kind.NOTED}),
    ("", "", "--lr 2e-3", {}),
    ("", "", "--lr-decay-style cosine --lr-warmup-iters 5", {}),
    ("", "", "--weight-decay 0.3", {}),
    ("", "", "--train-iters 200", {"train_iters": Kind.NOTED}),
    ("", "", "--global-batch-size 8", {"global_batch_size": Kind.NOTED}),
    ("", "", "--micro-batch-size 2 --global-batch-size 1", {"micro_batch_size": Kind.LAYOUT}),
    ("", "", "--seed 7", {"seed": Kind.DATA}),
    (ROPE, "", "--seq-length 64", {"seq_length": Kind.DATA, "max_position_embeddings": Kind.NOTED}),
    ("", "", "--eod-mask-loss", {"eod_mask_loss": Kind.DATA}),
    ("", "", "--reset-attention-mask", {"reset_attention_mask": Kind.DATA}),
    ("", "--data-path a --split 1", "--data-path b --split 1", {}),
    ("", "", "--precision fp32", {"precision": Kind.LAYOUT}),
    ("", "", "--zero-stage 3", {"zero_stage": Kind.LAYOUT}),
    ("", "", "--cpu-optimizer", {"cpu_optimizer": Kind.LAYOUT}),
    ("", "", "--tensor-model-parallel-size 2", {"tensor_model_parallel_size": Kind.LAYOUT}),
    ("", "", "--pipeline-model-parallel-size 2", {"pipeline_model_parallel_size": Kind.LAYOUT}),
    ("", "", "--recompute-granularity full", {"recompute_granularity": Kind.NOTED}),
    ("", "", "--attention-backend unfused", {"attention_backend": Kind.NOTED}),
    ("", "", "--log-interval 5 --tensorboard-dir t", {}),
    ("", "", "--save s --save-interval 5 --keep-last 3", {}),
    ("", "", "--exit-interval 5 --eval-interval 7 --num-workers 0", {}),
]


def sections(*words):
    given = legal(*" ".join(words).split(), without="--mock-data" if "--data-path" in " ".join(words) else "")
    return json.loads(json.dumps(load_run_config(given).config.to_json()))


@pytest.mark.parametrize(("both", "old", "new", "expected"), TABLE, ids=[f"{row[0]} {row[2]}".strip() for row in TABLE])
def test_each_difference_has_its_meaning(both, old, new, expected):
    found = find_differences(sections(both, old), sections(both, new))
    assert {one.name: one.kind for one in found} == expected


def test_there_are_at_least_thirty_flags_in_the_table():
    assert len({name for row in TABLE for name in row[3]} | {row[2] for row in TABLE if not row[3]}) >= 30


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        ("--lr 3 --seed 9 --zero-stage 3 --optimizer sgd --global-batch-size 8 --eod-mask-loss --precision fp32", {}),
        ("--hidden-dropout 0.3", {"hidden_dropout": Kind.NOTED}),
        ("--rotary-base 5e5 --attention-window 8", {"rotary_base": Kind.NOTED, "attention_window": Kind.NOTED}),
        ("--seq-length 64", {"max_position_embeddings": Kind.NOTED}),
        ("--num-layers 5", {"num_layers": Kind.ARCHITECTURE}),
    ],
)
def test_of_the_weights_alone_only_the_model_is_asked(new, expected):
    found = find_differences(sections(ROPE), sections(ROPE, new), weights_only=True)
    assert {one.name: one.kind for one in found} == expected


def test_a_difference_reads_old_to_new():
    (one,) = find_differences(sections(""), sections("--num-layers 6"))
    assert str(one) == "--num-layers 4 -> 6"
    (one,) = find_differences(sections(""), sections("--rampup-batch-size 1 1 10 --global-batch-size 1"))
    assert str(one) == "--rampup-batch-size nothing -> 1 1 10"


def test_a_field_that_the_saving_version_did_not_have_had_its_default():
    saved = sections("")
    del saved["model"]["attention_window"], saved["training"]["hysteresis"]
    assert find_differences(saved, sections("")) == []
    assert [one.name for one in find_differences(saved, sections("--attention-window 8"))] == ["attention_window"]


def test_a_field_that_this_version_does_not_have_is_a_difference():
    saved = sections("")
    saved["model"]["parallel_branches"] = True
    (one,) = find_differences(saved, sections(""))
    assert (str(one), one.kind) == ("--parallel-branches True -> nothing", Kind.ARCHITECTURE)


def test_a_section_that_the_checkpoint_lacks_says_nothing():
    assert find_differences({"model": sections("")["model"]}, sections("--seed 5 --lr 1")) == []


def test_every_section_and_only_fields_that_there_are_have_a_kind():
    fields = {name for section in sections("").values() for name in section}
    assert KIND_OF_SECTION.keys() == SECTIONS.keys()
    assert fields >= KIND_OF_FIELD.keys() | STRETCHED


def test_values_that_differ_are_listed_with_their_path():
    old, new = {"a": {"b": [1, 2], "c": [1]}, "d": 1}, {"a": {"b": [1, 3], "c": [1, 2]}, "e": None}
    assert list(changed_values(old, new)) == ["a.b[1] 2 -> 3", "a.c 1 -> 1 2", "d 1 -> nothing"]
