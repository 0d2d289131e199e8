"""`mtp-dist prepare`: from text to a prepared corpus with several processes, resumable after a kill at any time.

Everything is written below PREFIX.unfinished first: plan.json describes the corpus, and work units are added to it in
order as the processes deliver them. The same command resumes after a kill; the result depends neither on kills nor on
the number of processes.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from mtp_dist.config.schema import MAX_TEXT_LOSS
from mtp_dist.data.build_tokenizer import build_tokenizer
from mtp_dist.data.corpus import CorpusDescription, SourceDescription, TokenizerDescription
from mtp_dist.data.prepare.corpus_writer import JOURNAL, TOKENS, UnfinishedCorpus
from mtp_dist.data.prepare.tokenize import UnitEncoder, UnitSummary
from mtp_dist.data.prepare.worker_pool import WorkerDiedError, map_in_order, preload_modules
from mtp_dist.data.sources.input import UNIT_BYTES, FileCounts, Input, InputOptions
from mtp_dist.data.sources.open_inputs import open_inputs
from mtp_dist.data.sources.work_units import InvalidUtf8, WorkUnit
from mtp_dist.data.text_loss import TextLoss
from mtp_dist.data.tokenizer import Tokenizer
from mtp_dist.errors import ConfigError, DataError
from mtp_dist.fs import add_suffix, atomic_write_text, explain_os_errors

PLAN = "plan.json"
NEW_OPTIONS = ("prompt_field", "chat_template")
"""Options that plans of older versions do not have."""
SUFFIXES = (".bin", ".idx", ".json")


class Progress(Protocol):
    """An observer of a preparation."""

    def start(self, total: int | None) -> None:
        """Begin with the sum of the sizes of all work units, None if unknown."""

    def advance(self, size: int, summary: UnitSummary, reused: bool) -> None:
        """Count a work unit that was added, or reused from an earlier start."""


@dataclass(frozen=True)
class Request:
    """The arguments of `prepare`."""

    inputs: tuple[str, ...]
    prefix: Path
    tokenizer: str
    options: InputOptions = field(default_factory=InputOptions)
    invalid_utf8: InvalidUtf8 = "error"
    workers: int = 1
    unit_bytes: int = UNIT_BYTES
    max_text_loss: float = MAX_TEXT_LOSS
    """Largest fraction of the text that may be lost in encoding and decoding."""

    @property
    def folder(self) -> Path:
        """Folder of the corpus until it is complete."""
        return add_suffix(self.prefix, ".unfinished")


@dataclass(frozen=True)
class Prepared:
    """A complete corpus."""

    description: CorpusDescription
    first_empty: str | None = None
    """Location of the first document without tokens, which was left out."""
    first_invalid: str | None = None
    """Location of the first document with invalid UTF-8."""
    files: FileCounts = field(default_factory=FileCounts)
    """Counts of the inputs' files."""
    text_loss: TextLoss = field(default_factory=TextLoss)
    """Text lost in encoding and decoding."""

    def as_json(self) -> dict[str, Any]:
        return self.description.model_dump() | {
            "first_empty": self.first_empty,
            "first_invalid": self.first_invalid,
            "files": self.files.as_json(),
        }


def prepare(request: Request, progress: Progress) -> Prepared:
    """Make a corpus or resume making it. Raise UserError and leave nothing under the final names."""
    _check_prefix(request.prefix)
    preload_modules("mtp_dist.data.prepare.tokenize")  # while the inputs are listed
    tokenizer = build_tokenizer(request.tokenizer, "--tokenizer")
    inputs = open_inputs(request.inputs, request.options)
    with _locked_folder(request):
        _check_plan(request, _plan(request, tokenizer, inputs))
        finished = add_suffix(request.prefix, ".json")
        if finished.exists():  # killed just before the folder was removed
            prepared = Prepared(CorpusDescription.model_validate_json(finished.read_bytes()))
        else:
            prepared = _make(request, tokenizer, inputs, progress)
        with explain_os_errors(request.folder, "remove"):
            _remove(request.folder)
    return prepared


def _check_prefix(prefix: Path) -> None:
    """Raise ConfigError if a corpus cannot have this name."""
    if not prefix.name:
        raise ConfigError(f"--to '{prefix}' does not name a file: name the corpus, such as corpora/web")
    if prefix.suffix in SUFFIXES:
        raise ConfigError(
            f"--to '{prefix}' ends with {prefix.suffix}, a suffix that is added to the name of a corpus: use --to "
            f"'{prefix.with_suffix('')}'"
        )


@contextmanager
def _locked_folder(request: Request) -> Iterator[None]:
    """Create and lock PREFIX.unfinished."""
    with explain_os_errors(request.folder, "create"):
        request.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(request.folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ConfigError(f"another process is preparing '{request.prefix}': wait, or choose another --to") from None
    finally:
        os.close(descriptor)


def _plan(request: Request, tokenizer: Tokenizer, inputs: Sequence[Input]) -> dict[str, Any]:
    """Return as JSON everything that the bytes of the corpus depend on."""
    plan = {
        "tokenizer": [tokenizer.name, tokenizer.fingerprint],
        "options": {name: value for name, value in asdict(request.options).items() if value or name not in NEW_OPTIONS},
        "invalid UTF-8": request.invalid_utf8,
        "unit bytes": request.unit_bytes,
        "inputs": list(request.inputs),
        "files and datasets": [item for source in inputs for item in source.identity()],
    }
    return cast(dict[str, Any], json.loads(json.dumps(plan)))


def _check_plan(request: Request, plan: dict[str, Any]) -> None:
    """Write the plan, or raise ConfigError if the folder was started with another one."""
    file = request.folder / PLAN
    if file.exists():
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise DataError(f"{file} is corrupt: delete '{request.folder}' to start from scratch") from None
        if saved == plan or _has_units(request.folder):
            for name, value in plan.items():
                if saved.get(name) != value:
                    raise ConfigError(
                        f"'{request.folder}' was started with other {name} ({_difference(saved.get(name), value)}): "
                        "use the same, or delete that folder to start from scratch"
                    )
            return
    else:
        for suffix in SUFFIXES:
            if (existing := add_suffix(request.prefix, suffix)).exists():
                with suppress(OSError):
                    request.folder.rmdir()
                raise ConfigError(f"{existing} exists: delete it, or choose another --to")
    with explain_os_errors(file, "write"):
        atomic_write_text(file, json.dumps(plan))


def _has_units(folder: Path) -> bool:
    journal = folder / JOURNAL
    return journal.exists() and journal.stat().st_size > 0


def _difference(saved: Any, new: Any) -> str:
    """Describe the first item that differs."""
    if isinstance(saved, dict) and isinstance(new, dict):
        name = next(name for name in new if saved.get(name) != new[name])
        return f"{name}: {saved.get(name)!r}, now {new[name]!r}"
    if isinstance(saved, list) and isinstance(new, list):
        pairs = zip_longest(saved, new)
        first, second = next((first, second) for first, second in pairs if first != second)
        if isinstance(first, list) and isinstance(second, list) and first[0] == second[0]:
            return f"{first[0]} has changed"
        saved, new = first, second
    return f"{saved!r}, now {new!r}"


def _make(request: Request, tokenizer: Tokenizer, inputs: Sequence[Input], progress: Progress) -> Prepared:
    """Encode the units, add them to the corpus in order, and move it to its final name."""
    with explain_os_errors(request.folder, "read"):
        # Marked ids are negative.
        dtype = np.int32 if request.options.fields.need_records else tokenizer.dtype
        corpus = UnfinishedCorpus(request.folder, request.prefix, dtype)
    sizes = [source.total for source in inputs]
    # Sizes of files are bytes and those of datasets rows, which do not add up.
    mixed = len(set(map(type, inputs))) > 1
    total = None if mixed or None in sizes else sum(size or 0 for size in sizes)
    progress.start(total)
    first_empty = first_invalid = None
    done = text_bytes = 0
    loss = TextLoss()
    names = ", ".join(request.inputs)
    check_loss = partial(loss.check, request.max_text_loss, "--max-text-loss", names, request.tokenizer)
    encoder = UnitEncoder(tokenizer, request.invalid_utf8, dtype)
    with closing(corpus), closing(_add_units(request, corpus, encoder, inputs)) as units:
        for unit, summary, reused in units:
            if first_empty is None and summary.first_empty is not None:
                first_empty = unit.location(summary.first_empty)
            if first_invalid is None and summary.first_invalid is not None:
                first_invalid = unit.location(summary.first_invalid)
            progress.advance(unit.size, summary, reused)
            characters = Counter(summary.first_lost)
            loss.add(TextLoss(summary.checked_bytes, summary.lost_bytes, summary.lost_whitespace, characters))
            done += unit.size
            text_bytes += summary.bytes + summary.empty_bytes
            # Upper bound of the text that is left. Compressed files and rows are assumed to expand as before.
            longest = max(1, text_bytes / max(1, done))
            check_loss(unread_bytes=math.inf if total is None else max(0, total - done) * longest)
        check_loss()
        if not corpus.total.documents:
            files = "; ".join(_count_files(inputs).describe())
            raise DataError(f"{names}: no document has any text: choose other inputs ({files})")
        description = _describe(request, tokenizer, corpus)
        with explain_os_errors(request.folder, "write in"):
            corpus.finish(description.model_dump_json(indent=2) + "\n")
    return Prepared(description, first_empty, first_invalid, _count_files(inputs), loss)


def _count_files(inputs: Sequence[Input]) -> FileCounts:
    files = FileCounts()
    for source in inputs:
        files.add(source.files)
    return files


def _add_units(
    request: Request, corpus: UnfinishedCorpus, encoder: UnitEncoder, inputs: Sequence[Input]
) -> Generator[tuple[WorkUnit, UnitSummary, bool]]:
    """Yield the units as they are added, first those that the corpus already has, and whether it had them."""
    units = (unit for source in inputs for unit in _units(source, request))
    for summary, unit in zip(corpus.recovered, units, strict=False):
        yield unit, summary, True
    try:
        for unit, encoded in map_in_order(encoder, units, request.workers):
            with explain_os_errors(request.folder / TOKENS, "write"):
                corpus.add(encoded)
            yield unit, encoded.summary, False
    except WorkerDiedError as error:
        status = error.exit_code or 0
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        raise DataError(
            f"a worker process {how} while it read {cast(WorkUnit, error.task).location(0)} and what follows: if "
            "memory ran out, use fewer --workers; the same command continues from what is done"
        ) from None


def _units(source: Input, request: Request) -> Iterator[WorkUnit]:
    with explain_os_errors(request.prefix, "read"):
        yield from source.units(request.unit_bytes)


def _describe(request: Request, tokenizer: Tokenizer, corpus: UnfinishedCorpus) -> CorpusDescription:
    options, total = request.options, corpus.total
    return CorpusDescription(
        tokenizer=TokenizerDescription(
            name=tokenizer.name,
            sha256=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            end_of_document=tokenizer.end_of_document,
        ),
        documents=total.documents,
        tokens=total.tokens,
        prompt_tokens=total.prompt_tokens,
        bytes=total.bytes,
        empty_bytes=total.empty_bytes,
        checked_bytes=total.checked_bytes,
        lost_bytes=total.lost_bytes,
        lost_whitespace=total.lost_whitespace,
        empty_documents=total.empty,
        replaced_documents=total.replaced,
        skipped_documents=total.skipped,
        source=SourceDescription(
            inputs=request.inputs,
            field=options.field,
            prompt_field=options.prompt_field,
            chat_template=options.chat_template.source if options.chat_template else None,
            glob=options.glob,
            subset=options.subset,
            split=options.split,
            invalid_utf8=request.invalid_utf8,
        ),
        sha256=corpus.sha256,
    )


def _remove(folder: Path) -> None:
    """Remove the folder, its plan last: a folder without a plan counts as new."""
    for file in folder.iterdir():
        if file.name != PLAN:
            file.unlink()
    (folder / PLAN).unlink()
    folder.rmdir()
