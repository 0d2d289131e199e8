"""`mtp-dist prepare`: from text to a prepared corpus, with several processes and in spite of whatever kills them.

Everything is written below PREFIX.unfinished first: plan.json says what is being made, and the work units are added to
the corpus in their order while the processes deliver them. The same command goes on after a kill, and the result does
not depend on that or on the number of processes.
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

from mtp_dist.config.schema import MAX_TEXT_LOSS
from mtp_dist.data.corpus import CorpusDescription, SourceDescription, TokenizerDescription
from mtp_dist.data.indexed import add_suffix
from mtp_dist.data.prepare.corpus_writer import JOURNAL, TOKENS, UnfinishedCorpus
from mtp_dist.data.prepare.tokenize import UnitEncoder, UnitSummary
from mtp_dist.data.prepare.worker_pool import WorkerDiedError, map_in_order, preload_modules
from mtp_dist.data.sources.text_sources import UNIT_BYTES, FileCounts, Input, InputOptions, open_inputs
from mtp_dist.data.sources.work_units import InvalidUtf8, WorkUnit
from mtp_dist.data.text_loss import TextLoss
from mtp_dist.data.tokenizer import Tokenizer, build_tokenizer
from mtp_dist.errors import ConfigError
from mtp_dist.fs import atomic_write_text, explain_os_errors

PLAN = "plan.json"
SUFFIXES = (".bin", ".idx", ".json")


class Progress(Protocol):
    """Whoever watches."""

    def start(self, total: int | None) -> None:
        """`total` is the sum of the sizes of all work units, None where it is not known."""

    def advance(self, size: int, summary: UnitSummary, reused: bool) -> None:
        """One more work unit of this size is in the corpus; reused where an earlier start put it there."""


@dataclass(frozen=True)
class Request:
    """What the user asks for."""

    inputs: tuple[str, ...]
    prefix: Path
    tokenizer: str
    options: InputOptions = field(default_factory=InputOptions)
    invalid_utf8: InvalidUtf8 = "error"
    workers: int = 1
    unit_bytes: int = UNIT_BYTES
    max_text_loss: float = MAX_TEXT_LOSS
    """Share of the text that may not survive encoding and decoding."""

    @property
    def folder(self) -> Path:
        """Where the corpus is until it is whole."""
        return add_suffix(self.prefix, ".unfinished")


@dataclass(frozen=True)
class Prepared:
    """A corpus that is whole."""

    description: CorpusDescription
    first_empty: str | None = None
    """The place of the first document that was left out because it has no tokens."""
    first_invalid: str | None = None
    """The place of the first document with invalid UTF-8."""
    files: FileCounts = field(default_factory=FileCounts)
    """What the files of the inputs became."""
    loss: TextLoss = field(default_factory=TextLoss)
    """What does not survive encoding and decoding."""

    def as_json(self) -> dict[str, Any]:
        return self.description.model_dump() | {
            "first_empty": self.first_empty,
            "first_invalid": self.first_invalid,
            "files": self.files.as_json(),
        }


def prepare(request: Request, progress: Progress) -> Prepared:
    """Make the corpus, or go on with it. Raises ConfigError, with nothing under the final names."""
    _check_prefix(request.prefix)
    preload_modules("mtp_dist.data.prepare.tokenize")  # while the inputs are looked for
    tokenizer = build_tokenizer(request.tokenizer, "--tokenizer")
    inputs = open_inputs(request.inputs, request.options)
    with _own_folder(request):
        _check_plan(request, _plan(request, tokenizer, inputs))
        finished = add_suffix(request.prefix, ".json")
        if finished.exists():  # killed when only the folder was left to remove
            prepared = Prepared(CorpusDescription.model_validate_json(finished.read_bytes()))
        else:
            prepared = _make(request, tokenizer, inputs, progress)
        with explain_os_errors(request.folder, "remove"):
            _remove(request.folder)
    return prepared


def _check_prefix(prefix: Path) -> None:
    """Raise ConfigError if the files of a corpus cannot have this name."""
    if not prefix.name:
        raise ConfigError(f"--to '{prefix}' is not the path of a file: give the corpus a name, such as corpora/web")
    if prefix.suffix in SUFFIXES:
        raise ConfigError(
            f"--to '{prefix}' ends with {prefix.suffix}, which is added to the name of a corpus: give --to "
            f"'{prefix.with_suffix('')}'"
        )


@contextmanager
def _own_folder(request: Request) -> Iterator[None]:
    """Make PREFIX.unfinished and keep other processes out of it."""
    with explain_os_errors(request.folder, "make"):
        request.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(request.folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ConfigError(f"another process prepares '{request.prefix}': wait for it, or name another --to") from None
    finally:
        os.close(descriptor)


def _plan(request: Request, tokenizer: Tokenizer, inputs: Sequence[Input]) -> dict[str, Any]:
    """Everything that the bytes of the corpus depend on, as JSON."""
    plan = {
        "tokenizer": [tokenizer.name, tokenizer.fingerprint],
        "options": asdict(request.options),
        "invalid UTF-8": request.invalid_utf8,
        "unit bytes": request.unit_bytes,
        "inputs": list(request.inputs),
        "files and datasets": [item for source in inputs for item in source.identity()],
    }
    return cast(dict[str, Any], json.loads(json.dumps(plan)))


def _check_plan(request: Request, plan: dict[str, Any]) -> None:
    """Write the plan, or see that what is there follows the same one."""
    file = request.folder / PLAN
    if not file.exists():
        for suffix in SUFFIXES:
            if (there := add_suffix(request.prefix, suffix)).exists():
                with suppress(OSError):
                    request.folder.rmdir()
                raise ConfigError(f"{there} exists: delete it, or name another --to")
        with explain_os_errors(file, "write"):
            atomic_write_text(file, json.dumps(plan))
        return
    try:
        begun = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise ConfigError(f"{file} is damaged: delete '{request.folder}' to begin anew") from None
    if begun != plan and not _has_units(request.folder):
        with explain_os_errors(file, "write"):
            atomic_write_text(file, json.dumps(plan))
        return
    for name, ours in plan.items():
        if begun.get(name) != ours:
            raise ConfigError(
                f"'{request.folder}' was begun with other {name} ({_difference(begun.get(name), ours)}): give the "
                "same, or delete that folder to begin anew"
            )


def _has_units(folder: Path) -> bool:
    journal = folder / JOURNAL
    return journal.exists() and journal.stat().st_size > 0


def _difference(theirs: Any, ours: Any) -> str:
    """The first item that differs, for a person."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        name = next(name for name in ours if theirs.get(name) != ours[name])
        return f"{name}: {theirs.get(name)!r}, now {ours[name]!r}"
    if isinstance(theirs, list) and isinstance(ours, list):
        pairs = zip_longest(theirs, ours)
        first, second = next((first, second) for first, second in pairs if first != second)
        if isinstance(first, list) and isinstance(second, list) and first[0] == second[0]:
            return f"{first[0]} has changed"
        theirs, ours = first, second
    return f"{theirs!r}, now {ours!r}"


def _make(request: Request, tokenizer: Tokenizer, inputs: Sequence[Input], progress: Progress) -> Prepared:
    """Encode the units, add each to the corpus in its turn, and give the result its name."""
    with explain_os_errors(request.folder, "read"):
        corpus = UnfinishedCorpus(request.folder, request.prefix, tokenizer.dtype)
    sizes = [source.total for source in inputs]
    # Files have bytes and datasets rows, which have no sum.
    mixed = len(set(map(type, inputs))) > 1
    total = None if mixed or None in sizes else sum(size or 0 for size in sizes)
    progress.start(total)
    first_empty = first_invalid = None
    done = text_bytes = 0
    loss = TextLoss()
    names = ", ".join(request.inputs)
    check_loss = partial(loss.check, request.max_text_loss, "--max-text-loss", names, request.tokenizer)
    encoder = UnitEncoder(tokenizer, request.invalid_utf8)
    with closing(corpus), closing(_added(request, corpus, encoder, inputs)) as units:
        for unit, summary, reused in units:
            if first_empty is None and summary.first_empty is not None:
                first_empty = unit.place(summary.first_empty)
            if first_invalid is None and summary.first_invalid is not None:
                first_invalid = unit.place(summary.first_invalid)
            progress.advance(unit.size, summary, reused)
            most = Counter(summary.first_lost)
            loss.add(TextLoss(summary.checked_bytes, summary.lost_bytes, summary.lost_whitespace, most))
            done += unit.size
            text_bytes += summary.bytes + summary.empty_bytes
            # The most text that is left: none is longer than its file, but compressed files and rows may be as before.
            longest = max(1, text_bytes / max(1, done))
            check_loss(unread_bytes=math.inf if total is None else max(0, total - done) * longest)
        check_loss()
        if not corpus.total.documents:
            files = "; ".join(_files_of(inputs).describe())
            raise ConfigError(f"{names}: no document has any text: give other inputs ({files})")
        description = _describe(request, tokenizer, corpus)
        with explain_os_errors(request.folder, "write in"):
            corpus.finish(description.model_dump_json(indent=2) + "\n")
    return Prepared(description, first_empty, first_invalid, _files_of(inputs), loss)


def _files_of(inputs: Sequence[Input]) -> FileCounts:
    files = FileCounts()
    for source in inputs:
        files.add(source.files)
    return files


def _added(
    request: Request, corpus: UnfinishedCorpus, encoder: UnitEncoder, inputs: Sequence[Input]
) -> Generator[tuple[WorkUnit, UnitSummary, bool]]:
    """The units that are in the corpus, and whether they were there already."""
    units = (unit for source in inputs for unit in _units(source, request))
    for summary, unit in zip(corpus.recovered, units, strict=False):
        yield unit, summary, True
    try:
        for unit, encoded in map_in_order(encoder, units, request.workers):
            with explain_os_errors(request.folder / TOKENS, "write"):
                corpus.add(encoded)
            yield unit, encoded.summary, False
    except WorkerDiedError as death:
        status = death.exit_code or 0
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        raise ConfigError(
            f"a worker process {how} while it read {cast(WorkUnit, death.task).place(0)} and what follows: where "
            "memory ran out, use fewer --workers; the same command goes on from what is done"
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
            glob=options.glob,
            subset=options.subset,
            split=options.split,
            invalid_utf8=request.invalid_utf8,
        ),
        sha256=corpus.sha256,
    )


def _remove(folder: Path) -> None:
    """The plan goes last: a folder without one is taken for a new one."""
    for file in folder.iterdir():
        if file.name != PLAN:
            file.unlink()
    (folder / PLAN).unlink()
    folder.rmdir()
