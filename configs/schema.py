"""The configuration of a run. Every section is frozen and refuses unknown keys.

The docstrings of sections and keys are the text of `docs/configuration.md`: run `make docs` after a change.
"""

from __future__ import annotations

import difflib
import math
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from configs.spans import PhaseSpan, phase_spans
from configs.units import Count, Duration

Paths = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
"""One path or a list of paths."""


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


def _fault(key: str, message: str) -> PydanticCustomError:
    """Return the error of a rule between sections, which pydantic would report without a key."""
    return PydanticCustomError("rule", "{message}", {"key": key, "message": message})


def _part(value: int | str) -> int | str:
    if value in ("embeddings", "head") or (isinstance(value, int) and value >= 0):
        return value
    raise ValueError(f"{value!r} is no part of the model; give numbers of layers from 0, embeddings or head")


Part = Annotated[int | str, AfterValidator(_part)]
"""A part of the model: the number of a layer, `embeddings` or `head`."""


def _rates(value: Any) -> Any:
    rates = [value] if isinstance(value, int | float) else value
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    if (is_pair or rates is not value) and all(isinstance(rate, int | float) and 0 < rate < 1 for rate in rates):
        return value
    raise ValueError(f"give a share above 0 and below 1, or two such as [0.3, 0.15], got {value!r}")


ObjectiveName = Literal["clm", "mlm"]


def _objective(value: Any) -> Any:
    names = get_args(ObjectiveName)
    if isinstance(value, str) and value in names:
        return value
    if isinstance(value, dict) and set(value) == set(names):
        odds = [odd for odd in value.values() if isinstance(odd, int | float) and 0 < odd < math.inf]
        if len(odds) == len(names):
            return value
    raise ValueError(f"give clm or mlm, or odds above 0 for both such as {{clm: 1, mlm: 15}}, got {value!r}")


SCRATCH = "scratch"
"""The `model.init` of a new model with random weights."""


class Section(BaseModel):
    """A mapping of a recipe: immutable, without unknown keys, documented by the docstrings below its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Model(Section):
    """Initial weights and architecture. A key without a value keeps the value of `init` or `size`."""

    init: str = SCRATCH
    """`scratch`, a Hugging Face directory, a hub id (`org/model` or `org/model@revision`), a weight file (`.pt`,
    `.bin`) with its config.json beside it, or a Detour checkpoint directory."""
    size: Literal["tiny", "base", "large"] | None = None
    """Named architecture of a new model. Only with `init: scratch`."""
    vocab_size: PositiveInt | None = None
    """Entries of the vocabulary. At least the tokenizer's. A tokenizer that extends that of `init` adds entries."""
    hidden_size: PositiveInt | None = None
    """Width of the hidden states."""
    intermediate_size: PositiveInt | None = None
    """Width of each half of the gated feed-forward layer."""
    num_hidden_layers: PositiveInt | None = None
    """Number of layers."""
    num_attention_heads: PositiveInt | None = None
    """Attention heads per layer. Must divide `hidden_size` into even parts."""
    hidden_activation: str | None = None
    """Activation of the feed-forward layers. Only `gelu` is supported."""
    max_position_embeddings: PositiveInt | None = None
    """Longest sequence that the exported configuration announces."""
    initializer_range: PositiveFloat | None = None
    """Standard deviation of new weights."""
    initializer_cutoff_factor: PositiveFloat | None = None
    """Bound of new weights, in standard deviations."""
    norm_eps: PositiveFloat | None = None
    """Constant added to the variance in layer norms."""
    norm_bias: bool | None = None
    """Biases in layer norms. Only `false` is supported."""
    attention_bias: bool | None = None
    """Biases in attention. Only `false` is supported."""
    attention_dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout on attention weights. Only 0 is supported. It overrides the value of `init` in training."""
    attention_output_dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout on the attention's output, in training. Without a value: 0. ModernBERT, Ettin and BioClinical-ModernBERT
    were trained with 0.1, which their FlexBERT recipes call `attn_out_dropout_prob`."""
    embedding_dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout on the normalised embedding, in training. The exported configuration keeps the value of `init`."""
    mlp_bias: bool | None = None
    """Biases in feed-forward layers. Only `false` is supported."""
    mlp_dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout between the matrices of feed-forward layers, in training. The exported configuration keeps the value of
    `init`."""
    decoder_bias: bool | None = None
    """Bias of the output vocabulary. Only `true` is supported."""
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] | None = None
    """Kind of attention per layer, instead of `global_attn_every_n_layers`."""
    local_attention: PositiveInt | None = None
    """Window of local attention in tokens, both sides together."""
    global_attn_every_n_layers: PositiveInt | None = None
    """Every n-th layer, from the first on, has global attention."""
    global_rope_theta: PositiveFloat | None = None
    """Base of the rotary embeddings in layers with global attention."""
    local_rope_theta: PositiveFloat | None = None
    """Base of the rotary embeddings in layers with local attention."""
    rope_parameters: dict[str, dict[str, Any]] | None = None
    """Rotary embeddings per kind of attention, as transformers 5 writes them. Only the default type is supported."""
    tie_word_embeddings: bool | None = None
    """One matrix for input embeddings and output vocabulary. Only `true` is supported."""
    pad_token_id: int | None = None
    """Padding token of the exported configuration."""
    bos_token_id: int | None = None
    """First token of a text, in the exported configuration."""
    eos_token_id: int | None = None
    """Last token of a text, in the exported configuration."""
    cls_token_id: int | None = None
    """Classification token of the exported configuration."""
    sep_token_id: int | None = None
    """Separator token of the exported configuration."""
    classifier_pooling: Literal["cls", "mean"] | None = None
    """Pooling of a fine-tuned classifier, in the exported configuration."""
    classifier_dropout: float | None = None
    """Dropout of a fine-tuned classifier, in the exported configuration."""
    classifier_bias: bool | None = None
    """Bias of the dense layer before the output vocabulary."""
    classifier_activation: str | None = None
    """Activation of the dense layer before the output vocabulary: `gelu`, `silu` or `relu`."""

    @model_validator(mode="after")
    def _size_or_weights(self) -> Self:
        if self.size is not None and self.init != SCRATCH:
            raise ValueError("size names a new model and init names existing weights: give one of the two")
        if self.size is None and self.init == SCRATCH and self.hidden_size is None:
            raise ValueError("give init (a Hugging Face directory or hub id) or size (tiny, base, large)")
        return self


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

    sequence_length: PositiveInt = 1024
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
    def _one_kind_of_share(self) -> Self:
        upsampled = [source.upsample is not None for source in self.sources]
        if any(upsampled) and (not all(upsampled) or any(source.weight for source in self.sources)):
            raise ValueError("weight and upsample are mixed: give every source a weight, or every source upsample")
        return self


class Batch(Section):
    """Batch sizes."""

    sequences: PositiveInt = 384
    """Packed sequences per global batch, over all data-parallel ranks."""
    micro: PositiveInt | Literal["auto"] = "auto"
    """Packed sequences per micro-batch on one data-parallel rank. `auto`: the largest that fits the GPU, which is
    measured at the start; a rule of thumb on a CPU."""
    recompute: Literal["none", "full"] = "none"
    """`full` keeps the input of each layer alone, and computes the layer again in the backward pass. The results are
    the same to the last digit. By formula a row takes about a tenth of the memory, and a step up to a third more
    time."""


class LearningRate(Section):
    """Learning-rate schedule of one phase. It restarts at the phase's first step."""

    peak: PositiveFloat | None = None
    """Peak learning rate of the phase. Without a value: `optimizer.lr`."""
    warmup: Duration = Duration(0, "tokens")
    """Linear warmup from zero, in tokens or steps."""
    shape: Literal["constant", "linear", "cosine", "1-sqrt"] = "constant"
    """Decay from the end of the warmup to the phase's last step."""
    final: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of the peak that the decay reaches. Unused by a constant shape."""

    @model_validator(mode="after")
    def _steps_only(self) -> Self:
        if self.warmup.unit == "minutes":
            raise ValueError(
                "warmup is given in tokens or steps: minutes would make the schedule depend on the machine"
            )
        return self


class PhaseBatch(Section):
    """Batch sizes of one phase. A key without a value keeps that of the run's `batch`."""

    sequences: PositiveInt | None = None
    """Packed sequences per global batch, over all data-parallel ranks. A multiple of `data.streams`."""
    micro: PositiveInt | Literal["auto"] | None = None
    """Packed sequences per micro-batch on one data-parallel rank. `auto` is fitted per sequence length."""


class Phase(Section):
    """A stretch of training with one objective or a mixture. Weights and optimizer state pass unchanged to the next."""

    objective: Annotated[ObjectiveName | dict[ObjectiveName, float], BeforeValidator(_objective)]
    """`clm`: causal language modelling. `mlm`: masked language modelling. Odds such as `{clm: 1, mlm: 15}`: each packed
    sequence has one of the two, drawn by a hash of the data seed and its place. Every label position weighs the same in
    the loss, and a causal sequence has more of them."""
    tokens: Count | None = None
    """Length in tokens, padding included (sequences x sequence length per step), rounded to a step."""
    steps: PositiveInt | None = None
    """Length in steps. A phase has either `tokens` or `steps`."""
    sources: dict[str, PositiveFloat] | None = None
    """Weights of the sources that the phase draws from, by name. A source left out keeps its position in its text and
    continues from there in a later phase. Without a value: all of `data.sources`, by their own weights."""
    sequence_length: PositiveInt | None = None
    """Tokens per packed sequence. Without a value: `data.sequence_length`. The evaluation set keeps that one."""
    global_rope_theta: PositiveFloat | None = None
    """Base of the rotary embeddings in layers with global attention, from the phase's first step on. Without a value it
    stays as it is."""
    batch: PhaseBatch = PhaseBatch()
    """Batch sizes."""
    lr: LearningRate = LearningRate()
    """Learning-rate schedule."""
    mask_rate: Annotated[float | tuple[float, float], BeforeValidator(_rates)] = 0.15
    """Share of the maskable tokens that MLM predicts. Two shares: those of the first and of the last step, with a
    straight line between them."""
    mask_split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of the predicted tokens that become the mask token, become a random token, and stay."""
    mask_unit: Literal["token", "word"] = "token"
    """`word`: the tokens of a word are predicted all or none. Spaces separate words, so `word` does not suit languages
    without spaces; a WordPiece tokenizer says itself where words begin. `mask_split` draws for each token, as BERT's
    whole-word masking does."""
    freeze: tuple[Part, ...] = ()
    """Parts whose weights and Adam moments do not change in this phase: numbers of layers, from 0, `embeddings` and
    `head`. `embeddings` are the token embeddings and their norm. The decoder's matrix is the token embeddings, so it
    stands still too. `head` is the prediction head: its dense layer, its norm and the decoder's bias."""
    reset: tuple[Literal["head"], ...] = ()
    """`head` gives the prediction head new weights and zero moments before the first step of this phase. Its dense
    layer becomes random, its norm 1 and the decoder's bias 0. Default: the head is kept, as the optimizer's state is,
    because one head serves both objectives."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.tokens is None) == (self.steps is None):
            raise ValueError("give the phase one length: tokens or steps")
        if self.tokens == 0:
            raise ValueError("tokens must be greater than 0")
        if min(self.mask_split) < 0 or abs(sum(self.mask_split) - 1) > 1e-9:
            raise ValueError(f"mask_split needs three shares that add up to 1, got {list(self.mask_split)}")
        if len(set(self.freeze)) < len(self.freeze):
            raise ValueError(f"freeze names each part once, got {list(self.freeze)}")
        if "head" in self.freeze and "head" in self.reset:
            raise ValueError("freeze and reset both name the head: a new head must train; remove it from one of them")
        return self

    @property
    def objectives(self) -> dict[ObjectiveName, float]:
        """Share of the packed sequences that each objective has, in the order clm, mlm; the shares add up to 1."""
        if isinstance(self.objective, str):
            return {self.objective: 1.0}
        total = sum(self.objective.values())
        return {name: self.objective[name] / total for name in sorted(self.objective)}

    @property
    def objective_name(self) -> str:
        """Name in logs and metrics: `clm`, `mlm`, or `clm+mlm` for a mixture."""
        return "+".join(self.objectives)

    def length(self, tokens_per_step: int) -> int:
        """Return the optimizer steps of this phase, at least one."""
        return self.steps or max(1, round((self.tokens or 0) / tokens_per_step))


class Optimizer(Section):
    """AdamW."""

    lr: PositiveFloat = 2e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of the first and the second moment."""
    eps: PositiveFloat = 1e-6
    """Constant added to the root of the second moment."""
    weight_decay: float = Field(default=1e-5, ge=0.0)
    """Weight decay. Biases and norm weights have no decay."""
    decoupled: bool = True
    """`true`: a step decays by weight_decay * lr / peak lr. `false`: by weight_decay * lr, as torch's AdamW does."""
    clip: float = Field(default=1.0, ge=0.0)
    """Largest global gradient norm. 0 turns clipping off."""

    @field_validator("betas")
    @classmethod
    def _betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"betas lie in [0, 1), got {list(value)}")
        return value


class Parallel(Section):
    """Layout of the model over workers. The data-parallel size is workers / (tensor x pipeline)."""

    tensor: PositiveInt = 1
    """Tensor-parallel size."""
    pipeline: PositiveInt = 1
    """Pipeline-parallel size."""
    sequence: bool = False
    """Sequence parallelism: activations between tensor-parallel regions are split along the tokens."""

    @model_validator(mode="after")
    def _sequence_needs_tensor(self) -> Self:
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence parallel splits activations over tensor-parallel ranks: set tensor to 2 or more")
        return self


class Checkpoint(Section):
    """When checkpoints are written, and which ones are kept."""

    every: Duration = Duration(500, "steps")
    """Interval in steps, tokens or minutes. The end of a phase and of the run always write a checkpoint."""
    keep: PositiveInt = 3
    """Newest checkpoints that are kept."""
    keep_every: PositiveInt | None = None
    """Steps. Checkpoints at multiples of this number are kept besides the newest."""
    mirror: str | None = None
    """URL (s3://, gs://) or shared path that checkpoints are copied to. A run without local checkpoints uses it."""

    @field_validator("every")
    @classmethod
    def _not_zero(cls, value: Duration) -> Duration:
        if value.value == 0:
            raise ValueError("the checkpoint interval must be greater than 0")
        return value


class Cluster(Section):
    """Nodes and workers of the run, and the failures that it survives."""

    nodes: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Nodes of the Ray cluster; `--nodes` sets it. With [fewest, most] the run continues on fewer nodes and grows when
    more nodes come."""
    workers_per_node: PositiveInt | Literal["auto"] = "auto"
    """Workers per node. `auto`: one per GPU; without GPUs, tensor x pipeline."""
    gpus_per_node: NonNegativeInt | Literal["auto"] = "auto"
    """GPUs per node. `auto`: as many as the largest present node has. Give the number if the cluster starts its GPU
    nodes on demand, and let `start_timeout` cover their start."""
    start_timeout: PositiveInt = 120
    """Seconds that the run waits for its nodes."""
    hang_timeout: PositiveInt = 600
    """Seconds without a completed step after which the workers are restarted."""
    max_failures: int = Field(default=3, ge=0)
    """Worker failures that the run survives."""
    max_preemptions: int = Field(default=100, ge=0)
    """Preemptions with notice, which lose no step, that the run survives. It then stops with everything saved."""
    grow_every: int = Field(default=300, ge=0)
    """Fewest seconds between two growths of a run with [fewest, most] nodes, because each costs a restart."""

    @field_validator("nodes")
    @classmethod
    def _fewest_first(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError(f"a range of nodes is [fewest, most], got {list(value)}")
        return value


class Monitoring(Section):
    """Metrics endpoint and logs."""

    port: int = Field(default=9464, ge=1, le=65535)
    """First port tried for the metrics endpoint. The next free port is taken if it is busy."""
    address: str = "127.0.0.1"
    """Address that the metrics endpoint listens on."""
    every: Duration = Duration(10, "steps")
    """Interval of the lines in metrics.jsonl, in steps."""
    targets: str = "/tmp/detour/targets"
    """Directory in which runs announce their endpoints to Prometheus. The shipped prometheus.yml reads the default."""
    writers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Further destinations of the lines of metrics.jsonl. Each needs its own package."""

    @field_validator("every")
    @classmethod
    def _steps(cls, value: Duration) -> Duration:
        if value.unit != "steps" or value.value == 0:
            raise ValueError(f"the logging interval is a number of steps such as '10 steps', got '{value}'")
        return value


class Origin(Section):
    """The run and the step that this run branched off at."""

    run: str
    """Directory of the other run."""
    step: PositiveInt
    """Completed steps of the checkpoint that this run started from."""


def _tokenizer_is_optional(schema: dict[str, Any]) -> None:
    schema["required"].remove("tokenizer")


class RunConfig(Section):
    """One run: a model, its data, and the phases that it is trained through."""

    model_config = ConfigDict(json_schema_extra=_tokenizer_is_optional)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run. The run directory is `runs/NAME` unless `--output` says otherwise."""
    seed: int = Field(default=17, ge=0)
    """Seed of the initial weights."""
    origin: Origin | None = None
    """Run and step that this run branches off at: its optimizer, data position and counters go on. `--from` sets it.
    Without a value the run starts at step 0."""
    model: Model
    """Initial weights and architecture."""
    tokenizer: str
    """Directory with a tokenizer.json, a hub id, or `package://tokenizer/modernbert` for the shipped tokenizer. Without
    a value: that of `model.init`. With `init: scratch` it is required."""
    data: Data
    """Training data."""
    batch: Batch = Batch()
    """Batch sizes."""
    phases: tuple[Phase, ...] = Field(min_length=1)
    """Phases in their order."""
    optimizer: Optimizer = Optimizer()
    """AdamW."""
    parallel: Parallel = Parallel()
    """Layout of the model over workers."""
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """Number format. `auto` is BF16 if the hardware multiplies it faster than FP32. It is FP8 where FP8 was measured to
    be faster still: on Hopper GPUs, from a billion parameters on, without tensor parallelism. The first lines of a run
    name the choice."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """Scaling of FP8 numbers. `delayed` scales by a history, which checkpoints hold."""
    attention: Literal["torch", "transformer_engine", "flash_attn_4"] = "transformer_engine"
    """Kernels of global attention on a GPU in half precision. `torch`: FlashAttention for packed documents.
    `transformer_engine`: the kernels that Transformer Engine chooses, which are faster. `flash_attn_4`: those of the
    package flash-attn-4, on Hopper GPUs or later; they were not measured."""
    deterministic: bool = False
    """Add up a GPU's gradients in a fixed order, so that repeated and resumed runs are equal bit for bit. CPUs always
    do. It is slower. `attention: transformer_engine` is then `torch`, because it has no such kernel for long rows."""
    fp8_bf16_edges: bool = False
    """Keep the first and the last layer in BF16. Not available with `fp8_recipe: delayed`."""
    checkpoint: Checkpoint = Checkpoint()
    """Checkpoints."""
    cluster: Cluster = Cluster()
    """Nodes and workers."""
    monitoring: Monitoring = Monitoring()
    """Metrics endpoint and logs."""

    @model_validator(mode="after")
    def _delayed_scaling_takes_every_layer(self) -> Self:
        if self.fp8_bf16_edges and self.fp8_recipe == "delayed":
            raise _fault(
                "fp8_bf16_edges", "Megatron has no BF16 layers with fp8_recipe: delayed; use tensorwise or false"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _tokenizer_of_the_model(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or tree.get("tokenizer") is not None or not isinstance(tree.get("model"), dict):
            return tree
        rest = {key: value for key, value in tree.items() if key != "tokenizer"}
        init = tree["model"].get("init", SCRATCH)
        return rest if init == SCRATCH else {"tokenizer": init, **rest}

    @model_validator(mode="after")
    def _streams_divide_the_batch(self) -> Self:
        sizes = {"batch.sequences": self.batch.sequences}
        sizes |= {f"phases.{n}.batch.sequences": p.batch.sequences or 0 for n, p in enumerate(self.phases)}
        for key, sequences in sizes.items():
            if sequences % self.data.streams:
                raise _fault(
                    "data.streams",
                    f"{self.data.streams} streams must divide {key} ({sequences}), "
                    "because every step draws equally from each stream",
                )
        return self

    @model_validator(mode="after")
    def _sources_of_phases(self) -> Self:
        known = [source.name for source in self.data.sources]
        for number, phase in enumerate(self.phases):
            if phase.sources is not None and not phase.sources:
                raise _fault(f"phases.{number}.sources", "name at least one source, or leave out the key for all")
            for name in phase.sources or ():
                if name not in known:
                    near = difflib.get_close_matches(name, known, n=1)
                    hint = f"did you mean {near[0]!r}?" if near else f"data.sources has {', '.join(known)}"
                    raise _fault(f"phases.{number}.sources.{name}", f"no such source; {hint}")
        for place, name in enumerate(known):
            if not any(phase.sources is None or name in phase.sources for phase in self.phases):
                raise _fault(
                    f"data.sources.{place}",
                    f"no phase uses the source {name}; name it in the `sources` of a phase, or remove it",
                )
        return self

    @model_validator(mode="after")
    def _reset_what_was_trained(self) -> Self:
        if self.model.init == SCRATCH and self.phases[0].reset:
            raise _fault("phases.0.reset", "the head of a model from scratch is new already; remove this key")
        return self

    @property
    def spans(self) -> tuple[PhaseSpan, ...]:
        """The phases laid out on the steps of the run."""
        return phase_spans(self.phases, self.data, self.batch)

    def span_at(self, step: int) -> PhaseSpan:
        """Return the phase of the last of the first `step` steps; the first phase for 0."""
        return next(span for span in self.spans if step <= span.last)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all phases."""
        return self.spans[-1].last
