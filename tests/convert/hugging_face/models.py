"""Small random models of every family, in folders as `save_pretrained` writes them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

VOCABULARY = 100
LENGTH = 48

SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LENGTH,
}
GPT2: dict[str, Any] = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": LENGTH, "vocab_size": VOCABULARY}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 12,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 12}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", GPT2),
    "gpt2 untied": ("GPT2Config", {**GPT2, **UNTIED, "activation_function": "gelu", "n_inner": 48}),
    "llama 2": ("LlamaConfig", {**SIZES, "num_key_value_heads": 4}),
    "llama 3": ("LlamaConfig", {**SIZES, "rope_parameters": LLAMA3}),
    "llama tied": ("LlamaConfig", {**SIZES, **TIED, "num_key_value_heads": 1, "head_dim": 16}),
    "llama biased": ("LlamaConfig", {**SIZES, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "llama linear": (
        "LlamaConfig",
        {**SIZES, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    ),
    "mistral": ("MistralConfig", {**SIZES, "sliding_window": 8}),
    "mistral without a window": ("MistralConfig", {**SIZES, **TIED, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {**SIZES, "rope_parameters": YARN}),
    "qwen2 tied": ("Qwen2Config", {**SIZES, **TIED}),
    "qwen2 with a window": (
        "Qwen2Config",
        {**SIZES, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    ),
    "qwen3": ("Qwen3Config", {**SIZES, "head_dim": 16}),
    "qwen3 tied": ("Qwen3Config", {**SIZES, **TIED, "head_dim": 24}),
    "gemma": ("GemmaConfig", {**SIZES, "head_dim": 16, "num_key_value_heads": 1}),
    "gemma untied": ("GemmaConfig", {**SIZES, **UNTIED, "head_dim": 8}),
}


def make_model(variant: str, dtype: torch.dtype = torch.float32) -> Any:
    """Make a model with weights large enough that a wrong mapping, bias or norm shows."""
    import transformers

    kind, values = VARIANTS[variant]
    config = getattr(transformers, kind)(**{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **values})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            is_norm = ("norm" in name or ".ln_" in name) and name.endswith("weight")
            mean = 1.0 if is_norm and kind != "GemmaConfig" else 0.0
            param.copy_(mean + 0.1 * torch.randn(param.shape, generator=generator))
    return model.to(dtype).eval()


def write_model(folder: Path, variant: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Save one of the models, and return its folder."""
    make_model(variant, dtype).save_pretrained(folder, **options)
    return folder


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    assert files
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def change_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes a key."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def tokens(rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))
