"""Prefix-scannable models in PyTorch: any modules over the tree and the counter, Transformer-PSM, compiled mixers."""

from psmc.nn.attention import Attention, Layer, Trunk
from psmc.nn.mixer import ScanMixer
from psmc.nn.model import Block, LanguageModel, TransformerPSM, parameters_of, sizes_for, width_for
from psmc.nn.sample import generate
from psmc.nn.scannable import PrefixScannable
from psmc.nn.state import join, select, state_bytes
from psmc.nn.transformer_psm import TransformerAgg, TransformerInf, transformer_scannable

__all__ = [
    "Attention", "Block", "LanguageModel", "Layer", "PrefixScannable", "ScanMixer", "TransformerAgg", "TransformerInf",
    "TransformerPSM", "Trunk", "generate", "join", "parameters_of", "select", "sizes_for", "state_bytes",
    "transformer_scannable", "width_for",
]  # fmt: skip
