"""What layouts hold on two GPUs is what theory says: activations, divided position tables, weights on the host."""

import gc
import shlex

import pytest
import torch

from tests.layouts.recorded import COMMON
from tests.layouts.test_matrix import SHARDED, TENSOR
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.gpu(2)

SHAPE = shlex.split(
    """
    --hidden-size 1024 --num-attention-heads 16 --seq-length 4096 --init-method-std 0.02 --precision bf16
    --vocab-size 1000 --make-vocab-size-divisible-by 128 --micro-batch-size 1 --optimizer adam --lr 1e-4 --min-lr 1e-4
    --train-iters 2 --eval-iters 0 --no-log-params-norm --zero-reduce-bucket-size 1000000
    """
)
SEQUENCE, HIDDEN = 4096, 1024


def measure(runs):
    return [measure_one(flags) for flags in runs]


def measure_one(flags):
    """Bytes on this GPU: what forward keeps for backward, at rest between steps, and at most."""
    from megatron.config.run import parse_run_config
    from megatron.engine.launch import read_environment
    from megatron.training.build import build_trainer

    environment = read_environment()
    config = parse_run_config([*COMMON, *SHAPE, *flags], environment.world_size, rank=environment.rank)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    nothing = torch.cuda.memory_allocated()
    trainer = build_trainer(config, environment)
    engine, found = trainer.engine, {}
    forward, train_step = engine._forward, engine.train_step

    def noted_forward(micro_batch):
        before = torch.cuda.memory_allocated()
        loss = forward(micro_batch)
        found["kept"] = torch.cuda.memory_allocated() - before
        return loss

    def noted_step(*args, **kwargs):
        result = train_step(*args, **kwargs)
        found["at rest"] = torch.cuda.memory_allocated() - nothing
        return result

    engine._forward, engine.train_step = noted_forward, noted_step
    assert trainer.fit() == 0
    found["peak"] = torch.cuda.max_memory_allocated() - nothing
    found["weights"] = {
        parameter.ds_tensor.device.type for parameter in engine.module.parameters() if hasattr(parameter, "ds_tensor")
    }
    return found


def measure_on_gpus(number, runs):
    options = {"backend": "nccl", "initialize": False, "deepspeed": True, "timeout": 300.0}
    return run_on_ranks(number, measure, [shlex.split(run) for run in runs], **options)[0]


def at_rest(number, run):
    """Bytes on a GPU between steps; in processes of their own, since DeepSpeed's engines leave things behind."""
    (found,) = measure_on_gpus(number, [run])
    return found["at rest"]


def block_activations() -> dict[str, tuple[float, float]]:
    """What a block keeps for backward: bytes as predicted, and as measured, half of what two more blocks keep.

    In bf16 it keeps the inputs of its two norms and their outputs (8 bytes for each of s b h), whole on each tensor
    rank unless the sequence is divided; and query, key, value, the heads' output and the MLP's channels before and
    after the activation (24 bytes), of which each tensor rank has its part.
    """
    runs = [f"{layout} --num-layers {number}" for layout in (TENSOR, SHARDED) for number in (2, 4)]
    tensor_2, tensor_4, sharded_2, sharded_4 = measure_on_gpus(2, runs)
    assert sharded_4["peak"] < tensor_4["peak"]
    activation = SEQUENCE * HIDDEN
    return {
        "a block's activations, tensor": (activation * (8 + 24 / 2), (tensor_4["kept"] - tensor_2["kept"]) / 2),
        "a block's activations, sequence": (activation * 32 / 2, (sharded_4["kept"] - sharded_2["kept"]) / 2),
    }


def recomputed_blocks() -> dict[str, tuple[float, float]]:
    """What a block keeps under each policy: bytes as predicted, and as measured, half of what two more blocks keep.

    Recomputed as a whole it keeps its input, 2 bytes for each of s b h, which sequence parallelism and
    `--distribute-saved-activations` divide over two tensor ranks, and the host may hold.
    """
    full, divided = "--recompute-granularity full", "--distribute-saved-activations"
    activation = SEQUENCE * HIDDEN
    expected = {
        f"{SHARDED} {full}": activation * 2 / 2,
        f"{TENSOR} {full}": activation * 2,
        f"{TENSOR} {full} {divided}": activation * 2 / 2,
        f"{TENSOR} {full} --recompute-num-layers 2": activation * 2 / 2,
        f"{TENSOR} {full} --recompute-method block --recompute-num-layers 2": activation * (8 + 24 / 2),
        f"{TENSOR} {full} --recompute-inputs-on-host": 0,
    }
    found = measure_on_gpus(2, [f"{policy} --num-layers {number}" for policy in expected for number in (4, 6)])
    for (policy, bytes_kept), few, more in zip(expected.items(), found[::2], found[1::2], strict=True):
        measured = (more["kept"] - few["kept"]) / 2
        print(f"{policy}: predicted {bytes_kept / 2**20:.1f} MiB a block, measured {measured / 2**20:.1f}, ", end="")
        print(f"peak of 6 blocks {more['peak'] / 2**30:.2f} GiB")
    kept = [(more["kept"] - few["kept"]) / 2 for few, more in zip(found[::2], found[1::2], strict=True)]
    return {policy: (expected[policy], measured) for policy, measured in zip(expected, kept, strict=True)}


def position_tables() -> dict[str, tuple[float, float]]:
    """What a table of 131072 learned positions has beyond one of 4096: bytes as predicted, and as measured at rest.

    Under ZeRO-1 in bf16 a parameter has 18 bytes: itself, its gradient in fp32, its fp32 copy and Adam's two.
    """
    small, large = (f"--num-layers 2 --max-position-embeddings {rows}" for rows in (4096, 131072))
    more = 18 * (131072 - 4096) * HIDDEN
    return {
        "more positions, 1 GPU": (more, at_rest(1, large) - at_rest(1, small)),
        "more positions, 2 tensor ranks": (
            more / 2,
            at_rest(2, f"{SHARDED} {large}") - at_rest(2, f"{SHARDED} {small}"),
        ),
    }


def offloaded_weights() -> dict[str, tuple[float, float]]:
    """What leaves the GPU with ZeRO-3's weights, of which two ranks have half each: bytes as predicted and measured."""
    (here,), (away,) = (
        measure_on_gpus(2, [f"--num-layers 4 --zero-stage 3 --remote-device {device}"]) for device in ("none", "cpu")
    )
    assert here["weights"] == {"cuda"}
    assert away["weights"] == {"cpu"}
    weights = 4 * 12 * HIDDEN**2 + (SEQUENCE + 1024) * HIDDEN
    return {"ZeRO-3's weights sent to the host": (2 * weights / 2, here["at rest"] - away["at rest"])}


@pytest.mark.parametrize("measured_bytes", [block_activations, recomputed_blocks, position_tables, offloaded_weights])
def test_memory_is_what_theory_says(measured_bytes):
    for name, (predicted, measured) in measured_bytes().items():
        assert measured == pytest.approx(predicted, rel=0.1, abs=0.01 * SEQUENCE * HIDDEN), name


PEAKS = {
    "one GPU": "",
    "tensor": TENSOR,
    "tensor, sequence": SHARDED,
    "tensor, sequence, blocks recomputed": f"{SHARDED} --recompute-granularity full",
    "tensor, sequence, some products kept": f"{SHARDED} --recompute-granularity products --recompute-budget-gib 0.1",
    "tensor, sequence, plain attention": f"{SHARDED} --attention-backend unfused",
    "tensor, sequence, its core recomputed": f"{SHARDED} --attention-backend unfused --recompute-granularity selective",
    "pipeline": "--pipeline-model-parallel-size 2",
    "Ulysses": "--ds-sequence-parallel-size 2",
    "ZeRO 1": "--zero-stage 1",
    "ZeRO 2": "--zero-stage 2",
    "ZeRO 3": "--zero-stage 3",
}
SMALLER = [
    ("peak", "tensor", "one GPU"),
    ("peak", "tensor, sequence", "tensor"),
    ("peak", "tensor, sequence, some products kept", "tensor, sequence"),
    ("kept", "tensor, sequence, blocks recomputed", "tensor, sequence, some products kept"),
    ("peak", "tensor, sequence, its core recomputed", "tensor, sequence, plain attention"),
    ("peak", "pipeline", "one GPU"),
    ("peak", "Ulysses", "one GPU"),
    ("peak", "ZeRO 1", "one GPU"),
    ("peak", "ZeRO 2", "one GPU"),
    ("peak", "ZeRO 3", "one GPU"),
]
"""What is measured, and two layouts of which the first has less of it, since it divides or recomputes more."""


def test_memory_falls_as_more_is_divided_or_recomputed():
    run = "--num-layers 12 --global-batch-size 4"
    runs = [f"{run} {layout}" for name, layout in PEAKS.items() if name != "one GPU"]
    (alone,) = measure_on_gpus(1, [run])
    found = dict(zip(PEAKS, [alone, *measure_on_gpus(2, runs)], strict=True))
    for name, of_run in found.items():
        print(f"{name}: peak {of_run['peak'] / 2**30:.2f} GiB, at rest {of_run['at rest'] / 2**30:.2f} GiB")
    assert [case for case in SMALLER if not found[case[1]][case[0]] < found[case[2]][case[0]]] == []
