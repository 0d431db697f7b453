"""A model that is imported computes what it computed, and exported again it is the same, bit for bit."""

import pytest
import torch

from megatron.checkpoint.fragments import open_tensors
from megatron.config.run import load_run_config
from megatron.convert.hugging_face.check import compare_logits
from megatron.convert.hugging_face.command_line import model_words, tokenizer_words
from megatron.convert.hugging_face.exporting import export_model
from megatron.convert.hugging_face.importing import import_model
from megatron.convert.hugging_face.model import loaded_model
from megatron.model.head import whole_logits
from tests.convert.hugging_face.models import VARIANTS, VOCABULARY, tokens, weights_in, write_model

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=VARIANTS)
def imported(request, tmp_path_factory):
    """A folder of theirs in several files, what was made of it, and the name of the variant."""
    tmp_path = tmp_path_factory.mktemp("imported")
    folder = write_model(tmp_path / "theirs", request.param, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder, import_model(folder, tmp_path / "ours"), request.param


def exported(made, target, **options):
    sections = {"model": made.model, "data": made.data, "precision": made.precision}
    return export_model(open_tensors(made.path), target, **{**sections, **options})


def logits_of(folder, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options)
    with torch.no_grad():
        return model.eval()(tokens()).logits


def test_logits_are_equal_and_the_weights_come_back_bit_for_bit(imported, tmp_path):
    folder, made, variant = imported
    expected = logits_of(folder)
    assert expected.std() > 0.1  # otherwise 1e-5 would mean little
    model = loaded_model(made.model, open_tensors(made.path))
    with torch.no_grad():
        ours = whole_logits(model(tokens()), model.groups.tensor, VOCABULARY).transpose(0, 1)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert compare_logits(folder, open_tensors(made.path), made.model, torch.float32).error < 1e-5

    again = exported(made, tmp_path / "again", model_type=variant.split()[0], max_shard_bytes=20_000)
    before, after = weights_in(folder), weights_in(again.path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert torch.equal(logits_of(again.path), expected)
    their_config, our_config = (transformers.AutoConfig.from_pretrained(path) for path in (folder, again.path))
    kept = their_config.to_dict()
    ours_says = our_config.to_dict()
    assert ours_says.get("rope_parameters", {}) | kept.get("rope_parameters", {}) == ours_says.get(
        "rope_parameters", {}
    )
    free = {
        "rope_parameters",
        "_name_or_path",
        "n_inner",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "dtype",
        "layer_types",
        "max_window_layers",
    }
    assert {key: ours_says[key] for key in kept.keys() - free} == {key: kept[key] for key in kept.keys() - free}


def test_the_flags_that_an_import_prints_make_its_model_section(imported):
    _, made, _ = imported
    words = [*model_words(made.model), *tokenizer_words(made.data), "--lr", "1e-3", "--seq-length", "16"]
    config = load_run_config(words).config
    assert config.model == made.model
    assert config.data.vocab_size == VOCABULARY


def test_the_family_of_an_export_has_all_that_the_model_has(imported, tmp_path):
    folder, made, variant = imported
    again = exported(made, tmp_path / "again")  # no tokenizer tells the family
    same = {"mistral without a window": "llama"}.get(variant, variant.split()[0])
    assert again.model_type == same
    assert torch.equal(logits_of(again.path), logits_of(folder))


def test_the_vocabulary_is_padded_in_the_checkpoint_alone(tmp_path):
    folder = write_model(tmp_path / "theirs", "llama 2")
    made = import_model(folder, tmp_path / "ours", divisor=64)
    tensors = open_tensors(made.path)
    for name in ("0.weight", f"{made.model.num_layers + 3}.weight"):
        assert tensors.shape(name) == (128, 32)
        assert tensors.padding(name) == 28
        assert not tensors.read(name)[VOCABULARY:].any()
    again = exported(made, tmp_path / "again")
    assert {len(weights_in(again.path)[name]) for name in ("model.embed_tokens.weight", "lm_head.weight")} == {100}
    assert made.num_parameters == again.num_parameters == sum(x.numel() for x in weights_in(folder).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_come_back_in_it(tmp_path, dtype):
    folder = write_model(tmp_path / "theirs", "qwen3", dtype)
    made = import_model(folder, tmp_path / "ours")
    assert open_tensors(made.path).dtype("0.weight") == torch.float32
    again = exported(made, tmp_path / "again")
    before, after = weights_in(folder), weights_in(again.path)
    assert all(after[name].dtype == dtype and torch.equal(before[name], after[name]) for name in before)
    assert transformers.AutoModelForCausalLM.from_pretrained(again.path).dtype == dtype
    assert compare_logits(again.path, open_tensors(made.path), made.model, dtype).error < 1e-5


def test_an_export_in_half_precision_is_compared_with_weights_rounded_alike(tmp_path):
    made = import_model(write_model(tmp_path / "theirs", "llama 3"), tmp_path / "ours")
    again = exported(made, tmp_path / "again", precision="bf16")
    tensors = open_tensors(made.path)
    assert compare_logits(again.path, tensors, made.model, torch.bfloat16).error < 1e-5
    assert not compare_logits(again.path, tensors, made.model, torch.float32).agrees
