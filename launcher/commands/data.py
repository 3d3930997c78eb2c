"""Commands on text and files: prepare, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from launcher.commands.options import Output

if TYPE_CHECKING:
    from datapipe.tokenizer import Tokenizer


def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders, globs, s3://, gs:// and https:// URLs, or - for standard input: json, jsonl, csv, "
            "tsv, txt, parquet, Arrow; .gz, .bz2, .xz, .zst; in zip and tar."
        ),
    ],
    output: Output,
    tokenizer: Annotated[str, typer.Option(help="Directory, hub id, or package://tokenizer/modernbert.")],
    text: Annotated[str, typer.Option(help="Column with the text; a.b is the key b inside column a.")] = "text",
    id_: Annotated[str | None, typer.Option("--id", help="Column with the names of documents. Default: id.")] = None,
    group: Annotated[str | None, typer.Option(help="Column of what belongs together, such as a patient.")] = None,
    where: Annotated[str | None, typer.Option(help="Records to read: 'score >= 3 and lang == \"fr\"'.")] = None,
    spans: Annotated[
        str | None,
        typer.Option(help="Column with identifiers, [[start, end, label], ...]. Default: spans, and .ann beside .txt."),
    ] = None,
    identifiers: Annotated[
        str | None, typer.Option(help="File of regular expressions, one per line, whose matches are identifiers.")
    ] = None,
    mask_spans: Annotated[bool, typer.Option("--mask-spans", help="Put [LABEL] in place of identifiers.")] = False,
    split: Annotated[str | None, typer.Option(help="Split to read where splits are named. Default: train.")] = None,
    lines: Annotated[bool, typer.Option("--lines", help="Each line of a .txt file is a document.")] = False,
    encoding: Annotated[str | None, typer.Option(help="Encoding, such as cp1252. Default: detected.")] = None,
    format_: Annotated[
        Literal["json", "csv", "tsv", "txt", "parquet", "arrow"] | None,
        typer.Option("--format", help="json, csv, tsv, txt, parquet or arrow, where no name tells it."),
    ] = None,
    on_error: Annotated[
        Literal["stop", "skip"], typer.Option(help="stop, or skip: count faulty records and leave them out.")
    ] = "stop",
    strict: Annotated[bool, typer.Option("--strict", help="A file that is not read is an error.")] = False,
    dedup: Annotated[bool, typer.Option("--dedup", help="Leave out texts that appeared before, to the byte.")] = False,
    near_dedup: Annotated[
        float | None,
        typer.Option(min=0.3, max=1, help="Leave out texts with this share of an earlier text's word pairs: 0.8."),
    ] = None,
    min_tokens: Annotated[int, typer.Option(min=1, help="Leave out shorter documents.")] = 1,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Leave out longer documents.")] = None,
    held_out: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the documents, or groups, that goes to OUTPUT/held-out.")
    ] = 0.0,
    canaries: Annotated[
        int, typer.Option(min=0, max=10_000, help="Random secrets to plant, by which `detour audit` finds leaks: 50.")
    ] = 0,
    processes: Annotated[int, typer.Option(min=0, help="0: as many as there are cores and memory for.")] = 0,
) -> None:
    """Tokenize text into shards and a manifest. An interrupted preparation continues where it was."""
    from rich.console import Console

    from configs.schema import Reading
    from datapipe.manifest import NAME
    from datapipe.prepare import prepare as run
    from datapipe.selection import HELD_OUT, Selection
    from datapipe.tokenizer import load_tokenizer
    from launcher.status_line import status_line

    reading = Reading(
        text=text,
        id=id_,
        group=group,
        where=where,
        spans=spans,
        identifiers=identifiers,
        mask_spans=mask_spans,
        split=split,
        lines=lines,
        encoding=encoding,
        format=format_,
        on_error=on_error,
        strict=strict,
        canaries=canaries,
    )
    loaded = load_tokenizer(tokenizer)
    console = Console()
    with status_line(console, "reading") as show:
        run(
            inputs,
            loaded,
            output,
            show,
            selection=Selection(dedup, min_tokens, max_tokens, held_out, near_dedup),
            reading=reading,
            report=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
            processes=processes,
        )
    for directory in (output, output / HELD_OUT):
        if (directory / NAME).exists():
            _print_prepared(directory, loaded)
    if (output / HELD_OUT / NAME).exists():
        apart = f"0 values of {group} on both sides, because the choice goes by them"
        print(f"  groups      {apart if group else 'not kept apart; --group COLUMN holds out whole patients'}")


def _print_prepared(directory: Path, tokenizer: Tokenizer) -> None:
    from datapipe.manifest import read_manifest
    from datapipe.shard_report import framing_line, overlap_lines, size_line, source_lines

    manifest = read_manifest(directory)
    lines = [framing_line(manifest, tokenizer), *source_lines(manifest), *overlap_lines(manifest)]
    print("\n".join([size_line(directory, manifest), *lines]))


def inspect(
    target: Annotated[Path, typer.Argument(help="A shard directory, a checkpoint or a run directory.")],
) -> None:
    """Describe a shard set, a checkpoint or a run, and check its digests."""
    from launcher.describe import describe

    print(describe(target))
