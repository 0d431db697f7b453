"""What cannot be imported is refused in a sentence that names file, entry and value."""

import argparse
from collections import OrderedDict

import pytest
import torch

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.fragments import open_tensors
from megatron.config.errors import ConfigError
from megatron.convert.older.arguments import model_config
from megatron.convert.older.importing import ImportOptions, find_checkpoint, import_checkpoint
from tests.convert.older.engine_writer import write_flat_engine, write_staged_engine
from tests.convert.older.older_writer import VOCABULARY, Layout, make_original, older_arguments, write_megatron_lm
from tests.convert.older.test_importing import GPT_2, LLAMA, assert_same


def arguments(config=GPT_2, **changes):
    return vars(older_arguments(make_original(config), Layout(), **changes))


def edit(path, change):
    """Change a file of torch.save in place."""
    with torch.serialization.safe_globals([argparse.Namespace, OrderedDict]):
        content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_experts", [8]),
        ("num_experts", 8),
        ("apply_residual_connection_post_layernorm", True),
        ("multi_latent_attention", True),
        ("mlp_type", "residual"),
        ("quick_geglu", True),
        ("position_embedding_type", "relative"),
        ("normalization", "scalenorm"),
        ("window_size", "wide"),
        ("softmax_type", "learnable"),
    ],
)
def test_a_model_that_is_not_offered_is_refused_by_its_argument(tmp_path, name, value):
    with pytest.raises(ConfigError, match=name) as error:
        model_config(arguments(**{name: value}), tmp_path / "model_optim_rng.pt")
    assert repr(value) in str(error.value)
    assert "model_optim_rng.pt" in str(error.value)


def test_all_reasons_come_at_once(tmp_path):
    with pytest.raises(ConfigError) as error:
        model_config({"num_layers": 2, "quick_geglu": True}, tmp_path)
    assert len(error.value.messages) == 5  # four arguments are missing


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"bias_gelu_fusion": True}, {"activation_function": "gelu_tanh"}),
        ({"bias_gelu_fusion": False}, {"activation_function": "gelu"}),
        ({"bias_gelu_fusion": True, "add_bias_linear": False}, {"activation_function": "gelu", "add_qkv_bias": False}),
        ({"bias_gelu_fusion": False, "openai_gelu": True}, {"activation_function": "gelu_tanh"}),
        ({"squared_relu": True}, {"activation_function": "squared_relu"}),
        ({"add_bias_linear": False, "add_qkv_bias": True}, {"add_bias_linear": False, "add_qkv_bias": True}),
        ({"window_size": (127, 0)}, {"attention_window": 128}),
        ({"add_position_embedding": False, "position_embedding_type": None}, {"position_embedding_type": "none"}),
        (
            {"use_rotary_position_embeddings": True, "rotary_base": None, "rotary_position_embeddings_theta": 1e6},
            {"position_embedding_type": "rope", "rotary_base": 1e6},
        ),
        (
            {"position_embedding_type": "rope", "use_rope_scaling": True, "rope_scaling_factor": 4.0},
            {"rotary_scaling_type": "llama3", "rotary_scaling_factor": 4.0, "rotary_original_max_positions": 8192},
        ),
        (
            {"position_embedding_type": "rope", "rotary_seq_len_interpolation_factor": 3},
            {"rotary_scaling_type": "linear", "rotary_scaling_factor": 3.0, "rotary_original_max_positions": 4},
        ),
        ({"num_key_value_heads": 2, "group_query_attention": True, "num_query_groups": 1}, {"num_key_value_heads": 1}),
        ({"apply_layernorm_1p": True, "fp32_residual_connection": True}, {"apply_layernorm_1p": True}),
    ],
)
def test_arguments_become_the_fields_that_mean_the_same(tmp_path, changes, expected):
    config = model_config(arguments(**changes), tmp_path)
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_key_that_has_no_place_is_named(tmp_path):
    folder = write_megatron_lm(make_original(GPT_2), tmp_path / "old", Layout())
    file = folder / "iter_0000100" / "mp_rank_00" / "model_optim_rng.pt"
    edit(file, lambda content: content["model"]["language_model"]["embedding"].update(norm={"weight": torch.ones(16)}))
    with pytest.raises(CheckpointError, match=r"mp_rank_00.*language_model\.embedding\.norm\.weight"):
        import_checkpoint(folder, tmp_path / "new", ImportOptions())


def test_a_missing_parameter_is_named(tmp_path):
    folder = write_megatron_lm(make_original(GPT_2), tmp_path / "old", Layout(optimizer=False))
    file = folder / "iter_0000100" / "mp_rank_00" / "model_optim_rng.pt"
    edit(file, lambda content: content["model"]["language_model"]["encoder"].pop("final_layernorm.bias"))
    with pytest.raises(CheckpointError, match=r"no tensor for 6\.bias"):
        import_checkpoint(folder, tmp_path / "new", ImportOptions())


def test_a_tensor_of_another_shape_is_named(tmp_path):
    folder = write_megatron_lm(make_original(GPT_2), tmp_path / "old", Layout(optimizer=False), ffn_hidden_size=32)
    with pytest.raises(CheckpointError, match=r"mlp\.dense_h_to_4h\.weight has the shape \(64, 16\)"):
        import_checkpoint(folder, tmp_path / "new", ImportOptions())


def test_an_optimizer_in_another_order_is_refused_not_mixed_up(tmp_path):
    folder = write_megatron_lm(make_original(GPT_2), tmp_path / "old", Layout())
    file = folder / "iter_0000100" / "mp_rank_00" / "model_optim_rng.pt"

    def swap_blocks(content):
        masters = content["optimizer"]["fp32_from_fp16_params"][0]
        masters[2], masters[6] = masters[6], masters[2]  # both are products of attention, of the same shape

    edit(file, swap_blocks)
    with pytest.raises(CheckpointError, match=r"fp32 copy of .*query_key_value\.weight.*--weights-only"):
        import_checkpoint(folder, tmp_path / "new", ImportOptions())
    assert import_checkpoint(folder, tmp_path / "new", ImportOptions(weights_only=True)).iteration == 100


def test_the_distributed_optimizer_is_refused_and_its_weights_are_taken_when_asked(tmp_path):
    folder = write_megatron_lm(make_original(GPT_2), tmp_path / "old", Layout(optimizer=False))
    (folder / "iter_0000100" / "mp_rank_00" / "distrib_optim.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"distrib_optim\.pt.*--weights-only"):
        import_checkpoint(folder, tmp_path / "new", ImportOptions())
    assert not import_checkpoint(folder, tmp_path / "new", ImportOptions(weights_only=True)).with_optimizer


def test_flat_groups_of_a_pipeline_are_refused_and_its_weights_are_taken_when_asked(tmp_path):
    folder = write_staged_engine(make_original(GPT_2), tmp_path / "old", Layout(pipeline=2))
    for partition in folder.glob("*/*_optim_states.pt"):
        partition.unlink()
    groups = {"fp32_groups_flat": [torch.ones(100)], "optimizer_state_dict": {"state": {}, "param_groups": []}}
    edit(folder / "global_step100" / "mp_rank_00_model_states.pt", lambda content: content.update(optimizer=groups))
    with pytest.raises(CheckpointError, match=r"a group of 100 entries.*--weights-only"):
        import_checkpoint(folder, tmp_path / "new", ImportOptions())
    assert not import_checkpoint(folder, tmp_path / "new", ImportOptions(weights_only=True)).with_optimizer


def test_all_partitions_of_a_stage_are_missed(tmp_path):
    folder = write_staged_engine(make_original(GPT_2), tmp_path / "old", Layout(pipeline=2))
    (folder / "global_step100" / "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"lacks exp_avg of 4\.attention_norm\.weight"):
        import_checkpoint(folder, tmp_path / "new", ImportOptions())


def differing_norms(tmp_path):
    folder = write_megatron_lm(make_original(GPT_2), tmp_path / "old", Layout(tensor=2, optimizer=False))
    file = folder / "iter_0000100" / "mp_rank_01" / "model_optim_rng.pt"
    edit(file, lambda content: content["model"]["language_model"]["encoder"]["final_layernorm.weight"].mul_(2))
    return folder


def test_norms_that_differ_between_tensor_ranks_are_refused_unless_one_says_what_to_take(tmp_path):
    folder = differing_norms(tmp_path)
    with pytest.raises(CheckpointError, match=r"final_layernorm\.weight differs.*--replicas"):
        import_checkpoint(folder, tmp_path / "new", ImportOptions())
    first = import_checkpoint(folder, tmp_path / "first", ImportOptions(replicas="first"))
    mean = import_checkpoint(folder, tmp_path / "mean", ImportOptions(replicas="mean"))
    norms = [open_tensors(imported.folder).read("6.weight") for imported in (first, mean)]
    assert torch.equal(norms[1], norms[0] * 1.5)


def test_heads_shared_among_tensor_ranks_are_refused(tmp_path):
    folder = write_megatron_lm(make_original(LLAMA), tmp_path / "old", Layout(tensor=4, optimizer=False))
    with pytest.raises(CheckpointError, match=r"query_key_value.*2 key/value heads on 4 tensor ranks"):
        import_checkpoint(folder, tmp_path / "new", ImportOptions())


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    folder = write_megatron_lm(make_original(GPT_2), tmp_path / "old", Layout(optimizer=False))
    (tmp_path / "new").write_text("a file")
    with pytest.raises(CheckpointError, match=r"new"):
        import_checkpoint(folder, tmp_path / "new", ImportOptions())


def test_the_vocabulary_must_be_known_and_may_be_given(tmp_path):
    original = make_original(GPT_2)
    folder = write_megatron_lm(original, tmp_path / "old", Layout(), vocab_size=None)
    with pytest.raises(ConfigError, match=r"padded_vocab_size 56.*--vocab-size"):
        import_checkpoint(folder, tmp_path / "new", ImportOptions())
    with pytest.raises(ConfigError, match=r"--vocab-size 57"):
        import_checkpoint(folder, tmp_path / "new", ImportOptions(vocab_size=57))
    assert_same(original, import_checkpoint(folder, tmp_path / "new", ImportOptions(vocab_size=VOCABULARY)))


def test_rotation_by_cosines_is_refused_outside_of_the_pipeline(tmp_path):
    original = make_original(LLAMA)
    changes = {"use_rotary_position_embeddings": True, "ds_sequence_parallel_fpdt": False}
    folder = write_flat_engine(original, tmp_path / "flat", Layout(data=2), 1, **changes)
    with pytest.raises(CheckpointError, match=r"cosine and sine of cosines.*--accept-rotary"):
        import_checkpoint(folder, tmp_path / "new", ImportOptions())
    assert_same(original, import_checkpoint(folder, tmp_path / "new", ImportOptions(accept_rotary=True)))
    staged = write_staged_engine(original, tmp_path / "staged", Layout(data=2), **changes)
    assert_same(original, import_checkpoint(staged, tmp_path / "other", ImportOptions()))


def test_sequence_parallelism_under_deepspeed_is_noted(tmp_path):
    original = make_original(GPT_2)
    flat = write_flat_engine(original, tmp_path / "flat", Layout(tensor=2), 1, sequence_parallel=True)
    (note,) = import_checkpoint(flat, tmp_path / "new", ImportOptions()).notes
    assert "summed the embeddings of different tokens" in note


def test_position_tables_divided_by_sequence_parallelism_are_joined(tmp_path):
    original = make_original(GPT_2)
    folder = write_flat_engine(original, tmp_path / "old", Layout(tensor=2), 0)
    for rank in range(2):

        def divide(content, rank=rank):
            embedding = content["module"]["language_model"]["embedding"]
            table = embedding["position_embeddings"].pop("weight")
            embedding["position_embeddings"]["local_embeddings.weight"] = table.chunk(2)[rank].clone()

        edit(folder / "global_step100" / f"mp_rank_{rank:02d}_model_states.pt", divide)
    imported = import_checkpoint(folder, tmp_path / "new", ImportOptions(weights_only=True))
    table = open_tensors(imported.folder).read("1.table.weight")
    assert torch.equal(table, original.tensors["weight"]["1.table.weight"].bfloat16().float())


def test_copies_of_a_tied_embedding_that_differ_are_noted(tmp_path):
    folder = write_megatron_lm(make_original(GPT_2), tmp_path / "old", Layout(pipeline=2, optimizer=False))
    file = folder / "iter_0000100" / "mp_rank_00_001" / "model_optim_rng.pt"
    edit(file, lambda content: content["model"]["word_embeddings_for_head"]["weight"].mul_(2))
    (note,) = import_checkpoint(folder, tmp_path / "new", ImportOptions()).notes
    assert "different copies of the tied embedding" in note


@pytest.mark.parametrize("write", [write_megatron_lm, write_flat_engine, write_staged_engine])
def test_an_optimizer_other_than_adam_is_refused(tmp_path, write):
    stage = (1,) if write is write_flat_engine else ()
    folder = write(make_original(GPT_2), tmp_path / "old", Layout(), *stage)
    (file,) = [*folder.glob("*/*_optim_states.pt"), *folder.glob("*/*/model_optim_rng.pt")]

    def keep_momentum(content):
        state = content["optimizer"]["optimizer"] if "optimizer" in content else content["optimizer_state_dict"]
        for entry in state.get("base_optimizer_state", state)["state"].values():
            entry["momentum_buffer"] = entry.pop("exp_avg")

    edit(file, keep_momentum)
    with pytest.raises(CheckpointError, match=r"keeps momentum_buffer.*--weights-only"):
        import_checkpoint(folder, tmp_path / "new", ImportOptions())


def test_moments_of_a_part_of_the_parameters_are_refused(tmp_path):
    folder = write_megatron_lm(make_original(GPT_2), tmp_path / "old", Layout(dtype=torch.float32))
    file = folder / "iter_0000100" / "mp_rank_00" / "model_optim_rng.pt"
    edit(file, lambda content: content["optimizer"]["state"].clear())
    assert not import_checkpoint(folder, tmp_path / "none", ImportOptions()).with_optimizer


@pytest.mark.parametrize("tag", ["../elsewhere", "", "a/b", "/etc", "missing", ".", "x" * 5000, "global_step100\0"])
def test_a_pointer_leads_nowhere_but_beside_itself(tmp_path, tag):
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "latest").write_text(tag)
    with pytest.raises(CheckpointError, match="latest"):
        find_checkpoint(folder)


@pytest.mark.parametrize(
    ("entry", "said"), [("__0_0.distcp", "torch_dist"), ("zero/", "universal"), ("other.txt", "mp_rank_00")]
)
def test_forms_that_are_not_read_are_told_apart(tmp_path, entry, said):
    (tmp_path / entry).mkdir() if entry.endswith("/") else (tmp_path / entry).write_text("")
    with pytest.raises(CheckpointError, match=said):
        find_checkpoint(tmp_path)
