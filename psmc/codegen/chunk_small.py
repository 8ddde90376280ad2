"""The small layers of a chunked spec as a spec of their own, which the pointwise kernels run: a max stabiliser, say."""

from __future__ import annotations

from dataclasses import dataclass, replace

from psmc.codegen.border import print_border
from psmc.codegen.pointwise import print_table
from psmc.codegen.torch_code import Signature, Source, print_block
from psmc.codegen.torch_value import Like
from psmc.ir import Aggregator, Assign, Block, DimValue, Expr, Ref, Space
from psmc.ir.query import restrict, taps
from psmc.ir.rewrite import refs, walk
from psmc.plan.chunked import split_layers
from psmc.plan.pointwise import licensed, plan
from psmc.structure.analyse import analyse
from psmc.structure.report import Structure


@dataclass(frozen=True)
class Small:
    """kernels: module text that defines SMALL_KERNELS; output: the torch function of the readout, prefixes as at_m and
    before_m; operator: the expression that makes the layer's operator, `psmc.runtime.kit_op`."""

    kernels: str
    output: Source
    operator: str


def small_scan(agg: Aggregator, structure: Structure) -> Small | None:
    """None where there are no small layers, or the pointwise kernels do not run them."""
    layers, _ = split_layers(structure)
    if not layers or taps(agg):
        return None
    own = _own(agg, tuple(n for x in layers for n in x.components), {n for x in layers for n in x.element})
    found = analyse(own)
    if licensed(own, found) is not None:
        return None
    text = print_table(own, found, plan(own, found), "SMALL_KERNELS")
    likes = tuple(Like(f"s.{c.name}", c.kind) for c in own.state if c.name in found.live)
    output = print_block(own, own.output, Signature("output_small", "s, prev, x, p, n", likes))
    rules = "lift=lift_small, combine=combine_small, advance=advance_small, output=output_small, identity=identity"
    border = print_border(own, "SPEC.digest", found.live)
    kernels = "PointwiseKernels(SMALL_KERNELS, exact=True)"
    return Small(text, output, f'Operator({border}, SimpleNamespace({rules}), "scan", {kernels})')


def _own(agg: Aggregator, components: tuple[str, ...], held: set[str]) -> Aggregator:
    """The aggregator of some components, which read no others; its outputs are their prefixes, with and without the
    token."""
    assert isinstance(agg.combine, Block)
    element = tuple(c.name for c in agg.state if c.name in held)
    lift, combine = restrict(agg.leaf, element), restrict(agg.combine, element)
    values = [a.value for block in (lift, combine) for a in (*block.lets, *block.results)]
    read = {(r.space, r.name) for r in refs(*values)}
    inputs = tuple(t for t in agg.leaf_inputs if ("input", t.name) in read)
    params = tuple(t for t in agg.params if ("param", t.name) in read)
    state = tuple(c for c in agg.state if c.name in element)
    named = {d for dims in (x.dims for group in (inputs, params, state) for x in group) for d in dims}
    named |= {node.dim for node in walk(*values) if isinstance(node, DimValue)}
    sides: tuple[tuple[str, Space], ...] = (("at", "state"), ("before", "prev"))
    readout = tuple(_copy(agg, f"{word}_{n}", space, n) for word, space in sides for n in components)
    return replace(
        agg, name=f"{agg.name}_small", dims=tuple(d for d in agg.dims if d.name in named), inputs=inputs,
        params=params, state=state, lift=lift, combine=combine, recurrence=None, readout=Block(results=readout),
        doc="", origin={},
    )  # fmt: skip


def _copy(agg: Aggregator, name: str, space: Space, component: str) -> Assign:
    own = agg.component(component)
    indices = own.identity.indices
    value: Expr = Ref(space, component, indices, own.kind)
    return Assign(name, indices, value)
