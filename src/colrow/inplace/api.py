"""``colrow.parallelize``: any transformer, in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from colrow.mesh import Mesh
from colrow.inplace.apply import Applier
from colrow.inplace.capture import capture_calls
from colrow.inplace.examples import example_batch
from colrow.inplace.infer import infer
from colrow.inplace.record import Record
from colrow.inplace.vocabulary import split_loss, split_vocabulary, vocabulary_layers


def parallelize(
    model: nn.Module,
    mesh: Mesh,
    plan: str | Mapping[str, str] = "auto",
    *,
    example_inputs: Mapping[str, Any] | None = None,
    sequence_parallel: bool = False,
    check: bool = True,
) -> nn.Module:
    """Makes a model tensor-parallel in place; returns the same object."""
    tp = mesh.tp
    inputs = example_inputs if example_inputs is not None else example_batch(model)
    if tp.size == 1:
        return model
    calls = capture_calls(model, inputs)
    vocabulary = vocabulary_layers(model, set(calls))
    inference = infer(model, calls, tp.size, vocabulary.names)
    record = Record(tp)
    model.__dict__["colrow_record"] = record
    applier = Applier(model, record)
    for name, proofs in inference.proofs.items():
        for proof in proofs:
            applier.proof(name, proof)
    split_vocabulary(applier, vocabulary)
    split_loss(applier, vocabulary)
    return model
