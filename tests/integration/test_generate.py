"""`mtp-dist generate` as a command, without the training's engines."""

import json
import sys
from pathlib import Path

from tests.integration import jobs
from tests.unit.convert.folders import write_model

WITHOUT_ENGINES = '''
import json
import sys
from importlib.machinery import ModuleSpec


class Blocked:
    """The engines are found, since transformers looks whether they are installed, but cannot be imported."""

    def find_spec(self, name, *_):
        return ModuleSpec(name, self) if name.split(".")[0] in ("deepspeed", "megatron") else None

    def create_module(self, spec):
        raise ImportError(f"{spec.name} is blocked")


sys.meta_path.insert(0, Blocked())
import accelerate

from mtp_dist.cli import app

for arguments in json.loads(sys.argv[1]):
    app(arguments, standalone_mode=False)
assert not {"deepspeed", "megatron"} & sys.modules.keys()
'''


def test_export_import_and_generate_need_no_engines(tmp_path: Path) -> None:
    """Nothing is printed but the results, although transformers imports accelerate's module for DeepSpeed."""
    checkpoint, export, imported = (str(tmp_path / name) for name in ("c", "hf", "imported"))
    write_model(Path(checkpoint))
    options = ["--prompt", "def f", "--json", "--max-new-tokens", "9", "--model"]
    commands = [
        ["export", "--checkpoint", checkpoint, "--to", export],
        ["import", "--from", export, "--to", imported],
        *(["generate", *options, folder] for folder in (checkpoint, export, imported)),
    ]
    result = jobs.run([sys.executable, "-c", WITHOUT_ENGINES, json.dumps(commands)], status=0)
    texts = [json.loads(line)["text"] for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(texts) == 3 and texts[1:] == texts[:1] * 2
    assert result.stderr == ""
