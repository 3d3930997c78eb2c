"""`data`: the corpora of the mixture, how their text is read, and the held-out set."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from configs.schema.section import Paths, Section
from configs.units import Duration


def _no_command(value: str) -> str:
    if value.startswith("pipe:"):
        raise ValueError(
            "pipe: URLs run a shell command and are refused; give a directory or an s3://, gs:// or https:// URL"
        )
    return value


Shards = Annotated[str, AfterValidator(_no_command)]
"""Location of shards: a directory, a glob or a URL."""


def _prepared_here(text: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    shards = info.data.get("shards", "")
    if text and ("://" in shards or shards.endswith(".tar")):
        raise ValueError(
            f"text is prepared into a local directory, and shards is {shards!r}; set shards to a local directory, or "
            "prepare the text with `detour prepare` and leave out this key"
        )
    return text


class Reading(Section):
    """Places of the text in its files, records to leave out, canaries to plant; options of `detour prepare` as well."""

    text: str = "text"
    """Column with the text, in tables and JSON. `a.b` is the key b of the object in column a."""
    id: str | None = None
    """Column with the name of a document. Without a value: `id` where there is one, else the number of the record."""
    group: str | None = None
    """Column whose equal values belong together, such as a patient: held-out documents are chosen by it."""
    spans: str | None = None
    """Column with the identifiers of the text, `[[start, end, label], ...]` in characters: their tokens are never
    labels. Without a value: `spans` where there is one, and the brat .ann file beside a .txt file. `none`: no spans."""
    identifiers: str | None = None
    """File of regular expressions, one per line, whose matches are identifiers too. A label and a tab may precede."""
    mask_spans: bool = False
    """Whether a placeholder such as `[NAME]` takes the place of each identifier in the text."""
    where: str | None = None
    """Condition on the columns of the records to read, such as `score >= 3 and lang == "fr"`."""
    split: str | None = None
    """Split to read where splits are named, such as `validation`. Without a value: the training split."""
    lines: bool = False
    """Whether each line of a .txt file is a document, not the whole file."""
    encoding: str | None = None
    """Encoding of text files, such as `cp1252`. Without a value: UTF-8, or what is detected and reported."""
    format: Literal["json", "csv", "tsv", "txt", "parquet", "arrow"] | None = None
    """Format of files whose names do not tell it, and of standard input."""
    on_error: Literal["stop", "skip"] = "stop"
    """Whether a record that cannot be read ends the preparation, or is counted and left out."""
    strict: bool = False
    """Whether a file that is not read is an error."""
    canaries: int = Field(default=0, ge=0, le=10_000)
    """Random secrets that are planted among the training documents, by which `detour audit` measures memorisation."""


class Source(Section):
    """One corpus of the mixture."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the corpus in logs and metrics."""
    shards: Shards
    """Directory with a manifest.json, or a glob of WebDataset tars: local, s3://, gs:// or https://. A local
    directory of tars with .txt or .json members and no manifest is raw text, which is tokenized while it is read."""
    text: Paths = ()
    """Text files, globs or directories of them: json, jsonl, csv, tsv, txt, parquet and Arrow, also compressed, in zip
    and tar, and behind s3://, gs:// and https://. The run prepares `shards` from them if `shards` does not exist yet.
    Existing shards are used as they are."""
    reading: Reading = Reading()
    """Columns, condition and encoding by which `text` is read."""
    weight: PositiveFloat | None = None
    """Share of the training tokens, relative to the other sources. Without a value: 1."""
    upsample: PositiveFloat | None = None
    """Number by which the source's own tokens are multiplied to give its share. All sources have it, or no source."""
    epochs: PositiveInt | None = None
    """Most passes over the source. Afterwards the other sources take its share. Without a value: no limit."""

    _text_is_prepared_here = field_validator("text")(_prepared_here)


class Evaluation(Section):
    """A fixed held-out set. Both objectives' losses are measured on it, in every phase."""

    shards: Shards
    """Location of the set, in the forms of `data.sources.shards`."""
    text: Paths = ()
    """Text files, in the forms of `data.sources.text`."""
    reading: Reading = Reading()
    """Columns, condition and encoding, as in `data.sources.reading`."""
    every: Duration = Duration(500, "steps")
    """Interval in steps or tokens."""
    sequences: PositiveInt = 64
    """Packed sequences per evaluation, always the same ones. A smaller set is evaluated as a whole."""
    mask_rate: float = Field(default=0.15, gt=0.0, lt=1.0)
    """Share of the maskable tokens that MLM predicts."""

    _text_is_prepared_here = field_validator("text")(_prepared_here)

    @field_validator("reading")
    @classmethod
    def _without_canaries(cls, value: Reading) -> Reading:
        if value.canaries:
            raise ValueError("canaries are planted in training text only; set reading.canaries of a source")
        return value

    @field_validator("every")
    @classmethod
    def _interval(cls, value: Duration) -> Duration:
        if value.unit == "minutes" or value.value == 0:
            raise ValueError(f"the interval is a number of steps or tokens such as '500 steps', got '{value}'")
        return value

    @property
    def source(self) -> Source:
        """The set as a source that is read once."""
        return Source(name="evaluation", shards=self.shards, text=self.text, reading=self.reading, epochs=1)


class Data(Section):
    """Training data. A step's batch depends on this section, the contents of the sources and the step alone."""

    sequence_length: int = Field(default=1024, ge=2)
    """Tokens per packed sequence."""
    seed: int = Field(default=42, ge=0)
    """Seed of the data order and the masks."""
    streams: PositiveInt = 48
    """Logical streams of documents. Every data-parallel size that divides it trains on the same batches."""
    sources: tuple[Source, ...] = Field(min_length=1)
    """Corpora of the mixture."""
    evaluation: Evaluation | None = None
    """Held-out set. Without a value there is no evaluation."""
    on_error: Literal["stop", "skip"] = "stop"
    """Effect of a damaged shard or document. `skip` leaves it out, counts it, and does so again after a resume."""
    backend: Literal["numpy", "dali"] = "numpy"
    """Library that makes batches from packed sequences. Both give the same batches. `dali` works on the GPU;
    on a CPU it takes 4 to 8 times as long as `numpy`."""
    prefetch: PositiveInt = 2
    """Steps whose batches are prepared ahead."""
    cache: str = "~/.cache/detour/shards"
    """Local directory for copies of remote shards."""
    cache_gb: PositiveFloat = 100
    """Largest size of `cache` in gigabytes. The least recently used shards are deleted first. Shards in use stay, so
    allow two shards per source for each stream of the machine."""
    patience: PositiveInt = 300
    """Seconds without a byte from a remote store after which the run fails."""

    @model_validator(mode="after")
    def _unique_names(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"sources need different names, got {names}")
        return self

    @model_validator(mode="after")
    def _own_shards(self) -> Self:
        evaluation = [] if self.evaluation is None else [self.evaluation.source]
        texts: dict[str, object] = {}
        for source in (*self.sources, *evaluation):
            if source.text and texts.setdefault(source.shards.rstrip("/"), source.text) != source.text:
                raise ValueError(f"other text is to be prepared into the same shards: {source.shards}")
        return self

    @model_validator(mode="after")
    def _one_kind_of_share(self) -> Self:
        upsampled = [source.upsample is not None for source in self.sources]
        if any(upsampled) and (not all(upsampled) or any(source.weight for source in self.sources)):
            raise ValueError("weight and upsample are mixed: give every source a weight, or every source upsample")
        return self
