"""What is known of a model family, as one value. Plain Python, no torch.

A family is a composition of layers (the fields of :func:`colrow.models.compose.decoder`), the names
of its weights in Hugging Face and GGUF files, and the keys of its configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from colrow.models.compose import decoder
from colrow.models.config import ModelConfig
from colrow.models.hf_rope import RopeKeys, rope_config, spelled_rope

FusedLayout = Literal["side_by_side", "interleaved"]
Transposed = Literal["none", "blocks", "experts"]
Windowed = Literal["never", "always", "listed", "by_layer", "own"]
GGUFNumber: TypeAlias = Callable[[str, float | None], float]


@dataclass(frozen=True)
class GGUFForm:
    """How llama.cpp's files hold the models of a family.

    Attributes:
        architecture: its ``general.architecture``.
        modules: colrow's module name to the file's, as in :class:`Family`.
        fixed: fields that are the same for every file of the architecture.
        keys: further fields and the keys, in the architecture's namespace, that say them.
        reads: further keys of the architecture that :meth:`Family.complete_gguf` reads.
        windows: whether ``attention.sliding_window`` is understood; else it is refused.
        optional_biases: field to the tensor whose presence says that there are such biases.
        paired_heads: rows of Q and K are stored as interleaved rotary pairs.
        centred_norms: norms' weights are stored with the 1 added that the model adds.
    """

    architecture: str
    modules: Mapping[str, tuple[str, ...]]
    fixed: Mapping[str, object]
    keys: Mapping[str, str] = field(default_factory=dict)
    reads: frozenset[str] = frozenset()
    windows: bool = True
    optional_biases: Mapping[str, str] = field(default_factory=dict)
    paired_heads: bool = False
    centred_norms: bool = False


@dataclass(frozen=True)
class Family:
    """Names of one family, and what its models have in common.

    Attributes:
        name: as in ``model_type`` of its Hugging Face configuration.
        architecture: the class of transformers that runs it.
        modules: colrow's module name to the checkpoint's, ``{i}`` being the layer number and
            ``{e}`` that of an expert; where the checkpoint's has no ``{e}``, one tensor holds all
            experts. Several names are fused side by side, in this order. The name of a parameter
            comes before that of its module and stands for the whole name in the checkpoint.
        keys: field of :func:`decoder` to key of the configuration.
        fixed: fields that are the same for every model of the family.
        fused: how a single checkpoint matrix holds several of ours: one after the other
            ("side_by_side") or KV head by KV head, the query heads that read it before its key and
            its value ("interleaved").
        transposed: which matrices are stored ``[in, out]``: those of blocks, or of experts.
        alternating: a checkpoint's matrix that holds both of experts' gate and up has a row of the
            one, then a row of the other.
        aliases: other spellings of keys, which published configurations use, to the key.
        windows: which layers the key ``sliding_window`` is about: none, all, those that
            ``layer_types`` lists and else all, those that ``layer_types`` or
            ``max_window_layers`` name when ``use_sliding_window`` is set, or what the family's
            own :meth:`complete` makes of it.
        rope: how the configuration spells rotary positions.
        defaults: what is assumed for keys that a configuration leaves out, and only then: a key
            that is null stays unset.
        reads: further keys that :meth:`complete` reads.
        refused: key to the only value that is supported.
        later_layers: its files may hold layers behind the last, which the model has no use for.
        quantised: names of the quantisations (``quant_method``) in which its files are read.
        gguf: its form in GGUF files, or None.
        habits: fields that its published models share, for shapes that are made from sizes alone.
    """

    name: str
    architecture: str
    modules: Mapping[str, tuple[str, ...]]
    keys: Mapping[str, str]
    fixed: Mapping[str, object]
    fused: FusedLayout = "side_by_side"
    transposed: Transposed = "none"
    alternating: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)
    windows: Windowed = "never"
    rope: RopeKeys = field(default_factory=RopeKeys)
    defaults: Mapping[str, object] = field(default_factory=dict)
    reads: frozenset[str] = frozenset()
    refused: Mapping[str, object] = field(default_factory=dict)
    later_layers: bool = False
    quantised: frozenset[str] = frozenset()
    gguf: GGUFForm | None = None
    habits: Mapping[str, object] = field(default_factory=dict)

    def complete(self, fields: dict[str, Any], values: Mapping[str, Any]) -> None:
        """Adds the fields that no single key says, to those that are there already."""
        if fields["position"] == "rope" and "rope" not in fields:
            fields["rope"] = rope_config(values, fields["head_dim"], self.rope, self.name)

    def modules_of(self, config: ModelConfig) -> Mapping[str, tuple[str, ...]]:
        """The names of its weights in a Hugging Face checkpoint of this model."""
        return self.modules

    def gguf_modules_of(self, config: ModelConfig) -> Mapping[str, tuple[str, ...]]:
        """The names of its weights in a GGUF file of this model."""
        return {} if self.gguf is None else self.gguf.modules

    def compose(self, fields: Mapping[str, Any]) -> ModelConfig:
        """The model that these fields describe."""
        return decoder(family=self.name, **fields)

    def spell(self, values: dict[str, Any], fields: Mapping[str, Any]) -> None:
        """The way back of :meth:`complete`: adds keys to a configuration that is written."""
        if fields["rope"] is not None:
            values["rope_parameters"] = spelled_rope(fields["rope"], fields["head_dim"])

    def complete_gguf(
        self, fields: dict[str, Any], number: GGUFNumber, names: Collection[str]
    ) -> None:
        """Adds to the fields of a GGUF file what llama.cpp's loader makes of it for this family.

        Args:
            number: a function from a key of the architecture's namespace, and what to take where it
                is missing, to its number.
            names: of the tensors in the file.
        """
