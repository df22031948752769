"""Processes that tests start."""

from __future__ import annotations

#: Seconds after which a process has hung. No measure of speed: what takes seconds on an idle machine ends well before
#: that on one that is a hundred times as slow.
HANGS = 3600
