"""What keeps a model from being converted, in a sentence for the user."""

from megatron.config.errors import UserError


class ConvertError(UserError, RuntimeError):
    """A model cannot be converted, or its conversion is not right."""
