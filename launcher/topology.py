"""The number of nodes and workers of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from configs.errors import InputError

if TYPE_CHECKING:
    from launcher.nodes import Node


@dataclass(frozen=True)
class Topology:
    """Nodes of a run, workers per node, and the device of each worker."""

    nodes: int
    per_node: int
    """Workers per node."""
    gpu: bool
    """Each worker holds a GPU."""

    @property
    def workers(self) -> int:
        """Workers on all nodes."""
        return self.nodes * self.per_node

    @property
    def bundle(self) -> dict[str, float]:
        """Resources that the run reserves per node."""
        return {"CPU": float(self.per_node)} | ({"GPU": float(self.per_node)} if self.gpu else {})

    def fits(self, node: Node) -> bool:
        """Return whether the node is large enough, in use or not."""
        return node.cpus >= self.per_node and (not self.gpu or node.gpus >= self.per_node)

    def fits_on(self, nodes: Sequence[Node]) -> bool:
        """Return whether enough of the nodes are large enough, in use or not."""
        return sum(map(self.fits, nodes)) >= self.nodes

    def __str__(self) -> str:
        device = "GPU" if self.gpu else "CPU"
        plural = "s" * (self.per_node > 1)
        return f"{self.nodes} node{'s' * (self.nodes > 1)} with {self.per_node} {device}{plural} each"


def threads_per_worker(cpus: int, workers: int) -> int:
    """Return the threads of each of the workers on a node with `cpus` CPUs."""
    return max(1, cpus // workers)


def check_tensor_groups(nodes: Sequence[str], tensor: int) -> None:
    """Require that every tensor-parallel group (consecutive ranks) lies on one node, because its traffic needs NVLink.

    Args:
        nodes: Address of the node of each rank.
        tensor: Size of a group.

    Raises:
        InputError: A group spans nodes.
    """
    for first in range(0, len(nodes), tensor):
        addresses = set(nodes[first : first + tensor])
        if len(addresses) > 1:
            raise InputError(
                f"parallel.tensor: ranks {first} to {first + tensor - 1} form a tensor-parallel group but lie on the "
                f"nodes {', '.join(sorted(addresses))}; make cluster.workers_per_node a multiple of {tensor}",
                key="parallel.tensor",
                code="tensor-group-spans-nodes",
            )
