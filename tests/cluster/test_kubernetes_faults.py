"""Faults between the agent and its API server: nothing missed, nothing invented, no half of a list."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fault_server import FaultServer, Raw, Request, Step, bookmark, error, event, item, page

from dataplane.sources.kubernetes_client import ApiFault, ApiServer, Credentials
from dataplane.sources.kubernetes_watch import Resource, Timing, Watch

THINGS = Resource("test.dev", "v1", "things")
QUICK = Timing(watch=20, silence=0.3, list_silence=0.3, first_retry=0.01, last_retry=0.05)


class Things:
    """What a receiver knows: name → version. `lists` are the complete lists, `seen` every state since."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}
        self.lists: list[dict[str, str]] = []
        self.states: list[dict[str, str]] = []
        self._listing: dict[str, str] = {}

    def begin_list(self) -> None:
        self._listing = {}

    def listed(self, raw: Raw) -> None:
        self._listing[raw["metadata"]["name"]] = raw["metadata"]["resourceVersion"]

    def unlisted(self, raw: Raw) -> None:
        self._listing.pop(raw["metadata"]["name"], None)

    def end_list(self) -> None:
        self.known = dict(self._listing)
        self.lists.append(dict(self.known))
        self.states.append(dict(self.known))

    def changed(self, raw: Raw) -> None:
        self.known[raw["metadata"]["name"]] = raw["metadata"]["resourceVersion"]
        self.states.append(dict(self.known))

    def gone(self, raw: Raw) -> None:
        self.known.pop(raw["metadata"]["name"], None)
        self.states.append(dict(self.known))


class Case:
    """A watch on a scripted server."""

    def __init__(self, server: FaultServer, watch: Watch, things: Things) -> None:
        self.server, self.watch, self.things = server, watch, things

    async def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError
            await asyncio.sleep(0.005)

    async def knows(self, **known: int) -> None:
        expected = {name: str(version) for name, version in known.items()}
        try:
            await self.until(lambda: self.things.known == expected)
        except TimeoutError:
            raise AssertionError(f"{self.things.known}, not {expected}; {self.watch.problem}") from None


def kubeconfig(path: Path, url: str, **user: object) -> str:
    path.write_text(
        yaml.safe_dump(
            {
                "current-context": "c",
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                "clusters": [{"name": "c", "cluster": {"server": url}}],
                "users": [{"name": "u", "user": user or {"token": "t"}}],
            }
        )
    )
    return str(path)


@contextlib.asynccontextmanager
async def following(path: Path, *script: Step, timing: Timing = QUICK) -> AsyncIterator[Case]:
    async with FaultServer(script).running() as server:
        api = ApiServer(Credentials(kubeconfig(path / "kubeconfig", server.url)))
        things = Things()
        watch = Watch(api, THINGS, things, timing=timing)
        task = asyncio.create_task(watch.run())
        try:
            yield Case(server, watch, things)
            assert not task.done(), task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await api.close()


def step(*events: Raw | bytes, end: bool = False) -> Step:
    return lambda request: request.stream(*events, end=end)


def answer(body: object, status: int = 200, headers: str = "") -> Step:
    return lambda request: request.answer(body, status, headers)


LISTED = step(event("ADDED", "a", 1), event("ADDED", "b", 2), bookmark(3, end=True))


def run(test: Callable[[Path], Awaitable[None]], tmp_path: Path) -> None:
    asyncio.run(asyncio.wait_for(test(tmp_path), 30))  # type: ignore[arg-type]


def test_a_streamed_list_and_the_watch_on_the_same_connection(tmp_path: Path) -> None:
    async def test(path: Path) -> None:
        async def serve(request: Request) -> None:
            await request.stream(event("ADDED", "a", 1), event("ADDED", "b", 2))
            await asyncio.sleep(0.1)
            assert case.things.lists == []  # half a list is none
            await request.more(event("MODIFIED", "b", 4), event("DELETED", "a", 5), bookmark(6, end=True))
            await request.more(event("ADDED", "c", 7), event("MODIFIED", "b", 8))

        async with following(path, serve) as case:
            await case.knows(b=8, c=7)
            assert case.things.lists == [{"b": "4"}]
            assert case.watch.problem is None
            assert case.server.requests[0].query["sendInitialEvents"] == "true"

    run(test, tmp_path)


@pytest.mark.parametrize(
    "refusal",
    [
        answer({"message": "sendInitialEvents: Forbidden"}, 422),
        step(error(500, "etcdserver: RequestWatchProgress is disabled")),
        # An older server takes it for a plain watch: a bookmark that ends nothing, or silence.
        step(event("ADDED", "z", 1), bookmark(9)),
        step(event("ADDED", "z", 1)),
        step(event("ADDED", "z", 1), end=True),
    ],
)
def test_where_lists_cannot_be_streamed_they_are_read_in_pages(tmp_path: Path, refusal: Step) -> None:
    async def test(path: Path) -> None:
        pages = (answer(page(item("a", 1), token="t")), answer(page(item("b", 2), version=5)))
        async with following(path, refusal, *pages, step(event("ADDED", "c", 6))) as case:
            await case.knows(a=1, b=2, c=6)
            assert case.things.lists == [{"a": "1", "b": "2"}]
            _, first, second, watch = case.server.requests
            assert (first.query["limit"], second.query["continue"]) == ("200", "t")
            assert watch.query["resourceVersion"] == "5"

    run(test, tmp_path)


def test_pages_that_expire_are_read_again_as_one(tmp_path: Path) -> None:
    async def test(path: Path) -> None:
        script = (
            answer({}, 400),
            answer(page(item("a", 1), token="t")),
            answer({"message": "The provided continue parameter is too old"}, 410),
            answer({}, 400),
            answer(page(item("b", 2), version=5)),
        )
        async with following(path, *script) as case:
            await case.knows(b=2)
            assert case.things.lists == [{"b": "2"}]

    run(test, tmp_path)


@pytest.mark.parametrize("gone", [answer({"message": "too old"}, 410), step(error(410, "too old"))])
def test_a_version_that_is_gone_means_a_new_list(tmp_path: Path, gone: Step) -> None:
    async def test(path: Path) -> None:
        again = step(event("ADDED", "b", 7), bookmark(9, end=True))
        listed = step(event("ADDED", "a", 1), bookmark(3, end=True), end=True)
        async with following(path, listed, gone, again) as case:
            await case.knows(b=7)
            assert case.watch.restarts["expired"] == 1
            # What was known stayed until the new list was complete.
            assert case.things.states == [{"a": "1"}, {"b": "7"}]
            assert "resourceVersion" not in case.server.requests[2].query

    run(test, tmp_path)


def test_a_watch_that_ends_goes_on_from_the_last_version(tmp_path: Path) -> None:
    async def test(path: Path) -> None:
        ended = step(event("MODIFIED", "a", 4), bookmark(20), end=True)
        async with following(path, LISTED, ended, step(event("DELETED", "b", 21))) as case:
            await case.until(lambda: case.things.known)
            case.server.requests[0].cut()
            await case.knows(a=4)
            assert [each.query.get("resourceVersion") for each in case.server.requests] == [None, "3", "20"]
            assert case.watch.lists == 1
            assert case.watch.problem is None

    run(test, tmp_path)


def test_a_connection_that_is_dead_without_a_word_is_noticed(tmp_path: Path) -> None:
    async def test(path: Path) -> None:
        # The list comes, and then nothing: neither events nor bookmarks, nor an end.
        async with following(path, LISTED, step(event("ADDED", "c", 4))) as case:
            await case.knows(a=1, b=2, c=4)
            assert case.server.requests[1].query["resourceVersion"] == "3"

    run(test, tmp_path)


def test_a_server_that_accepts_and_says_nothing_is_a_problem(tmp_path: Path) -> None:
    async def test(path: Path) -> None:
        async with following(path) as case:
            await case.until(lambda: "taken for dead" in str(case.watch.problem))
            assert not case.watch.synced

    run(test, tmp_path)


@pytest.mark.parametrize(
    "garbage",
    [
        b"<html>a proxy's idea of an answer</html>\n",
        b'{"type": "ADDED", "object": {"metadata": {"name": "c", "resourc\n',
        b'{"type": "ADDED", "object": 7}\n',
        b'{"type": "SOMETHING", "object": {"metadata": {"resourceVersion": "9"}}}\n',
        b'["ADDED"]\n',
        b'{"type": "ADDED"}\n',
        b"[" * 100_000 + b"\n",
        b"\xff\xfe\n",
    ],
)
def test_garbage_in_a_watch_means_a_new_list(tmp_path: Path, garbage: bytes) -> None:
    async def test(path: Path) -> None:
        after = step(event("ADDED", "d", 5), bookmark(6, end=True))
        async with following(path, LISTED, step(garbage, event("ADDED", "never", 4)), after) as case:
            await case.until(lambda: case.things.known)
            case.server.requests[0].cut()
            await case.knows(d=5)
            assert case.things.states == [{"a": "1", "b": "2"}, {"d": "5"}]

    run(test, tmp_path)


def test_an_event_that_is_cut_short_comes_again(tmp_path: Path) -> None:
    async def test(path: Path) -> None:
        async def truncated(request: Request) -> None:
            await request.stream(event("ADDED", "c", 4))
            # A chunk that promises more than comes; what there is of it would be a valid event.
            await request.raw(b'200\r\n{"type": "DELETED", "object": {"metadata": {"name": "a"}}}')
            await asyncio.sleep(0.05)
            request.cut()

        async with following(path, LISTED, truncated, step(event("ADDED", "d", 5))) as case:
            await case.until(lambda: case.things.known)
            case.server.requests[0].cut()
            await case.knows(a=1, b=2, c=4, d=5)
            assert case.server.requests[2].query["resourceVersion"] == "4"

    run(test, tmp_path)


def test_a_list_that_breaks_off_changes_nothing(tmp_path: Path) -> None:
    async def test(path: Path) -> None:
        async def broken(request: Request) -> None:
            await request.stream(event("ADDED", "x", 8))
            request.cut()

        whole = step(event("ADDED", "b", 9), bookmark(10, end=True))
        gone = answer({"message": "gone"}, 410)
        async with following(path, LISTED, gone, broken, whole) as case:
            await case.until(lambda: case.things.known)
            case.server.requests[0].cut()
            await case.knows(b=9)
            assert case.things.states == [{"a": "1", "b": "2"}, {"b": "9"}]

    run(test, tmp_path)


def test_a_refusal_is_told_and_tried_again(tmp_path: Path) -> None:
    async def test(path: Path) -> None:
        busy = answer({"message": "too many requests"}, 429, "Retry-After: 0.01\r\n")
        denied = answer({"message": 'User "u" cannot list resource "things"'}, 403)
        problems: list[str | None] = []

        async def remember(request: Request) -> None:
            problems.append(case.watch.problem)
            await LISTED(request)

        async with following(path, busy, denied, remember) as case:
            await case.knows(a=1, b=2)
            assert problems[0] is not None
            assert 'resources: ["things"], verbs: ["get", "list", "watch"]' in problems[0]
            assert 'apiGroups: ["test.dev"]' in problems[0]
            assert case.watch.problem is None
            assert case.watch.restarts["error"] == 2

    run(test, tmp_path)


def test_a_version_of_another_etcd_means_a_new_list(tmp_path: Path) -> None:
    async def test(path: Path) -> None:
        ahead = answer({"message": "Too large resource version: 3, current: 2"}, 504)
        again = step(event("ADDED", "z", 1), bookmark(2, end=True))
        async with following(path, LISTED, ahead, again) as case:
            await case.until(lambda: case.things.known)
            case.server.requests[0].cut()
            await case.knows(z=1)

    run(test, tmp_path)


# --- credentials --------------------------------------------------------------------------------------


async def _authorization(server: FaultServer, credentials: Credentials) -> list[str]:
    api = ApiServer(credentials)
    with contextlib.suppress(ApiFault):
        await api.get("/x", {})
    await api.close()
    return [request.headers.get("authorization", "") for request in server.requests]


def test_a_pods_token_is_read_again_for_each_request(tmp_path: Path) -> None:
    async def test(path: Path) -> None:
        token, authority = path / "token", path / "ca.crt"
        authority.write_text("-")
        async with FaultServer([answer({})] * 3).running() as server:
            host, _, port = server.url.removeprefix("http://").partition(":")
            credentials = Credentials(
                token_file=str(token),
                ca_file=str(authority),
                environment={"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port},
            )
            for value in ("one", "two\n"):
                token.write_text(value)
                # In a pod it is always https: what is looked at here is what would be sent.
                with pytest.raises(ApiFault, match=r"token: "):
                    await credentials.current()
                assert credentials._loaded.api_key["BearerToken"].split() == ["bearer", value.strip()]

    run(test, tmp_path)


def test_a_token_that_is_refused_is_read_anew_and_tried_once_more(tmp_path: Path) -> None:
    async def test(path: Path) -> None:
        async with FaultServer([answer({}, 401), answer({})]).running() as server:
            counter = path / "count"
            plugin = path / "plugin"
            plugin.write_text(
                "#!/bin/sh\n"
                f"echo x >> {counter}; n=$(wc -l < {counter})\n"
                'echo \'{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential",\'\n'
                'echo \'"status": {"expirationTimestamp": "2999-01-01T00:00:00Z", "token": "t\'$n\'"}}\'\n'
            )
            plugin.chmod(0o755)
            execute = {"apiVersion": "client.authentication.k8s.io/v1", "command": str(plugin)}
            config = kubeconfig(path / "kubeconfig", server.url, exec=execute)
            assert await _authorization(server, Credentials(config)) == ["bearer t1", "bearer t2"]

    run(test, tmp_path)


def test_a_plugin_that_fails_is_a_line(tmp_path: Path) -> None:
    async def test(path: Path) -> None:
        execute = {"apiVersion": "client.authentication.k8s.io/v1", "command": "/bin/false"}
        config = kubeconfig(path / "kubeconfig", "http://127.0.0.1:1", exec=execute)
        with pytest.raises(ApiFault, match=r"kubeconfig .*: exec: process returned 1"):
            await ApiServer(Credentials(config)).get("/x", {})

    run(test, tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "a: b", "current-context: c\ncontexts: 3", "{", "\0"])
def test_a_kubeconfig_that_is_none_is_a_line(tmp_path: Path, text: str) -> None:
    async def test(path: Path) -> None:
        (path / "kubeconfig").write_text(text)
        with pytest.raises(ApiFault, match=r"kubeconfig .*: ") as caught:
            await ApiServer(Credentials(str(path / "kubeconfig"))).get("/x", {})
        assert "\n" not in str(caught.value)

    run(test, tmp_path)


def test_no_credentials_at_all_say_where_they_were_looked_for(tmp_path: Path) -> None:
    from dataplane.errors import InputError

    with pytest.raises(InputError, match="not in a pod, no --kubeconfig or KUBECONFIG"):
        Credentials(environment={"HOME": str(tmp_path)})
    with pytest.raises(InputError, match="no such file"):
        Credentials(str(tmp_path / "missing"))
    (tmp_path / ".kube").mkdir()
    kubeconfig(tmp_path / ".kube" / "config", "http://127.0.0.1:1")
    found: Any = Credentials(environment={"HOME": str(tmp_path)})
    assert found.kubeconfig == str(tmp_path / ".kube" / "config")
