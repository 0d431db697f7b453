import math
import time
from dataclasses import replace

import pytest
import torch

from megatron.engine.interface import StepResult
from megatron.training.metrics import Interval, SpeedModel, peak_tflops, perplexity
from megatron.training.state import TrainState


def result(loss, norm=1.0, *, skipped=False, scale=1.0):
    return StepResult(loss=torch.tensor(loss), grad_norm=torch.tensor(norm), skipped=skipped, loss_scale=scale)


def observe(*results, lowest=1.0):
    interval, state = Interval(lowest), TrainState()
    for one in results:
        interval.add(one, state, samples=4, learning_rate=0.1, weight_decay=0.01)
    interval.settle(state)
    return interval, state


def test_speed_is_samples_times_tokens_and_flops():
    speed = SpeedModel(
        tokens_per_sample=10, model_flops_per_sample=6e12, hardware_flops_per_sample=8e12, num_devices=2, peak_tflops=12
    )
    assert speed.measure(samples=4, seconds=2.0) == {
        "tokens_per_second": 20.0,
        "model_tflops": 6.0,
        "hardware_tflops": 8.0,
        "mfu": 0.5,
    }


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA L40S", 362.0),
        ("Some other device", None),
    ],
)
def test_peak_is_found_by_name(name, peak):
    assert peak_tflops(name, "bf16") == peak


def test_peak_of_fp32_is_not_known():
    assert peak_tflops("NVIDIA H100 80GB HBM3", "fp32") is None


def test_loss_is_the_mean_of_the_finite_ones():
    interval, state = observe(result(1.0), result(math.nan, math.nan, skipped=True), result(2.0))
    assert interval.to_json()["lm_loss"] == 1.5
    assert (state.skipped_steps, state.nonfinite_steps, state.nonfinite_streak) == (1, 1, 0)


def test_bad_steps_in_a_row_are_counted():
    _, state = observe(result(1.0), result(1.0, math.inf, skipped=True), result(math.nan, math.nan, skipped=True))
    assert state.nonfinite_streak == 2


def test_skipped_step_is_counted_at_once_and_another_one_step_late():
    interval, state = Interval(), TrainState()
    interval.add(result(math.nan, math.nan, skipped=True), state, samples=4, learning_rate=0.1, weight_decay=0.0)
    assert state.nonfinite_streak == 1
    interval.add(result(1.0), state, samples=4, learning_rate=0.1, weight_decay=0.0)
    assert interval.losses == []


def test_search_for_a_loss_scale_is_no_bad_result():
    _, state = observe(result(1.0, math.inf, skipped=True, scale=1024.0))
    assert (state.skipped_steps, state.nonfinite_steps) == (1, 0)
    _, state = observe(result(1.0, math.inf, skipped=True, scale=1.0))
    assert (state.skipped_steps, state.nonfinite_steps) == (1, 1)


def test_overhead_is_what_neither_deepspeed_nor_the_device_took():
    interval, state = Interval(), TrainState()
    for seconds in (0.25, 0.5):
        step = replace(result(1.0), inner_seconds=seconds)
        interval.add(step, state, samples=4, learning_rate=0.1, weight_decay=0.0)
    assert interval.overhead(1.0) == pytest.approx(0.25 - interval.reading.seconds)
    interval.reading.seconds = 0.125
    assert interval.overhead(1.0) == 0.125


def test_reading_a_result_is_timed():
    class Slow:
        def __float__(self):
            time.sleep(0.02)
            return 1.0

    interval, _ = observe(replace(result(1.0), loss=Slow()))
    assert interval.reading.seconds >= 0.02


def test_perplexity_of_a_huge_loss_is_infinite():
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert perplexity(1e4) == math.inf
