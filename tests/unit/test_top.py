"""What `podgate top` computes, and what its keys do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import DataTable, Input, Static, TabbedContent

from dataplane.cli.top_feed import Agent, Feed
from dataplane.cli.top_view import Explanation, TopView, overview_lines, table_rows
from dataplane.errors import AgentUnreachable, InputError
from dataplane.observe import top as model
from dataplane.observe.control import ControlServer
from dataplane.observe.selection import Selection
from dataplane.observe.top import Rate, Top, question, size

Row = dict[str, Any]
NO_END = {"pod": None, "reason": None, "policy": None, "rule": None}


def record(**more: Any) -> Row:
    made: Row = {
        "ts": "2026-01-02T03:04:05.678901+00:00",
        "verdict": "deny",
        "reason": "no-rule",
        "would_deny": None,
        "direction": "ingress",
        "policy": None,
        "rule": None,
        "policies": ["shop/db"],
        "src": "10.0.0.1",
        "src_port": 40112,
        "dst": "10.0.0.2",
        "dst_port": 5432,
        "protocol": "TCP",
        "src_pod": "shop/web",
        "dst_pod": "shop/db-0",
        "tcp_flags": "SYN",
        "icmp_type": None,
        "icmp_code": None,
        "egress": NO_END,
        "ingress": {"pod": "shop/db-0", "reason": "no-rule", "policy": None, "rule": None},
        "reply": False,
        "cached": False,
        "generation": 7,
        "bytes": 60,
    }
    return made | more


def allowed(**more: Any) -> Row:
    ingress = {"pod": "shop/db-0", "reason": "policy-rule", "policy": "shop/db", "rule": 0}
    return record(
        verdict="allow", reason="policy-rule", policy="shop/db", policies=[], ingress=ingress, **more
    )


def status(pid: int = 1, depth: int = 0, **counters: int) -> Row:
    return {
        "ready": True,
        "generation": 7,
        "pods": 2,
        "policies": 1,
        "audit": False,
        "problems": [],
        "queues": [{"num": 9, "depth": depth, "dropped": 3, "user_dropped": 1}],
        "counters": {name.replace("_", "-"): count for name, count in counters.items()},
        "programming_ms": {"changes": 2, "p50": 1.5, "p99": 4.0},
        "pid": pid,
    }


def flow(sent: int | None, received: int | None = 0, **more: Any) -> Row:
    counted = sent is not None
    row = {name: allowed()[name] for name in ("src", "src_port", "dst", "dst_port", "protocol")}
    row |= {"src_pod": "shop/web", "dst_pod": "shop/db-0", "verdict": "allow", "reason": "policy-rule"}
    row |= {"policy": "shop/db", "bytes": sent, "reply_bytes": received if counted else None}
    row |= {"packets": 1 if counted else None, "reply_packets": 1 if counted else None}
    return row | more


# -- the model


def test_a_rate_is_over_the_last_seconds_only() -> None:
    rate = Rate()
    assert rate.at(0) == 0
    for second in range(20):
        rate.add(second, 30)
    assert rate.at(19) == pytest.approx(30)
    assert rate.at(24) == pytest.approx(15)
    assert rate.at(40) == 0


def test_a_rate_that_began_just_now_is_not_thinned_out() -> None:
    rate = Rate()
    rate.begin(100)
    rate.add(101, 10)
    rate.add(102, 10)
    assert rate.at(102) == pytest.approx(10)


def test_a_flood_keeps_few_steps() -> None:
    rate = Rate()
    for number in range(20_000):
        rate.add(number / 10_000)
    assert rate.at(2.0) == pytest.approx(10_000)
    assert len(rate._steps) < 50


def test_denials_are_by_pod_direction_and_policies() -> None:
    top = Top(0)
    for port in (1, 2, 3):
        top.add_record(record(src_port=port), 1)
    top.add_record(record(policies=["shop/other"]), 1)
    top.add_record(allowed(), 1)
    first, second = top.denials(1)
    assert (first.pod, first.direction, first.why, first.packets) == (
        *("shop/db-0", "ingress", "no-rule (shop/db)"),
        3,
    )
    assert first.last["src_port"] == 3
    assert (second.why, second.packets) == ("no-rule (shop/other)", 1)
    assert len(top.recent) == 5
    assert top.overview(1).denied == pytest.approx(4)


def test_what_an_audit_would_deny_is_told_but_is_not_denied() -> None:
    top = Top(0)
    top.add_record(record(verdict="allow", reason="audit", would_deny="no-rule"), 1)
    (one,) = top.denials(1)
    assert (one.verdict, one.why) == ("audit", "no-rule (shop/db)")
    assert top.overview(1).denied == 0


@pytest.mark.parametrize(
    ("direction", "reply", "pod"),
    [("ingress", False, "b/to"), ("egress", False, "a/from"), ("ingress", True, "a/from")],
)
def test_the_pod_of_a_denial_is_the_one_at_the_end_that_denied(direction: str, reply: bool, pod: str) -> None:
    top = Top(0)
    ends = {"egress": NO_END, "ingress": NO_END, "src_pod": "a/from", "dst_pod": "b/to"}
    top.add_record(record(direction=direction, reply=reply, **ends), 1)
    assert top.denials(1)[0].pod == pod


def test_denials_are_bounded_and_the_longest_silent_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "MOST_DENIALS", 2)
    top = Top(0)
    for policies in (["a/a"], ["b/b"], ["a/a"], ["c/c"]):
        top.add_record(record(policies=policies), 1)
    assert {one.why for one in top.denials(1)} == {"no-rule (a/a)", "no-rule (c/c)"}


def test_lost_records_are_counted_and_the_beginning_is_no_verdict() -> None:
    top = Top(0)
    top.add_record({"began": "now", "filter": ""}, 0)
    top.add_record({"lost": 12, "where": "reader"}, 0)
    assert (top.overview(0).lost, len(top.recent)) == (12, 0)


def test_verdicts_per_second_are_the_differences_of_the_counters() -> None:
    top = Top(0)
    top.add_status(status(policy_rule=1_000_000, queue_full=5), 0)
    assert top.overview(0).verdicts == 0
    top.add_status(status(policy_rule=1_000_200, no_rule=40, queue_full=500, depth=7), 2)
    top.add_status(status(policy_rule=1_000_400, no_rule=40, queue_full=900), 4)
    numbers = top.overview(4)
    assert dict(numbers.by_reason) == {"policy-rule": pytest.approx(100), "no-rule": pytest.approx(20)}
    assert numbers.verdicts == pytest.approx(120)
    assert (numbers.depth, numbers.deepest, numbers.dropped) == (0, 7, 4)


def test_an_agent_that_began_anew_gives_no_rate_of_its_past() -> None:
    top = Top(0)
    top.add_status(status(pid=1, policy_rule=10), 0)
    top.add_status(status(pid=2, policy_rule=5000), 1)
    assert top.overview(1).verdicts == 0


def test_talkers_sum_the_flows_to_one_port_and_rate_what_is_new() -> None:
    top = Top(0)
    top.add_flows([flow(1000, 500), flow(10, 0, src_port=2), flow(9, dst_port=80)], 0)
    assert all(one.rate == 0 for one in top.talkers(0))  # when those bytes were sent nobody knows
    top.add_flows([flow(3000, 1500), flow(10, 0, src_port=2), flow(3000, src_port=3)], 2)
    (one,) = top.talkers(2)
    assert one.ends == ("shop/web", "shop/db-0:5432", "TCP")
    assert (one.flows, one.bytes, one.packets) == (3, 7510, 6)
    assert one.rate == pytest.approx((3000 + 3000) / 2)


def test_talkers_without_counters_have_no_bytes() -> None:
    top = Top(0)
    top.add_flows([flow(None), flow(None, src_port=2)], 0)
    (one,) = top.talkers(0)
    assert (one.flows, one.bytes, one.packets) == (2, None, None)
    assert [str(cell) for cell in table_rows("talkers", top, 0)[0][1][:4]] == ["-", "-", "-", "2"]


def test_the_question_is_that_of_the_flow() -> None:
    asked = {"from": "10.0.0.1", "to": "10.0.0.2", "port": "5432/TCP"}
    assert question(record()) == asked
    back = record(src="10.0.0.2", dst="10.0.0.1", src_port=5432, dst_port=40112, reply=True)
    assert question(back) == asked
    ping = record(protocol="ICMPv6", src_port=None, dst_port=None)
    assert question(ping) == asked | {"port": "ICMP"}
    assert question(record(protocol="GRE", dst_port=None)) is None
    assert question(record(src=None)) is None


def test_sizes_are_for_people() -> None:
    assert [size(count) for count in (None, 0, 812, 1234, 5_600_000)] == [
        *("-", "0 B", "812 B", "1.2 kB", "5.6 MB")
    ]


def test_the_numbers_say_how_the_agent_is() -> None:
    top = Top(0)
    assert overview_lines(None, top.overview(0)) == ["waiting for the agent's answer"]
    top.add_status(status(no_rule=1), 0)
    top.add_status(status(no_rule=21), 2)
    text = "\n".join(overview_lines(top.status, top.overview(2)))
    for words in ("ready, generation 7", "verdicts/s 10 (no-rule 10)", "queue depth 0", "1.5 ms, p99 4.0 ms"):
        assert words in text


# -- the view, with an agent's socket that answers what the test says


@asynccontextmanager
async def served(path: Path, *records: Row, seen: list[Row] | None = None) -> AsyncIterator[Agent]:
    asked = seen if seen is not None else []

    async def trace(query: Any) -> AsyncIterator[list[Row]]:
        Selection.parse([query["filter"]])
        asked.append(dict(query))
        yield [{"began": "now", "filter": query["filter"]}]
        yield list(records)
        await asyncio.Event().wait()

    async def answer_status(_query: Any) -> Row:
        return status(no_rule=1)

    async def answer_flows(_query: Any) -> list[Row]:
        return [flow(1000)]

    async def answer_explain(query: Any) -> Row:
        raise InputError(f"asked about {json.dumps(dict(query), sort_keys=True)}")

    answers = {"status": answer_status, "flows": answer_flows, "explain": answer_explain}
    server = ControlServer(path, answers, {"trace": trace})  # type: ignore[dict-item]
    await server.start()
    try:
        async with Agent(path) as agent:
            yield agent
    finally:
        await server.stop()


async def eventually(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - what is waited for is anything a screen may show
            await asyncio.sleep(0.01)


def text_of(view: TopView, widget: str) -> str:
    return str(view.screen.query_one(widget, Static).render())


def test_keys_of_the_view(tmp_path: Path) -> None:
    seen: list[Row] = []

    async def drive() -> None:
        denied = record(src_pod="[red]/evil")  # nothing that others name is markup
        async with served(tmp_path / "s", denied, allowed(), seen=seen) as agent:
            view = TopView(agent, Selection())
            async with view.run_test(size=(140, 40)) as pilot:
                tables = view.query_one("#tables", TabbedContent)
                rows = view.query_one("#denials-rows", DataTable)
                await eventually(lambda: rows.row_count == 1)
                assert "[red]/evil:40112" in str(rows.get_row_at(0)[6])

                await pilot.press("enter")
                await eventually(lambda: isinstance(view.screen, Explanation))
                shown = text_of(view, "#explanation")
                assert "deny  [red]/evil:40112 > shop/db-0:5432  TCP SYN" in shown
                assert 'asked about {"from": "10.0.0.1", "port": "5432/TCP", "to": "10.0.0.2"}' in shown
                await pilot.press("escape")

                await pilot.press("tab")
                await eventually(lambda: tables.active == "talkers")
                await eventually(lambda: view.query_one("#talkers-rows", DataTable).row_count == 1)
                await pilot.press("tab")
                await eventually(lambda: view.query_one("#verdicts-rows", DataTable).row_count == 2)
                await pilot.press("tab")
                await eventually(lambda: tables.active == "denials")

                await pilot.press("slash", *"pod=", "enter")
                await pilot.pause()
                assert "FILTER: 'pod=': a value is missing" in text_of(view, "#trouble")
                await pilot.press(*"shop/x", "enter")
                await eventually(lambda: str(view.feed.selection) == "pod=shop/x")
                await eventually(lambda: len(seen) == 2)
                assert not view.query_one("#filter", Input).display
                await pilot.press("slash", "x", "escape")
                assert str(view.feed.selection) == "pod=shop/x"

                await pilot.press("space")
                await eventually(lambda: "PAUSED" in text_of(view, "#note"))
                await pilot.press("q")
            assert view.return_code == 0

    asyncio.run(drive())
    assert [query["filter"] for query in seen] == ["", "pod=shop/x"]
    assert {query["capture"] for query in seen} == {"misses"}


def test_the_cursor_stays_on_its_row(tmp_path: Path) -> None:
    async def drive() -> None:
        many = [record(policies=[f"a/{name}"]) for name in "bc" for _ in range(2 if name == "b" else 1)]
        async with served(tmp_path / "s", *many) as agent:
            view = TopView(agent, Selection())
            async with view.run_test(size=(140, 40)) as pilot:
                rows = view.query_one("#denials-rows", DataTable)
                await eventually(lambda: rows.row_count == 2)
                await pilot.press("down")
                assert rows.cursor_row == 1
                for _ in range(3):
                    view.feed.top.add_record(record(policies=["a/c"]), 0)
                    view.feed.top.add_record(record(policies=["a/d"]), 0)
                view.show_now()
                at = rows.get_row_at(rows.cursor_row)
                assert str(at[5]) == "no-rule (a/c)"

    asyncio.run(drive())


def test_a_feed_says_that_the_agent_is_gone_and_goes_on_when_it_is_back(tmp_path: Path) -> None:
    path = tmp_path / "s"

    async def drive() -> None:
        async with Agent(path) as agent:
            feed = Feed(agent, Selection())
            running = asyncio.create_task(feed.run())
            await eventually(lambda: feed.trouble is not None)
            assert str(path) in str(feed.trouble)
            async with served(path, record()):
                await eventually(lambda: feed.trouble is None and len(feed.top.recent) == 1)
            await eventually(lambda: feed.trouble is not None)
            running.cancel()

    asyncio.run(drive())


def test_refusals_and_silence_are_told_apart(tmp_path: Path) -> None:
    async def drive() -> None:
        async with served(tmp_path / "s") as agent:
            with pytest.raises(InputError, match="asked about"):
                await agent.ask("explain", {"from": "x"})
            with pytest.raises(InputError, match="verdict=maybe"):
                async for _ in agent.stream("trace", {"filter": "verdict=maybe"}):
                    pass
        async with Agent(tmp_path / "none") as nobody:
            with pytest.raises(AgentUnreachable, match="does not answer"):
                await nobody.ask("status")

    asyncio.run(drive())
