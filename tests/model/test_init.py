"""Initial weights depend on the seed and the name, on nothing else."""

import math

import pytest
import torch

from tests.model.tiny import LLAMA, VOCAB_SIZE, tiny_gpt


def weights(**changes):
    return {name: param.detach() for name, param in tiny_gpt(**changes).named_parameters()}


def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before():
    first = weights()
    torch.rand(3)
    second = weights()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_and_another_name_give_other_weights():
    first, second = weights(seed=1), weights(seed=2)
    drawn = [name for name, weight in first.items() if weight.std() > 0]
    assert not [name for name in drawn if torch.equal(first[name], second[name])]
    assert not torch.equal(first["2.attention.qkv.weight"], first["3.attention.qkv.weight"])


@pytest.mark.parametrize("untie", [False, True])
def test_padding_of_the_vocabulary_changes_no_weight(untie):
    small, large = (
        weights(make_vocab_size_divisible_by=divisor, untie_embeddings_and_output_weights=untie) for divisor in (4, 128)
    )
    for name, weight in small.items():
        assert torch.equal(large[name][: len(weight)], weight)
        assert torch.count_nonzero(large[name][len(weight) :]) == 0
    table = small["0.weight" if untie else "tied_modules.word_embeddings.weight"]
    assert len(table) == VOCAB_SIZE


def test_more_blocks_leave_the_embedding_as_it_is():
    assert torch.equal(*(weights(num_layers=n)["tied_modules.word_embeddings.weight"] for n in (2, 4)))


def test_standard_deviations():
    std, layers = 0.3, 2
    drawn = weights(init_method_std=std, num_layers=layers, hidden_size=128, **LLAMA)
    for name, weight in drawn.items():
        if weight.ndim == 2:
            scaled = name.endswith(("output.weight", "down.weight"))
            expected = std / math.sqrt(2 * layers) if scaled else std
            rows = weight[:VOCAB_SIZE] if name in ("0.weight", "5.weight") else weight
            assert rows.std() == pytest.approx(expected, rel=0.03), name
            assert rows.mean() == pytest.approx(0.0, abs=0.02), name


@pytest.mark.parametrize("one_plus", [False, True])
def test_norms_start_as_the_identity_and_biases_at_zero(one_plus):
    for name, weight in weights(apply_layernorm_1p=one_plus, qk_layernorm=True).items():
        if "norm.weight" in name or name == "5.weight":
            assert torch.equal(weight, torch.full_like(weight, 0.0 if one_plus else 1.0)), name
        elif name.endswith("bias"):
            assert torch.count_nonzero(weight) == 0, name


def test_a_deeper_stream_starts_with_about_the_same_loss():
    """The scaled output products keep the logits small at the usual standard deviation: the loss starts at log(v)."""
    tokens = torch.randint(VOCAB_SIZE, (4, 32), generator=torch.Generator().manual_seed(0))
    model = tiny_gpt(init_method_std=0.02, num_layers=8)
    loss = model(tokens[:, :-1], labels=tokens[:, 1:]) / (4 * 31)
    assert loss.item() == pytest.approx(math.log(VOCAB_SIZE), abs=0.05)
