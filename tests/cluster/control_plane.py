"""A real etcd and kube-apiserver in a network namespace of their own, and requests to them.

No kubelet and no controllers run: what they would do (a Pod's phase and addresses), tests do by PATCH.
"""

from __future__ import annotations

import base64
import http.client
import json
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from dataplane.lab import netns

ROOT = Path(__file__).resolve().parents[2]
CRD = ROOT / "deploy" / "crds" / "policyendpoints.networking.k8s.aws.yaml"
PORT = 6443
ADDRESS = "198.18.255.1"  # which its certificate names, besides localhost
START_SECONDS = 90.0  # 4 s on a quiet machine
Raw = dict[str, Any]

ADMIN = "admin-token"
AGENT = "agent-token"
AGENT_USER = "system:serviceaccount:kube-system:podgate"
CONTROLLER = "controller-token"
TOKENS = f"""\
{ADMIN},admin,1,"system:masters"
{AGENT},{AGENT_USER},2
nobody-token,nobody,3
{CONTROLLER},system:serviceaccount:kube-system:podgate-controller,4
"""
# What the agent may do: read-only, and nothing that it does not read.
RULES: list[Raw] = [
    {"apiGroups": ["networking.k8s.aws"], "resources": ["policyendpoints"]},
    {"apiGroups": ["networking.k8s.io"], "resources": ["networkpolicies"]},
    {"apiGroups": [""], "resources": ["pods", "namespaces", "services"]},
    {"apiGroups": ["apiextensions.k8s.io"], "resources": ["customresourcedefinitions"]},
    {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get"]},
]
BASES = {
    "PolicyEndpoint": "apis/networking.k8s.aws/v1alpha1/namespaces/{}/policyendpoints",
    "NetworkPolicy": "apis/networking.k8s.io/v1/namespaces/{}/networkpolicies",
    "Pod": "api/v1/namespaces/{}/pods",
    "Service": "api/v1/namespaces/{}/services",
    "Namespace": "api/v1/namespaces",
    "Node": "api/v1/nodes",
    "ClusterRole": "apis/rbac.authorization.k8s.io/v1/clusterroles",
    "ClusterRoleBinding": "apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
    "Role": "apis/rbac.authorization.k8s.io/v1/namespaces/{}/roles",
    "RoleBinding": "apis/rbac.authorization.k8s.io/v1/namespaces/{}/rolebindings",
    "CustomResourceDefinition": "apis/apiextensions.k8s.io/v1/customresourcedefinitions",
}


class Refused(Exception):
    """The API server answered with an error; `status` is the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class _Connection(http.client.HTTPConnection):
    """A connection made in a network namespace."""

    def __init__(self, space: str, port: int, tls: ssl.SSLContext | None, timeout: float) -> None:
        super().__init__("127.0.0.1", port, timeout=timeout)
        self._space, self._tls = space, tls

    def connect(self) -> None:
        made = netns.make_socket(self._space, socket.AF_INET, socket.SOCK_STREAM)
        made.settimeout(self.timeout)
        try:
            made.connect(("127.0.0.1", self.port))
            self.sock = self._tls.wrap_socket(made, server_hostname="localhost") if self._tls else made
        except BaseException:
            made.close()
            raise


class ControlPlane:
    """One etcd and one kube-apiserver. `start`, `stop`, `stop_server` and `start_server` may alternate."""

    def __init__(self, binaries: Path, home: Path, space: str) -> None:
        self.binaries, self.home, self.space = binaries, home, space
        self._etcd: subprocess.Popen[bytes] | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._connections = threading.local()
        self._links = 0

    # -- running

    def start(self) -> None:
        """Everything up and ready. AssertionError with the logs when it is not in time."""
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "tokens.csv").write_text(TOKENS)
        subprocess.run(
            ["openssl", "genrsa", "-out", str(self.home / "sa.key"), "2048"], check=True, capture_output=True
        )
        netns.ip([f"netns add {self.space}"])
        netns.ip(["link set lo up", f"addr add {ADDRESS}/32 dev lo"], netns=self.space)
        self._etcd = self._run(
            "etcd",
            "--unsafe-no-fsync",
            f"--data-dir={self.home / 'etcd'}",
            "--listen-client-urls=http://127.0.0.1:2379",
            "--advertise-client-urls=http://127.0.0.1:2379",
            "--listen-peer-urls=http://127.0.0.1:2380",
        )
        self.start_server()

    def start_server(self) -> None:
        assert self._server is None
        keys = self.home / "sa.key"
        self._server = self._run(
            "kube-apiserver",
            "--etcd-servers=http://127.0.0.1:2379",
            f"--secure-port={PORT}",
            "--bind-address=0.0.0.0",
            f"--advertise-address={ADDRESS}",
            f"--cert-dir={self.home / 'pki'}",
            "--service-account-issuer=https://podgate.test",
            f"--service-account-key-file={keys}",
            f"--service-account-signing-key-file={keys}",
            f"--token-auth-file={self.home / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--disable-admission-plugins=ServiceAccount",
            "--allow-privileged=true",
            "--shutdown-delay-duration=0",
        )
        deadline = time.monotonic() + START_SECONDS
        while True:
            with suppress(OSError, Refused, http.client.HTTPException):
                self.get("readyz")
                return
            running = self._server.poll() is None and self._etcd is not None and self._etcd.poll() is None
            if not running or time.monotonic() > deadline:
                raise AssertionError(f"kube-apiserver does not become ready:\n{self._logs()}")
            time.sleep(0.1)

    def start_again(self) -> None:
        """Start the API server unless it runs."""
        if self._server is None or self._server.poll() is not None:
            self._server = None
            self.start_server()

    def stop_server(self, *, kill: bool = False) -> None:
        """End the API server, etcd stays. `kill`: as a crash does."""
        self._drop_connection()
        self._server = self._end(self._server, kill=kill)

    def stop(self) -> None:
        self._drop_connection()
        self._server = self._end(self._server, kill=True)
        self._etcd = self._end(self._etcd, kill=True)
        netns.ip([f"netns del {self.space}"], force=True)
        shutil.rmtree(self.home / "etcd", ignore_errors=True)

    def _run(self, program: str, *options: str) -> subprocess.Popen[bytes]:
        # setpriv: they must not outlive a test run that is killed.
        argv = ["ip", "netns", "exec", self.space, "setpriv", "--pdeathsig", "KILL"]
        with (self.home / f"{program}.log").open("ab") as log:
            return subprocess.Popen(
                [*argv, str(self.binaries / program), *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.home,
            )

    def _end(self, process: subprocess.Popen[bytes] | None, *, kill: bool) -> None:
        if process is not None:
            process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _logs(self) -> str:
        texts = []
        for log in sorted(self.home.glob("*.log")):
            texts.append(f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:]))
        return "\n".join(texts)

    # -- reaching it

    def connect(self, space: str) -> str:
        """Give another network namespace a link to the API server; the URL to use there."""
        self._links += 1
        number = self._links % 250
        here, there = f"198.18.{number}.1", f"198.18.{number}.2"
        netns.ip([f"link add k8s{self._links} type veth peer name k8sapi netns {space}"], netns=self.space)
        netns.ip(
            [f"addr add {here}/30 dev k8s{self._links}", f"link set k8s{self._links} up"], netns=self.space
        )
        netns.ip([f"addr add {there}/30 dev k8sapi", "link set k8sapi up"], netns=space)
        return f"https://{here}:{PORT}"

    def kubeconfig(self, path: Path, server: str, *, user: Raw | None = None, **cluster: object) -> Path:
        """A kubeconfig for `server`, as the agent unless `user` says otherwise."""
        where = {
            "server": server,
            "certificate-authority": str(self.home / "pki" / "apiserver.crt"),
            "tls-server-name": "localhost",
            **cluster,
        }
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "c",
                    "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                    "clusters": [{"name": "c", "cluster": where}],
                    "users": [{"name": "u", "user": user or {"token": AGENT}}],
                }
            )
        )
        return path

    # -- asking

    def create_all(self, objects: Sequence[Raw]) -> None:
        """Create many at once."""
        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(self.create, objects):
                pass

    def request(self, method: str, path: str, body: object = None, content: str = "application/json") -> Any:
        """The parsed answer. Refused with the API server's own message."""
        for attempt in range(2):
            connection: _Connection | None = getattr(self._connections, "one", None)
            if connection is None:
                tls = ssl.create_default_context(cafile=str(self.home / "pki" / "apiserver.crt"))
                tls.verify_flags &= ~ssl.VERIFY_X509_STRICT
                connection = self._connections.one = _Connection(self.space, PORT, tls, 30)
            try:
                connection.request(
                    method,
                    f"/{path}",
                    None if body is None else json.dumps(body),
                    {"Authorization": f"Bearer {ADMIN}", "Content-Type": content},
                )
                answer = connection.getresponse()
                data = answer.read()
                break
            except (OSError, http.client.HTTPException):
                self._drop_connection()  # it may have been closed since the last request
                if attempt:
                    raise
        is_json = "json" in answer.headers.get("Content-Type", "")
        value = json.loads(data) if is_json else data.decode()
        if answer.status >= 300:
            raise Refused(answer.status, value["message"] if isinstance(value, dict) else value)
        return value

    def _drop_connection(self) -> None:
        connection: _Connection | None = getattr(self._connections, "one", None)
        if connection is not None:
            connection.close()
            self._connections.one = None

    def get(self, path: str) -> Any:
        return self.request("GET", path)

    def create(self, made: Raw) -> Any:
        """Create an object; a `status` in it is written too."""
        answer = self.request("POST", self.base(made), made)
        if "status" in made and made["kind"] in ("Pod", "Node"):
            answer = self.patch(made, {"status": made["status"]}, part="/status")
        return answer

    def apply(self, made: Raw) -> Any:
        """Create it, or put it in the place of what is there."""
        try:
            return self.create(made)
        except Refused as refused:
            if refused.status != 409:
                raise
        name = made["metadata"]["name"]
        there = self.get(f"{self.base(made)}/{name}")
        version = there["metadata"]["resourceVersion"]
        made = {**made, "metadata": {**made["metadata"], "resourceVersion": version}}
        return self.request("PUT", f"{self.base(made)}/{name}", made)

    def patch(self, made: Raw, change: Raw, part: str = "") -> Any:
        path = f"{self.base(made)}/{made['metadata']['name']}{part}"
        return self.request("PATCH", path, change, "application/merge-patch+json")

    def delete(self, made: Raw) -> None:
        # A Pod that has a node waits for its kubelet otherwise.
        with suppress(Refused):
            self.request("DELETE", f"{self.base(made)}/{made['metadata']['name']}?gracePeriodSeconds=0")

    def base(self, made: Raw) -> str:
        return BASES[made["kind"]].format(made["metadata"].get("namespace", "default"))

    def definition(self) -> Raw:
        """The CustomResourceDefinition of PolicyEndpoints, as people install it."""
        made: Raw = yaml.safe_load(CRD.read_text())
        return made

    def install_definition(self) -> None:
        with suppress(Refused):
            self.create(self.definition())
        until(lambda: self.status_of(BASES["PolicyEndpoint"].format("default")) == 200, 30)

    def remove_definition(self) -> None:
        self.delete(self.definition())
        path = f"{BASES['CustomResourceDefinition']}/{self.definition()['metadata']['name']}"
        until(lambda: self.status_of(path) == 404, 30)

    def status_of(self, path: str) -> int:
        try:
            self.get(path)
        except Refused as refused:
            return refused.status
        return 200

    def grant(self, rules: list[Raw] | None = None) -> None:
        """Give the agent these rights and no others."""
        rules = [{"verbs": ["get", "list", "watch"], **rule} for rule in (RULES if rules is None else rules)]
        self.apply(
            {
                "apiVersion": "rbac.authorization.k8s.io/v1",
                "kind": "ClusterRole",
                "metadata": {"name": "podgate"},
                "rules": rules,
            }
        )
        with suppress(Refused):
            self.create(
                {
                    "apiVersion": "rbac.authorization.k8s.io/v1",
                    "kind": "ClusterRoleBinding",
                    "metadata": {"name": "podgate"},
                    "roleRef": {
                        "apiGroup": "rbac.authorization.k8s.io",
                        "kind": "ClusterRole",
                        "name": "podgate",
                    },
                    "subjects": [{"kind": "ServiceAccount", "name": "podgate", "namespace": "kube-system"}],
                }
            )

    def clear(self) -> None:
        """Take away everything that tests make."""
        for kind in ("PolicyEndpoint", "NetworkPolicy", "Pod", "Service"):
            path = BASES[kind].replace("/namespaces/{}", "")
            found = self.get(path)["items"] if self.status_of(path) == 200 else []
            for namespace in {item["metadata"]["namespace"] for item in found} - {"default"}:
                self.request("DELETE", f"{BASES[kind].format(namespace)}?gracePeriodSeconds=0")
        for item in self.get("api/v1/nodes")["items"]:
            self.delete({"kind": "Node", "metadata": item["metadata"]})

    def namespaces(self, *names: str) -> None:
        """Make namespaces that are not there yet; they stay, since nothing here would finalise them."""
        for name in names:
            with suppress(Refused):
                self.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})

    def compact(self) -> None:
        """Make etcd forget every version but the present."""
        revision = self._etcd_call("kv/range", {"key": base64.b64encode(b"x").decode()})["header"]["revision"]
        self._etcd_call("kv/compaction", {"revision": revision, "physical": True})

    def _etcd_call(self, path: str, body: Raw) -> Any:
        connection = _Connection(self.space, 2379, None, 10)
        try:
            connection.request("POST", f"/v3/{path}", json.dumps(body))
            answer = connection.getresponse()
            data = answer.read()
            assert answer.status == 200, data
            return json.loads(data)
        finally:
            connection.close()


def until(condition: Callable[[], Any], seconds: float = 10.0, what: str = "") -> Any:
    """Wait until `condition()` is true, and return its value. AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise AssertionError(f"not within {seconds} s: {what or condition}")
        time.sleep(0.02)
