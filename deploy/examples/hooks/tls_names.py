"""Print and count the server names that pods ask for in TLS, and drop those that are on a list.

podgate intercept --hook tls_names.py from=shop/web tcp port 443

Without a server name (old clients, Encrypted Client Hello's inner name) nothing is printed.
"""

from scapy.layers.inet import TCP

from dataplane.hook import DROP

REFUSED = ("blocked.example",)  # and every name below it

HANDSHAKE, CLIENT_HELLO, SERVER_NAME = 22, 1, 0  # RFC 8446 §5.1, §4; RFC 6066 §3


def on_packet(packet, seen):
    if TCP not in packet:
        return None
    name = server_name(bytes(packet[TCP].payload))
    if name is None:
        return None
    print(f"{seen.src_pod or seen.src} asks {seen.dst}:{seen.dst_port} for {name}")
    seen.count(name)
    return DROP if any(f".{name}".endswith(f".{one}") for one in REFUSED) else None


def server_name(data):
    """The name in a ClientHello, None when the data is none, or has none, or is not all here."""
    try:
        if data[0] != HANDSHAKE or data[5] != CLIENT_HELLO:
            return None
        at = 5 + 4 + 2 + 32  # record and handshake headers, version, random
        at += 1 + data[at]  # session
        at += 2 + int.from_bytes(data[at : at + 2])  # cipher suites
        at += 1 + data[at]  # compression
        end = at + 2 + int.from_bytes(data[at : at + 2])
        at += 2
        while at + 4 <= end:
            kind, size = int.from_bytes(data[at : at + 2]), int.from_bytes(data[at + 2 : at + 4])
            at += 4
            if kind == SERVER_NAME:
                length = int.from_bytes(data[at + 3 : at + 5])
                name = data[at + 5 : at + 5 + length]
                return name.decode("ascii") if len(name) == length > 0 else None
            at += size
    except (IndexError, UnicodeDecodeError):
        pass
    return None
