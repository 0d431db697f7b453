from __future__ import annotations

from pathlib import Path

import pytest

from megatron.config.errors import ConfigError
from megatron.config.parser import CHECKPOINT_ARGS
from megatron.config.retired_flags import FATES, REFUSED_VALUES, RENAMED_VALUES, Alias, Ignored, Refused
from megatron.config.run import RunConfig, load_run_config
from megatron.config.sections import all_flags
from tests.config.command_lines import legal

OLDER = [
    name
    for line in (Path(__file__).parent / "older_gpt_flags.txt").read_text().splitlines()
    if not line.startswith("#")
    for name in line.split()
]


def by_fate(kind: type) -> list[str]:
    return [name for name, fate in FATES.items() if isinstance(fate, kind)]


def load(words: str) -> RunConfig:
    return load_run_config(legal(*words.split())).config


def use(name: str, value: str = "3") -> list[str]:
    """The flag with as many values as it takes."""
    return [f"--{name}", *([value] if FATES[name].takes else [])]


@pytest.mark.parametrize("name", OLDER)
def test_every_older_flag_is_a_field_or_has_a_fate(name: str) -> None:
    is_field = name.replace("-", "_") in all_flags() or f"--{name}" == CHECKPOINT_ARGS
    assert is_field != (name.replace("_", "-").lower() in FATES)


def test_no_retired_flag_shadows_a_flag_or_its_opposite() -> None:
    spellings = {s for flag in all_flags().values() for s in (flag.spelling, flag.negation)}
    assert not {f"--{name}" for name in FATES} & spellings


@pytest.mark.parametrize("name", by_fate(Alias))
def test_alias_leads_to_flags_that_are_there(name: str) -> None:
    assert load_run_config(legal(*use(name, "block" if name.endswith("method") else "4"))).config


@pytest.mark.parametrize(
    ("words", "section", "field", "value"),
    [
        ("--use-rotary-position-embeddings", "model", "position_embedding_type", "rope"),
        ("--no-position-embedding", "model", "position_embedding_type", "none"),
        ("--use-rotary-position-embeddings --no-position-embedding", "model", "position_embedding_type", "rope"),
        ("--rotary-position-embeddings-theta 5e5", "model", "rotary_base", 5e5),
        ("--num-query-groups=2", "model", "num_key_value_heads", 2),
        ("--layernorm-epsilon 1e-6", "model", "norm_epsilon", 1e-6),
        ("--layernorm_epsilon=1e-6", "model", "norm_epsilon", 1e-6),
        ("--swiglu", "model", "activation_function", "swiglu"),
        ("--openai-gelu", "model", "activation_function", "gelu_tanh"),
        ("--squared-relu", "model", "activation_function", "squared_relu"),
        ("--disable-bias-linear", "model", "add_bias_linear", False),
        ("--normalization RMSNorm", "model", "normalization", "rmsnorm"),
        ("--bf16", "training", "precision", "bf16"),
        ("--fp16", "training", "precision", "fp16"),
        ("--fp32", "training", "precision", "fp32"),
        ("--fp16 --bf16", "training", "precision", "bf16"),
        ("--batch-size 3", "training", "micro_batch_size", 3),
        ("--checkpoint-activations", "kernels", "recompute_granularity", "full"),
        ("--deepspeed-activation-checkpointing", "kernels", "recompute_granularity", "full"),
        ("--checkpoint-num-layers 2", "kernels", "recompute_num_layers", 2),
        ("--activations-checkpoint-method block", "kernels", "recompute_granularity", "full"),
        ("--activations-checkpoint-method block", "kernels", "recompute_method", "block"),
        ("--checkpoint-activations-method uniform", "kernels", "recompute_method", "uniform"),
        ("--activations-checkpoint-num-layers 3", "kernels", "recompute_num_layers", 3),
        ("--recompute-activations", "kernels", "recompute_granularity", "selective"),
        ("--partition-activations", "kernels", "distribute_saved_activations", True),
        ("--distribute-checkpointed-activations", "kernels", "distribute_saved_activations", True),
        ("--checkpoint-in-cpu", "kernels", "recompute_inputs_on_host", True),
        ("--override-opt_param-scheduler", "checkpoint", "override_opt_param_scheduler", True),
        ("--override-lr-scheduler", "checkpoint", "override_opt_param_scheduler", True),
        ("--use_checkpoint_opt_param_scheduler", "checkpoint", "use_checkpoint_opt_param_scheduler", True),
        ("--use-checkpoint-lr-scheduler", "checkpoint", "use_checkpoint_opt_param_scheduler", True),
        ("--attention-backend local", "kernels", "attention_backend", "unfused"),
        ("--attention-backend fused", "kernels", "attention_backend", "sdpa_cudnn"),
        ("--attention-backend flash", "kernels", "attention_backend", "flash_v2"),
        ("--use-flash-attn", "kernels", "attention_backend", "flash_v1"),
        ("--use-flash-attn-v1", "kernels", "attention_backend", "flash_v1"),
        ("--use-flash-attn-v2", "kernels", "attention_backend", "flash_v2"),
        ("--use_flash_attn_triton", "kernels", "attention_backend", "flash_triton"),
        ("--tokenizer-type GPTSentencePieceTokenizer", "data", "tokenizer_type", "SentencePieceTokenizer"),
        ("--tokenizer-type HFTokenizer", "data", "tokenizer_type", "HuggingFaceTokenizer"),
        ("--optimizer adamw", "optimizer", "optimizer", "adam"),
        ("--rotary-seq-len-interpolation-factor 4", "model", "rotary_scaling_factor", 4.0),
    ],
)
def test_alias_sets_todays_field(words: str, section: str, field: str, value: object) -> None:
    assert getattr(getattr(load(words), section), field) == value


@pytest.mark.parametrize("name", by_fate(Ignored))
def test_ignored_flag_changes_nothing_and_says_why_once(name: str) -> None:
    loaded = load_run_config(legal(*use(name)))
    fate = FATES[name]
    assert isinstance(fate, Ignored)
    assert loaded.config == load("")
    assert loaded.notes == ((f"--{name} is ignored: {fate.reason}.",) if fate.reason else ())


def test_flags_ignored_for_one_reason_share_a_note() -> None:
    notes = load_run_config(legal("--no-persist-layer-norm", "--disable-mem-efficient-ln", "--mmap-warmup")).notes
    assert len(notes) == 2
    assert notes[0].startswith("--no-persist-layer-norm, --disable-mem-efficient-ln are ignored: ")


@pytest.mark.parametrize("name", by_fate(Refused))
def test_refused_flag_stops_with_advice(name: str) -> None:
    fate = FATES[name]
    assert isinstance(fate, Refused)
    with pytest.raises(ConfigError) as raised:
        load_run_config(legal(*use(name, "some")))
    assert str(raised.value).startswith(f"--{name}")
    assert str(raised.value).endswith(f"{fate.advice}.")


@pytest.mark.parametrize(
    "words",
    [f"--{name} {value}" for name, fate in FATES.items() if isinstance(fate, Refused) for value in fate.off]
    + ["--num-experts 1 1", "--sample-rate 1.0", "--ds-sequence-parallel-size 1", "--recompute-granularity none"],
)
def test_value_that_asks_for_nothing_is_accepted(words: str) -> None:
    assert load(words) == load("")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--synchronize-each-layer", "CUDA_LAUNCH_BLOCKING=1"),
        ("--profile-backward", "nsys"),
        ("--use-flash-attn-builder", "--attention-backend flash_v2 or flash_triton"),
        ("--window-size 127 0", "--attention-window N"),
        ("--num-experts 8", "mixture of experts"),
        ("--num-experts 8 16", "mixture of experts"),
        ("--DDP-impl FSDP", "--zero-stage 3"),
        ("--ds-sequence-parallel-fpdt", "Ulysses FPDT"),
        ("--transformer-impl transformer_engine", "Transformer Engine"),
        ("--fp8-e4m3", "--fp8 --fp8-format e4m3"),
        ("--fp8-amax-history-len 16", "without a history"),
        ("--fp8-recipe delayed", "without a history"),
        ("--no-fp8-wgrad", "all three products"),
        ("--reset-iteration", "--finetune starts at iteration 0"),
        ("--profile_steps 2,3", "nsys"),
        ("--tokenizer-type Llama2Tokenizer", "HuggingFaceTokenizer"),
        ("--swiglu yes", "--swiglu takes no value, not yes."),
        ("--swiglu=yes", "--swiglu takes no value, not yes."),
        ("--layernorm-epsilon", "--layernorm-epsilon takes one value, not nothing."),
        ("--use-tutel 1", "--use-tutel takes no value, not 1."),
    ],
)
def test_refusal_says_what_to_use_instead(words: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(words)
    assert sentence in str(raised.value)


def test_renamed_and_refused_values_belong_to_fields() -> None:
    for name, values in RENAMED_VALUES.items():
        choices = all_flags()[name].info.choices
        assert set(values.values()) <= set(choices)
        assert not set(values) & set(choices)
    for name, refused in REFUSED_VALUES.items():
        assert not set(refused) & set(all_flags()[name].info.choices)


def test_advice_names_flags_that_are_there() -> None:
    known = {flag.spelling for flag in all_flags().values()} | {f"--{name}" for name in FATES} | {"--config"}
    texts = [fate.advice for fate in FATES.values() if isinstance(fate, Refused)]
    texts += [fate.reason for fate in FATES.values() if isinstance(fate, Ignored)]
    texts += [text for values in REFUSED_VALUES.values() for text in values.values()]
    named = {word.strip("`,.:;()") for text in texts for word in text.split() if word.strip("`(").startswith("--")}
    assert named <= known
