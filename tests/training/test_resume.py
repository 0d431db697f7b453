import pytest

from megatron.checkpoint.errors import CheckpointError
from megatron.training.resume import check_fits

SAVED = {
    "model": {"num_layers": 2, "hidden_size": 32, "hidden_dropout": 0.1},
    "training": {"precision": "bf16", "train_iters": 10},
    "engine": {"zero_stage": 1},
    "optimizer": {"lr": 0.1, "optimizer": "adam"},
    "reporting": {"log_interval": 1},
}


def changed(**changes):
    return {section: values | changes.get(section, {}) for section, values in SAVED.items()}


def test_same_config_fits_without_a_word():
    assert check_fits(SAVED, SAVED) == []


def test_all_differences_of_the_architecture_are_in_one_message():
    other = changed(model={"num_layers": 4, "hidden_size": 64}, optimizer={"optimizer": "sgd"})
    with pytest.raises(CheckpointError) as caught:
        check_fits(SAVED, other)
    for change in ("--num-layers 2 -> 4", "--hidden-size 32 -> 64", "--optimizer adam -> sgd"):
        assert change in str(caught.value)
    assert "--lr" not in str(caught.value)


def test_what_may_change_is_listed():
    other = changed(optimizer={"lr": 0.2}, model={"hidden_dropout": 0.0}, reporting={"log_interval": 5})
    assert check_fits(SAVED, other) == ["--hidden-dropout 0.1 -> 0.0", "--lr 0.1 -> 0.2"]


def test_layout_and_precision_may_change():
    other = changed(training={"precision": "fp32"}, engine={"zero_stage": 3})
    assert check_fits(SAVED, other) == ["--precision bf16 -> fp32", "--zero-stage 1 -> 3"]


def test_a_model_field_that_the_saving_version_did_not_have_had_its_default():
    assert check_fits(SAVED, changed(model={"attention_window": 0})) == []
    with pytest.raises(CheckpointError, match="--attention-window 0 -> 128"):
        check_fits(SAVED, changed(model={"attention_window": 128}))
