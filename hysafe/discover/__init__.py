"""Discovery: what a policy does not name, as clusters, and these as proposed nodes."""

from hysafe.discover.clusters import Cluster, find_clusters
from hysafe.discover.proposals import (
    Proposal,
    accepted_policy,
    best_parent,
    central_name,
    propose,
    read_proposals,
    write_proposals,
)

__all__ = [
    "Cluster",
    "Proposal",
    "accepted_policy",
    "best_parent",
    "central_name",
    "find_clusters",
    "propose",
    "read_proposals",
    "write_proposals",
]
