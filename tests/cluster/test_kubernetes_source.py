"""The client, the watch and the source against a real API server, without an agent around them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from control_plane import ADDRESS, ADMIN, AGENT, PORT, ControlPlane, Raw

from dataplane.config import PodNames, Resolve
from dataplane.lab import netns
from dataplane.model import ANNOTATION_MODE, Key, Pod
from dataplane.observe.log import get_logger
from dataplane.policy.audit import audit_modes
from dataplane.sources.kubernetes import PODS, KubernetesSource
from dataplane.sources.kubernetes_client import ApiFault, ApiServer, Credentials
from dataplane.sources.kubernetes_watch import Timing, Watch
from dataplane.sources.store import Store

pytestmark = pytest.mark.cluster
URL = f"https://127.0.0.1:{PORT}"
NODE = "node-1"


def inside(cluster: ControlPlane, work: Callable[[], Awaitable[None]]) -> None:
    """Run a coroutine where the API server is."""

    async def bounded() -> None:
        await asyncio.wait_for(work(), 60)  # type: ignore[arg-type]

    netns.inside(cluster.space, lambda: asyncio.run(bounded()))


def pod(name: str, address: str, node: str = NODE, **labels: str) -> Raw:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "x", "labels": labels},
        "spec": {"nodeName": node, "containers": [{"name": "c", "image": "-"}]},
        "status": {
            "phase": "Running",
            "podIP": address,
            "podIPs": [{"ip": address}],
            "hostIP": "10.0.0.1",
            "hostIPs": [{"ip": "10.0.0.1"}],
        },
    }


class Names:
    """Receives names of objects."""

    def __init__(self) -> None:
        self.known: set[str] = set()
        self._listing: set[str] = set()

    def begin_list(self) -> None:
        self._listing = set()

    def listed(self, raw: Raw) -> None:
        self._listing.add(raw["metadata"]["name"])

    def unlisted(self, raw: Raw) -> None:
        self._listing.discard(raw["metadata"]["name"])

    def end_list(self) -> None:
        self.known = self._listing

    def changed(self, raw: Raw) -> None:
        self.known.add(raw["metadata"]["name"])

    def gone(self, raw: Raw) -> None:
        self.known.discard(raw["metadata"]["name"])


async def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def following(source: KubernetesSource) -> AsyncIterator[None]:
    task = asyncio.create_task(source.run())
    try:
        await asyncio.wait_for(source.wait_synced(), 30)
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_a_pods_own_credentials_and_an_exchanged_token(cluster: ControlPlane, tmp_path: Path) -> None:
    token = tmp_path / "token"
    credentials = Credentials(
        token_file=str(token),
        ca_file=str(cluster.home / "pki" / "apiserver.crt"),
        environment={"KUBERNETES_SERVICE_HOST": ADDRESS, "KUBERNETES_SERVICE_PORT": str(PORT)},
    )

    async def work() -> None:
        api = ApiServer(credentials)
        token.write_text("expired-token")
        with pytest.raises(ApiFault, match=r"answers 401: our credentials .*token.* are not accepted"):
            await api.get("/api/v1/pods", {})
        token.write_text(AGENT)
        assert (await api.get("/api/v1/pods", {}))["kind"] == "PodList"
        with pytest.raises(ApiFault, match="answers 403: secrets is forbidden"):
            await api.get("/api/v1/secrets", {})
        token.write_text(ADMIN)
        assert (await api.get("/api/v1/secrets", {}))["kind"] == "SecretList"
        await api.close()

    inside(cluster, work)


def test_a_certificate_that_we_do_not_trust(cluster: ControlPlane, tmp_path: Path) -> None:
    async def work() -> None:
        config = cluster.kubeconfig(tmp_path / "other", URL, **{"tls-server-name": "other.test"})
        with pytest.raises(ApiFault, match=r"its certificate is not one we trust: .*other.test"):
            await ApiServer(Credentials(str(config))).get("/api", {})
        # Python's own roots instead of the cluster's CA.
        config = cluster.kubeconfig(tmp_path / "roots", URL)
        config.write_text(config.read_text().replace("certificate-authority:", "unknown:"))
        with pytest.raises(
            ApiFault, match=r"its certificate is not one we trust: .*; check the CA"
        ) as caught:
            await ApiServer(Credentials(str(config))).get("/api", {})
        assert "\n" not in str(caught.value)
        plain = cluster.kubeconfig(tmp_path / "plain", URL.replace("https", "http"))
        with pytest.raises(ApiFault, match=f"API server http://127.0.0.1:{PORT}"):
            await ApiServer(Credentials(str(plain))).get("/api", {})

    inside(cluster, work)


@pytest.mark.parametrize("streaming", [True, False])
def test_pages_and_streams_list_the_same(cluster: ControlPlane, tmp_path: Path, streaming: bool) -> None:
    cluster.namespaces("x")
    cluster.create_all([pod(f"p{number}", f"10.1.0.{number + 1}") for number in range(10)])
    config = cluster.kubeconfig(tmp_path / "kubeconfig", URL)

    async def work() -> None:
        api, names = ApiServer(Credentials(str(config))), Names()
        watch = Watch(api, PODS, names, timing=Timing(page=3))
        watch._streaming = streaming
        task = asyncio.create_task(watch.run())
        await until(lambda: watch.synced)
        assert names.known == {f"p{number}" for number in range(10)}
        await asyncio.to_thread(cluster.delete, pod("p3", ""))
        await until(lambda: "p3" not in names.known)
        assert (watch.problem, watch.lists, watch.events["DELETED"]) == (None, 1, 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await api.close()

    inside(cluster, work)


@pytest.mark.parametrize(
    ("pod_names", "resolve", "expected"),
    [
        (PodNames.LOCAL, Resolve.AUTO, {"here": {"app": "a"}}),
        (PodNames.CLUSTER, Resolve.AUTO, {"here": {"app": "a"}, "there": {}}),
        (PodNames.LOCAL, Resolve.ALWAYS, {"here": {"app": "a"}, "there": {"app": "b"}}),
    ],
)
def test_which_pods_are_kept_and_how_much_of_them(
    cluster: ControlPlane,
    tmp_path: Path,
    pod_names: PodNames,
    resolve: Resolve,
    expected: dict[str, dict[str, str]],
) -> None:
    cluster.namespaces("x")
    finished = pod("done", "10.1.0.3", "node-2")
    finished["status"]["phase"] = "Succeeded"
    for made in (pod("here", "10.1.0.1", app="a"), pod("there", "10.1.0.2", "node-2", app="b"), finished):
        cluster.create(made)
    cluster.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})
    store = Store()
    source = KubernetesSource(
        Credentials(str(cluster.kubeconfig(tmp_path / "kubeconfig", URL))),
        store,
        node_name=NODE,
        resolve=resolve,
        pod_names=pod_names,
        log=get_logger(),
    )

    async def work() -> None:
        async with following(source):
            assert {each.key.name: each.labels for each in store.snapshot().pods} == expected
            assert source.ready
            await asyncio.to_thread(cluster.delete, pod("here", ""))
            await store.wait_change()
            assert set(expected) - {each.key.name for each in store.snapshot().pods} == {"here"}

    inside(cluster, work)


def test_a_node_that_is_none_of_the_clusters(cluster: ControlPlane, tmp_path: Path) -> None:
    source = KubernetesSource(
        Credentials(str(cluster.kubeconfig(tmp_path / "kubeconfig", URL))),
        Store(),
        node_name="not-there",
        log=get_logger(),
    )

    async def work() -> None:
        async with following(source):
            assert not source.ready
            (problem,) = source.problems
            assert problem.startswith("the cluster has no Node not-there: --node-name must be")
            await asyncio.to_thread(
                cluster.create, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "not-there"}}
            )
            await until(lambda: source.ready)

    inside(cluster, work)


def test_replacing_a_pod_of_the_same_name(cluster: ControlPlane, tmp_path: Path) -> None:
    cluster.namespaces("x")
    cluster.create(pod("a", "10.1.0.1"))
    cluster.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})
    store = Store(quiet=0.0)
    source = KubernetesSource(
        Credentials(str(cluster.kubeconfig(tmp_path / "kubeconfig", URL))),
        store,
        node_name=NODE,
        log=get_logger(),
    )

    async def work() -> None:
        async with following(source):
            (before,) = store.snapshot().pods
            await asyncio.to_thread(cluster.delete, pod("a", ""))
            await asyncio.to_thread(cluster.create, pod("a", "10.1.0.9"))
            await until(lambda: [each.ips for each in store.snapshot().pods] == [(b"\n\x01\x00\t",)])
            (after,) = store.snapshot().pods
            assert replace(after, uid="", created_at=None) == replace(
                before, uid="", created_at=None, ips=after.ips
            )
            assert after.uid != before.uid
            assert isinstance(after, Pod)
            assert after.key == Key("x", "a")

    inside(cluster, work)


@pytest.mark.parametrize("resolve", [Resolve.AUTO, Resolve.NEVER, Resolve.ALWAYS])
def test_what_is_in_audit_is_known_whoever_resolves(
    cluster: ControlPlane, tmp_path: Path, resolve: Resolve
) -> None:
    cluster.namespaces("x", "y")
    cluster.install_definition()
    cluster.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})
    annotations = {ANNOTATION_MODE: "audit"}

    def network_policy(name: str, **metadata: Any) -> Raw:
        return {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": name, "namespace": "x", **metadata},
            "spec": {"podSelector": {}},
        }

    cluster.create(network_policy("p", annotations=annotations))
    cluster.create(network_policy("q"))
    store = Store(quiet=0.0)
    source = KubernetesSource(
        Credentials(str(cluster.kubeconfig(tmp_path / "kubeconfig", URL))),
        store,
        node_name=NODE,
        resolve=resolve,
        log=get_logger(),
    )

    def modes() -> list[bool]:
        found = audit_modes(store.snapshot())
        return [found.covers(Key(*name.split("/"))) for name in ("x/p", "x/q", "y/p")]

    async def work() -> None:
        async with following(source):
            assert modes() == [True, False, False]
            metadata = {"name": "y", "annotations": annotations}
            space = {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}
            await asyncio.to_thread(cluster.apply, space)
            await until(lambda: modes() == [True, False, True])
            enforced = network_policy("p", annotations={ANNOTATION_MODE: "enforce"})
            await asyncio.to_thread(cluster.apply, enforced)
            await until(lambda: modes() == [False, False, True])
            await asyncio.to_thread(cluster.delete, network_policy("p"))
            await until(lambda: modes() == [False, False, True])
            none = {"metadata": {"annotations": {ANNOTATION_MODE: None}}}
            await asyncio.to_thread(cluster.patch, space, none)
            await until(lambda: modes() == [False, False, False])
            whole = resolve is Resolve.ALWAYS
            assert len(store.snapshot().network_policies) == (1 if whole else 0)

    inside(cluster, work)
