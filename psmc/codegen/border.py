"""A spec's border as data: the `Spec(...)` of a generated module."""

from __future__ import annotations

from psmc.ir import Aggregator, Interval, Tensor
from psmc.ir.query import level_dims, nearest_float, taps
from psmc.ir.rewrite import refs


def print_border(agg: Aggregator, digest: str, live: tuple[str, ...]) -> str:
    """The `Spec(...)` literal; `digest`: an expression."""
    outputs = tuple(Tensor(a.name, tuple(i.dim for i in a.indices), a.value.kind) for a in agg.output.results)
    values = (a.value for a in (*agg.output.lets, *agg.output.results))
    previous = any(r.space in ("prev", "prev_level") for r in refs(*values))
    rows = [
        ("name", repr(agg.name)),
        ("digest", digest),
        ("inputs", _slots(agg.leaf_inputs)),
        ("params", _slots(agg.params)),
        ("components", _slots(tuple(Tensor(c.name, c.dims, c.kind, c.interval) for c in agg.state))),
        ("live", repr(live)),
        ("outputs", _slots(outputs)),
        ("sizes", repr({d.name: d.size for d in agg.dims if d.size is not None})),
        ("dims", repr(tuple(d.name for d in agg.dims))),
        ("taps", repr(dict(taps(agg)))),
        ("previous", repr(previous)),
    ]
    if dims := level_dims(agg):
        rows.append(("levels", repr(next(d.size for d in agg.dims if d.name == dims[0]))))
    return "Spec(\n" + "".join(f"    {key}={value},\n" for key, value in rows) + ")"


def _slots(tensors: tuple[Tensor, ...]) -> str:
    if not tensors:
        return "()"
    each = []
    for t in tensors:
        kind = "" if t.kind == "real" else f", {t.kind!r}"
        dims = f", {t.dims!r}" if t.dims or kind else ""
        each.append(f"Slot({t.name!r}{dims}{kind}{_within(t.interval)})")
    return "(" + ", ".join(each) + ",)"


def _within(interval: Interval | None) -> str:
    if interval is None or (interval.lo is None and interval.hi is None):
        return ""
    bounds = ", ".join("None" if x is None else repr(nearest_float(x)) for x in (interval.lo, interval.hi))
    ends = ("(" if interval.lo_open else "[") + (")" if interval.hi_open else "]")
    return f", within=({bounds}, {ends!r})"
