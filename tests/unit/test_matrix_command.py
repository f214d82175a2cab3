"""`podgate matrix` as a person meets it: tables that fit, notes, errors."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from dataplane.addresses import parse_address
from dataplane.cli.matrix import command, notes, summary, table
from dataplane.errors import InputError
from dataplane.model import Direction, Key
from dataplane.reachability import Place, Reachability

POD = """\
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}}}
status: {{phase: Running, hostIP: 192.0.2.1, podIPs: [{{ip: {ip}}}]}}
---
"""
DENY = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: x}
spec: {podSelector: {}, policyTypes: [Ingress]}
"""
PODS = "".join(
    POD.format(namespace=namespace, name=name, ip=f"10.0.0.{number}")
    for number, (namespace, name) in enumerate((("x", "a"), ("x", "b"), ("y", "c")), 1)
)


def run(tmp_path: Path, text: str, *options: str) -> Result:
    path = tmp_path / "dump.yaml"
    path.write_text(text)
    return CliRunner().invoke(command, [str(path), *options])


def reach(namespaces: dict[str | None, int], *rows: str) -> Reachability:
    """So many places per namespace (None: outside), with these marks at 80/TCP."""
    places = tuple(
        Place(
            f"{namespace}/p{number}" if namespace else f"203.0.113.{number}",
            parse_address(f"10.0.0.{number}"),
            Key(namespace, f"p{number}") if namespace else None,
            isolated_by={Direction.INGRESS: (Key("x", "p"),)},
        )
        for namespace, count in namespaces.items()
        for number in range(1, count + 1)
    )
    return Reachability(4, places, {"80/TCP": rows}, (), {}, {})


def lines(reach: Reachability, width: int | None) -> list[str]:
    return [click.unstyle(line) for line in table(reach, width)]


def test_a_table(tmp_path: Path) -> None:
    done = run(tmp_path, PODS + DENY, "--port", "80/TCP", "--external", "203.0.113.9")
    assert done.exit_code == 0
    assert done.stderr == ""
    assert done.stdout == (
        "80/TCP  6 of 12 pairs allowed, 6 denied (6 by ingress)\n"
        "\n"
        "               x      y   outside\n"
        "from \\ to      a  b   c   203.0.113.9\n"
        "x\n"
        "  a            .  I   .        .\n"
        "  b            I  .   .        .\n"
        "y\n"
        "  c            I  I   .        .\n"
        "outside\n"
        "  203.0.113.9  I  I   .        .\n"
        "\n"
        ". allowed  I denied by ingress\n"
    )


def test_json_is_the_contract(tmp_path: Path) -> None:
    done = run(tmp_path, PODS + DENY, "--port", "80", "--port", "ICMP", "-o", "json")
    rows = [".X.", "X..", "XX."]
    assert json.loads(done.stdout) == {
        "order": ["x/a", "x/b", "y/c"],
        "cells": {"80/TCP": rows, "ICMP": rows},
    }


def test_warnings_do_not_mix_with_data(tmp_path: Path) -> None:
    bad = DENY.replace("podSelector: {}", "podSelector: {}, ingress: [{from: [{ipBlock: {cidr: nonsense}}]}]")
    done = run(tmp_path, PODS + bad, "--port", "80", "-o", "json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["cells"] == {"80/TCP": [".X.", "X..", "XX."]}
    (line,) = done.stderr.splitlines()
    assert line.startswith("podgate: warning: ")
    assert "NetworkPolicy x/deny" in line


def test_what_is_not_in_the_table_is_said(tmp_path: Path) -> None:
    six = POD.format(namespace="z", name="six", ip='"fd00::1"')
    done = run(tmp_path, PODS + six, "--port", "80")
    assert done.exit_code == 0
    assert done.stderr == (
        "podgate: left out, no IPv4 address: z/six\n"
        "podgate: no policy here isolates any pod, so everything is allowed\n"
    )
    crowd = tuple(Key("z", f"p{number}") for number in range(7))
    assert list(notes(Reachability(4, reach({"x": 1}, ".").places, {}, (), {}, {}, crowd))) == [
        "left out, no IPv4 address: z/p0, z/p1, z/p2, z/p3, z/p4 and 2 more"
    ]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (DENY, ("--port", "80"), "kubectl get netpol,pods,ns,svc -A -o yaml"),
        (PODS, ("--port", "http"), "--port http: write it as 80/TCP"),
        (PODS, ("--port", "80", "--family", "6"), "no pod has an IPv6 address"),
    ],
)
def test_what_cannot_be_answered_is_one_line(
    tmp_path: Path, text: str, options: tuple[str, ...], message: str
) -> None:
    done = run(tmp_path, text, *options)
    assert isinstance(done.exception, InputError)
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)


def on_terminal(columns: int, *options: str) -> tuple[int, str, str]:
    """Exit code, and what a terminal of so many columns shows of stdout; stderr is a pipe."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", "from dataplane.cli import main; main()", "matrix", *options],
        stdout=theirs,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": str(columns), "TERM": "xterm"},
    ) as process:
        os.close(theirs)
        shown = b""
        # Linux says that nobody has the other side open any more as an I/O error.
        with contextlib.suppress(OSError), open(ours, "rb", buffering=0) as terminal:
            while piece := terminal.read(4096):
                shown += piece
        _, errors = process.communicate(timeout=60)
    return process.returncode, shown.decode().replace("\r\n", "\n"), errors


def test_colour_and_width_of_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "dump.yaml"
    path.write_text(PODS + DENY)
    code, shown, errors = on_terminal(60, str(path), "--port", "80")
    assert (code, errors) == (0, "")
    assert "\x1b[31m\x1b[1mI\x1b[0m" in shown
    assert "\n  a        .  I   .\n" in click.unstyle(shown)
    code, shown, _ = on_terminal(12, str(path), "--port", "80")
    assert code == 0
    assert "less -S" in shown


def test_a_page_is_not_printed_on_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "dump.yaml"
    path.write_text(PODS + DENY)
    assert on_terminal(80, str(path), "--port", "80", "-o", "html") == (
        2,
        "",
        "podgate: -o html prints a whole page: send it to a file, as in `-o html > page.html`\n",
    )


def test_a_page(tmp_path: Path) -> None:
    done = run(tmp_path, PODS + DENY, "--port", "80", "-o", "html")
    assert done.exit_code == 0
    assert done.stdout.lower().startswith("<!doctype html>")
    assert done.stdout.rstrip().lower().endswith("</html>")


def test_without_a_port_those_that_most_pods_declare_are_shown(tmp_path: Path) -> None:
    def web(name: str, number: int, *ports: int) -> str:
        declared = ", ".join(f"{{containerPort: {port}}}" for port in ports)
        pod = POD.format(namespace="x", name=name, ip=f"10.0.1.{number}")
        return pod.replace("status:", f"spec: {{containers: [{{name: c, ports: [{declared}]}}]}}\nstatus:")

    text = PODS + web("d", 1, 80, 443, 9001) + web("e", 2, 443, 8080, 8080) + web("f", 3, 80, 8080)
    done = run(tmp_path, text, "-o", "json")
    assert list(json.loads(done.stdout)["cells"]) == ["80/TCP", "443/TCP", "8080/TCP"]
    assert "there are also 9001/TCP\n" in done.stderr
    assert list(json.loads(run(tmp_path, PODS, "-o", "json").stdout)["cells"]) == ["80/TCP"]


def test_what_was_skipped_is_one_line(tmp_path: Path) -> None:
    other = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d, namespace: x}\n---\n"
    done = run(tmp_path, other * 2 + PODS, "--port", "80/TCP", "-o", "json")
    assert done.exit_code == 0
    assert done.stderr.splitlines()[0] == "podgate: skipped what has no meaning here: 2 Deployment"


def test_who_denies_can_be_told_without_colour() -> None:
    both = reach({"x": 2, None: 2}, ".EIX", "E.X.", "I..-", "..-.")
    shown = lines(both, 80)
    assert shown[0] == "80/TCP  4 of 10 pairs allowed, 6 denied (2 by egress, 2 by ingress, 2 by both)"
    assert shown[5:7] == [
        "  p1           .   E         I            X",
        "  p2           E   .         X            .",
    ]
    assert shown[-1] == (". allowed  E denied by egress  I denied by ingress  X denied by both  - not judged")


def test_numbers_replace_names_that_do_not_fit() -> None:
    row = "." * 12
    shown = lines(reach({"x": 10, "y": 2}, *[row] * 12), 40)
    assert shown[2:5] == [
        "                             1  1 1",
        "from \\ to  1 2 3 4 5 6 7 8 9 0  1 2",
        "x",
    ]
    assert shown[5] == "   1 p1    . . . . . . . . . .  . ."
    assert shown[14:17] == [
        "  10 p10   . . . . . . . . . .  . .",
        "y",
        "  11 p1    . . . . . . . . . .  . .",
    ]


def test_namespaces_replace_pods_that_do_not_fit() -> None:
    # Inside x all, from one of x's 20 pods to y, none of y to x, all but one inside y.
    to_x, to_y = "." * 20, "E" * 20
    rows = [to_x + "." * 20, *[to_x + to_y] * 19, *["I" * 20 + to_x] * 19, "I" * 20 + "X" + "." * 19]
    assert lines(reach({"x": 20, "y": 20}, *rows), 40) == [
        "80/TCP  779 of 1,560 pairs allowed, 781 denied (380 by egress, 400 by ingress, 1 by both)",
        "",
        "from \\ to    1   2",
        "  1 x (20)   .  5%",
        "  2 y (20)   X  99%",
        "",
        ". all pairs allowed  X none  42% of the pairs  (42) pods",
        "Pair by pair it takes 91 columns, this terminal has 40:"
        " use -o html > page.html, -o json, or pipe into `less -S`",
    ]


@pytest.mark.parametrize("size", [1, 9, 10, 99, 100, 130])
def test_no_line_of_a_table_wraps(size: int) -> None:
    half = size // 2
    wide = reach({"a-namespace": size - half, "b": half}, *["." * size] * size)
    for width in (20, 30, 60, 100, 220, 300):
        shown = lines(wide, width)
        head, foot = shown[0], shown[-2:]
        for line in shown:
            assert len(line) <= width or line == head or line in foot, (width, line)
    # Without a terminal every pair is there.
    assert sum(line.count(".") for line in lines(wide, None)[2:-1]) == size * size


def test_the_hint_says_what_else_to_do() -> None:
    wide = reach({"x": 130}, *["." * 130] * 130)
    assert "-o html > page.html" in lines(wide, 80)[-1]
    assert "less -S" in lines(wide, 20)[-1]


def test_a_summary_leaves_the_diagonal_out() -> None:
    assert summary(["."]) == "0 of 0 pairs allowed, 0 denied"
    assert summary(["..", ".."]) == "2 of 2 pairs allowed, 0 denied"
    assert summary([".X", "-."]) == "0 of 1 pairs allowed, 1 denied (1 by both)"
