"""What cannot be converted is refused in one sentence that names file, key and value, before anything is written."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from safetensors.torch import save_file

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.fragments import open_tensors
from megatron.convert.hugging_face import importing
from megatron.convert.hugging_face.errors import ConvertError
from megatron.convert.hugging_face.exporting import export_model
from megatron.convert.hugging_face.importing import import_model
from megatron.convert.hugging_face.registry import family_for
from tests.convert.hugging_face.models import change_json, weights_in, write_model
from tests.model.tiny import LLAMA, tiny_config

pytest.importorskip("transformers")

CONFIGS = {
    "another family": (
        "llama 2",
        {"model_type": "bloom"},
        "model_type 'bloom' cannot be converted, only llama, mistral",
    ),
    "code of its own": ("llama 2", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map is .* which is never run"),
    "quantised": ("llama 2", {"quantization_config": {"bits": 4}}, "quantization_config is .* quantised"),
    "dynamic rope": (
        "llama 2",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "rope_type is 'dynamic', and only 'default', 'linear', 'llama3', 'yarn' can be converted",
    ),
    "partial rope": ("llama 2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, and only 1.0"),
    "biases by half": ("llama 2", {"attention_bias": True}, "attention_bias is True and mlp_bias is False"),
    "activation": ("llama 2", {"hidden_act": "relu"}, "hidden_act is 'relu', and only 'silu'"),
    "windows of some layers": (
        "qwen2",
        {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]},
        "sliding window to some layers alone: --attention-window is of all layers",
    ),
    "biases of Qwen 3": ("qwen3", {"attention_bias": True}, "attention_bias is True, and only False"),
    "scores by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    "both ways": ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    "no width": ("llama 2", {"hidden_size": None}, "lacks hidden_size"),
    "a word for a number": (
        "llama 2",
        {"num_hidden_layers": "two"},
        "num_hidden_layers is 'two', which is no whole number",
    ),
    "more layers": ("llama 2", {"num_hidden_layers": 3}, "the weights lack model.layers.2.* and 6 more"),
    "fewer layers": ("llama 2", {"num_hidden_layers": 1}, "the weights hold beside .* model.layers.1.* and 6 more"),
    "another width": ("llama 2", {"intermediate_size": 32}, "would be .*, but config.json makes it"),
    "more heads": ("llama 2", {"num_key_value_heads": 2}, "are not of one model|are not those of config.json"),
}


LEFT_OUT = object()
VALUES = [LEFT_OUT, None, True, -1, 0, 1.5, math.nan, 10**12, 10**400, "x", [1], {}]


@pytest.mark.parametrize("variant", ["gpt2", "llama 3", "qwen2 with a window", "mistral", "gemma"])
def test_no_value_of_a_config_is_more_than_a_sentence(variant, tmp_path, monkeypatch):
    """Each key, those of the rotary scaling too, left out and set to values of other kinds."""
    monkeypatch.setattr(importing, "write_checkpoint", lambda root, tensors, **about: root)
    path = write_model(tmp_path / "theirs", variant) / "config.json"
    config = json.loads(path.read_text())
    scaling = config.get("rope_parameters") or {}
    refused, problems = 0, []
    for key, value in itertools.product([*config, *(f"rope_parameters.{name}" for name in scaling)], VALUES):
        group, _, name = key.rpartition(".")
        content = json.loads(json.dumps(config))
        place = content[group] if group else content
        place.pop(name) if value is LEFT_OUT else place.update({name: value})
        path.write_text(json.dumps(content))
        try:
            import_model(path.parent, tmp_path / "ours")
        except ConvertError as error:
            refused += 1
            if "\n" in str(error):
                problems.append((key, value, str(error)))
        except Exception as error:
            problems.append((key, value, repr(error)))
    assert problems == []
    assert refused > 80


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(case, tmp_path):
    variant, changes, sentence = CONFIGS[case]
    folder = write_model(tmp_path / "theirs", variant)
    change_json(folder / "config.json", **changes)
    with pytest.raises(ConvertError, match=sentence) as caught:
        import_model(folder, tmp_path / "ours")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ours").exists()


def without_safetensors(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def cut_short(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def led_outside(folder):
    names = dict.fromkeys(weights_in(folder), "../secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def led_to_nothing(folder):
    names = dict.fromkeys(weights_in(folder), "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def of_integers(folder):
    weights = weights_in(folder)
    weights["lm_head.weight"] = torch.zeros(100, 32, dtype=torch.int8)
    save_file(weights, folder / "model.safetensors")


def without_config(folder):
    (folder / "config.json").unlink()


FOLDERS = {
    without_safetensors: r"pickled weights \(pytorch_model.bin\), which can run code .* are not read.*save_pretrained",
    cut_short: "model.safetensors cannot be read",
    led_outside: "names '../secret.safetensors', which is no safetensors file of the folder",
    led_to_nothing: "model-00001-of-00002.safetensors does not exist, but the index names it",
    of_integers: "lm_head.weight is I8, and only weights in F32, BF16, F16",
    without_config: "config.json does not exist: give a local folder",
}


@pytest.mark.parametrize("damage", FOLDERS, ids=lambda damage: damage.__name__)
def test_folders(damage, tmp_path):
    folder = write_model(tmp_path / "theirs", "llama 2")
    damage(folder)
    with pytest.raises(ConvertError, match=FOLDERS[damage]):
        import_model(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_tied_head_that_the_files_hold_must_be_the_embedding(tmp_path):
    folder = write_model(tmp_path / "theirs", "llama tied")
    weights = weights_in(folder)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    import_model(folder, tmp_path / "ours")
    weights["lm_head.weight"][5, 5] += 1
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ConvertError, match=r"tie_word_embeddings is true, but lm_head\.weight is not the embedding"):
        import_model(folder, tmp_path / "others")


def test_names_without_prefix_and_masks_of_older_files_are_understood(tmp_path):
    folder = write_model(tmp_path / "theirs", "gpt2")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights_in(folder).items()}
    plain = import_model(folder, tmp_path / "ours")
    weights["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(weights, folder / "model.safetensors")
    older = import_model(folder, tmp_path / "older")
    for name in open_tensors(plain.path).names:
        assert torch.equal(open_tensors(plain.path).read(name), open_tensors(older.path).read(name))


def test_a_checkpoint_that_is_there_is_not_written_over(tmp_path):
    folder = write_model(tmp_path / "theirs", "llama 2")
    import_model(folder, tmp_path / "ours")
    with pytest.raises(CheckpointError, match="step_0000000 is there already"):
        import_model(folder, tmp_path / "ours")


def test_a_model_that_no_family_has_is_refused_with_a_reason_each():
    model = dataclasses.replace(tiny_config(**LLAMA), attention_softcap=30.0)
    with pytest.raises(ConvertError, match="no family of Hugging Face has") as caught:
        family_for(model)
    assert str(caught.value).count("--attention-softcap is 30.0, not 0.0") == 6


def test_a_family_that_lacks_something_and_a_folder_that_is_there_are_refused(tmp_path):
    made = import_model(write_model(tmp_path / "theirs", "qwen3"), tmp_path / "ours")
    tensors, sections = open_tensors(made.path), {"model": made.model, "data": made.data}
    with pytest.raises(ConvertError, match=r"^llama: --qk-layernorm is True, not False$"):
        export_model(tensors, tmp_path / "again", model_type="llama", **sections)
    with pytest.raises(ConvertError, match="--model-type: model_type 'bert' cannot be converted"):
        export_model(tensors, tmp_path / "again", model_type="bert", **sections)
    assert not (tmp_path / "again").exists()
    export_model(tensors, tmp_path / "again", **sections)
    with pytest.raises(ConvertError, match="again exists"):
        export_model(tensors, tmp_path / "again", **sections)
    export_model(tensors, tmp_path / "again", replace=True, **sections)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "ours", "theirs"]


def test_values_beyond_fp16_are_not_written_in_it(tmp_path):
    folder = write_model(tmp_path / "theirs", "llama 2")
    weights = weights_in(folder)
    weights["lm_head.weight"][0, 0] = 1e5
    save_file(weights, folder / "model.safetensors")
    made = import_model(folder, tmp_path / "ours")
    with pytest.raises(ConvertError, match=r"lm_head.weight has values up to 1e\+05, which fp16 cannot hold: use bf16"):
        export_model(open_tensors(made.path), tmp_path / "again", model=made.model, data=made.data, precision="fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]
