"""The tree plan's kernels as text: the lane's functions, then templates/tree_*.py.j2, then the host's table."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from psmc.codegen.paste import paste
from psmc.codegen.pointwise_fields import lane_maps
from psmc.codegen.render import render
from psmc.codegen.tiles_code import tiles_class, tiles_text
from psmc.codegen.tree_lane import TreeLane, tree_lane
from psmc.codegen.triton_expr import Key, LaneFunction, helper_texts, number
from psmc.derive.unroll import Unrolled
from psmc.ir import Aggregator, Kind
from psmc.ir.query import taps
from psmc.plan.tiles import Row
from psmc.plan.tree import TreePlan, rule
from psmc.plan.tuned import Tuned

_WIDTH = 120


@dataclass(frozen=True)
class _Slot:
    """A tensor of a call, `scalars` of it in each lane. `space`: input, param or output; `place` among its like."""

    label: str
    space: str
    lag: int
    kind: Kind
    dims: tuple[str, ...]
    scalars: tuple[str, ...]
    place: int

    @property
    def keys(self) -> list[Key]:
        return [(self.space, s, self.lag) for s in self.scalars]

    def fields(self, used: Collection[Key], address: str, value: str = "b_") -> list[SimpleNamespace]:
        """Its scalars that a kernel uses; `address` is a format of the pointer {p} and the label {x}."""
        place = address.format(x=self.label)
        if len(self.scalars) > 1:
            place = f"({place}) * {len(self.scalars)}" if " " in place else f"{place} * {len(self.scalars)}"
        tail = "" if self.lag == 0 else f"_lag{self.lag}"
        dtype = "tl.int64" if self.kind == "int" else "tl.float32"
        found = []
        for at, key in enumerate(self.keys):
            if key in used:
                where = f"p_{self.label} + {place}" + (f" + {at}" if at else "")
                found.append(SimpleNamespace(key=key, value=f"{value}{key[1]}{tail}", address=where, dtype=dtype))
        return found


class _Slots:
    """All tensors of a spec."""

    def __init__(self, agg: Aggregator, found: Unrolled) -> None:
        def slot(at: int, name: str, space: str, lag: int, kind: Kind, dims: tuple[str, ...]) -> _Slot:
            label = f"out_{name}" if space == "output" else name + (f"_lag{lag}" if lag else "")
            scalars = found.outputs if space == "output" else found.scalars
            return _Slot(label, space, lag, kind, dims, scalars[name], at)

        lags = [(t, lag) for t in agg.leaf_inputs for lag in range(1, taps(agg).get(t.name, 0) + 1)]
        declared = [*((t, 0) for t in agg.leaf_inputs), *lags]
        self.inputs = [slot(at, t.name, "input", lag, t.kind, t.dims) for at, (t, lag) in enumerate(declared)]
        self.params = [slot(at, t.name, "param", 0, t.kind, t.dims) for at, t in enumerate(agg.params)]
        self.outputs = [
            slot(at, a.name, "output", 0, "real", tuple(i.dim for i in a.indices))
            for at, a in enumerate(agg.output.results)
        ]

    def reading(self, functions: Iterable[LaneFunction]) -> tuple[list[_Slot], set[Key]]:
        """The inputs that these read."""
        used = {k for f in functions for k in f.arguments if k[0] == "input"}
        return [t for t in self.inputs if used & set(t.keys)], used


def print_tree_kernels(agg: Aggregator, plan: TreePlan, tuned: Tuned | None = None) -> str:
    """Module text that defines KERNELS, a `runtime.kit_tree_kernels.TreeKernels`."""
    found = rule(agg)
    assert isinstance(found, Unrolled)
    one = tree_lane(agg, found)
    slots = _Slots(agg, found)
    functions = [one.lift, one.merge, one.readout, one.lift_back, one.merge_back, one.readout_back]
    shown = [f for f in functions if f.results]
    shared = _shared(one, found, plan, slots)
    forward, read = _forward(one, slots, shared)
    backward, table = _backward(one, slots, shared)
    texts = [render("tree_lane.py.j2", functions=[*helper_texts(shown), *(f.text for f in shown)], **shared)]
    texts.append(render("tree_forward.py.j2", **shared, **forward))
    texts.append(render("tree_backward.py.j2", **shared, **backward))
    pasted = paste(("kit_lanes", "kit_tree_kernels"), frozenset({"TreeKernels"}))
    tiles = [Row(way, 4, 0, (plan.lanes,)) for way in ("forward", "backward")]
    read = {**read, **table, "size": 2**plan.levels, "tiles": tiles_text(tiles, tuned)}
    texts += [pasted.body, *tiles_class(tuned), _table(agg, found, slots, read)]
    return "\n\n".join(_tidy(t) for t in texts) + "\n"


def _tidy(text: str) -> str:
    """No blank lines inside functions, two between them; jinja leaves some."""
    lines = [line.rstrip() for line in text.strip().splitlines()]
    kept: list[str] = []
    for at, line in enumerate(lines):
        following = next((x for x in lines[at:] if x), "")
        if line or not following.startswith(" ") or "class " in text:
            kept.append(line)
    return "\n".join(part for line in kept for part in _wrapped(line)) + "\n"


_LISTS = re.compile(
    r"(?P<indent> *)(?:(?P<left>[\w, ]+) = )?(?P<head>return |[\w. ]+\()(?P<items>[\w,.: =]+)(?P<tail>\):?|)$"
)


def _wrapped(line: str) -> list[str]:
    """A line of names that is too long, as several: targets, arguments, results."""
    found = _LISTS.match(line) if len(line) > _WIDTH else None
    if found is None:
        return [line]
    indent, left, head, items, tail = found["indent"], found["left"], found["head"], found["items"], found["tail"]
    first = indent + (f"{left} = " if left and len(left) < _WIDTH // 2 else "")
    lines: list[str] = []
    if left and len(left) >= _WIDTH // 2:
        lines, first = [f"{indent}(", *_filled(left, indent)], f"{indent}) = "
    close = tail or ")"
    return [*lines, f"{first}{head}{'' if tail else '('}", *_filled(items, indent), f"{indent}{close}"]


def _filled(items: str, indent: str) -> list[str]:
    lines = [""]
    for item in items.rstrip(", ").split(", "):
        if lines[-1] and len(lines[-1]) + len(item) > _WIDTH - 10 - len(indent):
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + item + ","
    return [f"{indent}    {x}" for x in lines]


def _shared(one: TreeLane, found: Unrolled, plan: TreePlan, slots: _Slots) -> dict[str, object]:
    """What all templates know."""
    names, levels = one.names, plan.levels
    used = {k for f in (one.merge, one.merge_back, one.lift, one.lift_back, one.readout, one.readout_back)
            for k in f.arguments if k[0] == "param"}  # fmt: skip
    params = [f for t in slots.params for f in t.fields(used, "k_{x}")]
    merging = {k for f in (one.merge, one.merge_back) for k in f.arguments if k[0] == "param"}
    values = {f.key: f.value for f in params}
    env: dict[Key, str] = dict(values)
    env |= {k: f"b_{k[1]}" + (f"_lag{k[2]}" if k[2] else "") for t in slots.inputs for k in t.keys}
    env |= {("state", c, 0): f"i0_{c}" for c in names} | {("prev", c, 0): f"e0_{c}" for c in names}
    env |= {key: f"b_{key[1]}" for key in one.given.values()}

    def sides(left: str, right: str, cot: str = "") -> dict[Key, str]:
        found = {("left", c, 0): left + c for c in names} | {("right", c, 0): right + c for c in names}
        return {**values, **found, **{one.moved[c]: cot + c for c in names}}

    def listed(prefix: str) -> str:
        return ", ".join(prefix + c for c in names)

    befores = range(0 if one.previous else 1, levels + 1)
    return {
        "names": names,
        "levels": levels,
        "size": 2**levels,
        "previous": one.previous,
        "starts": {c: number(found.starts[c]) for c in names},
        "merge": one.merge,
        "lift": one.lift,
        "readout": one.readout,
        "env": env,
        "sides": sides,
        "listed": listed,
        "nodes": lambda j: listed(f"n{j}_"),
        "halves": ", ".join(listed(f"{side}{j}_") for j in range(levels) for side in "lr"),
        "lefts": ", ".join(listed(f"l{j}_") for j in range(levels)),
        "ups": ", ".join(listed(f"u{j}_") for j in range(levels)),
        "befores": ", ".join(listed(f"e{j}_") for j in befores),
        "shared": "".join(f" {f.value}," for f in params if f.key in merging),
        "params": params,
        "param_labels": [t.label for t in slots.params],
        "param_maps": lane_maps([t.label for t in slots.params]),
        "params_pointers": "".join(f"p_{t.label}, " for t in slots.params),
    }


def _tokens(
    shared: Mapping[str, object], slots: _Slots, prefix: str, functions: list[LaneFunction]
) -> dict[str, object]:
    """The inputs of a kernel of stage 0 under `prefix`."""
    found, used = slots.reading(functions)
    labels = [t.label for t in found] + list(shared["param_labels"])  # type: ignore[call-overload]
    fields = [f for t in found for f in t.fields(used, "row * C_{x} + k_{x}")]
    return {
        f"{prefix}tokens": fields,
        f"{prefix}labels": labels,
        f"{prefix}maps": lane_maps(labels),
        f"{prefix}pointers": "".join(f"p_{t.label}, " for t in found),
        f"{prefix}places": tuple(t.place for t in found),
    }


def _forward(one: TreeLane, slots: _Slots, shared: Mapping[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    lifted = _tokens(shared, slots, "lift_", [one.lift])
    every = _tokens(shared, slots, "token_", [one.lift, one.readout])
    outputs = [f for t in slots.outputs for f in t.fields(set(t.keys), "row * C + o_c", "y_")]
    context = {
        **lifted,
        **every,
        "tokens": every["token_tokens"],
        "outputs": outputs,
        "readout_names": [s for t in slots.outputs for s in t.scalars],
        "out_pointers": ", ".join(f"p_{t.label}" for t in slots.outputs),
    }
    return context, {"lift_inputs": lifted["lift_places"], "token_inputs": every["token_places"]}


def _backward(
    one: TreeLane, slots: _Slots, shared: Mapping[str, object]
) -> tuple[dict[str, object], dict[str, object]]:
    functions = [one.lift, one.lift_back, one.readout_back]
    tokens = _tokens(shared, slots, "back_", functions)
    asked = {k for k in one.readout_back.arguments}
    given, givens = [], []
    for t in slots.outputs:
        cot = {s: one.given[s] for s in t.scalars}
        if asked & set(cot.values()):
            givens.append(t)
            for f in t.fields(set(t.keys), "row * C + o_c"):
                if cot[f.key[1]] in asked:
                    f.value, f.address = f"b_{cot[f.key[1]][1]}", f.address.replace("p_out_", "p_d_out_", 1)
                    given.append(f)
    shares = {key: name for name, key in one.shares.items()}
    grads, graded = [], []
    for t in slots.inputs:
        fields = t.fields(set(t.keys) & shares.keys(), "row * C + o_c")
        graded += [t] if fields else []
        for f in fields:
            name = shares[f.key]
            parts = [p + name for p, g in (("h_", one.readout_back), ("k_", one.lift_back)) if name in g.results]
            f.sum, f.address = " + ".join(parts), f.address.replace("p_", "p_g_", 1)
            grads.append(f)
    sums = [SimpleNamespace(name=shares[k], key=k) for t in slots.params for k in t.keys if k in shares]
    merging = [g.name for g in sums if g.name in one.merge_back.results]
    names = one.names
    moved = {one.moved[c]: f"d0_{c}" for c in names}
    table = {
        "back_inputs": tokens["back_places"],
        "cotangents": tuple(t.place for t in givens),
        "input_shares": tuple((t.place, sum(k in shares for k in t.keys) == len(t.scalars)) for t in graded),
        "param_shares": _rows((t.place, at) for t in slots.params for at, k in enumerate(t.keys) if k in shares),
    }
    context = {
        **tokens,
        "merge_back_function": one.merge_back,
        "merge_back_names": [f"{s}_{c}" for s in "lr" for c in names],
        "merge_shares": merging,
        "merge_sums": "".join(f"{g}, " for g in merging),
        "merge_tail": "".join(f", {g}" for g in merging),
        "readout_back": one.readout_back,
        "readout_back_names": [f"{s}_{c}" for s in "sp" for c in names],
        "lift_back": one.lift_back,
        "lift_back_names": [],
        "env_leaf": {**shared["env"], **moved},  # type: ignore[dict-item]
        "given": given,
        "given_pointers": "".join(f"p_d_{t.label}, " for t in givens),
        "grads": grads,
        "grad_pointers": "".join(f"p_g_{t.label}, " for t in graded),
        "param_shares": sums,
    }
    return context, table


def _rows(pairs: Iterable[tuple[int, int]]) -> str:
    """A tuple, ten to a line."""
    each = [f"{x!r}, " for x in pairs]
    lines = ["".join(each[at : at + 10]).rstrip() for at in range(0, len(each), 10)]
    return "(" + "\n            ".join(lines) + ")"


def _table(agg: Aggregator, found: Unrolled, slots: _Slots, read: Mapping[str, object]) -> str:
    """The KERNELS object."""
    sizes = {d.name: d.size for d in agg.dims}

    def rows(tensors: Sequence[_Slot]) -> str:
        each = []
        for t in tensors:
            axes = tuple(a for a, d in enumerate(t.dims) if d in found.dims)
            lanes = tuple(d for d in t.dims if d not in found.dims)
            own = tuple(sizes[t.dims[a]] for a in axes)
            each.append(f"TreeSlot({t.label!r}, {lanes!r}, {t.kind!r}, {len(t.dims)}, {axes!r}, {own!r})")
        return "(\n" + "".join(f"            {x},\n" for x in each) + "        )"

    kernels = [f"{kind}{name}" for kind in ("", "upper_") for name in ("roots", "prefix", "backward")]
    lines: list[tuple[str, object]] = [
        *((f"{k}_kernel", f"tree_{k}_kernel") for k in kernels),
        ("interpreted", "triton is not None and not isinstance(tree_roots_kernel, triton.JITFunction)"),
        ("dims", repr(found.lanes)),
        ("scalars", len(found.combine.results)),
        ("inputs", rows(slots.inputs)),
        ("params", rows(slots.params)),
        ("outputs", rows(slots.outputs)),
        *read.items(),
    ]
    body = "".join(f"        {key}={value},\n" for key, value in lines)
    return f"KERNELS = TreeKernels(\n    SimpleNamespace(\n{body}    )\n)"
