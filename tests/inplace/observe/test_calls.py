"""What modules were called with, and what the model gave."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.inplace.observe.calls import capture_calls


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        y = self.drop(self.layer(x)) * scale
        return {"result": y, "where": y.argmax(-1)}


def test_results_are_those_of_the_first_batch() -> None:
    model, x = Halves().double(), torch.randn(2, 4, dtype=torch.float64)
    calls, results = capture_calls(model, [{"x": x}, {"x": x, "scale": 2.0}, {"y": x}])
    assert calls["layer"].args[0].equal(x)
    (result,) = results
    torch.testing.assert_close(result, F.linear(x, model.layer.weight, model.layer.bias).detach())


class Cache:
    """Remembers what it was given, as a cache of keys and values does."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        cache.seen.append(x)
        result: Tensor = self.linear(x)
        return result


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Remembering(), Remembering()])

    def forward(self, x: Tensor) -> Tensor:
        cache = Cache()
        for layer in self.layers:
            x = layer(x, cache)
        return x


def test_a_captured_cache_is_as_it_was_at_the_call() -> None:
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    calls, _ = capture_calls(Twice().double(), [{"x": x}])
    assert [len(calls[f"layers.{i}"].args[1].seen) for i in range(2)] == [0, 1]
