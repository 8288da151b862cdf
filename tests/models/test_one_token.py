from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from colrow.checkpoint.pretrained import from_pretrained
from colrow.comm import collectives
from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import Call, record
from colrow.layers.block import ParallelBlock
from colrow.layers.column import QKVParallelLinear
from colrow.layers.norm import RMSNorm
from colrow.models.decoder import Decoder
from colrow.verification.reference import precision
from tests.generation import models
from tests.models import tiny
from tests.ranks import RankPool

FLAT = {
    *("llama", "llama-biased-tied", "qwen2", "gpt2", "gpt2-untied", "gpt_neox", "gpt_neox-serial"),
    *("phi4", "falcon-new", "falcon-serial", "glm", "smollm3"),
}
PROMPT = 4
IDS = tiny.batch()[:1, :9]


pytestmark = pytest.mark.cpu_only("the blocks are written out for CPUs")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """Checkpoints, and transformers' logits of the positions that are decoded one by one."""
    root = tmp_path_factory.mktemp("one_token")
    found = {}
    for name in tiny.CASES:
        model: Any = models.save(name, root / name).eval()
        with precision(torch.float64), torch.inference_mode():
            found[name] = root / name, model(IDS).logits[0, PROMPT:].clone()
    return found


@pytest.mark.parametrize("n", [1, 2, 3])
def test_logits_are_those_of_transformers(
    n: int, cases: dict[str, tuple[Path, Tensor]], ranks: RankPool
) -> None:
    results = ranks(n, decoded, {name: str(cases[name][0]) for name in tiny.at(n)})[0]
    for name in results:
        expected = cases[name][1]
        flat, logits, sent_as_modules_do = results[name]
        assert flat == (name in FLAT), name
        assert (logits - expected).norm() < 1e-12 * expected.norm(), name
        assert sent_as_modules_do, name


def decoded(tp: ParallelGroup, paths: dict[str, str]) -> dict[str, tuple[bool, Tensor, bool]]:
    found = {}
    for name, path in paths.items():
        model = from_pretrained(path, tp, dtype=torch.float64).for_decoding().eval()
        flat = model.one_token is not None
        logits, calls = one_by_one(model, tp)
        model.one_token = None
        _, of_modules = one_by_one(model, tp)
        found[name] = flat, logits, calls == of_modules
    return found


@torch.no_grad()
def one_by_one(model: Decoder, tp: ParallelGroup) -> tuple[Tensor, list[Call]]:
    """Whole logits of the tokens behind the prompt, and what was sent for them."""
    cache = model.make_cache(1, 5)  # grows on the way
    model.last_logits(IDS[:, :PROMPT], attention_mask=None, cache=cache)
    local = []
    with record(tp) as ledger:
        for position in range(PROMPT, IDS.shape[1]):
            token = IDS[:, position : position + 1]
            local.append(model.last_logits(token, attention_mask=None, cache=cache))
    whole = collectives.gather_from_tp(torch.cat(local), tp, partition=model.vocab)
    return whole, ledger.calls


@pytest.mark.parametrize("n", [1, 2])
def test_every_dtype_does_what_the_modules_do(
    n: int, cases: dict[str, tuple[Path, Tensor]], ranks: RankPool
) -> None:
    bounds = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
    for errors in ranks(n, against_modules, str(cases["llama"][0]), list(bounds)):
        for dtype, found in errors.items():
            assert max(found) < bounds[dtype], dtype


def against_modules(
    tp: ParallelGroup, path: str, dtypes: list[torch.dtype]
) -> dict[torch.dtype, list[float]]:
    """Relative errors of the flat pass in inference mode and outside of it, in both orders."""
    errors: dict[torch.dtype, list[float]] = {}
    for dtype in dtypes:
        for modes in ((torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)):
            model = from_pretrained(path, tp, dtype=dtype).for_decoding().eval()
            flat, found = model.one_token, []
            assert flat is not None
            for mode in modes:
                with mode():
                    model.one_token = flat
                    logits = decode(model, model.make_cache(1, 9)).double()
                    model.one_token = None
                    slow = decode(model, model.make_cache(1, 9)).double()
                found.append(((logits - slow).norm() / slow.norm()).item())
            errors.setdefault(dtype, []).extend(found)
    return errors


def decode(model: Decoder, cache: Any) -> Tensor:
    """This rank's logits of the tokens behind the prompt, with no ledger."""
    model.last_logits(IDS[:, :PROMPT], attention_mask=None, cache=cache)
    return torch.cat(
        [
            model.last_logits(IDS[:, i : i + 1], attention_mask=None, cache=cache)
            for i in range(PROMPT, IDS.shape[1])
        ]
    )


class Referring:
    """A cache that keeps what it is given, as it is."""

    def __init__(self) -> None:
        self.kept: dict[int, list[tuple[Tensor, Tensor]]] = {}

    @property
    def length(self) -> int:
        return sum(keys.shape[2] for keys, _ in self.kept.get(1, []))

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.kept.setdefault(layer, [])
        kept.append((keys, values))
        return torch.cat([k for k, _ in kept], 2), torch.cat([v for _, v in kept], 2)


@torch.no_grad()
def test_threads_and_caches_that_keep_what_they_are_given(
    cases: dict[str, tuple[Path, Tensor]],
) -> None:
    alone = ParallelGroup.single()
    model = from_pretrained(cases["llama"][0], alone, dtype=torch.float64).for_decoding().eval()
    assert model.config.num_layers == 2
    expected = decode(model, model.make_cache(1, 9))
    assert torch.equal(decode(model, Referring()), expected)

    def run(_: int) -> float:
        with torch.no_grad():
            found = decode(model, model.make_cache(1, 9))
        return ((found - expected).norm() / expected.norm()).item()

    with ThreadPoolExecutor(2) as pool:
        assert max(pool.map(run, range(40))) < 1e-12


def test_changed_weights_and_hooks_count(
    cases: dict[str, tuple[Path, Tensor]], ranks: RankPool
) -> None:
    assert all(all(checks) for checks in ranks(2, changed, str(cases["qwen2"][0])))


class Halved(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        result: Tensor = self.inner(x, **options)
        return result / 2


def changed(tp: ParallelGroup, path: str) -> list[bool]:
    model = from_pretrained(path, tp, dtype=torch.float64).for_decoding().eval()
    before, _ = one_by_one(model, tp)
    seen: list[int] = []
    hook = model.blocks[1].register_forward_hook(lambda *_: seen.append(1))
    hooked, _ = one_by_one(model, tp)
    hook.remove()
    after, _ = one_by_one(model, tp)
    down: Any = model.get_submodule("blocks.0.mlp.down")
    down.weight = torch.nn.Parameter(down.weight * 2, requires_grad=False)
    doubled, _ = one_by_one(model, tp)
    model.one_token = None
    by_modules, _ = one_by_one(model, tp)
    mlp: Any = model.for_decoding().get_submodule("blocks.0.mlp")
    mlp.down = Halved(mlp.down)
    halved, _ = one_by_one(model, tp)
    return [
        bool((halved - before).norm() < 1e-12 * before.norm()),
        not torch.equal(doubled, before),
        bool((doubled - by_modules).norm() < 1e-12 * by_modules.norm()),
        len(seen) == 1 + IDS.shape[1] - PROMPT,
        bool((hooked - after).norm() < 1e-12 * after.norm()),
        torch.equal(before, after),
    ]


def test_a_copy_of_a_model_has_weights_of_its_own(cases: dict[str, tuple[Path, Tensor]]) -> None:
    alone = ParallelGroup.single()
    model = from_pretrained(cases["qwen2"][0], alone, dtype=torch.float64).for_decoding().eval()
    before, _ = one_by_one(model, alone)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.get_parameter("norm.weight").mul_(2)
        copied.get_parameter("blocks.0.mlp.down.weight").mul_(0)
    after, _ = one_by_one(copied, alone)
    slow, _ = one_by_one(copied.for_decoding(), alone)
    model.blocks[0].dropout.p = 0.5
    dropping, _ = one_by_one(model.for_decoding().train(), alone)
    assert not torch.allclose(dropping, before)
    assert not torch.allclose(after, before)
    assert (after - slow).norm() < 1e-12 * slow.norm()


class PostNorm(ParallelBlock):
    """Norms behind attention and MLP, as OLMo 2 has them."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        attention, mlp = dict(options), dict(options)
        attention.pop("router_losses", None)
        for name in ("context", "cache", "dropout_key", "router_losses"):
            mlp.pop(name, None)
        x = x + self.attention_norm(self.attention(x, **attention))
        result: Tensor = x + self.mlp_norm(self.mlp(x, **mlp))
        return result


class Doubled(QKVParallelLinear):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return 2 * super().forward(x, **options)


def changes() -> dict[str, Callable[[Any], None]]:
    """What makes a block one that is not written out, by name."""

    def forward_of(module: Any) -> Callable[..., Tensor]:
        own = module.forward
        return lambda *args, **options: own(*args, **options) * 1.5

    def replaced(block: Any, path: str) -> None:
        module = block.get_submodule(path)
        module.forward = forward_of(module)

    def tracked(module: Any) -> None:
        module.register_forward_hook(lambda _module, _args, y: y * 1.5)

    def parametrised(layer: Any) -> None:
        torch.nn.utils.parametrizations.weight_norm(layer)
        with torch.no_grad():
            layer.parametrizations.weight.original0.mul_(1.5)

    def another(module: Any, cls: type) -> None:
        module.__class__ = cls

    def with_scale(norm: Any) -> None:
        norm._parameters["weight"] = norm.weight.detach().as_subclass(Scaled)

    return {
        "class": lambda b: another(b, PostNorm),
        "qkv": lambda b: another(b.attention.qkv, Doubled),
        **{
            f"forward of {path}": lambda b, path=path: replaced(b, path)  # type: ignore[misc]
            for path in ("attention", "attention.qkv", "mlp", "mlp.down", "mlp_norm", "dropout")
        },
        "hook": lambda b: tracked(b.attention.output),
        "norm": lambda b: setattr(b, "mlp_norm", Same()),
        "no norm": lambda b: setattr(b.attention_norm, "eps", 0.5),
        "window": lambda b: setattr(b.attention, "window", 3),
        "no rotation": lambda b: setattr(b.attention, "rope", None),
        "soft cap": lambda b: setattr(b.attention, "softcap", 2.0),
        "alibi": lambda b: setattr(b.attention, "alibi", True),
        "activation": lambda b: setattr(b.mlp, "activation", "relu"),
        "residual": lambda b: setattr(b, "parallel_residual", True),
        "frequencies": lambda b: setattr(b.attention, "frequencies", b.attention.frequencies * 2),
        "weight norm": lambda b: parametrised(b.mlp.up),
        "tensor": lambda b: with_scale(b.mlp_norm),
        "child": lambda b: b.mlp.add_module("adapter", torch.nn.Linear(2, 2)),
        "attribute": lambda b: setattr(b.attention, "further", 30.0),
        "rope": lambda b: setattr(
            b.attention, "rope", dataclasses.replace(b.attention.rope, theta=3.0)
        ),
        "query norm": lambda b: setattr(b.attention, "query_norm", Same()),
        "append": lambda b: None,
    }


class Same(torch.nn.Module):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return x


class Scaled(Tensor):
    """A tensor that multiplies by twice of what it holds."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Twice what torch computes, where it multiplies."""
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            return result * 2 if func in (torch.mul, Tensor.mul, Tensor.__mul__) else result


SAME_NUMBERS = {
    "alibi",
    "child",
    "attribute",
    "query norm",
    "append",
    "rope",
    "frequencies",
    "forward of dropout",
}
SERVED = {"no norm", "no rotation", "activation", "residual", "rope", "append"}


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
def test_only_blocks_that_are_known_are_served(
    cases: dict[str, tuple[Path, Tensor]], *, before: bool
) -> None:
    """Changes made before the model is laid out, and after."""
    alone = ParallelGroup.single()
    found: dict[str, tuple[bool, bool]] = {}
    for name, change in changes().items():
        model = from_pretrained(cases["llama"][0], alone, dtype=torch.float64).for_decoding().eval()
        usual = decoded_by(model)
        model.one_token = None if before else model.one_token
        with torch.no_grad():
            change(model.blocks[1])
        if name == "append":
            model.blocks.add_module("2", copy.deepcopy(model.blocks[1]))
        if before and name != "weight norm":
            model.for_decoding()
        flat = model.one_token
        calls: list[int] = []
        if flat is not None:
            model.one_token = Counted(flat, calls)  # type: ignore[assignment]
        logits = decoded_by(model)
        model.one_token = None
        slow = decoded_by(model)
        assert (logits - slow).norm() < 1e-12 * slow.norm(), name
        found[name] = bool(calls), bool((slow - usual).norm() < 1e-12 * slow.norm())
    assert found == {name: (name in SERVED, name in SAME_NUMBERS) for name in changes()}


class Counted:
    def __init__(self, flat: Any, calls: list[int]) -> None:
        self.flat, self.calls, self.serves = flat, calls, flat.serves

    def __call__(self, *args: Any) -> Tensor:
        self.calls.append(1)
        result: Tensor = self.flat(*args)
        return result


def decoded_by(model: Decoder) -> Tensor:
    with torch.no_grad():
        return decode(model, model.make_cache(1, 9))


def test_patched_classes_global_hooks_and_mixed_dtypes_take_the_ordinary_way(
    cases: dict[str, tuple[Path, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = ParallelGroup.single()
    model = from_pretrained(cases["llama"][0], alone, dtype=torch.float64).for_decoding().eval()
    usual, own = decoded_by(model), RMSNorm.forward
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, y: y * 2 if isinstance(module, RMSNorm) else None
    )
    hooked = decoded_by(model)
    handle.remove()
    with monkeypatch.context() as patch:
        patch.setattr(RMSNorm, "forward", lambda self, x, **o: own(self, x, **o) * 2)
        patched = decoded_by(model)
    assert (hooked - patched).norm() < 1e-12 * hooked.norm()
    assert (hooked - usual).norm() > 1e-3 * hooked.norm()
    assert torch.equal(decoded_by(model), usual)
    model.blocks[0].mlp_norm.float()
    mixed = decoded_by(model)
    model.one_token = None
    assert torch.equal(decoded_by(model), mixed)
