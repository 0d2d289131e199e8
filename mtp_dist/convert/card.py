"""The model card: what stands in an exported folder's README.md."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mtp_dist.checkpoint.files import Description

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [multi-token-prediction, mtp_dist]
---
# {name}

Step {step} of the run `{run}`, pretrained with mtp_dist: a language model with {count} prediction heads of kind
`{kind}` on one trunk. The weights here ({dtype}) are the trunk and head 1, which predicts the next token: a plain
Llama.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
prompt = tokenizer("def ", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
```

In training every document ended with `{end}` and the next one followed, so a text that starts with that token starts as
a document does. Samples were {length} tokens long.

{losses}{heads}## Configuration

`mtp_config.json` has the step and the whole configuration. The part that says what the model is:

```json
{model}
```
"""

HEADS = """\
## The other heads

`mtp_heads.safetensors` has what a Llama cannot hold, by the global names of mtp_dist:

{names}

They come back with the rest, as a checkpoint to train on or to open as a model:

```bash
mtp-dist import --from . --to ../imported
```

```python
from pathlib import Path

import torch

from mtp_dist.checkpoint.load import load_weights
from mtp_dist.model.reference import ReferenceModel

model = ReferenceModel(*load_weights(Path("../imported")))
logits_of_heads = model(torch.tensor([tokens]))  # by head: [1, tokens, vocabulary]
```

"""


def model_card(
    name: str, source: Path, description: Description, dtype: str, end_token: str, others: Sequence[str]
) -> str:
    """Of the export of the checkpoint `source`; others: global names of the weights that are not in the Llama."""
    config = description.config
    groups = dict.fromkeys(".".join(other.split(".")[:2]) for other in others)
    shown = {"model": config.model.model_dump(mode="json"), "heads": config.heads.model_dump(mode="json")}
    return CARD.format(
        name=name,
        step=description.step,
        run=config.run.name,
        count=config.heads.count,
        kind=config.heads.kind,
        dtype=dtype,
        end=end_token,
        length=config.train.sequence_length,
        losses="".join(_losses(source, description.step)),
        heads=HEADS.format(names=", ".join(f"`{group}`" for group in groups)) if others else "",
        model=json.dumps(shown, indent=2),
    )


def _losses(source: Path, step: int) -> Iterator[str]:
    """The section on the losses of the run's validation at that step, from the summary beside its checkpoints."""
    try:
        summary: dict[str, Any] = json.loads((source.parent.parent / "summary.json").read_text(encoding="utf-8"))
        if summary["steps"] != step or Path(summary["checkpoint"]).name != source.name:
            return
        sets = [(of_set["name"], of_set["heads"]) for of_set in summary["validation"]]
    except (OSError, ValueError, KeyError, TypeError):  # no run of ours wrote it, or none at all
        return
    if sets:
        yield "## Validation\n\n| set | head | loss (nats a token) | bits per byte | accuracy |\n"
        yield "| --- | --- | --- | --- | --- |\n"
        for name, heads in sets:
            for head in heads:
                figures = (head["loss"], head["bits_per_byte"], head["accuracy"])
                cells = ("-" if figure is None else f"{figure:.4f}" for figure in figures)
                yield f"| {name or ''} | {head['head']} | {' | '.join(cells)} |\n"
        yield "\n"
