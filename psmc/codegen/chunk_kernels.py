"""The chunked plan's kernels as text: templates/chunk_*.py.j2 over what `chunk_factors` fused, then a table of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

from psmc.codegen.chunk_factors import (
    COTANGENT,
    SIZE,
    Fused,
    Raw,
    fuse,
    numbers_transposed,
    reads_seen,
    scalar,
    transposed,
)  # fmt: skip
from psmc.codegen.render import render
from psmc.codegen.tiles_code import tiles_class, tiles_text
from psmc.codegen.triton_expr import Key, LaneFunction, helper_texts, key_of, print_function
from psmc.ir import Aggregator, Assign, Block, Expr
from psmc.ir.rewrite import refs
from psmc.plan.chunked_kernels import ChunkTiles, tiles
from psmc.plan.tuned import Tuned
from psmc.structure.report import Affine, Structure

_LOG2E = "1.4426950408889634"
_BOUND = "60.0"  # exponents within which a product of two scaled factors neither overflows nor loses digits
_FILES = (
    "parts", "tokens", "lift", "decays", "sums", "numbers", "logs", "prepare", "inner", "decayed", "forward",
    "states", "gradients", "key", "values", "norms", "step",
)  # fmt: skip
_KERNELS = ("sums", "forward", "states", "join", "gradients", "values", "step")
_NORMS = ("normed", "shares", "norms")
_SAYS = {
    "q": "What reads the state", "b": "What enters the state over the key",
    "log": "Log of the decay over the key, finite",
    "c": "What enters the state over the value", "log_value": "Log of the decay over the value, finite",
}  # fmt: skip


def print_chunk_kernels(agg: Aggregator, structure: Structure, tuned: Tuned | None = None) -> str:
    """Module text that defines CHUNK_KERNELS, the table of `runtime.kit_chunk_kernels`, and KERNELS; '' if no layer is
    one for these kernels."""
    affines = (x.affine for x in structure.layers if x.affine is not None and x.cls == "affine")
    found = [a for a in affines if by_kernel(agg, a)]
    if not found:
        return ""
    valued = any(a.decay.kind in ("V", "KV") for a in found)
    fused = fuse(agg, structure) or plain(valued)
    return kernel_text(tiles(valued), fused, tuned) + "\n\nKERNELS = None\n"


def kernel_text(sizes: ChunkTiles, fused: Fused, tuned: Tuned | None = None) -> str:
    """The kernels and their table."""
    f = _view(fused)
    where = dict.fromkeys(("logs", "prepare", "inner"), bool(f.sides)) | {"norms": f.norm, "numbers": f.lifted}
    where |= {"key": f.log, "decayed": f.log_value}
    files = [name for name in _FILES if where.get(name, True)]
    parts = [render(f"chunk_{name}.py.j2", log2e=_LOG2E, bound=_BOUND, f=f) for name in files]
    kernels = [*_KERNELS, *(n for s in f.sides for n in (s.logs, s.kernel)), *(_NORMS if f.norm else ())]
    kernels += [n for n, x in (("key", f.log), ("pairs", f.log), ("products", f.log_value), ("numbers", f.lifted)) if x]
    rows = "".join(f"    {name}=chunk_{name}_kernel,\n" for name in kernels)
    table = (
        f"CHUNK_KERNELS = SimpleNamespace(\n{rows}"
        "    interpreted=triton is not None and not isinstance(chunk_forward_kernel, triton.JITFunction),\n"
        f"    params={f.params!r},\n    grads={f.stored!r},\n    operands={f.operands!r},\n    norm={f.norm!r},\n"
        f"    scalars={f.scalar_params!r},\n    lifted={f.lifted_names!r},\n    width={f.handed},\n"
        f"    seen={f.seen!r},\n    tiles={tiles_text(sizes.data, tuned, sizes.literal())},\n)\n"
    )
    return "\n\n".join([*(_tidy(part) for part in parts), *tiles_class(tuned), table])


def by_kernel(agg: Aggregator, affine: Affine) -> bool:
    """Whether these kernels run a layer: of real numbers, no transition of low rank, a decay that comes apart into key
    and value."""
    real = agg.component(affine.component).kind == "real"
    return real and affine.rank == 0 and affine.decay.parts is not None


def plain(valued: bool) -> Fused:
    """Nothing fused: q, b and the logs of a decay over the key and, if `valued`, over the value lie in memory, and the
    output is y."""
    q, b, log, log_value = (Raw(name, "factor") for name in ("q", "b", "log", "log_value"))
    return Fused(
        stack=(), output="", shift=0, keys=(q, b, log), values=(log_value,) if valued else (), c=Raw("c", "factor"),
        q=q.ref, b=b.ref, log=log.ref, log_value=log_value.ref if valued else None, scale="1.0", scalars=(), numbers=(),
        torch_rows=(), sums=(), readout=None, seen=None,
    )  # fmt: skip


def _tidy(text: str) -> str:
    """No blank lines inside functions and no blanks at the end of lines; jinja leaves some."""
    lines = [line.rstrip() for line in text.strip().splitlines()]
    inside = [bool(x) or not next((y for y in lines[n:] if y), "").startswith((" ", ")")) for n, x in enumerate(lines)]
    return "\n".join(x for x, keep in zip(lines, inside, strict=True) if keep) + "\n"


def _view(f: Fused) -> SimpleNamespace:
    """What the templates read."""
    keys = {_key(raw): f"k{n}" for n, raw in enumerate(f.keys)}
    values = {_key(raw): f"v{n}" for n, raw in enumerate(f.values)}
    shown = [a.name for a in f.numbers if a.name[0] == "s"]
    numbers = {key_of(scalar(name)): name for name in shown}
    sides = {"k": keys, "v": {**values, key_of(scalar("c")): "c"}}
    tile = {k: f"b_{x}.to(tl.float32)" for k, x in {**keys, **sides["v"]}.items()}
    tile |= {k: f"b_{x}[:, None]" for k, x in numbers.items()}
    tile |= {key_of(scalar(n)): f"b_{n}[:, None]" for n in ("w", *_names(f, "e"))}
    tile |= {key_of(scalar(n)): f"b_{n}" for n in ("y", "seen", "dq", "db", "dlog")}
    tile |= {key_of(scalar(f"d{n}")): f"d_{n}[:, None]" for n in _names(f, "e")}
    tile |= {key_of(scalar("do")): "b_do.to(tl.float32)"}
    tile |= {key_of(scalar(f"x{n}")): f"b_x{n}" for n in range(len(f.scalars))}
    tile |= {key_of(scalar(f"g{a.name}")): f"b_g{a.name}" for a in f.numbers}
    tile |= {(SIZE, n, 0): f"tl.full([1, 1], {n}, tl.float32)" for n in ("K", "V")}
    made: list[LaneFunction] = []

    def function(name: str, values: Sequence[tuple[str, Expr]]) -> LaneFunction:
        order = sorted({key_of(r) for r in refs(*(v for _, v in values))})
        made.append(print_function(name, Block(results=tuple(Assign(n, (), v) for n, v in values)), order))
        return made[-1]

    def over(expr: Expr, held: dict[Key, str]) -> list[str]:
        return sorted({held[key_of(r)] for r in refs(expr) if key_of(r) in held}, key=lambda n: (n[0], int(n[1:] or 0)))

    def factor(name: str, expr: Expr, w: str = "k") -> SimpleNamespace:
        held = sides[w]
        lies = next((f"b_{x}" for k, x in held.items() if any(key_of(r) == k and r == expr for r in refs(expr))), None)
        call = lies or function(f"lift_{name}", [(name, expr)]).call(tile)
        return SimpleNamespace(name=name, says=_SAYS.get(name, ""), reads=over(expr, held), call=call, w=w,
                               lifted=lies is None)  # fmt: skip

    over_key, over_value = (("q", f.q), ("b", f.b), ("log", f.log)), (("c", scalar("c")), ("log_value", f.log_value))
    loaded = [factor(n, x, w) for w, xs in (("k", over_key), ("v", over_value)) for n, x in xs if x is not None]
    sums = [factor(n, x) for n, x in zip(_names(f, "e"), f.sums, strict=True)]
    for n, x in enumerate(sums):
        x.at = n + f.norm
    back, through, through_value = transposed(f)
    readout = None
    held = {**values, **numbers}
    if f.readout is not None:
        call = function("tile_readout", [("o", f.readout)]).call(tile)
        read = over(f.readout, held)
        readout = SimpleNamespace(call=call, values=[n for n in read if n[0] == "v"],
                                  numbers=[n for n in read if n[0] == "s"])  # fmt: skip
    ahead = SimpleNamespace(results=["b_dy"])
    if back:  # what is the cotangent itself stays as it was loaded: such a tile enters a product from shared memory
        same = [f"b_d{n}" for n, e in back if e == scalar(COTANGENT)]
        pull = function("tile_back", [(n, e) for n, e in back if f"b_d{n}" not in same])
        asked = [r.name for _, e in back for r in refs(e)]
        at = {"w": 0} | {n: x.at for n, x in zip(_names(f, "e"), sums, strict=True)}
        ahead = SimpleNamespace(
            results=[f"b_d{n}" for n, _ in back],
            same=same,
            made=[f"b_d{n}" for n in pull.results],
            call=pull.call(tile),
            seen=reads_seen(tuple(e for _, e in back)),
            sums=[SimpleNamespace(name=n, at=i) for n, i in at.items() if n in asked],
            reads=sorted({*(x for _, e in back for x in over(e, held)), *(["c"] if "c" in asked else [])}),
        )
    behind = function("tile_factors", through)
    back_log = _pulled(function, through_value, tile, lambda e: over(e, sides["v"])) if through_value else None
    stored = [SimpleNamespace(name=n, param=f.keys[int(n[1:])].kind == "param") for n in behind.results]
    summed = [n[3:] for n in ahead.results if n[3:] in (*_names(f, "e"), *shown)]
    gathered = [*ahead.results, *(back_log.stored if back_log else ())]
    shares = {n: " + ".join(x for x in gathered if x in (f"b_d{n}", f"d_{n}")) for n in values.values()}
    kept_values = [SimpleNamespace(name=n, param=raw.kind == "param", sum=shares[n])
                   for n, raw in zip(shares, f.values, strict=True) if shares[n]]  # fmt: skip
    reached = [n for n in summed if n[0] == "s"]
    places = [*keys.values(), "c", *values.values(), *shown]
    pointers = [f"p_{n}" for n in (*places, "log", "n", "code")]
    strides = [f"{n}_{axis}" for n in (*places, "l", "n") for axis in "tgr"]
    lifted, lifted_back = None, SimpleNamespace(outs="")
    if f.scalars:
        lift = function("lift_numbers", [(a.name, a.value) for a in f.numbers])
        lifted = SimpleNamespace(outs=", ".join(f"b_{n}" for n in lift.results), call=lift.call(tile))
        pull = function("pull_numbers", numbers_transposed(f))
        lifted_back = SimpleNamespace(outs=", ".join(f"d_{n}" for n in pull.results), call=pull.call(tile))
    scalars = [
        SimpleNamespace(name=f"x{n}", param=raw.kind == "param", back=f"d_x{n}" in lifted_back.outs.split(", "))
        for n, raw in enumerate(f.scalars)
    ]
    scalar_strides = [f"{x.name}_{axis}" for x in scalars for axis in "tgr"]
    own = [*(f"p_{x.name}" for x in scalars), "p_code", *scalar_strides]
    fed = {x for part in loaded if part.name in "qb" for x in part.reads}
    outs = ", ".join(ahead.results)
    return SimpleNamespace(
        legend=_legend(f), args=", ".join([*pointers, *strides]), log=f.log is not None, norm=f.norm,
        log_value=f.log_value is not None, sides=_sides(f, outs), back_log=back_log,
        texts=[t.rstrip() for t in (*helper_texts(made), *(x.text for x in made))],
        factors=loaded, sums=sums, readout=readout, back=ahead if back else None, outs=outs,
        back_says=" and the readout's gradients" if len(ahead.results) > 1 else "", width=max(1, f.norm + len(sums)),
        handed=f.norm + len(sums), sum_names="".join(f"b_{n}, " for n in _names(f, "e")),
        sum_grads="".join(f"d_{n}, " for n in summed if n[0] == "e"),
        key_grads="".join(f"p_d{n}, " for n in keys.values()),
        value_grads="".join(f"p_d{n}, " for n in values.values()),
        number_grads="".join(f"p_d{n}, " for n in reached), numbers=reached, row_sums=summed,
        back_keys=SimpleNamespace(
            outs=", ".join(f"d_{n}" for n in behind.results), call=behind.call(tile), stored=stored,
            reads=sorted({x for _, e in through for x in over(e, keys)}),
        ),
        back_values=kept_values,
        lifted=lifted, lifted_back=lifted_back, scalars=scalars,
        sum_args=", ".join(own if scalars else [*pointers, *strides]),
        lifted_names=tuple(a.name for a in f.numbers) if scalars else (), shown=shown,
        scalar_args="".join(f"p_{x.name}, " for x in scalars) + "".join(f"{x}, " for x in scalar_strides),
        number_outs="".join(f"p_{a.name}, " for a in f.numbers if scalars and a.name != "log"),
        number_grads_in="".join(f"p_g{a.name}, " for a in f.numbers),
        scalar_grads="".join(f"p_d{x.name}, " for x in scalars if x.back),
        number_args="".join(f"b_{n}, " for n in (readout.numbers if readout else ())),
        scalar_params=tuple((x.param, x.back) for x in scalars),
        params=(tuple(r.kind == "param" for r in f.keys), tuple(r.kind == "param" for r in f.values)),
        stored=(tuple(n in behind.results for n in keys.values()),
                tuple(n in [v.name for v in kept_values] for n in values.values()), tuple(n in reached for n in shown)),
        operands=tuple(n for n, (x, raw) in enumerate(zip(keys.values(), f.keys, strict=True))
                       if x in fed and raw.kind != "param"),
        seen=_how_seen(f, back),
    )  # fmt: skip


def _sides(f: Fused, outs: str) -> list[SimpleNamespace]:
    """What chunk_prepare makes ready, of the sides that have a decay. Its K is the side's size."""
    key = SimpleNamespace(
        kernel="prepare", logs="logs", outs="b_q", b="b", log="log", args="p_sums",
        reads="load_q(raw, row, i_g, length, o_k, SHIFT, K, BT)",
        q_at="load_q_at(raw, row, i_g, length, x, o_k, SHIFT, K)",
    )  # fmt: skip
    given = "p_do, p_seen, p_sums"
    value = SimpleNamespace(
        kernel="prepare_value", logs="logs_value", outs=outs.replace("b_dy", "b_q", 1), b="c", log="log_value",
        args=given, reads=f"back_out(raw, {given}, row, i_g, length, o_k, G, K, BT)",
        q_at=f"load_dy_at(raw, {given}, row, i_g, length, x, o_k, G, K)",
    )  # fmt: skip
    return [side for side, log in ((key, f.log), (value, f.log_value)) if log is not None]


def _pulled(
    function: Callable[[str, Sequence[tuple[str, Expr]]], LaneFunction], rows: Sequence[tuple[str, Expr]],
    tile: dict[Key, str], reads: Callable[[Expr], list[str]],
) -> SimpleNamespace:  # fmt: skip
    """From the cotangent of the log over the value those of what it is made of."""
    made = function("tile_log_value", rows)
    stored = [f"d_{n}" for n in made.results if n != "c"]
    return SimpleNamespace(
        outs=", ".join(f"d_{n}" for n in made.results), call=made.call(tile), stored=stored,
        reads=sorted({x for _, e in rows for x in reads(e)}),
    )  # fmt: skip


def _how_seen(f: Fused, back: tuple[tuple[str, Expr], ...]) -> str:
    """What backward reads of the readout: '', 'output' or 'y'."""
    if not back or not reads_seen(tuple(e for _, e in back)):
        return ""
    return "y" if f.seen == scalar("seen") else "output"


def _names(f: Fused, letter: str) -> list[str]:
    return [f"{letter}{n}" for n in range(len(f.sums))]


def _key(raw: Raw) -> Key:
    return key_of(raw.ref)


def _legend(f: Fused) -> list[str]:
    named = [f"k{n} {raw.attribute}" for n, raw in enumerate(f.keys)] + [f"c {f.c.attribute}"]
    named += [f"v{n} {raw.attribute}" for n, raw in enumerate(f.values)]
    named += [f"x{n} {raw.attribute}" for n, raw in enumerate(f.scalars)]
    return ["over the key k0, k1, ..., over the value c, v0, ..., numbers a token s0, ...: " + ", ".join(named)]
