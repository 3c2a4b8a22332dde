"""Collectives that ranks submit by name, each in its own order, and wait for later."""

from mpidl.collectives.engine import Engine
from mpidl.collectives.request import Handle, Request

__all__ = ["Engine", "Handle", "Request"]
