"""Plans: the names of styles, and what a pattern matches."""

import importlib
import pkgutil

import pytest
import transformers
import transformers.models

from colrow.inplace.find.styles import OTHERS, STYLES, Matcher, check_styles, pattern_of


def test_every_style_of_every_installed_configuration_is_known() -> None:
    seen = set()
    for package in pkgutil.iter_modules(transformers.models.__path__):
        path = f"transformers.models.{package.name}.configuration_{package.name}"
        try:
            module = importlib.import_module(path)
        except ImportError:
            continue
        for value in vars(module).values():
            for plan in ("base_model_tp_plan", "base_model_ep_plan"):
                seen |= set((getattr(value, plan, None) or {}).values())
    assert {"colwise", "rowwise"} < seen
    assert seen <= STYLES | OTHERS.keys()


def test_unknown_styles_are_named() -> None:
    with pytest.raises(ValueError, match=r"q_proj: unknown style 'diagonal'; known are .*colwise"):
        check_styles({"q_proj": "diagonal"})
    with pytest.raises(ValueError, match="expert parallelism"):
        check_styles({"mlp.experts": "grouped_gemm"})


def test_patterns_match_ends_of_names() -> None:
    matcher = Matcher({"layers.*.mlp.up": "colwise", "up": "replicate"})
    assert matcher.style("model.layers.11.mlp.up") == "colwise"
    assert matcher.style("model.layers.x.mlp.up") == "replicate"
    assert matcher.style("model.layers.1.mlp.group") is None
    assert matcher.unmatched(["a.up"]) == ["layers.*.mlp.up"]
    assert pattern_of("h.3.attn") == "h.*.attn"
