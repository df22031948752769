"""Backends for tests of files: those of the cache's tests."""

from __future__ import annotations

from tests.cache.conftest import backend

__all__ = ["backend"]
