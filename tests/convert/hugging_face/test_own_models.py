"""Models that were made here, with what no family has in that form, compute the same in transformers."""

import dataclasses

import pytest
import torch

from megatron.checkpoint.fragments import open_tensors
from megatron.checkpoint.whole import write_checkpoint
from megatron.config.data import DataConfig
from megatron.convert.hugging_face.check import compare_logits
from megatron.convert.hugging_face.config_file import TheirConfig
from megatron.convert.hugging_face.exporting import export_model
from megatron.convert.hugging_face.registry import FAMILIES
from tests.convert.hugging_face.models import LLAMA3, SIZES, YARN
from tests.model.tiny import LLAMA, VOCAB_SIZE, tiny_gpt
from tests.model.tiny import SIZES as OURS

pytest.importorskip("transformers")

ROTARY = {"rotary_original_max_positions": 32, "rotary_attention_factor": 1.0}
GROUPED = {**LLAMA, **ROTARY, "init_method_std": 0.1}
MODELS = {
    "neighbouring channels rotated": ("llama", {**GROUPED, "rotary_interleaved": True}),
    "and head norms": ("qwen3", {**GROUPED, "rotary_interleaved": True, "qk_layernorm": True, "kv_channels": 16}),
    "norms kept minus one": ("llama", {**GROUPED, "apply_layernorm_1p": True}),
    "LayerNorms kept minus one": ("gpt2", {**ROTARY, "apply_layernorm_1p": True, "activation_function": "gelu_tanh"}),
    "stretched by another base": (
        "llama",
        {**GROUPED, "rotary_scaling_type": "ntk", "rotary_scaling_factor": 4.0, "rotary_original_max_positions": 8},
    ),
    "a window and one key/value head": ("mistral", {**GROUPED, "num_key_value_heads": 1, "attention_window": 5}),
    "squared ReLU": ("gpt2", {**ROTARY, "activation_function": "squared_relu"}),
    "tied, GeGLU, biased": (
        "llama",
        {
            **GROUPED,
            "untie_embeddings_and_output_weights": False,
            "activation_function": "geglu_tanh",
            "add_bias_linear": True,
        },
    ),
    "biased queries": ("qwen2", {**GROUPED, "add_qkv_bias": True, "attention_window": 7}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_equal(name, tmp_path):
    model_type, changes = MODELS[name]
    model = tiny_gpt(**changes)
    with torch.no_grad():  # norms and biases that are not where they start
        generator = torch.Generator().manual_seed(5)
        for param in model.parameters():
            if param.dim() == 1:
                param.add_(0.1 * torch.randn(param.shape, generator=generator))
    padding = model.padded_vocab_size - VOCAB_SIZE
    paddings = {key: padding for key, x in model.state_dict().items() if len(x) == model.padded_vocab_size}
    path = write_checkpoint(tmp_path / "ours", model.state_dict().items(), config={}, iteration=7, paddings=paddings)
    tensors = open_tensors(path)
    made = export_model(tensors, tmp_path / "theirs", model=model.config, data=DataConfig(vocab_size=VOCAB_SIZE))
    assert made.model_type == model_type
    found = compare_logits(made.path, tensors, model.config, torch.float32)
    assert found.scale > 1
    assert found.error < 1e-5 * max(found.scale, 1)
    assert OURS["num_layers"] == model.config.num_layers


@pytest.mark.parametrize("rope", [LLAMA3, YARN, {"rope_type": "linear", "rope_theta": 7e3, "factor": 2.0}])
def test_both_forms_of_rotary_positions_are_read_alike(rope):
    newer = TheirConfig({**SIZES, "rope_parameters": rope}, "config.json")
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
    older = {"rope_theta": rope["rope_theta"], "rope_scaling": {**scaling, "type": rope["rope_type"]}}
    read = FAMILIES["llama"].read_config
    model = read(newer)
    assert model == read(TheirConfig({**SIZES, **older}, "config.json"))
    assert model.rotary_base == rope["rope_theta"]
    assert model.rotary_scaling_type == rope["rope_type"]
    written = FAMILIES["llama"].write_config(model)
    assert read(TheirConfig(written, "config.json")) == model


def test_a_config_that_leaves_out_what_is_the_default_means_it():
    config = TheirConfig({key: SIZES[key] for key in SIZES if key != "num_key_value_heads"}, "config.json")
    llama, mistral = (FAMILIES[name].read_config(config) for name in ("llama", "mistral"))
    assert (llama.num_key_value_heads, llama.kv_channels, llama.rotary_base, llama.attention_window) == (4, 8, 1e4, 0)
    assert mistral == dataclasses.replace(llama, attention_window=4096)
    nothing = TheirConfig({**config.values, "sliding_window": None}, "config.json")
    assert FAMILIES["mistral"].read_config(nothing) == llama
