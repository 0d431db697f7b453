"""Models by name, as the flags that make their shape: those of the scripts in examples_deepspeed/, and a few more."""

from __future__ import annotations

import shlex

_LLAMA = (
    "--position-embedding-type rope --normalization rmsnorm --activation-function swiglu --no-add-bias-linear "
    "--untie-embeddings-and-output-weights"
)

SHAPES = {
    "gpt-125m": "--num-layers 12 --hidden-size 768 --num-attention-heads 12",
    "gpt-350m": "--num-layers 24 --hidden-size 1024 --num-attention-heads 16",
    "gpt-1.3b": "--num-layers 24 --hidden-size 2048 --num-attention-heads 16",
    "gpt-2.7b": "--num-layers 32 --hidden-size 2560 --num-attention-heads 32",
    "gpt-6.7b": "--num-layers 32 --hidden-size 4096 --num-attention-heads 32",
    "gpt-13b": "--num-layers 40 --hidden-size 5120 --num-attention-heads 40",
    "gpt-30b": "--num-layers 64 --hidden-size 6144 --num-attention-heads 64",
    "gpt-175b": "--num-layers 96 --hidden-size 12288 --num-attention-heads 96",
    "llama-1.3b": f"--num-layers 24 --hidden-size 2048 --ffn-hidden-size 5504 --num-attention-heads 16 {_LLAMA}",
    "llama-7b": f"--num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32 {_LLAMA}",
    "llama-70b": (
        "--num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64 --num-key-value-heads 8 "
        f"{_LLAMA}"
    ),
}
"""Sequences are of 2,048 tokens unless flags say more; the vocabulary is GPT-2's, padded (50,304)."""


def shape_flags(name: str) -> list[str]:
    """Return the flags of a model.

    Raises:
        KeyError: there is none of that name.
    """
    return shlex.split(SHAPES[name])
