"""A checkpoint whose digests fit and whose JSON says nonsense: one sentence with file and entry, whoever reads it.

Every entry of every JSON file is left out, and set to values of other kinds, the manifest made to fit; then everything
is read that a run reads which resumes, verifies and takes the checkpoint's schedule.
"""

import json
import math
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.fragments import open_tensors
from megatron.checkpoint.manifest import read_manifest
from megatron.checkpoint.state_file import read_run_config
from megatron.checkpoint.streams import write_streams
from megatron.config.run import load_run_config
from megatron.data.blend import BlendedDataset
from megatron.data.gpt_dataset import GPTDataset
from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron.engine.flat import SCALER_STATE, _saved_step, _take_over_state
from megatron.parallel.groups import ParallelGroups
from megatron.parallel.random import RandomStreams
from megatron.training import resume
from megatron.training.proof import describe_run
from megatron.training.resume import _continue_streams, _streams_of, continue_schedule, find_resume
from megatron.training.sample_order import open_in_order
from megatron.training.schedule import Schedule, build_learning_rate, build_weight_decay
from megatron.training.state import TrainState
from megatron.training.verify import verify_samples
from tests.checkpoint import toy
from tests.config.command_lines import legal

LEFT_OUT = object()
VALUES = [LEFT_OUT, None, True, -1, 1.5, math.nan, 10**400, "x", [1], {}]
LAYOUT = dict.fromkeys(
    (
        "data_parallel_size",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "ds_sequence_parallel_size",
    ),
    1,
)
SAID = {
    "model": (
        *("num_layers", "hidden_size", "num_attention_heads", "normalization", "qk_layernorm", "rotary_percent"),
        *("kv_channels", "hidden_dropout", "attention_dropout"),
    ),
    "training": ("precision", "train_iters", "global_batch_size"),
    "optimizer": ("lr", "optimizer"),
    "data": ("data_path", "seq_length"),
}
"""Some fields of each kind; one that a checkpoint lacks has its default."""
TOKENIZER = {"name": "NullTokenizer", "fingerprint": "00ff" * 16}


class Run:
    """A run that saved, and the readers of one that resumes it."""

    def __init__(self, folder):
        words = "--lr-decay-style cosine --lr-warmup-iters 2 --use-checkpoint-opt-param-scheduler --precision fp16"
        self.config = load_run_config(legal(*words.split(), "--load", str(folder / "run"))).config
        sections = json.loads(json.dumps(self.config.to_json()))
        self.sections = {name: {key: sections[name][key] for key in keys} for name, keys in SAID.items()}
        self.schedule = Schedule(
            learning_rate=build_learning_rate(self.config.optimizer, self.config.training),
            weight_decay=build_weight_decay(self.config.optimizer, self.config.training),
        )
        with IndexedDatasetWriter(folder / "text", np.uint16) as file:
            for _ in range(20):
                file.add_document(np.arange(9, dtype=np.uint16))
        self.text = IndexedDataset(folder / "text")
        _, order = open_in_order(self.open_sets, 40, None, TOKENIZER, nothing)
        self.about = describe_run(self.sections, LAYOUT, self.schedule, order, {"torch": "2.13", "device": "cpu"})
        self.place = SimpleNamespace(
            control=toy.Control.alone(),
            layout=LAYOUT,
            groups=ParallelGroups.alone(),
            streams=RandomStreams(torch.device("cpu")),
        )
        scaler = dict(zip(SCALER_STATE, (64.0, 5, -1, 2), strict=True))
        self.state = {
            "counters": TrainState(iteration=5, consumed_samples=5).to_json(),
            "layout": LAYOUT,
            "engine": {"optimizer": {"type": "adam", "step": 5, "kinds": ["exp_avg"]}, "loss_scaler": scaler},
            "training": {
                "run": self.about,
                "vocab_size": 100,
                "next_samples": {"samples": 1, "loss_sum": "0x1p0", "tokens": 32},
            },
        }
        self.root = folder / "run"
        self.path = self.root / "step_0000005"

    def save(self):
        store = toy.CheckpointStore(self.root, config=self.sections, ranks=toy.Control.alone())
        streams = self.place.streams.state_dict()
        store.save(toy.Snapshot(iteration=5, fragments=toy.fragments(5), state=self.state, streams=streams))

    @cache  # noqa: B019 - one run is made
    def open_sets(self, num_samples):
        order = {"seq_length": 8, "num_samples": num_samples, "seed": 1}
        files = [GPTDataset(self.text, documents, **order) for documents in (range(10), range(10, 20))]
        return SimpleNamespace(train=BlendedDataset(files, (0.5, 0.5), num_samples=num_samples))

    def read(self):
        """Read all that there is to read."""
        read_run_config(self.path)
        tokenizer = SimpleNamespace(vocab_size=100)
        found = find_resume(self.config.checkpoint, self.sections, self.place, tokenizer, trains=True, say=nothing)
        continue_schedule(self.schedule, found, self.config.checkpoint, nothing).at(found.state)
        open_in_order(self.open_sets, 40, found.continued(override=True), TOKENIZER, nothing)
        samples = SimpleNamespace(measure=lambda number: {"loss_sum": "0x1p0", "tokens": 32})
        verify_samples(found.training, SimpleNamespace(run=self.about, samples=samples), nothing)
        tensors = open_tensors(self.path)
        tensors.check()
        for name in tensors.names:
            for kind in tensors.kinds(name):
                tensors.read(name, kind)
        engine = found.saved["engine"]
        step = _saved_step(engine, torch.optim.Adam([torch.ones(1)]), tensors)
        torch.tensor(float(step or 0))
        scaler = SimpleNamespace()
        _take_over_state(scaler, engine.get("loss_scaler"))
        assert all(math.isfinite(value) for value in vars(scaler).values())
        streams = _streams_of(found, self.place)
        if not isinstance(streams, str):
            _continue_streams(found, self.place, streams)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = Run(tmp_path_factory.mktemp("forged"))
    made.save()
    made.read()
    return made


def places(value, place=()):
    """Where every entry of a JSON value is."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield (*place, key)
            yield from places(value[key], (*place, key))


def changed(content, place, value):
    *groups, last = place
    inner = content
    for key in groups:
        inner = inner[key]
    if value is LEFT_OUT:
        del inner[last]
    else:
        inner[last] = value
    return content


COMPARED = (
    "is of another model",
    "was saved with --optimizer",
    "holds weights and no optimizer state",
    "was saved without the optimizer's state",
    "does not tell its schedule",
    "cannot be read for w",
)
"""Of refusals of what may be said, and is not of this run."""


def nothing(text):
    """Say it to nobody."""


@pytest.mark.parametrize("file", ["state.json", "config.json", "tensors.json", "manifest.json"])
def test_no_value_of_any_entry_is_more_than_a_sentence(run, file, monkeypatch):
    path, read = run.path / file, run.read
    if file == "manifest.json":
        read = partial(read_manifest, run.path)
    else:  # the digests are as if they had been forged as well
        monkeypatch.setattr(resume, "find_checkpoint", lambda *arguments: run.path)
    content = path.read_text()
    refused, problems = 0, []
    for place in places(json.loads(content)):
        for value in VALUES:
            path.write_text(json.dumps(changed(json.loads(content), place, value)))
            try:
                read()
            except CheckpointError as error:
                refused += 1
                told = str(error)
                compared = str(run.path) in told and any(words in told for words in COMPARED)
                if "\n" in told or not (str(path) in told or compared or "--verify-resume" in told):
                    problems.append((place, value, told))
            except Exception as error:
                problems.append((place, value, repr(error)))
    path.write_text(content)
    assert problems == []
    assert refused > 100


FRAGMENTS = ("tensors", "w", "kinds", "weight", "fragments")
RATE = ("training", "run", "schedule", "learning_rate")
SENTENCES = [
    ("state.json", ("counters", "iteration"), "5", 'counters.iteration is "5" instead of a whole number from 0'),
    ("state.json", ("counters", "iteration"), LEFT_OUT, "counters.iteration is missing, and must be a whole number"),
    ("state.json", ("counters", "loops"), 1, "counters.loops is an entry that this program does not know"),
    ("state.json", ("engine", "optimizer", "step"), -1, "engine.optimizer.step is -1 instead of a whole number"),
    ("state.json", ("engine", "loss_scaler", "cur_scale"), 0, "cur_scale is 0 instead of a number above 0"),
    ("state.json", ("layout", "data_parallel_size"), 0, "layout.data_parallel_size is 0 instead of a whole number"),
    ("state.json", (*RATE, "style"), "steep", 'run.schedule.learning_rate.style is "steep" instead of one of '),
    ("state.json", ("training", "next_samples", "loss_sum"), 2.5, "loss_sum is 2.5 instead of a floating point number"),
    ("config.json", ("model", "num_layers"), [4], "model.num_layers is [4] instead of an integer"),
    ("config.json", ("model", "num_layers"), 0, "--num-layers 0 must be at least 1"),
    ("config.json", ("model", "num_key_value_heads"), 3, "--num-key-value-heads 3"),
    ("config.json", ("optimizer",), None, "optimizer is null instead of an object"),
    ("tensors.json", ("tensors", "w", "dim"), 2, "tensors.w.dim is 2, and the shape has 2 dimensions"),
    ("tensors.json", (*FRAGMENTS[:4], "dtype"), "F8", 'kinds.weight.dtype is "F8" instead of one of '),
    ("tensors.json", (*FRAGMENTS, 0, 2), 0, "weight.fragments.0.2 is 0 instead of a whole number from 1"),
]


@pytest.mark.parametrize(("file", "place", "value", "words"), SENTENCES, ids=[row[3] for row in SENTENCES])
def test_file_entry_value_and_rule_are_named(run, file, place, value, words, monkeypatch):
    monkeypatch.setattr(resume, "find_checkpoint", lambda *arguments: run.path)
    path = run.path / file
    content = path.read_text()
    path.write_text(json.dumps(changed(json.loads(content), place, value)))
    try:
        with pytest.raises(CheckpointError) as caught:
            run.read()
    finally:
        path.write_text(content)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


FORGED_STREAMS = [
    (("numpy", "position"), 10**6, "numpy.position is 1000000 instead of a whole number from 0 to 624"),
    (("numpy", "key"), torch.arange(3), 'numpy.key is "Tensor" instead of a tensor of 624 int64'),
    (("python", "gauss"), "x", 'python.gauss is "x" instead of a finite number'),
    (("python",), 3, "python is 3 instead of an object"),
    (("cpu",), torch.zeros(16, dtype=torch.uint8), "rng_00000.safetensors holds no random streams ("),
    (("python", "version"), 9, "holds no random streams (state with version 9"),
]


@pytest.mark.parametrize(("place", "value", "words"), FORGED_STREAMS, ids=[row[2] for row in FORGED_STREAMS])
def test_streams_that_are_none_are_named(run, place, value, words, monkeypatch):
    monkeypatch.setattr(resume, "find_checkpoint", lambda *arguments: run.path)
    path = run.path / "rng_00000.safetensors"
    content = path.read_bytes()
    write_streams(path, changed(run.place.streams.state_dict(), place, value))
    try:
        with pytest.raises(CheckpointError) as caught:
            run.read()
    finally:
        path.write_bytes(content)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
