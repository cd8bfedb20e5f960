"""The object store, as fixtures of this folder."""

from tests.object_store import folder, make, proxy, server

__all__ = ["folder", "make", "proxy", "server"]
