"""`mtp-dist analyze`: measurements that explain what training with several heads does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from mtp_dist.cli.analyze_marginalize import marginalize
from mtp_dist.cli.analyze_tables import (
    choice_point_tables,
    information_table,
    layer_table,
    probe_table,
    source_tables,
)
from mtp_dist.cli.options import AsJson, model_folder
from mtp_dist.cli.progress import progress_bar, updates
from mtp_dist.cli.tables import show_result
from mtp_dist.errors import LaunchError, exits_with_user_errors

if TYPE_CHECKING:  # torch takes seconds to import
    from rich.progress import Progress

    from mtp_dist.analysis.layer_states import LayeredModel
    from mtp_dist.analysis.trained_model import TrainedModel

app = typer.Typer(no_args_is_help=True, help="Explain what training with several heads does.")
app.command("marginalize")(marginalize)

MODEL_HELP = "Folder of a checkpoint, an export or a run; may be repeated to compare models."
Models = Annotated[list[str], typer.Option("--model", help=MODEL_HELP)]
PYTHON_STDLIB = "python-stdlib"
Text = Annotated[
    str,
    typer.Option(
        "--data", help="A text file, python-stdlib, or a synthetic task, of which held-out documents are read."
    ),
]
Tokens = Annotated[int, typer.Option(min=1, help="Approximate number of tokens of the text to read.")]


@app.command("choice-points")
@exits_with_user_errors
def choice_points(
    model: Models,
    data: Annotated[str, typer.Option(help="Synthetic task with marked choice points.")] = "synthetic/choices",
    tokens: Tokens = 32768,
    as_json: AsJson = False,
) -> None:
    """Measure how much of the loss and of the trunk's gradient is about choices, for the first 1, 2, ... heads.

    The table has the paper's count next to it: n(n+1)/2 loss terms per choice, n per inconsequential token.
    """
    from mtp_dist.analysis.choice_points import measure_choice_points
    from mtp_dist.analysis.text import read_marked_text
    from mtp_dist.provenance import provenance

    with progress_bar() as bar:
        results = [
            measure_choice_points(
                opened, read_marked_text(data, opened, tokens + opened.lookahead), tokens, updates(bar, opened.name)
            )
            for opened in _open_with_heads(model, bar)
        ]
    result = {"measured": provenance(), "data": data, "models": results}
    show_result(result, as_json, *(table for found in results for table in choice_point_tables(found)))


@app.command("information")
@exits_with_user_errors
def information(
    model: Annotated[list[str] | None, typer.Option(help=MODEL_HELP)] = None,
    data: Text = PYTHON_STDLIB,
    tokens: Tokens = 65536,
    as_json: AsJson = False,
) -> None:
    """Measure the loss by distance, and how much of it is mutual information with the tokens in between.

    Without a model: the entropies of a small Markov source, enumerated exactly.
    """
    from mtp_dist.provenance import provenance

    if not model:
        from mtp_dist.analysis.markov import choice_source, describe_source

        source = {"measured": provenance(), **describe_source(choice_source())}
        show_result(source, as_json, *source_tables(source))
        return
    from mtp_dist.analysis.information import measure_information
    from mtp_dist.analysis.text import read_tokens

    with progress_bar() as bar:
        results = []
        for opened in _open_with_heads(model, bar):
            batches = opened.windows(read_tokens(data, opened, tokens + opened.lookahead), tokens)
            results.append(measure_information(opened, batches, updates(bar, opened.name)))
    result = {"measured": provenance(), "data": data, "models": results}
    show_result(result, as_json, *map(information_table, results))


@app.command("probe")
@exits_with_user_errors
def probe(
    model: Annotated[
        list[str],
        typer.Option(
            help="Folder of a causal language model of Hugging Face, a checkpoint, an export or a run; may be repeated "
            "to compare models."
        ),
    ],
    data: Text = PYTHON_STDLIB,
    distance: Annotated[int, typer.Option(min=1, help="Largest distance of a token to predict.")] = 4,
    tokens: Tokens = 32768,
    as_json: AsJson = False,
) -> None:
    """Measure how well linear classifiers of the states after each layer predict the next tokens.

    Baselines: the frequencies of the tokens, and the classifier of the trunk's output on states in a random order.
    """
    from mtp_dist.analysis.probe import compare_probes, probe_model
    from mtp_dist.analysis.text import read_tokens
    from mtp_dist.provenance import provenance

    with progress_bar() as bar:
        models = _open_layered(model, bar)
        _check_comparable(models)
        lookahead = max(distance, *(opened.lookahead for opened in models))
        text = read_tokens(data, models[0], tokens + lookahead)
        limit = min(tokens, len(text) - lookahead)  # all models have the targets of these positions
        probed = []
        for opened in models:
            progress = (updates(bar, f"{opened.name}: {part}") for part in ("states", "probes"))
            probed.append(probe_model(opened, text, limit, distance, *progress))
    results = compare_probes(probed)
    result = {"measured": provenance(), "data": data, "models": results}
    show_result(result, as_json, probe_table(results), *map(layer_table, results))


def _open(folders: Sequence[str], bar: Progress) -> list[TrainedModel]:
    from mtp_dist.analysis.trained_model import TrainedModel

    verified = updates(bar, "verifying")
    return [TrainedModel.open(model_folder(folder), verified) for folder in folders]


def _open_layered(folders: Sequence[str], bar: Progress) -> list[LayeredModel]:
    from mtp_dist.analysis.causal_model import CausalModel, is_foreign

    paths = map(model_folder, folders)
    return [CausalModel.open(path) if is_foreign(path) else _open([str(path)], bar)[0] for path in paths]


def _open_with_heads(folders: Sequence[str], bar: Progress) -> list[TrainedModel]:
    models = _open(folders, bar)
    for model in models:
        model.check_predicts_ahead()
    return models


def _check_comparable(models: Sequence[LayeredModel]) -> None:
    """Raise LaunchError unless the models read the same tokens in the same windows."""
    first, *others = models
    for other in others:
        for label, differs in (
            ("tokenizers", other.tokenizer.fingerprint != first.tokenizer.fingerprint),
            ("window lengths (train.sequence_length)", other.sequence_length != first.sequence_length),
        ):
            if differs:
                raise LaunchError(
                    f"--model = '{first.folder}' and '{other.folder}' have different {label}, so that their "
                    "predictions are not comparable: give models with the same, or run the command once per model"
                )
