"""Which rank holds what of a model, and what is sent: one page, with nothing to fetch."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from colrow.comm.ledger import Call
from colrow.explain.drawings import (
    WIDTH,
    arrow,
    heads,
    legend,
    part_row,
    span,
    strip,
    svg,
)
from colrow.explain.holdings import (
    GROUPS,
    Holding,
    Question,
    Traffic,
    holdings,
    layers_text,
    traffic,
)
from colrow.layers.describe import BlockSpec
from colrow.layers.describe.parts import StackedSpec
from colrow.models.config import num_parameters
from colrow.planner.charts import Bar, BarPart, bars
from colrow.planner.charts import legend as bar_legend
from colrow.text import bytes_text

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:960px;padding:0 1rem;
color:#1c2733;background:#fff}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.1rem;margin-top:2.2rem}
svg{width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:#33424f}
svg .name{font-weight:600}svg .small{font-size:11px;fill:#5c6b78}svg .on{fill:#fff;font-size:10px}
svg .all{fill:#ccd3da}svg .sent{fill:#1c2733}svg .on-sent{fill:#fff}svg .quiet{fill:#eef1f4}
svg .on-quiet{fill:#5c6b78}svg [data-rank]{transition:opacity .15s}.dim{opacity:.12}
nav{position:sticky;top:0;background:#fffe;padding:.5em 0;display:flex;flex-wrap:wrap;gap:.4em}
button{font:13px system-ui;border:1px solid #d5dce2;border-radius:1em;background:#fff;
padding:.15em .8em;cursor:pointer}button.on{border-color:#1c2733;background:#eef1f4}
i{display:inline-block;width:.8em;height:.8em;margin-right:.4em;border-radius:2px}
.key{margin-right:1.1em;white-space:nowrap;font-size:13px}
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.25em .9em .25em 0;
border-bottom:1px solid #e3e8ed}td.n,th.n{text-align:right}.note{color:#5c6b78}
"""
_SCRIPT = """
let shown=null;
for(const b of document.querySelectorAll('button'))b.onclick=()=>{
shown=shown===b.dataset.rank?null:b.dataset.rank;
for(const e of document.querySelectorAll('[data-rank]')){
const own=shown===null||e.dataset.rank===shown;
if(e.tagName==='BUTTON')e.classList.toggle('on',shown!==null&&own);
else e.classList.toggle('dim',!own);}};
"""


def write_page(path: str | Path, question: Question) -> None:
    """Writes the page."""
    title = f"{question.name} over {question.ranks} ranks"
    held = holdings(question)
    sections = [
        f"<h1>{escape(title)}</h1>",
        _summary(question, held),
        f"<nav>{legend(question.ranks)}</nav>",
        *(_block(question, block, layers) for block, layers in question.kinds.items()),
        "<h2>Attention heads</h2>",
        _heads(question),
        "<h2>Who holds which indices</h2>",
        _indices(question, held),
        "<h2>Bytes of the weights</h2>",
        _weights(question, held),
        "<h2>A step of training: what is sent</h2>",
        _collectives(question, traffic(question, 0)),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"{''.join(sections)}<script>{_SCRIPT}</script></body></html>\n"
    )
    Path(path).write_text(page, encoding="utf-8")


def _summary(question: Question, held: Sequence[Holding]) -> str:
    config, most = question.config, max(each.parameters for each in held)
    whole = num_parameters(config)
    return (
        f"<p>{whole / 1e9:.3g} billion parameters in {config.num_layers} layers of hidden size "
        f"{config.hidden_size}; a rank holds {most / whole:.1%} of them at most, "
        f"{most * question.itemsize / 1e9:.3g} GB in {question.dtype}.</p>"
        '<p class="note">A colour is a rank; grey is held by all. Click a rank to see what it has, '
        "and hold the pointer over a piece for its indices.</p>"
    )


def _block(question: Question, block: BlockSpec, layers: Sequence[int]) -> str:
    """One kind of block, from its input to its output."""
    calls = {call.layer.split(".", 2)[2]: call for call in traffic(question, layers[0]).forward}
    out, y = [], 6.0

    def add(drawn: tuple[str, float]) -> None:
        nonlocal y
        out.append(drawn[0])
        y += drawn[1] + 8

    def exchange(place: str) -> None:
        if call := calls.get(place):
            add(arrow(y, _op(call), f"{bytes_text(call.bytes)} on each rank"))
        else:
            add(arrow(y, "every rank has the input: nothing sent", ""))

    parts = block.parts(question.division)
    exchanges = {sent.layer: sent.kind for sent in block.exchanges()}
    for place in ("attention", "mlp"):
        own = [name for name in parts if name.startswith(f"{place}.")]
        before, after = f"{place}_norm", f"{place}_post_norm"
        if before in parts:
            add(part_row(before, parts[before], y, question.ranks))
        for layer, kind in exchanges.items():
            if layer.startswith(f"{place}.") and kind == "column":
                exchange(layer)
        for name in own:
            part = parts[name]
            if isinstance(part, StackedSpec):
                shown = f"{name} (× {part.experts})"
                add(part_row(shown, part.layer, y, question.ranks))
            else:
                add(part_row(name, part, y, question.ranks))
        for layer, kind in exchanges.items():
            if layer.startswith(f"{place}.") and kind != "column":
                exchange(layer)
        if after in parts:
            add(part_row(after, parts[after], y, question.ranks))
    which = f"layers {layers_text(layers)}" if len(layers) > 1 else f"layer {layers[0]}"
    residual = "both add to" if block.parallel_residual else "each adds to"
    return (
        f"<h2>A block ({which}), forward from top to bottom</h2>{svg(y, out)}"
        f'<p class="note">A matrix is drawn with its inputs down and its outputs to the right. '
        f"Attention and MLP {residual} the block's input.</p>"
    )


def _heads(question: Question) -> str:
    attention = question.config.blocks[0].attention
    split = attention.heads(question.division)
    note = f"{split.query.length} query heads"
    if split.group_size > 1:
        note += f", each {split.group_size} of which read one of {split.key_value.length} KV heads"
    shared = sum(stop - start for start, stop in split.key_value.shared)
    if shared:
        note += (
            f"; {shared} KV head{'s are' if shared > 1 else ' is'} held by more than one rank, "
            "which add up their gradients"
        )
    return f"<p>{note}.</p>{heads(split.query, split.key_value)}"


def _indices(question: Question, held: Sequence[Holding]) -> str:
    division, config = question.division, question.config
    drawn = "".join(
        f"<p>{what}</p>{svg(24, [strip(part, 2, 2, WIDTH - 4, 20, name)])}"
        for what, name, part in (
            (
                f"{config.blocks[0].mlp.ffn_size} features of an MLP",
                "features",
                division.of(config.blocks[0].mlp.ffn_size),
            ),
            (
                f"{config.vocab_size} rows of embedding and head",
                "rows",
                division.of(config.vocab_size),
            ),
        )
    )
    rows = "".join(
        f"<tr><td>{rank}</td><td>{span(each.query_heads)}</td><td>{span(each.key_value_heads)}</td>"
        f"<td>{span(each.features)}</td><td>{span(each.vocabulary)}</td>"
        f'<td class="n">{each.parameters:,}</td>'
        f'<td class="n">{bytes_text(each.cached * question.itemsize)}</td></tr>'
        for rank, each in enumerate(held)
    )
    return (
        f"{drawn}<table><tr><th>rank</th><th>query heads</th><th>KV heads</th><th>MLP features</th>"
        '<th>vocabulary</th><th class="n">parameters</th><th class="n">cache, a token</th></tr>'
        f"{rows}</table>"
    )


def _weights(question: Question, held: Sequence[Holding]) -> str:
    rows = [
        Bar(
            f"rank {rank}",
            tuple(
                BarPart(group, each.elements[group] * question.itemsize / 1e9, colour)
                for colour, group in enumerate(GROUPS, 4)
            ),
        )
        for rank, each in enumerate(held)
    ]
    most = max(each.parameters for each in held)
    training = most * (2 * question.itemsize + 8)
    return (
        f"{bars(rows, 'GB')}<p>{bar_legend(rows)}</p>"
        f"<p>Training with AdamW keeps a gradient and two fp32 states for each: "
        f"{training / 1e9:.3g} GB on the fullest rank, before activations "
        "(<code>colrow plan</code> has those).</p>"
    )


def _collectives(question: Question, sent: Traffic) -> str:
    if question.ranks == 1:
        return "<p>One rank sends nothing.</p>"
    rows = "".join(
        f"<tr><td>{when}</td><td>{escape(call.layer.removeprefix('blocks.0.'))}</td>"
        f'<td>{_op(call)}</td><td class="n">{bytes_text(call.bytes)}</td>'
        f'<td class="n">{bytes_text(call.wire_bytes(question.ranks))}</td></tr>'
        for when, calls in (
            ("block, forward", sent.forward),
            ("block, backward", sent.backward),
            ("around the blocks", sent.around),
        )
        for call in calls
    )
    return (
        f"<p>{question.batch} × {question.sequence} tokens in {question.dtype}"
        f"{', sequence parallel' if question.sequence_parallel else ''}: {sent.calls} collectives "
        f"over all layers, {bytes_text(sent.wire_bytes)} sent by each rank in rings. "
        "Those of the first layer in their order, then those around the blocks.</p>"
        '<table><tr><th>when</th><th>layer</th><th>collective</th><th class="n">buffer</th>'
        f'<th class="n">a rank sends</th></tr>{rows}</table>'
    )


def _op(call: Call) -> str:
    return call.op.replace("_", "-")
