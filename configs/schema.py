"""The configuration of a run. Every section is frozen and refuses unknown keys."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

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

from configs.units import Count, Duration

Paths = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
"""One path or a list of them."""


def _no_command(value: str) -> str:
    if value.startswith("pipe:"):
        raise ValueError(
            "pipe: URLs run a shell command and are refused; give a directory or an s3://, gs:// or https:// URL"
        )
    return value


Shards = Annotated[str, AfterValidator(_no_command)]
"""Where shards lie."""


def _prepared_here(text: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    shards = info.data.get("shards", "")
    if text and ("://" in shards or shards.endswith(".tar")):
        raise ValueError(
            f"text is prepared into a local directory, and shards is {shards!r}; name a directory there, or prepare "
            "the text with `detour prepare` and leave it out here"
        )
    return text


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Model(Section):
    """Where the weights come from and what shape they have. Any ModernBertConfig field may be overridden here."""

    init: str = "scratch"
    """`scratch`, a Hugging Face directory or hub id, or a Detour checkpoint directory."""
    size: Literal["tiny", "base", "large"] | None = None
    """A named shape; only with `init: scratch`."""
    vocab_size: PositiveInt | None = None
    hidden_size: PositiveInt | None = None
    intermediate_size: PositiveInt | None = None
    num_hidden_layers: PositiveInt | None = None
    num_attention_heads: PositiveInt | None = None
    hidden_activation: str | None = None
    max_position_embeddings: PositiveInt | None = None
    initializer_range: PositiveFloat | None = None
    initializer_cutoff_factor: PositiveFloat | None = None
    norm_eps: PositiveFloat | None = None
    norm_bias: bool | None = None
    attention_bias: bool | None = None
    attention_dropout: float | None = None
    embedding_dropout: float | None = None
    mlp_bias: bool | None = None
    mlp_dropout: float | None = None
    decoder_bias: bool | None = None
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] | None = None
    local_attention: PositiveInt | None = None
    global_attn_every_n_layers: PositiveInt | None = None
    global_rope_theta: PositiveFloat | None = None
    local_rope_theta: PositiveFloat | None = None
    rope_parameters: dict[str, dict[str, Any]] | None = None
    tie_word_embeddings: bool | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    cls_token_id: int | None = None
    sep_token_id: int | None = None
    classifier_pooling: Literal["cls", "mean"] | None = None
    classifier_dropout: float | None = None
    classifier_bias: bool | None = None
    classifier_activation: str | None = None

    @model_validator(mode="after")
    def _size_or_weights(self) -> Self:
        if self.size is not None and self.init != "scratch":
            raise ValueError("size names a new model and init names existing weights: give one of the two")
        if self.size is None and self.init == "scratch" and self.hidden_size is None:
            raise ValueError("say which model: init (a Hugging Face directory or hub id) or size (tiny, base, large)")
        return self


class Source(Section):
    """One corpus of the mixture."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    shards: Shards
    """Directory with a manifest.json, or a glob of WebDataset tars in one; local, s3://, gs:// or https://. A local
    directory of tars with .txt or .json members and no manifest is raw text, tokenized as it is read."""
    text: Paths = ()
    """Text files (jsonl[.gz|.zst], txt, parquet). Where `shards` does not exist yet it is prepared from these."""
    weight: PositiveFloat | None = None
    """Share of the training tokens, relative to the other sources; 1 if not given."""
    upsample: PositiveFloat | None = None
    """In place of weights, for every source or none: the share is the source's own tokens times this."""
    epochs: PositiveInt | None = None
    """Passes over the source at most, after which the others take its share. By default it is repeated without end."""

    _text_is_prepared_here = field_validator("text")(_prepared_here)


class Evaluation(Section):
    """A fixed held-out set: both losses on it, in either phase, without touching the training data."""

    shards: Shards
    """As a source's."""
    text: Paths = ()
    every: Duration = Duration(500, "steps")
    """Interval in steps or tokens."""
    sequences: PositiveInt = 64
    """Packed sequences evaluated each time, always the same ones; fewer where the set holds fewer."""
    mask_rate: float = Field(default=0.15, gt=0.0, lt=1.0)

    _text_is_prepared_here = field_validator("text")(_prepared_here)

    @field_validator("every")
    @classmethod
    def _interval(cls, value: Duration) -> Duration:
        if value.unit == "minutes" or value.value == 0:
            raise ValueError(f"the interval is a number of steps or tokens such as '500 steps', got '{value}'")
        return value

    @property
    def source(self) -> Source:
        """The set as a source that is read once."""
        return Source(name="evaluation", shards=self.shards, text=self.text, epochs=1)


class Data(Section):
    """What a step trains on: a pure function of this section, the sources' contents and the step."""

    sequence_length: PositiveInt = 1024
    """Tokens of a packed sequence."""
    seed: int = Field(default=42, ge=0)
    """Seed of the data order and the masks."""
    streams: PositiveInt = 48
    """Logical streams. Data-parallel sizes that divide it see the same data."""
    sources: tuple[Source, ...] = Field(min_length=1)
    evaluation: Evaluation | None = None
    on_error: Literal["stop", "skip"] = "stop"
    """What a damaged shard or document does: stop the run, or be left out, counted, at this and every resume."""
    backend: Literal["numpy", "dali"] = "numpy"
    """What makes batches of packed rows; both make the same ones. dali works on the GPU where there is one."""
    prefetch: PositiveInt = 2
    """Steps prepared ahead of the one in training."""
    cache: str = "~/.cache/detour/shards"
    """Local directory for remote shards."""
    cache_gb: PositiveFloat = 100
    """Bound of that directory in gigabytes; the shards used longest ago make room. It should hold two shards of each
    source for every stream of the machine: those that are being read stay on the disk beyond it."""
    patience: PositiveInt = 300
    """Seconds of retries without a byte from a remote store before the run fails."""

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
            raise ValueError(
                "give every source a weight, or every source upsample, not some the one and some the other"
            )
        return self


class Batch(Section):
    sequences: PositiveInt = 384
    """Packed sequences of a global batch, over all data-parallel ranks."""
    micro: PositiveInt | Literal["auto"] = "auto"
    """Packed sequences of a micro-batch on one data-parallel rank."""


class LearningRate(Section):
    """Learning rate of one phase, as a share of `optimizer.lr`. It restarts at the phase's first step."""

    warmup: Duration = Duration(0, "tokens")
    """Linear warmup from zero at the phase's start."""
    shape: Literal["constant", "linear", "cosine", "1-sqrt"] = "constant"
    """After the warmup, until the phase's last step."""
    final: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of the peak reached at the phase's end; a constant shape has none."""

    @model_validator(mode="after")
    def _steps_only(self) -> Self:
        if self.warmup.unit == "minutes":
            raise ValueError(
                "warmup is given in tokens or steps: minutes would make the schedule depend on the machine"
            )
        return self


class Phase(Section):
    """A stretch of training with one objective. Optimizer state crosses from one phase to the next untouched."""

    objective: Literal["clm", "mlm"]
    tokens: Count | None = None
    """Length in token slots (sequences x sequence_length a step), rounded to the nearest step."""
    steps: PositiveInt | None = None
    lr: LearningRate = LearningRate()
    mask_rate: float = Field(default=0.15, gt=0.0, lt=1.0)
    """Share of the maskable tokens that MLM predicts."""
    mask_split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Of the predicted tokens: replaced by the mask token, by a random token, left as they are."""
    freeze: tuple[int, ...] = ()
    """Layers whose weights and Adam moments stay untouched during this phase (0 is the first layer)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.tokens is None) == (self.steps is None):
            raise ValueError("give the phase one length: tokens or steps")
        if self.tokens == 0:
            raise ValueError("tokens must be greater than 0")
        if min(self.mask_split) < 0 or abs(sum(self.mask_split) - 1) > 1e-9:
            raise ValueError(f"mask_split needs three shares that add up to 1, got {list(self.mask_split)}")
        if len(set(self.freeze)) < len(self.freeze) or any(layer < 0 for layer in self.freeze):
            raise ValueError(f"freeze lists different layer numbers from 0, got {list(self.freeze)}")
        return self

    def length(self, tokens_per_step: int) -> int:
        """Optimizer steps of this phase; never less than one."""
        return self.steps or max(1, round((self.tokens or 0) / tokens_per_step))


class Optimizer(Section):
    """AdamW."""

    lr: PositiveFloat = 2e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    eps: PositiveFloat = 1e-6
    weight_decay: float = Field(default=1e-5, ge=0.0)
    """None on biases and norms."""
    decoupled: bool = True
    """True: the decay of a step is weight_decay * lr / peak lr. False: weight_decay * lr, as in torch's AdamW."""
    clip: float = Field(default=1.0, ge=0.0)
    """Largest global gradient norm; 0 turns clipping off."""

    @field_validator("betas")
    @classmethod
    def _betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"betas lie in [0, 1), got {list(value)}")
        return value


class Parallel(Section):
    """Data parallel is what is left of the workers."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    sequence: bool = False
    """Sequence parallel: the activations between tensor-parallel regions are split along the tokens."""

    @model_validator(mode="after")
    def _sequence_needs_tensor(self) -> Self:
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence parallel splits activations over tensor-parallel ranks: set tensor to 2 or more")
        return self


class Checkpoint(Section):
    every: Duration = Duration(500, "steps")
    """Interval in steps, tokens or minutes; one is always written at the end of a phase and of the run."""
    keep: PositiveInt = 3
    """Newest checkpoints kept."""
    keep_every: PositiveInt | None = None
    """Besides the newest, keep those at a multiple of this many steps, for studies."""
    mirror: str | None = None
    """Also copy checkpoints to this URL (s3://, gs://, a shared path), and start from there where the disk has none."""

    @field_validator("every")
    @classmethod
    def _not_zero(cls, value: Duration) -> Duration:
        if value.value == 0:
            raise ValueError("the checkpoint interval must be greater than 0")
        return value


class Cluster(Section):
    nodes: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Nodes of the Ray cluster to use; `--nodes` sets it. Or [fewest, most]: the run goes on with what is left of its
    nodes, and grows when more come."""
    workers_per_node: PositiveInt | Literal["auto"] = "auto"
    """auto: one worker a GPU; without GPUs, the tensor x pipeline size."""
    gpus_per_node: NonNegativeInt | Literal["auto"] = "auto"
    """auto: what the largest node has, or this machine. A cluster that starts its GPU nodes on demand has none when the
    run begins: say how many each will have, and let start_timeout cover their start."""
    start_timeout: PositiveInt = 120
    """Seconds to wait for the nodes before giving up."""
    hang_timeout: PositiveInt = 600
    """Seconds without a completed step before the workers count as hung and are started again."""
    max_failures: int = Field(default=3, ge=0)
    """Worker failures survived before the run is given up."""
    max_preemptions: int = Field(default=100, ge=0)
    """Nodes taken away with notice, which lose no step, before the run stops with everything saved."""

    @field_validator("nodes")
    @classmethod
    def _fewest_first(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError(f"a range of nodes is [fewest, most], got {list(value)}")
        return value


class Monitoring(Section):
    port: int = Field(default=9464, ge=1, le=65535)
    """First port tried for the metrics endpoint."""
    address: str = "127.0.0.1"
    """Address the metrics endpoint listens on."""
    every: Duration = Duration(10, "steps")
    """Interval of the lines in metrics.jsonl, in steps."""
    targets: str = "/tmp/detour/targets"
    """Directory in which runs announce their endpoints to Prometheus; the shipped prometheus.yml reads the default."""
    writers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also write the lines of metrics.jsonl to these. Each needs its own package: tensorboard, wandb."""

    @field_validator("every")
    @classmethod
    def _steps(cls, value: Duration) -> Duration:
        if value.unit != "steps" or value.value == 0:
            raise ValueError(f"the logging interval is a number of steps such as '10 steps', got '{value}'")
        return value


class RunConfig(Section):
    """One run: a model, its data and the phases it is trained through."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=17, ge=0)
    """Seed of the initial weights."""
    model: Model
    tokenizer: str
    """Directory with a tokenizer.json, a hub id, or `package://tokenizer/modernbert` for the shipped one."""
    data: Data
    batch: Batch = Batch()
    phases: tuple[Phase, ...] = Field(min_length=1)
    optimizer: Optimizer = Optimizer()
    parallel: Parallel = Parallel()
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """How FP8 numbers are scaled; `delayed` by a history, which is in the checkpoint."""
    attention: Literal["torch", "transformer_engine"] = "transformer_engine"
    """The kernels of global layers' attention on a GPU in half precision: torch's FlashAttention for packed documents,
    or what Transformer Engine picks of its own, which is faster."""
    fp8_bf16_edges: bool = False
    """The first and the last layer in BF16. Not with the delayed recipe."""
    checkpoint: Checkpoint = Checkpoint()
    cluster: Cluster = Cluster()
    monitoring: Monitoring = Monitoring()

    @model_validator(mode="after")
    def _delayed_scaling_takes_every_layer(self) -> Self:
        if self.fp8_bf16_edges and self.fp8_recipe == "delayed":
            raise ValueError("fp8_bf16_edges: Megatron has no BF16 layers under fp8_recipe: delayed; use tensorwise")
        return self

    @model_validator(mode="after")
    def _streams_divide_the_batch(self) -> Self:
        if self.batch.sequences % self.data.streams:
            raise ValueError(
                f"data.streams: {self.data.streams} streams must divide batch.sequences ({self.batch.sequences}), "
                "so that every step draws equally from each stream"
            )
        return self

    @property
    def tokens_per_step(self) -> int:
        """Token slots of a global batch: sequences x sequence length."""
        return self.batch.sequences * self.data.sequence_length

    @property
    def total_steps(self) -> int:
        return sum(phase.length(self.tokens_per_step) for phase in self.phases)
