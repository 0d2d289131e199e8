"""Peak memory of a training step on this rank, by component of RankMemory, and the FLOPs of its passes."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from deepspeed.runtime.pipe import schedule
from megatron.core.parallel_state import get_global_memory_buffer
from torch import Tensor
from torch.distributed._tools import mem_tracker
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mtp_dist.engine.engine import TrainingEngine
from mtp_dist.engine.hooks import RunInstruction, hook_instruction
from mtp_dist.model.parameters import named_weights


class Component(mem_tracker._RefType):
    """A field of `mtp_dist.planner.memory.RankMemory`."""

    PARAMETERS = "parameters"
    GRADIENTS = "gradients"
    ACCUMULATORS = "accumulators"
    OPTIMIZER = "optimizer"
    COMMUNICATION = "communication"
    ACTIVATIONS = "activations"
    WORKSPACE = "workspace"
    HEAD_LOSS = "head_loss"
    UPDATE = "update"


INSTRUCTIONS = {
    schedule.LoadMicroBatch: Component.ACTIVATIONS,
    schedule.RecvActivation: Component.ACTIVATIONS,
    schedule.ForwardPass: Component.ACTIVATIONS,
    schedule.BackwardPass: Component.WORKSPACE,
    schedule.RecvGrad: Component.COMMUNICATION,
    schedule.SendActivation: Component.COMMUNICATION,
    schedule.SendGrad: Component.COMMUNICATION,
    schedule.ReduceTiedGrads: Component.UPDATE,
    schedule.ReduceGrads: Component.UPDATE,
    schedule.OptimizerStep: Component.UPDATE,
}
"""Component of what each instruction of the pipeline allocates."""
PASSES = Component.ACTIVATIONS, Component.WORKSPACE, Component.HEAD_LOSS
"""Components of the forward and backward passes."""


class _NoModules(nullcontext[None]):
    """A tracker of no modules, for MemTracker."""

    is_bw = False

    def register_user_hooks(self, *_: Any) -> None: ...

    def clear_user_hooks(self) -> None: ...


class ComponentTracker(mem_tracker.MemTracker):
    """PyTorch's MemTracker, with the pipeline's instructions instead of modules as origin of the memory.

    Its hooks of modules reject a second call in one step, as with several micro-batches, frozen parameters, and the
    backward passes inside the heads' forward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ref_class = Component
        self._mod_tracker = _NoModules()  # type: ignore[assignment]
        self.component = Component.ACTIVATIONS
        """Component of the memory that is allocated now."""
        self.instruction = Component.ACTIVATIONS
        """Component of the current instruction."""
        self.peaks = dict.fromkeys(Component, 0)
        """Peak bytes of each component so far: of activations those that a forward pass keeps, of the workspace what a
        pass has in addition, the heads' loss included."""
        self.total = 0
        """Peak bytes of all."""
        self._in_pass = 0
        """Peak bytes of the current pass."""
        self.flops = dict.fromkeys(Component, 0.0)
        """FLOPs of the matrix products and of the causal half of the attention, by the component of the instruction."""

    @property
    def current(self) -> dict[Any, int]:
        """Bytes of each component now."""
        return next(iter(self._curr_mem_snap.values()))

    def _track(self, _: Any, tensor: Tensor) -> None:
        super()._track(self.component, tensor)

    def _track_optimizer_states(self, _: Any, optimizer: torch.optim.Optimizer) -> None:
        super()._track_optimizer_states(Component.OPTIMIZER, optimizer)

    def _update_peak_stats(self, _: Any) -> None:
        self.total = max(self.total, self.current["Total"])
        self._in_pass = max(self._in_pass, sum(self.current[component] for component in PASSES))
        for component in set(Component).difference(PASSES):
            self.peaks[component] = max(self.peaks[component], self.current[component])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        self.flops[self.instruction] += _flops(func, args, kwargs or {}, result)
        return result

    def assign(self, component: Component, tensors: Iterable[Tensor]) -> None:
        """Count the memory of tensors under a component from now on."""
        for tensor in tensors:
            self._update_and_maybe_create_winfos(tensor, component)

    def track_call(self, component: Component, function: Callable[[], None]) -> None:
        """Call a function that allocates memory of a component within an instruction of another one."""
        before, self.component = self.component, component
        function()
        self.component = before

    def execute(self, component: Component, instruction: RunInstruction) -> None:
        """Execute an instruction of the pipeline whose memory belongs to a component."""
        before = self.current[Component.ACTIVATIONS]
        self.component = self.instruction = component
        self._in_pass = 0
        instruction()
        after, peaks = self.current[Component.ACTIVATIONS], self.peaks
        peaks[Component.ACTIVATIONS] = max(peaks[Component.ACTIVATIONS], after)
        peaks[Component.WORKSPACE] = max(peaks[Component.WORKSPACE], self._in_pass - max(before, after))


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    """Return the FLOPs of a matrix product or of PyTorch's attention for CPUs; 0 of other operators."""
    aten = torch.ops.aten
    if func is aten.addmm_.default:
        return flop_registry[aten.addmm](*args, **kwargs, out_val=result)
    if func._overloadpacket in (aten.mm, aten.addmm, aten.bmm):
        return flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
    if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
        batch, heads, length, channels = args[0].shape
        is_causal, products = args[4:5] == (True,), 2
    elif func is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        batch, heads, length, channels = args[1].shape
        is_causal, products = args[7], 5
    else:
        return 0
    return products * 2 * batch * heads * length * length * channels * (0.5 if is_causal else 1)


@contextmanager
def track_memory(engine: TrainingEngine) -> Iterator[ComponentTracker]:
    """Track what the engine has and what it allocates within this context. An engine can be tracked once."""
    tracker = ComponentTracker()
    pipeline = engine.pipeline
    wrapper, adam = pipeline.optimizer, pipeline.basic_optimizer
    tracker.assign(Component.PARAMETERS, chain(engine.stage.parameters(), engine.stage.buffers()))
    if wrapper is not adam:
        tracker.assign(Component.OPTIMIZER, (master for group in adam.param_groups for master in group["params"]))
    tracker.assign(Component.OPTIMIZER, _tensors([*map(dict, adam.state.values())]))
    tracker.assign(Component.ACCUMULATORS, getattr(wrapper, "fp32_groups_gradients_flat", ()))
    received = pipeline.pipe_recv_buf, pipeline.grad_layer
    tracker.assign(Component.COMMUNICATION, _tensors([*received, dict(get_global_memory_buffer().buffer)]))
    for _, weight in named_weights(engine.stage):
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(
                lambda param: tracker.assign(Component.GRADIENTS, _tensors([param.grad]))
            )
    if hasattr(wrapper, "setup_buckets"):  # ZeRO 1 allocates one in the first backward pass for its reduction
        wrapper.setup_buckets = partial(tracker.track_call, Component.COMMUNICATION, wrapper.setup_buckets)
    for instruction, component in INSTRUCTIONS.items():
        hook_instruction(pipeline, instruction, partial(tracker.execute, component))
    if engine.topology.holds_loss:
        heads = engine.stage.heads
        heads.register_forward_pre_hook(lambda *_: setattr(tracker, "component", Component.HEAD_LOSS))
        heads.register_forward_hook(lambda *_: setattr(tracker, "component", Component.ACTIVATIONS))
    with tracker:
        yield tracker


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
