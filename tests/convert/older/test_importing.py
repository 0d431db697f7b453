"""Checkpoints in the older systems' forms come out as the model that they were made from, bit for bit."""

import json

import pytest
import torch

from megatron.checkpoint.fragments import open_tensors
from megatron.config.model import ModelConfig
from megatron.convert.older.importing import ImportOptions, import_checkpoint
from megatron.kernels.attention.unfused import BACKEND
from megatron.model.gpt import GPT
from megatron.parallel.groups import ParallelGroups
from tests.convert.older.engine_writer import write_flat_engine, write_staged_engine
from tests.convert.older.older_writer import (
    CLASSIC,
    CORE,
    KINDS,
    LATER,
    OLDEST,
    SIZES,
    VOCABULARY,
    Layout,
    logits_of,
    make_original,
    write_megatron_lm,
)

NOTHING = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "make_vocab_size_divisible_by": 8}
GPT_2 = ModelConfig(**SIZES, **NOTHING, activation_function="gelu_tanh")
LLAMA = ModelConfig(
    **SIZES,
    **NOTHING,
    num_key_value_heads=2,
    position_embedding_type="rope",
    rotary_base=500.0,
    rotary_original_max_positions=12,
    rotary_attention_factor=1.0,
    normalization="rmsnorm",
    activation_function="swiglu",
    ffn_hidden_size=24,
    add_bias_linear=False,
    untie_embeddings_and_output_weights=True,
)
TRANSFORMER_ENGINE = {stem: name for stem, name in CORE.items() if not stem.endswith("mlp_norm")}
del TRANSFORMER_ENGINE["attention_norm"]


def assert_same(original, imported, *, kinds=KINDS):
    """Compare every tensor, and the logits of a model made from what was written alone."""
    tensors = open_tensors(imported.folder)
    assert set(tensors.names) == set(original.tensors["weight"])
    for name in tensors.names:
        assert set(tensors.kinds(name)) == set(kinds)
        for kind in kinds:
            assert torch.equal(tensors.read(name, kind), original.tensors[kind][name]), (name, kind)
    config = json.loads((imported.folder / "config.json").read_text())
    model = GPT(
        ModelConfig(**config["model"]),
        vocab_size=config["data"]["vocab_size"],
        groups=ParallelGroups.alone(),
        attention=BACKEND,
    )
    model.load_state_dict({name: tensors.read(name) for name in tensors.names})
    assert torch.equal(logits_of(model), original.logits)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize("config", [GPT_2, LLAMA], ids=["gpt2", "llama"])
def test_megatron_lm_is_imported_bit_for_bit(tmp_path, tensor, pipeline, config):
    original = make_original(config)
    folder = write_megatron_lm(original, tmp_path / "old", Layout(tensor=tensor, pipeline=pipeline))
    imported = import_checkpoint(folder, tmp_path / "new", ImportOptions())
    assert_same(original, imported)
    assert (imported.iteration, imported.consumed_samples) == (100, 800)
    state = json.loads((imported.folder / "state.json").read_text())
    assert state["engine"]["optimizer"]["step"] == 97
    assert state["counters"]["consumed_tokens"] == 800 * 12


@pytest.mark.parametrize("version", [0, 1.0, 2.0])
@pytest.mark.parametrize("tensor", [1, 2])
def test_the_older_orders_of_query_key_and_value_are_put_right(tmp_path, version, tensor):
    original = make_original(GPT_2)
    folder = write_megatron_lm(original, tmp_path / "old", Layout(tensor=tensor, version=version, names=OLDEST))
    assert_same(original, import_checkpoint(folder, tmp_path / "new", ImportOptions()))


@pytest.mark.parametrize(
    ("names", "config"),
    [(LATER, LLAMA), (CORE, GPT_2), (CORE, LLAMA), (TRANSFORMER_ENGINE, GPT_2), (TRANSFORMER_ENGINE, LLAMA)],
    ids=["input_norm", "core gpt2", "core llama", "fused norms gpt2", "fused norms llama"],
)
def test_every_generation_of_names_is_known(tmp_path, names, config):
    original = make_original(config)
    folder = write_megatron_lm(original, tmp_path / "old", Layout(tensor=2, pipeline=2, names=names))
    assert_same(original, import_checkpoint(folder, tmp_path / "new", ImportOptions()))


def test_an_interleaved_pipeline_is_put_in_order(tmp_path):
    original = make_original(GPT_2)
    folder = write_megatron_lm(original, tmp_path / "old", Layout(pipeline=2, virtual=2))
    assert_same(original, import_checkpoint(folder, tmp_path / "new", ImportOptions()))


def test_a_run_in_fp32_has_no_copies_to_take(tmp_path):
    original = make_original(GPT_2)
    folder = write_megatron_lm(original, tmp_path / "old", Layout(dtype=torch.float32))
    assert_same(original, import_checkpoint(folder, tmp_path / "new", ImportOptions()))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("config", [GPT_2, LLAMA], ids=["gpt2", "llama"])
def test_megatron_deepspeed_is_imported_bit_for_bit(tmp_path, stage, tensor, config):
    original = make_original(config)
    folder = write_flat_engine(original, tmp_path / "old", Layout(tensor=tensor, data=3), stage)
    assert_same(original, import_checkpoint(folder, tmp_path / "new", ImportOptions()))


def test_partitions_without_addresses_are_cut_by_the_shapes(tmp_path):
    original = make_original(GPT_2)
    folder = write_flat_engine(original, tmp_path / "old", Layout(data=2), 2, mappings=False)
    assert_same(original, import_checkpoint(folder, tmp_path / "new", ImportOptions()))


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize("config", [GPT_2, LLAMA], ids=["gpt2", "llama"])
def test_the_pipelined_model_is_imported_bit_for_bit(tmp_path, tensor, pipeline, config):
    original = make_original(config)
    layout = Layout(tensor=tensor, pipeline=pipeline, data=2)
    folder = write_staged_engine(original, tmp_path / "old", layout)
    assert_same(original, import_checkpoint(folder, tmp_path / "new", ImportOptions()))


def test_weights_alone_are_the_half_precision_ones(tmp_path):
    original = make_original(GPT_2)
    folder = write_megatron_lm(original, tmp_path / "old", Layout(tensor=2, names=CLASSIC))
    imported = import_checkpoint(folder, tmp_path / "new", ImportOptions(weights_only=True))
    tensors = open_tensors(imported.folder)
    for name in tensors.names:
        assert tensors.kinds(name) == ("weight",)
        assert torch.equal(tensors.read(name), original.tensors["weight"][name].bfloat16().float())
    assert not imported.with_optimizer
    assert imported.flags[-1] == "--no-load-optim"


def test_the_folder_of_the_iteration_does_as_well_as_the_run_s(tmp_path):
    original = make_original(GPT_2)
    folder = write_megatron_lm(original, tmp_path / "old", Layout())
    assert_same(original, import_checkpoint(folder / "iter_0000100", tmp_path / "new", ImportOptions()))


def test_the_printed_flags_describe_the_model(tmp_path):
    from megatron.config.run import load_run_config

    for config in (GPT_2, LLAMA):
        original = make_original(config)
        root = tmp_path / config.normalization
        folder = write_megatron_lm(original, root / "old", Layout())
        imported = import_checkpoint(folder, root / "new", ImportOptions())
        written = json.loads((imported.folder / "config.json").read_text())
        run = load_run_config(imported.flags).config.to_json()
        assert run["model"] == written["model"]
        assert run["optimizer"]["lr"] == 3e-4
        assert run["data"]["vocab_size"] == VOCABULARY
