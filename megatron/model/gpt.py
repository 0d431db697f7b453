"""GPT: an ordered list of stages, and forward as a fold over that list.

Legend: s sequence, b micro-batch, h hidden, v padded vocabulary, t tensor ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor, is_grad_enabled, nn

from megatron.config.errors import ConfigError
from megatron.config.model import ModelConfig
from megatron.kernels.attention.interface import AttentionBackend
from megatron.kernels.attention.mask import and_causal
from megatron.kernels.attention.pick import AttentionUnavailableError
from megatron.kernels.attention.unfused import with_softmax
from megatron.kernels.choice import PLAIN, Kernels
from megatron.model.block import Block
from megatron.model.context import Context, KeyValueCache
from megatron.model.embedding import Positions, WordEmbedding
from megatron.model.halves import run_in_halves
from megatron.model.head import OutputHead, TiedOutputHead
from megatron.model.loss import chunked_masked_loss, masked_loss
from megatron.model.norm import Norm
from megatron.model.rotary import Rotary
from megatron.parallel.graphed import Graphed
from megatron.parallel.groups import ParallelGroups
from megatron.parallel.recompute import NONE, RecomputePolicy, recompute, recomputed
from megatron.parallel.ulysses import UlyssesAttention

TIED_EMBEDDING = "tied_modules.word_embeddings"
"""Where a tied word embedding is kept: the name that a pipelined engine gives a layer which two stages share."""


class GPT(nn.Module):
    """A decoder-only transformer.

    Stages: 0 word embedding, 1 positions, then the blocks, final norm, output head. A parameter is called
    "<stage>.<name>", or "tied_modules.word_embeddings.weight" where embedding and head share it, whatever the layout.
    Weights are empty until `initialize_parameters`.

    Args:
        config: the architecture, complete.
        vocab_size: token ids in use; it is padded to a multiple of `config.make_vocab_size_divisible_by`.
        groups: the ranks that share the model.
        attention: the chosen backend.
        sequence_parallel: keep only this tensor rank's shard of the sequence outside of the sharded products; the
            tensor ranks must then divide the length of the sequence.
        keep_gathered: whether blocks keep what they gathered of these shards for backward, t times the memory, which
            gathers them again otherwise.
        recompute_policy: which activations backward computes again instead of finding them kept.
        loss_chunk_size: tokens whose logits exist at a time where the loss is computed; 0: all of them.
        mlp_chunk_size: tokens for which the inside of an MLP exists at a time; 0: all of them.
        in_halves: whether blocks take a micro-batch in two halves, one of which computes while shards of the other
            travel (`halves.py`); an uneven one, or one with a cache, they take whole.
        kernels: what computes norms, activations and the like.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        vocab_size: int,
        groups: ParallelGroups,
        attention: AttentionBackend,
        sequence_parallel: bool = False,
        keep_gathered: bool = False,
        recompute_policy: RecomputePolicy = NONE,
        loss_chunk_size: int = 0,
        mlp_chunk_size: int = 0,
        in_halves: bool = False,
        kernels: Kernels = PLAIN,
    ) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.vocab_size = vocab_size
        self.padded_vocab_size = padded_vocab_size(vocab_size, config.make_vocab_size_divisible_by)
        self.groups = groups
        self.attention = with_softmax(attention, kernels.scaled_softmax)
        self.sequence_parallel = sequence_parallel
        self.keep_gathered = keep_gathered
        self.recompute_policy = recompute_policy
        self.loss_chunk_size = loss_chunk_size
        self.mlp_chunk_size = mlp_chunk_size
        self.in_halves = in_halves
        self._graphed_blocks: Graphed | None = None
        self.tied_modules = nn.ModuleDict()
        self._stage_names: list[str] = []
        for index, stage in enumerate(self._build_stages()):
            tied = index == 0 and not config.untie_embeddings_and_output_weights
            owner, name = (self.tied_modules, "word_embeddings") if tied else (self, str(index))
            owner.add_module(name, stage)
            self._stage_names.append(TIED_EMBEDDING if tied else name)

    def _build_stages(self) -> Iterator[nn.Module]:
        config, group, sharded = self.config, self.groups.tensor, self.sequence_parallel
        hidden, rows, padding = config.hidden_size, self.padded_vocab_size, self.padded_vocab_size - self.vocab_size
        embedding = WordEmbedding(rows, hidden, vocab_size=self.vocab_size, group=group, sequence_parallel=sharded)
        attend = UlyssesAttention(self._attention_core(), self.groups.ulysses)
        rotary = Rotary.from_config(config, self.kernels) if config.position_embedding_type == "rope" else None
        yield embedding
        yield Positions(config, group=group, sequence_parallel=sharded, kernels=self.kernels)
        for layer in range(config.num_layers):
            yield Block(
                config,
                layer=layer,
                group=group,
                attend=attend,
                rotary=rotary,
                sequence_parallel=sharded,
                keep_gathered=self.keep_gathered,
                mlp_chunk_size=self.mlp_chunk_size,
                kernels=self.kernels,
            )
        yield Norm(config, hidden, shards=group.sequence_shards(sharded), kernels=self.kernels)
        if config.untie_embeddings_and_output_weights:
            yield OutputHead(hidden, rows, bias=False, group=group, padding=padding, sequence_parallel=sharded)
        else:
            yield TiedOutputHead(embedding)

    def _attention_core(self) -> Callable[..., Tensor]:
        """Return what attends, recomputed under a selective policy.

        The exchange of Ulysses stays outside: what it brings takes the bytes of what it sends (but for repeated
        key/value heads), so that keeping the one or the other is the same, and no exchange is to be repeated.
        """
        attend, policy = self.attention.attend, self.recompute_policy
        return recomputed(attend, policy) if policy.recomputes_attention else attend

    def stages(self) -> list[nn.Module]:
        """Return the model in order; each stage takes a tensor and a `Context` and gives a tensor."""
        return [self.get_submodule(name) for name in self._stage_names]

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """Predict the token after each of `tokens`.

        Where sequences are divided over Ulysses ranks, s is the length of this rank's shard, of which tokens, labels,
        loss mask and position ids are; attention mask and document ids are of the whole sequence.

        Args:
            tokens: ids [b, s].
            labels: the ids that should be predicted, [b, s].
            loss_mask: weight of each label's loss, [b, s]; None: all ones.
            position_ids: position of each token, [b, s]; None: they count up.
            attention_mask: bool [b, 1, s, s'], True = may attend, on top of causality; None: causality alone.
            cache: keys and values of earlier tokens, to which those of `tokens` are appended.
            document_ids: which document of its sample a token is of, int [b, s], not falling along s: tokens attend
                inside their own, without a mask of s x s; None: anywhere.

        Returns:
            Without labels the logits [s, b, v/t]; with them the sum of the losses, an fp32 scalar.

        Raises:
            AttentionUnavailableError: the attention backend does not honour a mask, a cache or documents given.
            ConfigError: the tensor ranks are to divide the sequence and cannot.
        """
        context = self.context(tokens, position_ids, attention_mask, cache, document_ids)
        if labels is None:
            return self.run(tokens, context)
        return self.run_to_loss(tokens, context, range(len(self._stage_names)), labels, loss_mask)

    def context(
        self,
        tokens: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        document_ids: Tensor | None = None,
    ) -> Context:
        """Put together what every stage may read of a micro-batch; the arguments are those of `forward`.

        Of the tokens only the length counts.

        Raises:
            AttentionUnavailableError: the attention backend does not honour a mask, a cache or documents given.
            ConfigError: the tensor ranks are to divide the sequence and cannot.
        """
        self._require_whole_shards(tokens.shape[1])
        self.require("mask", attention_mask is not None)
        self.require("cache", cache is not None)
        self.require("documents", document_ids is not None)
        first_position = self.groups.ulysses.rank * tokens.shape[1]
        whole = Context(position_ids=position_ids, cache=cache, first_position=first_position)
        if not self.in_halves or cache is not None or tokens.shape[0] % 2:
            return self._with_masks(whole, attention_mask, document_ids)
        first, second = (
            self._with_masks(replace(whole, position_ids=positions), mask, ids)
            for positions, mask, ids in zip(*map(_cut, (position_ids, attention_mask, document_ids)), strict=True)
        )
        return replace(whole, halves=(first, second))

    def _with_masks(self, context: Context, attention_mask: Tensor | None, document_ids: Tensor | None) -> Context:
        """Add what only blocks read."""
        if attention_mask is not None:
            context = replace(context, attention_mask=and_causal(attention_mask, self.config.attention_window))
        if document_ids is not None:
            context = replace(context, documents=self.attention.prepare_documents(document_ids))
        return context

    def loss(self, logits: Tensor, labels: Tensor, loss_mask: Tensor | None = None) -> Tensor:
        """Sum the token losses of logits [s, b, v/t]; labels and mask are those of `forward`."""
        return masked_loss(
            logits,
            labels,
            loss_mask,
            vocab_size=self.vocab_size,
            group=self.groups.tensor,
            kernels=self.kernels,
        )

    def run_to_loss(
        self, x: Tensor, context: Context, part: range, labels: Tensor, loss_mask: Tensor | None = None
    ) -> Tensor:
        """Fold the stages of `part`, which ends with the head, over `x`, and sum the token losses.

        `x` and `context` are those of `run_part`, labels and mask those of `forward`.
        """
        if not self.loss_chunk_size:
            return self.loss(self.run_part(x, context, part), labels, loss_mask)
        head_loss = partial(
            chunked_masked_loss,
            labels_bs=labels,
            loss_mask_bs=loss_mask,
            vocab_size=self.vocab_size,
            group=self.groups.tensor,
            chunk_size=self.loss_chunk_size,
            sequence_parallel=self.sequence_parallel,
            kernels=self.kernels,
        )
        return self.run_part(x, replace(context, head_loss=head_loss), part)

    def run(self, tokens: Tensor, context: Context) -> Tensor:
        """Fold all stages over [b, s] tokens; returns the logits [s, b, v/t]."""
        logits = self.run_part(tokens, context, range(len(self._stage_names)))
        if context.cache is not None:
            context.cache.advance(tokens.shape[1])
        return logits

    def run_part(self, x: Tensor, context: Context, part: range) -> Tensor:
        """Fold the stages of `part` over `x`, units of its blocks recomputed where the policy says so.

        Args:
            x: tokens [b, s] for the first stage, else what the stage before `part` gave.
            context: of the whole micro-batch.
            part: consecutive indices of stages.

        Raises:
            ValueError: the blocks are recorded, and this micro-batch has a context of its own.
        """
        stages, blocks = self.stages(), self.blocks_in(part)
        x = run_stages(stages[part.start : blocks.start], x, context)
        if self._graphed_blocks is not None and self.training and is_grad_enabled():
            if not context.is_constant:
                raise ValueError("blocks that were recorded take no positions, masks, documents or cache of their own")
            x = self._graphed_blocks(x)
        else:
            x = self._run_blocks(stages[blocks.start : blocks.stop], x, context)
        return run_stages(stages[blocks.stop : part.stop], x, context)

    def _run_blocks(self, blocks: Sequence[nn.Module], x: Tensor, context: Context) -> Tensor:
        run_blocks = run_stages if context.halves is None else partial(run_in_halves, group=self.groups.tensor)
        for unit in self.recompute_policy.units(len(blocks)):
            members = blocks[unit.first : unit.end]
            if unit.is_recomputed:
                x = recompute(run_blocks, members, x, context, policy=self.recompute_policy)
            else:
                x = run_blocks(members, x, context)
        return x

    def compile_blocks(self) -> None:
        """Let torch compile the blocks when they first run: one graph, made once, serves all of them.

        Raises, then, where a block is no whole graph.
        """
        for stage in self.stages():
            if isinstance(stage, Block):
                stage.compile(fullgraph=True, dynamic=False)

    def graph_blocks(self) -> None:
        """Let a GPU record all blocks when they are first trained, and repeat them from then on.

        Micro-batches are of one shape, whole or all of them in halves, and without positions or masks of their own.
        What tensor ranks tell each other is recorded too; `release_graphs` has to come before their group ends.
        """
        blocks = [stage for stage in self.stages() if isinstance(stage, Block)]
        context = Context(halves=(Context(), Context()) if self.in_halves else None)
        self._graphed_blocks = Graphed(partial(self._run_blocks, blocks, context=context), blocks)

    def release_graphs(self) -> None:
        """Give up what `graph_blocks` recorded; the blocks run as ever from now on."""
        self._graphed_blocks = None

    def peak_bytes(self) -> int:
        """Give the most memory that the GPU held so far, if blocks are recorded and PyTorch's own count is too low."""
        return 0 if self._graphed_blocks is None else self._graphed_blocks.peak_bytes()

    def blocks_in(self, part: range) -> range:
        """Find the stages of `part` that are blocks: all but the two before the blocks and the two after them."""
        first = min(max(part.start, 2), part.stop)
        return range(first, max(first, min(part.stop, len(self._stage_names) - 2)))

    def _require_whole_shards(self, length: int) -> None:
        shards = self.groups.tensor.sequence_shards(self.sequence_parallel).size
        if length % shards:
            raise ConfigError(
                [
                    f"a sequence of {length} tokens cannot be divided over {shards} tensor ranks, as "
                    f"--sequence-parallel does: make it {-(-length // shards) * shards} tokens long, or leave that out"
                ]
            )

    def require(self, feature: str, needed: bool) -> None:
        """Check that the attention backend has a feature if it is needed.

        Raises:
            AttentionUnavailableError: it has not.
        """
        if needed and feature not in self.attention.features:
            raise AttentionUnavailableError(
                f"--attention-backend {self.attention.name} lacks {feature!r}: choose one that has it, or auto"
            )


def run_stages(stages: Sequence[nn.Module], x: Tensor, context: Context) -> Tensor:
    """Hand a tensor through the stages in order."""
    for stage in stages:
        x = stage(x, context)
    return x


def padded_vocab_size(vocab_size: int, divisor: int) -> int:
    """Return the next multiple of `divisor`: a size that does not depend on the layout."""
    return -(-vocab_size // divisor) * divisor


def _cut(batch: Tensor | None) -> Sequence[Tensor | None]:
    """Cut a tensor [b, ...] into two halves."""
    return (None, None) if batch is None else batch.chunk(2)
