"""A packet's bytes as people read them: layer by layer, decoded by scapy."""

from __future__ import annotations

import logging
from typing import Any

SHOWN = 32  # bytes of a payload that no layer knows


def scapy_packet(packet: bytes) -> Any:
    """The scapy packet of an IPv4 or IPv6 packet; of anything else, its bytes as a `Raw` layer."""
    # Takes a second to import; its warnings are about this machine's interfaces, not about packets.
    logging.getLogger("scapy.runtime").setLevel(logging.ERROR)
    from scapy.layers.inet import IP
    from scapy.layers.inet6 import IPv6
    from scapy.packet import Raw

    version = packet[0] >> 4 if packet else 0
    try:
        return {4: IP, 6: IPv6}.get(version, Raw)(packet)
    except Exception:  # a header cut short: scapy lets out whatever its fields raise
        return Raw(packet)


def layers(packet: bytes) -> list[str]:
    """One line for each layer, outermost first: `IP  version=4 ihl=5 … src=10.0.0.1 dst=10.0.0.2`."""
    from scapy.packet import NoPayload, Raw

    if not packet:
        return []
    lines = []
    layer = scapy_packet(packet)
    while not isinstance(layer, NoPayload):
        if isinstance(layer, Raw):
            load = bytes(layer)
            text = load[:SHOWN].hex(" ") + (" …" if len(load) > SHOWN else "")
            lines.append(f"{len(load)} bytes  {text}")
            break
        fields = [_field(layer, field) for field in layer.fields_desc]
        lines.append(f"{layer.name}  {' '.join(fields)}")
        layer = layer.payload
    return lines


def _field(layer: Any, field: Any) -> str:
    value = layer.getfieldval(field.name)
    try:
        text = str(field.i2repr(layer, value))
    except Exception:  # an option no scapy class can show
        text = repr(value)
    return f"{field.name}={' '.join(text.split())}"
