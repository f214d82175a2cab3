"""Let the answers of DNS servers come 300 ms late, and count which names are asked for.

podgate intercept --hook slow_dns.py pod=shop/web udp port 53
"""

from scapy.layers.dns import DNS

from dataplane.hook import delay

SECONDS = 0.3


def on_packet(packet, seen):
    if DNS not in packet:
        return None
    message = packet[DNS]
    if message.qr == 0:
        for question in message.qd or []:
            seen.count(question.qname.decode("ascii", "replace"))
        return None
    return delay(SECONDS)
