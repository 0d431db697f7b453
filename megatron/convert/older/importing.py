"""From a folder of an older system to a checkpoint of this one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.whole import write_checkpoint
from megatron.config.flags import flags_of, spell
from megatron.config.model import ModelConfig
from megatron.config.run import load_run_config
from megatron.convert.older import arguments as older_arguments
from megatron.convert.older.engine_files import is_engine_folder, is_staged, read_engine_files
from megatron.convert.older.names import WORDS_AGAIN, name_of
from megatron.convert.older.parts import MASTER, MOMENTS, WEIGHT, Joiner, OlderCheckpoint, Replicas
from megatron.convert.older.rank_files import is_rank_folder, read_rank_files
from megatron.kernels.attention.unfused import BACKEND
from megatron.model.gpt import GPT
from megatron.parallel.groups import ParallelGroups
from megatron.parallel.sharding import Sharding, describe_sharding

TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

OPTIMIZER = ("lr", "min_lr", "weight_decay", "clip_grad", "adam_beta1", "adam_beta2", "adam_eps")
"""Arguments that are fields of the optimizer's section by the same name."""


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What may be chosen about an import.

    Attributes:
        vocab_size: ids in use, where the older system recorded the padded number alone.
        weights_only: leave the optimizer's state.
        replicas: what to take where tensor ranks differ about what they should share.
        admitted: further classes that its pickles may name, to be read as inert records.
        accept_rotary: import a model that rotated by cosines, see `rotates_by_cosines`.
    """

    vocab_size: int | None = None
    weights_only: bool = False
    replicas: Replicas = "equal"
    admitted: tuple[str, ...] = ()
    accept_rotary: bool = False


@dataclass(frozen=True)
class Imported:
    """What an import came to.

    Attributes:
        folder: the checkpoint that was written.
        iteration: of it.
        consumed_samples: of the training so far.
        with_optimizer: whether the optimizer's state came along.
        flags: of `pretrain_gpt.py`, for a run that goes on from it.
        notes: sentences for the user.
    """

    folder: Path
    iteration: int
    consumed_samples: int
    with_optimizer: bool
    flags: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def command(self) -> str:
        """The flags as a command line."""
        return shlex.join(["python", "pretrain_gpt.py", *self.flags])


def import_checkpoint(folder: Path, save: Path, options: ImportOptions) -> Imported:
    """Read a checkpoint of Megatron-LM or Megatron-DeepSpeed and write one that any layout can load.

    Tensors are joined and written one after the other: memory holds about a file of them.

    Args:
        folder: of the checkpoint, or one that points to it by `latest` or `latest_checkpointed_iteration.txt`.
        save: the folder for `--load`.
        options: what was chosen.

    Raises:
        ConfigError: the model is not one of this program; a sentence for each reason.
        CheckpointError: a file is missing, damaged, or not of a known form.
    """
    source = find_checkpoint(folder)
    found = read_checkpoint(source, options)
    model = older_arguments.model_config(found.arguments, found.file)
    if older_arguments.rotates_by_cosines(found.arguments, is_staged(source)) and not options.accept_rotary:
        raise CheckpointError(
            f"{found.file}: the model was trained with rotary positions by a version of Megatron-DeepSpeed that took "
            "the cosine and sine of cosines for its rotation, which nothing here does: train it anew, or say "
            "--accept-rotary if its version was mended"
        )
    vocab_size = older_arguments.vocabulary_size(found.arguments, found.file, options.vocab_size)
    found.notes += older_arguments.notes_on(found.arguments, is_staged(source))
    joiner = Joiner(model, vocab_size, found.version, found.tensor_size, options.replicas)
    tensors = _Tensors(found, joiner, _shardings(model, vocab_size))
    samples = int(found.arguments.get("consumed_train_samples") or 0)
    flags = _flags(model, vocab_size, found.arguments)
    counters = {"consumed_samples": samples, "consumed_tokens": samples * int(found.arguments.get("seq_length") or 0)}
    try:
        written = write_checkpoint(
            save,
            tensors.weights(),
            config=_config(flags),
            iteration=found.iteration,
            paddings={name: sharding.padding for name, sharding in tensors.shardings.items() if sharding.padding},
            states=tensors.states(),
            counters=counters,
            engine=_engine(found) if tensors.kinds else {},
        )
    except OSError as error:
        raise CheckpointError(f"--save {save}: the checkpoint cannot be written there ({error})") from error
    return Imported(
        folder=written,
        iteration=found.iteration,
        consumed_samples=samples,
        with_optimizer=bool(tensors.kinds),
        flags=(*flags, "--load", str(save), *([] if tensors.kinds else ["--no-load-optim"])),
        notes=tuple(found.notes),
    )


def find_checkpoint(folder: Path) -> Path:
    """Return the folder that holds the files: this one, or the one that it points to.

    Raises:
        CheckpointError: it is none, points to none, or is of a form that is not read.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: give that of a checkpoint of Megatron-LM or Megatron-DeepSpeed")
    if is_rank_folder(folder) or is_engine_folder(folder):
        return folder
    if any(folder.glob("*.distcp")) or (folder / ".metadata").exists():
        raise CheckpointError(
            f"{folder} is of the form torch_dist, which holds code to run: save it with Megatron-LM's --ckpt-format "
            "torch (or --ckpt-convert-format torch) and import that"
        )
    if (folder / "zero").is_dir():
        raise CheckpointError(f"{folder} is a universal checkpoint of DeepSpeed: import the one that it was made from")
    for pointer in ("latest", "latest_checkpointed_iteration.txt"):
        if (folder / pointer).is_file():
            return find_checkpoint(_pointed_to(folder, pointer))
    raise CheckpointError(
        f"{folder} has neither mp_rank_00/model_optim_rng.pt (Megatron-LM) nor mp_rank_00_model_states.pt "
        "(Megatron-DeepSpeed), nor a file that points to such: give the folder of one iteration"
    )


def _pointed_to(folder: Path, pointer: str) -> Path:
    tag = (folder / pointer).read_text(encoding="utf-8", errors="replace").strip()
    name = f"iter_{int(tag):07d}" if pointer != "latest" and tag.isascii() and tag.isdigit() else tag
    target = folder / name
    if not TAG.fullmatch(name) or not target.is_dir() or (target / pointer).exists():
        raise CheckpointError(f"{folder / pointer} says {tag[:128]!r}, which is no folder beside it: give the folder")
    return target


def read_checkpoint(folder: Path, options: ImportOptions) -> OlderCheckpoint:
    """Read the files of one iteration; fp32 copies of the optimizer take the weights' place.

    Raises:
        CheckpointError: a file is missing, damaged, or not of a known form.
    """
    read = read_rank_files if is_rank_folder(folder) else read_engine_files
    found = read(folder, options.admitted, optimizer=not options.weights_only)
    for kinds in found.parts.values():
        if MASTER in kinds:
            kinds[WEIGHT] = kinds.pop(MASTER)
    if options.weights_only:
        found.drop(MOMENTS)
    return found


class _Tensors:
    """The logical tensors of a checkpoint that was found, each made when it is asked for."""

    def __init__(self, found: OlderCheckpoint, joiner: Joiner, shardings: Mapping[str, Sharding]) -> None:
        self.shardings = shardings
        self._found = found
        self._joiner = joiner
        self._places = self._places_by_name()
        held = [kind for kind in MOMENTS if any(kind in kinds for kinds in found.parts.values())]
        self.kinds = tuple(held)
        """Of the optimizer's state."""
        for kind in (WEIGHT, *held):
            missing = [name for name, place in self._places.items() if kind not in found.parts[place]]
            if missing:
                raise CheckpointError(
                    f"{found.file.parent} lacks {kind} of {missing[0]} and {len(missing) - 1} more: "
                    "import the weights alone, with --weights-only, if these are there"
                )

    def _places_by_name(self) -> dict[str, str]:
        config = self._joiner.config
        tied = not config.untie_embeddings_and_output_weights
        places = {name: place for place in self._found.parts if (name := name_of(place, config.num_layers, tied=tied))}
        if missing := [name for name in self.shardings if name not in places]:
            raise CheckpointError(
                f"{self._found.file.parent} has no tensor for {missing[0]} and {len(missing) - 1} more of the model "
                "that its arguments describe: files are missing, or they are of another model"
            )
        if extra := [name for name in places if name not in self.shardings]:
            part = self._found.parts[places[extra[0]]][WEIGHT][0]
            raise CheckpointError(
                f"{part.file} holds {part.key} of shape {part.shape}, which the model of its arguments does not have"
            )
        return {name: places[name] for name in self.shardings}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Give each weight, fp32, by name."""
        for name in self.shardings:
            yield name, self._join(name, WEIGHT)
        self._compare_copies()

    def states(self) -> Iterator[tuple[str, str, Tensor]]:
        """Give name, kind and tensor of the optimizer's state."""
        for kind in self.kinds:
            for name in self.shardings:
                yield name, kind, self._join(name, kind)

    def _join(self, name: str, kind: str) -> Tensor:
        place = self._places[name]
        return self._joiner.join(place, self._found.parts[place][kind], self.shardings[name])

    def _compare_copies(self) -> None:
        """Note it where the stages of a pipeline hold different copies of a tied embedding."""
        tied = not self._joiner.config.untie_embeddings_and_output_weights
        for place in (WORDS_AGAIN, "head"):
            copies = self._found.parts.get(place, {}).get(WEIGHT)
            if not tied or copies is None:
                continue
            first = self._found.parts["words"][WEIGHT]
            if any(not torch.equal(one.read(), other.read()) for one, other in zip(first, copies, strict=True)):
                self._found.notes.append(
                    "Its first and last pipeline stage hold different copies of the tied embedding: the first's is "
                    "imported; compare the loss before you go on."
                )


def _shardings(model: ModelConfig, vocab_size: int) -> dict[str, Sharding]:
    """Make the model without memory, and read the logical shape of each parameter off it."""
    with torch.device("meta"):
        gpt = GPT(model, vocab_size=vocab_size, groups=ParallelGroups.alone(), attention=BACKEND)
    return describe_sharding(gpt)


def _engine(found: OlderCheckpoint) -> dict[str, Any]:
    steps = found.iteration if found.optimizer_steps is None else found.optimizer_steps
    return {"optimizer": {"type": "adam", "step": steps}, "loss_scaler": None}


def _config(flags: Sequence[str]) -> dict[str, Any]:
    """Give the sections of `config.json`: those of a run that is started with these flags."""
    return load_run_config(flags).config.to_json()


def _precision(arguments: Mapping[str, Any]) -> str:
    return next((name for name in ("bf16", "fp16") if arguments.get(name)), "fp32")


def _flags(model: ModelConfig, vocab_size: int, arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Spell the flags of a run that goes on: those of the model that differ from the defaults, and those known."""
    defaults = ModelConfig(
        num_layers=model.num_layers, hidden_size=model.hidden_size, num_attention_heads=model.num_attention_heads
    )
    words: list[str] = []
    implied = {"rotary_attention_factor", *(["rotary_original_max_positions"] if not _is_stretched(model) else [])}
    for flag in flags_of("model", ModelConfig):
        if flag.name in implied:
            continue
        value = getattr(model, flag.name)
        if isinstance(value, bool):
            if value != getattr(defaults, flag.name):
                words.append(flag.spelling if value else str(flag.negation))
        elif flag.required or value != getattr(defaults, flag.name):
            words += [flag.spelling, str(value)]
    known = {name: arguments.get(name) for name in ("seq_length", "global_batch_size", *OPTIMIZER)}
    for name, value in known.items():
        if isinstance(value, int | float):
            words += [spell(name), str(value)]
    return (*words, "--vocab-size", str(vocab_size), "--precision", _precision(arguments))


def _is_stretched(model: ModelConfig) -> bool:
    return model.rotary_scaling_type == "llama3"
