"""The real model under DeepSpeed: tied embedding, recompute, documents and every ZeRO stage, against torch alone."""

import pytest
import torch
import torch.distributed as dist

from megatron.parallel.recompute import FULL
from tests.engine import toy
from tests.model.tiny import VOCAB_SIZE, tiny_gpt
from tests.ranks import run_on_ranks

LENGTH = 8
TIED, UNTIED = {"untie_embeddings_and_output_weights": False}, {"untie_embeddings_and_output_weights": True}
RECOMPUTED = {"recompute_policy": FULL}
CASES = [
    (0, TIED),
    (1, TIED | RECOMPUTED),
    (2, UNTIED | RECOMPUTED),
    (3, TIED),
    (3, TIED | RECOMPUTED),
    (3, UNTIED | RECOMPUTED),
]


def make_batch(step, rank, masked=True):
    """One sample of two documents, told by a mask or by ids: positions anew, no loss at the first one's end."""
    text = torch.randint(VOCAB_SIZE, (1, LENGTH + 1), generator=torch.Generator().manual_seed(10 * step + rank))
    document = torch.tensor([0, 0, 0] + [1] * (LENGTH - 3))
    return toy.ToyBatch(
        tokens=text[:, :-1],
        labels=text[:, 1:],
        loss_mask=torch.tensor([[1.0, 1, rank] + [1.0] * (LENGTH - 3)]),
        position_ids=torch.tensor([[0, 1, 2, *range(LENGTH - 3)]]),
        attention_mask=(document[:, None] == document[None, :])[None, None] if masked else None,
        document_ids=None if masked else document[None].int(),
    )


def train(cases):
    answers = []
    for stage, options in cases:
        config = toy.run_config(stage=stage, optimizer="sgd", clip_grad=0.5)
        engine = toy.build_engine(config, model=tiny_gpt(**options))
        steps = [engine.train_step([make_batch(step, dist.get_rank(), step > 0)], 0.1, 0.1) for step in range(3)]
        numbers = [(result.loss.item(), result.grad_norm.item()) for result in steps]
        held = sum(parameter.numel() for parameter in engine.module.parameters())
        weights = toy.full_weights(engine)
        assert (held < 0.1 * sum(weight.numel() for weight in weights.values())) == (stage == 3)
        answers.append((numbers, weights))
        engine.close()
    return answers


def train_plainly(options):
    model = tiny_gpt(**options)
    optimizer = torch.optim.SGD(toy.split_decay(model), lr=0.1, momentum=0.9)
    numbers = []
    for step in range(3):
        batches = [make_batch(step, rank) for rank in range(2)]
        losses = [
            model(batch.tokens, batch.labels, batch.loss_mask, batch.position_ids, batch.attention_mask)
            for batch in batches
        ]
        loss = sum(losses) / sum(batch.loss_mask.sum() for batch in batches)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 0.1 * group["lr_mult"], 0.1 * group["wd_mult"]
        optimizer.step()
        numbers.append((loss.item(), norm.item()))
    return numbers, dict(model.named_parameters())


def test_gpt_on_two_ranks_equals_gpt_alone_at_every_zero_stage():
    for answers in run_on_ranks(2, train, CASES, deepspeed=True):
        for (stage, options), (numbers, weights) in zip(CASES, answers, strict=True):
            expected_numbers, expected = train_plainly(options)
            for step, pair in enumerate(numbers):
                assert pair == pytest.approx(expected_numbers[step], rel=1e-5), (stage, options, step)
            assert weights.keys() == expected.keys()
            for name, weight in expected.items():
                torch.testing.assert_close(weights[name], weight.detach(), rtol=1e-4, atol=2e-6)
