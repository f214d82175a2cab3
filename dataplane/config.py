"""The agent's settings, checked. The command line fills them in; nothing else reads options."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dataplane.addresses import parse_address
from dataplane.errors import InputError

DEFAULT_CONTROL = Path("/run/podgate/control.sock")
VPC_CNI_SOCKET = "/var/run/aws-node/npa.sock"  # fixed in the CNI's own code


class Mode(enum.StrEnum):
    """What a pod may do before a policy isolates it: everything, or nothing."""

    STANDARD = "standard"
    STRICT = "strict"


class Fail(enum.StrEnum):
    """What becomes of steered packets that nobody can judge: dropped, or let through."""

    CLOSED = "closed"
    OPEN = "open"


class Backend(enum.StrEnum):
    NATIVE = "native"
    NETFILTERQUEUE = "netfilterqueue"


class OnStop(enum.StrEnum):
    """AUTO keeps the kernel's rules on SIGTERM and cleans up on Ctrl-C in a terminal."""

    AUTO = "auto"
    KEEP = "keep"
    CLEAN = "clean"


class IptablesVariant(enum.StrEnum):
    AUTO = "auto"
    NFT = "nft"
    LEGACY = "legacy"


class Resolve(enum.StrEnum):
    """Who turns NetworkPolicies into PolicyEndpoints.

    AUTO: whoever writes PolicyEndpoints, and we where there are none (in a cluster: where the kind
    is not served; in files: per policy). ALWAYS: we, PolicyEndpoints count for nothing. NEVER: only
    PolicyEndpoints count.
    """

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class PodNames(enum.StrEnum):
    """Whose names events show: this node's pods, or all of the cluster (a watch of all pods per node)."""

    LOCAL = "local"
    CLUSTER = "cluster"


@dataclass(frozen=True, slots=True)
class MarkLayout:
    """Our three bits of the packet mark, single-bit masks.

    E (`egress`) and I (`ingress`) are also kept in the connection's mark: the egress of the
    originator's pod, the ingress of the responder's pod was judged. R (`reply`) is only ever on a
    packet inside FORWARD: conntrack says the packet has the flow's REPLY direction.
    """

    egress: int = 0x10000000
    ingress: int = 0x20000000
    reply: int = 0x40000000

    @property
    def mask(self) -> int:
        """All three bits."""
        return self.egress | self.ingress | self.reply

    @property
    def saved(self) -> int:
        """The two bits that are kept in the connection's mark."""
        return self.egress | self.ingress

    @classmethod
    def from_mask(cls, mask: int) -> MarkLayout:
        """The layout for a mask of exactly three bits, E the lowest and R the highest."""
        bits = [1 << position for position in range(32) if mask >> position & 1]
        if len(bits) != 3 or mask >> 32:
            raise InputError(f"--mark-mask {mask:#x}: needs exactly three bits of 32, for example 0x70000000")
        return cls(*bits)


class BindAddress(NamedTuple):
    """Where to listen: an IP address, or "" for all of this network namespace; and a port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> BindAddress | None:
        """`:8162`, `127.0.0.1:8162` or `[::1]:8162`; None for the empty text and `0`. ValueError else."""
        if text in ("", "0"):
            return None
        host, colon, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        address = host[1:-1] if bracketed else host
        try:
            if (address or bracketed) and bracketed != (len(parse_address(address)) == 16):
                raise ValueError
            if not colon or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 1 << 16:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"{text!r}: write it as :8162, 127.0.0.1:8162 or [::1]:8162, or 0 to serve nothing"
            ) from None
        return cls(address, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """Everything `podgate agent` can be told."""

    sources: tuple[Path, ...]  # empty: the cluster's API server
    node_ips: tuple[bytes, ...] = ()  # empty: this node's own addresses
    node_name: str | None = None
    mode: Mode = Mode.STANDARD
    fail: Fail = Fail.CLOSED
    queues: int = 1
    queue_base: int = 0
    backend: Backend = Backend.NATIVE
    offload: bool = True
    spoof_check: bool = True
    iptables: IptablesVariant = IptablesVariant.AUTO
    marks: MarkLayout = MarkLayout()
    veth_prefix: str = "eni"
    on_stop: OnStop = OnStop.AUTO
    control: Path = DEFAULT_CONTROL
    metrics: BindAddress | None = None  # None: not served
    health: BindAddress | None = None
    cni_socket: Path | None = None  # where the VPC CNI calls; None: nobody serves it
    take_over: bool = False  # from an agent that runs here already, once all is ready to go on
    kubeconfig: str | None = None  # None: the pod's own credentials, else ~/.kube/config
    resolve: Resolve = Resolve.AUTO
    pod_names: PodNames = PodNames.LOCAL
    reject: bool = False  # what policies deny is answered: TCP RST, ICMP prohibited
    flow_log: str | None = None  # a path, or - for stdout
    flow_log_rate: float = 100.0  # lines per second of each reason; 0: all
    audit: bool = False  # nothing is dropped, so it fails open too
    quiet: float = 0.02  # seconds without a change of objects before changes are put in force …
    quiet_limit: float = 0.2  # … and how long changes may be put off in all
    verify_seconds: float = 10.0  # how often others' changes to our rules are looked for

    def __post_init__(self) -> None:
        if self.audit:
            object.__setattr__(self, "fail", Fail.OPEN)

    @property
    def rejects(self) -> bool:
        """Whether anything is answered: in audit nothing is denied."""
        return self.reject and not self.audit
