"""The training program, in which one weight's gradient on rank 1 is not a number from step 3 on."""

from mtp_dist.distributed import device
from mtp_dist.pretrain import main

WEIGHT = "heads.2.0.mlp.linear_fc1.weight"
select_device = device.select_device


def select_device_and_break_a_gradient(config):
    selected = select_device(config)
    # Imports DeepSpeed, which looks at the device.
    from mtp_dist.engine.engine import TrainingEngine
    from mtp_dist.model.parameters import named_weights

    train_step = TrainingEngine.train_step
    steps = []

    def train_step_with_nan(self, *args):
        steps.append(1)
        if len(steps) == 3 and self.topology.rank == 1:
            dict(named_weights(self.stage))[WEIGHT].register_hook(lambda gradient: gradient * float("nan"))
        return train_step(self, *args)

    TrainingEngine.train_step = train_step_with_nan
    return selected


if __name__ == "__main__":
    device.select_device = select_device_and_break_a_gradient
    main()
