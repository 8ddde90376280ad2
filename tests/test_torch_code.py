"""Printed torch functions against the oracle: on random blocks, on every example, in every dtype; and their text."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from psmc.codegen.linearise import every_op, linearise
from psmc.codegen.paste import paste
from psmc.codegen.torch_code import join, print_functions, print_output
from psmc.codegen.torch_ops import HELPERS
from psmc.codegen.torch_value import number
from psmc.frontend.psm import parse, read
from psmc.frontend.resolve import resolve
from psmc.ir import (
    Aggregator,
    Assign,
    Block,
    Const,
    Dim,
    DimValue,
    Expr,
    Eye,
    Index,
    IndexValue,
    Op,
    Reduce,
    Ref,
)
from psmc.ir import Tensor as Declared
from psmc.ir.query import level_dims
from psmc.reference import Env, run
from psmc.source import SourceFile

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.psm"))
SPACES = {"x": "input", "p": "param", "l": "left", "r": "right", "s": "state", "prev": "prev", "at": "level",
          "prev_at": "prev_level"}  # fmt: skip
SIZES = {"K": 3, "V": 2, "D": 4, "N": 3, "R": 2, "M": 5}


def spec(text: str) -> Aggregator:
    return resolve(parse(SourceFile("test.psm", text)))[0]


def load(source: str) -> dict[str, Any]:
    scope: dict[str, Any] = {"torch": torch, "math": math}
    exec(source, scope)
    return scope


# --- random blocks ------------------------------------------------------------------------------

IK, JV, MK, PK = Index("i", "K"), Index("j", "V"), Index("m", "K"), Index("p", "K")
AXES = (IK, JV)
INPUTS = {"c": (), "k": ("K",), "v": ("V",), "S": ("K", "V"), "A": ("K", "K")}


def leaves(free: tuple[Index, ...], lets: tuple[Assign, ...]) -> st.SearchStrategy[Expr]:
    """Refs to tensors at subscripts of `free`, permuted and repeated; constants; Eye; gathers by position q."""
    over = {dim: [i for i in free if i.dim == dim] for dim in ("K", "V")}
    kinds: list[st.SearchStrategy[Expr]] = [
        st.sampled_from([Const(Fraction(1, 3)), Const(Fraction(-2)), Const(Fraction(1, 10)), DimValue("K")])
    ]
    tensors = [("input", n, d) for n, d in INPUTS.items()]
    tensors += [("let", a.name, tuple(i.dim for i in a.indices)) for a in lets]
    for space, name, dims in tensors:
        options = [[*over[d], *((0, 1) if name == "A" else ())] for d in dims]
        if dims[:1] == ("K",) and over["K"]:
            options[0].append(Ref("input", "q", (over["K"][0],), "int"))
        if all(options):
            subs = st.tuples(*(st.sampled_from(o) for o in options))
            kinds.append(subs.map(lambda s, space=space, name=name: Ref(space, name, s)))
    if len(over["K"]) > 1:
        kinds.append(st.just(Eye(over["K"][0], over["K"][1])))
    kinds.extend(st.just(IndexValue(i)) for i in free)
    return st.one_of(kinds)


@st.composite
def expressions(draw: st.DrawFn, free: tuple[Index, ...], lets: tuple[Assign, ...], depth: int = 4) -> Expr:
    def sub() -> Expr:
        return draw(expressions(free, lets, depth - 1))

    if depth == 0:
        return draw(leaves(free, lets))
    forms = ("leaf", "add", "mul", "mul", "sub", "max", "unary", "where", "exp", "sum", "reduce", "div")
    match draw(st.sampled_from(forms)):
        case "add" | "mul" | "sub" | "max" as op:
            return Op(op, (sub(), sub()))
        case "div":
            return Op("div", (sub(), Op("add", (Const(Fraction(3, 2)), Op("sigmoid", (sub(),))))))
        case "unary":
            return Op(draw(st.sampled_from(("tanh", "sigmoid", "neg", "softplus", "stop", "relu"))), (sub(),))
        case "where":
            return Op("where", (Op("lt", (sub(), sub())), sub(), sub()))
        case "exp":
            return Op("exp", (Op("sub", (Op("tanh", (sub(),)), Op("softplus", (sub(),)))),))
        case ("sum" | "reduce") as op:
            index = next((n for n in (MK, PK) if n not in free), None)
            if index is None:
                return draw(leaves(free, lets))
            name = "sum" if op == "sum" else draw(st.sampled_from(("max", "prod")))
            factor = draw(leaves((*free, index), lets))
            body = draw(expressions((*free, index), lets, depth - 1))
            return Reduce(name, index, Op("mul", (factor, Op("tanh", (body,)) if op == "reduce" else body)))
        case _:
            return draw(leaves(free, lets))


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    lets: tuple[Assign, ...] = ()
    for name, indices in (("n", (IK,)), ("w", (JV, IK)), ("torch", ())):
        if draw(st.booleans()):
            lets += (Assign(name, indices, Op("tanh", (draw(expressions(indices, lets, 2)),))),)
    results = tuple(Assign(name, axes, draw(expressions(axes, lets))) for name, axes in (("x", AXES), ("o", (JV,))))
    return Block(lets, results)


@settings(max_examples=int(os.environ.get("PSMC_EXAMPLES", 25)), deadline=None)
@given(blocks(), st.integers(0, 2**31))
def test_random_blocks_agree_with_the_oracle(block: Block, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, Tensor] = {}
    for name, dims in INPUTS.items():
        lead = (2, 1) if name in "kS" else (1, 4) if name == "v" else (4,) if name == "c" else ()
        shape = (*lead, *(SIZES[d] for d in dims))
        values[name] = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    values["q"] = torch.randint(0, 3, (2, 1, 3), generator=generator)
    declared = (*(Declared(n, d) for n, d in INPUTS.items()), Declared("q", ("K",), "int"))
    agg = Aggregator("t", (Dim("K"), Dim("V")), declared, (), (), Block(), Block(), None, block, "no")
    printed = load(join([print_output(agg)]))["output"]
    got = printed(None, None, SimpleNamespace(**values), None, SimpleNamespace(**SIZES))
    expected = run(block, Env({("input", n, 0): v for n, v in values.items()}, SIZES))
    compare(got, expected, [v for n, v in values.items() if n != "q"])


def compare(got: dict[str, Tensor], expected: dict[str, Tensor], leaves_: list[Tensor]) -> None:
    """Values, and gradients of a fixed weighted sum."""
    assert list(got) == list(expected)
    for name, value in expected.items():
        shape = torch.broadcast_shapes(value.shape, got[name].shape)
        mine = got[name].expand(shape).to(value.dtype)
        torch.testing.assert_close(mine, value.expand(shape), rtol=1e-9, atol=1e-9, equal_nan=True)
    sides = []
    for outputs in (got, expected):
        total = torch.zeros((), dtype=torch.float64, device=leaves_[0].device if leaves_ else None)
        for name, value in outputs.items():
            part = value.real + 0.5 * value.imag if value.is_complex() else value.double()
            lead = torch.broadcast_shapes(part.shape, expected[name].shape)
            total = (
                total
                + (
                    part.expand(lead) * torch.linspace(0.5, 1.5, math.prod(lead), device=part.device).reshape(lead)
                ).sum()
            )
        if total.requires_grad:
            sides.append(torch.autograd.grad(total, leaves_, allow_unused=True))
    if sides:
        assert len(sides) == 2
        for a, b, leaf in zip(*sides, leaves_, strict=True):
            zero = torch.zeros_like(leaf)
            pair = (zero if side is None else side for side in (a, b))
            torch.testing.assert_close(*pair, rtol=1e-7, atol=1e-7, equal_nan=True)


# --- every example ------------------------------------------------------------------------------


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def sample(declared: Declared, lead: tuple[int, ...], sizes: dict[str, int], dtype: torch.dtype, seed: int) -> Tensor:
    """Random values inside the declared interval."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*lead, *(sizes[d] for d in declared.dims))
    if declared.kind == "int":
        return torch.rand(shape, generator=generator).argsort(-1) if shape else torch.zeros((), dtype=torch.int64)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if declared.kind == "complex":
        return torch.complex(x, x.roll(1, -1) if shape else x).to(dtype.to_complex())
    if (domain := declared.interval) is not None:
        lo, hi = (None if b is None else float(b) for b in (domain.lo, domain.hi))
        if lo is not None and hi is not None:
            x = lo + (hi - lo) * torch.sigmoid(x)
        elif lo is not None or hi is not None:
            x = lo + 0.1 + x.abs() if lo is not None else hi - 0.1 - x.abs()  # type: ignore[operator]
    return x.to(dtype)


def call(
    agg: Aggregator, function: str, dtype: torch.dtype, device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor]]:
    """A printed function and the oracle on the same random data: results of both, and the tensors that they read."""
    sizes = {d.name: d.size or SIZES.get(d.name, 3) for d in agg.dims}
    parts = [Declared(c.name, c.dims, c.kind, c.interval) for c in agg.state]
    spaces = {"x": agg.leaf_inputs, "p": agg.params, **{n: parts for n in ("l", "r", "s", "prev")}}
    signatures = {"lift": "x p", "combine": "l r p", "recurrence": "prev x p", "output": "s prev x p"}
    names = signatures[function].split()
    if function == "output" and (levels := level_dims(agg)):
        spaces |= {n: [replace(c, dims=(*levels, *c.dims)) for c in parts] for n in ("at", "prev_at")}
        names += ["at", "prev_at"]
    block = {"lift": agg.leaf, "combine": agg.combine, "recurrence": agg.recurrence, "output": agg.output}[function]
    assert isinstance(block, Block)
    spread: dict[str, SimpleNamespace] = {}
    env = {}
    seed = 0
    for name in names:
        spread[name] = SimpleNamespace()
        for declared in spaces[name]:
            for lag in range(5 if name == "x" else 1):
                seed += 1
                value = sample(declared, (2,) if name == "p" else (3, 2), sizes, dtype, seed).to(device)
                value = value if declared.kind == "int" else value.requires_grad_()
                setattr(spread[name], f"{declared.name}_lag{lag}" if lag else declared.name, value)
                env[SPACES[name], declared.name, lag] = value
    printed = load(print_functions(agg, tuple(c.name for c in agg.state)))[function]
    levels_last = [spread[n] for n in names if n in ("at", "prev_at")]
    got = printed(*(spread[n] for n in signatures[function].split()), SimpleNamespace(**sizes), *levels_last)
    return got, run(block, Env(env, sizes, dtype, device)), [v for v in env.values() if v.requires_grad]


def functions(agg: Aggregator) -> list[str]:
    rule = ["combine"] if isinstance(agg.combine, Block) else []
    return ["recurrence", "output"] if agg.recurrence else ["lift", *rule, "output"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_agree_with_the_oracle(path: Path) -> None:
    for agg in resolve(parse(read(path))):
        for function in functions(agg):
            for device in DEVICES:
                compare(*call(agg, function, torch.float64, device))
            got, expected, _ = call(agg, function, torch.float32)
            env = Env({}, {}, torch.float32)
            kinds = {c.name: c.kind for c in agg.state if function != "output"}
            for name, value in expected.items():
                wanted = env.of_kind(value, kinds[name]) if name in kinds else value
                assert got[name].dtype == wanted.dtype
        sizes = {d.name: d.size or SIZES.get(d.name, 3) for d in agg.dims}
        scope = load(print_functions(agg, tuple(c.name for c in agg.state)))
        for name, which in (("identity", "identity"), ("start", "start")):
            if name in scope:
                got = scope[name](SimpleNamespace(**sizes), torch.zeros((), dtype=torch.float64))
                expected = run(Block(results=tuple(getattr(c, which) for c in agg.state)), Env({}, sizes))
                for component in agg.state:
                    kind = Env({}, sizes).of_kind(expected[component.name], component.kind)
                    torch.testing.assert_close(got[component.name], kind)


# --- the text -----------------------------------------------------------------------------------

GATED = """aggregator gated {
  dim K, V
  input q[K], k[K], v[V], g[K] in (-inf, 0]
  state a[K] = 1, S[K, V] = 0
  lift { a[i] = exp(g[i]);  S[i, j] = k[i] * v[j] }
  combine (l, r) { a[i] = l.a[i] * r.a[i];  S[i, j] = r.a[i] * l.S[i, j] + r.S[i, j] }
  output o[j] = sum[i] q[i] * S[i, j] / sqrt(K)
  associative: yes
}"""


def test_text_of_a_gated_matrix_state() -> None:
    assert (
        print_functions(spec(GATED), ("S",))
        == """\
def lift(x, p, n):
    a = torch.exp(x.g)
    S = x.k[..., :, None] * x.v[..., None, :]
    return {"a": a, "S": S}


def combine(l, r, p, n):
    a = l.a * r.a
    S = r.a[..., :, None] * l.S + r.S
    return {"a": a, "S": S}


def advance(l, r, p, n):
    S = r.a[..., :, None] * l.S + r.S
    return {"S": S}


def output(s, prev, x, p, n):
    o = torch.einsum("...j,...ji->...i", x.q, s.S) / math.sqrt(n.K)
    return {"o": o}


def identity(n, like):
    a = like.new_full((n.K,), 1)
    S = like.new_full((n.K, n.V), 0)
    return {"a": a, "S": S}
"""
    )


def test_a_let_passed_on_takes_the_result_name_and_shared_work_is_done_once() -> None:
    agg = spec("""aggregator stable {
      input score, value
      state m = -inf, w = 0, u = 0
      lift { m = score; w = value; u = 1 }
      combine (l, r) {
        m = max(l.m, r.m)
        w = l.w * exp(l.m - m) + r.w * exp(r.m - m)
        u = l.u * exp(l.m - m) + r.u * exp(r.m - m)
      }
      associative: yes
    }""")
    assert isinstance(agg.combine, Block)
    program = linearise(agg.combine)
    assert [s.name for s in program.steps] == ["m", "exp_l_m", "exp_r_m", "w", "u"]
    assert dict(program.results) == {"m": "m", "w": "w", "u": "u"}


def test_values_that_differ_in_index_names_only_are_one() -> None:
    agg = spec("""aggregator quadratic {
      dim K
      input x[K]
      state s[K, K] = 0
      lift { s[i, j] = exp(x[i]) * exp(x[j]) }
      combine (l, r) { s[i, j] = l.s[i, j] + r.s[i, j] }
      associative: yes
    }""")
    steps = linearise(agg.leaf).steps
    assert [(s.name, len(s.axes)) for s in steps] == [("exp_x", 1), ("s", 2)]


def test_a_transposed_result_is_not_the_same_result() -> None:
    agg = spec("""aggregator transposed {
      dim K
      input k[K], u[K]
      state A[K, K] = 0, B[K, K] = 0, C[K, K] = 0
      lift { A[i, m] = k[i] - u[m]; B[i, m] = k[m] - u[i]; C[m, i] = k[m] - u[i] }
      combine (l, r) { A[i, m] = l.A[i, m] + r.A[i, m]; B[i, m] = l.B[m, i] + r.B[i, m]; C[i, m] = l.C[i, m] }
      associative: no
    }""")
    assert dict(linearise(agg.leaf).results) == {"A": "A", "B": "B", "C": "A"}
    for function in ("lift", "combine"):
        compare(*call(agg, function, torch.float64))


def test_three_address_code_has_one_operation_a_step() -> None:
    agg = spec(GATED)
    assert isinstance(agg.combine, Block)
    for step in linearise(agg.combine, named=every_op).steps:
        assert isinstance(step.value, Op)
        assert all(isinstance(a, Ref) for a in step.value.args)


def test_names_of_the_printed_code_are_free_for_users() -> None:
    names = ["x", "p", "l", "r", "s", "n", "prev", "like", "t", "zip", "_max"]
    lets = " ".join(f"{n} = tanh(f.{n} + g.{n}) ;" for n in names)
    doubled = " ".join(f"{n} = {n} * {n} + max({n}, {n} - 1) ;" for n in names)
    agg = spec(
        f"aggregator names {{ input u state {', '.join(f'{n} = 0' for n in names)} lift {{ "
        f"{' '.join(f'{n} = u * {k} ;' for k, n in enumerate(names))} }} combine (f, g) {{ {lets} {doubled} }} "
        "associative: no }"
    )
    for function in ("lift", "combine", "output"):
        compare(*call(agg, function, torch.float64))


@pytest.mark.parametrize(
    "value, text",
    [
        ("2", "2"),
        ("-3", "-3"),
        ("1/10", "0.1"),
        ("1/3", "1 / 3"),
        ("-1/3", "-1 / 3"),
        ("1/1000000", "1e-06"),
        ("1e30", "1e+30"),
    ],
)
def test_constants_are_exact(value: str, text: str) -> None:
    printed = number(Fraction(value))
    assert printed.text == text
    assert eval(printed.text) == float(Fraction(value))


def test_ints_in_real_operators_take_the_dtype_of_the_work() -> None:
    agg = spec(
        """aggregator ints {
      dim K
      input u[K], p[K] : int
      state h[K] = 0
      lift { h[i] = exp(p[i] - p[0]) + sqrt(i + p[i]) + p[i] / (1 + i) + logsigmoid(p[i] - i) * u[i] + (p[i] + 1) ^ -1 }
      combine (l, r) { h[i] = l.h[i] + r.h[i] }
      associative: yes
    }""".replace("dim K", "dim K = 3")
    )
    compare(*call(agg, "lift", torch.float64))


def test_helpers_do_not_collide_with_the_runtime_pasted_beside_them() -> None:
    assert not paste().defined & (HELPERS.keys() | {"lift", "combine", "advance", "recurrence", "output", "start"})


def test_numbers_never_divide_by_zero() -> None:
    agg = spec("""aggregator edge {
      dim K
      input u[K]
      state s = 0
      lift { s = sum[i] u[i] }
      combine (l, r) { s = l.s + r.s }
      output o = s * 0 + 1 / (K - 1), w = s + log(K - 1), y = s + sqrt(1 - K)
      associative: yes
    }""")
    scope = load(print_functions(agg, ("s",)))
    s = torch.tensor(2.0, dtype=torch.float64)
    out = scope["output"](SimpleNamespace(s=s), None, SimpleNamespace(u=s[None]), None, SimpleNamespace(K=1))
    assert out["o"].item() == math.inf
    assert out["w"].item() == -math.inf
    assert out["y"].item() == 2.0


def test_constants_beyond_the_floats_are_infinite() -> None:
    assert number(Fraction(10) ** 400).text == "math.inf"
    assert number(-(Fraction(10) ** 400)).text == "-math.inf"


def test_deep_expressions() -> None:
    value = "u"
    for n in range(60):
        value = f"tanh({value} + {n})" if n % 2 else f"(u - {value}) * 0.5"
    agg = spec(f"""aggregator deep {{
      input u
      state h = 0
      lift {{ h = {value} }}
      combine (l, r) {{ h = l.h + r.h }}
      associative: yes
    }}""")
    compare(*call(agg, "lift", torch.float64))


def test_long_lines_are_split() -> None:
    product = " * ".join(f"(k[i] + {n} * v[j])" for n in range(2, 30))
    agg = spec(f"""aggregator long {{
      dim K, V
      input k[K], v[V]
      state S[K, V] = 0
      lift {{ S[i, j] = {product} }}
      combine (l, r) {{ S[i, j] = l.S[i, j] + r.S[i, j] }}
      associative: yes
    }}""")
    assert max(len(line) for line in print_functions(agg, ("S",)).splitlines()) <= 120
    compare(*call(agg, "lift", torch.float64))


def test_text_does_not_depend_on_the_hash_seed() -> None:
    script = (
        "import sys, pathlib\n"
        "from psmc.codegen.torch_code import print_functions\n"
        "from psmc.frontend.psm import parse, read\n"
        "from psmc.frontend.resolve import resolve\n"
        "for path in sorted(pathlib.Path('examples').glob('*.psm')):\n"
        "    for agg in resolve(parse(read(path))):\n"
        "        print(print_functions(agg, tuple(c.name for c in agg.state)))\n"
        "assert 'torch' not in sys.modules\n"
    )
    texts = []
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", script]
        texts.append(subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout)
    assert texts[0] == texts[1] and "def combine" in texts[0]


def test_torch_compile_takes_the_functions_whole() -> None:
    for name in ("softmax_average", "deltanet", "s5_word"):
        (agg,) = resolve(parse(read(ROOT / "examples" / f"{name}.psm")))
        scope = load(print_functions(agg, tuple(c.name for c in agg.state)))
        sizes = SimpleNamespace(**{d.name: d.size or 3 for d in agg.dims})
        parts = [Declared(c.name, c.dims, c.kind, c.interval) for c in agg.state]

        def side(seed: int, parts: list[Declared] = parts, sizes: SimpleNamespace = sizes) -> SimpleNamespace:
            return SimpleNamespace(**{t.name: sample(t, (2,), vars(sizes), torch.float32, seed) for t in parts})

        left, right = side(1), side(2)
        compiled = torch.compile(scope["combine"], fullgraph=True, backend="eager")
        expected = scope["combine"](left, right, SimpleNamespace(), sizes)
        for key, value in compiled(left, right, SimpleNamespace(), sizes).items():
            torch.testing.assert_close(value, expected[key])
