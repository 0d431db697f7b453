from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron.config.errors import ConfigError
from megatron.config.parser import build_parser
from megatron.config.run import RunConfig, load_run_config, parse_run_config
from megatron.config.sections import SECTIONS, all_flags
from tests.config.command_lines import LEGAL, legal


def errors_of(*words: str) -> str:
    with pytest.raises(ConfigError) as raised:
        load_run_config(legal(*words))
    return str(raised.value)


def test_legal_command_line_gives_a_run_config_of_sections() -> None:
    config = parse_run_config(LEGAL)
    assert isinstance(config, RunConfig)
    assert (config.model.num_layers, config.optimizer.lr, config.data.mock_data) == (4, 1e-3, True)


def test_every_field_is_reachable_by_its_flag_and_names_are_unique() -> None:
    options = build_parser()._option_string_actions
    names = [field.name for cls in SECTIONS.values() for field in dataclasses.fields(cls)]
    assert len(names) == len(set(names)) == len(all_flags())
    assert all(f"--{name.replace('_', '-')}" in options for name in names)


def test_dash_and_underscore_are_alike() -> None:
    config = parse_run_config(legal("--eval_iters", "3", "--log_interval=7"))
    assert (config.training.eval_iters, config.reporting.log_interval) == (3, 7)


def test_underscore_in_a_value_stays() -> None:
    assert parse_run_config(legal("--save=a_b-c")).checkpoint.save == "a_b-c"


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--no-exit-signal-handler"], "exit_signal_handler", False),
        (["--no-exit-signal-handler", "--exit-signal-handler"], "exit_signal_handler", True),
        (["--load", "d", "--no-load-rng"], "no_load_rng", True),
        (["--load", "d", "--no-load-rng", "--load-rng"], "no_load_rng", False),
        (["--no-add-qkv-bias"], "add_qkv_bias", False),
        (["--train-tokens", "300e9"], "train_tokens", 300_000_000_000),
        (["--train-tokens", "1_000"], "train_tokens", 1000),
        (["--zero-stage", "2"], "zero_stage", 2),
        (["--zero-stage", "2.0"], "zero_stage", 2),
        (["--exit-duration-in-mins", "1.5"], "exit_duration_in_mins", 1.5),
        (["--rampup-batch-size", "1", "1", "9", "--global-batch-size", "4"], "rampup_batch_size", (1, 1, 9)),
        (["--eval-iters", "3", "--eval-iters", "5"], "eval_iters", 5),
    ],
)
def test_words_become_values_of_the_annotated_type(words: list[str], field: str, value: object) -> None:
    section = getattr(parse_run_config(legal(*words)), all_flags()[field].section)
    assert getattr(section, field) == value
    assert type(getattr(section, field)) is type(value)


def test_paths_are_a_tuple_of_words() -> None:
    words = legal("--data-path", "0.3", "a", "0.7", "b", without="--mock-data")
    assert parse_run_config(words).data.data_path == ("0.3", "a", "0.7", "b")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--num-layers", "two"], "--num-layers: 'two' is not an integer."),
        (["--num-layers", "2.5"], "--num-layers: '2.5' is not an integer."),
        (["--train-tokens", "inf"], "--train-tokens: 'inf' is not an integer."),
        (["--lr", "fast"], "--lr: 'fast' is not a number."),
        (["--precision", "bf17"], "--precision: 'bf17' is not one of bf16, fp16, fp32."),
        (["--zero-stage", "4"], "--zero-stage: '4' is not one of 0, 1, 2, 3."),
        (["--skip-train", "7"], "'7' follows no flag that takes it."),
        (["--lr"], "--lr: expected one argument."),
        (["--rampup-batch-size", "1", "2"], "--rampup-batch-size: expected 3 arguments."),
    ],
)
def test_illegal_words_are_told_in_a_sentence(words: list[str], sentence: str) -> None:
    assert sentence in errors_of(*words)


def test_all_illegal_words_are_told_at_once() -> None:
    told = errors_of("--num-layers", "two", "--precision", "bf17", "--num-laers", "3", "--use-tutel")
    assert len(told.splitlines()) == 4


def test_unknown_flag_is_told_with_the_nearest_names() -> None:
    assert errors_of("--num-laers", "3").startswith("--num-laers is not a flag: did you mean --num-layers")
    assert "--swiglu" in errors_of("--swigluu")
    assert errors_of("--qqqqqqqq") == "--qqqqqqqq is not a flag: --help lists all flags."


def test_flags_cannot_be_shortened() -> None:
    assert "--hidden-siz is not a flag: did you mean --hidden-size" in errors_of("--hidden-siz", "3")


def test_missing_required_flags_are_told_together() -> None:
    with pytest.raises(ConfigError, match="--hidden-size, --num-attention-heads, --lr: required"):
        load_run_config(["--num-layers", "2"])


def test_errors_leave_with_exit_code_2_and_all_sentences_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse_run_config(legal("--attention-dropout", "2", "--zero-stage", "0", "--num-key-value-heads", "3"))
    told = capsys.readouterr()
    assert left.value.code == 2
    assert told.out == ""
    assert len(told.err.splitlines()) == 3


def test_launcher_flags_are_ignored_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    parse_run_config(["--local_rank=1", *LEGAL, "--deepspeed", "--local-rank", "3"])
    assert capsys.readouterr() == ("", "")


def test_help_names_every_flag_its_choices_and_default() -> None:
    page = " ".join(build_parser().format_help().split())
    for flag in all_flags().values():
        assert flag.spelling in page
        assert all(choice in page for choice in flag.info.choices)
    assert "hidden_size / num_attention_heads" in page  # how a derived value is derived
    assert "(default: 969,30,1)" in page
    assert page.count("(required)") == 4


def test_help_groups_flags_by_section() -> None:
    page = build_parser().format_help()
    places = [page.index(f"\n{cls.title}:\n") for cls in SECTIONS.values()]
    assert places == sorted(places)


def test_print_config_shows_every_value_with_its_source(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    user = tmp_path / "ds.json"
    user.write_text('{"zero_optimization": {"stage": 2}}')
    words = legal("--print-config", "--deepspeed_config", str(user), "--swiglu", "--split", "9,1")
    with pytest.raises(SystemExit) as left:
        parse_run_config(words)
    assert left.value.code == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert list(lines) == list(all_flags())
    assert lines["num_layers"][1:] == ["4", "flag"]
    assert lines["activation_function"][1:] == ["swiglu", "flag"]
    assert lines["norm_epsilon"][1:] == ["1e-05", "default"]
    assert lines["kv_channels"][1:3] == ["16", "derived:"]
    assert lines["zero_stage"][1:] == ["2", "file", f"{user}:", "zero_optimization.stage"]


def test_print_config_columns_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_run_config(legal("--print-config"))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    sources = {row.rindex(word) for row in rows for word in (" flag", " default", " derived:") if word in row}
    assert len(sources) == 1


def test_print_config_still_tells_broken_rules(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse_run_config(legal("--print-config", "--attention-dropout", "2"))
    told = capsys.readouterr()
    assert left.value.code == 2
    assert "attention_dropout" in told.out
    assert "--attention-dropout" in told.err


def test_other_ranks_print_no_notes_and_no_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_run_config(legal("--print-config", "--no-bias-gelu-fusion"), rank=1)
    assert capsys.readouterr() == ("", "")


def test_other_rank_tells_an_error_under_its_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron.config.errors.PATIENCE_SECONDS", 0.0)
    with pytest.raises(SystemExit):
        parse_run_config(legal("--lr", "fast"), rank=3)
    assert capsys.readouterr().err == "rank 3: --lr: 'fast' is not a number.\n"
