"""Fixtures that several test modules share."""

from __future__ import annotations

from .cluster import base_venv, client_store, lab, onlyhere, packed, prefixes, warm_stores

__all__ = ["base_venv", "client_store", "lab", "onlyhere", "packed", "prefixes", "warm_stores"]
