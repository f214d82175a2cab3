"""The process that answers queue 0 of the namespace it is started in, for whole_path.py.

answer.py native|netfilterqueue RULES OFFLOAD

native: podgate's own queue and engine, both ends isolated by RULES rules each. netfilterqueue: the
NetfilterQueue package with the least Python callback that can do the job: accept, with the mark.
"""

from __future__ import annotations

import random
import signal
import socket
import sys

from paths import MARKS

from dataplane.addresses import Prefix, parse_address
from dataplane.model import Key, PortRange, Rule


def make_rules(count: int) -> list[tuple[Key, Rule]]:
    """`count` rules over distinct networks, the last of which lets the benchmark's packets pass."""
    chance = random.Random(7)
    networks = chance.sample(range(1 << 16), count - 1)
    rules = [
        (
            Key("bench", "many"),
            Rule(
                Prefix(bytes([172, 16 + (network >> 12), network >> 4 & 255, (network & 15) << 4]), 28),
                (),
                tuple(PortRange(6, first, first + 10) for first in sorted(chance.sample(range(60000), 3))),
                index,
            ),
        )
        for index, network in enumerate(networks)
    ]
    ports = (PortRange(6, 5001, 5009), PortRange(17, 5000, 5000))
    rules.append((Key("bench", "many"), Rule(Prefix(parse_address("10.78.0.0"), 16), (), ports, count)))
    return rules


def native(count: int, offload: bool) -> None:
    from dataplane._engine import Publisher
    from dataplane.config import Backend, Fail
    from dataplane.node.queues import QueueSet
    from dataplane.policy.compile import Compiler, PodEntry
    from dataplane.policy.effective import DirectionRules

    rules = DirectionRules(tuple(make_rules(count)))
    pods = [
        PodEntry(
            Key("bench", "client"),
            (parse_address("10.78.0.2"),),
            (socket.if_nametoindex("pa"),),
            egress=rules,
        ),
        PodEntry(
            Key("bench", "server"),
            (parse_address("10.78.1.2"),),
            (socket.if_nametoindex("pb"),),
            ingress=rules,
        ),
    ]
    publisher = Publisher()
    publisher.publish(Compiler().table(1, pods, []))
    queues = QueueSet(
        publisher, backend=Backend.NATIVE, numbers=[0], marks=MARKS, fail=Fail.CLOSED, offload=offload
    )
    queues.start()
    print("ready", flush=True)
    signal.pause()


def plain(offload: bool) -> None:
    from netfilterqueue import NetfilterQueue, Packet

    saved = MARKS.saved if offload else 0
    clear = ~MARKS.mask

    def callback(packet: Packet) -> None:
        packet.set_mark(packet.mark & clear | saved)
        packet.accept()

    queue = NetfilterQueue()
    queue.bind(0, callback, max_len=4096)
    print("ready", flush=True)
    queue.run()


if __name__ == "__main__":
    backend, rule_count, offloaded = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1"
    if backend == "native":
        native(rule_count, offloaded)
    else:
        plain(offloaded)
