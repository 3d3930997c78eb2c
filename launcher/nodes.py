"""The nodes of a Ray cluster: which are alive, free, about to go, or lost, and what is known of a loss."""

from __future__ import annotations

import logging
import socket
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import ray

REACH_SECONDS = 2.0
"""Seconds after which a node that does not answer counts as lost."""
DEATHS = {
    1: "the node left the cluster in order",
    2: "the node ended without notice",
    3: "the node was preempted",
    4: "the autoscaler took the node away, because it was idle",
}
"""Words for `ray.rpc.NodeDeathInfo.Reason`, which Ray gives as a number."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Node:
    """An alive node of the cluster, with its total resources, in use or not."""

    id: str
    address: str
    port: int
    """Port of the node's raylet."""
    cpus: int
    gpus: int


def alive_nodes() -> list[Node]:
    """List the nodes that may be given work, this process's own first. Nodes that are being drained are left out."""
    own_id, draining = ray.get_runtime_context().get_node_id(), draining_nodes()
    nodes = [_node(entry) for entry in ray.nodes() if entry["Alive"] and entry["NodeID"] not in draining]
    return sorted(nodes, key=lambda node: (node.id != own_id, node.address, node.id))


def _node(entry: Mapping[str, Any]) -> Node:
    return Node(
        id=entry["NodeID"],
        address=entry["NodeManagerAddress"],
        port=entry["NodeManagerPort"],
        cpus=int(entry["Resources"].get("CPU", 0)),
        gpus=int(entry["Resources"].get("GPU", 0)),
    )


def silent_nodes(nodes: Collection[Node]) -> dict[str, str]:
    """Map the id of each node whose raylet does not answer to the reason. Ray lists a lost node for many seconds."""
    if not nodes:
        return {}
    with ThreadPoolExecutor(min(len(nodes), 64)) as pool:  # because each lost node takes REACH_SECONDS
        reasons = pool.map(lambda node: refusal(node.address, node.port), nodes)
        return {node.id: reason for node, reason in zip(nodes, reasons, strict=True) if reason}


def refusal(host: str, port: int) -> str | None:
    """Return why nothing answers at an address within REACH_SECONDS; None: something does."""
    try:
        with socket.create_connection((host, port), timeout=REACH_SECONDS):
            return None
    except OSError as error:
        return error.strerror or str(error)


def lost_nodes(ids: Collection[str]) -> dict[str, str | None]:
    """Map each of the ids whose node is lost to what is known of the loss.

    Ray needs about 15 seconds to notice a loss. Before that, the node counts as lost if its raylet does not answer.

    Args:
        ids: Ray's ids of nodes.
    """
    entries = {entry["NodeID"]: entry for entry in ray.nodes()}
    silent = silent_nodes([_node(entries[id]) for id in ids if id in entries and entries[id]["Alive"]])
    lost: dict[str, str | None] = {}
    for id in ids:
        entry = entries.get(id)
        if entry is None:
            lost[id] = None
        elif not entry["Alive"]:
            lost[id] = death_account(entry)
        elif id in silent:
            where = f"{entry['NodeManagerAddress']}:{entry['NodeManagerPort']}"
            drained = "it is being drained" if id in draining_nodes() else "it still counts as alive"
            lost[id] = f"{drained}, but its raylet at {where} does not answer: {silent[id]}"
    return lost


def death_account(entry: Mapping[str, Any]) -> str | None:
    """Say in words why Ray counts a node as dead; None if Ray gives no reason.

    Args:
        entry: The node in `ray.nodes()`.
    """
    parts = [DEATHS.get(entry.get("DeathReason", 0)), entry.get("DeathReasonMessage")]
    return ": ".join(part for part in parts if part) or None


def free_nodes(nodes: Collection[Node]) -> list[Node]:
    """Return the nodes with the CPUs and GPUs that no job holds now.

    Where Ray's call for it fails, every node counts as free: a run that asks for one in use then waits in vain, once
    per `cluster.grow_every`.
    """
    try:
        free = dict(_ask_ray_for_free_resources())
    except Exception as error:  # another version of Ray may fail in any way
        logger.warning("Ray %s does not tell which nodes are free (%r)", ray.__version__, error)
        return list(nodes)
    return [
        replace(node, cpus=int(free[node.id].get("CPU", 0)), gpus=int(free[node.id].get("GPU", 0)))
        for node in nodes
        if node.id in free
    ]


def draining_nodes() -> dict[str, int]:
    """Map the id of each node about to be taken away to its deadline in milliseconds since the epoch; 0: no deadline.

    Ray has no public call for it outside Ray Train's workers. Where the private call fails, no node counts as draining:
    a preemption then costs the steps since the newest checkpoint, not the run.
    """
    global _has_warned
    try:
        return dict(_ask_ray_for_draining_nodes())
    except Exception as error:  # another version of Ray may fail in any way
        if not _has_warned:
            logger.warning("Ray %s gives no notice of nodes that are drained (%r)", ray.__version__, error)
            _has_warned = True
        return {}


_has_warned = False


def _ask_ray_for_free_resources() -> dict[str, dict[str, float]]:
    """Call the function behind `ray.available_resources`, which gives the sum only; written for Ray 2.60."""
    free: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()  # noqa: TID251, SLF001 - no public call exists
    return free


def _ask_ray_for_draining_nodes() -> dict[str, int]:
    """Call the function that Ray Train and Ray Serve use; written for Ray 2.60."""
    draining: dict[str, int] = ray._private.state.state.get_draining_nodes()  # noqa: TID251, SLF001 - no public call exists
    return draining
