"""One token through a rank's share of a model, behind a cache of fixed length."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.gpu.shapes import Share, group, whole_model
from benchmarks.gpu.timing import Timer
from colrow.models.config import common_attention
from colrow.models.decoder import Decoder


class FixedCache:
    """A key-value cache whose length stays: each token is written where the last one was.

    So every step is the same, as a captured graph needs it, and none copies the cache.
    """

    def __init__(self, model: Decoder, batch: int, length: int) -> None:
        attention = common_attention(model.config)
        heads = attention.heads(model.division).key_value.size(model.tp.rank)
        shape = (batch, heads, length + 1, attention.head_dim)
        like = next(model.parameters())
        self.length = length
        self._keys, self._values = (
            [
                torch.randn(shape, dtype=like.dtype, device=like.device)
                for _ in range(model.config.num_layers)
            ]
            for _ in range(2)
        )

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self._keys[layer][:, :, self.length :] = keys
        self._values[layer][:, :, self.length :] = values
        return self._keys[layer], self._values[layer]


def measure(
    share: Share,
    timer: Timer,
    dtype: torch.dtype,
    gigabytes_per_second: float,
    *,
    batch: int,
    cached: int,
    layers: int,
) -> dict[str, object]:
    """Eagerly, and on CUDA as a captured graph; without the choice of the token.

    Args:
        gigabytes_per_second: that the device copies with, for the time that reading the weights
            takes at least.
        cached: positions before the token.
        layers: of the model; all of them give the time of a token.
    """
    model = _model(share, timer.device, dtype, layers)
    cache = FixedCache(model, batch, cached)
    ids = torch.zeros(batch, 1, dtype=torch.int64, device=timer.device)

    @torch.inference_mode()
    def token() -> Tensor:
        return model.last_logits(ids, attention_mask=None, cache=cache)

    contestants = {"eager": {"token": token}}
    if timer.device.type == "cuda":
        graph, static = capture(token)
        with torch.inference_mode():
            expected = token()
            graph.replay()
            if not torch.allclose(static.float(), expected.float(), rtol=2e-2, atol=2e-2):
                raise RuntimeError(f"{share.label}: the captured graph gives other logits")
        contestants["graph"] = {"token": graph.replay}
    read = sum(p.nbytes for name, p in model.named_parameters() if name != "embedding.weight")
    return {
        "share": f"{share.name}, tp={share.ranks}, {layers} layers",
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "cached": cached,
        "weight_bytes": read,
        "seconds_to_read_weights": read / gigabytes_per_second / 1e9,
        "contestants": {
            name: {
                "problem": times.problem,
                **{p: {"seconds": s} for p, s in times.seconds.items()},
            }
            for name, times in timer.race(contestants).items()
        },
    }


def capture(call: object) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The call as a CUDA graph, and the tensor that its replays write.

    Before it the call runs on a side stream, as torch's documentation asks for.
    """
    assert callable(call)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def _model(share: Share, device: torch.device, dtype: torch.dtype, layers: int) -> Decoder:
    """Values drawn by torch: what they are does not matter, and it is faster."""
    model = Decoder(
        whole_model(share, layers), group(share.ranks), device=device, dtype=dtype
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.ones_(parameter)
    return model
