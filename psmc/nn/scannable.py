"""Prefix-scannable models with any modules: Definition 3.1 of Yau et al. 2025, arXiv 2506.10918.

Tokens come in chunks C_0, C_1, ... of c. With x_i = enc(C_i) and s_i = x_0 ∘ ... ∘ x_{i-1} under ∘ = agg, which need
not be associative, outputs are y_i = inf(s_i, C_i). Parallel training takes the prefixes from the Blelloch tree
(`runtime.kit_tree`), decoding from the binary counter; both evaluate one parenthesisation. The identity is never
combined in: it is what `inf` is given before the first chunk, and without one `inf` is given None there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from psmc.diagnostics import fail
from psmc.nn.state import State, put_rows, scoped, select, within, write_token
from psmc.runtime.kit_tree import Node, counter_prefix, counter_push, counter_rows, counter_start, tree_scan

Element = Tensor | dict[str, Tensor]
ONE = "element"  # the name of an element that is one tensor
PLANS = ("tree", "counter", "left")


class PrefixScannable(nn.Module):
    """enc, agg, inf over chunks of `chunk_size` tokens; tokens are [B, T, ...], elements a tensor or a dict of tensors.

    enc(chunk [N, c, ...]) -> element [N, ...]       any c tokens alone
    agg(left, right) -> element                      batched over N; `left` is the earlier one
    inf(prefix, chunk [N, <= c, ...]) -> [N, <= c, ...]   output t may depend on the chunk up to t only
    identity    what inf reads before the first chunk: a tensor, a parameter, a dict of them, or None
    plan        tree: Blelloch, one batched agg a level; counter: the same prefixes, one chunk after the other;
                left: the left fold ((x_0 ∘ x_1) ∘ x_2) ..., another model unless agg is associative
    recompute   keep the operands of each level for backward, not what agg computes on the way

    An inf with `begin(prefix, seen) -> cache` and `step(token, cache, seen, bare) -> output` (see `transformer_psm`) is
    decoded with a cache; any other is run on its chunk so far at each token.
    """

    def __init__(
        self,
        enc: Callable[[Tensor], Element],
        agg: Callable[[Any, Any], Element],
        inf: Any,
        chunk_size: int,
        *,
        identity: Element | None = None,
        plan: str = "tree",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if plan not in PLANS:
            fail("PSM652", f"a plan is {', '.join(PLANS[:-1])} or {PLANS[-1]}, not {plan!r}.")
        if not isinstance(chunk_size, int) or chunk_size < 1:
            fail("PSM652", f"chunk_size is a number of tokens from 1 on, not {chunk_size!r}.")
        self.enc, self.agg, self.inf = enc, agg, inf
        self.chunk_size, self.plan, self.recompute = chunk_size, plan, recompute
        self._names = () if identity is None else tuple(_node(identity))
        for name, value in {} if identity is None else _node(identity).items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(f"identity_{name}", value)
            else:
                self.register_buffer(f"identity_{name}", value)

    # --- in parallel ------------------------------------------------------------------------------

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, ...] -> inf's outputs [B, T, ...]; the last chunk may be shorter."""
        batch, length = tokens.shape[:2]
        if length == 0:
            fail("PSM652", "there are no tokens: pass [B, T, ...] with T from 1 on.")
        prefixes = self._prefixes(self._leaves(tokens, (length - 1) // self.chunk_size), batch)
        return self._infer(prefixes, tokens)

    def prefill(self, tokens: Tensor) -> tuple[Tensor, State]:
        """As `forward`, and the state after these tokens, to go on from with `step`."""
        batch, length = tokens.shape[:2]
        c, full = self.chunk_size, length // self.chunk_size
        leaves = self._leaves(tokens, full)
        counter = counter_start(batch)
        rows: Node | None = None
        if leaves is not None and self.plan == "tree":
            rows, after = tree_scan(self._merge, leaves, recompute=self.recompute)
            assert after is not None
            counter = _alone(after)
        elif leaves is not None:
            each = []
            for i in range(full):
                row, counter = self._push(counter, {k: x[:, i] for k, x in leaves.items()})
                each.append(row)
            rows = {k: torch.stack([e[k] for e in each], 1) for k in each[0]}
        before = None if rows is None else {k: x[:, : (length - 1) // c] for k, x in rows.items()}
        outputs = self._infer(before if before and (length - 1) // c else None, tokens)
        state = {"position": torch.full((batch,), length, dtype=torch.int64)}
        chunk = tokens.new_zeros(batch, c, *tokens.shape[2:])
        chunk[:, : length - full * c] = tokens[:, full * c :]
        state["chunk"] = chunk
        state |= within({k: x for k, x in counter.items() if k != "position"}, "counter")
        if hasattr(self.inf, "begin"):
            last = None if rows is None else {k: x[:, -1] for k, x in rows.items()}
            state |= within(self._begin(last, tokens[:, full * c :]), "cache")
        return outputs, state

    def _leaves(self, tokens: Tensor, count: int) -> Node | None:
        """The elements of the first `count` chunks, [B, count, ...]."""
        if count == 0:
            return None
        chunks = tokens[:, : count * self.chunk_size].unflatten(1, (count, self.chunk_size))
        return {k: x.unflatten(0, (-1, count)) for k, x in _node(self.enc(chunks.flatten(0, 1))).items()}

    def _prefixes(self, leaves: Node | None, batch: int) -> Node | None:
        """Of chunks 1, 2, ...: what came before each, [B, count, ...]."""
        if leaves is None:
            return None
        if self.plan == "tree":
            return tree_scan(self._merge, leaves, keep=False, recompute=self.recompute)[0]
        counter, rows = counter_start(batch), []
        for i in range(next(iter(leaves.values())).shape[1]):
            row, counter = self._push(counter, {k: x[:, i] for k, x in leaves.items()})
            rows.append(row)
        return {k: torch.stack([row[k] for row in rows], 1) for k in leaves}

    def _infer(self, prefixes: Node | None, tokens: Tensor) -> Tensor:
        """One call for all chunks, but for a last one that is shorter and a first one without a prefix."""
        batch, length = tokens.shape[:2]
        c, parts = self.chunk_size, []
        known = 0 if prefixes is None else next(iter(prefixes.values())).shape[1]
        if self._names:
            first = self._identity(batch)
            rows = {k: x.unsqueeze(1) for k, x in first.items()}
            if prefixes is not None:
                rows = {k: torch.cat([x.to(prefixes[k].dtype), prefixes[k]], 1) for k, x in rows.items()}
        elif prefixes is None:
            return self._head(None, tokens)
        else:
            parts.append(self._head(None, tokens[:, :c]))
            rows = prefixes
        skipped = known + 1 - next(iter(rows.values())).shape[1]
        whole = length // c - skipped
        if whole:
            chunks = tokens[:, skipped * c : (skipped + whole) * c].unflatten(1, (whole, c)).flatten(0, 1)
            before = {k: x[:, :whole].flatten(0, 1) for k, x in rows.items()}
            parts.append(self._head(before, chunks).unflatten(0, (batch, whole)).flatten(1, 2))
        if length % c:
            parts.append(self._head({k: x[:, -1] for k, x in rows.items()}, tokens[:, length // c * c :]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _head(self, prefix: Node | None, chunk: Tensor) -> Tensor:
        out: Tensor = self.inf(None if prefix is None else _element(prefix), chunk)
        return out

    # --- token by token ---------------------------------------------------------------------------

    def init_state(self, batch: int) -> State:
        """Before any token. The rest of a state takes shape with the first token."""
        return {"position": torch.zeros(batch, dtype=torch.int64)}

    def step(self, token: Tensor, state: Mapping[str, Tensor], in_place: bool = False) -> tuple[Tensor, State]:
        """One token a stream, [B, ...]: (its output, the state after it). Streams may be anywhere in their sequences.

        in_place: the chunk and inf's cache are overwritten, not copied; for decoding without gradient.
        """
        positions: list[int] = state["position"].tolist()
        c = self.chunk_size
        seen = [p % c for p in positions]
        bare = [p < c and not self._names for p in positions]  # no prefix yet
        chunk = state.get("chunk", token.new_zeros(token.shape[0], c, *token.shape[1:]))
        chunk = chunk if in_place else chunk.clone()
        write_token(chunk, seen, token)
        counter = {"position": self._seen(state["position"]), **scoped(state, "counter")}
        cache = scoped(state, "cache")
        if hasattr(self.inf, "begin"):
            if cache and not in_place:
                cache = {k: x.clone() for k, x in cache.items()}
            new = [b for b, p in enumerate(positions) if p == 0]
            if new:
                fresh = self._begin(None, token[: len(new)].unsqueeze(1)[:, :0])
                cache = {k: put_rows(cache.get(k, x), new, x) for k, x in fresh.items()}
            out = self.inf.step(token, cache, seen, bare)
        else:
            out = self._again(chunk, counter, seen, bare)
        full = [b for b, s in enumerate(seen) if s == c - 1]
        if full:
            counter, cache = self._close(full, chunk, counter, cache, token, in_place)
        after = {"position": state["position"] + 1, "chunk": chunk, **within(cache, "cache")}
        return out, after | within({k: x for k, x in counter.items() if k != "position"}, "counter")

    def _close(
        self, rows: list[int], chunk: Tensor, counter: Node, cache: State, token: Tensor, in_place: bool
    ) -> tuple[Node, State]:
        """The chunks of some rows are full: they go into the counter, and inf begins anew on the new prefixes."""
        batch = chunk.shape[0]
        every = len(rows) == batch
        leaf = _node(self.enc(chunk if every else chunk[torch.tensor(rows, device=chunk.device)]))
        part = counter if every else counter_rows([(counter, b) for b in rows])
        prefix, pushed = self._push(part, leaf)
        if not every:
            place = {b: i for i, b in enumerate(rows)}
            pushed = counter_rows([(pushed, place[b]) if b in place else (counter, b) for b in range(batch)])
        if hasattr(self.inf, "begin"):
            fresh = self._begin(prefix, token[: len(rows)].unsqueeze(1)[:, :0])
            cache = {k: put_rows(x, rows, fresh[k], in_place and not every) for k, x in cache.items()}
        return pushed, cache

    def _again(self, chunk: Tensor, counter: Node, seen: list[int], bare: list[bool]) -> Tensor:
        """inf on each chunk so far; streams without a prefix apart."""
        outputs: Tensor | None = None
        for without in (True, False):
            rows = [b for b, flag in enumerate(bare) if flag == without]
            if not rows:
                continue
            index = torch.tensor(rows, device=chunk.device)
            part = chunk[index][:, : max(seen[b] for b in rows) + 1]
            found = self._head(None if without else self._prefix(counter_part(counter, rows), len(rows)), part)
            last = found[torch.arange(len(rows), device=found.device), [seen[b] for b in rows]]
            if outputs is None:
                outputs = last.new_zeros(len(seen), *last.shape[1:])
            outputs = outputs.index_copy(0, index, last)
        assert outputs is not None
        return outputs

    def _begin(self, prefix: Node | None, seen: Tensor) -> State:
        """inf's cache for a chunk of which `seen` [N, <= c, ...] is known, maybe nothing."""
        if prefix is None and self._names:
            prefix = self._identity(seen.shape[0])
        begun: State = self.inf.begin(None if prefix is None else _element(prefix), seen)
        return begun

    # --- elements ---------------------------------------------------------------------------------

    def _merge(self, left: Node, right: Node) -> Node:
        return _node(self.agg(_element(left), _element(right)))

    def _push(self, counter: Node, leaf: Node) -> tuple[Node, Node]:
        """(prefix, counter) after one more chunk."""
        if self.plan != "left":
            return counter_push(self._merge, counter, leaf)
        seen: list[int] = counter["position"].tolist()
        going = [b for b, p in enumerate(seen) if p]
        fold = leaf
        if going:
            index = {x.device: torch.tensor(going, device=x.device) for x in leaf.values()}
            left, right = (
                {k: x[index[x.device]] for k, x in side.items()}
                for side in ({k: counter[f"{k}.fold.0"] for k in leaf}, leaf)
            )
            fold = {k: put_rows(leaf[k], going, x) for k, x in self._merge(left, right).items()}
        return fold, {"position": torch.ones_like(counter["position"]), **{f"{k}.fold.0": x for k, x in fold.items()}}

    def _prefix(self, counter: Node, batch: int) -> Node:
        """What came before the chunk that is open, of streams that have one or an identity."""
        names = sorted({k.split(".")[0] for k in counter if k != "position"})
        if not names:
            return self._identity(batch)
        like = {n: next(x for k, x in counter.items() if k.startswith(f"{n}.")).unsqueeze(1) for n in names}
        empty = {k: x[0] for k, x in self._identity(batch).items()} if self._names else None
        return counter_prefix(counter, like, empty)

    def _seen(self, position: Tensor) -> Tensor:
        """A counter's position: chunks closed; the left fold is a counter that stays at one."""
        chunks = position // self.chunk_size
        return chunks.clamp(max=1) if self.plan == "left" else chunks

    def _identity(self, batch: int) -> Node:
        found = {n: getattr(self, f"identity_{n}") for n in self._names}
        return {n: x.unsqueeze(0).expand(batch, *x.shape) for n, x in found.items()}


def _alone(counter: Node) -> Node:
    """A counter that does not hold the memory of the trees it was cut from; the largest tree is its own fold."""
    kept = {k: x if k == "position" else x.clone() for k, x in counter.items()}
    levels = [int(k.rpartition(".")[2]) for k in kept if k != "position"]
    top = f".{max(levels, default=0)}"
    roots = {k: x for k, x in kept.items() if k.endswith(f".root{top}")}
    return kept | {k.removesuffix(f".root{top}") + f".fold{top}": x for k, x in roots.items()}


def counter_part(counter: Node, rows: list[int]) -> Node:
    """Some streams; all of them at no cost."""
    return counter if len(rows) == counter["position"].shape[0] else select(counter, rows)


def _node(element: Element) -> Node:
    return {ONE: element} if isinstance(element, Tensor) else dict(element)


def _element(node: Node) -> Element:
    return node[ONE] if len(node) == 1 and ONE in node else node
