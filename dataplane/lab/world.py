"""A lab that is up: made from Pod objects, kept in files under /run, taken down without a trace."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from dataplane.addresses import family_of, format_address, parse_address
from dataplane.errors import InputError, KernelError
from dataplane.lab import netns, topology, wiring
from dataplane.lab.topology import LabPod, Plan, Topology, Wire
from dataplane.model import Key, Pod

HOME = Path("/run/podgate/lab")
OUTSIDE_PORTS = ((6, 80), (6, 443), (17, 53))
TIED = ("setpriv", "--pdeathsig", "TERM")  # before a command that must not outlive its parent
_T = TypeVar("_T")


class Lab:
    """One lab. `up` makes it, `open` finds one that is up.

    A place in it is written `node`, `outside`, `namespace/pod`, or the name of a network namespace.
    """

    def __init__(self, plan: Plan, server: tuple[int, int] | None = None) -> None:
        self.plan = plan
        self._server = server  # pid and start time

    # -- making and finding

    @classmethod
    def up(cls, name: str, pods: Sequence[Pod], topo: Topology | None = None, *, tied: bool = False) -> Lab:
        """Make the lab. Whatever fails, nothing of it is left.

        `tied`: its server ends when the calling thread does, even by SIGKILL.

        InputError: a lab or a namespace of this name exists, or the objects do not fit together.
        KernelError: this machine refuses.
        """
        plan = topology.plan(name, pods, topo or Topology())
        clash = next((space for space in plan.namespaces if netns.exists(space)), None)
        home = HOME / name
        if home.exists():
            raise InputError(f"a lab named {name} is up already; end it with: podgate lab down --name {name}")
        if clash:
            raise InputError(f"network namespace {clash} exists already; choose another --name")
        if os.geteuid():
            raise KernelError("a lab needs root: run it with sudo")
        HOME.mkdir(parents=True, exist_ok=True)
        try:
            home.mkdir(mode=0o700)
        except FileExistsError:
            raise InputError(f"a lab named {name} is being made by somebody else") from None
        lab = cls(plan)
        try:
            # Written before anything exists, so that `down` finds all of it after a crash at any point.
            lab._save()
            netns.ip(f"netns add {space}" for space in plan.namespaces)
            _apply(wiring.base(plan))
            for pod in plan.pods:
                if pod.wire is not Wire.HOST:
                    _apply(wiring.pod(plan, pod))
            if plan.topology.conntrack:
                lab._follow_connections()
            lab._start_server(tied)
        except BaseException:
            lab.down()
            raise
        return lab

    @classmethod
    def open(cls, name: str) -> Lab:
        """The lab of this name. InputError: none is up."""
        topology.check_name(name)
        try:
            raw = json.loads((HOME / name / "state.json").read_text())
        except FileNotFoundError:
            up = ", ".join(names()) or "none"
            raise InputError(
                f"no lab named {name} is up (up: {up}); make one with: podgate lab up PATH --name {name}"
            ) from None
        except (OSError, ValueError) as error:
            raise InputError(f"lab {name}: cannot read its state: {error}") from None
        return cls(_plan_from(raw), tuple(raw["server"]) if raw["server"] else None)

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    # -- what it is made of

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def node(self) -> str:
        """Network namespace of the node."""
        return self.plan.node

    @property
    def outside(self) -> str:
        """Network namespace of the world beyond the node's uplink."""
        return self.plan.outside

    @property
    def node_ips(self) -> tuple[bytes, ...]:
        return self.plan.node_ips

    @property
    def home(self) -> Path:
        """Where the lab keeps its files."""
        return HOME / self.name

    @property
    def pods(self) -> dict[Key, LabPod]:
        """Every pod, sorted by namespace and name."""
        return {pod.key: pod for pod in sorted(self.plan.pods, key=lambda pod: pod.key)}

    def pod(self, name: str | Key) -> LabPod:
        """A pod by `namespace/name`. InputError: the lab has none of this name."""
        key = (
            name
            if isinstance(name, Key)
            else Key(*name.split("/", 1))
            if "/" in name
            else Key("default", name)
        )
        try:
            return self.pods[key]
        except KeyError:
            known = " ".join(str(key) for key in self.pods)
            raise InputError(f"lab {self.name}: no pod {key}; places: node outside {known}") from None

    def netns(self, place: str | Key) -> str:
        """The network namespace of a place."""
        if place == "node":
            return self.node
        if place == "outside":
            return self.outside
        if isinstance(place, str) and place in self.plan.namespaces:
            return place
        return self.pod(place).netns

    def address(self, place: str | Key, family: int = 4) -> str:
        """The first address of a place of that family (4 or 6), as text."""
        if place == "node":
            ips: Iterable[bytes] = self.node_ips
        elif place == "outside":
            ips = topology.OUTSIDE_ADDRESSES
        else:
            ips = self.pod(place).ips
        for ip in ips:
            if family_of(ip) == family:
                return format_address(ip)
        raise InputError(f"lab {self.name}: {place} has no IPv{family} address")

    # -- doing things in it

    def command(self, place: str | Key, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` in a place, with that place's /sys (ip-netns(8))."""
        return ["ip", "netns", "exec", self.netns(place), *argv]

    def run(
        self, place: str | Key, *argv: str, check: bool = True, input: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a place and wait. subprocess.CalledProcessError when it fails and `check`."""
        return subprocess.run(
            self.command(place, argv), check=check, capture_output=True, text=True, input=input
        )

    def popen(self, place: str | Key, *argv: str, **options: Any) -> subprocess.Popen[Any]:
        """Start a command in a place."""
        return subprocess.Popen(self.command(place, argv), **options)

    def inside(self, place: str | Key, function: Callable[[], _T]) -> _T:
        """Call a function in a place's network namespace, on a thread of its own."""
        return netns.inside(self.netns(place), function)

    def make_socket(self, place: str | Key, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """A blocking socket that lives in a place."""
        made = netns.make_socket(self.netns(place), family, kind, protocol)
        made.setblocking(True)
        return made

    def sysctl(self, place: str | Key, path: str, value: str) -> None:
        """Set a sysctl, its path below /proc/sys/net."""
        netns.write_sysctls(self.netns(place), [(path, value)])

    # -- changing it while it runs

    def add_pod(self, pod: Pod) -> LabPod:
        """Make one more pod. InputError: it clashes with something there."""
        one = topology.place(self.plan, pod)
        if one.wire is not Wire.HOST and netns.exists(one.netns):
            raise InputError(f"network namespace {one.netns} exists already")
        self.plan = replace(self.plan, pods=(*self.plan.pods, one))
        self._save()
        if one.wire is not Wire.HOST:
            netns.ip([f"netns add {one.netns}"])
            _apply(wiring.pod(self.plan, one))
        self._serve(one)
        return one

    def remove_pod(self, name: str | Key) -> LabPod:
        """End a pod as the CNI does: its link, routes and rules go, its namespace with them."""
        one = self.pod(name)
        if one.wire is Wire.HOST:
            raise InputError(f"Pod {one.key}: shares the node's network and cannot be removed")
        self.ask({"op": "forget", "netns": one.netns})
        links = [f"link del {one.device}"]
        if one.second_veth:
            links.append(f"link del {topology.veth_name(one.key, 'mul')}")
        if one.wire is Wire.BRANCH:
            links.append(f"link del {wiring.branch_link(one)}")
        netns.ip(links, netns=self.node, force=True)
        for step in wiring.gone(self.plan, one):
            netns.ip(step.lines, netns=step.netns, family=step.family, force=True)
        _end_processes([one.netns])
        netns.ip([f"netns del {one.netns}"])
        self.plan = replace(self.plan, pods=tuple(pod for pod in self.plan.pods if pod is not one))
        self._save()
        return one

    def replace_pod(self, name: str | Key, ips: Sequence[str] | None = None) -> LabPod:
        """Remove a pod and make it again, with the same addresses or with `ips`."""
        old = self.remove_pod(name)
        kept = old.ips if ips is None else tuple(parse_address(ip) for ip in ips)
        return self.add_pod(Pod(old.key, ips=kept, ports=old.ports))

    def add_external(self, address: str) -> None:
        """Make the outside world own one more address."""
        ip = parse_address(address)
        if any(ip in pod.ips for pod in self.plan.pods) or ip in self.node_ips:
            raise InputError(f"{address} is an address of the lab itself, not external")
        nodad = " nodad" if family_of(ip) == 6 else ""
        netns.ip(
            [f"addr replace {format_address(ip)}/{8 * len(ip)} dev lo{nodad}"],
            netns=self.outside,
            family=family_of(ip),
        )

    # -- the helper that serves the ports

    @contextlib.contextmanager
    def serving(self, spaces: Iterable[str], ports: Iterable[tuple[int, int]]) -> Iterator[None]:
        """Have these ports (protocol number, port) answered in these namespaces too, for a while."""
        with self._connect() as connection:
            _exchange(
                connection, {"op": "open", "netns": list(spaces), "ports": [list(port) for port in ports]}
            )
            yield

    def ask(self, request: Mapping[str, Any]) -> None:
        """Send the helper a request (`dataplane.lab.server`). KernelError: it is gone, or refuses."""
        with self._connect() as connection:
            _exchange(connection, request)

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(20)
        try:
            connection.connect(str(self.home / "server.sock"))
        except OSError as error:
            connection.close()
            raise KernelError(
                f"lab {self.name}: the process that serves its ports is gone ({error.strerror});"
                f" make the lab again: podgate lab down --name {self.name}"
            ) from None
        return connection

    def _serve(self, one: LabPod) -> None:
        ports = [[port.protocol, port.port] for port in one.ports]
        shared = one.wire is Wire.HOST
        self.ask({"op": "serve", "netns": one.netns, "name": str(one.key), "ports": ports, "shared": shared})

    def _start_server(self, tied: bool) -> None:
        with (self.home / "server.log").open("wb") as log:
            process = subprocess.Popen(
                [*(TIED if tied else ()), sys.executable, "-m", "dataplane.lab.server", str(self.home)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # a Ctrl-C meant for `probe` must not end it
                env={**os.environ, "PYTHONPATH": _import_path()},
            )
        began = netns.started_at(process.pid)
        assert process.stdout is not None
        with process.stdout as out:
            ready = out.readline() == b"ready\n"
        if not ready or began is None:
            process.wait()
            tail = (self.home / "server.log").read_text().strip().splitlines()
            raise KernelError(
                f"lab {self.name}: its server did not start: {tail[-1] if tail else 'no message'}"
            )
        self._server = (process.pid, began)
        _children.append(process)
        self._save()
        with self._connect() as connection:
            for space, label, ports in (
                (self.node, "node", []),
                (self.outside, "outside", [list(port) for port in OUTSIDE_PORTS]),
            ):
                _exchange(connection, {"op": "serve", "netns": space, "name": label, "ports": ports})
        for pod in self.plan.pods:
            self._serve(pod)

    def _follow_connections(self) -> None:
        # Conntrack works in a namespace only once a rule asks for it. On a cluster node kube-proxy's
        # do; these are the same two, and change no packet's fate.
        rules = (
            "*filter\n:KUBE-FORWARD - [0:0]\n-A FORWARD -j KUBE-FORWARD\n"
            "-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT\n"
            "-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\nCOMMIT\n"
        )
        for tool in ("iptables-restore", "ip6tables-restore"):
            if shutil.which(tool) is None:
                continue
            done = self.run("node", tool, "--noflush", check=False, input=rules)
            if done.returncode:
                raise KernelError(f"lab {self.name}: {tool}: {' '.join(done.stderr.split())}")

    # -- ending

    def down(self) -> None:
        """Take everything away, as far as it exists; works on what a crash left too."""
        if self._server is not None and netns.started_at(self._server[0]) == self._server[1]:
            _end([self._server[0]])
        elif (self.home / "server.sock").exists():
            # It died between starting the server and noting its pid.
            with contextlib.suppress(KernelError, OSError):
                self.ask({"op": "stop"})
        _end_processes(self.plan.namespaces)
        netns.ip((f"netns del {space}" for space in self.plan.namespaces if netns.exists(space)), force=True)
        left = [space for space in self.plan.namespaces if netns.exists(space)]
        if left:
            raise KernelError(f"lab {self.name}: could not remove the network namespaces {' '.join(left)}")
        shutil.rmtree(self.home, ignore_errors=True)

    def _save(self) -> None:
        plan = self.plan
        raw = {
            "name": plan.name,
            "node_ips": [format_address(ip) for ip in plan.node_ips],
            "pods": [pod.to_json() for pod in plan.pods],
            "topology": {
                "wire": plan.topology.wire,
                "wires": {str(key): wire for key, wire in plan.topology.wires.items()},
                "second_veth": [str(key) for key in plan.topology.second_veth],
                "v4": plan.topology.v4,
                "v6": plan.topology.v6,
                "veth_prefix": plan.topology.veth_prefix,
                "conntrack": plan.topology.conntrack,
                "br_netfilter": plan.topology.br_netfilter,
            },
            "server": self._server,
        }
        temporary = self.home / "state.json.new"
        temporary.write_text(json.dumps(raw, indent=1))
        temporary.replace(self.home / "state.json")


def names() -> list[str]:
    """The labs that are up, or half up after a crash."""
    try:
        return sorted(entry.name for entry in HOME.iterdir() if entry.is_dir())
    except OSError:
        return []


def down(name: str) -> None:
    """End a lab by name. InputError: there is none."""
    home = HOME / topology.check_name(name)
    if home.exists() and not (home / "state.json").exists():
        shutil.rmtree(home)  # it died before it had made anything
        return
    Lab.open(name).down()


# Servers started by this process: waited for in `down`, or they would stay as zombies.
_children: list[subprocess.Popen[bytes]] = []


def _key(name: str | Key) -> Key:
    """`namespace/name`, or a name in the namespace `default` as kubectl has it."""
    if isinstance(name, Key):
        return name
    return Key(*name.split("/", 1)) if "/" in name else Key("default", name)


def _plan_from(raw: Mapping[str, Any]) -> Plan:
    shape = raw["topology"]
    return Plan(
        raw["name"],
        f"{raw['name']}-node",
        f"{raw['name']}-outside",
        tuple(parse_address(ip) for ip in raw["node_ips"]),
        tuple(LabPod.from_json(pod) for pod in raw["pods"]),
        Topology(
            wire=Wire(shape["wire"]),
            wires={Key(*key.split("/", 1)): Wire(wire) for key, wire in shape["wires"].items()},
            second_veth=frozenset(Key(*key.split("/", 1)) for key in shape["second_veth"]),
            v4=shape["v4"],
            v6=shape["v6"],
            veth_prefix=shape["veth_prefix"],
            conntrack=shape["conntrack"],
            br_netfilter=shape["br_netfilter"],
        ),
    )


def _apply(steps: Iterable[wiring.Step]) -> None:
    for step in steps:
        if step.sysctls:
            netns.write_sysctls(step.netns, step.sysctls)
        netns.ip(step.lines, netns=step.netns, family=step.family)


def _exchange(connection: socket.socket, request: Mapping[str, Any]) -> None:
    connection.sendall(json.dumps(request).encode() + b"\n")
    answer = b""
    while not answer.endswith(b"\n"):
        more = connection.recv(65536)
        if not more:
            raise KernelError("the lab's server ended in the middle of a request; see server.log")
        answer += more
    result = json.loads(answer)
    if "error" in result:
        raise KernelError(
            f"the lab's server refuses {request['op']} in {request.get('netns')}: {result['error']}"
        )


def _end_processes(spaces: Iterable[str]) -> None:
    _end(netns.processes(spaces))


def _end(pids: Iterable[int]) -> None:
    """SIGTERM, two seconds to leave, SIGKILL."""
    waiting = {pid: began for pid in pids if (began := netns.started_at(pid)) is not None}
    for number, patience in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 2.0)):
        for pid in waiting:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + patience
        while waiting and time.monotonic() < deadline:
            _reap()
            waiting = {pid: began for pid, began in waiting.items() if netns.started_at(pid) == began}
            if waiting:
                time.sleep(0.005)
    _reap()


def _reap() -> None:
    _children[:] = [child for child in _children if child.poll() is None]


def _import_path() -> str:
    """The module is found as it was found here, installed or not."""
    own = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(part for part in (own, os.environ.get("PYTHONPATH", "")) if part)
