"""What one host of a cluster says of itself."""

from __future__ import annotations

import psutil


def interface_of(address: str) -> str:
    """Return the network interface that has an address; empty where none has."""
    found = psutil.net_if_addrs().items()
    return next((name for name, addresses in found if any(one.address == address for one in addresses)), "")
