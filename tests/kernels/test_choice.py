"""The kernels of a run: chosen by device and flags, with a reason."""

import pytest

from megatron.config.kernels import KernelsConfig
from megatron.kernels import choice
from megatron.kernels.build import KernelBuildError, kernel_names
from megatron.kernels.choice import FUSED, PLAIN, choose_kernels


@pytest.fixture
def loaded(monkeypatch):
    """Names of the kernels that were loaded, without loading any."""
    names = []
    monkeypatch.setattr(choice, "load_kernels", names.extend)
    return names


def test_every_kernel_to_choose_has_a_folder():
    assert set(FUSED) <= set(kernel_names())


def test_the_cpu_computes_in_plain_torch(loaded):
    assert choose_kernels(KernelsConfig(), "cpu") == (PLAIN, "plain torch, on cpu")
    assert loaded == []


def test_a_gpu_takes_all_kernels(loaded):
    kernels, reason = choose_kernels(KernelsConfig(), "cuda")
    assert loaded == list(FUSED)
    assert reason == "fused norm, rotary, activation, dropout, softmax, cross_entropy"
    for replaced in FUSED.values():
        for name, implementation in replaced.items():
            assert getattr(kernels, name) is implementation
            assert getattr(PLAIN, name) is not implementation


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("no_norm_fusion", "norm"),
        ("no_rope_fusion", "rotary"),
        ("no_bias_gelu_fusion", "activation"),
        ("no_bias_dropout_fusion", "dropout"),
        ("no_masked_softmax_fusion", "softmax"),
        ("no_cross_entropy_loss_fusion", "cross_entropy"),
    ],
)
def test_a_flag_leaves_its_operation_to_plain_torch(loaded, flag, name):
    kernels, reason = choose_kernels(KernelsConfig(**{flag: True}), "cuda")
    assert loaded == [other for other in FUSED if other != name]
    assert reason.endswith(f"; plain torch for {name}")
    assert all(getattr(kernels, part) is getattr(PLAIN, part) for part in FUSED[name])


def test_one_flag_leaves_everything_to_plain_torch(loaded):
    kernels, reason = choose_kernels(KernelsConfig(no_fused_kernels=True), "cuda")
    assert kernels is PLAIN
    assert reason == "plain torch, as the flags say"
    assert loaded == []


def test_kernels_that_cannot_be_compiled_are_replaced_with_the_reason(monkeypatch, caplog):
    def refuse(names):
        raise KernelBuildError("there is no compiler")

    monkeypatch.setattr(choice, "load_kernels", refuse)
    kernels, reason = choose_kernels(KernelsConfig(), "cuda")
    assert kernels is PLAIN
    assert reason == "plain torch, since there is no compiler"
    assert reason in caplog.text
