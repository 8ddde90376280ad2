"""What the templates say of each scan: names of its scalars in the order that a scan takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace

from psmc.codegen.pointwise_fields import dtype_of
from psmc.codegen.pointwise_lane import Lane
from psmc.codegen.pointwise_stages import Stage
from psmc.codegen.triton_expr import Key
from psmc.ir import Kind


def listed(prefix: str, names: Iterable[str]) -> str:
    return ", ".join(prefix + n for n in names)


def renamed(env: Mapping[Key, str], prefixes: Mapping[str, str]) -> dict[Key, str]:
    """The environment with whole spaces under another prefix."""
    return {k: prefixes[k[0]] + k[1] if k[0] in prefixes else v for k, v in env.items()}


def component(name: str, kind: Kind, start: str = "0.0", **more: object) -> SimpleNamespace:
    return SimpleNamespace(name=name, start=start, dtype=dtype_of(kind), zero="0" if kind == "int" else "0.0", **more)


def previous(one: Lane, stage: Stage) -> set[str]:
    """Components of a stage whose value before the token is read: by the output, or by a later stage."""
    readers = [one.readout, *(s.affine for s in one.stages if s.affine is not None)]
    return {k[1] for f in readers for k in f.arguments if k[0] == "prev"} & set(stage.live)


def stage_context(one: Lane, stage: Stage, env: Mapping[Key, str], before: bool) -> SimpleNamespace:
    """`before`: the scan also gives prefixes before each token."""
    names = stage.names
    sides: dict[Key, str] = {(side, n, 0): n for side in ("left", "right") for n in names}
    return SimpleNamespace(
        label=stage.label,
        before=before,
        affine=stage.affine,
        advance=stage.advance,
        live=[component(c, stage.kinds[c], one.starts[c]) for c in stage.live],
        live_names=stage.live,
        element=[component(n, stage.kinds[n]) for n in names],
        env=env,
        env_join=renamed(sides, {"left": "h_", "right": "c_"}),
        env_inner=renamed(sides, {"left": "q_", "right": "g_"}),
        env_above=renamed(sides, {"left": "q_", "right": "x_"}),
        elements=listed("e_", names),
        inner=listed("g_", names),
        above=listed("x_", names),
        outer=listed("c_", names),
        carried=listed("h_", names),
        joined=listed("f_", names),
    )


def flagged(label: str, flag: str, names: Sequence[str], chosen: Sequence[str]) -> SimpleNamespace:
    """A combine's operands with a flag before them; `chosen`: the names that the flag selects."""
    left, right = (f"{side}_{flag}, {listed(side[0] + '_', names)}" for side in ("left", "right"))
    values = f"{listed('l_', names)}, {listed('r_', names)}"
    return SimpleNamespace(label=label, left=left, right=right, values=values, joined=listed("c_", names), names=chosen)


def with_above(label: str, names: Sequence[str]) -> SimpleNamespace:
    """The operands of a combine that also gives the product without its last token."""
    lefts, rights = listed("l_", names), listed("r_", names)
    above = {side: listed(f"{side[0]}u_", names) for side in ("left", "right")}
    return SimpleNamespace(
        label=label,
        names=names,
        plain_left=f"{lefts}, {above['left']}, left_many",
        plain_right=f"{rights}, {above['right']}, right_many",
        left=f"left_kind, {lefts}, left_above, {above['left']}, left_many",
        right=f"right_kind, {rights}, right_above, {above['right']}, right_many",
        lefts=lefts,
        rights=rights,
        right_aboves=above["right"],
        values=f"{lefts}, {rights}",
        above_values=f"{lefts}, {above['right']}",
        joined=listed("c_", names),
        above=listed("u_", names),
    )
