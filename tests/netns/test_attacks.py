"""What a hostile pod may try that no other test does: ways round the steering, and round the sweep."""

from __future__ import annotations

import socket
import time

import pytest
import yaml
from conftest import AgentFactory, LabFactory
from objects import anywhere, deny, pod_object, policy, select
from traffic import arrives, passes, udp

from dataplane.plan import ANNOTATION_SPOOF_CHECK

pytestmark = pytest.mark.netns
BEHIND = {4: "172.30.0.5", 6: "fd30::5"}  # an address that a pod routes for


@pytest.mark.parametrize("family", [4, 6])
def test_what_a_pod_routes_for_others_is_judged_again(
    lab: LabFactory, agent: AgentFactory, family: int
) -> None:
    # The flow carries an address that is no pod's, so that a sweep cannot tell whose flow it is.
    one = lab(["x/a", "x/c"])
    daemon = agent(one, start=False)
    objects = [pod_object(one, one.pod(name)) for name in ("x/a", "x/c")]
    objects[1]["metadata"]["annotations"] = {ANNOTATION_SPOOF_CHECK: "off"}
    daemon.write_text(yaml.safe_dump_all(objects), "pods.yaml", wait=False)
    daemon.write(policy("x", "c", select(one, "x/c"), egress=anywhere("9000/UDP")), wait=False)
    daemon.start()
    target, to = udp(one, "x/a", 9000, family=family), (one.address("x/a", family), 9000)
    forwarded = udp(one, "x/c", 5000, family=family, address=BEHIND[family])
    assert passes(forwarded, to, target)
    daemon.write(policy("x", "c", select(one, "x/c"), egress=anywhere("9001/UDP")))
    assert not arrives(forwarded, to, target)


def test_a_flow_that_a_helper_expects_is_judged(lab: LabFactory, agent: AgentFactory) -> None:
    # Active FTP: the server opens the data connection. The kernel gives it the mark of the control
    # connection, our bits included.
    one = lab(["x/a", "x/b"])
    one.run(
        "node", "iptables", "-t", "raw", "-A", "PREROUTING",
        "-p", "tcp", "--dport", "21", "-j", "CT", "--helper", "ftp",
    )  # fmt: skip
    agent(
        one,
        policy("x", "a", select(one, "x/a"), ingress=[]),
        policy("x", "b", select(one, "x/b"), ingress=anywhere("21/TCP")),
    )
    listener = one.make_socket("x/b", socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("0.0.0.0", 21))
    listener.listen()
    client = one.make_socket("x/a", socket.AF_INET, socket.SOCK_STREAM)
    client.settimeout(5)
    client.connect((one.address("x/b"), 21))
    server, _ = listener.accept()
    data = one.make_socket("x/a", socket.AF_INET, socket.SOCK_STREAM)
    data.bind(("0.0.0.0", 9000))
    data.listen()
    server.sendall(b"220 hello\r\n")
    client.recv(100)
    client.sendall(b"USER x\r\n")  # the helper wants to have seen the end of a line
    server.settimeout(5)
    assert server.recv(100)
    numbers = one.address("x/a").replace(".", ",")
    client.sendall(f"PORT {numbers},{9000 >> 8},{9000 & 255}\r\n".encode())
    server.settimeout(5)
    assert server.recv(100)
    assert one.run("node", "conntrack", "-L", "expect").stdout, "the kernel does expect it"
    back = one.make_socket("x/b", socket.AF_INET, socket.SOCK_STREAM)
    back.settimeout(1)
    with pytest.raises(OSError):
        back.connect((one.address("x/a"), 9000))


def test_readers_do_not_keep_the_agent_from_ending(lab: LabFactory, agent: AgentFactory) -> None:
    # The kubelet kills after 30 s; a `podgate trace` left open somewhere must not bring that about.
    one = lab(["x/a", "x/b"])
    daemon = agent(one, deny(one, "x/a"))
    readers = []
    for question in (b"GET /events?capture=all HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /ev"):
        reader = socket.socket(socket.AF_UNIX)
        reader.connect(str(daemon.control))
        reader.sendall(question)
        readers.append(reader)
    assert readers[0].recv(10)
    began = time.monotonic()
    assert daemon.terminate() == 0
    assert time.monotonic() - began < 10
