"""The families, by `model_type`."""

from __future__ import annotations

from megatron.config.model import ModelConfig
from megatron.convert.hugging_face.errors import ConvertError
from megatron.convert.hugging_face.family import Family
from megatron.convert.hugging_face.gemma import Gemma
from megatron.convert.hugging_face.gpt2 import GPT2
from megatron.convert.hugging_face.llama import Llama
from megatron.convert.hugging_face.mistral import Mistral
from megatron.convert.hugging_face.qwen2 import Qwen2
from megatron.convert.hugging_face.qwen3 import Qwen3

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (Llama(), Mistral(), Qwen2(), Qwen3(), Gemma(), GPT2())
}
"""In this order an export without `--model-type` takes the first one that has all that the model has."""


def family_of(model_type: str, source: str) -> Family:
    """Return a family.

    Args:
        model_type: its name.
        source: who names it, for the sentence.

    Raises:
        ConvertError: there is none of that name.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConvertError(f"{source}: model_type {model_type!r} cannot be converted, only {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def family_for(model: ModelConfig) -> Family:
    """Return the first family that has all that a model has.

    Raises:
        ConvertError: none has; says of each what it lacks.
    """
    reasons = []
    for family in FAMILIES.values():
        try:
            family.write_config(model)
        except ConvertError as error:
            reasons.append(str(error))
        else:
            return family
    raise ConvertError("no family of Hugging Face has what this model has: " + ". ".join(reasons))
