"""Generation: prompts are read at once, then one token after another, over a cache of keys and values.

Prompts of unequal length are padded on the right. Causality keeps the padding from every real token while the prompts
are read; later a mask hides it. So the tokens of a prompt do not depend on its neighbours.

Legend: b prompts, s sequence, h hidden, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron.config.errors import UserError
from megatron.model.context import Context, KeyValueCache
from megatron.model.gpt import GPT, run_stages
from megatron.model.head import whole_logits

PADDING_ID = 0  # any legal id: no real token ever sees it


class GenerationError(UserError, ValueError):
    """A prompt or a sampling value with which nothing can be generated."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from the model's distribution."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int = 0
    """Draw among the k likeliest; 0: among all."""
    top_p: float = 1.0
    """Draw among the likeliest whose probabilities reach p together."""
    greedy: bool = False
    """Take the likeliest."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            GenerationError: one is outside its range.
        """
        if self.temperature < 0:
            raise GenerationError(f"temperature {self.temperature} is negative; give 0 (greedy) or more")
        if self.top_k < 0:
            raise GenerationError(f"top_k {self.top_k} is negative; give 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise GenerationError(f"top_p {self.top_p} is outside (0, 1]; 1 keeps all tokens")


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    eod_id: int | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Continue each prompt.

    Args:
        model: its dropout is off while it generates.
        prompts: token ids, at least one each.
        max_new_tokens: the most tokens to append to a prompt.
        temperature: divides the logits; 0 is greedy.
        top_k: draw among the k likeliest tokens; 0: among all.
        top_p: draw among the likeliest tokens whose probabilities reach p together.
        greedy: take the likeliest token.
        eod_id: the token that ends a text; it is kept as the last one. None: nothing ends it.
        seed: with a prompt's index and the token's position it decides the random draw, whatever the other prompts are.

    Returns:
        For each prompt its new tokens.

    Raises:
        GenerationError: a prompt is empty or too long for a learned position table, or a value is outside its range.
        AttentionUnavailableError: the model's attention backend lacks what generation needs.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, greedy=greedy)
    if max_new_tokens < 0:
        raise GenerationError(f"max_new_tokens {max_new_tokens} is negative; give the number of tokens to append")
    _check_prompts(model, prompts, max_new_tokens)
    model.require("cache", True)
    model.require("mask", len(set(map(len, prompts))) > 1)  # the mask that hides padding
    was_training = model.training
    model.eval()
    try:
        return _generate(model, prompts, max_new_tokens, sampling, eod_id, seed)
    finally:
        model.train(was_training)


@torch.no_grad()
def _generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    eod_id: int | None,
    seed: int,
) -> list[list[int]]:
    new_tokens: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    if not running or max_new_tokens == 0:
        return new_tokens
    decoder = Decoder(model, prompts, max_new_tokens)
    while True:
        positions = [len(prompt) + len(new) for prompt, new in zip(prompts, new_tokens, strict=True)]
        draws = [draw(seed, index, position) for index, position in enumerate(positions)]
        chosen = choose(decoder.logits_bv, draws, sampling).tolist()
        for index in sorted(running):
            new_tokens[index].append(chosen[index])
            if chosen[index] == eod_id or len(new_tokens[index]) == max_new_tokens:
                running.remove(index)
        if not running:
            return new_tokens
        decoder.append(chosen)


class Decoder:
    """Logits of the token after each prompt, kept up to date while tokens are appended."""

    def __init__(self, model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.padded_length = max(map(len, prompts))
        self.lengths_b = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        self.equal = len(set(map(len, prompts))) == 1
        self.num_appended = 0
        self.cache = KeyValueCache(model.config.num_layers, self.padded_length + max_new_tokens)
        padded = [[*prompt, *[PADDING_ID] * (self.padded_length - len(prompt))] for prompt in prompts]
        tokens_bs = torch.tensor(padded, device=self.device)
        self.logits_bv = self._run(tokens_bs, Context(cache=self.cache), self.lengths_b - 1)

    def append(self, tokens: Sequence[int]) -> None:
        """Append one token to each prompt."""
        position_ids, mask = None, None
        if not self.equal:
            position_ids = (self.lengths_b + self.num_appended).unsqueeze(1)
            slots = torch.arange(self.cache.length + 1, device=self.device)
            real_bs = (slots < self.lengths_b.unsqueeze(1)) | (slots >= self.padded_length)
            if window := self.model.config.attention_window:
                padding_b1 = (self.padded_length - self.lengths_b).unsqueeze(1)
                positions_bs = torch.where(slots < self.padded_length, slots, slots - padding_b1)
                real_bs &= positions_bs > position_ids - window
            mask = real_bs[:, None, None, :]
        tokens_bs = torch.tensor(tokens, device=self.device).unsqueeze(1)
        context = Context(position_ids=position_ids, attention_mask=mask, cache=self.cache)
        self.logits_bv = self._run(tokens_bs, context, torch.zeros_like(self.lengths_b))
        self.num_appended += 1

    def _run(self, tokens_bs: Tensor, context: Context, last_b: Tensor) -> Tensor:
        """Read tokens into the cache; returns the logits [b, v] after the token at index `last_b` of each prompt."""
        *body, head = self.model.stages()
        hidden_sbh = run_stages(body, tokens_bs, context)
        self.cache.advance(tokens_bs.shape[1])
        last_bh = hidden_sbh[last_b, torch.arange(len(last_b), device=self.device)]
        logits_bv = head(last_bh.unsqueeze(0), context).squeeze(0)
        return whole_logits(logits_bv, self.model.groups.tensor, self.model.vocab_size)


def choose(logits_bv: Tensor, draws: Sequence[float], sampling: Sampling) -> Tensor:
    """Pick a token id for each row of logits, [b], by where its draw in [0, 1) falls among the probabilities."""
    if sampling.greedy or sampling.temperature == 0:
        return logits_bv.argmax(dim=-1)
    # fp64, so that the sums over a large vocabulary leave no gap for a draw to fall into.
    logits, ids = (logits_bv.double() / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        logits = logits[:, : sampling.top_k]
    probabilities = logits.softmax(dim=-1)
    likelier = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill(likelier >= sampling.top_p, 0.0)
    reached = probabilities.cumsum(dim=-1)
    targets = torch.tensor(draws, dtype=reached.dtype, device=reached.device).unsqueeze(1) * reached[:, -1:]
    rank = (reached <= targets).sum(dim=-1, keepdim=True)
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
    return ids.gather(1, torch.minimum(rank, last)).squeeze(1)


def draw(seed: int, prompt: int, position: int) -> float:
    """Draw a number in [0, 1) that depends on its arguments alone."""
    return float(np.random.default_rng((seed, prompt, position)).random())


def _check_prompts(model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise GenerationError(f"prompt {index} is empty; give at least one token, such as the end-of-document one")
        if (highest := max(prompt)) >= model.vocab_size or min(prompt) < 0:
            raise GenerationError(f"prompt {index} holds token {highest}; ids are 0 .. {model.vocab_size - 1}")
        longest = model.config.max_position_embeddings
        if model.config.position_embedding_type == "learned_absolute" and len(prompt) + max_new_tokens > longest:
            raise GenerationError(
                f"prompt {index} has {len(prompt)} tokens and {max_new_tokens} new ones are asked for: more than the "
                f"{longest} learned positions; shorten one of them"
            )
