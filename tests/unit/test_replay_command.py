"""`podgate replay` as a person meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import captures
import pytest
from click.testing import CliRunner, Result
from test_replay import BACKEND, CLIENT, FRONTEND, OUTSIDE, STARS, tcp

from dataplane.cli.captures import columns
from dataplane.cli.replay import command
from dataplane.errors import InputError

PODGATE = (sys.executable, "-c", "from dataplane.cli import main; main()")
PACKETS = [
    tcp(CLIENT, 40000, FRONTEND, 80, "S"),
    tcp(FRONTEND, 80, CLIENT, 40000, "SA"),
    tcp(CLIENT, 40001, BACKEND, 6379, "S"),
]
# The flow log's, which other people's scripts rely on.
FIELDS = (
    *("ts", "verdict", "reason", "direction", "policy", "src", "src_port", "dst", "dst_port", "protocol"),
    *("src_pod", "dst_pod", "node"),
)


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    frames = [(1e9 + number, captures.frame(1, bytes(each))) for number, each in enumerate(PACKETS)]
    return captures.write(tmp_path / "dump.pcap", captures.pcap(captures.ETHERNET, frames))


def run(*argv: object) -> Result:
    return CliRunner().invoke(command, [str(each) for each in argv])


def test_packets_and_who_talked_to_whom(dump: Path) -> None:
    lines = run(dump, STARS).stdout.splitlines()
    assert [line.split()[1] for line in lines[:3]] == ["allow", "allow", "deny"]
    assert "client/client:40001 > stars/backend:6379" in lines[2]
    assert lines[2].endswith("  evaluated")
    assert "  ingress: no-rule (isolated by stars/allow-ui, stars/backend, stars/default-deny)  " in lines[2]
    assert lines[4].startswith(f"{dump}: 3 packets, 2 s from ")
    assert lines[4].endswith(", Ethernet")
    assert lines[5] == "2 flows of pods: 1 allowed, 1 denied"
    assert [" ".join(line.split()) for line in lines[7:]] == [
        "VERDICT FROM TO PORT FLOWS PACKETS BYTES DECIDED BY",
        "deny client/client stars/backend 6379/TCP 1 1 40 ingress: no-rule",
        "allow client/client stars/frontend 80/TCP 1 2 80 ingress: policy-rule of stars/frontend rule 0",
        "",
        "POLICY FLOWS PACKETS BYTES",
        "stars/frontend allowed 1 2 80",
        "no ingress rule of stars/allow-ui, stars/backend, stars/default-deny allowed 1 1 40",
    ]


def test_the_summary_alone(dump: Path) -> None:
    result = run(dump, STARS, "--summary")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{dump}: 3 packets")


def test_json_has_a_record_for_each_packet(dump: Path) -> None:
    records = [json.loads(line) for line in run(dump, STARS, "-o", "json").stdout.splitlines()]
    assert [(record["verdict"], record["reason"], record["reply"]) for record in records] == [
        ("allow", "policy-rule", False),
        ("allow", "reply", True),
        ("deny", "no-rule", False),
    ]
    assert all(field in record for record in records for field in FIELDS)
    assert (
        records[0]
        | {
            "ts": "2001-09-09T01:46:40.000000+00:00",
            "src": CLIENT,
            "src_port": 40000,
            "dst_pod": "stars/frontend",
            "policy": "stars/frontend",
            "tcp_flags": "SYN",
            "node": None,
        }
        == records[0]
    )


def test_json_of_the_summary_and_of_a_change(dump: Path) -> None:
    document = json.loads(run(dump, STARS, "--summary", "-o", "json", "--diff", STARS / "pods.yaml").stdout)
    assert document["capture"] | {"packets": 3, "link": "Ethernet", "error": None} == document["capture"]
    assert document["verdicts"] == {
        "allow": {"policy-rule": {"packets": 1, "bytes": 40}, "reply": {"packets": 1, "bytes": 40}},
        "deny": {"no-rule": {"packets": 1, "bytes": 40}},
    }
    assert all(field in flow for flow in document["flows"] for field in FIELDS)
    assert [
        (flow["dst_pod"], flow["packets"], flow["reply_packets"], flow["began"]) for flow in document["flows"]
    ] == [("stars/frontend", 1, 1, "opened"), ("stars/backend", 1, 0, "opened")]
    assert document["policies"] == [{"policy": "stars/frontend", "flows": 1, "packets": 2, "bytes": 80}]
    (change,) = document["changes"]
    assert change == {
        "verdict": "allow",
        "reason": "not-isolated",
        "src": "client/client",
        "dst": "stars/backend",
        "protocol": "TCP",
        "dst_port": 6379,
        "flows": 1,
        "packets": 1,
        "bytes": 40,
    }


def test_what_a_change_of_policies_would_do(dump: Path) -> None:
    closed = ("--diff", STARS / "pods.yaml", "--diff", STARS / "01-default-deny.yaml")
    lines = run(dump, STARS, *closed).stdout.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("With "))
    assert lines[at].endswith(": 1 flow newly denied, 0 newly allowed")
    assert " ".join(lines[at + 2].split()) == (
        "newly denied client/client stars/frontend 80/TCP 1 2 80 ingress: no-rule"
    )
    same = run(dump, STARS, "--diff", STARS).stdout
    assert same.rstrip().endswith("0 flows newly denied, 0 newly allowed")


def test_notes_tell_how_the_numbers_came_about(tmp_path: Path) -> None:
    frames = [
        captures.frame(1, bytes(tcp(BACKEND, 6379, FRONTEND, 40000, "SA"))),
        bytes(12) + b"\x08\x06" + bytes(28),
        captures.frame(1, bytes(tcp(OUTSIDE, 40000, "198.51.100.7", 443, "S"))),
        captures.frame(1, b"\x45" + bytes(8)),
    ]
    path = captures.write(
        tmp_path / "c", captures.pcapng(1, [(1e9 + number, each) for number, each in enumerate(frames)])
    )
    notes = [line for line in run(path, STARS, "--summary").stdout.splitlines() if line.startswith("note:")]
    assert notes == [
        "note: 1 frame without IP passed over",
        "note: 1 flow began before the capture; their direction: 1 told by a first packet that answers",
        "note: 1 flow (1 packet) between addresses that are no pods here: no matter of policy",
        "note: 1 packet denied, malformed: of no flow",
    ]
    notes = run(path, STARS, "--summary", "--filter", "tcp port 6379").stdout
    assert "note: 2 packets left out by the filter" in notes


def test_a_service_address_is_not_what_policies_judge(tmp_path: Path) -> None:
    service = tmp_path / "service.yaml"
    service.write_text(
        "{apiVersion: v1, kind: Service, metadata: {name: web, namespace: stars},"
        " spec: {clusterIP: 172.20.0.10, ports: [{port: 80}], selector: {app: frontend}}}"
    )
    packet = bytes(tcp(CLIENT, 40000, "172.20.0.10", 80, "S"))
    path = captures.write(tmp_path / "c", captures.pcap(captures.RAW, [(1, packet)]))
    output = run(path, STARS, service, "--summary").stdout
    assert "note: 1 flow to the ClusterIP of stars/web: policies judge packets as they are sent on" in output


def test_a_capture_without_known_pods(dump: Path) -> None:
    output = run(dump, STARS / "01-default-deny.yaml", "--summary").stdout
    assert "no flow of a pod that is known here" in output
    assert "note: no pod is known here: give Pod objects too" in output


def test_a_capture_that_ends_early_is_read_with_a_warning(dump: Path) -> None:
    dump.write_bytes(dump.read_bytes()[:-3])
    result = run(dump, STARS, "--summary")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{dump}: 2 packets")
    (warning,) = result.stderr.splitlines()
    assert warning.startswith(f"podgate: warning: {dump}: truncated dump file")
    assert warning.endswith("; 2 packets before that were read")


def test_long_summaries_are_cut_unless_asked_for(tmp_path: Path) -> None:
    frames = [(1e9, bytes(tcp(CLIENT, 40000, BACKEND, port, "S"))) for port in range(1, 61)]
    path = captures.write(tmp_path / "c", captures.pcap(captures.RAW, frames))
    assert "and 10 more (--all shows them)" in run(path, STARS, "--summary").stdout
    assert "more (--all" not in run(path, STARS, "--summary", "--all").stdout


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.pcap", STARS], "nowhere.pcap: No such file or directory"),
        ([STARS, STARS], "Is a directory"),
        ([STARS / "pods.yaml", STARS], "no capture that can be read (pcap or pcapng): unknown file format"),
        (["nowhere.pcap", "nothing.yaml"], "nothing.yaml"),
        (["nowhere.pcap", STARS, "--filter", "port web and"], "--filter 'port web and': "),
        (["nowhere.pcap", STARS, "--diff", "nothing.yaml"], "nothing.yaml"),
    ],
)
def test_bad_input_is_one_line(argv: list[Any], message: str) -> None:
    error = run(*argv).exception
    assert isinstance(error, InputError)
    assert message in str(error)
    assert "\n" not in str(error)


def test_standard_input_and_exit_status(dump: Path) -> None:
    argv = [*PODGATE, "replay", "-", str(STARS), "-o", "json"]
    done = subprocess.run(argv, stdin=dump.open("rb"), capture_output=True, check=False)
    assert (done.returncode, len(done.stdout.splitlines()), done.stderr) == (0, 3, b"")
    done = subprocess.run([*PODGATE, "replay", str(STARS), str(STARS)], capture_output=True, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, b"", 1)


def test_columns_stand_below_each_other_whatever_their_colour() -> None:
    rows = [("A", "N"), ("\x1b[31mlong\x1b[0m", "1,000"), ("b", "7")]
    assert list(columns(rows, frozenset({1}))) == ["A         N", "\x1b[31mlong\x1b[0m  1,000", "b         7"]
