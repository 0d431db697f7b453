"""No damaged file passes unseen, and no file of a stranger runs anything."""

import random
import shutil

import pytest

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.files import digest_of
from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.fragments import open_tensors
from megatron.checkpoint.manifest import read_manifest, write_manifest
from megatron.checkpoint.state_file import read_checkpoint
from megatron.checkpoint.streams import read_streams
from megatron.training.control import Control
from tests.checkpoint import toy
from tests.checkpoint.payloads import payloads

FILES = [
    "step_0000002/tensors_00000_00.safetensors",
    "step_0000002/rng_00000.safetensors",
    "step_0000002/tensors.json",
    "step_0000002/state.json",
    "step_0000002/config.json",
    "step_0000002/manifest.json",
    "latest",
]


def find(root):
    said = []
    return find_checkpoint(root, Control.alone(), said.append), said


def flipped(content, chance):
    changed = bytearray(content)
    changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut(content, chance):
    return content[: chance.randrange(len(content))]


@pytest.mark.parametrize("file", FILES)
def test_flipped_bits_and_cut_files_are_named_every_one(tmp_path, file):
    """143 times in each of the seven kinds of files, a thousand in all: four in five a bit, one in five a cut."""
    toy.save(tmp_path, 1, 2)
    path = tmp_path / file
    content = path.read_bytes()
    chance = random.Random(file)
    for index in range(143):
        path.write_bytes((cut if index % 5 == 4 else flipped)(content, chance))
        found, said = find(tmp_path)
        assert path.name in said[0], said
        assert found.name == ("step_0000002" if file == "latest" else "step_0000001")
    path.write_bytes(content)
    assert find(tmp_path) == (tmp_path / "step_0000002", [])


def load_all(root):
    """Read everything that there is to read, as a run does that takes what it finds."""
    found, _ = find(root)
    read_checkpoint(found)
    tensors = open_tensors(found)
    tensors.check()
    for name in tensors.names:
        for kind in tensors.kinds(name):
            tensors.read(name, kind).sum()
    read_streams(found, 0)


CASES = [(file, False) for file in FILES] + [(file, True) for file in FILES[:5]]
"""Each kind of file, as it is and, where a manifest speaks of it, with one that was made to fit."""


@pytest.mark.parametrize(("file", "sealed"), CASES)
def test_no_payload_is_run_and_each_is_refused_by_the_name_of_its_file(tmp_path, file, sealed):
    root, trap = tmp_path / "run", tmp_path / "ran"
    contents = payloads(trap)
    assert len(contents) == 25
    for name, content in contents.items():
        toy.save(root, 2)
        (root / file).write_bytes(content)
        folder = root / "step_0000002"
        if sealed:
            write_manifest(folder, {**read_manifest(folder), (root / file).name: digest_of(root / file)})
        try:
            load_all(root)
        except CheckpointError as error:
            refusal = str(error)
        else:
            refusal = None
        assert not trap.exists(), name
        if file == "latest":
            assert refusal is None
            assert (root / file).name in find(root)[1][0]
        elif not sealed:
            assert refusal is not None, name
            assert (root / file).name in find_in_words(root), name
        elif refusal is not None:
            assert (root / file).name in refusal, name
        else:  # plain data: a JSON object where any is taken, or tensors that nobody asked for
            assert name == "JSON that names a class", name
        shutil.rmtree(root)


def find_in_words(root):
    said = []
    with pytest.raises(CheckpointError, match="is whole"):
        find_checkpoint(root, Control.alone(), said.append)
    return said[0]


def test_the_payloads_would_work_where_files_are_unpickled(tmp_path):
    """The traps of the test above are traps."""
    import pickle

    trap = tmp_path / "ran"
    pickle.loads(payloads(trap)["pickle of protocol 2"])  # noqa: S301 - to see that it does
    assert trap.exists()
