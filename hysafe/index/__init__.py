"""Collections on disk."""

from hysafe.index.collection import (
    Collection,
    CollectionMeta,
    CollectionWriter,
    Decision,
    EncodedItem,
    Row,
)

__all__ = ["Collection", "CollectionMeta", "CollectionWriter", "Decision", "EncodedItem", "Row"]
