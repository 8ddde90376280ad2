"""The tree plan: the parallel tree, the binary counter and the definition agree, at the least number of combines."""

from __future__ import annotations

import math

import pytest
import torch

from psmc.runtime.kit_forest import tree_tokens
from psmc.runtime.kit_tree import counter_bytes, counter_prefix, counter_push, counter_start, tree_roots, tree_scan
from psmc.runtime.schedule import tree_schedule

DOUBLE = torch.float64


class Words:
    """Combines write down what they did: tensors hold the numbers of strings."""

    def __init__(self):
        self.texts, self.numbers, self.calls, self.batches = ["?"], {"?": 0}, 0, 0

    def number(self, text):
        if text not in self.numbers:
            self.numbers[text] = len(self.texts)
            self.texts.append(text)
        return self.numbers[text]

    def leaves(self, *names):
        return {"w": torch.tensor([[self.number(n) for n in row] for row in names], dtype=torch.int64)}

    def combine(self, l, r):  # noqa: E741
        self.calls += len(l["w"])
        self.batches += 1
        pairs = zip(l["w"].tolist(), r["w"].tolist(), strict=True)
        return {"w": torch.tensor([self.number(f"({self.texts[a]} {self.texts[b]})") for a, b in pairs])}

    def read(self, numbers):
        return [self.texts[i] for i in numbers.tolist()]


def tree(tokens):
    """A complete tree."""
    half = len(tokens) // 2
    return tokens[0] if len(tokens) == 1 else f"({tree(tokens[:half])} {tree(tokens[half:])})"


def definition(tokens):
    """The fold of the counter's roots, the largest and earliest first."""
    at, text = 0, None
    for k in reversed(range(len(tokens).bit_length())):
        if len(tokens) >> k & 1:
            root = tree(tokens[at : at + (1 << k)])
            text, at = root if text is None else f"({text} {root})", at + (1 << k)
    return "?" if text is None else text


def least(n):
    """Combines for all prefixes of n tokens: the trees, and the prefixes that are no tree."""
    return (n - n.bit_count()) + (n - n.bit_length())


NAMES = [str(i) for i in range(300)]
EXPECTED = [definition(NAMES[:n]) for n in range(258)]
NOTHING = {"w": torch.tensor(0)}


@pytest.mark.parametrize("n", range(1, 258))
def test_scan_is_the_definition(n):
    words = Words()
    leaves = words.leaves(NAMES[:n])
    prefix, counter = tree_scan(words.combine, leaves)
    assert words.read(prefix["w"][0]) == EXPECTED[1 : n + 1]
    assert words.calls == least(n)
    assert counter["position"].tolist() == [n]
    words.calls = words.batches = 0
    before, none = tree_scan(words.combine, leaves, empty=NOTHING, exclusive=True, keep=False)
    assert words.read(before["w"][0]) == EXPECTED[:n] and none is None
    m = n.bit_length() - 1
    if n == 1 << m and m:
        assert words.calls == 2 * (n - 1 - m) and words.batches == 2 * (m - 1)


def test_counter_is_the_definition():
    words = Words()
    counter = counter_start(1)
    for n, name in enumerate(NAMES[:257], 1):
        assert words.read(counter_prefix(counter, {"w": torch.zeros(1, 0)}, NOTHING)["w"].long()) == [EXPECTED[n - 1]]
        calls = words.calls
        prefix, counter = counter_push(words.combine, counter, {"w": words.leaves([name])["w"][0]})
        assert words.read(prefix["w"]) == [EXPECTED[n]]
        assert words.calls - calls == (n & -n).bit_length() - 1 + (n & (n - 1) != 0)
        assert words.calls < 2 * n
        assert len(counter) - 1 <= 2 * math.ceil(math.log2(n + 1))
        assert counter_bytes(counter) == 8 * 2 * n.bit_count()  # the largest tree is its own fold


@pytest.mark.parametrize("start", [0, 1, 2, 3, 5, 6, 7, 8, 11, 13, 15, 16, 31, 37, 64, 100])
def test_a_call_continues_the_tree(start):
    for length in (0, 1, 2, 3, 4, 7, 8, 13, 33, 100):
        words = Words()
        _, counter = tree_scan(words.combine, words.leaves(NAMES[:start], NAMES[:start]))
        words.calls = 0
        more = NAMES[start : start + length]
        prefix, after = tree_scan(words.combine, words.leaves(more, more), counter)
        expected = EXPECTED[start + 1 : start + length + 1]
        assert words.read(prefix["w"][0]) == words.read(prefix["w"][1]) == expected
        assert words.calls == 2 * (least(start + length) - least(start))
        whole, folded = tree_scan(words.combine, words.leaves(NAMES[: start + length]))
        for key, x in folded.items():
            assert torch.equal(after[key], x.expand_as(after[key]))
        assert set(after) == set(folded) and whole["w"].shape[1] == start + length
        before, _ = tree_scan(words.combine, words.leaves(more), _row(counter, 0), empty=NOTHING, exclusive=True)
        assert words.read(before["w"][0]) == EXPECTED[start : start + length]
        if length:
            pushed, _ = counter_push(words.combine, after, {"w": words.leaves(["x", "y"])["w"][0]})
            assert words.read(pushed["w"]) == [definition([*NAMES[: start + length], end]) for end in "xy"]


def _row(counter, b):
    return {key: x[b : b + 1] for key, x in counter.items()}


def test_streams_at_different_positions():
    """One batched push is what each stream alone would do, in as few combines and in one call a level."""
    words = Words()
    starts = [0, 1, 2, 3, 7, 7, 8, 12]
    leaves = words.leaves(["a"] * 8)
    valid = torch.tensor([[t < s for t in range(12)] for s in starts])
    named = words.leaves(*[[f"{b}.{t}" for t in range(12)] for b in range(8)])
    _, _, counter = tree_tokens(words.combine, named, NOTHING, valid=valid)
    assert counter["position"].tolist() == starts
    seen = [[f"{b}.{t}" for t in range(s)] for b, s in enumerate(starts)]
    for _ in range(20):
        positions = [len(s) for s in seen]
        words.calls = words.batches = 0
        prefix, counter = counter_push(words.combine, counter, {"w": leaves["w"][0]})
        for s in seen:
            s.append("a")
        assert words.read(prefix["w"]) == [definition(s) for s in seen]
        carries = [((p + 1) & -(p + 1)).bit_length() - 1 for p in positions]
        assert words.calls == sum(carries) + sum((p + 1) & p != 0 for p in positions)
        assert words.batches <= max(carries) + 1
        assert words.read(counter_prefix(counter, {"w": named["w"]}, NOTHING)["w"]) == [definition(s) for s in seen]
    prefix, _, after = tree_tokens(words.combine, words.leaves(*[["c", "d", "e"]] * 8), NOTHING, counter)
    for b, s in enumerate(seen):
        assert words.read(prefix["w"][b]) == [definition([*s, *"cde"[:n]]) for n in (1, 2, 3)]
    assert after["position"].tolist() == [len(s) + 3 for s in seen]


@pytest.mark.parametrize("seed", range(12))
def test_masks_restarts_and_packing(seed):
    generator = torch.Generator().manual_seed(seed)
    words = Words()
    packed = seed % 2 == 0
    batch, length = (1, 40) if packed else (3, 17)
    bounds = [0, 0, 5, 17, 17, 38] if packed else [b * length for b in range(batch + 1)]
    names = [[f"{b}.{t}" for t in range(length)] for b in range(batch)]
    valid = torch.rand(batch, length, generator=generator) < 0.7 if seed % 3 else None
    reset = torch.rand(batch, length, generator=generator) < 0.15 if seed % 4 > 1 else None
    count = len(bounds) - 1
    history = [[f"h{n}.{t}" for t in range((3 * n) % 8)] for n in range(count)]
    counter = counter_start(count)
    if seed % 5:
        pre = words.leaves(*[h + ["?"] * (8 - len(h)) for h in history])
        real = torch.tensor([[t < len(h) for t in range(8)] for h in history])
        counter = tree_tokens(words.combine, pre, NOTHING, valid=real)[2]
    else:
        history = [[] for _ in history]
    cu = torch.tensor(bounds) if packed else None
    prefix, before, after = tree_tokens(
        words.combine, words.leaves(*names), NOTHING, counter, valid=valid, reset=reset, cu_seqlens=cu, previous=True
    )
    flat = [name for row in names for name in row]
    found, earlier = words.read(prefix["w"].flatten()), words.read(before["w"].flatten())
    for n in range(count):
        seen = list(history[n])
        for t in range(bounds[n], bounds[n + 1]):
            if reset is not None and reset.flatten()[t]:
                seen = []
            assert earlier[t] == definition(seen)
            if valid is None or valid.flatten()[t]:
                seen.append(flat[t])
            assert found[t] == definition(seen)
        assert after["position"][n] == len(seen)
        folds = counter_prefix(after, {"w": torch.zeros(count, 0).long()}, NOTHING)
        assert words.read(folds["w"])[n] == definition(seen)
    assert found[bounds[-1] :] == ["?"] * (batch * length - bounds[-1])


class Mixer(torch.nn.Module):
    """A combine that is not associative, of a vector and a scalar, with weights."""

    def __init__(self):
        super().__init__()
        self.map = torch.nn.Linear(8, 4, dtype=DOUBLE)

    def forward(self, l, r):  # noqa: E741
        h = torch.tanh(self.map(torch.cat([l["h"], r["h"]], -1)))
        return {"h": h, "n": torch.sigmoid(l["n"]) * r["n"] + h[..., 0]}


def recursive(combine, leaves, n):
    """P(n) by its definition."""
    roots, at = [], 0
    for k in reversed(range(n.bit_length())):
        if n >> k & 1:
            level = [{name: x[:, t] for name, x in leaves.items()} for t in range(at, at + (1 << k))]
            while len(level) > 1:
                level = [combine(*pair) for pair in zip(level[::2], level[1::2], strict=True)]
            roots.append(level[0])
            at += 1 << k
    out = roots[0]
    for root in roots[1:]:
        out = combine(out, root)
    return out


@pytest.mark.parametrize("length", [1, 2, 3, 6, 8, 21])
@pytest.mark.parametrize("way", ["scan", "recompute", "exclusive", "split", "push", "packed"])
def test_gradients(length, way):
    torch.manual_seed(length)
    combine = Mixer()
    base = {"h": torch.randn(2, length, 2, 4, dtype=DOUBLE), "n": torch.randn(2, length, 2, dtype=DOUBLE)}
    empty = {"h": torch.full((4,), 0.5, dtype=DOUBLE), "n": torch.tensor(2.0, dtype=DOUBLE)}
    weights = torch.randn(2, length, 2, dtype=DOUBLE)

    def loss(prefix):
        return (weights * (prefix["h"].square().sum(-1) + prefix["n"])).sum()

    def run(kind):
        leaves = {k: v.clone().requires_grad_() for k, v in base.items()}
        if kind == "naive":
            rows = [recursive(combine, leaves, n) for n in range(1, length + 1)]
            if way == "exclusive":
                rows = [{k: e.expand_as(leaves[k][:, 0]) for k, e in empty.items()}, *rows[:-1]]
            prefix = {k: torch.stack([row[k] for row in rows], 1) for k in base}
        elif kind in ("scan", "recompute", "exclusive"):
            exclusive = kind == "exclusive"
            prefix, _ = tree_scan(
                combine, leaves, empty=empty, exclusive=exclusive, keep=not exclusive, recompute=kind == "recompute"
            )
        elif kind == "packed":
            cu = torch.tensor([0, length, 2 * length])
            flat = {k: x.flatten(0, 1).unsqueeze(0) for k, x in leaves.items()}
            prefix = tree_tokens(combine, flat, empty, cu_seqlens=cu)[0]
            prefix = {k: x[0].unflatten(0, (2, length)) for k, x in prefix.items()}
        else:
            counter, parts = counter_start(2), []
            for at in range(0, length, 1 if kind == "push" else 3):
                piece = {k: x[:, at : at + 3] for k, x in leaves.items()}
                if kind == "push":
                    part, counter = counter_push(combine, counter, {k: x[:, 0] for k, x in piece.items()})
                    part = {k: x.unsqueeze(1) for k, x in part.items()}
                else:
                    part, counter = tree_scan(combine, piece, counter)
                parts.append(part)
            prefix = {k: torch.cat([part[k] for part in parts], 1) for k in base}
        wanted = [*leaves.values(), *combine.parameters()]
        grads = torch.autograd.grad(loss(prefix) + 0 * leaves["n"].sum(), wanted, allow_unused=True)
        return prefix, [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, grads, strict=True)]

    (expected, gradients), (found, others) = run("naive"), run(way)
    for a, b in zip([*expected.values(), *gradients], [*found.values(), *others], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


def test_masked_leaves_are_never_read():
    combine = Mixer()
    x = {"h": torch.randn(2, 9, 4, dtype=DOUBLE), "n": torch.randn(2, 9, dtype=DOUBLE)}
    valid = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    x = {"h": torch.where(valid[..., None], x["h"], float("nan")), "n": torch.where(valid, x["n"], float("nan"))}
    leaves = {k: v.requires_grad_() for k, v in x.items()}
    empty = {"h": torch.zeros(4, dtype=DOUBLE), "n": torch.zeros((), dtype=DOUBLE)}
    prefix = tree_tokens(combine, leaves, empty, valid=valid)[0]
    grads = torch.autograd.grad(prefix["n"].sum() + prefix["h"].sum(), [*leaves.values(), *combine.parameters()])
    assert all(g.isfinite().all() for g in grads) and (grads[1][~valid] == 0).all()


def test_save_and_restore(tmp_path):
    combine = Mixer()
    leaves = {"h": torch.randn(2, 21, 4, dtype=DOUBLE), "n": torch.randn(2, 21, dtype=DOUBLE)}
    prefix, _ = tree_scan(combine, leaves)
    _, counter = tree_scan(combine, {k: x[:, :13] for k, x in leaves.items()})
    torch.save(counter, tmp_path / "counter.pt")
    counter = torch.load(tmp_path / "counter.pt", weights_only=True)
    for t in range(13, 21):
        found, counter = counter_push(combine, counter, {k: x[:, t] for k, x in leaves.items()})
        torch.testing.assert_close(found["h"], prefix["h"][:, t], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("start", [0, 5, 8])
def test_roots(start):
    """What the counter holds, level by level."""
    words = Words()
    counter = tree_scan(words.combine, words.leaves(NAMES[:start]))[1]
    levels = tree_roots(words.combine, words.leaves(NAMES[start:30]), counter, empty=NOTHING)
    for n in range(start + 1, 31):
        roots = [level["w"][0, n - start - 1].item() for level in levels]
        for k, root in enumerate(roots):
            stop = n >> k << k
            assert words.texts[root] == (tree(NAMES[stop - (1 << k) : stop]) if n >> k & 1 else "?")
    assert len(levels) == 5


@pytest.mark.parametrize(("length", "position"), [(1, 0), (8, 0), (13, 0), (16, 0), (5, 3), (9, 8)])
def test_schedule(length, position):
    schedule = tree_schedule(length, position)
    for level in schedule.levels:
        made = {out for *_, out in level}
        for left, right, out in level:
            assert not made & {left, right}
            assert schedule.spans[left][1] == schedule.spans[right][0]
            assert schedule.spans[out] == (schedule.spans[left][0], schedule.spans[right][1])
    expected = [(0, i) if i else None for i in range(position, position + length)]
    assert [schedule.spans[i] if i >= 0 else None for i in schedule.prefixes] == expected


def test_compiles_without_breaks():
    combine = Mixer()
    leaves = {"h": torch.randn(2, 11, 4, dtype=DOUBLE), "n": torch.randn(2, 11, dtype=DOUBLE)}
    compiled = torch.compile(lambda x: tree_scan(combine, x)[0], fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(leaves), tree_scan(combine, leaves)[0])


def test_causal_bitwise():
    combine = Mixer()
    leaves = {"h": torch.randn(1, 50, 4, dtype=DOUBLE), "n": torch.randn(1, 50, dtype=DOUBLE)}
    before, _ = tree_scan(combine, leaves)
    leaves["h"] = leaves["h"].clone()
    leaves["h"][:, 31] += 1
    after, _ = tree_scan(combine, leaves)
    assert torch.equal(before["h"][:, :31], after["h"][:, :31])
    assert not torch.equal(before["h"][:, 31], after["h"][:, 31])


def test_positions_must_agree_and_nothing_has_no_prefix():
    counter = {"position": torch.tensor([0, 1]), "w.root.0": torch.zeros(2), "w.fold.0": torch.zeros(2)}
    with pytest.raises(ValueError, match="different positions"):
        tree_scan(lambda first, _: first, {"w": torch.zeros(2, 3)}, counter)
    with pytest.raises(ValueError, match="pass `empty`"):
        tree_scan(lambda first, _: first, {"w": torch.zeros(2, 3)}, exclusive=True)
