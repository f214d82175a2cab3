"""Hook files: loaded or refused with file, line and error; what they return, in words for the agent."""

from __future__ import annotations

import base64
import io
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dataplane.cli.hook_file import HookFile, rebuilt
from dataplane.cli.intercept import command
from dataplane.errors import InputError
from dataplane.hook import Seen

logging.getLogger("scapy.runtime").setLevel(logging.ERROR)
from scapy.layers.dns import DNS, DNSQR, DNSRR  # noqa: E402
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment  # noqa: E402
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6, IPv6ExtHdrHopByHop  # noqa: E402
from scapy.layers.sctp import SCTP, SCTPChunkInit  # noqa: E402
from scapy.packet import Raw  # noqa: E402

EXAMPLES = Path(__file__).resolve().parents[2] / "deploy/examples/hooks"
UDP4 = bytes(IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=7, dport=9) / b"hello")
RECORD: dict[str, Any] = {
    "verdict": "allow",
    "src": "10.0.0.1",
    "src_port": 7,
    "src_pod": "x/a",
    "dst": "10.0.0.2",
    "dst_port": 9,
    "tcp_flags": None,
}


def hook(tmp_path: Path, code: str, said: list[str] | None = None) -> HookFile:
    file = tmp_path / "hook.py"
    file.write_text("from dataplane.hook import ALLOW, DROP, delay\n" + code)
    return HookFile(file, (said if said is not None else []).append)


def answers(tmp_path: Path, expression: str, packet: bytes = UDP4) -> dict[str, Any]:
    return hook(tmp_path, f"def on_packet(packet, seen): return {expression}").answer(RECORD, packet)


@pytest.mark.parametrize(
    ("expression", "answer"),
    [
        ("None", {}),
        ("ALLOW", {"verdict": "allow"}),
        ("DROP", {"verdict": "drop"}),
        ("delay(0.5)", {"delay": 0.5}),
        ("bytes(packet)", {"packet": base64.b64encode(UDP4).decode()}),
        ("bytearray(b'x')", {"packet": "eA=="}),
        ("packet", {"packet": base64.b64encode(UDP4).decode()}),
        ("seen.count('one') + seen.count('two', 2) == 3 and DROP", {"verdict": "drop"}),
        ("DROP if (seen.src_pod, seen.record['dst_port']) == ('x/a', 9) else None", {"verdict": "drop"}),
    ],
)
def test_what_a_hook_returns(tmp_path: Path, expression: str, answer: dict[str, Any]) -> None:
    assert answers(tmp_path, expression) == answer


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("7", "TypeError: on_packet returned int; it returns None, ALLOW, DROP, delay(seconds), a packet"),
        ("True", "returned bool"),
        ("delay('soon')", "could not convert string to float"),
        ("seen.sender", "AttributeError: a packet has no 'sender'; it has dst, dst_pod"),
        ("exit(3)", "SystemExit: 3"),
        ("b'x' * 70000", "ValueError: a packet of 70,000 bytes: there is none of more than 65,535"),
        ("int('x' * 10**6)", "ValueError: invalid literal"),
        ("1 / 0", "hook.py:2: ZeroDivisionError: division by zero"),
        ("packet['TCP']", "Layer ['TCP'] not found"),
        ("(_ for _ in ()).throw(BaseException)", "hook.py:2: BaseException"),
        ("__import__('scapy.all').all.IP(ttl='x')", "hook.py: ValueError: While"),
    ],
)
def test_what_goes_wrong_is_an_answer_too(tmp_path: Path, expression: str, said: str) -> None:
    RECORD["dst_pod"] = None
    answer = answers(tmp_path, expression)
    assert list(answer) == ["error"]
    assert said in answer["error"]
    assert "\n" not in answer["error"]
    assert len(answer["error"]) < 1000


def test_each_failure_is_shown_once_with_the_authors_own_lines(tmp_path: Path) -> None:
    said: list[str] = []
    code = "def on_packet(packet, seen):\n    if seen.dst_port == 9:\n        int('x')\n    {}['y']\n"
    made = hook(tmp_path, code, said)
    for port in (9, 9, 10, 9, 10):
        assert "error" in made.answer({**RECORD, "dst_port": port}, UDP4)
    assert len(said) == 2
    assert said[0].splitlines() == [
        "-- the hook failed; the rules decide about such packets --",
        f'  File "{tmp_path}/hook.py", line 4, in on_packet',
        "    int('x')",
        "ValueError: invalid literal for int() with base 10: 'x'",
    ]


def test_ctrl_c_ends_a_hook(tmp_path: Path) -> None:
    made = hook(tmp_path, "def on_packet(packet, seen): raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        made.answer(RECORD, UDP4)


def test_a_file_may_import_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "helper_of_a_hook.py").write_text("WISH = 'drop'\n")
    code = "from helper_of_a_hook import WISH\ndef on_packet(packet, seen): return {'drop': DROP}[WISH]"
    assert hook(tmp_path, code).answer(RECORD, UDP4) == {"verdict": "drop"}


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def on_packet(packet, seen)\n", "hook.py:1: SyntaxError: expected ':'"),
        ("import json\njson.loads('')\n", "hook.py:2: JSONDecodeError: Expecting value"),
        ("import no_such_module_at_all\n", "hook.py:1: ModuleNotFoundError: No module named"),
        ("raise SystemExit(3)\n", "hook.py:1: SystemExit: 3"),
        ("on_packet = 7\n", "defines no function on_packet(packet, seen)"),
        ("", "defines no function on_packet(packet, seen)"),
        ("async def on_packet(packet, seen): pass\n", "is async"),
        ("def on_packet(packet): pass\n", "must take (packet, seen)"),
        ("# coding: nonsense\n", "unknown encoding"),
        ("x = '\0'\n", "null bytes"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path: Path, code: str, said: str) -> None:
    file = tmp_path / "hook.py"
    file.write_text(code)
    with pytest.raises(InputError) as refused:
        HookFile(file, lambda _text: None)
    text = str(refused.value)
    assert text.startswith("--hook ")
    assert said in text
    assert "\n" not in text


def test_standard_input_can_be_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"# coding: latin-1\ndef on_packet(packet, seen):\n    raise ValueError('\xe4')\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
    said: list[str] = []
    made = HookFile(Path("-"), said.append)
    assert made.answer(RECORD, UDP4) == {"error": "<stdin>:3: ValueError: ä"}
    assert "    raise ValueError('ä')" in said[0].splitlines()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n1 / 0")))
    with pytest.raises(InputError, match="--hook <stdin>:2: ZeroDivisionError"):
        HookFile(Path("-"), said.append)


def test_a_file_that_is_not_there_and_options_out_of_range(tmp_path: Path) -> None:
    run = CliRunner().invoke
    assert "does not exist" in run(command, ["--hook", str(tmp_path / "none.py")]).stderr
    assert "Missing option '--hook'" in run(command, []).stderr
    file = tmp_path / "hook.py"
    file.write_text("def on_packet(packet, seen): pass\n")
    assert "0.0 is not in the range" in run(command, ["--hook", str(file), "--timeout", "0"]).stderr
    result = run(command, ["--hook", str(file), "pods=x/a"])
    assert isinstance(result.exception, InputError)
    assert "did you mean pod=?" in str(result.exception)


# --- packets made to fit ---------------------------------------------------------------------------------

ENDS4, ENDS6 = {"src": "10.0.0.1", "dst": "10.0.0.2"}, {"src": "fd00::1", "dst": "fd00::2"}


@pytest.mark.parametrize(
    "packet",
    [
        IP(**ENDS4) / UDP(sport=7, dport=9) / b"hello",
        IP(**ENDS4, options=b"\x01" * 4) / TCP(sport=7, dport=9, options=[("MSS", 1400)]) / b"hello",
        IP(**ENDS4) / ICMP(id=7, seq=2) / b"hello",
        IPv6(**ENDS6) / UDP(sport=7, dport=9) / b"hello",
        IPv6(**ENDS6) / IPv6ExtHdrHopByHop() / TCP(sport=7, dport=9) / b"hello",
        IPv6(**ENDS6) / ICMPv6EchoRequest(id=7, data=b"hello"),
        IP(**ENDS4) / SCTP(sport=7, dport=9, tag=1) / SCTPChunkInit(init_tag=2),
    ],
    ids=lambda packet: packet.summary(),
)
def test_lengths_and_checksums_are_made_to_fit(packet: Any) -> None:
    whole = bytes(packet)
    network = type(packet)
    assert rebuilt(network(whole)) == whole
    changed = network(whole)
    if Raw in changed:
        changed[Raw].load = b"another load, and a longer one"
    if network is IP:
        changed.ttl = 3
    again = network(rebuilt(changed))
    assert rebuilt(again) == bytes(again)
    said = again.len if network is IP else 40 + again.plen
    assert said == len(bytes(again))
    if Raw in changed:
        assert again[Raw].load == b"another load, and a longer one"


def test_what_an_error_quotes_and_a_fragment_carries_stays(tmp_path: Path) -> None:
    quoted = bytearray(bytes(IP(**ENDS4) / UDP(sport=7, dport=9) / b"hello"))
    quoted[26] ^= 0xFF  # the checksum of what was sent is not ours to mend
    error = IP(bytes(IP(src="10.0.0.9", dst="10.0.0.1") / ICMP(type=3, code=1) / bytes(quoted)))
    assert rebuilt(error) == bytes(error)
    error.ttl = 3
    assert rebuilt(error)[28:] == bytes(quoted)
    first, second = fragment(IP(**ENDS4, id=5) / UDP(sport=7, dport=9) / (b"x" * 2000), 1000)[:2]
    for one in (first, second):
        whole = bytes(one)
        changed = IP(whole)
        changed.ttl = 3
        assert rebuilt(changed)[20:] == whole[20:]


# --- the examples ----------------------------------------------------------------------------------------


def example(name: str) -> HookFile:
    return HookFile(EXAMPLES / name, pytest.fail)


def test_example_lose_syns() -> None:
    made = example("lose_syns.py")
    syn = {**RECORD, "tcp_flags": "SYN"}
    packet = bytes(IP(**ENDS4) / TCP(sport=7, dport=9))
    got = [made.answer({**syn, "src_port": port}, packet) for port in (1, 1, 2, 3, 2)]
    assert got == [{"verdict": "drop"}, {}, {}, {"verdict": "drop"}, {}]
    assert made.answer({**RECORD, "tcp_flags": "ACK"}, packet) == {}
    assert made.counts == Counter({"connections": 3, "SYNs sent again": 2})


def test_example_slow_dns() -> None:
    made = example("slow_dns.py")
    question = IP(**ENDS4) / UDP(sport=7, dport=53) / DNS(qd=DNSQR(qname="db.shop"))
    answer = (
        IP(**ENDS4)
        / UDP(sport=53, dport=7)
        / DNS(qr=1, qd=DNSQR(qname="db.shop"), an=DNSRR(rrname="db.shop", rdata="10.0.0.3"))
    )
    assert made.answer(RECORD, bytes(question)) == {}
    assert made.answer(RECORD, bytes(answer)) == {"delay": 0.3}
    assert made.answer(RECORD, UDP4) == {}
    assert made.counts == Counter({"db.shop.": 1})


def client_hello(name: str) -> bytes:
    """The first bytes that Python's own TLS client sends."""
    import ssl

    inward, outward = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(inward, outward, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outward.read()


def test_example_tls_names(capsys: pytest.CaptureFixture[str]) -> None:
    made = example("tls_names.py")
    names = {"db.example": {}, "www.blocked.example": {"verdict": "drop"}, "notblocked.example": {}}
    for name, wish in names.items():
        hello = client_hello(name)
        packet = bytes(IP(**ENDS4) / TCP(sport=7, dport=443, flags="PA") / hello)
        assert made.answer({**RECORD, "dst_port": 443}, packet) == wish
        for cut in range(0, len(hello), 7):  # a piece of it is no name, or the whole one
            made.answer(RECORD, bytes(IP(**ENDS4) / TCP(sport=7, dport=443) / hello[:cut]))
    assert made.answer(RECORD, UDP4) == {}
    assert set(made.counts) == set(names)
    assert "x/a asks 10.0.0.2:443 for db.example" in capsys.readouterr().out


def test_what_is_seen_is_a_record() -> None:
    seen = Seen({"verdict": "deny"}, Counter())
    assert seen.verdict == "deny"
    assert seen.record == {"verdict": "deny"}
    assert not hasattr(seen, "src_pod")
