"""All-reduce, reduce and reduce-scatter. Sums of 16-bit numbers are made in fp32."""

# torch.distributed calls a group with lists and an options object; its stubs know more forms.
# mypy: disable-error-code="override, assignment"

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from colrow.comm.mpi.buffers import (
    AVERAGE,
    NARROW,
    SUM,
    RedOpType,
    check_size,
    copy_into,
    operation,
    raw,
    reduced_in,
    same_memory,
    typed,
)
from colrow.comm.mpi.communicator import Communicator
from colrow.comm.mpi.work import MpiWork, completed

# Of messages that are part of an all-reduce: the largest that MPI allows everywhere.
_EXCHANGE_TAG = 32767


class Reductions(Communicator):
    """The collectives that compute."""

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> MpiWork:
        """Sum (or another reduction) over the ranks, in place."""
        op = _op(opts)
        if len(tensors) == 1:
            return self.reduce_in_place(tensors[0], op)
        return self._each(tensors, lambda x: self._reduce_one(x, op), "all_reduce")

    def reduce_in_place(self, x: Tensor, op: RedOpType = SUM) -> MpiWork:
        """:meth:`allreduce` of one tensor, without torch's options: the shortest way."""
        requests, finish, keep = self._reduce_one(x, op)
        return self._work(requests, [x], "all_reduce", finish, keep)

    def reduce_now(self, x: Tensor, op: RedOpType = SUM) -> None:
        """As :meth:`reduce_in_place`, and waits: no work is made if that takes moments."""
        requests, finish, keep = self._reduce_one(x, op)
        done = False
        try:
            done = completed(requests)
        finally:  # also when a signal interrupts: MPI goes on using the memory
            work = None if done else self._work(requests, [x], "all_reduce", finish, keep)
        if work is not None:
            work.wait()
        elif finish is not None:
            finish()

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
        if len(inputs[0]) != self._ranks:
            raise ValueError(
                f"reduce_scatter: {len(inputs[0])} tensors were given for {self._ranks} ranks"
            )
        mine = inputs[0][self._rank]
        check_size("reduce_scatter: the output", outputs[0], mine.numel(), mine)
        wide = reduced_in(outputs[0].dtype)
        flat = torch.cat([x.reshape(-1).to(wide) for x in inputs[0]])
        counts = [x.numel() for x in inputs[0]]
        return self._reduce_scatter(outputs[0], flat, counts, op)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> MpiWork:
        """Sum over the ranks of equally divided tensors."""
        check_size("reduce_scatter: the input", input, self._ranks * output.numel(), output)
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

    # The names before torch 2.12.
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def _reducible(self, x: Tensor, op: RedOpType) -> tuple[Tensor, Callable[[], None] | None]:
        """A contiguous buffer that MPI can reduce, ``x`` itself if it is one, and the way back."""
        wide = reduced_in(x.dtype)
        average = op == AVERAGE
        buffer = x if x.is_contiguous() and wide == x.dtype else x.contiguous().to(wide)
        if buffer is x and not average:
            return x, None

        def finish() -> None:
            copy_into(x, buffer / self._ranks if average else buffer)

        return buffer, finish

    def _reduce_one(self, x: Tensor, op: RedOpType) -> tuple[tuple[Any, ...], Any, Any]:
        if self._ranks == 2 and op == SUM and x.dtype in NARROW:
            return self._exchange_and_add(x)
        buffer, finish = self._reducible(x, op)
        kind = operation(op, buffer.dtype)
        return (self._comm.Iallreduce(MPI.IN_PLACE, typed(buffer), kind),), finish, buffer

    def _exchange_and_add(self, x: Tensor) -> tuple[tuple[Any, ...], Any, Any]:
        """The sum of two ranks' 16-bit numbers: torch adds them in fp32, and none is widened."""
        mine = x.contiguous()
        other = torch.empty_like(mine)
        peer = 1 - self._rank
        requests = (
            self._comm.Irecv(raw(other), peer, _EXCHANGE_TAG),
            self._comm.Isend(raw(mine), peer, _EXCHANGE_TAG),
        )

        def finish() -> None:
            with torch.no_grad():
                torch.add(mine, other, out=x)

        return requests, finish, (mine, other)

    def _reduce_scatter(
        self, output: Tensor, flat: Tensor, counts: list[int], op: RedOpType
    ) -> MpiWork:
        direct = output.is_contiguous() and output.dtype == flat.dtype and op != AVERAGE
        direct = direct and not same_memory(output, flat)
        target = output if direct else flat.new_empty(output.numel())
        kind = operation(op, flat.dtype)
        request = self._comm.Ireduce_scatter(typed(flat), typed(target), counts, kind)

        def finish() -> None:
            result = target / self._ranks if op == AVERAGE else target
            copy_into(output, result.view(output.shape))

        keep = (flat, target)
        return self._work([request], [output], "reduce_scatter", None if direct else finish, keep)

    def _each(
        self,
        tensors: Sequence[Tensor],
        issue: Callable[[Tensor], tuple[tuple[Any, ...], Any, Any]],
        what: str,
    ) -> MpiWork:
        issued = [issue(x) for x in tensors]

        def finish_all() -> None:
            for _, finish, _ in issued:
                if finish is not None:
                    finish()

        requests = [request for some, _, _ in issued for request in some]
        return self._work(requests, list(tensors), what, finish_all, issued)


def _op(opts: Any) -> RedOpType:
    op: RedOpType = SUM if opts is None else opts.reduceOp.op
    return op
