"""Steer the node namespace of a benchmark path as the agent does, with the agent's own module.

steer.py OFFLOAD. Both pods are isolated: the client's for egress, the server's for ingress.
"""

from __future__ import annotations

import socket
import sys

from dataplane.addresses import parse_address
from dataplane.config import AgentConfig
from dataplane.model import Key
from dataplane.node.interfaces import Kind, Placement
from dataplane.node.steering import SteeredPod, Steering


def main(offload: bool) -> None:
    steering = Steering(AgentConfig(sources=(), offload=offload))
    steering.detect()
    steering.install()
    steering.apply(
        [
            SteeredPod(
                Key("bench", name),
                Placement(socket.if_nametoindex(device), device, Kind.ROUTED),
                (parse_address(address),),
                egress=name == "client",
                ingress=name == "server",
            )
            for name, device, address in (("client", "pa", "10.78.0.2"), ("server", "pb", "10.78.1.2"))
        ],
        [],
    )
    if problems := steering.verify():
        raise SystemExit("; ".join(problems))


if __name__ == "__main__":
    main(sys.argv[1] == "1")
