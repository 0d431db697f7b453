"""The certificate sees each of the defects that lost runs to others, and names the parameters that suffer."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from megatron.training.certificate import Certificate
from tests.layouts import defects
from tests.layouts.certified import certify_all, task_of

TASKS = {
    "sharded": "--tensor-model-parallel-size 2 --sequence-parallel --zero-stage 0",
    "tensor": "--tensor-model-parallel-size 2 --zero-stage 0 --position-embedding-type rope --reset-attention-mask",
    "data": "--zero-stage 0 --normalization rmsnorm",
    "stages": "--pipeline-model-parallel-size 2 --pipeline-partition 1,1",
    "ulysses": "--ds-sequence-parallel-size 2 --zero-stage 1",
    "sharded, dropout": "--tensor-model-parallel-size 2 --sequence-parallel --zero-stage 1 --recompute-granularity full"
    " --hidden-dropout 0.1 --attention-dropout 0.1",
    "tensor, dropout": "--tensor-model-parallel-size 2 --zero-stage 1 --hidden-dropout 0.1 --attention-dropout 0.1",
}

BLOCKS = ("2", "3")
PRODUCTS = ("attention.qkv", "attention.output", "mlp.up", "mlp.down")
KINDS = ("weight", "bias")
EMBEDDING = "tied_modules.word_embeddings.weight"
NORMED = ("4", *(f"{block}.{norm}" for block in BLOCKS for norm in ("attention_norm", "mlp_norm")))
NORMS = {f"{norm}.{kind}" for norm in NORMED for kind in KINDS}
MATRICES = {f"{block}.{product}.weight" for block in BLOCKS for product in PRODUCTS}
BIASES = {f"{block}.{product}.bias" for block in BLOCKS for product in PRODUCTS}
FIRST_STAGE = {EMBEDDING, "1.table.weight"} | {name for name in NORMS | MATRICES | BIASES if name.startswith("2.")}
EVERYTHING = {EMBEDDING, "1.table.weight"} | NORMS | MATRICES | BIASES
STREAMS = {"2.attention", "3.attention"}
HIDDEN_STREAMS = {"1.dropout", "2.dropout", "3.dropout"}


@dataclass(frozen=True)
class Planted:
    """A defect in a layout, and what the certificate must say of it.

    Attributes:
        exactly: kind of number -> the names that differ, no more and no less.
        among: kind of number -> names that differ, perhaps among others.
    """

    task: str
    defect: defects.Defect
    exactly: dict[str, set[str]] = field(default_factory=dict)
    among: dict[str, set[str]] = field(default_factory=dict)

    def problems(self, certificate: Certificate) -> list[str]:
        found = {kind: set(certificate.differing(kind)) for kind in self.exactly | self.among}
        wrong = [f"{kind}: {found[kind]}, not {names}" for kind, names in self.exactly.items() if found[kind] != names]
        wrong += [f"{kind}: {found[kind]} lacks {names}" for kind, names in self.among.items() if names - found[kind]]
        return [*wrong, *(["EQUAL"] if certificate.equal else [])]


CASES = [
    Planted(
        "sharded",
        defects.norm_gradients_are_not_summed,
        exactly={"gradient": NORMS, "start": set()},
    ),
    Planted(
        "sharded",
        defects.tokens_are_sliced_before_the_embedding,
        among={"gradient": {EMBEDDING, *MATRICES}, "loss": {"step 1"}},
    ),
    Planted(
        "sharded",
        defects.hidden_states_are_scattered_twice,
        among={"gradient": {EMBEDDING, *MATRICES}, "loss": {"step 1"}},
    ),
    Planted(
        "tensor",
        defects.rotary_tables_hold_cosines_only,
        among={"gradient": {f"{block}.attention.qkv.weight" for block in BLOCKS}, "loss": {"step 1"}},
    ),
    Planted(
        "sharded",
        defects.heads_are_cut_in_thirds,
        among={"gradient": {f"{block}.attention.qkv.{kind}" for block in BLOCKS for kind in KINDS}},
    ),
    Planted("data", defects.loss_is_averaged_on_each_rank, among={"gradient": {EMBEDDING, *MATRICES}}),
    Planted(
        "stages",
        defects.tied_gradient_is_not_summed,
        exactly={"gradient": {EMBEDDING}, "start": set()},
    ),
    Planted(
        "sharded",
        defects.shards_start_like_their_neighbour,
        exactly={"start": {EMBEDDING, "1.table.weight", *MATRICES}},
    ),
    Planted(
        "sharded, dropout",
        defects.tensor_ranks_drop_alike,
        exactly={"random stream": STREAMS | HIDDEN_STREAMS, "gradient": set(), "recompute": set()},
    ),
    Planted(
        "tensor, dropout",
        defects.every_rank_seeds_for_itself,
        exactly={"random stream": HIDDEN_STREAMS, "gradient": set()},
    ),
    Planted(
        "sharded, dropout",
        defects.recompute_draws_other_masks,
        exactly={"random stream": set(), "gradient": set()},
        among={"recompute": {EMBEDDING, *MATRICES}},
    ),
    Planted(
        "sharded",
        defects.gradient_norm_counts_copies,
        exactly={"gradient": set(), "gradient norm": {f"step {step}" for step in (1, 2, 3)}},
    ),
    Planted(
        "tensor",
        defects.document_mask_is_dropped,
        among={"gradient": MATRICES, "loss": {"step 1"}},
    ),
    Planted(
        "sharded",
        defects.row_bias_is_added_by_every_rank,  # zero at the start: a step has to be taken before it shows
        exactly={"loss": {"step 2", "step 3"}, "gradient": set()},
        among={"travel": MATRICES},
    ),
    Planted(
        "ulysses",
        defects.heads_come_back_in_another_order,
        among={"gradient": {f"{block}.attention.output.weight" for block in BLOCKS}, "loss": {"step 1"}},
    ),
    Planted(
        "ulysses",
        defects.positions_start_anew_on_each_rank,
        among={"gradient": {"1.table.weight"}, "loss": {"step 1"}},
    ),
    Planted(
        "stages",
        defects.first_stage_drops_a_micro_batch,
        exactly={"gradient": FIRST_STAGE, "start": set()},
    ),
    Planted(
        "sharded",
        defects.padding_takes_part_in_the_softmax,
        among={"gradient": {EMBEDDING, *NORMS}, "loss": {"step 1"}},
    ),
    Planted(
        "data",
        defects.gradients_stay_on_their_data_rank,
        among={"gradient": {EMBEDDING, *MATRICES}, "travel": MATRICES},
    ),
]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """The certificates of the layouts as they are, and of each case."""
    tasks = {name: task_of(flags, 2, 3, tmp_path_factory.mktemp("tasks") / "task") for name, flags in TASKS.items()}
    right = [(name, defects.none) for name in TASKS]
    answers = certify_all(tasks, [*right, *((case.task, case.defect) for case in CASES)])
    return dict(zip(TASKS, answers, strict=False)), answers[len(TASKS) :]


def test_without_a_defect_every_layout_is_equal(certificates):
    for name, certificate in certificates[0].items():
        assert certificate.equal, (name, certificate.worst_first[:5])
        assert set(certificate.differing()) == set()


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.defect.__name__ for case in CASES])
def test_a_planted_defect_is_seen_and_its_parameters_are_named(certificates, index):
    problems = CASES[index].problems(certificates[1][index])
    assert not problems, "\n".join(problems)
