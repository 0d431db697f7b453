import pytest

from megatron.checkpoint.errors import CheckpointError
from megatron.training.resume import check_fits, check_layout

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
    other = changed(
        model={"num_layers": 4, "hidden_size": 64}, training={"precision": "fp32"}, engine={"zero_stage": 3}
    )
    with pytest.raises(CheckpointError) as caught:
        check_fits(SAVED, other)
    for change in ("--num-layers 2 -> 4", "--hidden-size 32 -> 64", "--precision bf16 -> fp32", "--zero-stage 1 -> 3"):
        assert change in str(caught.value)
    assert "--lr" not in str(caught.value)


def test_what_may_change_is_listed():
    other = changed(optimizer={"lr": 0.2}, model={"hidden_dropout": 0.0}, reporting={"log_interval": 5})
    assert check_fits(SAVED, other) == ["--hidden-dropout 0.1 -> 0.0", "--lr 0.1 -> 0.2"]


def test_a_model_field_that_the_saving_version_did_not_have_had_its_default():
    assert check_fits(SAVED, changed(model={"attention_window": 0})) == []
    with pytest.raises(CheckpointError, match="--attention-window 0 -> 128"):
        check_fits(SAVED, changed(model={"attention_window": 128}))


def test_other_number_of_data_parallel_ranks_is_refused():
    check_layout({"data_parallel_size": 2}, {"data_parallel_size": 2})
    with pytest.raises(CheckpointError, match=r"data-parallel-size 2, and this run has 4.*start 2 ranks"):
        check_layout({"data_parallel_size": 2}, {"data_parallel_size": 4})


def test_each_axis_that_differs_is_named():
    saved = {"data_parallel_size": 1, "tensor_model_parallel_size": 2}
    with pytest.raises(
        CheckpointError, match=r"data-parallel-size 1, and this run has 2; tensor-model-parallel-size 2"
    ):
        check_layout(saved, {"data_parallel_size": 2, "tensor_model_parallel_size": 1})
