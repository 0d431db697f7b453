"""The model without weights, and with those of a checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.checkpoint.fragments import LogicalTensors
from megatron.config.model import ModelConfig
from megatron.kernels.attention.interface import AttentionRequest
from megatron.kernels.attention.pick import pick_attention
from megatron.model.gpt import GPT
from megatron.parallel.groups import ParallelGroups


def empty_model(config: ModelConfig, vocab_size: int) -> GPT:
    """Make the model of one rank, for the CPU and in fp32, without memory for its weights."""
    request = AttentionRequest(
        head_size=config.kv_channels,
        dtype=torch.float32,
        device_type="cpu",
        gqa=config.num_key_value_heads != config.num_attention_heads,
        window=config.attention_window > 0,
        softcap=config.attention_softcap > 0,
    )
    attention, _ = pick_attention("auto", request)
    with torch.device("meta"):
        return GPT(config, vocab_size=vocab_size, groups=ParallelGroups.alone(), attention=attention)


def loaded_model(config: ModelConfig, tensors: LogicalTensors, dtype: torch.dtype = torch.float32) -> GPT:
    """Make the model with the weights of a checkpoint, rounded to a dtype, in fp32, ready to predict.

    Raises:
        CheckpointError: tensors are missing, or of another shape.
    """
    name = next(name for name in tensors.names if name.endswith("word_embeddings.weight") or name == "0.weight")
    model = empty_model(config, tensors.shape(name)[0] - tensors.padding(name))
    weights: dict[str, Tensor] = {}
    for name, param in model.named_parameters():
        weights[name] = tensors.read(name).to(dtype).float().view(param.shape)
    model.load_state_dict(weights, assign=True)
    return model.eval()
