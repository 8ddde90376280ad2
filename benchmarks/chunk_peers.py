"""The same models by flash-linear-attention (mLSTM: by mlstm-kernels), for whole sequences and for one token.

They take psmc's tensors by psmc's names.

Its environment (`ENV`) turns the dispatch to other backends off and keeps what its autotuner found.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
ENV = {"FLA_DISABLE_BACKEND_DISPATCH": "1", "FLA_CACHE_RESULTS": "1"}
GUARD = "fla refuses this gradient on this Triton, which miscompiles it; timed with the guard off"


def linear_attention(x: Tensors) -> Tensor:
    from fla.ops.linear_attn import chunk_linear_attn

    q, k = (torch.nn.functional.elu(t) + 1 for t in (x["q"], x["k"]))
    return chunk_linear_attn(q, k, x["v"], scale=1.0, normalize=True)[0]


def retnet(x: Tensors) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(x["q"], x["k"], x["v"], g_gamma=x["gamma"].detach().log())[0]


def mamba2(x: Tensors) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    k = x["B"] * x["dt"][..., None].to(x["B"].dtype)
    y = chunk_simple_gla(x["C"], k, x["x"], g=x["dt"].float() * x["A"], scale=1.0)[0]
    return y + x["skip"][:, None].to(y.dtype) * x["x"]


def gla(x: Tensors) -> Tensor:
    from fla.ops.gla import chunk_gla

    return chunk_gla(x["q"], x["k"], x["v"], x["g"])[0]


def hgrn2(x: Tensors) -> Tensor:
    from fla.ops.gla import chunk_gla

    return chunk_gla(x["q"], 1 - x["g"].exp(), x["v"], x["g"], scale=1.0)[0]


def rwkv6(x: Tensors) -> Tensor:
    from fla.ops.rwkv6 import chunk_rwkv6

    log = -x["w"].float().exp()
    return chunk_rwkv6(x["r"], x["k"], x["v"], log, x["u"].to(x["r"].dtype), scale=1.0)[0]


def mlstm(x: Tensors) -> Tensor:
    """By mlstm-kernels, which holds [B, H, T, D]: `prepared` brings its tensors to that beforehand."""
    from mlstm_kernels.torch.chunkwise.triton_xl_chunk import mlstm_chunkwise__xl_chunk

    y: Tensor = mlstm_chunkwise__xl_chunk(*(x[n] for n in ("q", "k", "v", "igate", "fgate")),
                                          autocast_kernel_dtype=x["q"].dtype)  # fmt: skip
    return y.transpose(1, 2)


PEERS: dict[str, Callable[[Tensors], Tensor]] = {
    f.__name__: f for f in (linear_attention, retnet, mamba2, gla, hgrn2, rwkv6, mlstm)
}


def who(name: str) -> str:
    """Whose kernels these are."""
    return "mlstm-kernels" if name == "mlstm" else "fla"


def installed(name: str) -> bool:
    module = "mlstm_kernels" if name == "mlstm" else "fla"
    return name in PEERS and importlib.util.find_spec(module) is not None


def prepared(name: str, x: Tensors) -> Tensors:
    """Tensors in the peer's own layout."""
    if name == "mlstm":
        return {k: t.transpose(1, 2).contiguous() for k, t in x.items()}
    return x


NOT_TRAINED = {"retnet": ("gamma",)}  # what the peer has no gradient of


def guard_off() -> None:
    """Let fla compute the gradient that it knows to be wrong on this Triton: for its time, not for its numbers."""
    import fla.ops.common.chunk_o as chunk_o

    chunk_o.TRITON_ABOVE_3_7_1 = True


def guarded(name: str) -> bool:
    return name == "mamba2"


# --- one token: x of [B, H, *dims], state fp32 [B, H, K, V] -> (output, state)


def token(name: str) -> Callable[[Tensors, Tensor], Any] | None:
    """The peer's step for a spec, or None."""
    return {
        "gla": _step_gla, "mamba2": _step_mamba2, "retnet": _step_retnet, "linear_attention": _step_linear,
        "hgrn2": _step_hgrn2, "rwkv6": _step_rwkv6, "gated_deltanet": _step_gated_deltanet,
    }.get(name)  # fmt: skip


def _one(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.unsqueeze(1) for t in tensors)


def _step_gla(x: Tensors, state: Tensor) -> Any:
    from fla.ops.gla import fused_recurrent_gla

    q, k, v, g = _one(x["q"], x["k"], x["v"], x["g"])
    return fused_recurrent_gla(q, k, v, gk=g, initial_state=state, output_final_state=True)


def _step_hgrn2(x: Tensors, state: Tensor) -> Any:
    from fla.ops.gla import fused_recurrent_gla

    q, v, g = _one(x["q"], x["v"], x["g"])
    return fused_recurrent_gla(q, 1 - g.exp(), v, gk=g, scale=1.0, initial_state=state, output_final_state=True)


def _step_mamba2(x: Tensors, state: Tensor) -> Any:
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    k = x["B"] * x["dt"][..., None]
    q, k, v, g = _one(x["C"], k, x["x"], x["dt"].float() * x["A"])
    y, after = fused_recurrent_simple_gla(q, k, v, g=g, scale=1.0, initial_state=state, output_final_state=True)
    return y + x["skip"][:, None].to(y.dtype) * v, after


def _step_retnet(x: Tensors, state: Tensor) -> Any:
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    q, k, v = _one(x["q"], x["k"], x["v"])
    log = x["gamma"].log()
    return fused_recurrent_simple_gla(q, k, v, g_gamma=log, initial_state=state, output_final_state=True)


def _step_linear(x: Tensors, state: Tensor) -> Any:
    """Without the normaliser, which fla keeps apart."""
    from fla.ops.linear_attn import fused_recurrent_linear_attn

    q, k, v = _one(*(torch.nn.functional.elu(x[n]) + 1 for n in ("q", "k")), x["v"])
    return fused_recurrent_linear_attn(q, k, v, scale=1.0, initial_state=state, output_final_state=True)


def _step_rwkv6(x: Tensors, state: Tensor) -> Any:
    from fla.ops.rwkv6 import fused_recurrent_rwkv6

    r, k, v, w = _one(x["r"], x["k"], x["v"], -x["w"].float().exp())
    u = x["u"].to(r.dtype)
    return fused_recurrent_rwkv6(r, k, v, w, u, scale=1.0, initial_state=state, output_final_state=True)


def _step_gated_deltanet(x: Tensors, state: Tensor) -> Any:
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    q, k, v, g, beta = _one(*(x[n] for n in ("q", "k", "v", "g", "beta")))
    return fused_recurrent_gated_delta_rule(
        q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True
    )  # fmt: skip
