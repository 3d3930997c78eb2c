"""The configuration of a run. Every section is frozen and refuses unknown keys.

Each section of a recipe has its file: `phases.0.lr.warmup` is in `phase.py`, `cluster.nodes` in `cluster.py`. The keys
at the top level are in `run.py`, and the rules between sections in `rules.py`.

The docstrings of sections and keys are the text of `docs/configuration.md`: run `make docs` after a change.
"""

from configs.schema.batch import Batch
from configs.schema.checkpoint import Checkpoint
from configs.schema.cluster import Cluster
from configs.schema.data import Data, Evaluation, Reading, Source
from configs.schema.model import SCRATCH, Model
from configs.schema.monitoring import Monitoring
from configs.schema.optimizer import Optimizer
from configs.schema.parallel import Parallel
from configs.schema.phase import LearningRate, ObjectiveName, Phase, PhaseBatch
from configs.schema.run import Origin, RunConfig
from configs.schema.section import Paths, Section

__all__ = [
    "SCRATCH",
    "Batch",
    "Checkpoint",
    "Cluster",
    "Data",
    "Evaluation",
    "LearningRate",
    "Model",
    "Monitoring",
    "ObjectiveName",
    "Optimizer",
    "Origin",
    "Parallel",
    "Paths",
    "Phase",
    "PhaseBatch",
    "Reading",
    "RunConfig",
    "Section",
    "Source",
]
