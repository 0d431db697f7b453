"""A model in pipeline stages is the model on one rank: loss, gradient norm, evaluation and every weight after SGD."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.checkpoint.fragments import open_tensors
from megatron.model.gpt import GPT
from megatron.model.init import initialize_parameters
from megatron.parallel.groups import create_groups
from megatron.parallel.mesh import Mesh
from megatron.parallel.recompute import RecomputePolicy
from tests.engine import toy
from tests.model.tiny import LLAMA, VOCAB_SIZE, backend_called, random_tokens, tiny_config, tiny_gpt
from tests.ranks import run_on_ranks

CLIP = 0.5
STEPS = [4, 2, 6]  # micro-batches of all data-parallel ranks together: the batch size changes from step to step
TIED = "tied_modules.word_embeddings.weight"


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and how many blocks each stage holds."""

    counts: tuple[int, ...]
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    precision: str = "fp32"
    offload: bool = False
    fp32_sums: bool = True

    @property
    def shape(self):
        return {"num_layers": sum(self.counts), **self.model}


def make_batch(index: int, length: int = 8, masked: bool = True) -> toy.ToyBatch:
    """One sample of two documents: no attention across, positions anew, a loss mask as uneven as can be.

    The documents are told by a mask of s x s, or by their ids.
    """
    text, cut = random_tokens(1, length + 1, seed=index), 1 + index % (length - 1)
    document = torch.arange(length) >= cut
    density = 0.0 if index % 5 == 0 else (index % 7) / 6
    mask = torch.rand(1, length, generator=torch.Generator().manual_seed(index)) < density
    return toy.ToyBatch(
        tokens=text[:, :-1],
        labels=text[:, 1:],
        loss_mask=mask.float(),
        position_ids=torch.cat((torch.arange(cut), torch.arange(length - cut)))[None],
        attention_mask=(document[:, None] == document[None, :])[None, None] if masked else None,
        document_ids=None if masked else document[None].int(),
    )


def own_batches(step: int, count: int, groups: Any) -> list[toy.ToyBatch]:
    """This data-parallel rank's share of a step of `count` micro-batches, the same on all stages."""
    indices = range(groups.data.rank, count, groups.data.size)
    return [make_batch(100 * step + index, masked=index % 3 > 0) for index in indices]


def build(case: Case, **changes: Any) -> tuple[Any, Any]:
    from megatron.engine.pipeline import build_pipeline_engine, build_stage
    from megatron.engine.settings import build_settings

    stages = len(case.counts)
    groups = create_groups(Mesh(pipeline=stages, data=dist.get_world_size() // stages), dist.get_rank())
    recompute = {name: value for name, value in case.model.items() if name.startswith("recompute")}
    config = tiny_config(**{name: value for name, value in case.shape.items() if name not in recompute})
    with torch.device("meta"):
        model = GPT(config, vocab_size=VOCAB_SIZE, groups=groups, attention=backend_called("sdpa"), **recompute)
    device = torch.device("cpu")
    stage = build_stage(model, case.counts, groups, device)
    initialize_parameters(stage, 1, config.init_method_std, config.num_layers)
    training = {"precision": case.precision, "accumulate_allreduce_grads_in_fp32": case.fp32_sums}
    run = toy.run_config(
        optimizer="sgd",
        clip_grad=CLIP,
        samples=groups.data.size,
        cpu_optimizer=case.offload,
        initial_loss_scale=64.0,
        **{**training, **changes},
    )
    settings = build_settings(run, None, data_parallel_size=groups.data.size, device_type="cpu")
    return build_pipeline_engine(stage, toy.split_decay(stage), settings, groups, device), groups


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().float().clone() for name, weight in engine.module.named_parameters()}


def train(cases: list[Case]) -> list[dict[str, Any]]:
    answers = []
    for case in cases:
        engine, groups = build(case)
        evaluated = [engine.evaluate(own_batches(9, 4, groups))]
        numbers = []
        for step, count in enumerate(STEPS):
            result = engine.train_step(own_batches(step, count, groups), 0.1, 0.1)
            numbers.append((result.loss.item(), result.grad_norm.item()))
            assert not result.skipped
        assert engine.module.training
        evaluated += [engine.evaluate(own_batches(8, 6, groups)), engine.evaluate([])]
        sums = [(loss.item(), tokens.item()) for loss, tokens in evaluated]
        answers.append({"numbers": numbers, "evaluated": sums, "weights": weights_of(engine)})
        engine.close()
    return answers


def loss_sum(model: GPT, batches: list[toy.ToyBatch]) -> Any:
    return sum(
        model(batch.tokens, batch.labels, batch.loss_mask, batch.position_ids, batch.attention_mask)
        for batch in batches
    )


def train_plainly(case: Case) -> dict[str, Any]:
    """The same training of the flat model in plain torch."""
    model = tiny_gpt(**case.shape)
    optimizer = torch.optim.SGD(toy.split_decay(model), lr=0.1, momentum=0.9)
    evaluated, numbers = [], []

    def evaluate(step: int, count: int) -> None:
        batches = [make_batch(100 * step + index) for index in range(count)]
        with torch.no_grad():
            evaluated.append((loss_sum(model, batches).item(), sum(batch.loss_mask.sum().item() for batch in batches)))

    evaluate(9, 4)
    for step, count in enumerate(STEPS):
        batches = [make_batch(100 * step + index) for index in range(count)]
        loss = loss_sum(model, batches) / sum(batch.loss_mask.sum() for batch in batches)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 0.1 * group["lr_mult"], 0.1 * group["wd_mult"]
        optimizer.step()
        numbers.append((loss.item(), norm.item()))
    evaluate(8, 6)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    return {"numbers": numbers, "evaluated": [*evaluated, (0.0, 0.0)], "weights": weights}


def differences(case: Case, answers: list[dict[str, Any]], bound: float) -> list[str]:
    """What of the ranks' answers is further from the plain training than `bound`, relative."""
    expected, found = train_plainly(case), []
    for rank, answer in enumerate(answers):
        where = f"{case} rank {rank}"
        for key in ("numbers", "evaluated"):
            for got, wanted in zip(answer[key], expected[key], strict=True):
                if got != pytest.approx(wanted, rel=bound):
                    found.append(f"{where} {key}: {got}, not {wanted}")
        for name, weight in answer["weights"].items():
            wanted = expected["weights"][name]
            error = (weight - wanted).norm() / wanted.norm()
            if not error <= bound:
                found.append(f"{where} {name}: off by {error:.1e}")
    return found


def check_names(case: Case, answers: list[dict[str, Any]]) -> None:
    """Each rank holds the blocks of its stage alone, and all together have the flat model's names."""
    held = [set(answer["weights"]) for answer in answers]
    assert set().union(*held) == {name for name, _ in tiny_gpt(**case.shape).named_parameters()}
    replicas = len(answers) // len(case.counts)
    first = 2
    for stage, count in enumerate(case.counts):
        for rank in range(stage * replicas, (stage + 1) * replicas):
            blocks = {name.partition(".")[0] for name in held[rank] if ".attention." in name}
            assert blocks == {str(first + block) for block in range(count)}
        first += count
    tied = [answer["weights"][TIED] for answer in answers if TIED in answer["weights"]]
    assert len(tied) == (0 if "untie_embeddings_and_output_weights" in case.model else 2 * replicas)
    assert all(torch.equal(copy, tied[0]) for copy in tied)


def poison(engine: Any) -> Any:
    """Make the next gradient of one of the last stage's weights infinite; returns how to stop that."""
    weight = next(weight for name, weight in engine.module.named_parameters() if ".mlp." in name)
    return weight.register_hook(lambda gradient: gradient * math.inf) if dist.get_rank() == 1 else None


def skip_a_step(cases: list[Case]) -> list[str]:
    problems = []
    for case in cases:
        outcomes = []
        for poisoned in (False, True):
            engine, groups = build(case)
            results = [engine.train_step(own_batches(1, 2, groups), 0.1, 0.1)]
            if poisoned:
                hook = poison(engine)
                bad = engine.train_step(own_batches(2, 2, groups), 0.1, 0.1)
                if hook is not None:
                    hook.remove()
                if not bad.skipped or math.isfinite(bad.grad_norm):
                    problems.append(f"{case}: not skipped: {bad}")
            results.append(engine.train_step(own_batches(3, 4, groups), 0.1, 0.1))
            outcomes.append(([(one.loss.item(), one.grad_norm.item()) for one in results], weights_of(engine)))
            engine.close()
        (clean, expected), (seen, weights) = outcomes
        if clean != seen:
            problems.append(f"{case}: {seen}, not {clean}")
        problems += [f"{case}: {name}" for name in expected if not torch.equal(weights[name], expected[name])]
    return problems


def change_shape() -> list[str]:
    """Sequences of another length in training and evaluation, and refusal of two lengths in one step."""
    engine, _ = build(Case((1, 1)))
    model = tiny_gpt(num_layers=2)
    problems = []
    for length in (8, 5, 8):
        batches = [make_batch(3 + index, length) for index in range(2)]
        tokens = sum(batch.loss_mask.sum().item() for batch in batches)
        wanted = loss_sum(model, batches).item()
        evaluated, _ = engine.evaluate(batches)
        trained = engine.train_step(batches, 0.0, 0.0).loss * tokens
        if [evaluated.item(), trained.item()] != pytest.approx([wanted, wanted], rel=1e-5):
            problems.append(f"length {length}: {evaluated} and {trained}, not {wanted}")
    with pytest.raises(ValueError, match="must agree"):
        engine.train_step([make_batch(3, 8), make_batch(4, 5)], 0.0, 0.0)
    with pytest.raises(ValueError, match="at least one micro-batch"):
        engine.train_step([], 0.0, 0.0)
    engine.close()
    return problems


def drift_with_deepspeeds_own_sum() -> torch.Tensor:
    """Train with DeepSpeed's own sum of tied gradients; returns this rank's copy of the weight."""
    engine, groups = build(Case((1, 1), precision="fp16"))
    del engine._engine._INSTRUCTION_MAP
    engine.train_step(own_batches(1, 2, groups), 0.1, 0.1)
    weight = weights_of(engine)[TIED]
    engine.close()
    return weight


def resume(cases: list[Case], folder: str) -> None:
    for number, case in enumerate(cases):
        place = Path(folder) / f"case{number}" / "step1"
        engine, groups = build(case)
        engine.train_step(own_batches(0, 4, groups), 0.1, 0.1)
        toy.save(engine, place)
        saved = weights_of(engine)
        unbroken = engine.train_step(own_batches(1, 6, groups), 0.1, 0.1)
        expected = weights_of(engine)
        engine.close()

        engine, groups = build(case)
        toy.load(engine, place)
        resumed = engine.train_step(own_batches(1, 6, groups), 0.1, 0.1)
        assert resumed.loss.item() == unbroken.loss.item()
        assert resumed.grad_norm.item() == unbroken.grad_norm.item()
        assert resumed.loss_scale == unbroken.loss_scale
        for name, weight in weights_of(engine).items():
            assert torch.equal(weight, expected[name]), (case, name)
        engine.close()

        whole = open_tensors(place)
        assert set(whole.names) == {name for name, _ in tiny_gpt(**case.shape).named_parameters()}
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[case.precision]
        assert all(torch.equal(whole.read(name).to(dtype).float(), weight) for name, weight in saved.items())

        other = dataclasses.replace(case, counts=case.counts[::-1], precision="fp32")
        engine, _ = build(other)
        toy.load(engine, place)
        for name, weight in weights_of(engine).items():
            assert torch.equal(weight, whole.read(name)), (other, name)
        engine.close()


@dataclasses.dataclass(frozen=True)
class Work:
    """What one set of rank processes does; their start takes longer than all of it."""

    train: list[Case]
    train_half: list[Case] = dataclasses.field(default_factory=list)
    skip: list[Case] = dataclasses.field(default_factory=list)
    resume: list[Case] = dataclasses.field(default_factory=list)


RECOMPUTE = {"recompute_policy": RecomputePolicy(granularity="full", num_layers=2)}
WORK = {
    2: Work(
        train=[Case((1, 2)), Case((3, 1), LLAMA | RECOMPUTE), Case((2, 2), RECOMPUTE)],
        train_half=[
            Case((1, 1), precision=precision, offload=offload, fp32_sums=fp32_sums)
            for precision in ("bf16", "fp16")
            for offload in (False, True)
            for fp32_sums in (False, True)
        ],
        skip=[Case((1, 1), precision=precision) for precision in ("fp32", "bf16", "fp16")]
        + [Case((1, 1), offload=True)],
        resume=[Case((1, 2)), Case((1, 1), LLAMA, precision="bf16"), Case((1, 1), precision="fp16")],
    ),
    3: Work(train=[Case((2, 1, 1), RECOMPUTE), Case((1, 2, 1), LLAMA)]),
    4: Work(train=[Case((1, 2)), Case((1, 1), LLAMA)], resume=[Case((1, 2)), Case((1, 1), precision="bf16")]),
}


def do(work: Work, folder: str) -> dict[str, Any]:
    toy.pretend_fp16_works()
    answers = {
        "trained": train(work.train),
        "trained half": train(work.train_half),
        "skipped": skip_a_step(work.skip),
    }
    if work.skip:
        answers["shapes"] = change_shape()
        answers["drift"] = drift_with_deepspeeds_own_sum()
    if work.resume:
        resume(work.resume, folder)
    return answers


@pytest.fixture(scope="module", params=WORK)
def done(request, tmp_path_factory):
    """The work of a set of ranks, and each rank's answers."""
    work = WORK[request.param]
    return work, run_on_ranks(request.param, do, work, str(tmp_path_factory.mktemp("saved")), deepspeed=True)


def test_stages_train_and_evaluate_like_one_rank(done):
    work, answers = done
    for cases, key, bound in ((work.train, "trained", 1e-5), (work.train_half, "trained half", 3e-2)):
        for index, case in enumerate(cases):
            of_ranks = [answer[key][index] for answer in answers]
            check_names(case, of_ranks)
            problems = differences(case, of_ranks, bound)
            assert not problems, "\n".join(problems)


def test_a_bad_gradient_of_one_stage_skips_the_step_on_all(done):
    for answer in done[1]:
        assert not answer["skipped"], "\n".join(answer["skipped"])


def test_sequences_may_change_their_length_between_steps(done):
    for answer in done[1]:
        assert not answer.get("shapes"), "\n".join(answer["shapes"])


def test_deepspeed_still_forgets_tied_gradients_that_are_summed_in_fp32(done):
    copies = [answer["drift"] for answer in done[1] if "drift" in answer]
    assert not copies or not torch.equal(*copies)
