"""What was imported is what the optimizer of a run holds, under a layout that the older run did not have."""

import json

import torch
import torch.distributed as dist

from megatron.checkpoint.files import write_json
from megatron.checkpoint.fragments import TENSORS, describe_tensors, open_tensors, write_fragments
from megatron.config.run import build_run_config, load_run_config
from megatron.convert.older.importing import ImportOptions, import_checkpoint
from megatron.engine.launch import read_environment
from tests.convert.older.older_writer import KINDS, Layout, make_original, write_megatron_lm
from tests.convert.older.test_importing import LLAMA
from tests.ranks import run_on_ranks


def load_and_save(flags, source, target):
    """Load a checkpoint into a trainer's engine, and write what its optimizer then holds."""
    from megatron.training.build import build_trainer

    sections = vars(load_run_config(flags, world_size=2).config)
    engine = build_trainer(build_run_config(world_size=2, **sections), read_environment()).engine
    engine.load(open_tensors(source), json.loads((source / "state.json").read_text())["engine"])
    records, _ = write_fragments(target, dist.get_rank(), engine.state_fragments())
    return records, engine.state()


def test_a_run_holds_what_was_imported_bit_for_bit(tmp_path):
    original = make_original(LLAMA)
    folder = write_megatron_lm(original, tmp_path / "old", Layout(pipeline=2))
    imported = import_checkpoint(folder, tmp_path / "new", ImportOptions())
    flags = [*imported.flags[: imported.flags.index("--load")], "--mock-data", "--train-iters", "101"]
    flags += ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--zero-stage", "1"]
    held = tmp_path / "held"
    held.mkdir()
    answers = run_on_ranks(
        2, load_and_save, flags, imported.folder, held, initialize=False, deepspeed=True, timeout=300
    )
    write_json(held / TENSORS, describe_tensors(record for records, _ in answers for record in records))
    tensors = open_tensors(held)
    for kind in KINDS:
        for name, expected in original.tensors[kind].items():
            assert torch.equal(tensors.read(name, kind), expected), (kind, name)
    assert answers[0][1]["optimizer"]["step"] == 97
