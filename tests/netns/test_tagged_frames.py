"""Tagged frames of bridged pods are dropped by ebtables: made, kept, taken away."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import TypeVar

import pytest
from conftest import LabFactory

from dataplane.config import IptablesVariant
from dataplane.errors import KernelError
from dataplane.lab.world import Lab
from dataplane.node import tagged_frames, tools

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(
        shutil.which("ebtables-nft") is None, reason="needs ebtables-nft: apt-get install iptables"
    ),
]
NFT = IptablesVariant.NFT
_T = TypeVar("_T")


def saved(lab: Lab) -> list[str]:
    """Every rule of ebtables on the node."""
    lines = lab.run("node", "ebtables-nft-save").stdout.splitlines()
    return [line for line in lines if line.startswith("-A")]


def test_ports_come_and_go(lab: LabFactory) -> None:
    one = lab(["x/a"])

    def act(function: Callable[[], _T]) -> _T:
        return one.inside("node", function)

    act(lambda: tagged_frames.put(NFT, ()))
    assert one.run("node", "ebtables-nft-save").stdout == "", "nothing is made where there is no bridge"
    assert act(lambda: tagged_frames.differences(NFT, ())) == []
    one.run("node", "ebtables-nft", "-t", "nat", "-A", "PREROUTING", "-i", "other", "-j", "ACCEPT")
    foreign = saved(one)

    act(lambda: tagged_frames.put(NFT, {"veth1", "veth2"}))
    both = saved(one)
    assert "-A PODGATE-TAGGED-FROM -i veth1 -j DROP" in both
    assert "-A PODGATE-TAGGED-TO -o veth2 -j DROP" in both
    assert set(foreign) < set(both)
    assert act(lambda: tagged_frames.differences(NFT, {"veth1", "veth2"})) == []
    assert len(act(lambda: tagged_frames.differences(NFT, {"veth1"}))) == 2
    act(lambda: tagged_frames.put(NFT, {"veth1", "veth2"}))
    assert saved(one) == both

    act(lambda: tagged_frames.put(NFT, {"veth2"}))
    assert not [line for line in saved(one) if "veth1" in line]
    assert len(saved(one)) == len(both) - 2

    one.run("node", "ebtables-nft", "-t", "filter", "-F", "FORWARD")
    assert act(lambda: tagged_frames.differences(NFT, {"veth2"})) == [
        "ebtables chain PODGATE-TAGGED-TO was changed"
    ]
    act(lambda: tagged_frames.put(NFT, {"veth2"}))
    assert len(saved(one)) == len(both) - 2

    act(lambda: tagged_frames.put(NFT, ()))
    assert act(lambda: tagged_frames.differences(NFT, ())) == []
    assert not [line for line in saved(one) if "veth" in line]
    assert act(tagged_frames.remove) == [
        "ebtables: chain PODGATE-TAGGED-FROM",
        "ebtables: chain PODGATE-TAGGED-TO",
    ]
    assert saved(one) == foreign
    assert act(tagged_frames.remove) == []


def test_without_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "find", lambda _name: None)
    tagged_frames.put(NFT, ())
    assert tagged_frames.differences(NFT, ()) == []
    assert tagged_frames.remove() == []
    with pytest.raises(KernelError, match="apt-get install"):
        tagged_frames.put(NFT, {"veth1"})


def test_a_kernel_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise KernelError("ebtables-save: not supported")

    monkeypatch.setattr(tools, "find", lambda name: f"/sbin/{name}")
    monkeypatch.setattr(tools, "run", refuse)
    tagged_frames.put(NFT, ())
    assert tagged_frames.differences(NFT, ()) == []
    assert tagged_frames.remove() == []
    with pytest.raises(KernelError, match="not supported"):
        tagged_frames.put(NFT, {"veth1"})
