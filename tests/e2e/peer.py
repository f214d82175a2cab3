"""What runs in the pods of the end-to-end test, and nothing but the standard library.

python peer.py serve NAME          answers NAME on every port of PORTS, over IPv4 and IPv6
python peer.py ask TARGET…         TARGET: key,address,port,protocol; prints {key: the answer or null}
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

PORTS = ((8080, "TCP"), (8081, "TCP"), (8080, "UDP"))
TIMEOUT_SECONDS = 1.0  # what a denied packet costs; an allowed one is answered in milliseconds
TYPES = {"TCP": socket.SOCK_STREAM, "UDP": socket.SOCK_DGRAM}


def listeners() -> list[socket.socket]:
    """One socket for each port and family; without IPv6 in the pod, only those of IPv4."""
    made = []
    for family, anywhere in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        for port, protocol in PORTS:
            try:
                one = socket.socket(family, TYPES[protocol])
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                one.bind((anywhere, port))
            except OSError:
                if family == socket.AF_INET:
                    raise
                continue
            if protocol == "TCP":
                one.listen(64)
            made.append(one)
    return made


def serve(name: str) -> None:
    answer = name.encode()
    with selectors.DefaultSelector() as selector:
        for one in listeners():
            selector.register(one, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                one = key.fileobj
                assert isinstance(one, socket.socket)
                try:
                    if one.type == socket.SOCK_DGRAM:
                        _, sender = one.recvfrom(64)
                        one.sendto(answer, sender)
                    else:
                        connection, _ = one.accept()
                        with connection:
                            connection.sendall(answer)
                except OSError:
                    continue  # who asked has gone


def ask(target: str) -> tuple[str, str | None]:
    key, address, port, protocol = target.split(",")
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, TYPES[protocol]) as one:
            one.settimeout(TIMEOUT_SECONDS)
            one.connect((address, int(port)))
            if protocol == "UDP":
                one.send(b"?")
            return key, one.recv(64).decode() or None
    except OSError:
        return key, None


def main(what: str, *rest: str) -> None:
    if what == "serve":
        serve(*rest)
    with ThreadPoolExecutor(32) as pool:
        json.dump(dict(pool.map(ask, rest)), sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
