"""Recompute changes no number of a run, whatever the policy and the layout: dropout on, bit for bit.

Both runs do the same arithmetic in the same order, so nothing is left to a tolerance.
"""

import shlex

import pytest
import torch

from megatron.parallel.recompute_products import ProductBudget
from tests.layouts.recorded import MODELS, record
from tests.ranks import run_on_ranks

DROPOUT = shlex.split("--hidden-dropout 0.1 --attention-dropout 0.1 --num-layers 3 --eval-iters 0")
FULL = "--recompute-granularity full"
UNITS = f"{FULL} --recompute-num-layers 2"
FIRST = f"{FULL} --recompute-method block --recompute-num-layers 1"
SELECTIVE = "--recompute-granularity selective"
PRODUCTS = "--recompute-granularity products --recompute-budget-gib 5e-5"  # some of a unit's products
PRODUCTS_OF_STAGES = "--recompute-granularity products --recompute-budget-gib 2e-5"  # the same, of smaller ones
DIVIDED = "--distribute-saved-activations"

TENSOR = "--tensor-model-parallel-size 2"
SHARDED = f"{TENSOR} --sequence-parallel"
KEEPING = f"{SHARDED} --keep-gathered-inputs"
ULYSSES = "--ds-sequence-parallel-size 2"
STAGES = "--pipeline-model-parallel-size 2 --pipeline-partition 2,1 --micro-batch-size 1"

LAYOUTS = {
    1: [
        ("--zero-stage 0 --micro-batch-size 2", "gpt2", [FULL, UNITS, FIRST, SELECTIVE, PRODUCTS]),
        ("--zero-stage 1 --micro-batch-size 2 --attention-backend unfused", "llama", [SELECTIVE, PRODUCTS]),
    ],
    2: [
        (f"{TENSOR} --zero-stage 0 --micro-batch-size 2", "gpt2", [f"{UNITS} {DIVIDED}", f"{PRODUCTS} {DIVIDED}"]),
        (f"{TENSOR} --zero-stage 1 --micro-batch-size 2", "llama", [f"{FIRST} {DIVIDED}", SELECTIVE]),
        (f"{KEEPING} --zero-stage 2 --micro-batch-size 2", "llama tied, query norms", [FULL, SELECTIVE, PRODUCTS]),
        (f"{SHARDED} --zero-stage 3 --micro-batch-size 2", "gpt2", [UNITS, SELECTIVE, PRODUCTS]),
        (f"{SHARDED} --tp-comm-overlap halves --micro-batch-size 2", "gpt2", [UNITS, SELECTIVE, PRODUCTS]),
        (f"{ULYSSES} --zero-stage 1 --micro-batch-size 2", "gpt2", [FIRST, SELECTIVE, PRODUCTS]),
        (f"{ULYSSES} --zero-stage 3 --micro-batch-size 2", "llama", [SELECTIVE, PRODUCTS]),
        ("--zero-stage 2 --micro-batch-size 1", "gpt2 untied, documents", [UNITS, SELECTIVE, PRODUCTS]),
        (STAGES, "gpt2", [FULL, UNITS, FIRST, SELECTIVE, PRODUCTS_OF_STAGES]),
        (STAGES, "llama", [f"{UNITS} --recompute-inputs-on-host"]),
    ],
    4: [
        (f"{STAGES} {TENSOR}", "gpt2", [f"{UNITS} {DIVIDED}", f"{PRODUCTS_OF_STAGES} {DIVIDED}"]),
        (f"{STAGES} {SHARDED}", "llama", [SELECTIVE, PRODUCTS_OF_STAGES]),
        (f"{STAGES} {ULYSSES}", "gpt2 untied, documents", [UNITS, SELECTIVE, PRODUCTS_OF_STAGES]),
        (f"{ULYSSES} {SHARDED} --zero-stage 3 --micro-batch-size 4", "llama tied, query norms", [SELECTIVE, PRODUCTS]),
    ],
}


def differences(layouts):
    """For each layout and policy: how the run differs from that of the layout without recompute, and what it kept."""
    found, kept = {}, note_kept_products()
    for layout, model, policies in layouts:
        flags = [*MODELS[model], *DROPOUT, *shlex.split(layout)]
        plain = record(flags)
        for policy in policies:
            kept.clear()
            run = record([*flags, *shlex.split(policy)])
            assert all(kept), "each unit is to keep some products"
            assert bool(kept) == ("products" in policy)
            found[layout, model, policy] = [
                name for name in ("losses", "grad_norms", "params_norms") if getattr(run, name) != getattr(plain, name)
            ] + [name for name, weight in plain.final.items() if not torch.equal(run.final[name], weight)]
        assert len(set(plain.losses)) == len(plain.losses) == 3, "each step is to change the weights"
    return found


def note_kept_products():
    """The number of products that each unit of this process keeps from now on."""
    numbers, choose = [], ProductBudget.choose

    def noted(self, products, total):
        kept = choose(self, products, total)
        numbers.append(len(kept))
        return kept

    ProductBudget.choose = noted
    return numbers


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_recompute_changes_no_number_of_a_run(ranks):
    for found in run_on_ranks(ranks, differences, LAYOUTS[ranks], initialize=False, deepspeed=True):
        assert {case: names for case, names in found.items() if names} == {}
        assert len(found) == sum(len(policies) for _, _, policies in LAYOUTS[ranks])
