"""What the chunked plan needs of a spec, as torch functions: the factors of each layer and the epilogue."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from psmc.codegen.torch_code import Signature, Source, print_block
from psmc.codegen.torch_value import Like
from psmc.derive.simplify import ZERO
from psmc.ir import Aggregator, Assign, Block, Expr, Index, Ref
from psmc.ir.query import restrict
from psmc.ir.rewrite import replace_refs
from psmc.structure.report import Affine, Layer, Linear, Structure


def print_layers(agg: Aggregator, structure: Structure) -> tuple[list[Source], str]:
    """(functions, the `LAYERS` literal) of a spec that `plan.chunked` licenses."""
    sources: list[Source] = []
    entries: list[str] = []
    for n, layer in enumerate(structure.layers):
        if layer.affine is None or layer.cls != "affine":
            sources += _small(agg, layer, n)
            entries.append(f"Scanned({layer.components!r}, lift_{n}, combine_{n}, advance_{n})")
            continue
        parts = (part for readout in structure.readout for part in readout.linear)
        reads = tuple(part for part in parts if part.component == layer.affine.component)
        sources.append(_factors(agg, layer.affine, reads, n))
        entries.append(_entry(layer, layer.affine, reads, n))
    sources.append(_readout(agg, structure))
    return sources, "LAYERS = (\n" + "".join(f"    {entry},\n" for entry in entries) + ")\n"


def _inputs(agg: Aggregator) -> tuple[Like, ...]:
    return tuple(Like(f"x.{t.name}", t.kind) for t in agg.leaf_inputs)


def _small(agg: Aggregator, layer: Layer, n: int) -> Iterator[Source]:
    assert isinstance(agg.combine, Block)
    right = tuple(Like(f"r.{name}", agg.component(name).kind) for name in layer.element)
    yield print_block(agg, restrict(agg.leaf, layer.element), Signature(f"lift_{n}", "x, p, n", _inputs(agg)))
    for name, members in ((f"combine_{n}", layer.element), (f"advance_{n}", layer.components)):
        yield print_block(agg, restrict(agg.combine, members), Signature(name, "l, r, p, n", right))


def _factors(agg: Aggregator, affine: Affine, reads: tuple[Linear, ...], n: int) -> Source:
    """Named results over (outer, key) or (outer, value); a decay that is one number a token is `log`, over outer."""
    rows: list[Assign] = []
    key = (*affine.outer, affine.key)
    value = affine.outer if affine.value is None else (*affine.outer, affine.value)
    assert affine.decay.logs is not None
    by_key, by_value = affine.decay.logs
    if by_key.value != ZERO:
        scalar = affine.key not in by_key.value.free
        rows.append(_over("log" if scalar else "log_key", by_key.value, affine.outer if scalar else key))
    if by_value.value != ZERO:
        rows.append(_over("log_value", by_value.value, value))
    for letter, term in (("u", affine.transition.left), ("w", affine.transition.right), ("b", affine.injection.left)):
        rows += [_over(f"{letter}{c}", column.value, key) for c, column in enumerate(term)]
    rows += [_over(f"c{c}", column.value, value) for c, column in enumerate(affine.injection.right)]
    for c, part in enumerate(reads):
        found = (("q", part.query), ("p", part.previous))
        rows += [_over(f"{letter}{c}", q.value, key) for letter, q in found if q is not None]
    return print_block(agg, Block(results=tuple(rows)), Signature(f"factors_{n}", "x, s, prev, p, n", _inputs(agg)))


def _over(name: str, value: Expr, axes: tuple[Index, ...]) -> Assign:
    assert set(value.free) <= set(axes), f"{name} has more indices than {axes}"
    return Assign(name, axes, value)


def _entry(layer: Layer, affine: Affine, reads: tuple[Linear, ...], n: int) -> str:
    indices = layer.step[0].indices
    wanted = (*affine.outer, affine.key, *(() if affine.value is None else (affine.value,)))
    order = tuple(indices.index(i) for i in wanted)
    assert sorted(order) == list(range(len(indices)))
    names = tuple(part.name for part in reads)
    return (
        f"Chunked({affine.component!r}, factors_{n}, rank={affine.rank}, columns={affine.injection.rank}, "
        f"reads={names!r}, order={order!r}, outer={len(affine.outer)}, vector={affine.value is None})"
    )


def _readout(agg: Aggregator, structure: Structure) -> Source:
    """The outputs over the linear parts, which stand in the namespace of prefixes."""
    parts = {part.name for readout in structure.readout for part in readout.linear}

    def rule(ref: Ref) -> Expr | None:
        if ref.space == "let" and ref.name in parts:
            return Ref("state", ref.name, ref.subs, ref.value_kind)
        return None

    results = tuple(replace(r.epilogue, value=replace_refs(r.epilogue.value, rule)) for r in structure.readout)
    return print_block(agg, Block(results=results), Signature("readout", "s, prev, x, p, n", _inputs(agg)))
