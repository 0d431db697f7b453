"""Certificates of layouts as they are: EQUAL, for products of axes, and in their losses over twenty steps."""

import pytest

from tests.layouts.certified import certify_right, task_of

LLAMA = """
    --position-embedding-type rope --normalization rmsnorm --activation-function swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights
"""

PRODUCTS = {
    "tensor, sequence and ZeRO 1": "--tensor-model-parallel-size 2 --sequence-parallel --zero-stage 1",
    "pipeline and tensor": f"--pipeline-model-parallel-size 2 --tensor-model-parallel-size 2 {LLAMA}",
    "Ulysses and ZeRO 3": "--ds-sequence-parallel-size 2 --zero-stage 3 --reset-attention-mask",
}

TWENTY_STEPS = {
    "tensor and sequence": "--tensor-model-parallel-size 2 --sequence-parallel",
    "Ulysses": f"--ds-sequence-parallel-size 2 {LLAMA}",
    "pipeline": "--pipeline-model-parallel-size 2 --pipeline-partition 1,1",
    "ZeRO 1": "--zero-stage 1",
    "ZeRO 2": f"--zero-stage 2 {LLAMA}",
    "ZeRO 3": "--zero-stage 3",
}


@pytest.fixture
def certificates(request, tmp_path):
    flags, ranks, steps = request.param
    tasks = {name: task_of(words, ranks, steps, tmp_path / name) for name, words in flags.items()}
    return certify_right(tasks)


@pytest.mark.parametrize("certificates", [(PRODUCTS, 4, 5)], indirect=True)
def test_products_of_axes_are_certified_equal(certificates):
    for name, certificate in certificates.items():
        assert certificate.equal, (name, certificate.worst_first[:5])


@pytest.mark.parametrize("certificates", [(TWENTY_STEPS, 2, 20)], indirect=True)
def test_losses_and_gradient_norms_are_equal_over_twenty_steps(certificates):
    for name, certificate in certificates.items():
        numbers = [found for found in certificate.findings if found.what in ("loss", "gradient norm")]
        assert len(numbers) == 40
        wrong = [found for found in numbers if not (found.holds and found.bound == 1e-5)]
        assert not wrong, (name, wrong)
