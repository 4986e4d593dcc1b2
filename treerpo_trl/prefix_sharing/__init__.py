"""One forward pass over the distinct tokens of rows that share prefixes, exactly as dense rows would have it."""

from .attention import install
from .forward import find_difference, forward_shared
from .packing import PackedRows, pack_rows
from .sharing import PrefixSharing
from .support import unsupported_reason


__all__ = [
    "PackedRows",
    "PrefixSharing",
    "find_difference",
    "forward_shared",
    "install",
    "pack_rows",
    "unsupported_reason",
]
