"""Which samples each data-parallel rank reads, as micro-batches."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import repeat
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.data.datasets import Datasets, ValidationSamples
from mtp_dist.data.streaming import merge_states
from mtp_dist.distributed.topology import Topology, all_gather_objects, dp_group
from mtp_dist.model.targets import IGNORE_INDEX, MicroBatch, document_ids, head_targets


def micro_batches_of(config: Config, samples: Tensor, end_of_document: int) -> list[MicroBatch]:
    """Samples `[B, S + lookahead]`, B a multiple of the micro-batch size -> micro-batches in order."""
    apart = not (config.data.loss_across_documents and config.data.attention_across_documents)
    documents = document_ids(samples, end_of_document) if apart else None
    counted = None if config.data.loss_across_documents else documents
    targets = head_targets(samples, config.heads.distances, config.train.sequence_length, counted)
    size = config.train.micro_batch_size
    starts = range(0, len(samples), size)
    of_each = documents.split(size) if documents is not None else repeat(None, len(starts))
    parts = zip(samples.split(size), targets.split(size, dim=1), of_each, strict=True)
    return [MicroBatch(*part) for part in parts]


STEPS_AHEAD = 2
"""Batches that are read before they are needed."""


class Batches:
    """The micro-batches of this rank; those of the next steps are read in the background.

    Stages that are neither first nor last read nothing, unless their attention must know where documents end.
    """

    def __init__(
        self, config: Config, topology: Topology, datasets: Datasets, completed_steps: int = 0, samples_read: int = 0
    ) -> None:
        """The first step will be `completed_steps` + 1 and begin with sample number `samples_read`."""
        self.config = config
        self.topology = topology
        self.datasets = datasets
        middle = not (topology.is_first_stage or topology.is_last_stage)
        self.reads = not middle or not config.data.attention_across_documents
        self.samples_read = samples_read
        """Of all ranks, up to the last step that was asked for."""
        self._state_of_train: Any = None
        # One thread: streams are read in the order of the steps.
        self._reader = ThreadPoolExecutor(1, "batches")
        self._ahead: deque[Future[tuple[list[MicroBatch], Any]]] = deque()
        self._steps_left = config.train.steps - completed_steps
        self._next = samples_read

    def training(self) -> list[MicroBatch]:
        """Of the next update, this data-parallel rank's part of the global batch."""
        self.samples_read += self.config.train.global_batch_size
        if not self.reads:
            return []
        while len(self._ahead) <= STEPS_AHEAD and self._steps_left:
            self._ahead.append(self._reader.submit(self._read, self._next))
            self._next += self.config.train.global_batch_size
            self._steps_left -= 1
        batch, self._state_of_train = self._ahead.popleft().result()
        return batch

    def state(self) -> dict[str, Any]:
        """As JSON, what this rank needs to go on after the last step that was asked for. Only of ranks that read."""
        return self.datasets.state(self.samples_read, self._state_of_train)

    def gather_state(self) -> dict[str, Any]:
        """Return what a run needs at any layout. A collective over the data-parallel ranks."""
        state = self._state_of_train
        if self.datasets.train.shards > 1 and self.topology.dp_size > 1:
            state = merge_states(all_gather_objects(state, dp_group()))
        return self.datasets.state(self.samples_read, state)

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)

    def _read(self, first: int) -> tuple[list[MicroBatch], Any]:
        """This rank's part of the global batch that begins with sample `first`, and the samples' state after it."""
        size, samples = self.config.train.global_batch_size, self.datasets.train
        batch = self._micro_batches(samples.read(first, size, self.topology.dp_rank, self.topology.dp_size))
        return batch, samples.state()

    def validation(self, samples: ValidationSamples) -> tuple[list[MicroBatch], int]:
        """Of a validation, and their number, the same on every rank.

        Each sample counts once at every layout: what fills up the last micro-batches has no valid target.
        """
        share = self.config.train.micro_batch_size * self.topology.dp_size
        micro_batches = -(-len(samples) // share)
        if not self.reads:
            return [], micro_batches
        first = self.topology.dp_rank * micro_batches * self.config.train.micro_batch_size
        indices = range(first, first + micro_batches * self.config.train.micro_batch_size)
        batch = self._micro_batches(np.stack([samples[index % len(samples)] for index in indices]))
        repeated = torch.tensor([index >= len(samples) for index in indices]).split(self.config.train.micro_batch_size)
        return [
            micro_batch._replace(targets=micro_batch.targets.masked_fill(fill[None, :, None], IGNORE_INDEX))
            for micro_batch, fill in zip(batch, repeated, strict=True)
        ], micro_batches

    def _micro_batches(self, samples: NDArray[np.int64]) -> list[MicroBatch]:
        return micro_batches_of(self.config, torch.from_numpy(samples), self.datasets.tokenizer.end_of_document)
