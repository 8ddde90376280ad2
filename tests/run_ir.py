"""Running IR blocks in fp64, for the tests of lifting and structure: recurrences, and folds in any order."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from psmc.frontend.psm import parse
from psmc.frontend.resolve import resolve
from psmc.ir import Aggregator
from psmc.reference.evaluate import Env, run
from psmc.source import SourceFile

EXAMPLES = Path(__file__).parent.parent / "examples"
SIZES = {0: 3, 1: 2, 2: 4}
Values = dict[str, torch.Tensor]


def spec(text: str) -> Aggregator:
    (agg,) = resolve(parse(SourceFile("test.psm", text)))
    return agg


def example(name: str) -> Aggregator:
    return spec((EXAMPLES / f"{name}.psm").read_text())


def sizes(agg: Aggregator) -> dict[str, int]:
    return {d.name: d.size or SIZES[n % 3] for n, d in enumerate(agg.dims)}


def draw(agg: Aggregator, steps: int, seed: int = 0) -> tuple[list[Values], Values]:
    """Inputs of each token, and params, within their intervals."""
    made = torch.Generator().manual_seed(seed)
    dims = sizes(agg)

    def one(tensor) -> torch.Tensor:
        shape = [dims[d] for d in tensor.dims]
        if tensor.kind == "complex":
            return torch.randn(shape, generator=made, dtype=torch.complex128)
        lo = float(tensor.interval.lo) if tensor.interval and tensor.interval.lo is not None else None
        hi = float(tensor.interval.hi) if tensor.interval and tensor.interval.hi is not None else None
        x = torch.randn(shape, generator=made, dtype=torch.float64)
        if lo is not None and hi is not None:
            x = lo + (hi - lo) * torch.sigmoid(x)
        elif lo is not None or hi is not None:
            x = x.abs() + lo if lo is not None else hi - x.abs()
        return x.round().long() if tensor.kind == "int" else x

    return [{t.name: one(t) for t in agg.inputs} for _ in range(steps)], {t.name: one(t) for t in agg.params}


def evaluated(block, agg: Aggregator, **spaces: Values) -> Values:
    """A block's results; `spaces` are its operands by space name (inputs and params as input=, param=)."""
    values = {(s, n, 0): v for s, found in spaces.items() for n, v in found.items()}
    return run(block, Env(values, sizes(agg)))


def starts(agg: Aggregator) -> Values:
    from psmc.ir import Block

    return evaluated(Block(results=tuple(c.start for c in agg.state)), agg)


def identities(agg: Aggregator) -> Values:
    from psmc.ir import Block

    return evaluated(Block(results=tuple(c.identity for c in agg.state)), agg)


def stepped(agg: Aggregator, inputs: list[Values], params: Values) -> list[Values]:
    """The states of a recurrence, the declared start first."""
    states = [starts(agg)]
    for token in inputs:
        states.append(evaluated(agg.recurrence, agg, prev=states[-1], input=token, param=params))
    return states


def folded(agg: Aggregator, inputs: list[Values], params: Values, seed: int = 0) -> Values:
    """start ∘ x_1 ∘ … ∘ x_n of an aggregator with a combine, in a random parenthesisation."""
    order = random.Random(seed)
    elements = [starts(agg)] + [evaluated(agg.leaf, agg, input=token, param=params) for token in inputs]
    while len(elements) > 1:
        n = order.randrange(len(elements) - 1)
        left, right = elements[n], elements[n + 1]
        elements[n : n + 2] = [evaluated(agg.combine, agg, left=left, right=right, param=params)]
    return elements[0]
