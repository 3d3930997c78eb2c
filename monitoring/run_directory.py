"""The file names of a run directory (contract). No other module spells them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from configs.errors import InputError
from configs.files import RUN_TOKENIZER


@dataclass(frozen=True)
class RunDirectory:
    """The paths of the files of the run in `path`. The class reads nothing, and the files need not exist."""

    path: Path

    @property
    def id(self) -> str:
        """Short id of the path, which tells two runs of one name apart."""
        return hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:6]

    @property
    def config(self) -> Path:
        """The resolved configuration, as YAML."""
        return self.path / "config.yaml"

    @property
    def software(self) -> Path:
        """Versions of Detour and its packages at the latest start, as JSON."""
        return self.path / "software.json"

    @property
    def metrics(self) -> Path:
        """One JSON line per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """One JSON line per event; `monitoring.events` has their types."""
        return self.path / "events.jsonl"

    @property
    def telemetry(self) -> Path:
        """The live state of the run, replaced about once per second."""
        return self.path / "telemetry.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, `step-00000500` and so on."""
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        """The run's copy of its tokenizer, so that a resume needs neither the hub nor the directory it came from."""
        return self.path / RUN_TOKENIZER

    @property
    def export(self) -> Path:
        """The final Hugging Face model."""
        return self.path / "hf"

    @property
    def report(self) -> Path:
        """The run at a glance, as one HTML page."""
        return self.path / "report.html"

    @property
    def canaries(self) -> Path:
        """The canaries in the run's training text, as JSON."""
        return self.path / "canaries.json"

    @property
    def audit(self) -> Path:
        """The exposure of the canaries, as JSON."""
        return self.path / "audit.json"

    @property
    def logs(self) -> Path:
        """Folder of the workers' outputs."""
        return self.path / "logs"

    @property
    def stacks(self) -> Path:
        """Folder of the ranks' stacks at the latest hang."""
        return self.path / "stacks"

    @property
    def lock(self) -> Path:
        """Lock file of the job that owns the directory; it holds the job's token."""
        return self.path / ".lock"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files, with `monitoring.writers: [tensorboard]`."""
        return self.path / "tensorboard"


def require_run(directory: Path) -> RunDirectory:
    """Return the paths of a run directory.

    Raises:
        InputError: The directory holds no run.
    """
    files = RunDirectory(directory)
    if not files.config.exists():
        raise InputError(f"{directory}: not a run directory, it has no {files.config.name}", code="not-a-run")
    return files
