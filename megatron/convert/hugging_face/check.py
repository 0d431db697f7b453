"""Both models on the same random tokens: what a conversion is judged by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.fragments import LogicalTensors
from megatron.config.model import ModelConfig
from megatron.convert.hugging_face.errors import ConvertError
from megatron.convert.hugging_face.model import loaded_model
from megatron.model.head import whole_logits

TOLERANCE = 1e-4
"""Largest difference of two logits, relative to the largest logit (at least 1), that is the rounding of fp32 in models
of any depth; a wrong mapping is off by the size of the logits."""

SEQUENCES, LENGTH, LONGEST = 2, 64, 1024
BEYOND_WINDOW = 16


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far the logits of two models are apart.

    Attributes:
        error: largest difference of two logits.
        scale: largest logit.
        tokens: number of tokens that both models were given.
    """

    error: float
    scale: float
    tokens: int

    @property
    def agrees(self) -> bool:
        """Whether the difference is rounding."""
        return self.error <= TOLERANCE * max(self.scale, 1.0)

    def __str__(self) -> str:
        return f"largest difference {self.error:.2e} of logits up to {self.scale:.3g}, over {self.tokens} random tokens"


def require_transformers() -> None:
    """Check that the library which computes their logits is there.

    Raises:
        ConvertError: it is not.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ConvertError(
            "the logits of both models cannot be compared without transformers: pip install megatron-deepspeed[hf], "
            "or add --no-check"
        ) from error


def gib_of_check(num_parameters: int) -> float:
    """Estimate the memory of a comparison: one model after the other, in fp32."""
    return 4 * num_parameters / 2**30


@torch.no_grad()
def compare_logits(folder: Path, tensors: LogicalTensors, model: ModelConfig, dtype: torch.dtype) -> Comparison:
    """Run their model and ours, one after the other, on a few random sequences.

    Args:
        folder: of theirs.
        tensors: of our checkpoint.
        model: our section.
        dtype: to which our weights are rounded before: that of their files.

    Raises:
        ConvertError: transformers cannot open the folder.
    """
    vocab_size = tensors.shape(first := _embedding(tensors))[0] - tensors.padding(first)
    batches = list(_sequences(model, vocab_size))
    expected = _their_logits(folder, batches)
    ours = loaded_model(model, tensors, dtype)
    error, scale = 0.0, 0.0
    for tokens, theirs in zip(batches, expected, strict=True):
        logits = whole_logits(ours(tokens), ours.groups.tensor, vocab_size).transpose(0, 1)
        if logits.shape != theirs.shape:
            raise ConvertError(f"{folder} has {theirs.shape[-1]} logits, and the checkpoint {logits.shape[-1]}")
        difference = (logits - theirs).abs().max().item()
        error = difference if difference != difference else max(error, difference)
        scale = max(scale, theirs.abs().max().item())
    return Comparison(error=error, scale=scale, tokens=sum(tokens.numel() for tokens in batches))


def _embedding(tensors: LogicalTensors) -> str:
    return next(name for name in tensors.names if name.endswith("word_embeddings.weight") or name == "0.weight")


def _sequences(model: ModelConfig, vocab_size: int) -> Iterator[Tensor]:
    """Draw tokens [b, s]: a few short sequences, and one that is longer than the window, where that is not too long."""
    generator = torch.Generator().manual_seed(0)
    longest = min(model.max_position_embeddings, LONGEST)
    length = min(LENGTH, longest)
    yield torch.randint(vocab_size, (SEQUENCES, length), generator=generator)
    beyond = model.attention_window + BEYOND_WINDOW
    if length < beyond <= longest and model.attention_window:
        yield torch.randint(vocab_size, (1, beyond), generator=generator)


def _their_logits(folder: Path, batches: list[Tensor]) -> list[Tensor]:
    """Compute [b, s, v] of each batch with the library's own model, without code or pickles from the folder."""
    require_transformers()
    from transformers import AutoModelForCausalLM, logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it tells every value of the config
    logging.disable_progress_bar()
    options: dict[str, Any] = {"trust_remote_code": False, "use_safetensors": True, "local_files_only": True}
    try:
        theirs = AutoModelForCausalLM.from_pretrained(
            folder, torch_dtype=torch.float32, attn_implementation="eager", **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConvertError(f"transformers cannot open {folder}: {error}") from error
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
    theirs.eval()
    return [theirs(tokens, use_cache=False).logits for tokens in batches]
