"""Language models: blocks over a mixer, and Transformer-PSM. All have forward, prefill, init_state and step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psmc.diagnostics import fail
from psmc.nn.attention import hidden_width
from psmc.nn.state import State, scoped, within
from psmc.nn.transformer_psm import transformer_scannable

MakeMixer = Callable[[int], nn.Module]


class Block(nn.Module):
    """x + mixer(norm x), then x + mlp(norm x). The mixer maps [B, T, dim] to the same, and has prefill and step."""

    def __init__(self, dim: int, mixer: Any, expand: float = 4.0) -> None:
        super().__init__()
        self.mixer: Any
        hidden = hidden_width(dim, expand)
        self.norm, self.mixer = nn.LayerNorm(dim), mixer
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self._rest(x, self.mixer(self.norm(x)))

    def prefill(self, x: Tensor) -> tuple[Tensor, State]:
        y, state = self.mixer.prefill(self.norm(x))
        return self._rest(x, y), state

    def step(self, x: Tensor, state: State, in_place: bool = False) -> tuple[Tensor, State]:
        y, state = self.mixer.step(self.norm(x), state, in_place)
        return self._rest(x, y), state

    def init_state(self, batch: int) -> State:
        state: State = self.mixer.init_state(batch)
        return state

    def _rest(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + y
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class Vocabulary(nn.Module):
    """Token embeddings, normed to unit scale, and logits by the same table (or, not tied, by one of its own)."""

    def __init__(self, vocab: int, dim: int, classes: int | None = None) -> None:
        super().__init__()
        if vocab < 1 or dim < 1:
            fail("PSM652", f"a vocabulary of {vocab} tokens and width {dim}: both must be from 1 on.")
        self.table = nn.Embedding(vocab, dim)
        nn.init.normal_(self.table.weight, std=0.02)  # logits start near 0, and the norm takes care of the inputs
        self.norm, self.last = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.head = None if classes is None else nn.Linear(dim, classes)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.norm(self.table(tokens))  # type: ignore[no-any-return]

    def logits(self, x: Tensor) -> Tensor:
        x = self.last(x)
        return F.linear(x, self.table.weight) if self.head is None else self.head(x)


class LanguageModel(nn.Module):
    """Logits [B, T, vocab] over what follows each token of [B, T]: `layers` blocks over mixers that `mixer(dim)` makes.

        LanguageModel(256, 384, 6, mixer=lambda d: Attention(d, heads=6))
        LanguageModel(256, 384, 6, mixer=lambda d: ScanMixer("gla.psm", d, heads=6))

    classes: logits over so many classes by a head of its own, instead of over the vocabulary by its table.
    """

    def __init__(
        self, vocab: int, dim: int, layers: int, mixer: MakeMixer, *, expand: float = 4.0, classes: int | None = None
    ) -> None:
        super().__init__()
        self.vocabulary = Vocabulary(vocab, dim, classes)
        self.blocks = nn.ModuleList(Block(dim, mixer(dim), expand) for _ in range(layers))

    def stack(self) -> list[Block]:
        return [b for b in self.blocks if isinstance(b, Block)]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.vocabulary.embed(tokens)
        for block in self.stack():
            x = block(x)
        return self.vocabulary.logits(x)

    def prefill(self, tokens: Tensor, last: bool = False) -> tuple[Tensor, State]:
        """Logits [B, T, vocab], only of the last token if `last`, and the state after these tokens."""
        x, after = self.vocabulary.embed(tokens), State()
        for n, block in enumerate(self.stack()):
            x, state = block.prefill(x)
            after |= within(state, str(n))
        return self.vocabulary.logits(x[:, -1:] if last else x), after

    def init_state(self, batch: int) -> State:
        states = [within(block.init_state(batch), str(n)) for n, block in enumerate(self.stack())]
        return {k: x for state in states for k, x in state.items()}

    def step(self, token: Tensor, state: Mapping[str, Tensor], in_place: bool = False) -> tuple[Tensor, State]:
        """Logits [B, vocab] after one token [B] more, and the state. in_place: caches are overwritten, not copied."""
        x, after = self.vocabulary.embed(token), State()
        for n, block in enumerate(self.stack()):
            x, moved = block.step(x, scoped(state, str(n)), in_place)
            after |= within(moved, str(n))
        return self.vocabulary.logits(x), after


class TransformerPSM(nn.Module):
    """Transformer-PSM over a vocabulary (Yau et al. 2025, arXiv 2506.10918): logits [B, T, vocab] of tokens [B, T].

    chunk_size   c: a token costs O(c), a stream holds O(c log(n / c)) vectors
    agg_layers, inf_layers   depth of the two transformers; `options` are those of `transformer_scannable`
    """

    def __init__(
        self, vocab: int, dim: int, chunk_size: int, *, heads: int, agg_layers: int = 1, inf_layers: int = 1,
        classes: int | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.vocabulary = Vocabulary(vocab, dim, classes)
        self.scan = transformer_scannable(
            dim, chunk_size, heads=heads, agg_layers=agg_layers, inf_layers=inf_layers, **options
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.vocabulary.logits(self.scan(self.vocabulary.embed(tokens)))

    def prefill(self, tokens: Tensor, last: bool = False) -> tuple[Tensor, State]:
        """Logits [B, T, vocab], only of the last token if `last`, and the state after these tokens."""
        x, state = self.scan.prefill(self.vocabulary.embed(tokens))
        return self.vocabulary.logits(x[:, -1:] if last else x), state

    def init_state(self, batch: int) -> State:
        return self.scan.init_state(batch)

    def step(self, token: Tensor, state: Mapping[str, Tensor], in_place: bool = False) -> tuple[Tensor, State]:
        """Logits [B, vocab] after one token [B] more, and the state; O(chunk_size) on average, whatever the length."""
        x, after = self.scan.step(self.vocabulary.embed(token), state, in_place)
        return self.vocabulary.logits(x), after


def parameters_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def width_for(params: int, make: Callable[[int], nn.Module], multiple: int = 8) -> int:
    """The width, a multiple of `multiple`, at which make(width) is closest to `params` parameters; nothing is made."""
    low, high = 1, 1
    while _count(make, high * multiple) < params:
        low, high = high, 2 * high
    while low < high - 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _count(make, middle * multiple) < params else (low, middle)
    return min((low, high), key=lambda n: abs(_count(make, n * multiple) - params)) * multiple


def sizes_for(params: int, make: Callable[[int, float], nn.Module], multiple: int = 64) -> tuple[int, float]:
    """(width, expand) at which make(width, expand) has `params` parameters, nearly: the width as `width_for` finds it
    with MLPs of expand 4, then MLPs as wide as it takes, 1 to 8 times the width."""
    width = width_for(params, lambda w: make(w, 4.0), multiple)
    four, five = (_count(make, width, e) for e in (4.0, 5.0))
    return width, min(8.0, max(1.0, 4.0 + (params - four) / max(1, five - four)))


def _count(make: Callable[..., nn.Module], *sizes: float) -> int:
    with torch.device("meta"):
        return parameters_of(make(*sizes))
