"""How fast a model runs here, and how fast other engines run it, each in a process of its own."""

from hanlin.bench.driver import Contender
from hanlin.bench.machine import cores, describe, read_bandwidth
from hanlin.bench.peers import OURS, PEERS, Peer
from hanlin.bench.report import Report, Spread
from hanlin.bench.turns import measure, steps
from hanlin.bench.workloads import Workload, usual

__all__ = [
    "OURS",
    "PEERS",
    "Contender",
    "Peer",
    "Report",
    "Spread",
    "Workload",
    "cores",
    "describe",
    "measure",
    "read_bandwidth",
    "steps",
    "usual",
]
