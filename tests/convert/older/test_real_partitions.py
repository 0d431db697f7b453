"""Partitions that DeepSpeed itself saved come out as the tensors that its optimizer held."""

import dataclasses
import json

import torch
import torch.distributed as dist
from torch import nn

from megatron.checkpoint.fragments import open_tensors
from megatron.convert.older.importing import ImportOptions, import_checkpoint
from tests.convert.older.engine_writer import engine_names
from tests.convert.older.older_writer import KINDS, Layout, make_original, older_arguments
from tests.convert.older.test_importing import GPT_2
from tests.ranks import run_on_ranks

CASES = {
    "zero 1, bf16": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
    "zero 2, bf16": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}},
    "zero 3, bf16": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3, "sub_group_size": 700}},
    "fp32 copies of bf16": {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
}
STEPS = 2
SMALL = dataclasses.replace(GPT_2, num_layers=1)


class Leaf(nn.Module):
    """Holds weight and bias, and pulls both to rank-dependent values."""

    def forward(self, x):
        return sum((param * x - 1).square().sum() for param in self.parameters(recurse=False))


class OlderModule(nn.Module):
    """Parameters under the older system's names, in their order."""

    def __init__(self, weights):
        super().__init__()
        for path, weight in weights.items():
            *modules, last = path.split(".")
            owner = self
            for name in modules:
                if name not in owner._modules:
                    owner.add_module(name, Leaf())
                owner = owner._modules[name]
            owner.register_parameter(last, nn.Parameter(weight.clone()))

    def forward(self, x):
        owners = [module for module in self.modules() if module is not self and module._parameters]
        return sum(module(x) for module in owners).float()


def train_and_save(folder, case, config):
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    original = make_original(SMALL)
    names = engine_names(original, Layout())
    module = OlderModule({names[name]: weight for name, weight in original.tensors["weight"].items()})
    named = list(module.named_parameters())
    groups = [
        {"params": [param for _, param in named if param.dim() > 1], "weight_decay": 0.1},
        {"params": [param for _, param in named if param.dim() == 1], "weight_decay": 0.0},
    ]
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        **config,
    }
    engine, *_ = deepspeed.initialize(model=module, model_parameters=groups, config=settings)
    for step in range(STEPS):
        dtype = torch.bfloat16 if "bf16" in config else torch.float32
        engine.backward(engine(torch.tensor(0.5 + dist.get_rank() + step, dtype=dtype)))
        engine.step()
    arguments = older_arguments(original, Layout(), deepspeed=True)
    state = {"args": arguments, "iteration": STEPS, "checkpoint_version": 3.0}
    engine.save_checkpoint(str(folder / case), client_state=state)
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        # It looks for the states when the first group has stepped, and so finds no other's: look again.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    held = {kind: {} for kind in KINDS}
    by_name = dict(engine.module.named_parameters())
    for ours, theirs in names.items():
        param = by_name[theirs]
        held["weight"][ours] = safe_get_full_fp32_param(param).float().clone()
        for kind in KINDS[1:]:
            held[kind][ours] = safe_get_full_optimizer_state(param, kind).float().clone()
    return held


def train_and_save_all(folder):
    return {case: train_and_save(folder, case, config) for case, config in CASES.items()}


def test_what_deepspeed_saved_is_what_its_optimizer_held(tmp_path):
    held_by_case, _ = run_on_ranks(2, train_and_save_all, tmp_path, deepspeed=True, timeout=300)
    for case, held in held_by_case.items():
        imported = import_checkpoint(tmp_path / case, tmp_path / f"{case} imported", ImportOptions())
        tensors = open_tensors(imported.folder)
        for kind in KINDS:
            for name, expected in held[kind].items():
                padding = tensors.padding(name)
                rows = expected.shape[0] - padding  # rows of the padding are zeros here, whatever they were
                assert torch.equal(tensors.read(name, kind)[:rows], expected[:rows]), (case, name, kind)
        state = json.loads((imported.folder / "state.json").read_text())
        assert (imported.iteration, state["engine"]["optimizer"]["step"]) == (STEPS, STEPS), case
