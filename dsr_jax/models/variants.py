"""Sizes by their names in the papers; plain data that configs may import.

Source: spec denoiser 1.13 (S, B and L are the standard widths; only XL was released).
"""

from collections.abc import Mapping
from types import MappingProxyType

DIT: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
        "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
        "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
        "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
    }
)

REGISTER_START: Mapping[str, int] = MappingProxyType({"S": 4, "B": 4, "L": 8, "XL": 8})
"""First block with diffusion registers: XL released; S and B follow from the paper's GFLOPs; L is
JiT-L's, which has the same depth."""
