"""A complete run on every rank that records the order of its last actions."""

import os

import pytest


def order_of_the_end(config):
    """Train, and return what this rank does after its last save."""
    import torch.distributed as dist

    from mtp_dist import pretrain, run

    done = []

    def recorded(name, action):
        return lambda *arguments, **options: (done.append(name), action(*arguments, **options))[1]

    def sample(*_):
        written = (config.parent / "out" / "summary.json").exists()
        done.append("sample, with a summary" if written else "sample, without a summary")
        return "def f"

    os.environ.setdefault("LOCAL_RANK", "0")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="0"):
        patch.setattr(run, "_sample", sample)
        patch.setattr(run, "close_topology", recorded("close", run.close_topology))
        patch.setattr(dist, "barrier", recorded("barrier", dist.barrier))
        pretrain.main(["--config", str(config)])
    last = max((index for index, name in enumerate(done) if name == "barrier"), default=-1)
    return [name for index, name in enumerate(done) if name != "barrier" or index == last]
