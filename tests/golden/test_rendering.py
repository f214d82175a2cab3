"""The rules, as text, for each combination of options.

A file in `steering/` is exactly what iptables-restore gets on a machine without any rule of ours. To
write them anew after a change that is meant: PODGATE_UPDATE_GOLDEN=1 pytest tests/golden.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from dataplane.addresses import parse_address
from dataplane.config import MarkLayout
from dataplane.node.iptables import plan
from dataplane.node.rendering import COUNTED, FAMILIES, Options, Port, render

GOLDEN = Path(__file__).parent / "steering"
PORTS = (
    Port("veth2", (parse_address("10.244.1.2"), parse_address("fd00:244::2")), True, True, True),
    Port("veth1", (parse_address("10.244.1.1"),), False, False, True),
    Port("veth3", (parse_address("10.244.1.3"),), True, False, False),
)
CASES: dict[str, tuple[Options, tuple[Port, ...]]] = {
    "default": (Options(), ()),
    "no-offload": (Options(offload=False), ()),
    "fail-open-balance": (Options(queues=(4, 7), fail_open=True), ()),
    "one-queue-fail-open": (Options(queues=(9, 9), fail_open=True), ()),
    "strict": (Options(strict=True, veth_prefix="cali", not_pods=("vlan10", "calix")), ()),
    "other-marks": (Options(marks=MarkLayout.from_mask(0x00013000)), ()),
    "bridge": (Options(), PORTS),
    "bridge-no-offload": (Options(offload=False), PORTS),
    "reject": (Options(reject=True), ()),
    "reject-bridge-no-offload": (Options(reject=True, offload=False), PORTS),
    "audit-strict": (Options(strict=True, fail_open=True, audit=True), ()),
    "audit-bridge": (Options(fail_open=True, audit=True), PORTS),
    "watch": (Options(queues=(4, 7), watch=8), ()),
    "bridge-watch": (Options(watch=1), PORTS),
    "hook": (Options(queues=(4, 7), hook=9), ()),
    "hook-strict-fail-open": (Options(hook=2, strict=True, fail_open=True), ()),
    "bridge-hook-watch-no-offload": (Options(watch=1, hook=2, offload=False), PORTS),
    "many-ports": (
        Options(),
        tuple(
            Port(f"veth{number}", (parse_address(f"10.244.1.{number * 3}"),), False, False, True)
            for number in range(40)
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_rules_are_as_written(name: str, family: int) -> None:
    options, ports = CASES[name]
    text = plan({}, render(options, ports, family))
    path = GOLDEN / f"{name}-ipv{family}.txt"
    if os.environ.get("PODGATE_UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def test_every_file_belongs_to_a_case() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {
        f"{name}-ipv{family}.txt" for name in CASES for family in FAMILIES
    }


@pytest.mark.parametrize("name", CASES)
def test_the_order_of_ports_does_not_matter(name: str) -> None:
    options, ports = CASES[name]
    assert render(options, ports, 4) == render(options, ports[::-1], 4)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_jump_leads_to_a_chain_and_every_chain_is_used(name: str, family: int) -> None:
    options, ports = CASES[name]
    for rules in render(options, ports, family).values():
        targets = set(rules.jumps.values())
        for chain, body in rules.chains.items():
            assert len(chain) <= 28  # XT_EXTENSION_MAXNAMELEN - 1
            targets |= {
                word
                for rule in body
                for flag, word in zip(rule.split(), rule.split()[1:], strict=False)
                if flag in {"-j", "-g"} and word.startswith("PODGATE-")
            }
        assert targets == set(rules.chains)


@pytest.mark.parametrize("name", [name for name, (options, _) in CASES.items() if options.audit])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_audit_no_rule_drops_and_all_are_counted(name: str, family: int) -> None:
    options, ports = CASES[name]
    audit, enforced = (
        plan({}, render(each, ports, family)) for each in (options, replace(options, audit=False))
    )
    assert "DROP" not in audit
    assert "queue-bypass" in audit
    for reason in COUNTED:
        assert audit.count(f"podgate: {reason}") == enforced.count(f"podgate: {reason}")
