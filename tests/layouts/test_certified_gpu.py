"""Certificates on two GPUs, over NCCL and in bf16: EQUAL in every layout of two ranks and at every ZeRO stage."""

import pytest

from tests.layouts.certified import certify_right, task_of

DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1"
LAYOUTS = {
    "tensor and sequence": f"--tensor-model-parallel-size 2 --sequence-parallel --precision bf16 {DROPOUT}",
    "pipeline": "--pipeline-model-parallel-size 2 --precision bf16",
    "Ulysses": f"--ds-sequence-parallel-size 2 --precision bf16 {DROPOUT}",
    "data": "--zero-stage 0",
    "ZeRO 1": "--zero-stage 1 --precision bf16",
    "ZeRO 2": "--zero-stage 2 --precision bf16",
    "ZeRO 3": f"--zero-stage 3 --precision bf16 --recompute-granularity full {DROPOUT}",
}


@pytest.mark.gpu(2)
def test_layouts_of_two_gpus_are_certified_equal(tmp_path):
    tasks = {name: task_of(words, 2, 5, tmp_path / name) for name, words in LAYOUTS.items()}
    for name, certificate in certify_right(tasks, "nccl").items():
        assert certificate.equal, (name, certificate.worst_first[:5])
