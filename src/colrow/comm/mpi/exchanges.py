"""Gathers, scatters and all-to-all: bytes change places. Uneven lists of tensors are fine."""

# torch.distributed calls a group with lists and an options object; its stubs know more forms.
# mypy: disable-error-code="override, assignment"

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from colrow.comm.mpi.buffers import check_size, copy_into, raw, same_memory
from colrow.comm.mpi.communicator import Communicator
from colrow.comm.mpi.work import MpiWork


class Exchanges(Communicator):
    """The collectives that only move."""

    def allgather(
        self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None
    ) -> MpiWork:
        """Every rank's tensor; they may differ in size."""
        shard, parts = inputs[0].contiguous(), outputs[0]
        self._check_list("all_gather", parts, shard)
        check_size(
            "all_gather: this rank's element of the list", parts[self._rank], shard.numel(), shard
        )
        counts = [x.numel() * x.element_size() for x in parts]
        flat = shard.new_empty(sum(x.numel() for x in parts))
        receive = raw(flat)
        request = self._comm.Iallgatherv(raw(shard), [receive[0], counts, MPI.BYTE])
        finish = _unpacking(flat, parts)
        return self._work([request], list(parts), "all_gather", finish, (shard, flat))

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> MpiWork:
        """Equally large shards, one after the other."""
        shard = input.contiguous()
        check_size("all_gather: the output", output, self._ranks * shard.numel(), shard)
        target = output if output.is_contiguous() else torch.empty_like(output).contiguous()
        memory, size, _ = raw(target)
        each = size // self._ranks
        send: Any = raw(shard)
        if same_memory(shard, target):
            in_place = shard.data_ptr() == target.data_ptr() + self._rank * each
            shard = shard if in_place else shard.clone()
            send = MPI.IN_PLACE if in_place else raw(shard)
        request = self._comm.Iallgather(send, [memory, each, MPI.BYTE])
        finish = None if target is output else lambda: copy_into(output, target)
        return self._work([request], [output], "all_gather", finish, (shard, target))

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> MpiWork:
        """Several at once."""
        works = [
            self.all_gather_single(output, given)
            for output, given in zip(outputs, inputs, strict=True)
        ]
        return self._joined(works, list(outputs))

    def allgather_coalesced(
        self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None
    ) -> MpiWork:
        """Several at once, as lists by rank."""
        works = [
            self.allgather([[by_rank[i] for by_rank in outputs]], [given])
            for i, given in enumerate(inputs)
        ]
        return self._joined(works, [x for by_rank in outputs for x in by_rank])

    def gather(
        self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any
    ) -> MpiWork:
        """As :meth:`allgather`, for the root alone."""
        shard = inputs[0].contiguous()
        if opts.rootRank != self._rank:
            request = self._comm.Igatherv(raw(shard), None, opts.rootRank)
            return self._work([request], [], "gather", None, shard)
        parts = outputs[0]
        self._check_list("gather", parts, shard)
        check_size(
            "gather: the root's element of the list", parts[self._rank], shard.numel(), shard
        )
        counts = [x.numel() * x.element_size() for x in parts]
        flat = shard.new_empty(sum(x.numel() for x in parts))
        receive = [raw(flat)[0], counts, MPI.BYTE]
        request = self._comm.Igatherv(raw(shard), receive, opts.rootRank)
        keep = (shard, flat)
        return self._work([request], list(parts), "gather", _unpacking(flat, parts), keep)

    def scatter(
        self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any
    ) -> MpiWork:
        """The root's list, one tensor for each rank."""
        output = outputs[0]
        target = output if output.is_contiguous() else torch.empty_like(output).contiguous()
        send, flat = None, None
        if opts.rootRank == self._rank:
            self._check_list("scatter", inputs[0], output)
            mine = inputs[0][self._rank]
            check_size("scatter: the output", output, mine.numel(), mine)
            flat = torch.cat([x.reshape(-1) for x in inputs[0]])
            counts = [x.numel() * x.element_size() for x in inputs[0]]
            send = [raw(flat)[0], counts, MPI.BYTE]
        request = self._comm.Iscatterv(send, raw(target), opts.rootRank)
        finish = None if target is output else lambda: copy_into(output, target)
        return self._work([request], [output], "scatter", finish, (flat, target))

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_sizes: Sequence[int],
        input_sizes: Sequence[int],
        opts: Any = None,
    ) -> MpiWork:
        """Rows for each rank, by default equally many."""
        given = input.contiguous()
        target = output if output.is_contiguous() else torch.empty_like(output).contiguous()

        check_size("all_to_all: the output", output, output.numel(), given)

        def counts(what: str, x: Tensor, sizes: Sequence[int]) -> list[int]:
            rows, divided = x.shape[0], list(sizes) or [x.shape[0] // self._ranks] * self._ranks
            if sum(divided) != rows or len(divided) != self._ranks:
                raise ValueError(
                    f"all_to_all: the {what} has {rows} rows, which "
                    + (f"the sizes {divided} do not divide" if sizes else "do not divide evenly")
                    + f" over {self._ranks} ranks"
                )
            row = x.numel() * x.element_size() // max(1, rows)
            return [count * row for count in divided]

        request = self._comm.Ialltoallv(
            [raw(given)[0], counts("input", given, input_sizes), MPI.BYTE],
            [raw(target)[0], counts("output", target, output_sizes), MPI.BYTE],
        )
        finish = None if target is output else lambda: copy_into(output, target)
        return self._work([request], [output], "all_to_all", finish, (given, target))

    def alltoall(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> MpiWork:
        """One tensor for each rank; they may differ in size."""
        self._check_list("all_to_all", inputs, inputs[0])
        self._check_list("all_to_all", outputs, inputs[0])
        own = outputs[self._rank]
        check_size("all_to_all: this rank's own output", own, inputs[self._rank].numel(), own)
        given = torch.cat([x.reshape(-1) for x in inputs])
        flat = given.new_empty(sum(x.numel() for x in outputs))
        size = given.element_size()
        request = self._comm.Ialltoallv(
            [raw(given)[0], [x.numel() * size for x in inputs], MPI.BYTE],
            [raw(flat)[0], [x.numel() * size for x in outputs], MPI.BYTE],
        )
        finish = _unpacking(flat, outputs)
        return self._work([request], list(outputs), "all_to_all", finish, (given, flat))

    def _check_list(self, what: str, tensors: Sequence[Tensor], like: Tensor) -> None:
        """One tensor for each rank, of one dtype; sizes may differ."""
        if len(tensors) != self._ranks:
            raise ValueError(f"{what}: {len(tensors)} tensors were given for {self._ranks} ranks")
        for x in tensors:
            check_size(f"{what}: a tensor of the list", x, x.numel(), like)

    # The names before torch 2.12.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    alltoall_base = all_to_all_single


def _unpacking(flat: Tensor, parts: Sequence[Tensor]) -> Callable[[], None]:
    """Copies a flat buffer into tensors that lie in it one after the other."""

    def finish() -> None:
        pieces = flat.split([x.numel() for x in parts])
        for x, piece in zip(parts, pieces, strict=True):
            copy_into(x, piece.view(x.shape))

    return finish
