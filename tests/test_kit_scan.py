"""The PyTorch scans against a plain left fold, token by token and sequence by sequence."""

from __future__ import annotations

import itertools
from typing import ClassVar

import pytest
import torch

from psmc.runtime.kit_layer import SEGMENT_BYTES, scan_tokens
from psmc.runtime.kit_scan import blocked_scan, sequential_scan

DOUBLE = torch.float64
LENGTHS = (0, 1, 2, 3, 5, 17, 65)


class Gated:
    """S = r.a S + r.S on S[K, V], decay a[K]; a is not live. Lanes [2]; one param scales the readout."""

    live = ("S",)
    lanes = (2,)

    @staticmethod
    def inputs(batch, length):
        return {
            "k": torch.randn(batch, length, 2, 3, dtype=DOUBLE),
            "v": torch.randn(batch, length, 2, 4, dtype=DOUBLE),
            "g": torch.randn(batch, length, 2, 3, dtype=DOUBLE),
            "q": torch.randn(batch, length, 2, 3, dtype=DOUBLE),
        }

    @staticmethod
    def lift(x):
        return {"a": torch.sigmoid(x["g"]), "S": x["k"][..., None] * x["v"][..., None, :]}

    @staticmethod
    def advance(l, r):  # noqa: E741
        return {"S": r["a"][..., None] * l["S"] + r["S"]}

    @classmethod
    def combine(cls, l, r):  # noqa: E741
        return {"a": l["a"] * r["a"], **cls.advance(l, r)}

    @staticmethod
    def output(s, previous, x):
        return {"o": (x["q"][..., None] * (s["S"] + 0.5 * previous["S"])).sum(-2)}

    empty: ClassVar = {"S": torch.zeros(3, 4, dtype=DOUBLE)}

    @staticmethod
    def initial(rows):
        return {"S": torch.randn(rows, 2, 3, 4, dtype=DOUBLE)}


class LogSum:
    """Streaming softmax: the identity (-inf, 0, 0) combined with itself is NaN, so nothing may combine it."""

    live = ("m", "u", "w")
    lanes = (3,)

    @staticmethod
    def inputs(batch, length):
        return {"s": torch.randn(batch, length, 3, dtype=DOUBLE), "x": torch.randn(batch, length, 3, dtype=DOUBLE)}

    @staticmethod
    def lift(x):
        return {"m": x["s"], "u": torch.ones((), dtype=DOUBLE).expand_as(x["s"]), "w": x["x"]}

    @staticmethod
    def combine(l, r):  # noqa: E741
        m = torch.maximum(l["m"], r["m"])
        p, q = torch.exp(l["m"] - m), torch.exp(r["m"] - m)
        return {"m": m, "u": l["u"] * p + r["u"] * q, "w": l["w"] * p + r["w"] * q}

    advance = combine

    @staticmethod
    def output(s, previous, x):
        seen = previous["u"] > 0
        late = torch.where(seen, previous["w"] / torch.where(seen, previous["u"], 1.0), 0.0)
        some = s["u"] > 0
        return {"o": torch.where(some, s["w"] / torch.where(some, s["u"], 1.0), 0.0) + late * x["x"]}

    empty: ClassVar = {
        "m": torch.tensor(-float("inf"), dtype=DOUBLE),
        "u": torch.tensor(0.0, dtype=DOUBLE),
        "w": torch.tensor(0.0, dtype=DOUBLE),
    }

    @staticmethod
    def initial(rows):
        return {k: torch.randn(rows, 3, dtype=DOUBLE).abs() for k in ("m", "u", "w")}


class Complex:
    """h = a h + b over the complex numbers, no lanes."""

    live = ("h",)
    lanes = ()

    @staticmethod
    def inputs(batch, length):
        return {k: torch.randn(batch, length, dtype=torch.complex128) for k in ("a", "b")}

    @staticmethod
    def lift(x):
        return {"a": x["a"] / (1 + x["a"].abs()), "h": x["b"]}

    @staticmethod
    def advance(l, r):  # noqa: E741
        return {"h": r["a"] * l["h"] + r["h"]}

    @classmethod
    def combine(cls, l, r):  # noqa: E741
        return {"a": l["a"] * r["a"], **cls.advance(l, r)}

    @staticmethod
    def output(s, previous, x):
        return {"o": s["h"] * x["a"] + previous["h"].conj()}

    empty: ClassVar = {"h": torch.zeros((), dtype=torch.complex128)}

    @staticmethod
    def initial(rows):
        return {"h": torch.randn(rows, dtype=torch.complex128)}


SPECS = (Gated, LogSum, Complex)


def oracle(spec, x, initial=None, valid=None, reset=None, cu_seqlens=None, left=False):
    """Each sequence by a Python loop: outputs [B, T, ...], final states, prefixes. `left` combines the start in."""
    batch, length = next(iter(x.values())).shape[:2]
    if cu_seqlens is None:
        spans = [(b, 0, length, b) for b in range(batch)]
    else:
        spans = [(0, lo, hi, n) for n, (lo, hi) in enumerate(itertools.pairwise(cu_seqlens.tolist()))]
    outputs, finals = {}, []
    for b, lo, hi, row in spans:
        start = {k: e.expand(spec.lanes + e.shape) for k, e in spec.empty.items()}
        state = None if initial is None else {k: s[row] for k, s in initial.items()}
        for t in range(lo, hi):
            if reset is not None and reset[b, t]:
                state = None
            token = {k: v[b : b + 1, t : t + 1] for k, v in x.items()}
            before = start if state is None else state
            if valid is None or valid[b, t]:
                element = {k: v[0, 0] for k, v in spec.lift(token).items()}
                if left and state is None:
                    state = start
                state = {k: element[k] for k in spec.live} if state is None else spec.advance(state, element)
                batched = [{k: v[None, None] for k, v in s.items()} for s in (state, before)]
                outputs[b, t] = spec.output(*batched, token)["o"][0, 0]
        finals.append(start if state is None else state)
    one = {k: torch.ones(1, 1, *v.shape[2:], dtype=v.dtype) for k, v in x.items()}
    nothing = {k: e.expand(1, 1, *spec.lanes, *e.shape) for k, e in spec.empty.items()}
    zero = torch.zeros_like(spec.output(nothing, nothing, one)["o"][0, 0])
    rows = [[outputs.get((b, t), zero) for t in range(length)] for b in range(batch)]
    out = torch.stack([torch.stack(row) if row else zero.new_zeros(0, *zero.shape) for row in rows])
    return out, {k: torch.stack([f[k] for f in finals]) for k in spec.live}


def leaves(tensors):
    return {k: v.clone().requires_grad_() for k, v in (tensors or {}).items()}


def compare(spec, x, initial=None, options=None, **flags):
    """Outputs, final state and all gradients of `scan_tokens` and the oracle."""
    left = bool((options or {}).get("left"))
    results = []
    for run in ("oracle", "scan"):
        xs, s0 = leaves(x), leaves(initial) if initial else None
        if run == "oracle":
            out, final = oracle(spec, xs, s0, left=left, **flags)
        else:
            outs, final = scan_tokens(
                spec.lift, spec.combine, spec.advance, spec.output, xs, spec.empty, s0, previous=True,
                **flags, **(options or {}),
            )  # fmt: skip
            out = outs["o"]
        parts = [out, *(final[k] for k in spec.live)]
        torch.manual_seed(1)
        loss = sum((torch.where(p.abs() < 1e300, p, 0.0) * torch.randn_like(p)).abs().square().sum() for p in parts)
        wanted = [*xs.values(), *(s0 or {}).values()]
        grads = torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad else [None] * len(wanted)
        results.append((parts, [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, grads, strict=True)]))
    for expected, found in zip(*(p + g for p, g in results), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("length", LENGTHS)
def test_plain_and_initial(spec, length):
    torch.manual_seed(0)
    x = spec.inputs(2, length)
    compare(spec, x)
    compare(spec, x, spec.initial(2))
    compare(spec, x, spec.initial(2), {"segment": 16, "recompute": True})


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("length", (1, 5, 37))
def test_mask_and_reset(spec, length):
    torch.manual_seed(length)
    for density, with_initial in itertools.product((0.0, 0.5, 0.95), (False, True)):
        valid = torch.rand(3, length) < density
        reset = torch.rand(3, length) < 0.2
        initial = spec.initial(3) if with_initial else None
        poisoned = {k: torch.where(valid.reshape(3, length, *[1] * (v.dim() - 2)), v, float("nan"))
                    for k, v in spec.inputs(3, length).items()}  # fmt: skip
        compare(spec, poisoned, initial, valid=valid, reset=reset)
        compare(spec, poisoned, initial, {"segment": 7, "recompute": True}, valid=valid)
        compare(spec, spec.inputs(3, length), initial, reset=reset)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("bounds", ([0, 5, 5, 6, 40], [0, 0, 33], [0, 7, 7], [0, 0, 0], [0, 1, 2, 3, 4]))
def test_packed(spec, bounds):
    torch.manual_seed(len(bounds))
    cu, length, count = torch.tensor(bounds), bounds[-1], len(bounds) - 1
    x, valid, reset = spec.inputs(1, length), torch.rand(1, length) < 0.6, torch.rand(1, length) < 0.2
    for initial in (None, spec.initial(count)):
        compare(spec, x, initial, cu_seqlens=cu.int())
        compare(spec, x, initial, cu_seqlens=cu, valid=valid, reset=reset)
        compare(spec, x, initial, {"segment": 4, "recompute": True}, cu_seqlens=cu, valid=valid, reset=reset)


@pytest.mark.parametrize("spec", (Gated, Complex))
def test_left(spec):
    torch.manual_seed(3)
    valid, reset = torch.rand(2, 19) < 0.6, torch.rand(2, 19) < 0.2
    for initial in (None, spec.initial(2)):
        compare(spec, spec.inputs(2, 19), initial, {"left": True}, valid=valid, reset=reset)
        compare(spec, spec.inputs(2, 19), initial, {"left": True, "segment": 4})
    cu = torch.tensor([0, 4, 4, 19])
    for initial in (None, spec.initial(3)):
        compare(spec, spec.inputs(1, 19), initial, {"left": True, "segment": 8}, cu_seqlens=cu)
    assert sequential_scan(spec.advance, spec.lift(spec.inputs(2, 0)), spec.empty).prefix[spec.live[0]].shape[1] == 0


def test_left_recurrence():
    """A nonlinear recurrence of raw inputs: no element carries the state's name."""

    def step(s, x):
        return {"h": torch.tanh(s["h"] * x["a"] + x["b"])}

    x = {k: torch.randn(2, 6, 3, dtype=DOUBLE) for k in "ab"}
    empty, valid = {"h": torch.full((3,), 0.5, dtype=DOUBLE)}, torch.rand(2, 6) < 0.6
    out, final = scan_tokens(
        lambda x: x, step, step, lambda s, before, x: {"o": s["h"] - before["h"]}, x, empty,
        valid=valid, previous=True, left=True, segment=4,
    )  # fmt: skip
    for b in range(2):
        h = empty["h"]
        for t in range(6):
            new = step({"h": h}, {k: v[b, t] for k, v in x.items()})["h"] if valid[b, t] else h
            torch.testing.assert_close(out["o"][b, t], new - h)
            h = new
        torch.testing.assert_close(final["h"][b], h)
    assert sequential_scan(step, {k: v[:, :0] for k, v in x.items()}, empty).prefix["h"].shape == (2, 0, 3)


def test_integers():
    """Composition of permutations by gather: exact, no gradient, masked tokens hold indices out of range."""
    torch.manual_seed(5)
    perms = torch.stack([torch.randperm(5) for _ in range(2 * 90)]).view(2, 90, 5)
    valid = torch.rand(2, 90) < 0.7
    perms[~valid] = -7

    def combine(l, r):  # noqa: E741
        return {"p": l["p"].gather(-1, r["p"])}

    found = blocked_scan(combine, combine, {"p": perms}, {"p": torch.arange(5)}, valid=valid).prefix["p"]
    for b in range(2):
        state = torch.arange(5)
        for t in range(90):
            state = state[perms[b, t]] if valid[b, t] else state
            assert torch.equal(found[b, t], state)


def test_states_that_may_not_exist():
    """A carry row that holds nothing (the state of an empty sequence) must not be combined in."""
    x = LogSum.lift(LogSum.inputs(2, 9))
    carry = {k: e.expand(2, 3).clone() for k, e in LogSum.empty.items()}
    exists = torch.tensor([False, True])
    carry = {k: torch.where(exists[:, None], c.new_ones(()), c).requires_grad_() for k, c in carry.items()}
    scan = blocked_scan(LogSum.combine, LogSum.combine, x, LogSum.empty, carry=carry, exists=exists, previous=True)
    alone = blocked_scan(LogSum.combine, LogSum.combine, {k: v[:1] for k, v in x.items()}, LogSum.empty)
    torch.testing.assert_close(scan.prefix["w"][:1], alone.prefix["w"])
    (grad,) = torch.autograd.grad(scan.prefix["w"].sum(), [carry["m"]])
    assert grad[0].eq(0).all() and grad.isfinite().all() and grad[1].ne(0).any()
    assert scan.exists.all() and scan.previous["m"][0, 0].isneginf().all()


def test_params_survive_masks():
    """A param read by the combine gets a finite gradient although unselected lanes would divide by zero."""
    p = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)

    def combine(l, r):  # noqa: E741
        return {"x": l["x"] * r["x"] / (p * (l["x"] + r["x"]))}

    x = torch.rand(2, 40, dtype=DOUBLE) + 0.5
    valid, reset = torch.rand(2, 40) < 0.5, torch.rand(2, 40) < 0.3
    x = torch.where(valid, x, 0.0).requires_grad_()
    empty: ClassVar = {"x": torch.tensor(float("inf"), dtype=DOUBLE)}
    entry = torch.where(reset, -1, -2)
    scan = blocked_scan(combine, combine, {"x": x}, empty, valid=valid, entry=entry)
    out = scan.prefix["x"]
    grads = torch.autograd.grad(torch.where(out.isfinite(), out, 0.0).sum(), [p, x])
    assert all(g.isfinite().all() for g in grads) and grads[0] != 0


def test_causal_bitwise():
    torch.manual_seed(7)
    x = Gated.lift(Gated.inputs(1, 200))
    before = blocked_scan(Gated.combine, Gated.advance, x, Gated.empty).prefix["S"]
    for t in (1, 77, 199):
        changed = {k: v.clone() for k, v in x.items()}
        changed["a"][:, t] = 1e3
        after = blocked_scan(Gated.combine, Gated.advance, changed, Gated.empty).prefix["S"]
        assert torch.equal(before[:, :t], after[:, :t]) and not torch.equal(before[:, t:], after[:, t:])


def test_constant_results_and_views():
    """A component the rule makes constant comes back without leading axes; elements may be expanded views."""

    def combine(l, r):  # noqa: E741
        return {"one": torch.ones(4), "s": l["s"] + r["s"]}

    x = {"one": torch.ones(4).expand(2, 50, 4), "s": torch.ones(1).expand(2, 50, 1).transpose(0, 1).transpose(0, 1)}
    scan = blocked_scan(combine, combine, x, {"one": torch.zeros(4), "s": torch.zeros(1)})
    assert torch.equal(scan.prefix["s"][0, :, 0], torch.arange(1.0, 51)) and scan.prefix["one"].shape == (2, 50, 4)


def test_compiles_without_breaks():
    def run(x, valid):
        plain = scan_tokens(Gated.lift, Gated.combine, Gated.advance, Gated.output, x, Gated.empty, previous=True)
        return plain, blocked_scan(Gated.combine, Gated.advance, Gated.lift(x), Gated.empty, valid=valid).prefix

    x, valid = Gated.inputs(2, 9), torch.rand(2, 9) < 0.5
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, valid), run(x, valid))


def test_no_loop_over_time():
    """Steps grow with sqrt(T)."""
    calls = []

    def combine(l, r):  # noqa: E741
        calls.append(1)
        return {"s": l["s"] + r["s"]}

    for length in (4096, 65536):
        calls.clear()
        scan = blocked_scan(combine, combine, {"s": torch.ones(1, length)}, {"s": torch.zeros(())})
        assert scan.prefix["s"][0, -1] == length
        assert len(calls) < 4 * length**0.5


def test_large_elements_come_in_segments():
    """No more tokens are lifted at once than SEGMENT_BYTES hold, and backward lifts them again."""
    most = []

    def lift(x):
        most.append(x["k"].shape[1])
        return {"S": x["k"][..., None] * x["k"][..., None, :]}

    def combine(l, r):  # noqa: E741
        return {"S": l["S"] + r["S"]}

    k = torch.randn(1, 600, 256, requires_grad=True)
    out, final = scan_tokens(
        lift, combine, combine, lambda s, _, x: {"o": s["S"][..., 0]}, {"k": k}, {"S": torch.zeros(256, 256)},
        recompute=True,
    )  # fmt: skip
    assert max(most) * 256 * 256 * 4 <= SEGMENT_BYTES["cpu"] and sum(most) == 601
    out["o"].sum().backward()
    assert sum(most) == 1201
    torch.testing.assert_close(final["S"][0], k[0].T @ k[0], rtol=1e-4, atol=1e-3)
