"""What was proved or refuted, as one JSON document that `psmc verify` (psmc/checker.py) accepts or rejects.

docs/certificates.md has the format. Bytes depend on the spec and the verdicts alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal, localcontext
from typing import Any

from psmc import checker
from psmc.algebra import certificate_rule as rule
from psmc.algebra.certificate_conditions import conditions
from psmc.algebra.interval_math import point, union
from psmc.algebra.intervals import closure
from psmc.algebra.numbers import Complex
from psmc.algebra.numbers import parts as complex_parts
from psmc.algebra.prover import deep_recursion
from psmc.algebra.verdict import Counterexample, Proof, Proved, Refuted, Unknown, Verdict
from psmc.ir import Aggregator, Block, Component, Interval, Tensor
from psmc.ir.text import show

FORMAT, VERSION = "psmc certificate", 1
WITNESSES, MAX_WITNESSES = 80, 24  # points that are tried, and at most kept, one a cell
_SIDES = {
    "associativity": ("abc", "(a∘b)∘c = a∘(b∘c)"),
    "left identity": ("x", "e∘x = x"),
    "right identity": ("x", "x∘e = x"),
}
_USED = re.compile(r"uses the interval of (?:param )?'([^']+)'")
_CASES = re.compile(r"equal (?:normal forms|in each of (\d+) cases)")


def document(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The whole certificate, of the entries of its aggregators."""
    return {"format": FORMAT, "version": VERSION, "aggregators": [dict(e) for e in entries]}


def text(certificate: Mapping[str, Any]) -> str:
    """JSON, a line a statement: the same bytes for the same certificate."""
    return _pretty(certificate, 0) + "\n"


def certificate_of(agg: Aggregator, proof: Proof, *, witnesses: int = 0) -> dict[str, Any]:
    """The certificate of a single aggregator, as `checker.check` reads it."""
    return document([entry(agg, proof, witnesses=witnesses)])


def entry(
    agg: Aggregator, proof: Proof, *, file: str = "", declared: Aggregator | None = None, witnesses: int = WITNESSES
) -> dict[str, Any]:
    """All about one aggregator. `agg` is what was proved (a recurrence lifted), `declared` what the spec says."""
    head: dict[str, Any] = {"aggregator": agg.name, "file": file, "claim": agg.claim, "digest": digest(declared or agg)}
    verdicts = {"associativity": proof.associativity, "identity": proof.identity}
    try:
        body = rule_of(agg, _used(verdicts.values()))
    except rule.UnwritableError as error:
        why = f"the rule cannot be written down: {error}"
        return head | {law: {"verdict": None, "reason": why} for law in verdicts}
    if body is None or (proof.associativity is None and proof.identity is None):
        return head | {law: {"verdict": None} for law in verdicts}
    laws = {law: _law(agg, verdict) for law, verdict in verdicts.items()}
    if isinstance(proof.associativity, Proved):
        laws["associativity"]["witnesses"] = _witnesses(body, witnesses)
    return head | body | {"conditions": conditions(agg)} | laws


def digest(agg: Aggregator) -> str:
    """Of the spec's canonical text: layout, comments and index names do not count."""
    return hashlib.sha256(show(agg).encode()).hexdigest()


def rule_of(agg: Aggregator, used: frozenset[str] = frozenset()) -> dict[str, Any] | None:
    """Dims, tensors, combine, and the lift where an interval of the state is used; None without a combine."""
    if not isinstance(agg.combine, Block):
        return None
    kept = closure(agg).closed
    state: dict[str, Any] = {}
    for c in agg.state:
        identity = rule.expression(c.identity, c.kind)
        for name, value in zip(rule.parts(c.name, c.kind), identity, strict=True):
            state[name] = _tensor(c, c.name in kept, c.name in used) | {"identity": value}
    needs_lift = bool(kept)
    inputs: list[tuple[Tensor, int]] = []
    if needs_lift:
        inputs = [(t, lag) for t in agg.leaf_inputs for lag in _lags(agg, t.name)]
    return {
        "dims": {d.name: d.size for d in agg.dims},
        "inputs": {
            name: _tensor(_tapped(t) if lag else t, True, True)
            for t, lag in inputs
            for name in rule.parts(t.name + (f"{{-{lag}}}" if lag else ""), t.kind)
        },
        "params": {n: _tensor(p, True, p.name in used) for p in agg.params for n in rule.parts(p.name, p.kind)},
        "state": state if needs_lift else {n: s | {"closed": False} for n, s in state.items()},
        "lift": rule.block(agg.leaf) if needs_lift else None,
        "combine": rule.block(agg.combine),
    }


def _lags(agg: Aggregator, name: str) -> list[int]:
    from psmc.ir.rewrite import refs

    values = [a.value for a in (*agg.leaf.lets, *agg.leaf.results)]
    return sorted({0, *(r.lag for r in refs(*values) if r.space == "input" and r.name == name)})


def _tapped(t: Tensor) -> Tensor:
    """An input some tokens earlier: 0 before the first."""
    return t if t.interval is None else replace(t, interval=union(t.interval, point(0)))


def _tensor(t: Tensor | Component, closed: bool, used: bool) -> dict[str, Any]:
    kind = "real" if t.kind == "complex" else t.kind
    interval = None if t.interval is None else _interval(t.interval)
    return {"kind": kind, "dims": list(t.dims), "interval": interval} | {
        "closed": closed and interval is not None,
        "used": used and interval is not None,
    }


def _interval(i: Interval) -> str:
    lo = "(-inf" if i.lo is None else f"{'(' if i.lo_open else '['}{i.lo}"
    hi = "inf)" if i.hi is None else f"{i.hi}{')' if i.hi_open else ']'}"
    return f"{lo}, {hi}"


def _used(verdicts: Any) -> frozenset[str]:
    lines = [line for v in verdicts if isinstance(v, Proved) for line in v.certificate]
    return frozenset(m[1] for line in lines if (m := _USED.match(line)))


# --- verdicts -----------------------------------------------------------------------------------


def _law(agg: Aggregator, verdict: Verdict | None) -> dict[str, Any]:
    match verdict:
        case Proved(method=method, certificate=lines):
            cases = sum(int(m[1] or 1) for line in lines if (m := _CASES.search(line)))
            return {"verdict": "proved", "method": method, "cases": cases, "lines": list(lines)}
        case Refuted(counterexample=found):
            return {"verdict": "refuted", "counterexample": _counterexample(agg, found), "text": found.text}
        case Unknown(residual=residual, reason=reason):
            return {"verdict": "unknown", "reason": reason, "residual": residual}
    return {"verdict": None}


def _counterexample(agg: Aggregator, found: Counterexample) -> dict[str, Any]:
    elements = {name: dict(tensors) for name, tensors in found.elements}
    operands, law = _SIDES[found.law]
    kinds = {**{c.name: c.kind for c in agg.state}, **{p.name: p.kind for p in agg.params}}
    values = (found.right if found.left is None else found.left, found.right)
    left, right = (complex_parts(v) for v in values)  # type: ignore[arg-type]
    part = 1 if kinds[found.component] == "complex" and left[0] == right[0] else 0
    return {
        "case": law,
        "sizes": dict(found.dims),
        "params": _tensors(elements.get("params", {}), kinds),
        "x": [_tensors(elements[o], kinds) for o in operands],
        "component": rule.parts(found.component, kinds[found.component])[part],
        "position": list(found.position),
        "left": None if found.left is None else _number(left[part]),
        "right": _number(right[part]),
    }


def _tensors(tensors: Mapping[str, object], kinds: Mapping[str, str]) -> dict[str, Any]:
    return {
        name: _nested(value, part)
        for tensor, value in tensors.items()
        for part, name in enumerate(rule.parts(tensor, kinds[tensor]))
    }


def _nested(value: object, part: int) -> Any:
    if isinstance(value, tuple | list):
        return [_nested(v, part) for v in value]
    return _number(complex_parts(value)[part])  # type: ignore[arg-type]


def _number(value: object) -> str:
    assert not isinstance(value, Complex)
    if not isinstance(value, Decimal):
        return str(value)
    return f"{value:.20g}" if value.is_finite() else "inf" if value > 0 else "-inf"


def _witnesses(body: Mapping[str, Any], tries: int) -> list[dict[str, Any]]:
    """A rational point of every cell of the rule that is found; none where nothing is ever compared."""
    found: dict[object, dict[str, Any]] = {}
    with deep_recursion(), localcontext(checker.DIGITS):
        for n in range(tries):
            at = checker.Rule(body, f"witness {n}", None, [checker.WORK // 10])
            params, x = at.tensors("params", "used"), [at.tensors("state", "used") for _ in "abc"]
            try:
                checker.sides(at, "associativity", params, x)
            except checker.Refused:  # a rule of large dims
                break
            cell = (*at.sizes.items(), *at.path)
            if at.path and not at.tie and cell not in found and len(found) < MAX_WITNESSES:
                arrays = [_arrays(at, kind, e) for kind, e in (("params", params), *(("state", e) for e in x))]
                found[cell] = {"sizes": at.sizes, "params": arrays[0], "x": arrays[1:]}
            if not at.path and n > 8:
                break
    return list(found.values())


def _arrays(at: checker.Rule, kind: str, element: Mapping[str, Any]) -> dict[str, Any]:
    def nested(name: str, dims: Sequence[str], place: tuple[int, ...]) -> Any:
        if not dims:
            return str(element[name][place].x)
        return [nested(name, dims[1:], (*place, k)) for k in range(at.sizes[dims[0]])]

    return {name: nested(name, at.data[kind][name]["dims"], ()) for name in element}


# --- bytes --------------------------------------------------------------------------------------


def _pretty(value: Any, depth: int) -> str:
    """Dicts a key a line, and lists a line where they fit into one."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or len(line) + 2 * depth < 118:
        return line
    inner = "  " * (depth + 1)
    if isinstance(value, dict):
        rows = [f"{inner}{json.dumps(k, ensure_ascii=False)}: {_pretty(v, depth + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(rows) + "\n" + "  " * depth + "}"
    return "[\n" + ",\n".join(inner + _pretty(v, depth + 1) for v in value) + "\n" + "  " * depth + "]"
