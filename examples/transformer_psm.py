# Transformer-PSM: a Transformer block as the aggregator, over chunks of C embeddings.
# Yau et al. 2025, arXiv 2506.10918.

import torch
from torch import nn

import psmc


class TransformerBlock(nn.Module):
    """One pre-norm block over [l | r]; the new state is its output at r's positions."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, l, r):
        lead, length = r["s"].shape[:-2], r["s"].shape[-2]
        both = torch.cat([l["s"], r["s"]], dim=-2).flatten(0, -3)
        x = self.norm1(both)
        x = both + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        return {"s": x[:, -length:].unflatten(0, lead)}


@psmc.aggregator(inputs="x[C, D]", state="s[C, D] = 0", associative=False, order="tree")
class TransformerPsm:
    """o is the prefix before this chunk, for the inference head. Yau et al. 2025, arXiv 2506.10918."""

    combine = psmc.extern(TransformerBlock(64))

    def lift(x):
        return dict(s=x.x)

    def output(s, x, prev):
        return prev.s
