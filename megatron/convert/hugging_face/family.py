"""What a family of Hugging Face models is: names and changes of its tensors, and its config.json both ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from megatron.config.model import ModelConfig
from megatron.convert.hugging_face.config_file import TheirConfig
from megatron.convert.hugging_face.transforms import Same, Transform

SAME = Same()


@dataclass(frozen=True)
class Entry:
    """One logical tensor and the tensors of theirs that hold it. Rows that pad our vocabulary are not among them."""

    ours: str
    theirs: tuple[str, ...]
    transform: Transform = SAME


class Family(Protocol):
    """A `model_type`.

    Attributes:
        model_type: what their config.json calls it.
        architecture: their class that predicts tokens.
        prefix: what the names of their tensors start with, but for the output head; some files leave it out.
        ignored: regular expressions of tensors that are no weights, such as masks that older files hold.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    prefix: ClassVar[str]
    ignored: ClassVar[tuple[str, ...]]

    def read_config(self, config: TheirConfig) -> ModelConfig:
        """Make the model's section of their config.

        Raises:
            ConvertError: the config asks for something that this model does not have.
        """

    def write_config(self, model: ModelConfig) -> dict[str, Any]:
        """Make their config of the model's section, but for vocabulary, special tokens and dtype.

        Raises:
            ConvertError: the model has something that the family does not have.
        """

    def entries(self, model: ModelConfig) -> Iterator[Entry]:
        """Give every logical tensor once, in the order of the stages."""


EMBEDDING = "0.weight"
TIED_EMBEDDING = "tied_modules.word_embeddings.weight"


def embedding_name(model: ModelConfig) -> str:
    """Name of the logical word embedding."""
    return EMBEDDING if model.untie_embeddings_and_output_weights else TIED_EMBEDDING


ANY_WINDOW = range(2**31)
"""Values of a field that a family has whatever they are."""


def refusals(model: ModelConfig, required: Mapping[str, Any]) -> list[str]:
    """Say which fields of a model are not as a family has them; a frozenset or range holds the values it has."""
    sentences = []
    for name, legal in required.items():
        value = getattr(model, name)
        legal = legal if isinstance(legal, frozenset | range) else frozenset([legal])
        if value not in legal:
            wanted = " or ".join(sorted(map(str, legal)))
            sentences.append(f"--{name.replace('_', '-')} is {value}, not {wanted}")
    return sentences
