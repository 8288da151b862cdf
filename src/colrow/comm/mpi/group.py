"""The process group: torch.distributed's collectives as MPI's non-blocking ones.

Everything is started when it is called and completed when somebody waits, so calls of several
groups may be under way at once; while one is waited for, MPI moves all of them. Each group has a
communicator of its own. Sums of 16-bit numbers are made in fp32. Uneven lists of tensors are fine
wherever torch's interface has lists.
"""

# torch.distributed calls a group with lists and an options object; its stubs know more forms.
# mypy: disable-error-code="override, assignment"

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

from colrow.comm.mpi.buffers import AVERAGE, SUM, RedOpType, operation, raw, reduced_in, typed
from colrow.comm.mpi.start import BACKEND
from colrow.comm.mpi.work import MpiWork


class MpiGroup(dist.ProcessGroup):
    """The ranks of one communicator; called by torch.distributed."""

    def __init__(
        self, rank: int, size: int, communicator: MPI.Intracomm, timeout: timedelta
    ) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._comm, self.timeout = communicator, timeout
        self._rank, self._ranks = rank, size
        self._name = self._description = "undefined"
        self.pending: set[MpiWork] = set()  # MPI uses their memory, whoever still holds the work

    def describe(self, what: str) -> str:
        """For the message of a time limit."""
        return f"{what} in a group of {self._ranks} ranks (rank {self._rank})"

    def getBackendName(self) -> str:
        """As registered."""
        return BACKEND

    # torch keeps these two with a group's built-in backends, of which there is none here.

    def setGroupName(self, name: str) -> None:
        """Torch's name of the group."""
        self._name = name

    def getGroupName(self) -> str:
        """As set."""
        return self._name

    def setGroupDesc(self, description: str) -> None:
        """What the group is for."""
        self._description = description

    def getGroupDesc(self) -> str:
        """As set."""
        return self._description

    group_name = property(getGroupName)
    group_desc = property(getGroupDesc)

    # Reductions.

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> MpiWork:
        """Sum (or another reduction) over the ranks, in place."""
        op = _op(opts)
        if len(tensors) == 1:
            return self.reduce_in_place(tensors[0], op)
        return self._each(tensors, lambda x: self._reduce_one(x, op), "all_reduce")

    def reduce_in_place(self, x: Tensor, op: RedOpType = SUM) -> MpiWork:
        """:meth:`allreduce` of one tensor, without torch's options: the shortest way."""
        request, finish, keep = self._reduce_one(x, op)
        return self._work((request,), [x], "all_reduce", finish, keep)

    def allreduce_coalesced(self, tensors: Sequence[Tensor], opts: Any = None) -> MpiWork:
        """As :meth:`allreduce`."""
        return self.allreduce(tensors, opts)

    def reduce(self, tensors: Sequence[Tensor], opts: Any) -> MpiWork:
        """As :meth:`allreduce`, for the root alone."""
        x, op = tensors[0], _op(opts)
        buffer, finish = self._reducible(x, op)
        mine = opts.rootRank == self._rank
        send = MPI.IN_PLACE if mine else typed(buffer)
        receive = typed(buffer) if mine else None
        request = self._comm.Ireduce(send, receive, operation(op, buffer.dtype), opts.rootRank)
        return self._work([request], list(tensors), "reduce", finish if mine else None, buffer)

    def reduce_scatter(
        self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any = None
    ) -> MpiWork:
        """Sum over the ranks; each keeps its own element of the list, which may differ in size."""
        op = _op(opts)
        wide = reduced_in(outputs[0].dtype)
        flat = torch.cat([x.reshape(-1).to(wide) for x in inputs[0]])
        counts = [x.numel() for x in inputs[0]]
        return self._reduce_scatter(outputs[0], flat, counts, op)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> MpiWork:
        """Sum over the ranks of equally divided tensors."""
        flat = input.contiguous().reshape(-1).to(reduced_in(input.dtype))
        return self._reduce_scatter(output, flat, [output.numel()] * self._ranks, _op(opts))

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> MpiWork:
        """Several at once."""
        works = [
            self.reduce_scatter_single(output, given, opts)
            for output, given in zip(outputs, inputs, strict=True)
        ]
        return self._joined(works, list(outputs))

    # Gathers and exchanges.

    def allgather(
        self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None
    ) -> MpiWork:
        """Every rank's tensor; they may differ in size."""
        shard, parts = inputs[0].contiguous(), outputs[0]
        counts = [x.numel() * x.element_size() for x in parts]
        flat = shard.new_empty(sum(x.numel() for x in parts))
        receive = raw(flat)
        request = self._comm.Iallgatherv(raw(shard), [receive[0], counts, MPI.BYTE])
        finish = _unpacking(flat, parts)
        return self._work([request], list(parts), "all_gather", finish, (shard, flat))

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> MpiWork:
        """Equally large shards, one after the other."""
        shard = input.contiguous()
        target = output if output.is_contiguous() else torch.empty_like(output).contiguous()
        memory, size, _ = raw(target)
        each = size // self._ranks
        send: Any = raw(shard)
        if _same_memory(shard, target):
            in_place = shard.data_ptr() == target.data_ptr() + self._rank * each
            shard = shard if in_place else shard.clone()
            send = MPI.IN_PLACE if in_place else raw(shard)
        request = self._comm.Iallgather(send, [memory, each, MPI.BYTE])
        finish = None if target is output else lambda: _copy(output, target)
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
            flat = torch.cat([x.reshape(-1) for x in inputs[0]])
            counts = [x.numel() * x.element_size() for x in inputs[0]]
            send = [raw(flat)[0], counts, MPI.BYTE]
        request = self._comm.Iscatterv(send, raw(target), opts.rootRank)
        finish = None if target is output else lambda: _copy(output, target)
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

        def counts(x: Tensor, sizes: Sequence[int]) -> list[int]:
            size = x.numel() * x.element_size()
            if not sizes:
                return [size // self._ranks] * self._ranks
            row = size // max(1, x.shape[0])
            return [rows * row for rows in sizes]

        request = self._comm.Ialltoallv(
            [raw(given)[0], counts(given, input_sizes), MPI.BYTE],
            [raw(target)[0], counts(target, output_sizes), MPI.BYTE],
        )
        finish = None if target is output else lambda: _copy(output, target)
        return self._work([request], [output], "all_to_all", finish, (given, target))

    def alltoall(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> MpiWork:
        """One tensor for each rank; they may differ in size."""
        given = torch.cat([x.reshape(-1) for x in inputs])
        flat = given.new_empty(sum(x.numel() for x in outputs))
        size = given.element_size()
        request = self._comm.Ialltoallv(
            [raw(given)[0], [x.numel() * size for x in inputs], MPI.BYTE],
            [raw(flat)[0], [x.numel() * size for x in outputs], MPI.BYTE],
        )
        finish = _unpacking(flat, outputs)
        return self._work([request], list(outputs), "all_to_all", finish, (given, flat))

    def broadcast(self, tensors: Sequence[Tensor], opts: Any) -> MpiWork:
        """The root's tensor."""
        x = tensors[0]
        target = x if x.is_contiguous() else x.contiguous()
        request = self._comm.Ibcast(raw(target), opts.rootRank)
        finish = None if target is x else lambda: _copy(x, target)
        return self._work([request], list(tensors), "broadcast", finish, target)

    def barrier(self, opts: Any = None) -> MpiWork:
        """Nobody leaves before all have come."""
        return self._work([self._comm.Ibarrier()], [], "barrier")

    # Messages.

    def send(self, tensors: Sequence[Tensor], to: int, tag: int) -> MpiWork:
        """To one rank of the group."""
        x = tensors[0].contiguous()
        return self._work([self._comm.Isend(raw(x), to, tag)], [], f"send to {to}", None, x)

    def recv(self, tensors: Sequence[Tensor], source: int, tag: int) -> MpiWork:
        """From one rank of the group."""
        return self._receive(tensors, source, tag, f"recv from {source}")

    def recv_anysource(self, tensors: Sequence[Tensor], tag: int) -> MpiWork:
        """From whoever sends first."""
        return self._receive(tensors, MPI.ANY_SOURCE, tag, "recv from any rank")

    # The names before torch 2.12.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    def shutdown(self) -> None:
        """Completes what is under way; communicators end with the process."""
        for work in list(self.pending):
            work.wait()

    def abort(self) -> None:
        """Forgets what is under way: the process is about to end."""
        self.pending.clear()

    def _receive(self, tensors: Sequence[Tensor], source: int, tag: int, what: str) -> MpiWork:
        x = tensors[0]
        target = x if x.is_contiguous() else torch.empty_like(x).contiguous()
        request = self._comm.Irecv(raw(target), source, tag)
        finish = None if target is x else lambda: _copy(x, target)
        status = MPI.Status() if source == MPI.ANY_SOURCE else None
        return self._work([request], list(tensors), what, finish, target, status)

    def _reducible(self, x: Tensor, op: RedOpType) -> tuple[Tensor, Callable[[], None] | None]:
        """A contiguous buffer that MPI can reduce, ``x`` itself if it is one, and the way back."""
        wide = reduced_in(x.dtype)
        average = op == AVERAGE
        buffer = x if x.is_contiguous() and wide == x.dtype else x.contiguous().to(wide)
        if buffer is x and not average:
            return x, None

        def finish() -> None:
            _copy(x, buffer / self._ranks if average else buffer)

        return buffer, finish

    def _reduce_one(self, x: Tensor, op: RedOpType) -> tuple[Any, Any, Any]:
        buffer, finish = self._reducible(x, op)
        kind = operation(op, buffer.dtype)
        return self._comm.Iallreduce(MPI.IN_PLACE, typed(buffer), kind), finish, buffer

    def _reduce_scatter(
        self, output: Tensor, flat: Tensor, counts: list[int], op: RedOpType
    ) -> MpiWork:
        direct = output.is_contiguous() and output.dtype == flat.dtype and op != AVERAGE
        direct = direct and not _same_memory(output, flat)
        target = output if direct else flat.new_empty(output.numel())
        kind = operation(op, flat.dtype)
        request = self._comm.Ireduce_scatter(typed(flat), typed(target), counts, kind)

        def finish() -> None:
            result = target / self._ranks if op == AVERAGE else target
            _copy(output, result.view(output.shape))

        keep = (flat, target)
        return self._work([request], [output], "reduce_scatter", None if direct else finish, keep)

    def _each(
        self,
        tensors: Sequence[Tensor],
        issue: Callable[[Tensor], tuple[Any, Any, Any]],
        what: str,
    ) -> MpiWork:
        issued = [issue(x) for x in tensors]

        def finish_all() -> None:
            for _, finish, _ in issued:
                if finish is not None:
                    finish()

        requests = [request for request, _, _ in issued]
        return self._work(requests, list(tensors), what, finish_all, issued)

    def _joined(self, works: list[MpiWork], results: list[Tensor]) -> MpiWork:
        def finish() -> None:
            for work in works:
                work.wait()

        return self._work([], results, "a coalesced collective", finish)

    def _work(
        self,
        requests: Sequence[Any],
        results: list[Tensor],
        what: str,
        finish: Callable[[], None] | None = None,
        keep: object = None,
        status: MPI.Status | None = None,
    ) -> MpiWork:
        return MpiWork(self, requests, results, what, finish, keep, status)


def _op(opts: Any) -> RedOpType:
    op: RedOpType = SUM if opts is None else opts.reduceOp.op
    return op


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the two may overlap, which MPI forbids."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.numel() > 0


def _copy(target: Tensor, source: Tensor) -> None:
    with torch.no_grad():
        target.copy_(source)


def _unpacking(flat: Tensor, parts: Sequence[Tensor]) -> Callable[[], None]:
    """Copies a flat buffer into tensors that lie in it one after the other."""

    def finish() -> None:
        pieces = flat.split([x.numel() for x in parts])
        for x, piece in zip(parts, pieces, strict=True):
            _copy(x, piece.view(x.shape))

    return finish
