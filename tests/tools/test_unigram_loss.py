"""A run's validation loss beside that of token frequencies, on the same tokens."""

import json
import math

import numpy as np
import pytest
import torch

from megatron.checkpoint import whole
from megatron.config.data import DataConfig
from megatron.config.model import ModelConfig
from megatron.config.optimizer import OptimizerConfig
from megatron.config.run import build_run_config
from megatron.config.training import TrainingConfig
from megatron.data.indexed import IndexedDatasetWriter
from tools.unigram_loss import main, training_counts, unigram_loss, validation_tokens

VOCAB_SIZE = 8
NUM_SAMPLES = 6
SEQ_LENGTH = 4


@pytest.fixture
def run(tmp_path):
    """A finished run's folder and config: nine training documents, three of validation."""
    generator = np.random.default_rng(0)
    with IndexedDatasetWriter(tmp_path / "text", np.uint16) as writer:
        for _ in range(12):
            writer.add_document(generator.integers(0, VOCAB_SIZE - 1, size=20))
    config = build_run_config(
        world_size=1,
        model=ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1),
        optimizer=OptimizerConfig(lr=1e-3),
        training=TrainingConfig(global_batch_size=2, eval_iters=NUM_SAMPLES // 2, train_iters=1),
        data=DataConfig(
            data_path=(str(tmp_path / "text"),), split="9,3,0", seq_length=SEQ_LENGTH, vocab_size=VOCAB_SIZE
        ),
    )
    write_checkpoint(tmp_path, config)
    return tmp_path, config


def write_checkpoint(folder, config):
    whole.write_checkpoint(folder, [("w", torch.ones(2))], config=config.to_json(), iteration=1)


def write_evaluations(folder, *losses, tokens=NUM_SAMPLES * SEQ_LENGTH):
    records = [{"kind": "train", "lm_loss": 0.1}]
    records += [
        {"kind": "evaluation", "split": "validation", "iteration": step, "lm_loss": loss, "tokens": tokens}
        for step, loss in enumerate(losses)
    ]
    records.append({"kind": "evaluation", "split": "test", "iteration": 9, "lm_loss": 0.2, "tokens": tokens})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_unigram_loss_is_the_entropy_of_smoothed_counts():
    counts = np.array([2, 0, 0, 4])
    assert unigram_loss(counts, np.array([0, 3, 3, 1])) == pytest.approx(
        -(math.log(3 / 10) + 2 * math.log(5 / 10) + math.log(1 / 10)) / 4
    )


def test_counts_are_of_training_documents_and_tokens_of_validation(run):
    _, config = run
    counts, tokens = training_counts(config), validation_tokens(config)
    assert (len(counts), counts.sum()) == (VOCAB_SIZE, 9 * 20)
    assert len(tokens) == NUM_SAMPLES * SEQ_LENGTH


def test_better_run_passes_and_worse_run_fails(run, capsys):
    folder, config = run
    unigram = unigram_loss(training_counts(config), validation_tokens(config))
    write_evaluations(folder, unigram + 1, unigram - 0.25)  # the last evaluation counts
    assert main(["--load", str(folder)]) == 0
    assert "beats token frequencies by 0.2500 nats a token" in capsys.readouterr().out
    write_evaluations(folder, unigram - 1, unigram + 0.25)
    assert main(["--load", str(folder)]) == 1
    assert "does NOT beat token frequencies: it is 0.2500 nats a token worse" in capsys.readouterr().out


def test_evaluation_of_other_tokens_is_refused(run, capsys):
    folder, _ = run
    write_evaluations(folder, 1.0, tokens=NUM_SAMPLES * SEQ_LENGTH - 1)
    assert main(["--load", str(folder)]) == 2
    assert "the run's evaluation counted 23 tokens and its flags give 24" in capsys.readouterr().err


def test_what_is_missing_is_named(run, capsys):
    folder, _ = run
    assert main(["--load", str(folder)]) == 2
    assert "metrics.jsonl does not exist" in capsys.readouterr().err
    write_evaluations(folder)
    assert main(["--load", str(folder)]) == 2
    assert "holds no validation loss" in capsys.readouterr().err
    assert main(["--load", str(folder / "none")]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
