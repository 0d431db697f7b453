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


TABLE = "--num-layers 2 --max-position-embeddings"
LARGE, SMALL = 131072, 4096
RUNS = [
    *(f"{layout} --num-layers {number}" for layout in (TENSOR, SHARDED) for number in (2, 4)),
    *(f"{SHARDED} {TABLE} {rows}" for rows in (SMALL, LARGE)),
    *(f"--num-layers 4 --zero-stage 3 --remote-device {device}" for device in ("none", "cpu")),
]
"""On two GPUs."""


def memory_of_layouts(alone, found) -> dict[str, tuple[float, float]]:
    """Bytes as predicted, and as measured, by what they are.

    In bf16 a block keeps the inputs of its two norms and their outputs (8 bytes for each of s b h), whole on each
    tensor rank unless the sequence is divided; and query, key, value, the heads' output and the MLP's channels before
    and after the activation (24 bytes), of which each tensor rank has its part. It is measured as half of what two more
    blocks keep. Under ZeRO-1 in bf16 a parameter has 18 bytes: itself, its gradient in fp32, its fp32 copy and Adam's
    two. Of ZeRO-3's weights each of two ranks has half.
    """
    tensor_2, tensor_4, sharded_2, sharded_4, small, large, here, away = found
    activation, rows = SEQUENCE * HIDDEN, (LARGE - SMALL) * HIDDEN
    weights = 4 * 12 * HIDDEN**2 + (SEQUENCE + 1024) * HIDDEN
    return {
        "a block's activations, tensor": (activation * (8 + 24 / 2), (tensor_4["kept"] - tensor_2["kept"]) / 2),
        "a block's activations, sequence": (activation * 32 / 2, (sharded_4["kept"] - sharded_2["kept"]) / 2),
        "more positions, 1 GPU": (18 * rows, alone[1]["at rest"] - alone[0]["at rest"]),
        "more positions, 2 tensor ranks": (18 * rows / 2, large["at rest"] - small["at rest"]),
        "ZeRO-3's weights sent to the host": (2 * weights / 2, here["at rest"] - away["at rest"]),
    }


def test_memory_is_what_theory_says():
    alone = measure_on_gpus(1, [f"{TABLE} {rows}" for rows in (SMALL, LARGE)])
    found = measure_on_gpus(2, RUNS)
    assert [run["weights"] for run in found[-2:]] == [{"cuda"}, {"cpu"}]
    for name, (predicted, measured) in memory_of_layouts(alone, found).items():
        assert measured == pytest.approx(predicted, rel=0.1), name
    assert found[3]["peak"] < found[1]["peak"], "a divided sequence is to need less"
