"""How many bytes of activations autograd keeps for backward, counted as they come and go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor


class KeptActivations:
    """A context in which the tensors that forward passes save for backward are counted.

    A storage counts once, however many functions keep it, and until the last of them has let go of
    it. That is exact, and the same on every device; what an allocator holds beside it is not in it.

    Args:
        parameters: whose memory is not counted: they are kept anyway.

    Attributes:
        bytes: kept now.
        peak_bytes: the most that were kept at once.
    """

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        self.bytes = self.peak_bytes = 0
        self._parameters = list(parameters)
        self._holders: Counter[int] = Counter()
        self._sizes: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, _Kept.tensor)

    def __enter__(self) -> KeptActivations:
        self._ours = {p.untyped_storage().data_ptr() for p in self._parameters}
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hooks.__exit__(kind, value, trace)

    def _keep(self, tensor: Tensor) -> _Kept:
        # A function that keeps its own result would otherwise hold itself through the graph.
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self._ours or size == 0:
            return _Kept(tensor, None, address)
        if not self._holders[address]:
            self._sizes[address] = size
            self.bytes += size
            self.peak_bytes = max(self.peak_bytes, self.bytes)
        self._holders[address] += 1
        return _Kept(tensor, self, address)

    def _release(self, address: int) -> None:
        self._holders[address] -= 1
        if not self._holders[address]:
            del self._holders[address]
            self.bytes -= self._sizes.pop(address)


class _Kept:
    """What autograd holds instead of a tensor; its end is the end of the tensor's use."""

    def __init__(self, tensor: Tensor, meter: KeptActivations | None, address: int) -> None:
        self._tensor, self._meter, self._address = tensor, meter, address

    def tensor(self) -> Tensor:
        """The tensor itself."""
        return self._tensor

    def __del__(self) -> None:
        if self._meter is not None:
            self._meter._release(self._address)
