"""Logits equal those of Hugging Face's modules for the same weights: small, random, fp32."""

import pytest
import torch

from megatron.model.gpt import GPT
from tests.model.tiny import LLAMA, random_tokens, tiny_gpt

transformers = pytest.importorskip("transformers")

ROTARY_LENGTH = 48  # longer than the length that the scaled frequencies were trained for


def fill(model: GPT, weights: dict[str, torch.Tensor]) -> None:
    """Load weights by our names; every parameter must be among them. Vocabularies are padded with zeros."""
    parameters = dict(model.named_parameters())
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for name, param in parameters.items():
            param.zero_()
            param[: len(weights[name])] = weights[name]


def randomise(module) -> None:
    """Weights large enough that a wrong mapping, bias or norm shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in module.named_parameters():
            mean = 1.0 if ("norm" in name or ".ln_" in name) and name.endswith("weight") else 0.0
            param.copy_(mean + 0.2 * torch.randn(param.shape, generator=generator))


def fuse_qkv(query, key, value, kv_heads):
    """Rows of each key/value head together: its queries, its key, its value."""
    parts = [weight.unflatten(0, (kv_heads, -1)) for weight in (query, key, value)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def from_gpt2(module) -> dict[str, torch.Tensor]:
    state = module.state_dict()
    heads = module.config.n_head
    weights = {
        "tied_modules.word_embeddings.weight": state["transformer.wte.weight"],
        "1.table.weight": state["transformer.wpe.weight"],
    }
    for layer in range(module.config.n_layer):
        theirs, ours = f"transformer.h.{layer}", str(layer + 2)
        for kind in ("weight", "bias"):
            weights[f"{ours}.attention_norm.{kind}"] = state[f"{theirs}.ln_1.{kind}"]
            weights[f"{ours}.mlp_norm.{kind}"] = state[f"{theirs}.ln_2.{kind}"]
            qkv = state[f"{theirs}.attn.c_attn.{kind}"].t().chunk(3) if kind == "weight" else None
            qkv = qkv or state[f"{theirs}.attn.c_attn.{kind}"].chunk(3)
            weights[f"{ours}.attention.qkv.{kind}"] = fuse_qkv(*qkv, heads)
            for name, their_name in (
                ("attention.output", "attn.c_proj"),
                ("mlp.up", "mlp.c_fc"),
                ("mlp.down", "mlp.c_proj"),
            ):
                weights[f"{ours}.{name}.{kind}"] = state[f"{theirs}.{their_name}.{kind}"].t()
    norm = module.config.n_layer + 2
    weights[f"{norm}.weight"] = state["transformer.ln_f.weight"]
    weights[f"{norm}.bias"] = state["transformer.ln_f.bias"]
    return weights


def from_llama_like(module) -> dict[str, torch.Tensor]:
    """Llama, Qwen2 and Qwen3: the same names, with biases or head norms where the family has them."""
    state, config = module.state_dict(), module.config
    last = config.num_hidden_layers + 2
    weights = {f"{last}.weight": state["model.norm.weight"]}
    if config.tie_word_embeddings:
        weights["tied_modules.word_embeddings.weight"] = state["model.embed_tokens.weight"]
    else:
        weights["0.weight"] = state["model.embed_tokens.weight"]
        weights[f"{last + 1}.weight"] = state["lm_head.weight"]
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"model.layers.{layer}", str(layer + 2)
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        weights[f"{ours}.attention_norm.weight"] = state[f"{theirs}.input_layernorm.weight"]
        weights[f"{ours}.mlp_norm.weight"] = state[f"{theirs}.post_attention_layernorm.weight"]
        for kind in ("weight", "bias"):
            if f"{attention}.q_proj.{kind}" in state:
                qkv = [state[f"{attention}.{part}_proj.{kind}"] for part in "qkv"]
                weights[f"{ours}.attention.qkv.{kind}"] = fuse_qkv(*qkv, config.num_key_value_heads)
        for part, ours_part in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
            if f"{attention}.{part}.weight" in state:
                weights[f"{ours}.attention.{ours_part}.weight"] = state[f"{attention}.{part}.weight"]
        weights[f"{ours}.attention.output.weight"] = state[f"{attention}.o_proj.weight"]
        weights[f"{ours}.mlp.up.weight"] = torch.cat([state[f"{mlp}.{part}_proj.weight"] for part in ("gate", "up")])
        weights[f"{ours}.mlp.down.weight"] = state[f"{mlp}.down_proj.weight"]
    return weights


def assert_equal_logits(ours: GPT, theirs, weights: dict[str, torch.Tensor], length: int) -> None:
    fill(ours, weights)
    tokens = random_tokens(length=length)
    expected = theirs.eval()(tokens).logits
    logits = ours.eval()(tokens)
    assert expected.std() > 0.5  # otherwise 1e-5 would mean little
    actual = logits[..., : expected.shape[-1]].transpose(0, 1)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", [("gelu_new", "gelu_tanh"), ("gelu", "gelu")])
@pytest.mark.parametrize("backend", ["sdpa", "unfused"])
def test_gpt2(backend, activation):
    config = transformers.GPT2Config(
        n_layer=3, n_embd=32, n_head=4, n_positions=32, vocab_size=100, activation_function=activation[0]
    )
    theirs = transformers.GPT2LMHeadModel(config)
    randomise(theirs)
    ours = tiny_gpt(backend=backend, activation_function=activation[1])
    assert_equal_logits(ours, theirs, from_gpt2(theirs), length=32)


LLAMA_SIZES = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": ROTARY_LENGTH,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
}
OURS = {**LLAMA, "max_position_embeddings": ROTARY_LENGTH, "ffn_hidden_size": 64}

ROTARY_SCALINGS = {
    "none": ({"rope_type": "default"}, {}),
    "linear": ({"rope_type": "linear", "factor": 3.0}, {"rotary_scaling_factor": 3.0}),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 12,
        },
        {"rotary_scaling_factor": 4.0, "rotary_original_max_positions": 12},
    ),
    "yarn": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 2.0,
            "beta_slow": 0.25,
            "original_max_position_embeddings": 12,
        },
        {
            "rotary_scaling_factor": 4.0,
            "rotary_original_max_positions": 12,
            "rotary_beta_fast": 2.0,
            "rotary_beta_slow": 0.25,
            "rotary_attention_factor": 1.1386294361119891,  # 0.1 ln 4 + 1
        },
    ),
}


@pytest.mark.parametrize("scaling", ROTARY_SCALINGS)
def test_llama_with_grouped_heads_and_scaled_rotary(scaling):
    rope, ours = ROTARY_SCALINGS[scaling]
    config = transformers.LlamaConfig(**LLAMA_SIZES, rope_parameters={"rope_theta": 500.0, **rope})
    theirs = transformers.LlamaForCausalLM(config)
    randomise(theirs)
    model = tiny_gpt(**{**OURS, "rotary_base": 500.0, "rotary_scaling_type": scaling, **ours})
    assert_equal_logits(model, theirs, from_llama_like(theirs), length=ROTARY_LENGTH)


def test_qwen2_with_bias_on_the_qkv_product_alone_and_tied_embeddings():
    theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLAMA_SIZES, tie_word_embeddings=True))
    randomise(theirs)
    ours = tiny_gpt(**{**OURS, "add_qkv_bias": True, "untie_embeddings_and_output_weights": False})
    assert_equal_logits(ours, theirs, from_llama_like(theirs), length=ROTARY_LENGTH)


def test_qwen3_with_head_norms_and_a_head_size_of_its_own():
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LLAMA_SIZES, head_dim=16))
    randomise(theirs)
    ours = tiny_gpt(**{**OURS, "qk_layernorm": True, "kv_channels": 16})
    assert_equal_logits(ours, theirs, from_llama_like(theirs), length=ROTARY_LENGTH)
