"""What the chunked plan needs of a spec, as torch functions: the factors of each layer and the epilogue."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from psmc.codegen.chunk_erase import erasers
from psmc.codegen.torch_code import Signature, Source, inputs_like, print_block
from psmc.codegen.torch_expr import ExprPrinter
from psmc.codegen.torch_value import Like
from psmc.derive.simplify import ONE, ZERO
from psmc.ir import Aggregator, Assign, Block, Expr, Index, Op, Reduce, Ref, Space, Sub
from psmc.ir.query import restrict
from psmc.ir.rewrite import instantiate, rename, replace_refs, walk
from psmc.plan.chunked import extra_indices, split_layers
from psmc.structure.report import Affine, Layer, Linear, Structure


def print_layers(
    agg: Aggregator, structure: Structure, fused: tuple[Source, str] | None = None, operator: str = "None"
) -> tuple[list[Source], str]:
    """(functions, the `LAYERS` literal) of a spec that `plan.chunked` licenses; `fused`: from `chunk_factors`;
    `operator`: what runs the small layers by kernels, from `chunk_small`."""
    small, stacks = split_layers(structure)
    sources: list[Source] = []
    entries: list[str] = []
    if small:
        sources += _small(agg, small)
        names = tuple(n for layer in small for n in layer.components)
        entries.append(f"Scanned({names!r}, lift_small, combine_small, advance_small, {operator})")
    for n, stack in enumerate(stacks):
        components = tuple(a.component for a in stack)
        parts = [p for r in structure.readout for p in r.linear if p.component in components]
        asked = queries(stack, parts)
        rows = factors(stack, tuple(asked))
        if not stack[0].rank and not any(r.name.endswith("_key") for r in rows):
            rows = [part for r in rows for part in _apart(r)]
        plain = {r.name: found for r in rows if (found := _plain(agg, r)) is not None}
        block = Block(results=tuple(r for r in rows if r.name not in plain))
        sources.append(print_block(agg, block, Signature(f"factors_{n}", "x, s, prev, p, n", inputs_like(agg))))
        inputs_read = {k: x for k, (x, _) in plain.items()}
        scales = {k: text for k, (_, text) in plain.items() if text}
        if fused is not None:
            sources.append(fused[0])
        taken = "None" if fused is None else fused[1]
        entries.append(_entry(stack, asked, n, inputs_read, scales, _shown(structure), taken))
    sources.append(_readout(agg, structure))
    return sources, "LAYERS = (\n" + "".join(f"    {entry},\n" for entry in entries) + ")\n"


def _small(agg: Aggregator, layers: tuple[Layer, ...]) -> Iterator[Source]:
    assert isinstance(agg.combine, Block)
    members = tuple(n for layer in layers for n in layer.components)
    held = {n for layer in layers for n in layer.element}
    element = tuple(c.name for c in agg.state if c.name in held)
    right = tuple(Like(f"r.{name}", agg.component(name).kind) for name in element)
    yield print_block(agg, restrict(agg.leaf, element), Signature("lift_small", "x, p, n", inputs_like(agg)))
    for name, wanted in (("combine_small", element), ("advance_small", members)):
        yield print_block(agg, restrict(agg.combine, wanted), Signature(name, "l, r, p, n", right))


_Query = tuple[Assign | None, Assign | None]  # (q, p) over outer, extra, key


def queries(stack: tuple[Affine, ...], parts: list[Linear]) -> dict[_Query, list[Linear]]:
    """The linear parts of the outputs, grouped by the pair of vectors (q, p) with which they read a state.

    The vectors are written in the indices of the stack's first component, so that parts of several components that
    read with the same vectors meet in one group.
    """
    found: dict[_Query, list[Linear]] = {}
    head = stack[0]
    for part in dict.fromkeys(parts):
        (own,) = (a for a in stack if a.component == part.component)
        extra = extra_indices(part, own)
        named = tuple(Index(f"extra_{k}", i.dim) for k, i in enumerate(extra))
        moved: dict[Index, Sub] = {own.key: head.key, **dict(zip(extra, named, strict=True))}

        def over(
            query: Assign | None, moved: dict[Index, Sub] = moved, named: tuple[Index, ...] = named
        ) -> Assign | None:
            return query and Assign("", (*head.outer, *named, head.key), rename(query.value, moved))

        found.setdefault((over(part.query), over(part.previous)), []).append(part)
    return found


def factors(stack: tuple[Affine, ...], asked: tuple[_Query, ...]) -> list[Assign]:
    """A stack's factors as named results over (outer, key) or (outer, value).

    log, log_key, log_value: logs of the decay (decay, ... where logs are not known); u0, w0, b0, c0, ...: the columns
    of U, W, B and C, c0_1 that of the stack's second component; q0, p0, ...: the vectors of `asked` that read the state
    after and before the token. `kit_layers.Chunked` says how they are used.
    """
    rows: list[Assign] = []
    affine = stack[0]
    key = (*affine.outer, affine.key)
    kind, decay = "log", affine.decay.logs
    if decay is None:
        kind, decay = "decay", affine.decay.parts
    assert decay is not None
    one = ZERO if kind == "log" else ONE
    by_key, by_value = decay
    if by_key.value != one:
        scalar = affine.key not in by_key.value.free
        rows.append(_over(kind if scalar else f"{kind}_key", by_key.value, affine.outer if scalar else key))
    if by_value.value != one:
        rows.append(_over(f"{kind}_value", by_value.value, by_value.indices))
    u, w, b = affine.transition.left, affine.transition.right, affine.injection.left
    erased = erasers(affine)
    u, w = ((), erased) if erased is not None else (u, w)
    for letter, term in (("u", u), ("w", w), ("b", b)):
        rows += [_over(f"{letter}{c}", column.value, key) for c, column in enumerate(term)]
    for j, each in enumerate(stack):
        value = each.outer if each.value is None else (*each.outer, each.value)
        rows += [_over(f"c{c}_{j}" if j else f"c{c}", x.value, value) for c, x in enumerate(each.injection.right)]
    for c, query in enumerate(asked):
        rows += [_over(f"{x}{c}", a.value, a.indices) for x, a in zip("qp", query, strict=True) if a is not None]
    return rows


def _apart(row: Assign) -> list[Assign]:
    """The row itself, or a vector b and the number that multiplies it as two rows, if b is such a product."""
    split = split_number(row) if row.name[0] == "b" else None
    return [row] if split is None else list(split)


def split_number(row: Assign) -> tuple[Assign, Assign] | None:
    """A vector b = n x as the rows of the vector x and of n, a number a token; None if b is not such a product."""
    over, under = _product(row.value)
    key = row.indices[-1]
    vectors = [x for x in over if key in x.free]
    if len(vectors) != 1 or any(key in x.free for x in under) or len(over) + len(under) == 1:
        return None
    rest = [x for x in over if x is not vectors[0]]
    number = rest[0] if rest else ONE
    for x in rest[1:]:
        number = Op("mul", (number, x))
    for x in under:
        number = Op("div", (number, x))
    vector = Assign(row.name, row.indices, vectors[0])
    return vector, _over(f"n{row.name[1:]}", number, row.indices[:-1])


def _product(expr: Expr) -> tuple[list[Expr], list[Expr]]:
    """Factors above and below the line, in order."""
    if isinstance(expr, Op) and expr.op in ("mul", "div"):
        (a, b), (c, d) = (_product(x) for x in expr.args)
        return (a + c, b + d) if expr.op == "mul" else (a + d, b + c)
    return [expr], []


def _plain(agg: Aggregator, row: Assign) -> tuple[str, str] | None:
    """(name, scale) of a factor that is an input, so that kernels read the input itself: the input's name, and the text
    of the number that multiplies it, '' if there is none. Only queries may have such a number. None: it is computed."""
    value: Expr = row.value
    scale: Expr | None = None
    if row.name[0] in "qp" and isinstance(value, Op) and value.op in ("mul", "div"):
        times, (left, right) = value.op == "mul", value.args
        if times and _number(left):
            left, right = right, left
        if _number(right):
            value, scale = left, right if times else Op("div", (ONE, right))
    if not isinstance(value, Ref) or value.space != "input" or value.lag or value.kind != "real":
        return None
    own = next(t.dims for t in agg.leaf_inputs if t.name == value.name)
    whole = value.subs == row.indices and own == tuple(i.dim for i in row.indices)
    text = "" if scale is None else number_text(scale)
    return (value.name, text) if whole and text is not None else None


def number_text(expr: Expr) -> str | None:
    """The expression as Python text over the dim sizes `n`; None if it needs a tensor."""
    helpers: set[str] = set()
    shown = ExprPrinter(Like("n", "real"), {}, lambda ref: None, helpers).show(expr, ())
    return None if shown.axes is not None or helpers else shown.text


def _number(expr: Expr) -> bool:
    """Whether it reads nothing but sizes."""
    return not expr.free and not any(isinstance(node, Ref) for node in walk(expr))


def _shown(structure: Structure) -> tuple[str, ...]:
    """The names of the linear parts that are an output as they stand, and that no other output reads."""
    direct = {r.output: r.epilogue.value for r in structure.readout if isinstance(r.epilogue.value, Ref)}
    names = {x.name for x in direct.values() if isinstance(x, Ref) and x.space == "let"}
    others = [r.epilogue.value for r in structure.readout if r.output not in direct]
    used = {x.name for x in walk(*others) if isinstance(x, Ref) and x.space == "let"}
    return tuple(sorted(names - used))


def _over(name: str, value: Expr, axes: tuple[Index, ...]) -> Assign:
    assert set(value.free) <= set(axes), f"{name} has more indices than {axes}"
    return Assign(name, axes, value)


def _entry(
    stack: tuple[Affine, ...], asked: dict[_Query, list[Linear]], n: int, plain: dict[str, str],
    scales: dict[str, str], shown: tuple[str, ...], fused: str,
) -> str:  # fmt: skip
    names = tuple(a.component for a in stack)
    orders = []
    for a in stack:
        wanted = (*a.outer, a.key, *(() if a.value is None else (a.value,)))
        orders.append(tuple(a.decay.value.indices.index(i) for i in wanted))
        assert sorted(orders[-1]) == list(range(len(a.decay.value.indices)))
    reads = []
    for parts in asked.values():
        placed = []
        for part in parts:
            (own,) = (a for a in stack if a.component == part.component)
            extra = extra_indices(part, own)
            axes = (*own.outer, *extra, *(() if own.value is None else (own.value,)))
            placed.append((part.name, names.index(part.component), tuple(axes.index(i) for i in part.indices)))
        reads.append(f"Reads({len(extra)}, {tuple(placed)!r})")
    vectors = tuple(a.value is None for a in stack)
    numbers = "{" + ", ".join(f"{k!r}: {text}" for k, text in scales.items()) + "}"
    return (
        f"Chunked({names!r}, factors_{n}, rank={stack[0].rank}, columns={stack[0].injection.rank}, "
        f"reads=({''.join(f'{r}, ' for r in reads)}), orders={tuple(orders)!r}, outer={len(stack[0].outer)}, "
        f"vectors={vectors!r}, plain={plain!r}, scales=lambda n: {numbers}, shown={shown!r}, "
        f"fused={fused})"
    )


def _readout(agg: Aggregator, structure: Structure) -> Source:
    """The torch function of the outputs. It reads the linear parts of matrix states by name, as if each were a state;
    those of small components are written out as sums over the components."""
    small, _ = split_layers(structure)
    affines = {layer.affine.component: layer.affine for layer in small if layer.affine is not None}
    parts = {part.name: part for readout in structure.readout for part in readout.linear}

    def rule(ref: Ref) -> Expr | None:
        part = parts.get(ref.name) if ref.space == "let" else None
        if part is None:
            return None
        if part.component in affines:
            return instantiate(_in_full(agg, part, affines[part.component]), ref.subs)
        return Ref("state", ref.name, ref.subs, ref.value_kind)

    results = tuple(replace(r.epilogue, value=replace_refs(r.epilogue.value, rule)) for r in structure.readout)
    return print_block(agg, Block(results=results), Signature("readout", "s, prev, x, p, n", inputs_like(agg)))


def _in_full(agg: Aggregator, part: Linear, affine: Affine) -> Assign:
    """A linear part, written as a sum over the key of its vectors times the component."""
    indices, kind = affine.decay.value.indices, agg.component(part.component).kind
    sides: list[tuple[Assign | None, Space]] = [(part.query, "state"), (part.previous, "prev")]
    sums = [
        Reduce("sum", affine.key, Op("mul", (q.value, Ref(space, part.component, indices, kind))))
        for q, space in sides
        if q is not None
    ]
    return Assign(part.name, part.indices, sums[0] if len(sums) == 1 else Op("add", tuple(sums)))
