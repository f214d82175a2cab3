"""Packets decoded for people: what scapy itself cannot show is shown as it is."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from dataplane.observe.decode import layers

logging.getLogger("scapy.runtime").setLevel(logging.ERROR)
from scapy.layers.inet import IP, UDP  # noqa: E402

PACKET = bytes(IP(src="10.0.0.1", dst="10.0.0.2", ttl=7) / UDP(sport=7, dport=9) / b"hello")


def test_one_line_for_each_layer() -> None:
    network, transport, load = layers(PACKET)
    assert network.startswith("IP  version=4 ihl=5 ")
    assert "ttl=7 " in network
    assert transport.startswith("UDP  sport=")
    assert load == "5 bytes  68 65 6c 6c 6f"


@pytest.mark.parametrize("shown", [ValueError("no class for it"), "7\nand more"])
def test_a_field_that_cannot_be_shown_ends_nothing(monkeypatch: pytest.MonkeyPatch, shown: Any) -> None:
    def i2repr(*_: object) -> str:
        if isinstance(shown, Exception):
            raise shown
        return str(shown)

    (ttl,) = (field for field in IP.fields_desc if field.name == "ttl")
    monkeypatch.setattr(type(ttl), "i2repr", i2repr)
    network = layers(PACKET)[0]
    assert "\n" not in network
    assert ("ttl=7 and more" if isinstance(shown, str) else "ttl=7 ") in network
