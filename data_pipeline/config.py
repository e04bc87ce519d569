"""Where text comes from, how it becomes tokens, and in which order training reads them."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A part of the configuration: immutable; an unknown key is an error, and so is a number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FilterConfig(Section):
    """Which documents are dropped before tokenizing; each goes to the rejects file with the rule it broke."""

    min_characters: int = Field(0, ge=0, description="Shorter documents are dropped.")
    max_characters: int | None = Field(None, gt=0, description="Longer documents are dropped.")
    keep_pattern: str | None = Field(None, description="Regular expression that must be found in the text.")
    drop_pattern: str | None = Field(None, description="Regular expression that must not be found in the text.")
    exact_duplicates: Literal["keep", "drop"] = Field(
        "keep", description="`drop`: of equal texts in the source the first stays; the text is read twice."
    )


class FimConfig(Section):
    """Fill in the middle: parts of the sequences of training are cut in three at random, and the middle comes last (Bavarian et al. 2022, arXiv 2207.14255)."""

    rate: float = Field(gt=0, le=1, description="Part of the documents, or of their part in a sequence, that is cut.")
    kind: Literal["psm", "spm"] = Field("psm", description="Prefix, suffix, middle; or suffix, prefix, middle.")
    tokens: tuple[str, str, str] = Field(
        ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
        description="Tokens before prefix, suffix and middle, of the tokenizer's vocabulary.",
    )


class CutConfig(Section):
    """Cuts each file of text into documents: at lines, or by size. One of the three."""

    separator: str | None = Field(
        None,
        description="Regular expression of a line between documents, such as `<\\|endoftext\\|>` or `^$`; no document has it.",
    )
    first_line: str | None = Field(
        None, description="Regular expression of the first line of a document, such as `^# `."
    )
    size: int | None = Field(
        None,
        ge=1000,
        le=2**28,
        description="Documents of about this many bytes, cut at the end of a line (or at a space).",
    )


class SourceConfig(Section):
    """One named body of text."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$", description="Name in the store, the metrics and the ledger."
    )
    paths: tuple[str, ...] = Field(
        min_length=1,
        description="Files, folders, globs, URLs (s3://, gs://, az://; https:// of one file) or data sets of the Hub (hub:OWNER/NAME): .txt, .md (a file is a document), .jsonl, .parquet, .arrow (a Hugging Face dataset on disk), .mds (MosaicML), and token ids: .idx (Megatron, with .bin next to it; or their --data-path prefix), .npy (Dolma), .ds (datatrove), chunk-*.bin (litdata), .bin (nanoGPT); all but those also as .gz, .zst.",
    )
    text_column: str = Field(
        "text",
        description="Field that holds the text in jsonl and parquet, or token ids (`input_ids`); `doc.text` is a field inside of `doc`.",
    )
    template: str | None = Field(
        None, description='Instead of text_column: text from several fields, such as `"{title}\\n\\n{doc.body}"`.'
    )
    encoding: str = Field("utf-8", description="Encoding of files of text and of jsonl, by its name in Python.")
    errors: Literal["strict", "replace", "ignore"] = Field(
        "strict",
        description="Bytes that are not of the encoding: the record is a reject, or they are U+FFFD, or left out.",
    )
    cut: CutConfig | None = Field(None, description="Cut files of text into documents; null: a file is a document.")
    steps: tuple[str, ...] = Field(
        (), description="Filters and transforms of packages or of `plugins`, by name, in this order, after `filters`."
    )
    messages_column: str | None = Field(
        None,
        description="Instead of text: field with a conversation, written by the chat template of data.tokenizer; only the turns of the assistant are learned. A field `tools` is passed to the template.",
    )
    prompt_column: str | None = Field(
        None, description="Instead of text: field with the text before completion_column, which is not learned."
    )
    completion_column: str | None = Field(None, description="Field with the text that is learned, after prompt_column.")
    fim: FimConfig | None = Field(None, description="Fill in the middle, in the sequences of training.")
    weight: float = Field(
        1.0,
        ge=0,
        description="Share of the training samples, relative to the other sources; 0: only in phases that set a weight for it, such as a source that joins a run.",
    )
    filters: FilterConfig = Field(FilterConfig(), description="Documents to leave out.")
    validation_fraction: float | None = Field(
        None, ge=0, le=1, description="Part of its documents kept for validation; null: data.validation_fraction."
    )
    max_bytes: int | None = Field(
        None,
        gt=0,
        description="Use at most about this much text: files and byte ranges chosen by prepare.seed; null: all of it.",
    )
    max_tokens: int | None = Field(
        None,
        gt=0,
        description="Stop at the first part with which the store has this many tokens of the source; of many files only as many as needed are read. null: all of them.",
    )

    @model_validator(mode="after")
    def _check_columns(self) -> "SourceConfig":
        """Raise ValueError where it is not clear which fields are read."""
        if (self.prompt_column is None) != (self.completion_column is None):
            raise ValueError("prompt_column and completion_column belong together; give both, or none")
        if self.messages_column is not None and self.prompt_column is not None:
            raise ValueError("messages_column and prompt_column exclude each other; give one of the two")
        if self.template is not None and (self.has_loss_spans or self.text_column != "text"):
            raise ValueError("template replaces text_column and of columns of conversations; give one of them")
        if self.has_loss_spans and self.steps:
            raise ValueError("steps are for text, and conversations have parts that count; remove one of the two")
        if self.has_loss_spans and self.fim is not None:
            raise ValueError("fim is for text all of which is learned; remove it, or the columns of conversations")
        return self

    @property
    def has_loss_spans(self) -> bool:
        """Whether only parts of its documents are learned."""
        return self.messages_column is not None or self.prompt_column is not None


class PhaseConfig(Section):
    """Other weights or sequences of another length from a global sample on.

    With other weights every source continues where it was: nothing is lost or repeated. With another length each source
    begins a new epoch, because its tokens are cut into other rows.
    """

    start_sample: int = Field(ge=0, description="First global sample (steps x global batch size) of the phase.")
    weights: dict[str, float] | None = Field(
        None,
        min_length=1,
        description="Weight by source name; a source that is not named is not drawn in the phase. null: as before.",
    )
    sequence_length: int | None = Field(
        None, gt=0, description="Tokens per sequence; null: as before. The phase then starts at a whole global batch."
    )


class TokenizerConfig(Section):
    """A tokenizer file that is given, or SentencePiece trained on the sources."""

    model: str | None = Field(
        None,
        description="A SentencePiece .model, a Hugging Face tokenizer.json or a file of an installed package; null: train a SentencePiece, or none where all sources are token ids, below model.vocab_size.",
    )
    eos_token: str | int | None = Field(
        None,
        description="End-of-text token of a tokenizer.json, or its id; null: the one named by tokenizer_config.json in its folder. Without `model`, the id that ends documents of sources of token ids; null: the one with which their first documents end.",
    )
    algorithm: Literal["unigram", "bpe"] = Field(
        "unigram", description="Kind to train (unigram encodes several times faster)."
    )
    vocab_size: int = Field(
        4096, ge=300, description="Tokens of the vocabulary to train, control and byte tokens included."
    )
    byte_fallback: bool = Field(True, description="Unknown characters become bytes, so that no text is lost.")
    training_bytes: int = Field(20_000_000, gt=0, description="At most this much text is read to train the tokenizer.")
    control_tokens: tuple[str, ...] = Field(
        (),
        description="Tokens that a trained SentencePiece has besides, for chat_template or sources.*.fim; no text becomes one.",
    )
    chat_template: str | None = Field(
        None,
        description="Jinja file that writes sources.*.messages_column; null: chat_template.jinja or tokenizer_config.json next to `model`.",
    )


class PrepareConfig(Section):
    """How the store is written."""

    preset: Literal["fast", "balanced", "small"] = Field(
        "fast", description="`fast`: no compression; `balanced`: lz4hc; `small`: zstd; all with crc32c."
    )
    num_actors: int | None = Field(
        None, gt=0, description="Ray actors that tokenize; null: one per core, and no Ray for less than 50 MB of text."
    )
    part_bytes: int = Field(
        64_000_000, gt=0, description="Text bytes per part: the unit of work, of retry and of one writer."
    )
    chunk_tokens: int = Field(
        4096,
        gt=0,
        description="Tokens per chunk, the unit that is read, verified and decoded. Sequences whose length is a multiple of it read nothing else.",
    )
    on_damage: Literal["refuse", "keep"] = Field(
        "refuse", description="`keep`: of a file that is cut or damaged, use the readable part; the rest is lost."
    )
    seed: int = Field(0, description="Order of documents inside a part, and which documents validate.")


class CacheConfig(Section):
    """Where a node keeps what it read of a store at a URL; its ranks share the folder."""

    folder: str = Field("~/.cache/amfm", description="Folder on a disk of the node.")
    max_bytes: int = Field(
        64_000_000_000, gt=0, description="Most bytes of blocks; the least recently used are deleted first."
    )
    block_bytes: int = Field(
        4 * 2**20, ge=2**16, description="Bytes per request: a block of `data.shuffle=block` has 256 sequences."
    )


TaskName = Literal["mqar", "overwriting", "selective_copying", "parity", "s3", "s4", "a5", "s5"]


class SyntheticConfig(Section):
    """A synthetic task instead of text: sequences generated from the sample number, with labels at known positions (docs/synthetic_tasks.md)."""

    task: TaskName = Field(
        description="Recall of pairs, of the last of several writes, copying past noise, parity, or products in a group (symmetric S_n, alternating A_n)."
    )
    num_pairs: int = Field(8, gt=0, description="mqar, overwriting: keys that a sequence writes and then queries.")
    num_writes: int = Field(3, gt=0, description="overwriting: how often a sequence writes each key.")
    num_keys: int = Field(32, gt=0, description="mqar, overwriting: number of keys; a sequence uses num_pairs of them.")
    num_values: int = Field(32, gt=1, description="mqar, overwriting: number of values.")
    num_copied: int = Field(16, gt=0, description="selective_copying: tokens to copy in a sequence.")
    num_symbols: int = Field(16, gt=1, description="selective_copying: number of different tokens to copy.")

    @staticmethod
    def load(name: str) -> Any:
        """Load what the package of synthetic tasks brings, an entry point of the group `amfm.synthetic`: `rows`, a kind of
        `SampleSettings`, or `problems`, the rules of a run on a task. Raises ValueError if it is not installed.
        """
        from importlib.metadata import entry_points

        for entry in entry_points(group="amfm.synthetic", name=name):
            return entry.load()
        raise ValueError(
            "data.synthetic is in a package that is not installed; in a clone of amfm: pip install ./examples/synthetic"
        )


class DataConfig(Section):
    """The data of a run: text in a store, or a synthetic task."""

    store: str | None = Field(
        None,
        description="Token store: the folder that `amfm prepare` writes; training also reads a copy at s3://, gs:// or az://. Needed unless data.synthetic is given.",
    )
    cache: CacheConfig = Field(CacheConfig(), description="Node cache of a store at a URL.")
    sources: tuple[SourceConfig, ...] = Field(
        (), description="Bodies of text and their weights; one at least, unless data.synthetic is given."
    )
    synthetic: SyntheticConfig | None = Field(
        None, description="Train on a synthetic task, without a store and sources."
    )
    tokenizer: TokenizerConfig = Field(TokenizerConfig(), description="How text becomes tokens.")
    prepare: PrepareConfig = Field(PrepareConfig(), description="How the store is written.")
    phases: tuple[PhaseConfig, ...] = Field(
        (),
        description="Changes of the weights during the run, in order; append, never edit entries that have been trained.",
    )
    skip: tuple[tuple[int, int], ...] = Field(
        (),
        description="Ranges [a, b) of global samples that are left out, by the numbers of the run: the following samples come in their place. Append; entries that have been trained stay.",
    )
    skip_steps: tuple[tuple[int, int], ...] = Field(
        (), description="The same by steps [a, b], from 1: of those steps, all samples are left out."
    )
    validation_fraction: float = Field(
        0.02, ge=0, lt=1, description="Part of the documents of each source kept for validation."
    )
    megatron_split: str | None = Field(
        None,
        pattern=r"^[0-9]+(\.[0-9]+)?(,[0-9]+(\.[0-9]+)?){0,2}$",
        description="Megatron-LM's --split of each .idx, such as 98,2,0: its first documents train, the next validate, the last are left out; null: by validation_fraction.",
    )
    packing: Literal["concatenate", "best_fit"] = Field(
        "concatenate", description="Sequences cut from the joined documents, or documents fitted whole into sequences."
    )
    shuffle: Literal["full", "block"] = Field(
        "full", description="`block` reads long runs in order, for object stores."
    )
    mask_document_boundaries: bool = Field(
        True, description="Documents in a sequence do not see each other, and no label crosses between them."
    )
    num_workers: int = Field(1, ge=0, description="Processes that read ahead; 0: read in the training process.")
    on_corruption: Literal["raise", "quarantine"] = Field(
        "raise", description="A damaged chunk stops the run, or is skipped, logged and remembered."
    )

    def held_out(self, source: SourceConfig) -> float:
        """Part of a source's documents that is kept for validation."""
        return self.validation_fraction if source.validation_fraction is None else source.validation_fraction

    def text_store(self) -> str:
        """Where the token store is; ValueError for a run on a synthetic task, which has none."""
        if self.store is None:
            raise ValueError(
                "the run has no data.store but a synthetic task, whose sequences are computed; this needs text"
            )
        return self.store
