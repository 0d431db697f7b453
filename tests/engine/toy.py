"""A model small enough to compare with plain torch, its batches, and the same training in ten lines of torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.checkpoint.files import read_json, write_json
from megatron.checkpoint.fragments import describe_tensors, open_tensors, write_fragments
from megatron.config.engine import EngineConfig
from megatron.config.model import ModelConfig
from megatron.config.optimizer import OptimizerConfig
from megatron.config.sections import RunConfig
from megatron.config.training import TrainingConfig
from megatron.engine.settings import build_settings
from megatron.parallel.groups import ParallelGroups, create_groups
from megatron.parallel.mesh import Mesh

VOCABULARY, WIDTH, LENGTH = 13, 6, 5  # sizes that nothing divides, so that ZeRO has to pad


@dataclass(frozen=True)
class ToyBatch:
    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor | None = None
    position_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    document_ids: Tensor | None = None

    def to(self, device: torch.device) -> ToyBatch:
        moved = {name: tensor.to(device) for name, tensor in vars(self).items() if tensor is not None}
        return dataclasses.replace(self, **moved)


class ToyModel(nn.Module):
    """Embedding, one layer with a norm, and a head tied to the embedding; weights from a fixed seed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.poison = 0.0
        self.layer.weight.register_hook(self._poison_once)

    def _poison_once(self, gradient: Tensor) -> Tensor:
        """Add `poison` to the gradient of one micro-batch."""
        poison, self.poison = self.poison, 0.0
        return gradient + poison if poison else gradient

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        hidden = torch.tanh(self.layer(self.norm(self.embedding(tokens))))
        logits = F.linear(hidden, self.embedding.weight).float()
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return losses.sum() if loss_mask is None else (losses * loss_mask.flatten()).sum()


def make_batches(step: int, rank: int, size: int, count: int, masked: bool = True) -> list[ToyBatch]:
    """`count` micro-batches of one sample of data rank `rank` of `size`; any split of a step holds the same samples."""
    batches = []
    for index in range(count):
        generator = torch.Generator().manual_seed(1000 * step + index * size + rank)
        text = torch.randint(VOCABULARY, (1, LENGTH + 1), generator=generator)
        mask = (torch.rand(1, LENGTH, generator=generator) < 0.5).float() if masked else None
        batches.append(ToyBatch(tokens=text[:, :-1], labels=text[:, 1:], loss_mask=mask))
    return batches


def run_config(
    stage: int = 1,
    precision: str = "fp32",
    optimizer: str = "adam",
    clip_grad: float = 0.0,
    samples: int = 2,
    cpu_optimizer: bool = False,
    remote_device: str = "none",
    **training: Any,
) -> RunConfig:
    return RunConfig(
        model=ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1),
        optimizer=OptimizerConfig(optimizer=optimizer, lr=0.1, clip_grad=clip_grad, weight_decay=0.1),
        training=TrainingConfig(precision=precision, micro_batch_size=1, global_batch_size=samples, **training),
        engine=EngineConfig(
            zero_stage=stage,
            cpu_optimizer=cpu_optimizer,
            remote_device=remote_device,
            zero_reduce_bucket_size=50,
            zero_allgather_bucket_size=50,
        ),
    )


def make_groups() -> ParallelGroups:
    """All running ranks are data-parallel."""
    return create_groups(Mesh(data=dist.get_world_size()), dist.get_rank())


def split_decay(model: nn.Module) -> list[dict[str, Any]]:
    """Vectors have no weight decay and learn at half the rate."""
    parameters = list(model.parameters())
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters if parameter.dim() == 1]
    return [
        {"params": matrices, "lr_mult": 1.0, "wd_mult": 1.0},
        {"params": vectors, "lr_mult": 0.5, "wd_mult": 0.0},
    ]


def build_engine(config: RunConfig, user: dict[str, Any] | None = None, model: nn.Module | None = None) -> Any:
    from megatron.engine.flat import build_flat_engine

    groups = make_groups()
    model = model or ToyModel()
    # ZeRO-3 keeps small weights whole: in these models that would be all of them.
    user = user or {"zero_optimization": {"stage3_param_persistence_threshold": 10}}
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    settings = build_settings(config, user, data_parallel_size=groups.data.size, device_type=device.type)
    return build_flat_engine(model, split_decay(model), settings, groups, device)


def pretend_fp16_works() -> None:
    """DeepSpeed refuses fp16 on a CPU without instructions for it; torch computes it all the same."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True


def save(engine: Any, directory: Path) -> None:
    """Write what the engine has as a checkpoint does; every rank calls it."""
    if dist.get_rank() == 0:
        directory.mkdir(parents=True)
    dist.barrier()
    records, _ = write_fragments(directory, dist.get_rank(), engine.state_fragments())
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, records)
    if dist.get_rank() == 0:
        write_json(directory / "tensors.json", describe_tensors(record for share in shares for record in share))
        write_json(directory / "state.json", engine.state())
    dist.barrier()


def load(engine: Any, directory: Path, optimizer: bool = True) -> None:
    """Continue from what `save` wrote; every rank calls it."""
    engine.load(open_tensors(directory), read_json(directory / "state.json"), optimizer=optimizer)


def full_weights(engine: Any) -> dict[str, Tensor]:
    """The weights that forward would see, also where ZeRO-3 has sharded them."""
    import deepspeed

    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: parameter.detach().float().clone() for name, parameter in parameters.items()}


def rate(step: int) -> float:
    return 0.1 / (step + 1)


def train_plainly(
    config: RunConfig, counts: list[int], size: int
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, gradient norms and final weights of the same training in plain torch on one rank."""
    model = ToyModel()
    groups = split_decay(model)
    settings = config.optimizer
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=settings.sgd_momentum)
    else:
        optimizer = torch.optim.AdamW(groups, betas=(settings.adam_beta1, settings.adam_beta2), eps=settings.adam_eps)
    losses, norms = [], []
    for step, count in enumerate(counts):
        batches = [batch for rank in range(size) for batch in make_batches(step, rank, size, count)]
        tokens = sum(batch.loss_mask.sum() for batch in batches)
        loss = sum(model(batch.tokens, batch.labels, batch.loss_mask) for batch in batches) / tokens
        optimizer.zero_grad()
        loss.backward()
        limit = settings.clip_grad or float("inf")
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), limit).item())
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = rate(step) * group["lr_mult"], 0.1 * group["wd_mult"]
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, {name: parameter.detach() for name, parameter in model.named_parameters()}
