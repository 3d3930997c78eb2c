"""Downstream tasks: the task YAML and its fine-tuning protocol. `studies.examples` reads the files of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from configs.errors import InputError
from configs.load import read_mapping, read_yaml, require_no_comment, validate
from configs.schema import Paths, Section

SHIPPED = resources.files("studies") / "tasks_described"


class Protocol(Section):
    """Settings of a fine-tuning."""

    epochs: PositiveInt | None = None
    steps: PositiveInt | None = None
    """Length of the fine-tuning, if it is not given in epochs."""
    lr: PositiveFloat
    """Peak learning rate."""
    head_lr: PositiveFloat | None = None
    """Learning rate of the new head; default: `lr`."""
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Warmup as a share of the steps. The rate then falls linearly to zero."""
    batch: PositiveInt
    """Examples per step."""
    length: int = Field(default=512, ge=8)
    """Most tokens that are read at once. A longer text is read in windows; a longer pair is cut. Both are counted."""
    stride: int = Field(default=128, ge=0)
    """Tokens that two windows of a long example share, at most a quarter of `length`. Each window has the labels of its
    text. The text has the mean of the windows' logits, or in a `multi` task the largest of each label."""
    threshold: float | None = Field(default=None, gt=0, lt=1)
    """Probability from which a label of a `multi` example is predicted; default: the best on validation."""
    clip: PositiveFloat = 1.0
    """Largest norm of the gradient."""
    balance: bool = False
    """Weigh the rare labels of a `multi` task up in the loss, by the ratio of examples without and with the label."""
    examples: PositiveInt | None = None
    """Number of training examples, and of validation examples, that are used; default: all. A hash of their content
    chooses them, whatever their order."""

    @model_validator(mode="after")
    def _has_one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give one of epochs and steps")
        return self


PROTOCOLS: dict[str, dict[str, Any]] = {
    "english": {"epochs": 10, "lr": 5e-5, "weight_decay": 0.01, "batch": 16, "length": 512},
    "english-ner": {"epochs": 20, "lr": 5e-5, "weight_decay": 0.01, "batch": 16, "length": 512},
    "french": {"epochs": 15, "lr": 2e-5, "warmup": 0.1, "batch": 4, "length": 2048},
    "french-ner-linear": {
        "steps": 4000,
        "lr": 5e-5,
        "head_lr": 1e-3,
        "warmup": 0.1,
        "clip": 10.0,
        "batch": 16,
        "length": 1024,
    },
    "morfitt": {
        "epochs": 15,
        "lr": 2e-5,
        "warmup": 0.1,
        "batch": 8,
        "length": 512,
        "threshold": 0.7,
        "balance": True,
    },
}
"""Presets of the authors. Each keeps the weights of the best validation score.

- `english`, `english-ner`, `french`: arXiv 2605.12438, fine-tuning protocol. It does not state the weight decay of the
  French presets; they take the English one.
- `french-ner-linear`: steps, rates, warmup, clip, batch and length of the authors' nested-span tagger
  (github.com/Rian-T/tabib, configs/base/ner_span_bert.yaml). Their head is a BiLSTM, a CRF and a biaffine layer; ours
  is one linear layer over BIO tags. It cannot state nested entities: 25.9 % of the test entities of MEDLINE and 17.3 %
  of EMEA's are lost, so scores are not those of the paper.
- `morfitt`: batch, length, threshold and weighted loss are those of the same repository; epochs and rates are `french`.
"""


class Files(Section):
    """Files of a task, relative to its folder. Patterns such as `data/train-*.parquet` name several."""

    train: str | None = None
    """Needed but for kind `masked`."""
    validation: str | None = None
    """Default: every tenth training example, chosen by a hash of its content."""
    test: str | None = None
    """Default: the validation examples, and the result says so."""


class Columns(Section):
    """Columns of a table, or keys of an object; dots lead into nested objects."""

    text: Paths
    """Several columns are joined by spaces."""
    pair: Paths = ()
    """Second text of a sentence pair."""
    label: str


class Task(Section):
    """A task YAML."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    about: str = ""
    source: str = ""
    """How the data is obtained."""
    licence: str = ""
    kind: Literal["tokens", "single", "multi", "regression", "masked"]
    """Entities in words, one label per text, several labels per text, a number per text, or masked tokens of plain
    text. `columns.pair` adds a second text."""
    score: Literal[
        "entity_f1",
        "micro_f1",
        "macro_f1",
        "weighted_f1",
        "binary_f1",
        "accuracy",
        "spearman",
        "pearson",
        "masked_accuracy",
    ]
    """Entity F1 is micro-averaged over exact matches, strict IOB2: an I- without its beginning is no entity."""
    positive: str | None = None
    """Label that binary_f1 scores."""
    scored: tuple[str, ...] = ()
    """Labels that micro, macro and weighted F1 are taken over; default: all."""
    files: Files
    columns: Columns | None = None
    """Columns of the files. For `tokens` only in files of records, where the usual names need not be given."""
    types: tuple[str, ...] = ()
    """Entity types that are kept, the others become O; default: all. Tags without a prefix need it."""
    names: tuple[str, ...] = ()
    """Names of the labels or tags that a file gives as ids, in the order of ids. They may also list labels that would
    else be refused: codes that look like numbers, such as 250.10, and None or NA where it is a class. Where a name is a
    number other than its own id, numbers in the files are names and never ids."""
    separator: str = Field(default="|", min_length=1)
    """Separator between the labels of a `multi` example that holds them in one string."""
    protocol: dict[str, Any] = Field(default_factory=dict)
    """`preset` (english, english-ner, french, french-ner-linear, morfitt), and settings that differ from the preset."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        suited = {"tokens": ("entity_f1",), "regression": ("spearman", "pearson")}
        suited["masked"] = ("masked_accuracy",)
        suited |= {"multi": ("micro_f1", "macro_f1", "weighted_f1")}
        suited |= {"single": (*suited["multi"], "binary_f1", "accuracy")}
        if self.score not in suited[self.kind]:
            raise ValueError(f"{self.kind} is scored by {', '.join(suited[self.kind])}, not by {self.score}")
        needed = "test" if self.kind == "masked" else "train"
        if getattr(self.files, needed) is None:
            raise ValueError(f"files: {needed} is missing")
        if self.kind not in ("tokens", "masked") and self.columns is None:
            raise ValueError("columns are missing; single, multi and regression need them")
        if (self.score == "binary_f1") != (self.positive is not None):
            raise ValueError("binary_f1 needs positive, the label it scores; other scores do not take it")
        if self.scored and self.score not in suited["multi"]:
            raise ValueError(f"scored belongs to {', '.join(suited['multi'])}")
        if self.types and self.kind != "tokens":
            raise ValueError("types belongs to tokens")
        if tags := [type_ for type_ in self.types if type_[:2] == "I-" and f"B-{type_[2:]}" in self.types]:
            raise ValueError(f"types: {tags[0]} is a tag; give the types without their prefixes, such as {tags[0][2:]}")
        if self.kind != "tokens" and len(set(self.names)) < len(self.names):
            raise ValueError(f"names: the same name twice: {', '.join(self.names)}")
        return self


class EvaluatedTask(Section):
    """A task, and how models are fine-tuned on it."""

    task: str
    """A task YAML or the name of a described task."""
    data: str | None = None
    """Folder of the task's files; default: the folder of the YAML."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field(default=(17, 18, 19, 20, 21), min_length=1)
    """Seeds of the fine-tunings of each model, each once."""
    protocol: dict[str, Any] = Field(default_factory=dict)
    """Settings that differ from the task's protocol, and `files.*` that differ from its files."""
    by: tuple[Literal["fine-tuned", "probe"], ...] = Field(default=("fine-tuned",), min_length=1)
    """Ways that a study measures the task: fine-tuned with each seed, or linear probes on the frozen states of every
    layer, of which the mean over the layers is taken. A `masked` task has one way of its own."""

    @model_validator(mode="after")
    def _has_seeds_of_its_own(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: the same seed twice; each seed is one fine-tuning, so give it once")
        return self


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Read `key=value` words of a command line, with values in YAML.

    Raises:
        InputError: A word has no key or no value.
    """
    values = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise InputError(f"{override!r} is not an override; write key=value", key=key, code="not-an-override")
        require_no_comment(override, key)
        values[key] = read_yaml(text, override)
    return values


def load_task(reference: str, overrides: Mapping[str, Any]) -> tuple[Task, Protocol, Path]:
    """Load a task, its protocol, and the folder that its files lie in.

    Args:
        reference: A task YAML or the name of a described task.
        overrides: Settings of the protocol, and of the files (`files.test: null`).

    Raises:
        InputError: A key is wrong.
    """
    tree, folder = read_mapping(reference, "task", SHIPPED)
    of_files = {key.removeprefix("files."): value for key, value in overrides.items() if key.startswith("files.")}
    of_protocol = {key: value for key, value in overrides.items() if not key.startswith("files.")}
    if isinstance(tree.get("files"), dict):
        tree["files"] = {**tree["files"], **of_files}
    task = validate(Task, tree, reference)
    settings = dict(task.protocol)
    preset = settings.pop("preset", None)
    if not isinstance(preset, str | None) or (preset is not None and preset not in PROTOCOLS):
        raise InputError(
            f"{reference}: protocol.preset: no preset {preset!r}; there are {', '.join(PROTOCOLS)}",
            key="protocol.preset",
        )
    settings = {**(PROTOCOLS[preset] if preset else {}), **settings}
    for key, other in (("epochs", "steps"), ("steps", "epochs")):
        if key in of_protocol:
            settings.pop(other, None)
    return task, validate(Protocol, {**settings, **of_protocol}, f"{reference}: protocol"), folder
