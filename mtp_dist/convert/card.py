"""The model card: README.md of an exported folder."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from mtp_dist.checkpoint.format import CheckpointMetadata
from mtp_dist.convert.architectures.registry import architecture_of
from mtp_dist.convert.head_layout import LINEAR, MTP

TEMPLATE = """\
---
{{ card_data }}
---
# {{ name }}

Step {{ step }} of the run `{{ config.run.name }}`, pretrained with mtp_dist: a language model with
{{ config.heads.count }} prediction heads of kind `{{ config.heads.kind }}` on one trunk. The weights here
({{ dtype }}) are the trunk and head 1, which predicts the next token: {{ architecture }}.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("."{{ ", trust_remote_code=True" if needs_code }})
tokenizer = AutoTokenizer.from_pretrained("."{{ ", trust_remote_code=True" if is_linear }})
prompt = tokenizer({{ prompt }}, return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50{{ ", use_mtp=True" if use_mtp }})[0]))
```
{% if drafts_with %}
This drafts several tokens per forward pass with the other heads, for one text at a time, from transformers 5.24 on:
greedy text is the same as without drafts, and sampled text has the same distribution. {{ without_code }}
{% endif %}
In training every document ended with `{{ end }}` and the next one followed, so the prompt begins with that token, as a
document does. Samples were {{ config.train.sequence_length }} tokens long. The tokenizer adds no token of its own.

{{ losses }}{% if others %}## The other heads

`mtp_heads.safetensors` contains what {{ plain }} cannot hold, by the global names of mtp_dist:

{{ others }}

An import restores them with the rest, as a checkpoint to train from or to open as a model:

```bash
mtp-dist import --from . --to ../imported
```

```python
from pathlib import Path

import torch

from mtp_dist.checkpoint.reader import load_weights
from mtp_dist.model.reference import ReferenceModel

model = ReferenceModel(*load_weights(Path("../imported")))
logits_of_heads = model(torch.tensor([tokens]))  # by head: [1, tokens, vocabulary]
```

{% endif %}## Configuration

`mtp_config.json` contains the step and the full configuration. The part that defines the model:

```json
{{ model }}
```
"""

METRICS = {"loss": "loss (nats per token)", "bits_per_byte": "bits per byte", "accuracy": "accuracy"}
"""Columns of the table of losses, by their key in summary.json."""


def model_card(
    name: str,
    source: Path,
    metadata: CheckpointMetadata,
    dtype: str,
    end_token: str,
    others: Sequence[str],
    architecture: str,
    drafts_with: str | None,
) -> str:
    """Return the card of the export of the checkpoint `source`.

    others: global names of the weights that are not in the model's files. drafts_with: see Exported.
    """
    config, title = metadata.config, architecture_of(metadata.config.model).title
    is_linear = architecture.startswith(LINEAR)
    opened = f"a {title} with a matrix in front of the final norm" if is_linear else f"a plain {title}"
    if architecture == MTP:
        opened += ", next to which the other heads are MTP layers"
    groups = dict.fromkeys(".".join(other.split(".")[:2]) for other in others)
    shown = {"model": config.model.model_dump(mode="json"), "heads": config.heads.model_dump(mode="json")}
    card: ModelCard = ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["multi-token-prediction", "mtp_dist"],
        ),
        template_str=TEMPLATE,
        name=name,
        step=metadata.step,
        config=config,
        dtype=dtype,
        plain=f"a {title}",
        architecture=opened,
        without_code="Without `trust_remote_code` "
        + ("it cannot be opened." if is_linear else f"the folder is a plain {title}."),
        drafts_with=drafts_with,
        needs_code=drafts_with or is_linear,
        is_linear=is_linear,
        use_mtp=architecture == MTP,
        end=end_token,
        # transformers' MTP layers fail on a prompt shorter than their number.
        prompt=repr(end_token + (config.log.sample_prompt or ("Once upon a time" if architecture == MTP else ""))),
        losses="".join(_losses(source, metadata)),
        others=", ".join(f"`{group}`" for group in groups),
        model=json.dumps(shown, indent=2),
    )
    return f"{card.content}\n"


def _losses(source: Path, metadata: CheckpointMetadata) -> Iterator[str]:
    """Yield the section on the losses of the run's last validation, if that was at the checkpoint's step."""
    rows = [
        (validation_set["name"] or "", head)
        for validation_set in _validation(source, metadata)
        for head in validation_set["heads"]
    ]
    columns = [key for key in METRICS if any(head[key] is not None for _, head in rows)]
    if not columns:
        return
    named = ["set"] if any(name for name, _ in rows) else []
    titles = [*named, "head", *(METRICS[key] for key in columns)]
    yield f"## Validation\n\n| {' | '.join(titles)} |\n{'| --- ' * len(titles)}|\n"
    for name, head in rows:
        cells = [name.replace("|", "\\|")] if named else []
        cells += [str(head["head"]), *("" if head[key] is None else f"{head[key]:.4f}" for key in columns)]
        yield f"| {' | '.join(cells)} |\n"
    yield "\n"


def _validation(source: Path, metadata: CheckpointMetadata) -> list[dict[str, Any]]:
    """Return the validation sets in the summary of the run that saved the checkpoint; none if it is of another step."""
    config = metadata.config
    for folder in (source.parent.parent, config.output_dir):
        try:
            summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            saved = (summary["name"], summary["steps"], Path(summary["checkpoint"]).name)
            if saved == (config.run.name, metadata.step, source.name):
                return summary["validation"] or []
        except (OSError, ValueError, KeyError, TypeError):  # missing, or of another program
            continue
    return []
