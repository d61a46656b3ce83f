"""Collections on disk."""

from hysafe.index.collection import Collection, CollectionMeta, CollectionWriter

__all__ = ["Collection", "CollectionMeta", "CollectionWriter"]
