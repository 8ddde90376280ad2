"""Generation, token by token, by any model with prefill and step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from psmc.diagnostics import fail
from psmc.nn.state import State


@torch.no_grad()
def generate(
    model: Any, prompt: Tensor, count: int, *, temperature: float = 1.0, top_k: int | None = None, seed: int = 0,
    state: State | None = None, return_state: bool = False,
) -> Any:  # fmt: skip
    """`count` tokens after each row of `prompt` [B, T], T from 1 on: [B, count] int64.

    temperature   0 takes the most likely token; else logits are divided by it
    top_k         only the k most likely tokens may be drawn
    state         where to go on from (`prompt` is then what was not seen yet, at least the last token drawn)

    The same seed on the same device draws the same tokens. Raises PsmcError PSM653.
    """
    if prompt.dim() != 2 or prompt.shape[1] < 1:
        fail("PSM653", f"a prompt is [B, T] with T from 1 on, not {list(prompt.shape)}.")
    if temperature < 0 or (top_k is not None and top_k < 1):
        fail("PSM653", "temperature is from 0 on, top_k from 1 on.")
    draws = torch.Generator(prompt.device).manual_seed(seed)
    if state is None:
        rows, state = model.prefill(prompt, last=True)
        logits = rows[:, -1]
    else:
        state = {k: x.clone() for k, x in state.items()}
        for t in range(prompt.shape[1]):
            logits, state = model.step(prompt[:, t], state, in_place=True)
    drawn = []
    for n in range(count):
        drawn.append(choose(logits, temperature, top_k, draws))
        if n < count - 1 or return_state:
            logits, state = model.step(drawn[-1], state, in_place=True)
    out = torch.stack(drawn, 1) if drawn else prompt.new_zeros(prompt.shape[0], 0)
    return (out, state) if return_state else out


def choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """One token a row of logits [B, vocab]."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    odds = torch.softmax(logits.float() / temperature, -1)
    return torch.multinomial(odds, 1, generator=generator).squeeze(-1)
