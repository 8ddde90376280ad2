"""The chunked plan's kernels as text: templates/chunk_*.py.j2, then the host's table of them."""

from __future__ import annotations

from psmc.codegen.render import render
from psmc.plan.chunked_kernels import ChunkTiles, tiles
from psmc.structure.report import Affine, Structure

_LOG2E = "1.4426950408889634"
_BOUND = "60.0"  # exponents within which a product of two scaled factors neither overflows nor loses digits
_KERNELS = ("forward", "states", "join", "gradients", "pairs", "inner", "step")


def print_chunk_kernels(structure: Structure) -> str:
    """Module text that defines CHUNK_KERNELS, the table of `runtime.kit_chunk_kernels`, and KERNELS; '' if no layer is
    one for these kernels."""
    found = [x.affine for x in structure.layers if x.affine is not None and x.cls == "affine" and by_kernel(x.affine)]
    if not found:
        return ""
    return kernel_text(tiles(any(a.decay.kind == "K" for a in found))) + "\n\nKERNELS = None\n"


def kernel_text(sizes: ChunkTiles) -> str:
    files = ("parts", "decays", "forward", "states", "gradients", "pairs", "inner", "step")
    parts = [render(f"chunk_{name}.py.j2", log2e=_LOG2E, bound=_BOUND) for name in files]
    rows = "".join(f"    {name}=chunk_{name}_kernel,\n" for name in _KERNELS)
    table = (
        f"CHUNK_KERNELS = SimpleNamespace(\n{rows}"
        "    interpreted=triton is not None and not isinstance(chunk_forward_kernel, triton.JITFunction),\n"
        f"    tiles={sizes.literal()},\n)\n"
    )
    return "\n\n".join(part.strip() + "\n" for part in parts) + "\n\n" + table


def by_kernel(affine: Affine) -> bool:
    """Whether these kernels run a layer: no transition of low rank, no decay over the value, one outer axis at most."""
    return affine.rank == 0 and affine.decay.kind in ("none", "constant", "scalar", "K")
