"""A folder with a model: which safetensors file holds which tensor. Nothing in it is run, and pickles are not read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.checkpoint.files import DTYPES
from megatron.convert.hugging_face.config_file import read_object
from megatron.convert.hugging_face.errors import ConvertError
from megatron.convert.hugging_face.family import Entry, Family

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"
PRECISIONS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
"""Dtypes of weights that are read, and the run's `--precision` that trains such."""

TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


class WeightFiles:
    """The tensors of a folder, mapped into memory a tensor at a time.

    Args:
        folder: with one safetensors file, or several and their index.

    Raises:
        ConvertError: no such files, or one of them is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of = {name: folder / file for name, file in _index(folder).items()}
        self._open: tuple[Path, Any] | None = None

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return sorted(self._file_of)

    def describe(self, name: str) -> tuple[Tensor, str]:
        """Give a tensor's shape, as one on "meta", and the name of its dtype in the file.

        Raises:
            ConvertError: the file is damaged, or the dtype is none of weights.
        """
        with _told(self._file_of[name]):
            view = self._file(name).get_slice(name)
            shape, dtype = view.get_shape(), view.get_dtype()
        if dtype not in PRECISIONS:
            raise ConvertError(
                f"{self._file_of[name]}: {name} is {dtype}, and only weights in {', '.join(PRECISIONS)} can be "
                "converted: give a folder whose weights are not quantised"
            )
        return torch.empty(shape, dtype=TORCH_DTYPES[dtype], device="meta"), dtype

    def read(self, name: str) -> Tensor:
        """Read a tensor; to be read only, since it may lie in the file.

        Raises:
            ConvertError: the file is damaged.
        """
        with _told(self._file_of[name]):
            tensor: Tensor = self._file(name).get_tensor(name)
        return tensor

    def _file(self, name: str) -> Any:
        """Open the file of a tensor, and close the one before: pages of a mapped file count as memory."""
        path = self._file_of[name]
        if self._open is None or self._open[0] != path:
            self._open = (path, safe_open(path, framework="pt"))
        return self._open[1]


class _told:  # noqa: N801 - reads as a word: with _told(path)
    """Turns what the library says of a damaged file into a sentence."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, OSError | SafetensorError):
            raise ConvertError(f"{self._path} cannot be read: {error}; fetch the file again") from error


def _index(folder: Path) -> dict[str, str]:
    """Find the file of each tensor.

    Raises:
        ConvertError: there are none, or the index names files outside of the folder or such as are not there.
    """
    if (folder / INDEX).is_file():
        files = read_object(folder / INDEX).get("weight_map")
        if not isinstance(files, Mapping) or not all(isinstance(file, str) for file in files.values()):
            raise ConvertError(f"{folder / INDEX} has no weight_map: fetch the file again")
        for file in sorted(set(files.values())):
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise ConvertError(f"{folder / INDEX} names {file!r}, which is no safetensors file of the folder")
            if not (folder / file).is_file():
                raise ConvertError(f"{folder / file} does not exist, but the index names it: fetch the file")
        return dict(files)
    if (folder / SINGLE).is_file():
        with _told(folder / SINGLE), safe_open(folder / SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), SINGLE)
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        raise ConvertError(
            f"{folder} holds pickled weights ({pickled[0]}), which can run code when they are opened and are not read: "
            "fetch the model's safetensors files, or write them where you trust the file, with "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other_folder)"
        )
    raise ConvertError(f"{folder} holds neither {SINGLE} nor {INDEX}: give the folder of a model with its weights")


def match_names(family: Family, entries: Iterable[Entry], names: Iterable[str]) -> dict[str, str]:
    """Find their tensors under the names that the files have, which may lack the family's prefix.

    A tied head that a file holds once more is left out; `check_tied_head` looks at it.

    Returns:
        The name in the files of each of their tensors.

    Raises:
        ConvertError: tensors are missing, or there are some that the model does not have.
    """
    present = {name for name in names if not any(re.fullmatch(pattern, name) for pattern in family.ignored)}
    found: dict[str, str] = {}
    missing = []
    for name in (name for entry in entries for name in entry.theirs):
        stored = next((one for one in (name, name.removeprefix(family.prefix)) if one in present), None)
        if stored is None:
            missing.append(name)
        else:
            found[name] = stored
    strange = sorted(present - set(found.values()) - {HEAD})
    for what, some in (("lack", missing), ("hold beside those of the model", strange)):
        if some:
            more = f" and {len(some) - 3} more" if len(some) > 3 else ""
            raise ConvertError(
                f"the weights {what} {', '.join(some[:3])}{more}: the files and the config.json of model_type "
                f"{family.model_type} are not of one model"
            )
    return found


def check_tied_head(weights: WeightFiles, embedding: str) -> None:
    """Check that an output head which the config ties to the embedding, but the files hold too, is the same.

    Raises:
        ConvertError: it is another one.
    """
    if HEAD in weights.names and not torch.equal(weights.read(HEAD), weights.read(embedding)):
        raise ConvertError(
            f"{weights.folder}: tie_word_embeddings is true, but {HEAD} is not the embedding: set it to false in "
            "config.json"
        )


def precision_of(weights: WeightFiles, names: Iterable[str]) -> str:
    """Say in which `--precision` the weights were kept: fp32 where they differ."""
    dtypes = {weights.describe(name)[1] for name in names}
    return PRECISIONS[dtypes.pop()] if len(dtypes) == 1 else "fp32"


def joined(weights: WeightFiles, entry: Entry, names: Mapping[str, str]) -> Tensor:
    """Read the tensors of an entry and make ours of them, in fp32, without padding."""
    return entry.transform.join([weights.read(names[name]) for name in entry.theirs]).float()


def shapes(weights: WeightFiles, entries: Iterable[Entry], names: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Give our tensors on "meta", for their shapes.

    Raises:
        ConvertError: tensors of an entry do not go together.
    """
    for entry in entries:
        theirs = [weights.describe(names[name])[0] for name in entry.theirs]
        try:
            yield entry.ours, entry.transform.join(theirs)
        except (RuntimeError, IndexError) as error:
            found = ", ".join(f"{name} {list(x.shape)}" for name, x in zip(entry.theirs, theirs, strict=True))
            raise ConvertError(
                f"{weights.folder}: the shapes of {found} are not those of config.json ({error})"
            ) from error
