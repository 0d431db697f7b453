"""Write the table of features that work together into docs/parallelism.md, or check that it is current.

Nothing in the table is said by hand: each pair of features is made a command line and goes through the rules that every
run goes through, and through the making of DeepSpeed's settings.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron.config.errors import ConfigError
from megatron.config.kernels import KernelsConfig
from megatron.config.rules import check_rules
from megatron.config.run import load_run_config
from megatron.config.sections import all_flags
from megatron.engine.settings import build_settings

FILE = Path(__file__).resolve().parents[1] / "docs/parallelism.md"
COMMAND = "python tools/generate_layout_table.py"
BEGIN, END = f"<!-- Written by `{COMMAND}`; do not edit from here -->\n", "<!-- to here -->\n"

WORLD_SIZE = 16
RUN = {
    **{"num_layers": "4", "hidden_size": "64", "num_attention_heads": "8", "seq_length": "64", "vocab_size": "256"},
    **{"mock_data": None, "lr": "1e-3", "train_iters": "1", "hidden_dropout": "0", "attention_dropout": "0"},
}
"""A small run; None stands for a switch that is on."""

Flags = Mapping[str, str | None]

BUDGET: dict[str, Flags] = {"products": {"recompute_budget_gib": "1"}}
"""What a choice of recompute cannot be without."""

FEATURES: dict[str, Flags] = {
    "tensor": {"tensor_model_parallel_size": "2"},
    "sequence": {"tensor_model_parallel_size": "2", "sequence_parallel": None},
    "halves": {
        **{"tensor_model_parallel_size": "2", "sequence_parallel": None},
        **{"tp_comm_overlap": "halves", "micro_batch_size": "2"},
    },
    "inputs kept": {"tensor_model_parallel_size": "2", "sequence_parallel": None, "keep_gathered_inputs": None},
    "copies": {"tensor_model_parallel_size": "2", "sequence_parallel": None, "tp_comm_overlap": "copies"},
    "Ulysses": {"ds_sequence_parallel_size": "2"},
    "pipeline": {"pipeline_model_parallel_size": "2"},
    **{f"ZeRO {stage}": {"zero_stage": str(stage)} for stage in range(4)},
    "optimizer on host": {"cpu_optimizer": None},
    "weights on host": {"remote_device": "cpu"},
    **{
        f"recompute {choice}": {"recompute_granularity": choice, **BUDGET.get(choice, {})}
        for choice in all_flags()["recompute_granularity"].info.choices
        if choice != KernelsConfig.recompute_granularity
    },
    "split inputs": {
        **{"recompute_granularity": "full", "distribute_saved_activations": None},
        "tensor_model_parallel_size": "2",
    },
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "fp8": {"precision": "bf16", "fp8": None},
    "CUDA graphs": {"precision": "bf16", "cuda_graph": None},
    "document masks": {"reset_attention_mask": None},
    "dropout": {"hidden_dropout": "0.1", "attention_dropout": "0.1"},
}
"""What is crossed with each other, as flags by the name of their field."""

LEFT_OPEN: dict[str, tuple[str, ...]] = {"zero_stage": ("1", "3", "0"), "precision": ("bf16", "fp32")}
"""What is chosen such that a pair works, where neither feature says it; the first is the default."""


@dataclass
class Table:
    """The cells below the diagonal, and the sentences that they refer to by number."""

    cells: dict[tuple[str, str], str] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)

    def add(self, pair: tuple[str, str]) -> None:
        """Find out whether two features go together."""
        merged = merge(*(FEATURES[name] for name in pair))
        if merged is None:
            self.cells[pair] = "-"
            return
        broken = fewest_refusals(merged)
        self.sentences += [sentence for sentence in broken if sentence not in self.sentences]
        numbers = sorted(self.sentences.index(sentence) + 1 for sentence in broken)
        self.cells[pair] = ", ".join(map(str, numbers)) or "yes"


def main() -> int:
    """Write or check the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the table is not current")
    check = parser.parse_args().check
    present = FILE.read_text(encoding="utf-8")
    current = document(present)
    if current == present:
        return 0
    if check:
        print(f"{FILE.name} is not current: run `{COMMAND}` and commit what it writes.", file=sys.stderr)
        return 1
    FILE.write_text(current, encoding="utf-8")
    print(f"wrote {FILE.name}")
    return 0


def document(text: str) -> str:
    """Put the table into the document, between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n" + "\n".join(lines(build_table())) + f"\n\n{END}{after}"


def build_table() -> Table:
    """Cross every feature with every one before it."""
    table = Table()
    for first, second in itertools.combinations(FEATURES, 2):
        table.add((second, first))
    return table


def lines(table: Table) -> Iterator[str]:
    """Give the table's lines, and the numbered sentences below it."""
    names = list(FEATURES)
    yield f"| | {' | '.join(names[:-1])} |"
    yield "|---|" + "---|" * (len(names) - 1)
    for row in names[1:]:
        yield f"| **{row}** | {' | '.join(table.cells.get((row, column), '') for column in names[:-1])} |"
    yield ""
    yield "What the program answers:"
    yield ""
    yield from (f"{number}. {sentence}" for number, sentence in enumerate(table.sentences, 1))


def merge(*features: Flags) -> dict[str, str | None] | None:
    """Put flags together; None when two features want one flag to have different values."""
    merged: dict[str, str | None] = {}
    for flags in features:
        if any(name in merged and merged[name] != value for name, value in flags.items()):
            return None
        merged |= flags
    return merged


def fewest_refusals(flags: Flags) -> list[str]:
    """Choose what the flags leave open; returns the sentences of the choice with fewest, none when it works."""
    answers = []
    for choice in itertools.product(*LEFT_OPEN.values()):
        answers.append(refusals({**dict(zip(LEFT_OPEN, choice, strict=True)), **flags}))
        if not answers[-1]:
            break
    return min(answers, key=len)


def refusals(flags: Flags, world_size: int = WORLD_SIZE) -> list[str]:
    """Give what the rules and the settings of DeepSpeed say against a run with these flags."""
    words = [word for name, value in {**RUN, **flags}.items() for word in (f"--{name}", value) if word is not None]
    try:
        config = load_run_config(words, world_size).config
        check_rules(config, world_size)
        parallel = config.parallel
        others = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        replicas = world_size // others // parallel.ds_sequence_parallel_size
        build_settings(config, data_parallel_size=replicas, device_type="cuda")
    except ConfigError as error:
        return list(error.messages)
    return []


if __name__ == "__main__":
    sys.exit(main())
