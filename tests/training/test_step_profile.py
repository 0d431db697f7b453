"""The table of a step: kernels fall into their kinds, and the kinds add up."""

import pytest
import torch
from torch.autograd import DeviceType

from megatron.config.run import parse_run_config
from megatron.engine.launch import read_environment
from megatron.training.step_profile import IDLE, Piece, _by_kind, _covered, _dearest, _pieces
from tests.ranks import run_on_ranks
from tests.training.runs import FLAGS

KERNELS = [
    ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_bias_TNT", "matrix products"),
    ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_gemm>", "matrix products"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_6i", "attention"),
    (
        "megatron::forward_rows<__nv_bfloat16, 8, 4, true>(megatron::ForwardTensors<__nv_bfloat16, __nv_bfloat16>)",
        "norms",
    ),
    ("void megatron::rotate_tokens<__nv_bfloat16, 8, false>(megatron::Rotation)", "heads, rotary"),
    ("void megatron::backward<__nv_bfloat16, 8, 0>(megatron::Activation)", "activation"),
    ("void megatron::backward<__nv_bfloat16, 8>(megatron::Dropout, megatron::Drop)", "dropout and residual sum"),
    ("void megatron::gradient<__nv_bfloat16>(megatron::CrossEntropy)", "cross entropy"),
    ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "collectives"),
    ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>", "optimizer"),
    ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>", "other"),
    ("void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(void const*, void const*)", "attention"),
]


@pytest.mark.parametrize(("name", "kind"), KERNELS)
def test_a_kernel_is_known_by_its_name(name, kind):
    assert Piece(name, (), 0, 1, 1).kind == kind


@pytest.mark.parametrize(
    ("starters", "kind"),
    [
        (("aten::add_", "autograd::engine::evaluate_function: torch::autograd::AccumulateGrad"), "sums"),
        (("aten::copy_", "Optimizer.step#AdamW.step"), "optimizer"),
        (("aten::sum", "autograd::engine::evaluate_function: AddmmBackward0"), "bias"),
    ],
)
def test_a_general_kernel_is_known_by_what_started_it(starters, kind):
    assert kind in Piece("void at::native::vectorized_elementwise_kernel<4>", starters, 0, 1, 1).kind


class Event:
    """As torch's profiler gives it."""

    def __init__(self, name, id, device, begin, end, parent=None):
        self.name, self.id, self.device_type, self.cpu_parent = name, id, device, parent
        self.time_range = type("Span", (), {"start": begin, "end": end})


class Profiler:
    def events(self):
        add = Event("aten::add_", 1, DeviceType.CPU, 0, 10)
        return [
            add,
            Event("cudaLaunchKernel", 7, DeviceType.CPU, 2, 4, parent=add),
            Event("elementwise", 7, DeviceType.CUDA, 20, 30),
            Event("aten::add_", 9, DeviceType.CUDA, 0, 90),  # an annotation, repeated on the device
            Event("gemm", 8, DeviceType.CUDA, 25, 45),
        ]


def test_pieces_of_a_gpu_are_kernels_with_the_operations_that_launched_them():
    pieces = list(_pieces(Profiler(), "cuda"))
    assert [(piece.name, piece.starters, piece.own) for piece in pieces] == [
        ("elementwise", ("aten::add_",), 10),
        ("gemm", (), 15),  # what came while the other was at work does not count twice
    ]
    assert _covered(pieces) == 25
    assert _by_kind(pieces, 2) == {"matrix products": 0.0075, "gradient sums, casts, copies": 0.005}
    assert [entry["ms"] for entry in _dearest(pieces, 1)] == [0.015, 0.01]


def profile_a_run():
    from megatron.training.step_profile import profile_steps

    config = parse_run_config([*FLAGS, "--mock-data", "--vocab-size", "64"])
    return profile_steps(config, read_environment(), warm_up=1, steps=2).to_json()


def test_a_run_on_a_cpu_is_told_by_kind():
    (found,) = run_on_ranks(1, profile_a_run, initialize=False, deepspeed=True)
    kinds = found["kinds_ms"]
    assert {"matrix products", "optimizer", IDLE} <= kinds.keys()
    assert all(ms >= 0 for ms in kinds.values())
    assert 0 < sum(kinds.values()) <= 1.2 * found["profiled_ms"]
    assert found["step_ms"] > 0
    assert torch.tensor(found["speed"]["tokens_per_second"]) > 0
