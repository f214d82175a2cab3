"""Lose the first SYN of every second connection: what do clients make of it, and how long do they take?

podgate intercept --hook lose_syns.py to=shop/db tcp
"""

from dataplane.hook import DROP

connections = {}  # (source, port, destination, port) → the connection's number


def on_packet(packet, seen):
    if seen.tcp_flags != "SYN":
        return None
    key = (seen.src, seen.src_port, seen.dst, seen.dst_port)
    if key in connections:  # the same SYN again: a retry
        seen.count("SYNs sent again")
        return None
    connections[key] = seen.count("connections")
    return DROP if connections[key] % 2 else None
