"""Structured log lines on stderr: one line each, as text for people or JSON for machines."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

Logger = Any  # structlog's bound loggers are made at run time


def configure(log_format: str = "text", level: str = "info") -> None:
    """Set the process's logging up; `log_format` is ``text`` or ``json``."""
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), pad_event_to=0, pad_level=False, timestamp_key="ts", sort_keys=False
        )
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def get_logger() -> Logger:
    """The process's logger."""
    return structlog.get_logger()
