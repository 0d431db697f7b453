"""What is wrong with a checkpoint, in a sentence for the user."""

from megatron.config.errors import UserError


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be read or written, or is not of this run's model."""
