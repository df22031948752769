"""The package's version, also for files that it writes."""

from __future__ import annotations

__version__ = "0.1.0"
