"""Bounded caches: any policy with any storage."""

from attnspan.cache.storage import Dense, Int4, Int8, Storage, parse_storage

__all__ = ["Dense", "Int4", "Int8", "Storage", "parse_storage"]
