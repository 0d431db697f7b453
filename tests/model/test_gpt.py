"""The model: its names, its causality, its masks, and that choices which should not change the numbers do not."""

import dataclasses

import pytest
import torch

from megatron.kernels.attention.pick import AttentionUnavailableError
from megatron.model.context import Context, KeyValueCache
from megatron.model.gpt import padded_vocab_size
from megatron.parallel.sharding import describe_sharding
from tests.model.tiny import LLAMA, VOCAB_SIZE, random_tokens, tiny_config, tiny_gpt

VARIANTS = {
    "gpt2": {},
    "llama": LLAMA,
    "mixed": {
        "position_embedding_type": "rope",
        "rotary_percent": 0.5,
        "rotary_interleaved": True,
        "qk_layernorm": True,
        "apply_layernorm_1p": True,
        "activation_function": "squared_relu",
        "num_key_value_heads": 1,
        "fp32_residual_connection": True,
    },
    "no_positions": {"position_embedding_type": "none", "activation_function": "geglu_tanh"},
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


def gradients(model, tokens, **inputs):
    model.zero_grad()
    loss = model(tokens[:, :-1], labels=tokens[:, 1:], **inputs)
    loss.backward()
    return [loss.detach(), *(param.grad.clone() for param in model.parameters())]


def test_parameters_are_named_by_stage():
    block = {
        f"{part}.{kind}"
        for part in ("attention_norm", "attention.qkv", "attention.output", "mlp_norm", "mlp.up", "mlp.down")
        for kind in ("weight", "bias")
    }
    blocks = {f"{stage}.{name}" for stage in (2, 3, 4) for name in block}
    tied = {"tied_modules.word_embeddings.weight", "1.table.weight", "5.weight", "5.bias"} | blocks
    assert dict(tiny_gpt().named_parameters()).keys() == tied
    untied = tied - {"tied_modules.word_embeddings.weight"} | {"0.weight", "6.weight"}
    model = tiny_gpt(untie_embeddings_and_output_weights=True)
    assert dict(model.named_parameters()).keys() == untied


@variants
def test_names_of_parameters_are_those_of_the_stages(variant):
    model = tiny_gpt(**variant)
    for index, stage in enumerate(model.stages()):
        prefix = "tied_modules.word_embeddings" if index == 0 and model.tied_modules else str(index)
        assert all(model.get_parameter(f"{prefix}.{name}") is param for name, param in stage.named_parameters())


def test_forward_is_a_fold_over_the_stages():
    model, tokens = tiny_gpt(), random_tokens()
    x = tokens
    for stage in model.stages():
        x = stage(x, Context())
    assert torch.equal(x, model(tokens))


def test_an_untied_head_adds_one_vocabulary_table():
    tied, untied = (tiny_gpt(untie_embeddings_and_output_weights=untie) for untie in (False, True))
    count = {model: sum(param.numel() for param in model.parameters()) for model in (tied, untied)}
    assert count[untied] - count[tied] == tied.padded_vocab_size * 32


def test_the_padded_vocabulary_is_the_next_multiple():
    assert [padded_vocab_size(size, 128) for size in (1, 128, 129, 50257)] == [128, 128, 256, 50304]


@variants
def test_later_tokens_change_nothing(variant):
    model, tokens = tiny_gpt(**variant).eval(), random_tokens()
    other = tokens.clone()
    other[:, 10:] = (other[:, 10:] + 1) % VOCAB_SIZE
    before, after = model(tokens), model(other)
    torch.testing.assert_close(before[:10], after[:10])
    assert not torch.allclose(before[10], after[10])


@variants
def test_sdpa_trains_as_unfused(variant):
    tokens = random_tokens()
    sdpa, unfused = (gradients(tiny_gpt(backend=name, **variant), tokens) for name in ("sdpa", "unfused"))
    torch.testing.assert_close(sdpa, unfused, atol=1e-4, rtol=1e-4)


@variants
@pytest.mark.parametrize("backend", ["sdpa", "unfused"])
def test_decoding_with_a_cache_equals_the_full_forward(variant, backend):
    model, tokens = tiny_gpt(backend=backend, **variant).eval(), random_tokens(length=16)
    cache = KeyValueCache(model.config.num_layers, 16)
    pieces = [
        model(tokens[:, start:end], cache=cache) for start, end in ((0, 7), (7, 11), (11, 12), (12, 13), (13, 16))
    ]
    torch.testing.assert_close(torch.cat(pieces), model(tokens), atol=1e-5, rtol=1e-4)


def test_a_full_cache_says_so():
    model, cache = tiny_gpt(), KeyValueCache(3, 8)
    with pytest.raises(ValueError, match="holds 8 tokens, 9 are needed"):
        model(random_tokens(length=9), cache=cache)


@variants
@pytest.mark.parametrize("backend", ["sdpa", "unfused"])
def test_masked_documents_are_as_if_alone(variant, backend):
    model, tokens = tiny_gpt(backend=backend, **variant).eval(), random_tokens(batch=1, length=16)
    document = torch.tensor([[0] * 6 + [1] * 10])
    mask = (document[:, None, :, None] == document[:, None, None, :]).contiguous()
    position_ids = torch.tensor([[*range(6), *range(10)]])
    together = model(tokens, position_ids=position_ids, attention_mask=mask)
    packed = model(tokens, position_ids=position_ids, document_ids=document)
    apart = torch.cat([model(tokens[:, :6]), model(tokens[:, 6:])])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model(tokens)[6:], apart[6:], atol=1e-2)


@pytest.mark.parametrize("backend", ["sdpa", "unfused"])
def test_a_window_of_the_whole_sequence_is_none_and_a_short_one_forgets(backend):
    model, tokens = tiny_gpt(backend=backend).eval(), random_tokens(length=16)
    wide = tiny_gpt(backend=backend, attention_window=16).eval()
    narrow = tiny_gpt(backend=backend, attention_window=2).eval()
    torch.testing.assert_close(wide(tokens), model(tokens))
    changed = tokens.clone()
    changed[:, 0] = (tokens[:, 0] + 1) % 100
    reach = 3 * (2 - 1)  # each of three layers looks one token back
    torch.testing.assert_close(narrow(changed)[reach + 1 :], narrow(tokens)[reach + 1 :])
    assert not torch.allclose(narrow(changed)[reach], narrow(tokens)[reach], atol=1e-4)
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    torch.testing.assert_close(narrow(tokens, attention_mask=mask), narrow(tokens), atol=1e-5, rtol=1e-4)


def test_capped_logits_change_the_model_and_a_high_cap_does_not():
    model, tokens = tiny_gpt(backend="unfused").eval(), random_tokens(length=16)
    high = tiny_gpt(backend="unfused", attention_softcap=1e4).eval()
    low = tiny_gpt(backend="unfused", attention_softcap=0.1).eval()
    torch.testing.assert_close(high(tokens), model(tokens), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(low(tokens), model(tokens), atol=1e-2)


@pytest.mark.parametrize("given", ["attention_mask", "cache", "document_ids"])
def test_a_backend_without_the_feature_refuses_it(given):
    model = tiny_gpt()
    model.attention = dataclasses.replace(model.attention, features=frozenset())
    inputs = {
        "attention_mask": torch.ones(1, 1, 16, 16, dtype=torch.bool),
        "cache": KeyValueCache(3, 16),
        "document_ids": torch.zeros(2, 16, dtype=torch.int32),
    }
    with pytest.raises(AttentionUnavailableError, match="sdpa lacks"):
        model(random_tokens(), **{given: inputs[given]})


def test_grouped_heads_as_many_as_query_heads_are_plain_heads():
    """GQA whose key/value heads are copies of each other within a group equals multi-head attention of those copies."""
    config = tiny_config(**{**LLAMA, "num_key_value_heads": 2})
    grouped, plain = tiny_gpt(**{**LLAMA, "num_key_value_heads": 2}), tiny_gpt(**{**LLAMA, "num_key_value_heads": 4})
    weights = dict(grouped.named_parameters())
    with torch.no_grad():
        for name, param in plain.named_parameters():
            weight = weights[name]
            if name.endswith("qkv.weight"):
                query, key, value = weight.unflatten(0, (2, 4, config.kv_channels)).split([2, 1, 1], dim=1)
                weight = torch.stack([query, key.expand_as(query), value.expand_as(query)], dim=2).flatten(0, 3)
            param.copy_(weight)
    tokens = random_tokens()
    torch.testing.assert_close(plain(tokens), grouped(tokens))


def test_dropout_is_off_in_evaluation_and_on_in_training():
    model, tokens = tiny_gpt(attention_dropout=0.3, hidden_dropout=0.3), random_tokens()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("which", ["attention_dropout", "hidden_dropout"])
def test_each_dropout_is_applied(which):
    model, tokens = tiny_gpt(**{which: 0.3}), random_tokens()
    assert not torch.equal(model(tokens), model(tokens))


@variants
def test_bf16_trains_near_fp32(variant):
    model, tokens = tiny_gpt(init_method_std=0.05, **variant), random_tokens()
    expected = gradients(model, tokens)
    model.bfloat16()
    actual = gradients(model, tokens)
    assert actual[0].dtype == torch.float32
    assert {grad.dtype for grad in actual[1:]} == {torch.bfloat16}
    assert actual[0] == pytest.approx(expected[0].item(), rel=5e-3)
    for grad, exact in zip(actual[1:], expected[1:], strict=True):
        assert (grad.float() - exact).norm() < 0.1 * exact.norm() + 1e-4


def test_the_residual_stream_is_fp32_where_asked():
    tokens = random_tokens()
    for fp32 in (False, True):
        model = tiny_gpt(fp32_residual_connection=fp32).bfloat16()
        x = tokens
        dtypes = []
        for stage in model.stages():
            x = stage(x, Context())
            dtypes.append(x.dtype)
        stream = torch.float32 if fp32 else torch.bfloat16
        assert dtypes == [torch.bfloat16, *[stream] * 4, torch.bfloat16, torch.bfloat16]


def test_loss_is_the_sum_over_unmasked_tokens():
    model, tokens = tiny_gpt(), random_tokens(length=9)
    labels, loss_mask = tokens[:, 1:], torch.zeros(2, 8)
    loss_mask[0, 3:] = 1
    loss_mask[1, 0] = 1
    logits = model(tokens[:, :-1])[..., :VOCAB_SIZE].transpose(0, 1)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, 8)
    loss = model(tokens[:, :-1], labels, loss_mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (losses * loss_mask).sum())
    torch.testing.assert_close(model(tokens[:, :-1], labels), losses.sum())


def test_padding_of_the_vocabulary_changes_neither_loss_nor_gradients():
    tokens = random_tokens()
    results = []
    for divisor in (4, 128):
        model = tiny_gpt(make_vocab_size_divisible_by=divisor)
        results.append(gradients(model, tokens))
        embedding = model.get_parameter("tied_modules.word_embeddings.weight")
        assert embedding.shape[0] == {4: 100, 128: 128}[divisor]
        assert torch.count_nonzero(embedding[VOCAB_SIZE:]) == 0
        assert torch.count_nonzero(embedding.grad[VOCAB_SIZE:]) == 0
    for small, large in zip(*results, strict=True):
        torch.testing.assert_close(large[: len(small)] if large.ndim else large, small)


def test_there_are_no_buffers_for_a_cast_to_round():
    assert not [name for variant in VARIANTS.values() for name, _ in tiny_gpt(**variant).named_buffers()]


def test_gate_and_up_are_two_blocks_of_one_product():
    shardings = describe_sharding(tiny_gpt(**LLAMA))
    assert shardings["2.mlp.up.weight"].blocks == (1, 1)
    qkv = shardings["2.attention.qkv.weight"]
    assert (qkv.blocks, qkv.groups) == ((2, 2), LLAMA["num_key_value_heads"])  # queries, then key and value
    assert shardings["0.weight"].padding == shardings["6.weight"].padding == 12


@variants
def test_the_loss_in_chunks_is_the_loss(variant):
    tokens, mask = random_tokens(length=17), torch.tensor([[1.0] * 10 + [0.0] * 6, [0.5] * 16])
    expected = gradients(tiny_gpt(**variant), tokens, loss_mask=mask)
    found = gradients(tiny_gpt(loss_chunk_size=6, **variant), tokens, loss_mask=mask)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@variants
@pytest.mark.parametrize("chunk_size", [6, 64])
def test_the_mlp_in_chunks_is_the_mlp(variant, chunk_size):
    tokens = random_tokens(length=17)
    expected, found = (gradients(tiny_gpt(mlp_chunk_size=size, **variant), tokens) for size in (0, chunk_size))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 2e-6 * theirs.norm()  # sums over chunks are rounded in another order


def test_a_model_whose_loss_is_in_chunks_still_gives_logits():
    tokens = random_tokens()
    assert torch.equal(tiny_gpt(loss_chunk_size=6)(tokens), tiny_gpt()(tokens))
