"""Calls that do not fit a spec: an ArgumentError that names the spec, the argument and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract.data import Case, make
from contract.examples import ROOT, declared, example
from contract.texts import compiled_text
from torch import Tensor

import psmc

B, T, H = 2, 5, 4
Change = Callable[[dict[str, Any], dict[str, Any]], None]  # edits the tensors and the options of a good call


def good(agg: Any) -> dict[str, Any]:
    batch = make(declared(agg), Case(T, batch=B, lanes=(H,)))
    return {**batch.inputs, **batch.params}


def put(name: str, value: Any) -> Change:
    """Another tensor, or what a function makes of the good one."""

    def change(tensors: dict[str, Any], _: dict[str, Any]) -> None:
        tensors[name] = value(tensors[name]) if callable(value) else value

    return change


def option(name: str, value: Any) -> Change:
    def change(_: dict[str, Any], options: dict[str, Any]) -> None:
        options[name] = value

    return change


def state(**changes: Any) -> Change:
    """A state of gla with some entries changed; None removes one."""

    def change(_: dict[str, Any], options: dict[str, Any]) -> None:
        whole = {"S": torch.zeros(B, H, 3, 2, dtype=torch.float64), **changes}
        options["initial_state"] = {k: x for k, x in whole.items() if x is not None}

    return change


WRONG: dict[str, tuple[Change, str]] = {
    "missing": (lambda x, _: x.pop("v"), r"PSM601: gla\(q, k, v, g\): v missing"),
    "too many names": (put("w", torch.ones(1)), r"PSM601: gla\(q, k, v, g\) has no argument 'w'"),
    "None": (put("k", None), r"PSM601: gla\(q, k, v, g\): 'k' must be a tensor, not NoneType"),
    "a list": (put("k", [1.0]), "'k' must be a tensor, not list"),
    "too few axes": (
        put("q", torch.ones(B)),
        r"PSM602: gla: 'q' must be \[B, T, \*lanes, K\], but it is \[2\]: it has 1 axis",
    ),
    "no lanes": (
        put("k", lambda x: x[:, :, 0]),
        r"'k' must be \[B, T, \*lanes, K\].*\[2, 5, 3\]: it has 0 lane axes, while 'q' has 1",
    ),
    "a size": (put("k", lambda x: x[..., :2]), r"'k' must be .*\[2, 5, 4, 2\]: K is 2 here, but 3 in 'q'\.$"),
    "a size of 0": (put("v", lambda x: x[..., :0]), r"'v' must be .*: V is 0, but a dim has at least one position\.$"),
    "the time": (
        put("g", lambda x: x[:, :4]),
        r"'g' must be .*\[2, 4, 4, 3\]: its leading sizes are not those of 'q', \[2, 5\]\.$",
    ),
    "the batch": (put("v", lambda x: x[:1]), r"'v' must be .*its leading sizes are not those of 'q', \[2, 5\]"),
    "heads first": (
        put("v", lambda x: x.transpose(1, 2)),
        r"'v' must be .*Did you pass \[B, H, T, V\]\? Time comes before the lanes",
    ),
    "fewer heads first": (
        lambda x, _: x.update({k: y.transpose(1, 2)[:, : 4 if k == "q" else 2] for k, y in x.items()}),
        r"'k' must be .*Did you pass \[B, H, T, K\]\?",
    ),
    "lanes": (put("v", lambda x: x[:, :, :3]), r"'v' must be .*its lane axis of 3 does not divide 4, that of 'q'"),
    "int": (
        put("q", lambda x: x.long()),
        r"PSM602: gla: 'q' is torch.int64, but it is a tensor of real numbers: float32, bfloat16",
    ),
    "complex": (put("q", lambda x: x.to(torch.complex64)), "'q' is torch.complex64"),
    "bool": (put("q", lambda x: x > 0), "'q' is torch.bool"),
    "device": (put("v", lambda x: x.to("meta")), r"PSM602: gla: 'v' is on meta, 'q' on cpu"),
    "mask shape": (
        option("mask", torch.ones(B, T + 1)),
        r"PSM604: gla: 'mask' must be \[B, T\] = \[2, 5\], but it is \[2, 6\]",
    ),
    "mask dtype": (option("mask", torch.ones(B, T)), r"PSM604: gla: 'mask' is torch.float32; pass bools"),
    "mask list": (option("mask", [[True]]), r"'mask' must be a tensor \[B, T\], not list"),
    "reset device": (
        option("reset", torch.ones(B, T, device="meta") > 0),
        "PSM604: gla: 'reset' is on meta, the inputs on cpu",
    ),
    "packed batch": (
        option("cu_seqlens", torch.tensor([0, 5])),
        "PSM606: gla: 'cu_seqlens' packs the sequences in a batch of 1, but B is 2",
    ),
    "packed list": (option("cu_seqlens", [0, 5]), r"'cu_seqlens' must be a tensor of N \+ 1 offsets, not list"),
    "packed dtype": (
        option("cu_seqlens", torch.tensor([0.0, 5.0])),
        r"'cu_seqlens' must be N \+ 1 offsets, int32 or int64, but it is \[2\], torch.float32",
    ),
    "packed rank": (option("cu_seqlens", torch.tensor([[0, 5]])), r"'cu_seqlens' must be N \+ 1 offsets"),
    "state key": (state(S=None, s=torch.ones(1)), "PSM605: gla: a state holds S, but s was passed"),
    "state more": (state(a=torch.ones(1)), "PSM605: gla: a state holds S, but S, a was passed"),
    "state shape": (
        state(S=torch.zeros(B, H, 2, 2)),
        r"state 'S' must be \[rows, \*lanes, K, V\] = \[2, 4, 3, 2\], but it is \[2, 4, 2, 2\]",
    ),
    "state rows": (state(S=torch.zeros(3, H, 3, 2)), r"state 'S' must be .* = \[2, 4, 3, 2\]"),
    "state dtype": (state(S=torch.zeros(B, H, 3, 2) + 0j), "state 'S' is torch.complex64, but it holds torch.float64"),
    "state device": (state(S=torch.zeros(B, H, 3, 2, device="meta")), "state 'S' is on meta, the inputs on cpu"),
    "state entry": (state(S=1.0), "state 'S' must be a tensor, not float"),
    "state kind": (option("initial_state", torch.ones(1)), "a state is a dict of tensors, not Tensor"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit(what: str):
    agg = example("gla")
    tensors, options = good(agg), {}
    change, message = WRONG[what]
    agg(**tensors)  # it fits before the change
    change(tensors, options)
    with pytest.raises(agg.module.ArgumentError, match=message):
        agg(**tensors, **options)


def test_positions():
    agg = example("gla")
    tensors = list(good(agg).values())
    with pytest.raises(agg.module.ArgumentError, match=r"takes 4 tensors, but 5 were passed"):
        agg(*tensors, tensors[0])
    with pytest.raises(agg.module.ArgumentError, match=r"'q' was passed twice"):
        agg(*tensors, q=tensors[0])


def test_offsets():
    """On the CPU they can be read at no cost, and are."""
    agg = example("gla")
    tensors = {k: x[:1] for k, x in good(agg).items()}
    for wrong in ([1, 5], [0, 4], [0, 4, 3, 5], [-1, 0, 5], [0, 9]):
        with pytest.raises(agg.module.ArgumentError, match=r"PSM606: gla: 'cu_seqlens' must rise from 0 to T = 5"):
            agg(**tensors, cu_seqlens=torch.tensor(wrong))


def test_params():
    agg = example("mamba2")
    tensors = good(agg)
    agg(**{**tensors, "A": tensors["A"].reshape(-1)[0]})
    for wrong, message in (
        (torch.ones(H, 3), r"'A' must be \[\*lanes\], but it is \[4, 3\]: it has 2 lane axes, while 'x' has 1"),
        (torch.ones(3), r"'A' must be .*its lane axis of 3 does not divide 4"),
    ):
        with pytest.raises(agg.module.ArgumentError, match=message):
            agg(**{**tensors, "A": -wrong})


def test_lanes_of_several_axes():
    """Only the last lane axis is grouped; another is equal or 1."""
    agg = example("linear_recurrence")
    a, b = (torch.rand(1, 4, *lanes) for lanes in ((4, 6), (2, 6)))
    names = [s.name for s in agg.spec.inputs]
    with pytest.raises(agg.module.ArgumentError, match="its lane axis of 2 is neither 1 nor 4"):
        agg(**dict(zip(names, (a, b), strict=True)))
    assert agg(**dict(zip(names, (a, b[:, :, :1, :2]), strict=True))).shape == (1, 4, 4, 6)


def test_steps():
    agg = example("gla")
    token = {k: x[:, 0] for k, x in good(agg).items()}
    with pytest.raises(agg.module.ArgumentError, match=r"'k' must be \[B, \*lanes, K\], but it is \[3, 4, 3\]"):
        agg.step(None, **{**token, "k": torch.ones(3, 4, 3, dtype=torch.float64)})
    with pytest.raises(agg.module.ArgumentError, match=r"state 'S' must be"):
        agg.step({"S": torch.ones(B, H, 2, 3)}, **token)
    with pytest.raises(agg.module.ArgumentError, match=r"without T: did you pass \[B, T, ...\]\?$"):
        agg.step({"S": torch.ones(B, H, 3, 2)}, **good(agg))


def test_steps_in_place():
    agg = example("linear_recurrence")
    names = [s.name for s in agg.spec.inputs]
    token = {k: torch.rand(2, 3) for k in names}
    state = {"h": torch.zeros(4, 3)}
    for slots, message in (
        (torch.tensor([0.0, 1.0]), r"'slots' must be an int64 tensor \[B\] = \[2\], not torch.float32, \[2\]"),
        (torch.tensor([0, 1, 2]), r"'slots' must be an int64 tensor \[B\] = \[2\], not torch.int64, \[3\]"),
        ([0, 1], "'slots' must be an int64 tensor .*, not list"),
        (None, r"state 'h' must be \[rows, \*lanes\] = \[2, 3\], but it is \[4, 3\]"),
    ):
        with pytest.raises(agg.module.ArgumentError, match=message):
            agg.step_(state, slots=slots, **token)
    for wrong in ({"h": torch.zeros(4, 2)}, {"k": torch.zeros(4, 3)}, {}, None):
        with pytest.raises(agg.module.ArgumentError, match="PSM605: linear_recurrence"):
            agg.step_(wrong, slots=torch.tensor([0, 1]), **token)
    agg.step_(state, slots=torch.tensor([3, 1]), **token)


def test_init_state():
    agg = example("gla")
    with pytest.raises(agg.module.ArgumentError, match="PSM603: gla: init_state needs the size of V"):
        agg.init_state(1, K=2)
    with pytest.raises(agg.module.ArgumentError, match="PSM603: gla has no dim N; it has K, V"):
        agg.init_state(1, K=2, V=2, N=2)
    for args, options, message in (
        ((-1,), {}, "batch is a whole number from 0 on, not -1"),
        ((2.0,), {}, "batch is a whole number from 0 on, not 2.0"),
        ((1, 2.5), {}, "lanes is a whole number from 0 on, not 2.5"),
        ((1,), {"K": 0}, "K is a whole number from 1 on, not 0"),
        ((1,), {"dtype": torch.int32}, "dtype is a float dtype of torch, not torch.int32"),
    ):
        with pytest.raises(agg.module.ArgumentError, match=f"PSM603: gla: init_state: {message}"):
            agg.init_state(*args, **{"K": 2, "V": 2, **options})
    with pytest.raises(ValueError, match="init_state: N is 5 in the spec, not 6"):
        example("s5_word").init_state(1, N=6)


def test_a_rule_that_is_none():
    with pytest.raises(psmc.PsmcError, match=r"PSM292.*from Python, a function or module, not str"):
        psmc.load(ROOT / "examples" / "transformer_psm.psm", extern="blocks:join")


def test_a_rule_that_returns_something_else():
    x = torch.ones(2, 3, 3, 2)
    for rule, message in (
        (lambda l, r: None, "has to return a dict of s, not NoneType"),  # noqa: E741
        (lambda l, r: {"t": l["s"]}, "has to return a dict of s, not of t"),  # noqa: E741
        (lambda l, r: {"s": l["s"].sum()}, r"has to return 's' as \[2, 3, 2\], not \[\]"),  # noqa: E741
        (lambda l, r: {"s": 1.0}, r"has to return 's' as \[2, 3, 2\], not float"),  # noqa: E741
    ):
        agg = psmc.load(ROOT / "examples" / "transformer_psm.psm", extern=rule)
        with pytest.raises(agg.module.ArgumentError, match="PSM296: transformer_psm: the rule " + message):
            agg(x)


def test_states_of_taps_and_trees():
    agg = compiled_text("tap_lift")
    tensors = good(agg)
    _, after = agg(**tensors, return_state=True)
    assert sorted(after) == ["g_tail", "h", "x_tail"]
    with pytest.raises(
        agg.module.ArgumentError, match=r"state 'x_tail' must be \[rows, 3, \*lanes, K\] = \[2, 3, 4, 3\]"
    ):
        agg(**tensors, initial_state={**after, "x_tail": after["x_tail"][:, 1:]})
    with pytest.raises(agg.module.ArgumentError, match="a state holds h, x_tail, g_tail, but h was passed"):
        agg(**tensors, initial_state={"h": after["h"]})
    tree = compiled_text("tap_tree")
    tensors = good(tree)
    _, after = tree(**tensors, return_state=True)
    wrong: list[tuple[dict[str, Tensor], str]] = [
        ({}, "the state of a tree has 'position'"),
        ({**after, "position": after["position"][:1]}, r"'position', an int64 tensor \[2\]"),
        ({k: x for k, x in after.items() if k != "h.root.2"}, "a state holds position"),
        ({**after, "h.fold.0": after["h.fold.0"][:, :1]}, r"state 'h.fold.0' must be \[rows, \*lanes\] = \[2, 4\]"),
    ]
    for bad, message in wrong:
        with pytest.raises(tree.module.ArgumentError, match=message):
            tree(**tensors, initial_state=bad)
        with pytest.raises(tree.module.ArgumentError, match=message):
            tree.step(bad, **{k: x[:, 0] for k, x in tensors.items()})


def test_a_dim_that_nothing_tells():
    agg = compiled_text("bare")
    with pytest.raises(
        agg.module.ArgumentError, match=r"'c' is torch.float32, but it is a tensor of int numbers: int64"
    ):
        agg(torch.ones(1, 2), torch.ones(1, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_output_dtypes(dtype: torch.dtype):
    """The inputs' dtype, whatever that of the params; the state is fp32, or fp64 with the inputs."""
    agg = example("mamba2")
    tensors = {k: x.to(dtype) for k, x in good(agg).items()}
    tensors["A"] = tensors["A"].float()
    y, after = agg(**tensors, return_state=True)
    assert y.dtype == dtype
    assert after["h"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    token = {k: x if k in ("A", "skip") else x[:, 0] for k, x in tensors.items()}
    y, after = agg.step(after, **token)
    assert y.dtype == dtype and after["h"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
