"""Batches of each data-parallel rank, read ahead by a background thread."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mtp_dist.config import Config
from mtp_dist.data.datasets import Datasets, ValidationSamples
from mtp_dist.data.streaming import merge_states
from mtp_dist.distributed.collectives import all_gather_objects
from mtp_dist.distributed.topology import Topology, dp_group
from mtp_dist.model.targets import (
    IGNORE_INDEX,
    MicroBatch,
    TrainBatch,
    count_valid_targets,
    document_ids,
    head_targets,
    split_into_micro_batches,
    without_prompt_marks,
)

STEPS_AHEAD = 2
"""Batches that are read before they are needed."""


class Batches:
    """The batches of this rank; a background thread reads those of the next steps and makes their targets.

    Stages that neither embed tokens nor hold the loss read nothing, unless their attention stops at documents' ends.
    """

    def __init__(
        self, config: Config, topology: Topology, datasets: Datasets, completed_steps: int = 0, samples_read: int = 0
    ) -> None:
        """Begin with step number `completed_steps` + 1, whose first sample is number `samples_read`."""
        self.config = config
        self.topology = topology
        self.datasets = datasets
        self._distances = config.heads.distances
        self.needs_data = topology.reads_tokens or topology.holds_loss or not config.data.attention_across_documents
        self.samples_read = samples_read
        """Samples of the global batches up to the last requested step."""
        self._train_state: Any = None
        # One thread, because streams are read in the order of the steps. It needs the device before it pins memory,
        # which would otherwise open a context on GPU 0.
        prepare = partial(torch.cuda.set_device, topology.device) if topology.device.type == "cuda" else None
        self._reader = ThreadPoolExecutor(1, "batches", prepare)
        self._ahead: deque[Future[tuple[TrainBatch, Any]]] = deque()
        self._steps_left = config.train.steps - completed_steps
        self._next_sample = samples_read

    def next_train_batch(self) -> TrainBatch:
        """Return this data-parallel rank's part of the next step's global batch."""
        global_batch = self.config.train.global_batch_size
        self.samples_read += global_batch
        if not self.needs_data:
            return self._empty_batch(global_batch // self._samples_per_micro_batch)
        while len(self._ahead) <= STEPS_AHEAD and self._steps_left:
            self._ahead.append(self._reader.submit(self._read, self._next_sample))
            self._next_sample += global_batch
            self._steps_left -= 1
        batch, self._train_state = self._ahead.popleft().result()
        return batch

    def state(self) -> dict[str, Any]:
        """Return this rank's data position after the last requested step, as JSON."""
        return self.datasets.state(self.samples_read, self._train_state)

    def gather_state(self) -> dict[str, Any]:
        """Return the positions of all ranks, from which a run resumes at any layout. A collective over the
        data-parallel ranks."""
        state = self._train_state
        if self.datasets.train.shards > 1 and self.topology.dp_size > 1:
            state = merge_states(all_gather_objects(state, dp_group()))
        return self.datasets.state(self.samples_read, state)

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)

    def validation_batch(self, samples: ValidationSamples) -> TrainBatch:
        """Return this data-parallel rank's part of a validation set.

        Each sample counts once at every layout: the samples that fill the last micro-batches, or up to the number that
        the schedule needs, have no valid target.
        """
        size = self.config.train.micro_batch_size
        num_micro_batches = max(
            -(-len(samples) // self._samples_per_micro_batch), self.config.parallel.min_micro_batches
        )
        if not self.needs_data:
            return self._empty_batch(num_micro_batches)
        first = self.topology.dp_rank * num_micro_batches * size
        indices = range(first, first + num_micro_batches * size)
        micro_batches = self._split(np.stack([samples[index % len(samples)] for index in indices]))
        repeated = torch.tensor([index >= len(samples) for index in indices]).split(size)
        return self._batch(
            [
                part._replace(targets=part.targets.masked_fill(fill[None, :, None], IGNORE_INDEX))
                for part, fill in zip(micro_batches, repeated, strict=True)
            ]
        )

    @property
    def _samples_per_micro_batch(self) -> int:
        """Samples of one micro-batch on all data-parallel ranks."""
        return self.config.train.micro_batch_size * self.topology.dp_size

    def _read(self, first: int) -> tuple[TrainBatch, Any]:
        """Return this rank's part of the global batch that begins with sample `first`, and the samples' state after."""
        size, samples = self.config.train.global_batch_size, self.datasets.train
        tokens = samples.read(first, size, self.topology.dp_rank, self.topology.dp_size)
        return self._batch(self._split(tokens)), samples.state()

    def _split(self, samples: NDArray[np.int64]) -> list[MicroBatch]:
        """Split samples `[B, S + lookahead]`, B a multiple of the micro-batch size, and make their targets."""
        data, train, marked = self.config.data, self.config.train, torch.from_numpy(samples)
        tokens = without_prompt_marks(marked)
        mask_documents = not (data.loss_across_documents and data.attention_across_documents)
        documents = document_ids(tokens, self.datasets.tokenizer.end_of_document) if mask_documents else None
        loss_documents = None if data.loss_across_documents else documents
        targets = head_targets(marked, self._distances, train.sequence_length, loss_documents)
        return split_into_micro_batches(tokens, targets, documents, train.micro_batch_size)

    def _batch(self, micro_batches: list[MicroBatch]) -> TrainBatch:
        """Return the batch, in pinned memory if it goes to a GPU."""
        if self.topology.device.type == "cuda":
            micro_batches = [part.pin_memory() for part in micro_batches]
        return TrainBatch(
            micro_batches, len(micro_batches), count_valid_targets(micro_batches, self.config.heads.count)
        )

    def _empty_batch(self, num_micro_batches: int) -> TrainBatch:
        return TrainBatch((), num_micro_batches, count_valid_targets((), self.config.heads.count))
