"""Only a whole checkpoint is resumed, all ranks alike; pointers, names and manifests are read as a stranger's."""

import json
import os
import shutil
from datetime import timedelta

import pytest

from megatron.checkpoint import find as find_module
from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.files import Digest, digest_of
from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.fragments import open_tensors
from megatron.checkpoint.manifest import read_manifest, share_of, write_manifest, wrong_bytes
from megatron.checkpoint.names import check_name, folder_of
from megatron.training.control import Control
from tests.checkpoint import toy
from tests.ranks import run_on_ranks


def find(root, tag=None):
    said = []
    return find_checkpoint(root, Control.alone(), said.append, tag), said


def test_folder_without_a_checkpoint_has_none(tmp_path):
    assert find(tmp_path) == (None, [])
    assert find(tmp_path / "missing") == (None, [])


def write(text):
    return lambda pointer: pointer.write_bytes(text)


def replaced_by(make):
    def replace(pointer):
        pointer.unlink()
        make(pointer)

    return replace


POINTERS = {
    "empty": write(b""),
    "blank": write(b"\n"),
    "of a step that is not there": write(b"step_0000009\n"),
    "out of the folder": write(b"../outside/step_0000001\n"),
    "of a neighbour": write(b"../outside"),
    "absolute": write(b"/etc\n"),
    "parent": write(b"..\n"),
    "hidden": write(b".hidden\n"),
    "zeros": write(bytes(13)),
    "not text": write(b"\xff\xfe\x00\x01"),
    "long": write(b"x" * 100_000),
    "two lines": write(b"step_0000001\nstep_0000002\n"),
    "missing": lambda pointer: pointer.unlink(),
    "a folder": replaced_by(lambda pointer: pointer.mkdir()),
    "a pipe": replaced_by(os.mkfifo),
    "a link to another file": replaced_by(lambda pointer: pointer.symlink_to(pointer.parent.parent / "pointer")),
    "a link to itself": replaced_by(lambda pointer: pointer.symlink_to(pointer)),
}


@pytest.mark.parametrize("kind", POINTERS)
def test_malformed_pointer_leads_to_the_newest_and_is_told_of(tmp_path, kind):
    root = tmp_path / "run"
    toy.save(root, 1, 2)
    shutil.copytree(root, tmp_path / "outside")
    (tmp_path / "pointer").write_text("step_0000001\n")
    POINTERS[kind](root / "latest")
    path, said = find(root)
    assert path == root / "step_0000002"
    assert len(said) == 1
    assert str(root / "latest") in said[0]


def test_pointer_may_be_set_back_by_hand_and_that_is_told(tmp_path):
    toy.save(tmp_path, 1, 2)
    (tmp_path / "latest").write_text("step_0000001\n")
    path, said = find(tmp_path)
    assert path == tmp_path / "step_0000001"
    assert said == [f"{tmp_path}/latest names step_0000001, though step_0000002 is there: taking step_0000001"]


def test_pointer_alone_is_no_fresh_start(tmp_path):
    toy.save(tmp_path, 1)
    shutil.rmtree(tmp_path / "step_0000001")
    with pytest.raises(CheckpointError, match="latest and no checkpoint"):
        find(tmp_path)


ESCAPES = [
    "..",
    ".",
    "",
    "../outside",
    "../outside/step_0000001",
    "step_0000001/../../outside/step_0000001",
    "/etc",
    "/",
    "./step_0000001",
    "a/b",
    "a\\b",
    "~",
    "~root",
    "step\0",
    "step_0000001\n",
    "x" * 129,
    "x" * 4096,
    ".hidden",
    "\uff0e\uff0e",  # full-width dots
    "\u2024\u2024",  # one dot leaders
    "step_\u0661",  # a digit of another script
    "$HOME",
    "*",
]


@pytest.mark.parametrize("name", ESCAPES, ids=range(len(ESCAPES)))
def test_name_that_may_lead_elsewhere_is_refused_everywhere(tmp_path, name):
    root = tmp_path / "run"
    toy.save(root, 1)
    shutil.copytree(root, tmp_path / "outside")
    with pytest.raises(CheckpointError, match="is no name of a checkpoint"):
        find(root, tag=name)
    with pytest.raises(CheckpointError, match="names the file"):
        check_name(name, "manifest.json")
    folder = root / "step_0000001"
    files = read_manifest(folder)
    write_manifest(folder, {**files, name: files["state.json"]})
    with pytest.raises(CheckpointError, match=r"manifest\.json names the file"):
        read_manifest(folder)
    tensors = json.loads((folder / "tensors.json").read_text())
    tensors["tensors"]["w"]["kinds"]["weight"]["fragments"][0][3] = name
    (folder / "tensors.json").write_text(json.dumps(tensors))
    with pytest.raises(CheckpointError, match="instead of the name of a file of its own folder"):
        open_tensors(folder)


def test_link_out_of_the_folder_is_refused_and_one_within_is_not(tmp_path):
    root = tmp_path / "run"
    toy.save(root, 1)
    shutil.copytree(root, tmp_path / "outside")
    (root / "step_0000002").symlink_to(tmp_path / "outside" / "step_0000001")
    (root / "best").symlink_to("step_0000001")
    with pytest.raises(CheckpointError, match="a link that leads out of"):
        folder_of(root, "step_0000002")
    assert folder_of(root, "best") == root / "best"
    assert find(root, "best") == (root / "best", [])
    (root / "latest").write_text("step_0000002\n")
    path, said = find(root)
    assert path == root / "step_0000001"
    assert "leads out of" in said[0]


def test_file_that_is_a_link_or_a_pipe_is_no_file_of_a_checkpoint(tmp_path):
    for make in (lambda path: path.symlink_to(tmp_path / "copy"), os.mkfifo):
        toy.save(tmp_path, 1, 2)
        path = tmp_path / "step_0000002" / "config.json"
        shutil.move(path, tmp_path / "copy")
        make(path)
        found, said = find(tmp_path)
        assert found == tmp_path / "step_0000001"
        assert "config.json has no bytes" in said[0]


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = ["tensors_00000_00.safetensors", "rng_00000.safetensors", "tensors.json", "state.json", "config.json"]


@pytest.mark.parametrize("damage", [cut, flip, os.unlink])
@pytest.mark.parametrize("file", [*FILES, "manifest.json"])
def test_damaged_file_falls_back_to_the_checkpoint_before_by_name(tmp_path, file, damage):
    toy.save(tmp_path, 1, 2)
    damage(tmp_path / "step_0000002" / file)
    path, said = find(tmp_path)
    assert path == tmp_path / "step_0000001"
    assert len(said) == 2
    assert "step_0000002 is not resumed" in said[0]
    assert file in said[0]
    assert said[1] == f"the newest whole checkpoint of {tmp_path} is step_0000001: that one is resumed"


VERSION = "has version {}, and this program reads version 2: load it with the program that wrote it"
MANIFESTS = {
    "": "cannot be read",
    "[]": "holds no JSON object",
    "{}": VERSION.format("none"),
    '{"version": 1, "files": {}}': VERSION.format("1"),
    '{"version": 3, "files": {}}': VERSION.format("3"),
    '{"version": true, "files": {}}': VERSION.format("True"),
    '{"version": 2}': "files is missing, and must be an object",
    '{"version": 2, "files": 3, "sha256": ""}': "files is 3 instead of an object",
    '{"version": 2, "files": {"state.json": 5}, "sha256": ""}': "files.state.json is 5 instead of an object",
    '{"version": 2, "files": {"state.json": {"bytes": -1, "sha256": ""}}, "sha256": ""}': "bytes is -1 instead",
    '{"version": 2, "files": {}, "sha256": ""}': "does not have its own SHA-256",
    "[" * 100_000: "cannot be read",
    '{"version": ' + "9" * 10_000 + "}": "cannot be read",
}


@pytest.mark.parametrize("content", MANIFESTS, ids=range(len(MANIFESTS)))
def test_manifest_that_is_none_is_told_of_in_a_sentence(tmp_path, content):
    toy.save(tmp_path, 1, 2)
    (tmp_path / "step_0000002" / "manifest.json").write_text(content)
    path, said = find(tmp_path)
    assert path == tmp_path / "step_0000001"
    assert MANIFESTS[content] in said[0]
    assert str(tmp_path / "step_0000002" / "manifest.json") in said[0]


def test_no_whole_checkpoint_is_an_error(tmp_path):
    toy.save(tmp_path, 1)
    cut(tmp_path / "step_0000001" / FILES[0])
    with pytest.raises(CheckpointError, match=r"no checkpoint .* is whole"):
        find(tmp_path)


def test_named_checkpoint_is_taken_and_none_takes_its_place(tmp_path):
    toy.save(tmp_path, 1, 2, 3)
    assert find(tmp_path, "step_0000002") == (tmp_path / "step_0000002", [])
    with pytest.raises(CheckpointError, match="has no checkpoint step_0000004"):
        find(tmp_path, "step_0000004")
    cut(tmp_path / "step_0000002" / FILES[0])
    with pytest.raises(CheckpointError, match=r"step_0000002 is not resumed: .* give another --load-tag"):
        find(tmp_path, "step_0000002")


def test_hashing_is_divided_by_bytes():
    sizes = [9, 5, 4, 1, 0, 7, 7, 3]
    files = {f"file_{index}": Digest(bytes=size, sha256="") for index, size in enumerate(sizes)}
    shares = [share_of(files, rank, 3) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(files)
    assert [sum(files[name].bytes for name in share) for share in shares] == [12, 12, 12]


def read_by_ranks(root):
    """What each rank reads to verify; the first file that another one reads is damaged before the second look."""
    control = Control.of_world(timedelta(seconds=30))
    toy.save(root, 1, 2, ranks=control)
    files = read_manifest(root / "step_0000002")
    if control.rank == 1:
        flip(root / "step_0000002" / share_of(files, 1, control.size)[0])
    control.barrier()
    said = []
    found = find_checkpoint(root, control, said.append)
    return found.name, len(said), share_of(files, control.rank, control.size)


def test_ranks_share_the_work_and_the_verdict(tmp_path):
    results = run_on_ranks(3, read_by_ranks, tmp_path)
    assert [result[:2] for result in results] == [("step_0000001", 2), ("step_0000001", 0), ("step_0000001", 0)]
    read = [name for *_, share in results for name in share]
    assert sorted(read) == sorted(read_manifest(tmp_path / "step_0000001"))
    assert all(share for *_, share in results)


def find_where_one_rank_is_blind(root):
    """One rank has a disk of its own, on which files are missing."""
    control = Control.of_world(timedelta(seconds=30))
    toy.save(root, 1, ranks=control)
    if control.rank == 1:
        find_module.wrong_bytes = lambda path, files, names: wrong_bytes(path / "elsewhere", files, names)
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(root, control, print)
    return str(caught.value)


def test_a_rank_that_does_not_see_the_files_stops_all(tmp_path):
    first, second = run_on_ranks(2, find_where_one_rank_is_blind, tmp_path / "run")
    assert first == second
    assert "is whole" in first


def test_digest_of_the_manifest_is_over_every_byte(tmp_path):
    toy.save(tmp_path, 1)
    path = tmp_path / "step_0000001" / "manifest.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 2):
        changed = bytearray(whole)
        changed[place] ^= 1 << place // 2 % 8
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            read_manifest(path.parent)
    path.write_bytes(whole)
    assert read_manifest(path.parent)["state.json"] == digest_of(path.parent / "state.json")
