"""The end-to-end test itself, as far as it goes without a cluster."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from cases import CASES, PODS, PORTS, Case, Names, parse_table
from click.testing import CliRunner
from installation import DEPLOY, image_reference, kustomization
from kubectl import Kubectl, KubectlError, last_words
from probes import Probe, pod, questions

from dataplane.cli.matrix import command as matrix_command

HERE = Path(__file__).parent
ADDRESSES = {name: [f"10.0.0.{number}", f"fd00::{number}"] for number, name in enumerate(PODS, 1)}
NAMES = Names({"x": "ns-x", "y": "ns-y"}, ADDRESSES)


@pytest.fixture(scope="module")
def run() -> ModuleType:
    """`python tests/e2e`, imported."""
    spec = importlib.util.spec_from_file_location("podgate_e2e", HERE / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules["podgate_e2e"] = made
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("family", [4, 6])
def test_tables_are_what_the_policies_mean(case: Case, family: int, tmp_path: Path) -> None:
    """Written by hand, and the same by podgate's own matrix."""
    objects = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
        for name in NAMES.namespaces.values()
    ]
    for name in PODS:
        place, app = name.split("/")
        made = pod(name, NAMES.namespaces[place], app, "podgate:1")
        ips = [{"ip": address} for address in ADDRESSES[name]]
        objects.append({**made, "status": {"phase": "Running", "hostIP": "192.0.2.1", "podIPs": ips}})
    (tmp_path / "dump.yaml").write_text(yaml.safe_dump_all([*objects, *case.policies(NAMES)]))
    ports = [part for port in PORTS for part in ("--port", port)]
    done = CliRunner().invoke(
        matrix_command, [str(tmp_path / "dump.yaml"), *ports, "--family", str(family), "-o", "json"]
    )
    assert done.exit_code == 0, done.output
    matrix = json.loads(done.stdout)
    order = [NAMES.namespaces[name[0]] + name[1:] for name in PODS]
    assert matrix["order"] == order
    seen = {
        (source, destination, port): matrix["cells"][port][row][column] == "."
        for row, source in enumerate(PODS)
        for column, destination in enumerate(PODS)
        for port in PORTS
    }
    assert seen == case.expected()


@pytest.mark.parametrize(
    "text", ["", "xa * * * *", "xa * *\nxb * *\nya * *\nyb * *", CASES[0].table.replace("*", "q")]
)
def test_what_is_no_table_is_an_error(text: str) -> None:
    with pytest.raises(ValueError):
        parse_table(text)


def test_wrong_answers_are_found_whichever_way_they_are_wrong(run: ModuleType) -> None:
    asked = questions(ADDRESSES, ["10.9.0.1", "fd09::1"])
    case = CASES[1]  # default-deny in x
    right = {probe: case.expected()[probe[:3]] for probe in asked}
    assert run.wrong(case, right) == []
    opened = Probe("y/a", "x/a", "8080/TCP", 6, by_service=True)
    closed = Probe("x/a", "y/b", "8080/UDP", 4)
    assert run.wrong(case, {**right, opened: True, closed: False}) == [closed, opened]
    assert str(opened) == "IPv6 y/a > x/a by its Service 8080/TCP"


def test_only_families_that_both_ends_have_are_asked() -> None:
    both = questions(ADDRESSES, ["10.9.0.1"])
    assert len(both) == 4 * 4 * 3 * 2 + 3
    assert both[Probe("y/b", "x/a", "8080/TCP", 4, by_service=True)] == "10.9.0.1,80,TCP"
    assert both[Probe("y/b", "x/a", "8080/UDP", 6)] == "fd00::1,8080,UDP"
    single = {name: addresses[:1] for name, addresses in ADDRESSES.items()}
    assert {probe.family for probe in questions(single, ["10.9.0.1", "fd09::1"])} == {4}


@pytest.mark.parametrize(
    ("image", "entry"),
    [
        ("podgate", {"newName": "podgate"}),
        ("localhost:5000/podgate", {"newName": "localhost:5000/podgate"}),
        ("localhost:5000/a/podgate:0.1.0", {"newName": "localhost:5000/a/podgate", "newTag": "0.1.0"}),
        ("r.example/podgate@sha256:ab", {"newName": "r.example/podgate", "digest": "sha256:ab"}),
        ("podgate:1@sha256:ab", {"newName": "podgate", "newTag": "1", "digest": "sha256:ab"}),
    ],
)
def test_images_as_people_write_them(image: str, entry: dict[str, str]) -> None:
    assert image_reference(image) == {"name": "podgate", **entry}


@pytest.mark.parametrize("image", ["", ":tag", "podgate@md5:1"])
def test_what_is_no_image(image: str, run: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run.parse(["--image", image])
    assert ended.value.code == 2
    assert "is no image" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, which renders kustomizations")
@pytest.mark.parametrize("components", [(), ("uninstall",)])
def test_the_overlay_renders(tmp_path: Path, components: tuple[str, ...]) -> None:
    base = os.path.relpath(DEPLOY, os.path.realpath(tmp_path))
    overlay = kustomization(base, "r.example/podgate:7", {"PODGATE_VETH_PREFIX": "cali"}, components)
    (tmp_path / "kustomization.yaml").write_text(json.dumps(overlay))
    (daemonset,) = [
        one for one in yaml.safe_load_all(Kubectl()("kustomize", str(tmp_path))) if one["kind"] == "DaemonSet"
    ]
    (container,) = daemonset["spec"]["template"]["spec"]["containers"]
    environment = {one["name"]: one.get("value") for one in container["env"]}
    assert container["image"] == "r.example/podgate:7"
    assert environment["PODGATE_VETH_PREFIX"] == "cali"
    assert environment.get("PODGATE_ON_STOP") == ("clean" if components else None)
    assert "NODE_NAME" in environment


def test_a_missing_kubectl_is_named() -> None:
    with pytest.raises(KubectlError, match="no-such-kubectl: not found; install kubectl"):
        Kubectl("no-such-kubectl")("version")


def test_kubectls_log_is_left_out_of_what_it_says() -> None:
    log = 'E1126 14:33:22.195366   30147 memcache.go:265] "Unhandled Error" err="refused"\n'
    assert last_words(log * 3 + "The connection was refused\n") == "The connection was refused"
    assert last_words("Error from server (NotFound)\n") == "Error from server (NotFound)"


@pytest.mark.netns
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a network namespace")
def test_pods_answer_each_other_on_every_port_and_family() -> None:
    peer = f"{sys.executable} {HERE / 'peer.py'}"
    targets = [
        f"{family}{port}{protocol},{address},{port},{protocol}"
        for family, address in ((4, "127.0.0.1"), (6, "::1"))
        for port, protocol in ((8080, "TCP"), (8081, "TCP"), (8080, "UDP"), (9, "TCP"), (9, "UDP"))
    ]
    script = f"""
        ip link set lo up
        {peer} serve x/a & server=$!
        trap 'kill $server' EXIT
        until {peer} ask ready,127.0.0.1,8081,TCP | grep -q x/a; do :; done
        {peer} ask {" ".join(targets)}
    """
    done = subprocess.run(
        ["unshare", "--net", "bash", "-euc", script], capture_output=True, text=True, check=True, timeout=60
    )
    answers = json.loads(done.stdout)
    assert {key for key, answer in answers.items() if answer == "x/a"} == {
        f"{family}{port}" for family in (4, 6) for port in ("8080TCP", "8081TCP", "8080UDP")
    }
    assert {answers[f"{family}9{protocol}"] for family in (4, 6) for protocol in ("TCP", "UDP")} == {None}
