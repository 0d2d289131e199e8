"""The result for a terminal."""

from typing import Any

from rich.table import Table


def tables(result: dict[str, Any]) -> list[Table]:
    """Preparation: a row for each tokenizer. Loader: one for each sequence length."""
    workers, processor = result["workers"], result["machine"]["processor"]
    preparation = Table(
        *("tokenizer", "MB of text", "prepare MB/s", "after its start", "tokenizer alone MB/s", "ratio", "within it"),
        title=f"prepare: {workers} workers on {processor}",
    )
    for row in result["preparation"]:
        names = ("prepare", "after_the_start", "bare")
        rates = [f"{row[f'{name}_megabytes_per_second']:.1f}" for name in names]
        share = f"{row['share_in_tokenizer']:.0%}" if row["share_in_tokenizer"] else ""
        preparation.add_row(row["tokenizer"], f"{row['megabytes']:.1f}", *rates, f"{row['ratio']:.2f}", share)
    loader = Table(
        *("sequence length", "samples: million tokens/s", "with the targets of 4 heads", "masked by document"),
        title="loader: one process, corpus in the page cache",
    )
    for row in result["loader"]:
        names = ("samples", "with_targets", "with_document_masks")
        rates = [f"{row[f'{name}_tokens_per_second'] / 1e6:.0f}" for name in names]
        loader.add_row(str(row["sequence_length"]), *rates)
    return [preparation, loader]
