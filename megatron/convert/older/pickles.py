"""Files of `torch.save`, read without running any code of theirs.

Such a file is a pickle, and a pickle names functions to be called. PyTorch's restricted reader knows tensors and plain
containers and refuses every other name. The older systems also pickled their arguments, random states and a few
enumerations: for each of those names, listed here, a record stands in that keeps what was pickled and does nothing. So
not even the listed classes are imported, and admitting one more can run no code either.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.errors import CheckpointError

KNOWN_CLASSES = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "signal.Signals",
    "_io.BytesIO",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.dtypes.UInt32DType",
    "megatron.core.enums.ModelType",
    "megatron.core.optimizer.OptimizerConfig",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.model.enums.ModelType",
    "megatron.enums.PositionEmbeddingType",
    "megatron.fp16.loss_scaler.DynamicLossScaler",
    "megatron.fp16.loss_scaler.LossScaler",
    "megatron.fp16_deprecated.loss_scaler.DynamicLossScaler",
    "megatron.fp16_deprecated.loss_scaler.LossScaler",
    "fp16.loss_scaler.DynamicLossScaler",
    "fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""What the older systems wrote beside tensors and plain containers."""
MEMBER = "builtins.getattr"
"""How early releases of Python 3.11 pickle a member of an enumeration: by its class and name. Like those classes it is
not called: what stands in for it keeps both."""


class Recorded:
    """Stands in for an object of a class that is not imported: what its pickle said of it.

    Attributes:
        pickled_as: the dotted name of its class.
        arguments: what the class was to be called with.
        state: what was to be put into the object.
    """

    pickled_as = ""
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> Recorded:
        """Keep the arguments."""
        record = super().__new__(cls)
        record.arguments = arguments
        record.state = None
        return record

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        """Keep the state."""
        self.state = state

    def __repr__(self) -> str:
        given = ", ".join(map(repr, self.arguments))
        return f"{self.pickled_as.rpartition('.')[2]}({given})"


def read_pickled(path: Path, admitted: Iterable[str] = ()) -> dict[str, Any]:
    """Read a file of `torch.save` that holds a dictionary; tensors stay in the file until they are used.

    Args:
        path: the file.
        admitted: further classes, by their dotted names, whose objects are to be read as records.

    Raises:
        CheckpointError: the file is missing, damaged or holds something else, or names a class that is not listed.
    """
    names = (*KNOWN_CLASSES, MEMBER, *admitted)
    stand_ins: list[Any] = [(type(name, (Recorded,), {"pickled_as": name}), name) for name in names]
    try:
        with torch.serialization.safe_globals(stand_ins):
            # Only the newer of torch's two formats, a zip archive, can be mapped into memory.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, str(error))) from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: the checkpoint is not complete, copy all of its files") from error
    except Exception as error:  # a damaged file raises whatever the first bytes out of place lead to
        raise CheckpointError(
            f"{path} cannot be read ({_first_line(error)}): it is cut off or damaged, copy it again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__} instead of a dictionary: it is no checkpoint")
    return content


def plain(value: Any) -> dict[str, Any]:
    """Return the fields of a namespace that was pickled, as a dictionary; a dictionary comes back as it is."""
    if isinstance(value, Recorded):
        value = value.state
    return dict(value) if isinstance(value, dict) else {}


def _refusal(path: Path, message: str) -> str:
    """Say which name was refused, and what to do; PyTorch's own message advises to trust it."""
    named = re.search(r"GLOBAL (\S+)", message) or re.search(r"unrecognized function (.+)", message)
    if named is None:
        return f"{path} cannot be read ({_first_line(message)}): it is damaged, or no file of torch.save"
    if "is blocked" in message:
        return f"{path} names {named.group(1)}, of a module that runs programs; nothing of it was run: do not use it"
    return (
        f"{path} names {named.group(1)}, which is not among the classes that checkpoints of the older systems hold; "
        f"nothing of it was run. If you know it to be harmless data, read its objects as inert records with "
        f"--admit-class {named.group(1)}; if you do not, do not use this file"
    )


def _first_line(error: object) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0][:200]
