"""Prefix-scannable models: the tree in training, the counter in decoding, one meaning; any modules, any length."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from psmc.diagnostics import PsmcError
from psmc.nn import (
    Attention,
    LanguageModel,
    PrefixScannable,
    TransformerPSM,
    generate,
    join,
    parameters_of,
    select,
    sizes_for,
    state_bytes,
    width_for,
)
from psmc.nn.state import scoped

DOUBLE = torch.float64
NEAR = dict(rtol=1e-12, atol=1e-12)


class Counted(nn.Module):
    """A combine that is not associative, of one vector; knows how often it was used."""

    def __init__(self, width=3):
        super().__init__()
        self.map = nn.Linear(2 * width, width, dtype=DOUBLE)
        self.pairs = self.calls = 0

    def forward(self, left, right):
        self.pairs, self.calls = self.pairs + len(left), self.calls + 1
        return torch.tanh(self.map(torch.cat([left, right], -1)))


class Head(nn.Module):
    """inf: causal within the chunk, and different with and without a prefix."""

    def __init__(self, width=3):
        super().__init__()
        self.map = nn.Linear(width, width, dtype=DOUBLE)

    def forward(self, prefix, chunk):
        before = 0 if prefix is None else self.map(prefix).unsqueeze(1)
        return chunk.cumsum(1).sin() + before


def encode(chunk):
    return (chunk * torch.arange(1, chunk.shape[1] + 1, dtype=DOUBLE)[:, None]).sum(1)


def fold(combine, leaves, plan):
    """Before each chunk and after the last one, None for nothing: by recursion, one combine at a time."""
    if plan == "left":
        found = [None]
        for x in leaves:
            found.append(x if found[-1] is None else combine(found[-1], x))
        return found

    def tree(lo, hi):
        return leaves[lo] if hi - lo == 1 else combine(tree(lo, (lo + hi) // 2), tree((lo + hi) // 2, hi))

    def prefix(n):
        if n == 0:
            return None
        size = n & -n
        return tree(n - size, n) if size == n else combine(prefix(n - size), tree(n - size, n))

    return [prefix(n) for n in range(len(leaves) + 1)]


def naive(model, tokens):
    """Definition 3.1, chunk by chunk."""
    c = model.chunk_size
    chunks = tokens.split(c, 1)
    leaves = [model.enc(x) for x in chunks if x.shape[1] == c]
    prefixes = fold(model.agg, leaves, model.plan)
    first = None if not model._names else model.identity_element.expand(len(tokens), -1)
    return torch.cat([model.inf(first if i == 0 else prefixes[i], x) for i, x in enumerate(chunks)], 1)


def made(chunk=1, plan="tree", identity=None, **more):
    torch.manual_seed(0)
    return PrefixScannable(encode, Counted(), Head(), chunk, plan=plan, identity=identity, **more)


def decode(model, tokens, in_place=False):
    state, out = model.init_state(len(tokens)), []
    for t in range(tokens.shape[1]):
        y, state = model.step(tokens[:, t], state, in_place=in_place)
        out.append(y)
    return torch.stack(out, 1), state


def test_tree_is_the_counter_at_every_length():
    """One decoding of 257 tokens against the parallel forward of each of its prefixes, and the fewest combines."""
    model = made(identity=nn.Parameter(torch.randn(3, dtype=DOUBLE)))
    tokens = torch.randn(1, 258, 3, dtype=DOUBLE)
    with torch.no_grad():
        steps, state = decode(model, tokens)
        pushed = model.agg.pairs
        assert pushed == sum((n & -n).bit_length() - 1 + (n & (n - 1) != 0) for n in range(1, 259)) < 2 * 258
        for n in range(1, 259):
            model.agg.pairs = model.agg.calls = 0
            torch.testing.assert_close(model(tokens[:, :n]), steps[:, :n], **NEAR)
            m = (n - 1).bit_length()
            assert model.agg.pairs == 2 * (n - 1) - (n - 1).bit_count() - (n - 1).bit_length()
            if n == 1 << m and m:
                assert model.agg.pairs == 2 * (n - 1 - m) and model.agg.calls == 2 * (m - 1)
    assert state["position"].tolist() == [258]


@pytest.mark.parametrize("plan", ["tree", "counter", "left"])
@pytest.mark.parametrize("identity", [None, "learned"])
@pytest.mark.parametrize("chunk", [1, 4])
def test_definition_and_gradients(plan, identity, chunk):
    start = nn.Parameter(torch.randn(3, dtype=DOUBLE)) if identity else None
    model = made(chunk, plan, start)
    for length in (1, 3, 4, 5, 8, 13, 22, 29):
        tokens = torch.randn(2, length, 3, dtype=DOUBLE, requires_grad=True)
        weight = torch.randn(2, length, 3, dtype=DOUBLE)
        wanted = [tokens, *model.parameters()]
        found = []
        ways = (naive, lambda m, x: m(x), lambda m, x: m.prefill(x)[0], lambda m, x: decode(m, x)[0])
        for run in ways:
            out = run(model, tokens)
            grads = torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True)
            found.append([out, *(torch.zeros_like(w) if g is None else g for w, g in zip(wanted, grads, strict=True))])
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                torch.testing.assert_close(b, a, **NEAR)


def test_elements_may_be_dicts():
    class Pairwise(nn.Module):
        def forward(self, left, right):
            return {"a": left["a"] + 2 * right["a"], "b": torch.sin(left["b"] * right["a"][:, None] + right["b"])}

    def enc(chunk):
        return {"a": chunk.sum((1, 2)), "b": chunk.sum(1)}

    def inf(prefix, chunk):
        return chunk.cumsum(1) + (0 if prefix is None else (prefix["b"] + prefix["a"][:, None]).unsqueeze(1))

    model = PrefixScannable(enc, Pairwise(), inf, 2)
    tokens = torch.randn(2, 15, 3, dtype=DOUBLE)
    torch.testing.assert_close(decode(model, tokens)[0], model(tokens), **NEAR)
    torch.testing.assert_close(decode(model, tokens, in_place=True)[0], model(tokens), **NEAR)


KINDS = {
    "learned identity": {},
    "no identity": {"identity": "skip"},
    "levels": {"levels": True},
    "levels, no identity": {"levels": True, "identity": "skip"},
    "projection": {"keep": "project"},
    "causal Agg": {"causal_agg": True, "positions": "learned"},
    "left": {"plan": "left"},
    "counter": {"plan": "counter", "identity": "skip"},
}


def psm(chunk=4, **options):
    torch.manual_seed(1)
    model = TransformerPSM(11, 16, chunk, heads=2, agg_layers=2, inf_layers=2, **options).double()
    with torch.no_grad():
        for p in model.parameters():  # nothing is zero or one by its initial value
            p.add_(0.1 * torch.randn_like(p))
    return model


def draw(*shape):
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_transformer_psm(kind, chunk):
    """Training, prefilling and decoding agree for all options; later tokens never change earlier outputs."""
    model = psm(chunk, **KINDS[kind])
    tokens = draw(2, 23)
    with torch.no_grad():
        whole = model(tokens)
        torch.testing.assert_close(decode(model, tokens)[0], whole, **NEAR)
        torch.testing.assert_close(decode(model, tokens, in_place=True)[0], whole, **NEAR)
        for cut in (1, 3, 4, 12, 13, 22):
            first, state = model.prefill(tokens[:, :cut])
            torch.testing.assert_close(first, whole[:, :cut], **NEAR)
            for t in range(cut, 23):
                y, state = model.step(tokens[:, t], state)
                torch.testing.assert_close(y, whole[:, t], **NEAR)
        for at in (0, 5, 12, 17, 22):
            changed = tokens.clone()
            changed[:, at] = (changed[:, at] + 1) % 11
            other = model(changed)
            assert torch.equal(other[:, :at], whole[:, :at])
            assert (other[:, at : at + 5] != whole[:, at : at + 5]).any(-1).all()  # the next ones do change


@pytest.mark.parametrize("options", [{}, {"identity": "skip"}, {"plan": "left"}, {"levels": True}])
def test_streams_at_different_lengths(options, tmp_path):
    """A batch of streams that joined wherever they were, saved and restored on the way, is each stream alone."""
    model = psm(4, **options)
    tokens = draw(6, 60)
    lengths = [0, 1, 4, 6, 11, 30]
    with torch.no_grad():
        whole = model(tokens)
        alone = [model.prefill(tokens[b : b + 1, :n])[1] if n else model.init_state(1) for b, n in enumerate(lengths)]
        state = join(alone)
        for t in range(21):
            token = torch.stack([tokens[b, n + t] for b, n in enumerate(lengths)])
            y, state = model.step(token, state, in_place=t % 3 == 0)
            for b, n in enumerate(lengths):
                torch.testing.assert_close(y[b], whole[b, n + t], **NEAR)
            if t == 9:
                torch.save(state, tmp_path / "state.pt")
                state = torch.load(tmp_path / "state.pt", weights_only=True)
        token = torch.stack([tokens[b, n + 21] for b, n in enumerate(lengths)])[[4, 1]]
        y, _ = model.step(token, select(state, [4, 1]))
        torch.testing.assert_close(y[0], whole[4, 11 + 21], **NEAR)
        torch.testing.assert_close(y[1], whole[1, 1 + 21], **NEAR)


def test_a_step_leaves_its_state_alone():
    model = psm(3)
    tokens = draw(2, 14)
    with torch.no_grad():
        _, state = model.prefill(tokens[:, :11])
        before = {k: x.clone() for k, x in state.items()}
        first, _ = model.step(tokens[:, 11], state)
        again, _ = model.step(tokens[:, 11], state)
    assert torch.equal(first, again) and all(torch.equal(before[k], x) for k, x in state.items())


def test_what_decoding_holds():
    """At most 2 ceil(log2(n + 1)) elements for n chunks; less than two combines a chunk on average."""
    model = made(2)
    calls, state = [], model.init_state(1)
    with torch.no_grad():
        for n, token in enumerate(torch.randn(1, 600, 3, dtype=DOUBLE).unbind(1), 1):
            model.agg.pairs = 0
            _, state = model.step(token, state)
            calls.append(model.agg.pairs)
            held = [x for k, x in scoped(state, "counter").items() if k != "position"]
            assert len(held) <= 2 * math.ceil(math.log2(n // 2 + 1))
            assert state_bytes({str(i): x for i, x in enumerate(held)}) <= 8 * 3 * 2 * (n // 2).bit_count()
    assert sum(calls) < 2 * 300 and not any(calls[::2])


def test_a_prefilled_state_holds_no_more():
    """Not the storage of what it was computed from: as many bytes as after decoding the same tokens."""
    model = made(2)
    tokens = torch.randn(1, 2 * 89, 3, dtype=DOUBLE)
    with torch.no_grad():
        prefilled, decoded = model.prefill(tokens)[1], decode(model, tokens)[1]
    assert state_bytes(prefilled) == state_bytes(decoded)
    stored = {x.data_ptr(): x.untyped_storage().nbytes() for x in prefilled.values()}
    assert sum(stored.values()) == state_bytes(prefilled)


def test_recomputing_gives_the_same_gradients():
    tokens = draw(3, 41)
    found = []
    for recompute in (False, True):
        model = psm(4, recompute=recompute, levels=True)
        model(tokens).square().mean().backward()
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **NEAR)


@pytest.mark.parametrize("options", [{}, {"identity": "skip", "levels": True}, {"recompute": True}])
def test_compiles_without_breaks(options):
    model = psm(4, **options)
    tokens = draw(2, 27)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens), model(tokens), **NEAR)


MODELS = {
    "psm": lambda: psm(4),
    "attention": lambda: LanguageModel(11, 16, 2, lambda d: Attention(d, 2)).double(),
}


@pytest.mark.parametrize("name", MODELS)
def test_generate(name):
    torch.manual_seed(2)
    model = MODELS[name]()
    prompt = draw(3, 5)
    greedy = generate(model, prompt, 40, temperature=0)
    seen = prompt
    with torch.no_grad():
        for _ in range(40):
            seen = torch.cat([seen, model(seen)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(greedy, seen[:, 5:])
    drawn = generate(model, prompt, 30, temperature=0.7, seed=3)
    assert torch.equal(drawn, generate(model, prompt, 30, temperature=0.7, seed=3))
    assert not torch.equal(drawn, generate(model, prompt, 30, temperature=0.7, seed=4))
    assert torch.equal(generate(model, prompt, 30, temperature=2.0, top_k=1), greedy[:, :30])
    # In two parts: the state goes on, as it was
    first, state = generate(model, prompt, 12, temperature=0, return_state=True)
    kept = {k: x.clone() for k, x in state.items()}
    model.step(first[:, -1], model.init_state(3))  # another stream in between
    rest = generate(model, greedy[:, 12:13], 27, temperature=0, state=state)
    assert torch.equal(rest, greedy[:, 13:]) and all(torch.equal(kept[k], x) for k, x in state.items())
    assert generate(model, prompt, 0).shape == (3, 0)


def test_top_k_draws_only_those():
    from psmc.nn.sample import choose

    logits = torch.arange(10.0).repeat(500, 1)
    drawn = choose(logits, 5.0, 3, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {7, 8, 9}


def test_attention_streams_and_room():
    torch.manual_seed(0)
    model = LanguageModel(11, 16, 2, lambda d: Attention(d, 2)).double()
    tokens = draw(3, 90)
    with torch.no_grad():
        whole = model(tokens)
        torch.testing.assert_close(decode(model, tokens, in_place=True)[0], whole, **NEAR)
        state = join([model.prefill(tokens[b : b + 1, :n])[1] for b, n in enumerate((1, 33, 40))])
        for t in range(40):
            y, state = model.step(torch.stack([tokens[b, n + t] for b, n in enumerate((1, 33, 40))]), state)
            for b, n in enumerate((1, 33, 40)):
                torch.testing.assert_close(y[b], whole[b, n + t], **NEAR)


def test_width_for():
    def make(width):
        return TransformerPSM(64, width, 8, heads=4, agg_layers=1, inf_layers=2)

    width = width_for(300_000, make, 16)
    sizes = [abs(parameters_of(make(w)) - 300_000) for w in (width - 16, width, width + 16)]
    assert width % 16 == 0 and sizes[1] == min(sizes)
    assert width_for(1, make, 16) == 16
    for params in (200_000, 1_000_000, 2_000_000):  # MLPs make up for what widths of 64 cannot

        def wide(width, expand):
            return TransformerPSM(64, width, 8, heads=4, agg_layers=1, inf_layers=2, expand=expand)

        width, expand = sizes_for(params, wide)
        assert width % 64 == 0 and abs(parameters_of(wide(width, expand)) / params - 1) < 0.02


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("PSM651", lambda: Attention(16, 3)),
        ("PSM651", lambda: psm(4, positions="none")),
        ("PSM652", lambda: made(plan="tre")),
        ("PSM652", lambda: made(0)),
        ("PSM652", lambda: psm(4, keep="left")),
        ("PSM652", lambda: psm(4, identity="zero")),
        ("PSM652", lambda: psm(4)(draw(2, 0))),
        ("PSM652", lambda: TransformerPSM(0, 16, 4, heads=2)),
        ("PSM653", lambda: generate(psm(4), torch.zeros(3, dtype=torch.int64), 4)),
        ("PSM653", lambda: generate(psm(4), draw(1, 3), 4, temperature=-1.0)),
        ("PSM653", lambda: generate(psm(4), draw(1, 3), 4, top_k=0)),
    ],
)
def test_mistakes(code, wrong):
    with pytest.raises(PsmcError) as caught:
        wrong()
    assert caught.value.diagnostics[0].code == code


def test_drawings_are_what_runs():
    """Every combine of the counter is drawn in the tree, and the other way round."""
    import re

    from psmc.nn.draw import draw_counter, draw_tree

    for n in (2, 8, 13, 32):
        tree, counter = draw_tree(n), draw_counter(n - 1)
        combines = int(re.findall(r"(\d+) combines in \d+ calls", tree)[0])
        assert combines == tree.count("|") == counter.count("∘")
        cell = max(3, len(str(n)) + 2)
        drawn = set()
        for line in tree.splitlines():
            for found in re.finditer(r"\[(=+)\|(-+)\]", line[12:]):
                lo, middle, hi = found.start() // cell, (found.start(2) - 1) // cell, found.end() // cell
                drawn.add((lo, middle + 1, hi))
        said = set()
        for left, right in re.findall(r"([\d-]+) ∘ ([\d-]+)", counter):
            (a, *_), (b, *c) = left.split("-"), right.split("-")
            said.add((int(a), int(b), int((c or [b])[0]) + 1))
        assert drawn == said


def test_noise_is_for_training_only():
    model = psm(4, noise=0.1)
    tokens = draw(2, 20)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
