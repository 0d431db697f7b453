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
    ("void megatron::sum_rows<megatron::NormBackward, __nv_bfloat16, 4>(float const*, int, int)", "norms"),
    ("void megatron::sum_rows<megatron::Activation, __nv_bfloat16, 4>(float const*, int, int)", "activation"),
    ("void megatron::sum_rows<megatron::Dropout, float, 1>(float const*, int, int)", "dropout and residual sum"),
    ("void megatron::sum_rows<megatron::Quantise, __nv_bfloat16, 4>(float const*, int, int)", "into 8 bits"),
    ("void megatron::gradient<__nv_bfloat16>(megatron::CrossEntropy)", "cross entropy"),
    ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "collectives"),
    ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>", "optimizer"),
    ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>", "other"),
    ("void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(void const*, void const*)", "attention"),
    ("triton_red_fused_add_gelu_native_layer_norm_3", "compiled by torch"),
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

    def __init__(self, name, id, device, begin, end, parent=None, *, annotates=False):
        self.name, self.id, self.device_type, self.cpu_parent = name, id, device, parent
        self.is_user_annotation = annotates
        self.time_range = type("Span", (), {"start": begin, "end": end})


class Profiler:
    def __init__(self, *events):
        self._events = list(events)

    def events(self):
        return self._events


def test_pieces_of_a_gpu_are_kernels_with_the_operations_that_launched_them():
    add = Event("aten::add_", 1, DeviceType.CPU, 0, 10)
    profiler = Profiler(
        Event("Optimizer.step", 3, DeviceType.CPU, 0, 9, annotates=True),
        Event("Optimizer.step", 9, DeviceType.CUDA, 0, 90, annotates=True),
        add,
        Event("cudaLaunchKernel", 7, DeviceType.CPU, 2, 4, parent=add),
        Event("elementwise", 7, DeviceType.CUDA, 20, 30),
        Event("gemm", 8, DeviceType.CUDA, 25, 45),
    )
    pieces = list(_pieces(profiler, "cuda"))
    assert [(piece.name, piece.starters, piece.own) for piece in pieces] == [
        ("elementwise", ("aten::add_",), 10),
        ("gemm", (), 15),  # what came while the other was at work does not count twice
    ]
    assert _covered(pieces) == 25
    assert _by_kind(pieces, 2) == {"matrix products": 0.0075, "gradient sums, casts, copies": 0.005}
    assert [entry["ms"] for entry in _dearest(pieces, 1)] == [0.015, 0.01]


def test_a_kernel_named_as_the_operation_that_launched_it_is_work():
    """As torch's compiler names both."""
    name = "triton_poi_fused_gelu_0"
    launching = Event(name, 1, DeviceType.CPU, 0, 5)
    profiler = Profiler(
        launching,
        Event("cuLaunchKernelEx", 7, DeviceType.CPU, 1, 2, parent=launching),
        Event(name, 7, DeviceType.CUDA, 10, 30),
        Event("_ZN7unknown", 8, DeviceType.CUDA, 30, 35),
    )
    pieces = list(_pieces(profiler, "cuda"))
    assert _covered(pieces) == 25
    assert _by_kind(pieces, 1) == {"compiled by torch": 0.02, "other": 0.005}


def test_torch_tells_what_a_user_annotates_from_what_its_compiler_launches():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with torch.profiler.record_function("annotated"):
            torch.ones(1)
        with torch._C._profiler._RecordFunctionFast("triton_poi_fused_0", (), {}):
            torch.ones(1)
    told = {event.name: event.is_user_annotation for event in profiler.events()}
    assert (told["annotated"], told["triton_poi_fused_0"]) == (True, False)


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
