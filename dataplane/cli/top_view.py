"""The terminal view of `podgate top`: tables that follow a `Feed`, and keys."""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Input, Static, TabbedContent, TabPane

from dataplane.cli.explain import told
from dataplane.cli.top_feed import Agent, Feed
from dataplane.errors import AgentUnreachable, InputError
from dataplane.observe.lines import Record, clock, decision, end, protocol
from dataplane.observe.selection import Selection
from dataplane.observe.top import WINDOW_SECONDS, Overview, Top, per_second, question, recorded, size
from dataplane.wording import count

REFRESH_SECONDS = 1.0
MOST_ROWS = 100
REASONS_SHOWN = 3

TITLES = {"denials": "Denials", "talkers": "Top talkers", "verdicts": "Verdicts"}
COLUMNS = {
    "denials": ("packets", "/s", "", "pod", "direction", "why (isolated by)", "latest"),
    "talkers": ("bytes/s", "bytes", "packets", "flows", "from", "to", "protocol", "verdict", "why"),
    "verdicts": ("time", "verdict", "from", "to", "protocol", "why"),
}
NOTES = {
    "denials": "Every denied packet counts, by the pod that denied it and its policies.",
    "talkers": (
        "Live flows of the kernel's conntrack. Its bytes count where net.netfilter.nf_conntrack_acct is 1,"
        " for flows that began since."
    ),
    "verdicts": (
        "Packets that opened flows, and denied ones. What follows in a flow, and pods without a policy, show"
        " none."
    ),
}
_COLOURS = {"allow": "green", "deny": "red", "audit": "yellow"}

Row = tuple[str, tuple[Text | str, ...], Record]  # its key, its cells, what Enter explains


def overview_lines(status: dict[str, Any] | Any, numbers: Overview) -> list[str]:
    """The numbers above the tables: how the agent is, how much it judges, how quick it is."""
    if status is None:
        return ["waiting for the agent's answer"]
    word = "ready" if status["ready"] else "not ready"
    problems = f", {count(len(status['problems']), 'problem')}: podgate status" if status["problems"] else ""
    audit = ", audit: drops nothing" if status["audit"] else ""
    shown = numbers.by_reason[:REASONS_SHOWN]
    reasons = ", ".join(f"{name} {per_second(rate)}" for name, rate in shown)
    latency = status["programming_ms"]
    took = (
        f"{latency['p50']} ms, p99 {latency['p99']} ms ({count(latency['changes'], 'change')})"
        if latency["changes"]
        else "no changes yet"
    )
    lost = f"   {numbers.lost:,} records lost (too many at once)" if numbers.lost else ""
    return [
        f"{word}, generation {status['generation']}, {count(status['pods'], 'pod')} under"
        f" {count(status['policies'], 'policy', 'policies')}{audit}{problems}",
        f"verdicts/s {per_second(numbers.verdicts)}{f' ({reasons})' if reasons else ''}"
        f"   denied/s {per_second(numbers.denied)}{lost}",
        f"queue depth {numbers.depth} (at most {numbers.deepest}), dropped by full queues"
        f" {numbers.dropped:,}   policy change to rules in force {took}",
    ]


def table_rows(name: str, top: Top, now: float) -> list[Row]:
    """The first rows of a table of COLUMNS."""
    if name == "denials":
        return [
            (
                "\n".join((one.verdict, one.direction, one.pod, one.why)),
                (
                    _right(f"{one.packets:,}"),
                    _right(per_second(one.rate.at(now))),
                    _word(one.verdict),
                    one.pod,
                    one.direction or "-",
                    one.why,
                    one.peer,
                ),
                one.last,
            )
            for one in top.denials(now)[:MOST_ROWS]
        ]
    if name == "talkers":
        return [
            (
                "\n".join(one.ends),
                (
                    _right(size(one.rate) if one.bytes is not None else "-"),
                    _right(size(one.bytes)),
                    _right("-" if one.packets is None else f"{one.packets:,}"),
                    _right(f"{one.flows:,}"),
                    *one.ends,
                    _word(one.last["verdict"]),
                    one.last["reason"] + (f" ({one.last['policy']})" if one.last["policy"] else ""),
                ),
                one.last,
            )
            for one in top.talkers(now)[:MOST_ROWS]
        ]
    latest = list(top.recent)[: -MOST_ROWS - 1 : -1]
    return [
        (
            str(number),
            (
                clock(one.get("ts"))[:12],
                _word(one["verdict"]),
                end(one, "src"),
                end(one, "dst"),
                protocol(one),
                decision(one),
            ),
            one,
        )
        for number, one in latest
    ]


def _right(text: str) -> Text:
    return Text(text, justify="right")


def _word(verdict: str) -> Text:
    return Text(verdict, style=_COLOURS.get(verdict, ""))


class Rows(DataTable[Text | str]):
    """A table whose Enter says in the footer what it does here."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "select_cursor", "explain", key_display="enter")
    ]


class Explanation(ModalScreen[None]):
    """Why a packet got its verdict; closed by Escape, Enter or q."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "close", "close"),
        Binding("enter,q", "close", show=False),
    ]

    def __init__(self, text: Text) -> None:
        super().__init__()
        self.text = text

    def compose(self) -> ComposeResult:
        with VerticalScroll():
            yield Static(self.text, id="explanation")
        yield Footer()

    def action_close(self) -> None:
        self.dismiss()


class TopView(App[None]):
    """Shows what a `Feed` of the agent's socket gathers."""

    CSS = """
    #overview { padding: 0 1; }
    #trouble { padding: 0 1; background: $error; color: $text; display: none; }
    #note { padding: 0 1; color: $text-muted; }
    #filter { display: none; }
    TabbedContent, Rows { height: 1fr; }
    TabPane { padding: 0; }
    Explanation { align: center middle; }
    Explanation VerticalScroll { width: 90%; height: 80%; border: round $primary; background: $surface; }
    #explanation { padding: 0 1; }
    """
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "quit"),
        Binding("slash", "filter", "filter", key_display="/"),
        Binding("tab", "next_table", "next table", priority=True),
        Binding("space", "pause", "pause"),
        Binding("escape", "leave_filter", show=False),
    ]

    def __init__(self, agent: Agent, selection: Selection) -> None:
        super().__init__()
        self._agent = agent
        self.feed = Feed(agent, selection)
        self._feeding: asyncio.Task[None] | None = None
        self._shown: dict[str, dict[str, Record]] = {name: {} for name in TITLES}
        self._refused = ""  # the filter that was just entered, and why
        self._paused = False

    def compose(self) -> ComposeResult:
        yield Static(id="overview")
        yield Static(id="trouble")
        with TabbedContent(*TITLES.values(), id="tables"):
            for name, title in TITLES.items():
                with TabPane(title, id=name):
                    yield Rows(id=f"{name}-rows", cursor_type="row")
        yield Static(id="note")
        yield Input(placeholder="verdict=deny pod=shop/db 'tcp port 5432'; empty shows all", id="filter")
        yield Footer()

    def on_mount(self) -> None:
        for name, columns in COLUMNS.items():
            self._table(name).add_columns(*columns)
        self._table(self._active).focus()
        self._follow(self.feed)
        self.set_interval(REFRESH_SECONDS, self.show_now)
        self.set_timer(REFRESH_SECONDS / 4, self.show_now)  # the first answers are there at once

    def on_unmount(self) -> None:
        if self._feeding is not None:
            self._feeding.cancel()

    def _follow(self, feed: Feed) -> None:
        if self._feeding is not None:
            self._feeding.cancel()
        self.feed = feed
        self._feeding = asyncio.create_task(feed.run())

    @property
    def _active(self) -> str:
        return self.query_one("#tables", TabbedContent).active or next(iter(TITLES))

    def _table(self, name: str) -> Rows:
        return self.query_one(f"#{name}-rows", Rows)

    # -- showing

    def show_now(self) -> None:
        """Bring everything that is seen up to date."""
        if self.screen is not self.screen_stack[0]:
            return  # an explanation is read
        now, feed = time.monotonic(), self.feed
        if self._feeding is not None and self._feeding.done() and not self._feeding.cancelled():
            self._feeding.result()  # a fault of ours must not look like a quiet node
        self.query_one("#overview", Static).update(
            Text("\n".join(overview_lines(feed.top.status, feed.top.overview(now))))
        )
        trouble = self._refused or (f"{feed.trouble}; trying again" if feed.trouble else "")
        line = self.query_one("#trouble", Static)
        line.display = bool(trouble)
        line.update(Text(trouble))
        self.query_one("#note", Static).update(Text(self._note()))
        if not self._paused:
            self._show_rows(self._active, table_rows(self._active, feed.top, now))

    def _note(self) -> str:
        selection, name = self.feed.selection, self._active
        parts = [f"Filter: {selection}."] if str(selection) else []
        if name == "talkers" and selection.packets:
            parts.append("Flows have no packets: the pcap-filter part does not select among them.")
        parts.append(NOTES[name])
        if self._paused:
            parts.insert(0, "PAUSED (space goes on).")
        return " ".join(parts)

    def _show_rows(self, name: str, rows: Sequence[Row]) -> None:
        """Put rows in a table. The cursor stays on its row, wherever that is now, unless it is the first."""
        table, before = self._table(name), list(self._shown[name])
        at = table.cursor_row
        key = before[at] if 0 < at < len(before) else None
        offset = table.scroll_offset
        with self.batch_update():
            table.clear()
            for row_key, cells, _ in rows:
                table.add_row(*map(_cell, cells), key=row_key)
            self._shown[name] = {row_key: record for row_key, _, record in rows}
            keys = list(self._shown[name])
            if key in self._shown[name]:
                table.move_cursor(row=keys.index(key))
            table.scroll_to(offset.x, None, animate=False)

    # -- keys

    def action_next_table(self) -> None:
        """Show the table after this one."""
        if self.screen is not self.screen_stack[0] or self.query_one("#filter").has_focus:
            return
        names = list(TITLES)
        name = names[(names.index(self._active) + 1) % len(names)]
        self.query_one("#tables", TabbedContent).active = name

    def on_tabbed_content_tab_activated(self) -> None:
        if not self.query_one("#filter").display:
            self._table(self._active).focus()
        self.show_now()

    def action_pause(self) -> None:
        """Keep the rows as they are, or follow again."""
        self._paused = not self._paused
        self.show_now()

    def action_filter(self) -> None:
        """Ask for a filter, beginning with the one in force."""
        asked = self.query_one("#filter", Input)
        asked.value = str(self.feed.selection)
        asked.display = True
        self.screen.set_focus(asked)  # at once: the next keys are the filter's

    def action_leave_filter(self) -> None:
        """Keep the filter as it was."""
        self._refused = ""
        self._close_filter()

    def _close_filter(self) -> None:
        self.query_one("#filter", Input).display = False
        self._table(self._active).focus()
        self.show_now()

    async def on_input_submitted(self, event: Input.Submitted) -> None:
        self._refused = ""
        try:
            selection = _read_filter(event.value)
            await asyncio.to_thread(selection.compile)
        except InputError as error:
            self._refused = str(error)
            self.show_now()
            return
        if selection != self.feed.selection:
            self._follow(Feed(self._agent, selection))
        self._close_filter()

    def on_data_table_row_selected(self) -> None:
        """Open the explanation of the row under the cursor."""
        name = self._active
        records = list(self._shown[name].values())
        at = self._table(name).cursor_row
        if 0 <= at < len(records):
            self.run_worker(self._explain(records[at]), exclusive=True)

    async def _explain(self, record: Record) -> None:
        asked = question(record)
        text = Text(recorded(record) + "\n\n")
        if asked is None:
            text.append("The agent explains TCP, UDP, SCTP and ICMP between known addresses only.", "yellow")
        else:
            try:
                answer = await self._agent.ask("explain", asked)
                text.append("By the rules in force now:\n", "bold")
                text.append_text(Text.from_ansi("\n".join(told(answer))))
            except (AgentUnreachable, InputError) as error:
                text.append(f"The agent does not explain it: {error}", "yellow")
        self.push_screen(Explanation(text))


def _cell(cell: Text | str) -> Text:
    return cell if isinstance(cell, Text) else Text(cell)


def _read_filter(line: str) -> Selection:
    """A filter as it would be typed in a shell. InputError."""
    try:
        return Selection.parse(shlex.split(line))
    except ValueError:
        raise InputError("FILTER: a quote is not closed") from None


def plain(top: Top, now: float, names: Iterable[str] = ("denials", "talkers")) -> Iterable[Any]:
    """What the view shows, as things that a rich console prints one below the other."""
    from rich.table import Table

    yield from overview_lines(top.status, top.overview(now))
    for name in names:
        rows = table_rows(name, top, now)
        yield f"\n{TITLES[name]} (rates of the last {WINDOW_SECONDS:.0f} s at most). {NOTES[name]}"
        if not rows:
            yield "none"
            continue
        table = Table(*COLUMNS[name], box=None, pad_edge=False)
        for _, cells, _ in rows:
            table.add_row(*map(_cell, cells))
        yield table
