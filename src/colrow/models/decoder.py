"""The one decoder: every family of :mod:`colrow.models.families` is a configuration of it."""

from __future__ import annotations

import torch
from torch import Tensor

from colrow import rng
from colrow.comm import primitives
from colrow.layers.context import AttentionCache, AttentionContext
from colrow.layers.describe import ExpertsSpec
from colrow.layers.fused import column_linear
from colrow.layers.loss import Reduction, vocab_parallel_cross_entropy
from colrow.layers.router import RouterLosses
from colrow.layers.scores import softcapped
from colrow.layers.shared import SharedWeights
from colrow.models.inputs import (
    check_labels,
    check_next_token,
    check_same_on_all_ranks,
    check_stage_input,
)
from colrow.models.staged_layers import StagedLayers
from colrow.models.stages import Stage
from colrow.partition import Partition
from colrow.sharding import WHOLE, SequenceDivision


class Decoder(StagedLayers):
    """A decoder-only transformer whose every layer is divided over the ranks of ``tp``.

    In a pipeline it has the layers of this rank's stages alone, under the names that they have in
    the whole model. ``embedding``, ``positions``, ``norm`` and ``head`` are None where they are on
    another rank.

    Args:
        config: its shape.
        tp: the tensor-parallel group.
        pipeline: which stages are here; the whole model by default.
        division: how its dimensions are divided; as evenly as possible by default.
        tensor_split: instead of a division the ratio of the ranks' shares, "2,1" or
            (0.5, 0.3, 0.2), see :meth:`ModelConfig.divide`. The same on all ranks, which compare
            it with the batch.
        sequence_parallel: norms, dropout and residuals work on a shard of the sequence.
        sharding: this and more, see :class:`colrow.Sharding`.
        check_inputs: compare the batch, and the dropout key if there is one, over the ranks in
            every forward pass that is not decoding, and what optimisers did since the last one (one
            all-reduce of 32 bytes), since different ones give wrong numbers silently.
        device, dtype: of the parameters, which hold arbitrary values until they are initialised
            or loaded; "meta" allocates nothing.

    Attributes:
        sums_shared_later: gradients that are sums over tp ranks are left as this rank's parts,
            until :meth:`sum_shared_gradients_` is called: for schedules that go backward in two
            parts, which would run the sum in the graph more than once.
    """

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: AttentionCache | None = None,
        dropout_key: int | Tensor | None = None,
        stage: Stage | None = None,
        length: int | None = None,
    ) -> Tensor:
        """Logits of this rank's part of the vocabulary, or a stage's hidden states.

        Args:
            input_ids: ``[batch, sequence]`` int64, the same on every rank. For a stage that is not
                the first: hidden states ``[batch, sequence (_local), hidden]`` of the one before.
            attention_mask: ``[batch, cached + sequence]``, 0 at padding; padding may be on the
                left. By default there is none.
            positions: ``[batch or 1, sequence]``; by default counted from the first valid token.
            cache: keys and values of earlier positions, to be extended.
            dropout_key: which dropout masks; by default drawn from torch's CPU generator, which
                all ranks must have seeded alike. Compared over the ranks together with the batch.
            stage: which of this rank's stages, where it has several.
            length: positions in the whole sequence; needed where the hidden states are a shard.

        Returns:
            ``[batch, sequence, vocab_local]``; of a stage that is not the last, hidden states
            ``[batch, sequence (_local), hidden]``.

        Raises:
            ValueError: ids outside the vocabulary, a mask or positions of the wrong shape, a
                sequence that is too long, ranks that were given different batches or whose
                generators differ where there is dropout.
        """
        stage, key = self.one_stage(stage), self._dropout_key(dropout_key)
        if self.check_inputs and cache is None and stage.is_first:
            given = (input_ids, attention_mask, positions)
            check_same_on_all_ranks(
                self.tp, *given, dropout_key=key, layout=self.division, trained=True
            )
        hidden = self._hidden(stage, input_ids, length, attention_mask, positions, cache, key)
        return self.logits(*hidden) if stage.is_last else hidden[0]

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        reduction: Reduction = "mean",
        dropout_key: int | Tensor | None = None,
        stage: Stage | None = None,
        router_losses: bool = True,
    ) -> Tensor:
        """The next-token loss; every rank of the tp group returns the same value.

        Where the configuration has losses of routers, they are added: to a mean as they are, to a
        sum for each token that counts in it, and to the losses of single tokens not at all.

        Args:
            input_ids: as in :meth:`forward`; the last stage of a pipeline takes hidden states.
            labels: ``[batch, sequence]``, usually ``input_ids``; shifted in here, so that logits
                at position i are compared with the label at i + 1, as in transformers.
            router_losses: whether losses of routers are added where the configuration has them.
            The others as in :meth:`forward` and :func:`vocab_parallel_cross_entropy`.

        Raises:
            ValueError: as there, for a sequence of one token, which has no next one, and for a
                stage that is not the last.
        """
        stage, key = self.one_stage(stage), self._dropout_key(dropout_key)
        if not stage.is_last:
            raise ValueError(
                f"pipeline stage {stage.index} of {stage.count} has no head and so no loss: only "
                "the last one has"
            )
        if stage.is_first:
            check_labels(input_ids, labels)
        if self.check_inputs:
            compared = (input_ids, attention_mask, positions) if stage.is_first else ()
            compared = (*compared, labels)
            check_same_on_all_ranks(
                self.tp, *compared, dropout_key=key, layout=self.division, trained=True
            )
        check_next_token(labels)
        noted = self._router_losses(attention_mask) if router_losses else None
        hidden = self._hidden(
            stage, input_ids, labels.shape[1], attention_mask, positions, None, key, noted
        )
        # Labels move rather than logits: a slice of the logits would be copied back in backward.
        nothing = labels.new_full((labels.shape[0], 1), ignore_index)
        losses = vocab_parallel_cross_entropy(
            self.logits(*hidden),
            torch.cat([labels[:, 1:], nothing], dim=1),
            self.tp,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            reduction=reduction,
            partition=self.vocab,
        )
        if noted is not None and reduction != "none":
            config = self.config
            added = noted.total(config.router_balance, config.router_z)
            counted = (labels[:, 1:] != ignore_index).sum() if reduction == "sum" else 1
            losses = losses + added * counted
        return losses[:, :-1] if reduction == "none" else losses

    def _router_losses(self, attention_mask: Tensor | None) -> RouterLosses | None:
        """What takes note of routers' logits; None where there are no losses on them.

        Raises:
            ValueError: in a pipeline, since they count all layers together.
        """
        config = self.config
        mixtures = {b.mlp for b in config.blocks if isinstance(b.mlp, ExpertsSpec)}
        if not mixtures or not (config.router_balance or config.router_z):
            return None
        if self.pipeline.split.ranks > 1:
            raise ValueError(
                "the losses of routers count all layers together, and a pipeline stage has some of "
                "them: set router_balance and router_z to 0, or train without a pipeline"
            )
        (active,) = {mixture.active for mixture in mixtures}
        return RouterLosses(active, attention_mask, self.tp)

    def last_logits(
        self, input_ids: Tensor, *, attention_mask: Tensor | None, cache: AttentionCache
    ) -> Tensor:
        """For generation: local logits ``[batch, vocab_local]`` of the last position alone."""
        stage, key = self.one_stage(None), self._dropout_key(None)
        hidden, sequence, shared = self._hidden(
            stage, input_ids, None, attention_mask, None, cache, key
        )
        return self.logits(hidden[:, -1:], sequence, shared)[:, 0]

    def _hidden(
        self,
        stage: Stage,
        x: Tensor,
        length: int | None,
        attention_mask: Tensor | None,
        positions: Tensor | None,
        cache: AttentionCache | None,
        key: int | Tensor | None,
        router_losses: RouterLosses | None = None,
    ) -> tuple[Tensor, SequenceDivision, SharedWeights]:
        """The hidden states after a stage, after the last one normed for the head."""
        past = 0 if cache is None else cache.length
        if cache is not None and self.sequence_parallel and torch.is_grad_enabled():
            raise ValueError(
                "with a key-value cache a sequence-parallel model holds the whole sequence on "
                "every rank, which its gradients do not know: generate under torch.no_grad()"
            )
        divided = self.sequence_parallel and cache is None
        length = check_stage_input(self.config, stage, x, length, attention_mask, past, divided)
        sequence: SequenceDivision = None
        if self.sequence_parallel:
            sequence = Partition.even(length, self.tp.size) if cache is None else WHOLE
        shared = SharedWeights({})
        if not self.sums_shared_later:
            shared = self._shared_layers[self.stages.index(stage)].weights(self.tp, "shared")
        context = AttentionContext(
            length,
            past=past,
            key_valid=None if attention_mask is None else attention_mask.bool(),
            positions=positions,
            device=x.device,
        )
        tokens = x if stage.is_first else x[..., 0]
        if stage.is_first:
            x = self._embedded(x, context, sequence, shared, key, divided=divided)
        flat = self.one_token
        if cache is not None and flat and flat.serves(tokens, x, attention_mask):
            x = flat(x, context, cache)
            blocks = range(0)
        else:
            blocks = stage.blocks
        for number in blocks:
            x = self.blocks[number](
                x,
                context=context,
                cache=cache,
                sequence=sequence,
                shared=shared,
                dropout_key=None if key is None else rng.derived_key(key, "block", number),
                router_losses=router_losses,
            )
        if self.norm is not None and stage.is_last:
            x = self.norm(x, shared=shared)
        return x, sequence, shared

    def _embedded(
        self,
        input_ids: Tensor,
        context: AttentionContext,
        sequence: SequenceDivision,
        shared: SharedWeights,
        key: int | Tensor | None,
        *,
        divided: bool,
    ) -> Tensor:
        """Embeddings of tokens and positions, with their norm and dropout."""
        assert self.embedding is not None
        x: Tensor = self.embedding(input_ids, sequence=sequence)
        if self.config.embedding_scale != 1:
            # Rounded to the weights' dtype first, as models are trained.
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype).item()
        if self.positions is not None:
            x = x + self.positions(context.positions, sequence=sequence, shared=shared)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x, shared=shared)
        if key is None:
            return x
        dropped: Tensor = self.dropout(
            x,
            key=rng.derived_key(key, "embedding"),
            dim=1 if divided else None,
            partition=sequence if isinstance(sequence, Partition) else None,
            rank=self.tp.rank,
        )
        return dropped

    def logits(self, hidden: Tensor, sequence: SequenceDivision, shared: SharedWeights) -> Tensor:
        """The head: ``[batch, sequence (_local), hidden]`` to local logits."""
        logits = self._projected(hidden, sequence, shared)
        if self.config.logit_scale != 1:
            logits = logits * self.config.logit_scale
        return softcapped(logits, self.config.logit_softcap)

    def _projected(
        self, hidden: Tensor, sequence: SequenceDivision, shared: SharedWeights
    ) -> Tensor:
        if self.head is not None:
            logits: Tensor = self.head(hidden, sequence=sequence, shared=shared)
            return logits
        divided = self.divided_sequence(
            sequence, lambda: primitives.exchange_sizes(hidden, self.tp, 1, layer="head")
        )
        if self.tied_kernel is not None and divided is None and not torch.is_grad_enabled():
            assert self.embedding is not None
            return self.tied_kernel(hidden, self.embedding.weight, None)
        assert self.embedding is not None
        return column_linear(
            hidden,
            self.embedding.weight,
            None,
            self.tp,
            sequence=divided,
            sharding=self.sharding,
            layer="head",
        )

    def _dropout_key(self, given: int | Tensor | None) -> int | Tensor | None:
        """The key of this forward pass; None where nothing is dropped."""
        if given is None and self.training and self.config.drops:
            return rng.draw_seed()
        return given
