"""The one decoder: every family of :mod:`colrow.models.families` is a configuration of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from colrow import rng
from colrow.layers.column import FusedColumnParallelLinear
from colrow.layers.context import AttentionContext, KeyValueCache
from colrow.layers.decoding import Kernel, lay_out_
from colrow.layers.dropout import ParallelDropout
from colrow.layers.fused import column_linear
from colrow.layers.linear import divides_sequence
from colrow.layers.loss import Reduction, vocab_parallel_cross_entropy
from colrow.layers.row import RowParallelLinear
from colrow.layers.shared import SharedLayers, SharedWeights
from colrow.mesh import ParallelGroup
from colrow.models.config import Layout, ModelConfig, parameter_specs
from colrow.models.decoder_parts import DecoderParts, allocate
from colrow.models.inputs import check_batch, check_same_on_all_ranks
from colrow.models.one_token import OneToken
from colrow.partition import Partition


class Decoder(nn.Module):
    """A decoder-only transformer whose every layer is divided over the ranks of ``tp``.

    Args:
        config: its shape.
        tp: the tensor-parallel group.
        layout: how its dimensions are divided; as evenly as possible by default.
        sequence_parallel: norms, dropout and residuals work on a shard of the sequence.
        keep_gathered_input: with sequence parallelism, keep gathered inputs for backward.
        overlap: hide the collectives of backward behind weight gradients.
        chunk_bytes: multiply and send in chunks of at least so many bytes, so that collectives of
            forward hide behind matmuls too, see :class:`colrow.layers.RowParallelLinear`.
        check_inputs: compare the batch, and the dropout key if there is one, over the ranks in
            every forward pass that is not decoding (one all-reduce of 16 bytes), since different
            ones give wrong numbers silently.
        device, dtype: of the parameters, which hold arbitrary values until they are initialised
            or loaded; "meta" allocates nothing.
    """

    def __init__(
        self,
        config: ModelConfig,
        tp: ParallelGroup,
        *,
        layout: Layout | None = None,
        sequence_parallel: bool = False,
        keep_gathered_input: bool = True,
        overlap: bool = True,
        chunk_bytes: int | None = None,
        check_inputs: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config, self.tp = config, tp
        self.layout = layout or Layout.create(config, tp.size)
        self.specs = parameter_specs(config, self.layout)
        self.sequence_parallel = sequence_parallel = sequence_parallel and tp.size > 1
        self.keep_gathered_input, self.overlap = keep_gathered_input, overlap
        self.chunk_bytes = chunk_bytes
        self.check_inputs = check_inputs
        # Built without memory, then allocated once: no layer draws values that are replaced anyway.
        parts = DecoderParts(
            config,
            self.layout,
            tp,
            sequence_parallel=sequence_parallel,
            keep_gathered_input=keep_gathered_input,
            overlap=overlap,
            chunk_bytes=chunk_bytes,
            device=torch.device("meta"),
            dtype=dtype,
        )
        self.embedding, self.positions = parts.embedding(), parts.positions()
        self.embedding_norm = parts.norm("embedding_norm") if config.embedding_norm else None
        self.dropout = ParallelDropout(config.embedding_dropout)
        self.blocks = nn.ModuleList(parts.block(index) for index in range(config.num_layers))
        self.norm = parts.norm("norm")
        self.head = parts.head()
        self.tied_kernel: Kernel | None = None
        self.one_token: OneToken | None = None
        allocate(self, torch.device(device))
        self._shared_layers = SharedLayers(self)

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KeyValueCache | None = None,
        dropout_key: int | Tensor | None = None,
    ) -> Tensor:
        """Logits of this rank's part of the vocabulary.

        Args:
            input_ids: ``[batch, sequence]`` int64, the same on every rank.
            attention_mask: ``[batch, cached + sequence]``, 0 at padding; padding may be on the
                left. By default there is none.
            positions: ``[batch or 1, sequence]``; by default counted from the first valid token.
            cache: keys and values of earlier positions, to be extended.
            dropout_key: which dropout masks; by default drawn from torch's CPU generator, which
                all ranks must have seeded alike. Compared over the ranks together with the batch.

        Returns:
            ``[batch, sequence, vocab_local]``.

        Raises:
            ValueError: ids outside the vocabulary, a mask or positions of the wrong shape, a
                sequence that is too long, ranks that were given different batches or whose
                generators differ where there is dropout.
        """
        key = self._dropout_key(dropout_key)
        if self.check_inputs and cache is None:
            check_same_on_all_ranks(self.tp, input_ids, attention_mask, positions, dropout_key=key)
        hidden = self._hidden(input_ids, attention_mask, positions, cache, key)
        return self.logits(*hidden)

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
    ) -> Tensor:
        """The next-token loss; every rank returns the same value.

        Args:
            labels: ``[batch, sequence]``, usually ``input_ids``; shifted in here, so that logits
                at position i are compared with the label at i + 1, as in transformers.
            The others as in :meth:`forward` and :func:`vocab_parallel_cross_entropy`.

        Raises:
            ValueError: as there, and for a sequence of one token, which has no next one.
        """
        if labels.shape != input_ids.shape:
            raise ValueError(
                f"labels {tuple(labels.shape)} should have the shape of input_ids "
                f"{tuple(input_ids.shape)}; they are shifted inside"
            )
        key = self._dropout_key(dropout_key)
        if self.check_inputs:
            check_same_on_all_ranks(
                self.tp, input_ids, attention_mask, positions, labels, dropout_key=key
            )
        if input_ids.dim() == 2 and input_ids.shape[1] == 1:
            raise ValueError(
                f"the loss of sequences of one token (input_ids {tuple(input_ids.shape)}) is "
                "undefined: it compares each token with the next one; give it at least two"
            )
        hidden = self._hidden(input_ids, attention_mask, positions, None, key)
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
            partition=self.layout.vocab,
        )
        return losses[:, :-1] if reduction == "none" else losses

    def last_logits(
        self, input_ids: Tensor, *, attention_mask: Tensor | None, cache: KeyValueCache
    ) -> Tensor:
        """For generation: local logits ``[batch, vocab_local]`` of the last position alone."""
        key = self._dropout_key(None)
        hidden, sequence, shared = self._hidden(input_ids, attention_mask, None, cache, key)
        return self.logits(hidden[:, -1:], sequence, shared)[:, 0]

    def _hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor | None,
        cache: KeyValueCache | None,
        key: int | Tensor | None,
    ) -> tuple[Tensor, Partition | None, SharedWeights]:
        """The normed hidden states before the head, and how their sequence is divided."""
        past = 0 if cache is None else cache.length
        if cache is not None and self.sequence_parallel and torch.is_grad_enabled():
            raise ValueError(
                "with a key-value cache a sequence-parallel model holds the whole sequence on "
                "every rank, which its gradients do not know: generate under torch.no_grad()"
            )
        check_batch(
            input_ids, attention_mask, past, self.config.max_positions, self.config.position
        )
        length = input_ids.shape[1]
        sequence = None
        if self.sequence_parallel:
            divide = Partition.even if cache is None else Partition.replicated
            sequence = divide(length, self.tp.size)
        shared = self._shared_layers.weights(self.tp, "shared")
        context = AttentionContext(
            length,
            past=past,
            key_valid=None if attention_mask is None else attention_mask.bool(),
            positions=positions,
            device=input_ids.device,
        )
        x = self.embedding(input_ids, sequence=sequence)
        if self.positions is not None:
            x = x + self.positions(context.positions, sequence=sequence, shared=shared)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x, shared=shared)
        if key is not None:
            split = sequence is not None and cache is None
            x = self.dropout(
                x,
                key=rng.derived_key(key, "embedding"),
                dim=1 if split else None,
                partition=sequence if split else None,
                rank=self.tp.rank,
            )
        one_token = self.one_token
        if cache is not None and one_token and one_token.serves(input_ids, attention_mask):
            x = one_token(x, context, cache)
            return self.norm(x, shared=shared), sequence, shared
        for index, block in enumerate(self.blocks):
            x = block(
                x,
                context=context,
                cache=cache,
                sequence=sequence,
                shared=shared,
                dropout_key=None if key is None else rng.derived_key(key, "block", index),
            )
        return self.norm(x, shared=shared), sequence, shared

    def logits(self, hidden: Tensor, sequence: Partition | None, shared: SharedWeights) -> Tensor:
        """The head: ``[batch, sequence (_local), hidden]`` to local logits."""
        if self.head is not None:
            logits: Tensor = self.head(hidden, sequence=sequence, shared=shared)
            return logits
        whole = not divides_sequence(self, sequence)
        if self.tied_kernel is not None and whole and not torch.is_grad_enabled():
            return self.tied_kernel(hidden, self.embedding.weight, None)
        return column_linear(
            hidden,
            self.embedding.weight,
            None,
            self.tp,
            sequence=None if whole else sequence,
            keep_gathered_input=self.keep_gathered_input,
            overlap=self.overlap,
            chunk_bytes=self.chunk_bytes,
            layer="head",
        )

    def for_decoding(self) -> Decoder:
        """Lays the weights out for generating on a CPU, see :mod:`colrow.layers.decoding`.

        Shapes, values and names stay. On CPUs parameters are frozen and lose their gradients: the
        state of an optimiser would be in another order. Returns the model itself.
        """
        if self.embedding.weight.device.type == "cpu":
            for parameter in self.parameters():
                parameter.requires_grad_(False)
                parameter.grad = None
        for module in self.modules():
            if isinstance(module, FusedColumnParallelLinear | RowParallelLinear):
                module.kernel = lay_out_(module.weight)
        if self.head is None:
            self.tied_kernel = lay_out_(self.embedding.weight)
        self.one_token = OneToken(self.blocks) if OneToken.fits(self) else None
        return self

    def weight_bytes_per_rank(self) -> list[int]:
        """Bytes of parameters on each rank of the tp group; nothing is sent."""
        itemsize = self.embedding.weight.element_size()
        return [
            itemsize * sum(math.prod(spec.local_shape(rank)) for spec in self.specs.values())
            for rank in range(self.tp.size)
        ]

    def _dropout_key(self, given: int | Tensor | None) -> int | Tensor | None:
        """The key of this forward pass; None where nothing is dropped."""
        config = self.config
        p = max(config.embedding_dropout, config.attention_dropout, config.residual_dropout)
        if given is None and self.training and p > 0:
            return rng.draw_seed()
        return given

    def extra_repr(self) -> str:
        """Family, rank and what is held."""
        held = sum(p.numel() for p in self.parameters())
        return (
            f"{self.config.family}, tp_rank={self.tp.rank}/{self.tp.size}, "
            f"parameters held={held:,}, sequence_parallel={self.sequence_parallel}"
        )
