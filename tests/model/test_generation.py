"""Generated tokens are those of the model's distribution, and no prompt knows of its neighbours."""

import collections
import dataclasses

import pytest
import torch

from megatron.kernels.attention.pick import AttentionUnavailableError
from megatron.model.generation import GenerationError, Sampling, choose, generate
from tests.model.tiny import LLAMA, VOCAB_SIZE, tiny_gpt

VARIANTS = {"learned": {}, "rope": LLAMA, "none": {"position_embedding_type": "none"}}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16, 17]]


def without_cache(model, prompt, max_new_tokens):
    """Greedy decoding in the plainest way."""
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        logits = model(torch.tensor([tokens]))[-1, 0, :VOCAB_SIZE]
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


@variants
@pytest.mark.parametrize("backend", ["sdpa", "unfused"])
def test_greedy_batch_of_unequal_prompts_equals_one_at_a_time_without_a_cache(variant, backend):
    model = tiny_gpt(backend=backend, **variant).eval()
    together = generate(model, PROMPTS, max_new_tokens=10, greedy=True)
    assert together == [without_cache(model, prompt, 10) for prompt in PROMPTS]


def test_rotary_positions_go_on_past_the_longest_trained_length():
    model = tiny_gpt(**{**LLAMA, "max_position_embeddings": 8}).eval()
    together = generate(model, PROMPTS, max_new_tokens=10, greedy=True)
    assert together == [without_cache(model, prompt, 10) for prompt in PROMPTS]


@variants
def test_a_draw_depends_on_seed_prompt_index_and_position_only(variant):
    model = tiny_gpt(**variant)
    settings = {"max_new_tokens": 8, "temperature": 1.5, "seed": 7}
    together = generate(model, PROMPTS, **settings)
    assert generate(model, PROMPTS[:2], **settings) == together[:2]
    assert generate(model, PROMPTS, **settings) == together
    assert generate(model, PROMPTS, **{**settings, "seed": 8}) != together
    changed = generate(model, [[1, 2, 3, 4], *PROMPTS[1:]], **settings)
    assert changed[1:] == together[1:]
    shorter = generate(model, PROMPTS, **{**settings, "max_new_tokens": 5})
    assert shorter == [tokens[:5] for tokens in together]


def test_equal_prompts_draw_apart():
    first, second = generate(tiny_gpt(), [[1, 2], [1, 2]], max_new_tokens=12, temperature=2.0)
    assert first != second


def test_generation_stops_at_the_end_of_document_token():
    model = tiny_gpt()
    free = generate(model, PROMPTS, max_new_tokens=10, greedy=True)
    eod = free[0][4]
    stopped = generate(model, PROMPTS, max_new_tokens=10, greedy=True, eod_id=eod)
    expected = [tokens[: tokens.index(eod) + 1] if eod in tokens else tokens for tokens in free]
    assert stopped == expected
    assert len(stopped[0]) <= 5


def test_padding_ids_are_never_generated():
    model = tiny_gpt(make_vocab_size_divisible_by=512)
    tokens = generate(model, PROMPTS, max_new_tokens=20, temperature=50.0)
    assert all(0 <= token < VOCAB_SIZE for row in tokens for token in row)
    assert len({token for row in tokens for token in row}) > 40


def test_dropout_is_off_while_generating_and_back_on_afterwards():
    model = tiny_gpt(attention_dropout=0.5, hidden_dropout=0.5)
    first = generate(model, PROMPTS, max_new_tokens=8, greedy=True)
    assert model.training
    assert first == generate(model, PROMPTS, max_new_tokens=8, greedy=True)


def test_training_goes_on_after_generating_in_inference_mode():
    config = {**LLAMA, "rotary_base": 777.0}  # tables that no other test has made, and cached, outside of that mode
    model, tokens = tiny_gpt(**config), torch.tensor([PROMPTS[2]])
    with torch.inference_mode():
        generate(model, PROMPTS, max_new_tokens=2, greedy=True)
    other = tiny_gpt(**config)
    for each in (model, other):
        each(tokens, labels=tokens).backward()
    gradients = [[param.grad for param in each.parameters()] for each in (model, other)]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert any(grad.any() for grad in gradients[0])


@pytest.mark.parametrize(("prompts", "lacking"), [(PROMPTS, "mask"), (PROMPTS, "cache"), ([[1]], "cache")])
def test_a_backend_that_lacks_what_generation_needs_is_refused(prompts, lacking):
    model = tiny_gpt()
    model.attention = dataclasses.replace(model.attention, features=model.attention.features - {lacking})
    with pytest.raises(AttentionUnavailableError, match=f"sdpa lacks '{lacking}'"):
        generate(model, prompts, max_new_tokens=2)


@pytest.mark.parametrize("window", [2, 5])
@pytest.mark.parametrize("backend", ["sdpa", "unfused"])
def test_a_window_looks_back_over_tokens_and_not_over_padding(backend, window):
    model = tiny_gpt(backend=backend, attention_window=window)
    together = generate(model, PROMPTS, max_new_tokens=8, greedy=True)
    alone = [generate(model, [prompt], max_new_tokens=8, greedy=True)[0] for prompt in PROMPTS]
    assert together == alone
    for prompt, new in zip(PROMPTS, alone, strict=True):
        tokens = list(prompt)
        for token in new:
            logits = model.eval()(torch.tensor([tokens]))[-1, 0, :VOCAB_SIZE]
            assert logits.argmax() == token
            tokens.append(token)


def test_nothing_is_asked_for():
    model = tiny_gpt()
    assert generate(model, [], max_new_tokens=3) == []
    assert generate(model, [[1], [2]], max_new_tokens=0) == [[], []]


PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])


def drawn_share(sampling):
    draws = [(i + 0.5) / 10000 for i in range(10000)]
    logits = PROBABILITIES.log().expand(len(draws), -1)
    counts = collections.Counter(choose(logits, draws, sampling).tolist())
    return {token: pytest.approx(count / len(draws), abs=2e-3) for token, count in counts.items()}


@pytest.mark.parametrize(
    ("sampling", "share"),
    [
        (Sampling(), {0: 0.1, 1: 0.4, 2: 0.05, 3: 0.3, 4: 0.15}),
        (Sampling(top_k=2), {1: 4 / 7, 3: 3 / 7}),
        (Sampling(top_k=99), {0: 0.1, 1: 0.4, 2: 0.05, 3: 0.3, 4: 0.15}),
        (Sampling(top_p=0.6), {1: 4 / 7, 3: 3 / 7}),
        (Sampling(top_p=0.71), {1: 0.4 / 0.85, 3: 0.3 / 0.85, 4: 0.15 / 0.85}),
        (Sampling(top_p=1e-9), {1: 1.0}),
        (Sampling(top_k=3, top_p=0.5), {1: 4 / 7, 3: 3 / 7}),
        (
            Sampling(temperature=0.5),
            {0: 0.01 / 0.285, 1: 0.16 / 0.285, 2: 0.0025 / 0.285, 3: 0.09 / 0.285, 4: 0.0225 / 0.285},
        ),
        (Sampling(temperature=0.0), {1: 1.0}),
        (Sampling(greedy=True, temperature=9.0), {1: 1.0}),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(sampling, share):
    assert share == drawn_share(sampling)


def test_the_highest_draw_takes_a_kept_token():
    largest = 1 - 2**-53
    assert choose(PROBABILITIES.log()[None], [largest], Sampling(top_p=0.6)).tolist() == [3]
    assert choose(PROBABILITIES.log()[None], [0.0], Sampling()).tolist() == [1]


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[100]], {}, "holds token 100; ids are 0 .. 99"),
        ([[1] * 30], {"max_new_tokens": 3}, "more than the 32 learned positions"),
        ([[1]], {"temperature": -1.0}, "temperature -1.0 is negative"),
        ([[1]], {"top_k": -1}, "top_k -1 is negative"),
        ([[1]], {"top_p": 0.0}, r"top_p 0.0 is outside \(0, 1\]"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens -1 is negative"),
    ],
)
def test_what_cannot_be_generated_is_refused(prompts, settings, message):
    with pytest.raises(GenerationError, match=message):
        generate(tiny_gpt(), prompts, **{"max_new_tokens": 1, **settings})
