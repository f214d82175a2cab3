"""Probes: /healthz says whether a restart is needed, /readyz whether everything known is in force."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from aiohttp import web

from dataplane.observe.http import Handler

Problems = Callable[[], Sequence[str]]


def health_pages(dead: Problems, unready: Problems) -> Mapping[str, Handler]:
    """The two pages by path: 200 with one word, or 503 with one line per problem.

    `dead`: what only a restart mends; that the event loop turns, the answer itself shows.
    """

    async def healthz() -> web.Response:
        return _page("alive", dead())

    async def readyz() -> web.Response:
        return _page("ready", unready())

    return {"/healthz": healthz, "/readyz": readyz}


def _page(word: str, problems: Sequence[str]) -> web.Response:
    # A line each, whatever a problem quotes of somebody's object.
    lines = [" ".join(problem.split()) for problem in problems] or [word]
    return web.Response(status=503 if problems else 200, text="\n".join(lines) + "\n")
