"""The oracle against loops written by hand, against its own laws, and at its border."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from psmc.derive.lifting import lifted
from psmc.diagnostics import PsmcError
from psmc.frontend.psm import parse, read
from psmc.frontend.resolve import resolve
from psmc.ir import Aggregator, Assign, Block, Eye, Index, Op, Reduce, Ref
from psmc.reference import Env, evaluate, fold, run
from psmc.source import SourceFile

ROOT = Path(__file__).resolve().parents[1]
ROW, COL, MID = Index("i", "K"), Index("j", "V"), Index("m", "K")
SIZES = {"K": 3, "V": 2}
F64 = torch.float64


def spec(text: str) -> Aggregator:
    return resolve(parse(SourceFile("test.psm", text)))[0]


def example(name: str) -> Aggregator:
    return resolve(parse(read(ROOT / "examples" / f"{name}.psm")))[0]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")


# --- expressions --------------------------------------------------------------------------------


def x(name: str, *subs: object, kind: str = "real") -> Ref:
    return Ref("input", name, subs, kind)  # type: ignore[arg-type]


def value(expr: object, axes: tuple[Index, ...], **tensors: Tensor) -> Tensor:
    return evaluate(expr, Env({("input", n, 0): t for n, t in tensors.items()}, SIZES), axes)  # type: ignore[arg-type]


def test_subscripts() -> None:
    a, s = randn(5, 3, 3), randn(3, 2)
    torch.testing.assert_close(value(x("a", MID, ROW), (ROW, MID), a=a), a.mT)
    torch.testing.assert_close(value(x("a", ROW, ROW), (ROW,), a=a), a.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(value(x("a", ROW, 2), (ROW,), a=a), a[..., 2])
    torch.testing.assert_close(value(x("a", 1, 2), (), a=a), a[:, 1, 2])
    both = value(Op("mul", (x("a", ROW, MID), x("s", ROW, COL))), (ROW, COL, MID), a=a, s=s)
    torch.testing.assert_close(both, torch.einsum("bim,ij->bijm", a, s))
    torch.testing.assert_close(value(x("s", MID, COL), (COL, ROW, MID), s=s), s.T[:, None].expand(2, 3, 3))


def test_gather() -> None:
    a, p = randn(1, 4, 3, 3), torch.randint(0, 3, (5, 1, 3), generator=torch.Generator().manual_seed(0))
    got = value(x("a", x("p", ROW, kind="int"), MID), (ROW, MID), a=a, p=p)
    expected = torch.stack([torch.stack([a[0, h][p[b, 0]] for h in range(4)]) for b in range(5)])
    torch.testing.assert_close(got, expected)
    nested = value(x("p", x("p", ROW, kind="int"), kind="int"), (ROW,), p=p)
    assert torch.equal(nested, p.gather(-1, p))
    with pytest.raises(IndexError):
        value(x("a", x("p", ROW, kind="int"), MID), (ROW, MID), a=a, p=p + 1)


def test_reductions_and_an_inner_index_of_the_same_name() -> None:
    a, k = randn(5, 3, 3), randn(3)
    product = Reduce("sum", MID, Op("mul", (x("a", ROW, MID), x("k", MID))))
    torch.testing.assert_close(value(product, (ROW,), a=a, k=k), a @ k)
    hidden = Op("mul", (x("k", ROW), Reduce("sum", ROW, x("k", ROW))))
    torch.testing.assert_close(value(hidden, (ROW,), k=k), k * k.sum())
    inside = Reduce("sum", ROW, Op("mul", (x("k", ROW), Reduce("max", ROW, x("k", ROW)))))
    torch.testing.assert_close(value(inside, (), k=k), k.sum() * k.max())
    trace = Reduce("sum", ROW, Reduce("sum", MID, Op("mul", (Eye(ROW, MID), x("a", ROW, MID)))))
    torch.testing.assert_close(value(trace, (), a=a), a.diagonal(dim1=1, dim2=2).sum(-1))
    torch.testing.assert_close(value(Reduce("prod", ROW, x("c")), (), c=k), k**3)


def test_ints_stay_exact_until_something_real_needs_them() -> None:
    p = torch.tensor([2**60 + 1, 3, 4])
    assert (
        value(Op("add", (x("p", ROW, kind="int"), x("p", ROW, kind="int"))), (ROW,), p=p).tolist() == (2 * p).tolist()
    )
    half = value(Op("div", (x("p", 1, kind="int"), x("p", 2, kind="int"))), (), p=p)
    assert half.dtype == F64 and half.item() == 0.75


def test_exp_sees_the_difference_behind_a_let() -> None:
    minus = Assign("d", (), Op("sub", (x("a"), x("b"))))
    block = Block((minus,), (Assign("o", (), Op("exp", (Op("add", (Ref("let", "d", ()), x("c"))),))),))
    values = [torch.tensor(v, dtype=F64, requires_grad=True) for v in (-math.inf, -math.inf, 2.0)]
    out = run(block, Env({("input", n, 0): v for n, v in zip("abc", values, strict=True)}, {}))["o"]
    out.backward()
    assert [out.item(), *(v.grad.item() for v in values)] == [0.0] * 4  # type: ignore[union-attr]


# --- the fold against loops by hand -------------------------------------------------------------

GATED = {"q": (2, 7, 2, 3), "k": (2, 7, 2, 3), "v": (2, 7, 2, 2), "g": (2, 7, 2, 3)}


def gated_inputs() -> dict[str, Tensor]:
    out = {n: randn(*shape, seed=n_) for n_, (n, shape) in enumerate(GATED.items())}
    return {**out, "g": -out["g"].abs()}


def test_gated_matrix_state() -> None:
    inputs = gated_inputs()
    q, k, v, g = inputs.values()
    state = torch.zeros(2, 2, 3, 2, dtype=F64)
    outs = []
    for t in range(7):
        state = torch.einsum("bhk,bhkv->bhkv", g[:, t].exp(), state) + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) / math.sqrt(3))
    for name in ("gla", "gla_recurrence"):
        outputs, final = fold(example(name), inputs)
        torch.testing.assert_close(outputs["o"], torch.stack(outs, 1))
        torch.testing.assert_close(final["S"], state)
    assert set(fold(example("gla"), inputs)[1]) == {"a", "S"}
    torch.testing.assert_close(fold(example("gla"), inputs)[1]["a"], g.sum(1).exp())


def test_complex_state() -> None:
    agg = spec("""aggregator rotate {
      input u, r in (0, inf), theta
      state a : complex = 1, h : complex = 0
      lift { a = exp(complex(-r, theta)); h = u }
      combine (l, r) { a = l.a * r.a; h = r.a * l.h + r.h }
      output y = real(h), z = imag(conj(h))
      associative: yes
    }""")
    u, r, theta = randn(2, 9), randn(2, 9, seed=1).abs(), randn(2, 9, seed=2)
    h = torch.zeros(2, dtype=torch.complex128)
    for t in range(9):
        h = torch.polar((-r[:, t]).exp(), theta[:, t]) * h + u[:, t]
    outputs, final = fold(agg, {"u": u, "r": r, "theta": theta})
    assert final["h"].dtype == torch.complex128
    torch.testing.assert_close(final["h"], h)
    torch.testing.assert_close(outputs["y"][:, -1], h.real)
    torch.testing.assert_close(outputs["z"][:, -1], -h.imag)


def test_permutations_compose_exactly() -> None:
    agg = example("s5_word")
    (tensor,) = agg.leaf_inputs
    perms = torch.rand(3, 20, 5, generator=torch.Generator().manual_seed(0)).argsort(-1)
    final = fold(agg, {tensor.name: perms})[1]
    component = agg.state[0].name
    assert agg.combine is not None
    for row in range(3):
        left = right = list(range(5))
        for t in range(20):
            left = [left[i] for i in perms[row, t].tolist()]
            right = [perms[row, t].tolist()[i] for i in right]
        assert final[component][row].tolist() in (left, right)


def test_order_left_starts_from_the_declared_state() -> None:
    agg = spec("""aggregator elman {
      input u
      param w
      state h = 0.5
      lift { h = u }
      combine (l, r) { h = tanh(w * l.h + r.h) }
      output y = h, before = prev.h
      associative: no
      order: left
    }""")
    u, w = randn(2, 5, 3), randn(3)
    h = torch.full((2, 3), 0.5, dtype=F64)
    befores, afters = [], []
    for t in range(5):
        befores.append(h)
        h = torch.tanh(w * h + u[:, t])
        afters.append(h)
    outputs, final = fold(agg, {"u": u}, {"w": w})
    close(outputs, {"y": torch.stack(afters, 1), "before": torch.stack(befores, 1)})
    close(final, {"h": h})


TREE = """aggregator odd {
  input u
  state h = 0
  lift { h = u }
  combine (l, r) { h = sin(2 * l.h) + r.h * l.h }
  output y = h, before = prev.h
  associative: no
}"""


def tree_by_recursion(leaves: list[Tensor]) -> Tensor:
    """Complete trees of falling powers of two from the left, then folded from the left."""

    def combine(a: Tensor, b: Tensor) -> Tensor:
        return torch.sin(2 * a) + b * a

    def complete(part: list[Tensor]) -> Tensor:
        half = len(part) // 2
        return part[0] if not half else combine(complete(part[:half]), complete(part[half:]))

    roots, at = [], 0
    while at < len(leaves):
        size = 1 << ((len(leaves) - at).bit_length() - 1)
        roots.append(complete(leaves[at : at + size]))
        at += size
    total = roots[0]
    for root in roots[1:]:
        total = combine(total, root)
    return total


def test_tree_is_the_binary_counter() -> None:
    u = randn(2, 13)
    outputs, final = fold(spec(TREE), {"u": u})
    prefixes = [tree_by_recursion(list(u[:, : n + 1].unbind(1))) for n in range(13)]
    torch.testing.assert_close(outputs["y"], torch.stack(prefixes, 1))
    torch.testing.assert_close(outputs["before"], torch.stack([torch.zeros(2, dtype=F64), *prefixes[:-1]], 1))
    torch.testing.assert_close(final["h"], prefixes[-1])
    left = fold(spec(TREE.replace("no\n", "no order: left\n")), {"u": u})[0]
    assert not torch.allclose(left["y"], outputs["y"])


def test_rule_from_python() -> None:
    agg = spec(
        "aggregator outside { dim K input u[K] state h[K] = 0 lift { h[i] = u[i] } combine extern associative: no }"
    )
    layer = torch.nn.Linear(6, 3, dtype=F64)

    def rule(left: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"h": layer(torch.cat([left["h"], right["h"]], -1))}

    u = randn(2, 3, 4, 3)
    outputs, _ = fold(agg, {"u": u}, extern=rule)
    both = layer(torch.cat([u[:, 0], u[:, 1]], -1))
    torch.testing.assert_close(outputs["h"][:, 1], both)
    torch.testing.assert_close(outputs["h"][:, 2], layer(torch.cat([both, u[:, 2]], -1)))
    with pytest.raises(PsmcError, match="extern"):
        fold(agg, {"u": u})


def test_the_identity_is_never_combined_in() -> None:
    agg = spec("""aggregator wrong_identity {
      input u
      state h = 100
      lift { h = u }
      combine (l, r) { h = l.h + r.h }
      associative: yes
    }""")
    u = randn(1, 3)
    torch.testing.assert_close(fold(agg, {"u": u})[0]["h"], u.cumsum(1))
    start = {"h": torch.full((1,), 100.0, dtype=F64)}
    torch.testing.assert_close(fold(agg, {"u": u}, initial_state=start)[0]["h"], 100 + u.cumsum(1))


# --- laws ---------------------------------------------------------------------------------------

TAPPED = """aggregator tapped {
  input u, w
  state a = 1, h = 0
  lift { a = sigmoid(w); h = u + 0.5 * u{-1} - 0.25 * u{-3} }
  combine (l, r) { a = l.a * r.a; h = r.a * l.h + r.h }
  output y = h + w{-1} * prev.h
  associative: yes
}"""


def tapped_inputs(length: int = 9, batch: int = 2) -> dict[str, Tensor]:
    return {"u": randn(batch, length), "w": randn(batch, length, seed=1)}


def cut(inputs: dict[str, Tensor], a: int, b: int) -> dict[str, Tensor]:
    return {n: t[:, a:b] for n, t in inputs.items()}


def test_taps_read_zero_before_the_start() -> None:
    inputs = tapped_inputs()
    u, w = inputs["u"], inputs["w"]
    outputs, final = fold(spec(TAPPED), inputs)
    h = torch.zeros(2, dtype=F64)
    for t in range(9):
        before = h
        lag = [u[:, t - k] if t >= k else torch.zeros(2, dtype=F64) for k in range(4)]
        h = torch.sigmoid(w[:, t]) * h + lag[0] + 0.5 * lag[1] - 0.25 * lag[3]
        torch.testing.assert_close(outputs["y"][:, t], h + (w[:, t - 1] * before if t else 0))
    close(final, {"a": torch.sigmoid(w).prod(1), "h": h, "u_tail": u[:, -3:], "w_tail": w[:, -1:]})


@pytest.mark.parametrize("keys", [("a", "h"), ("h",)])
@pytest.mark.parametrize("at", [0, 1, 4, 9])
def test_a_split_sequence_with_the_state_carried_gives_the_same(at: int, keys: tuple[str, ...]) -> None:
    agg, inputs = spec(TAPPED), tapped_inputs()
    outputs, final = fold(agg, inputs)
    first, state = fold(agg, cut(inputs, 0, at))
    state = {n: v for n, v in state.items() if n in keys or n.endswith("_tail")}
    second, last = fold(agg, cut(inputs, at, 9), initial_state=state)
    close({"y": torch.cat([first["y"], second["y"]], 1)}, outputs)
    close(last, {n: final[n] for n in state})


def test_packed_sequences_are_separate_ones() -> None:
    agg, inputs = spec(TAPPED), tapped_inputs(batch=1)
    state = {"h": randn(4), "u_tail": randn(4, 3), "w_tail": randn(4, 1)}
    outputs, final = fold(agg, inputs, cu_seqlens=torch.tensor([0, 2, 2, 3, 9]), initial_state=state)
    for row, (a, b) in enumerate([(0, 2), (2, 2), (2, 3), (3, 9)]):
        own = {n: v[row : row + 1] for n, v in state.items()}
        alone, last = fold(agg, cut(inputs, a, b), initial_state=own)
        close({"y": outputs["y"][:, a:b]}, alone)
        close({n: v[row : row + 1] for n, v in final.items()}, last)


def test_a_reset_is_a_new_sequence() -> None:
    agg, inputs = spec(TAPPED), tapped_inputs()
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[0, 0] = reset[0, 4] = reset[1, 7] = True
    state = {"h": randn(2), "u_tail": randn(2, 3), "w_tail": randn(2, 1)}
    outputs, final = fold(agg, inputs, reset=reset, initial_state=state)
    for row, cuts in enumerate([[(0, 4), (4, 9)], [(0, 7), (7, 9)]]):
        for a, b in cuts:
            rows = {n: v[row : row + 1] for n, v in inputs.items()}
            own = {n: v[row : row + 1] for n, v in state.items()} if (row, a) == (1, 0) else None
            alone, last = fold(agg, cut(rows, a, b), initial_state=own)
            close({"y": outputs["y"][row : row + 1, a:b]}, alone)
        close({n: v[row : row + 1] for n, v in final.items()}, {n: last[n] for n in final})


def test_masked_tokens_leave_the_state_alone_and_are_never_computed_with() -> None:
    agg = spec("""aggregator logs {
      input u, w
      param c
      state h = 0
      lift { h = log(u) * c }
      combine (l, r) { h = l.h + r.h }
      output y = h * w
      associative: yes
    }""")
    u, w, c = randn(2, 6).abs(), randn(2, 6), randn(1).squeeze().requires_grad_()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0]], dtype=torch.bool)
    u[~mask], w[~mask] = 0.0, math.nan
    u.requires_grad_()
    outputs, final = fold(agg, {"u": u, "w": w}, {"c": c}, mask=mask)
    assert (outputs["y"][~mask] == 0).all()
    for row in range(2):
        kept = mask[row]
        alone, last = fold(agg, {"u": u[row : row + 1, kept], "w": w[row : row + 1, kept]}, {"c": c})
        torch.testing.assert_close(outputs["y"][row : row + 1, kept], alone["y"])
        torch.testing.assert_close(final["h"][row : row + 1], last["h"])
    (outputs["y"].sum() + final["h"].sum()).backward()
    assert torch.isfinite(c.grad).all() and torch.isfinite(u.grad).all()  # type: ignore[arg-type]


def test_taps_read_masked_tokens_as_zero() -> None:
    agg, inputs = spec(TAPPED), tapped_inputs()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 5] = False
    outputs, final = fold(agg, inputs, mask=mask)
    zeroed = {n: v * mask for n, v in inputs.items()}
    u, w = zeroed["u"], zeroed["w"]
    h = torch.zeros(2, dtype=F64)
    for t in range(9):
        if t != 5:
            lag = [u[:, t - k] if t >= k else torch.zeros(2, dtype=F64) for k in range(4)]
            before, h = h, torch.sigmoid(w[:, t]) * h + lag[0] + 0.5 * lag[1] - 0.25 * lag[3]
            torch.testing.assert_close(outputs["y"][:, t], h + (w[:, t - 1] * before if t else 0))
    torch.testing.assert_close(final["u_tail"], u[:, -3:])
    # padding on the left changes nothing
    padded = {n: torch.cat([torch.full((2, 2), math.nan, dtype=F64), v], 1) for n, v in inputs.items()}
    real = torch.arange(11)[None].expand(2, 11) >= 2
    close({"y": fold(agg, padded, mask=real)[0]["y"][:, 2:]}, fold(agg, inputs)[0])


def test_reverse_flips_time_within_each_sequence() -> None:
    agg, inputs = spec(TAPPED), tapped_inputs(batch=1)
    flipped = {n: v.flip(1) for n, v in inputs.items()}
    outputs, final = fold(agg, inputs, reverse=True)
    forward, last = fold(agg, flipped)
    close(outputs, {"y": forward["y"].flip(1)})
    close(final, last)
    packed = fold(agg, inputs, reverse=True, cu_seqlens=[0, 4, 9])[0]["y"]
    parts = [fold(agg, {n: v[:, a:b].flip(1) for n, v in inputs.items()})[0]["y"].flip(1) for a, b in ((0, 4), (4, 9))]
    torch.testing.assert_close(packed, torch.cat(parts, 1))
    mask = torch.arange(9)[None] < 6
    torch.testing.assert_close(
        fold(agg, inputs, reverse=True, mask=mask)[0]["y"], fold(agg, flipped, mask=mask.flip(1))[0]["y"].flip(1)
    )


def test_grouped_lanes_repeat_consecutively() -> None:
    inputs = gated_inputs()
    few = {**inputs, "k": randn(2, 7, 1, 3), "v": randn(2, 7, 4, 2), "q": randn(2, 7, 4, 3)}
    outputs, _ = fold(example("gla"), few)
    full = {n: t.repeat_interleave(4 // t.shape[2], 2) for n, t in few.items()}
    close(outputs, fold(example("gla"), full)[0])
    agg = spec("""aggregator scaled {
      input u
      param c
      state h = 0
      lift { h = u * c }
      combine (l, r) { h = l.h + r.h }
      associative: yes
    }""")
    u, c = randn(2, 3, 4, 6), randn(1, 2)
    expected = (u * c.repeat_interleave(3, 1)).cumsum(1)
    torch.testing.assert_close(fold(agg, {"u": u}, {"c": c})[0]["h"], expected)
    torch.testing.assert_close(fold(agg, {"u": u}, {"c": randn(1).squeeze()})[0]["h"], (u * randn(1)).cumsum(1))


def test_no_tokens() -> None:
    inputs = {n: v[:, :0] for n, v in gated_inputs().items()}
    outputs, state = fold(example("gla"), inputs)
    assert outputs["o"].shape == (2, 0, 2, 2)
    close(state, {"a": torch.ones(2, 2, 3, dtype=F64), "S": torch.zeros(2, 2, 3, 2, dtype=F64)})
    given = {"S": randn(2, 2, 3, 2)}
    close(fold(example("gla"), inputs, initial_state=given)[1], given)
    nothing = torch.zeros(2, 7, dtype=torch.bool)
    outputs, state = fold(example("gla"), gated_inputs(), mask=nothing, initial_state=given)
    assert not outputs["o"].any()
    close(state, given)


def test_low_precision_inputs_are_folded_in_fp32() -> None:
    outputs, state = fold(example("gla"), {n: v.bfloat16() for n, v in gated_inputs().items()})
    assert outputs["o"].dtype == state["S"].dtype == torch.float32


NAMES = {p.stem for p in (ROOT / "examples").glob("*.psm")}
NAMES -= {"linear_recurrence"}  # whose combine takes the elements themselves as inputs


@pytest.mark.parametrize("name", sorted(n for n in NAMES if f"{n}_recurrence" in NAMES))
def test_a_recurrence_run_as_written_is_its_lift_and_its_combine(name: str) -> None:
    written = example(f"{name}_recurrence")
    sizes = {d.name: d.size or 3 for d in written.dims}
    inputs, params = {}, {}
    for n, t in enumerate((*written.inputs, *written.params)):
        lead = (2, 6, 2) if t in written.inputs else (2,)
        v = randn(*lead, *(sizes[d] for d in t.dims), seed=n)
        if t.interval is not None:
            bounded = None not in (t.interval.lo, t.interval.hi)
            v = torch.sigmoid(v) if bounded else v.abs() if t.interval.lo is not None else -v.abs()
            v = (v * (int(t.interval.hi) + 1)).long() if t.kind == "int" else v
        (inputs if t in written.inputs else params)[t.name] = v.to(torch.complex128) if t.kind == "complex" else v
    outputs, final = fold(written, inputs, params)
    scanned, last = fold(lifted(written), inputs, params)
    close(scanned, outputs)
    close({n: last[n] for n in final}, final)
    as_combine = fold(example(name), inputs, params)[0]
    close(as_combine, outputs)


def test_gradients_of_inputs_params_and_initial_state() -> None:
    agg = spec(TAPPED.replace("input u, w", "input u, w param c").replace("h = u +", "h = c * u +"))
    u, w, c, h = (v.requires_grad_() for v in (randn(1, 4), randn(1, 4, seed=1), randn(1).squeeze(), randn(1)))
    tails = randn(1, 3).requires_grad_(), randn(1, 1).requires_grad_()

    def outputs(u: Tensor, w: Tensor, c: Tensor, h: Tensor, u_tail: Tensor, w_tail: Tensor) -> tuple[Tensor, ...]:
        state = {"h": h, "u_tail": u_tail, "w_tail": w_tail}
        out, last = fold(agg, {"u": u, "w": w}, {"c": c}, initial_state=state)
        return (out["y"], *last.values())

    assert torch.autograd.gradcheck(outputs, (u, w, c, h, *tails))


# --- the border ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": None}, "missing"),
        ({"extra": randn(1)}, "'extra'"),
        ({"q": randn(2, 7, 2, 5)}, "dim 'K' of 'k' is 3, not 5"),
        ({"q": randn(2, 6, 2, 3)}, "batch and time"),
        ({"v": randn(2, 7, 3, 2)}, "lanes"),
        ({"v": randn(2)}, "too few axes"),
        ({"v": randn(2, 7, 2, 2).to(torch.complex128)}, "complex"),
        ({"mask": torch.ones(2, 6, dtype=torch.bool)}, r"'mask' must be a bool tensor of shape \[2, 7\]"),
        ({"cu_seqlens": [0, 7]}, "batch of 1"),
        ({"initial_state": {"a": randn(2, 2, 3), "T": randn(2)}}, "initial_state"),
        ({"initial_state": {"S": randn(3, 2, 3, 2)}}, "2 rows"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, object], message: str) -> None:
    inputs: dict[str, object] = {**gated_inputs(), **{n: v for n, v in change.items() if n not in OPTIONS}}
    options = {n: v for n, v in change.items() if n in OPTIONS}
    with pytest.raises(PsmcError, match=message) as raised:
        fold(example("gla"), {n: v for n, v in inputs.items() if v is not None}, **options)  # type: ignore[arg-type]
    assert raised.value.diagnostics[0].code == "PSM690"


OPTIONS = {"mask", "cu_seqlens", "initial_state"}


def test_an_initial_state_must_hold_what_combine_reads() -> None:
    agg = example("softmax_average")
    names = [t.name for t in agg.inputs]
    with pytest.raises(PsmcError, match="needs"):
        fold(agg, {n: randn(2, 3) for n in names}, initial_state={agg.state[1].name: randn(2)})
