"""The kernels of a run: chosen by device and flags, with a reason."""

import pytest
import torch

from megatron.config.errors import ConfigError
from megatron.config.kernels import KernelsConfig
from megatron.kernels import choice, fp8_products
from megatron.kernels.build import KernelBuildError, kernel_names
from megatron.kernels.choice import FUSED, PLAIN, choose_kernels
from megatron.kernels.fp8 import fused_quantise, quantise


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


@pytest.fixture
def hopper(loaded, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(fp8_products, "load_kernel", loaded.append)


def test_the_cpu_emulates_products_in_8_bits_and_says_so(loaded):
    kernels, reason = choose_kernels(KernelsConfig(fp8=True), "cpu")
    assert reason == "plain torch, on cpu; products of the blocks in fp8 (hybrid), emulated on cpu"
    assert kernels.products is not None
    assert not kernels.are_fused
    assert loaded == []


def test_a_gpu_brings_matrices_into_8_bits_by_a_kernel(loaded, hopper):
    kernels, reason = choose_kernels(KernelsConfig(fp8=True, fp8_format="e4m3"), "cuda")
    assert loaded == [*FUSED, "fp8"]
    assert reason.endswith("; products of the blocks in fp8 (e4m3)")
    assert kernels.products._quantise is fused_quantise
    assert kernels.are_fused


def test_a_gpu_without_fused_kernels_brings_matrices_into_8_bits_by_plain_torch(loaded, hopper):
    kernels, reason = choose_kernels(KernelsConfig(fp8=True, no_fused_kernels=True), "cuda")
    assert loaded == []
    assert "by plain torch, as the flags say" in reason
    assert kernels.products._quantise is quantise


def test_a_kernel_that_cannot_be_compiled_leaves_8_bits_to_plain_torch_with_the_reason(hopper, monkeypatch, caplog):
    def refuse(name):
        raise KernelBuildError("there is no compiler")

    monkeypatch.setattr(fp8_products, "load_kernel", refuse)
    kernels, reason = choose_kernels(KernelsConfig(fp8=True), "cuda")
    assert reason.endswith("brought into it by plain torch, since there is no compiler")
    assert kernels.products._quantise is quantise
    assert "there is no compiler" in caplog.text


def test_a_gpu_without_units_for_8_bits_is_refused(hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    with pytest.raises(ConfigError, match=r"--fp8 needs a GPU of compute capability 8.9 .* A100 has 8.0: leave"):
        choose_kernels(KernelsConfig(fp8=True), "cuda")
