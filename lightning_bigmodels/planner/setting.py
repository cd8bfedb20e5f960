"""How a step is run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """How a step is run: what the Trainer's lines and the data module's say, and what a plan may change.

    Attributes:
        strategy: Name of a strategy, as for `trainer.strategy`.
        precision: As for `trainer.precision`.
        devices: Processes of a node.
        num_nodes: Nodes.
        batch_size: Rows of a batch on each process.
        accumulate_grad_batches: Batches of an optimizer step.
        gradient_clip_val: As for the Trainer.
        activation_checkpointing: Whether blocks are computed anew in the backward pass; None: as the model says.
        sync_batchnorm: Whether batch norm is over the batches of all processes.
        averages_weights: Whether a callback keeps an average of the weights, on the device that trains them.
        optimizer_8bit: Whether the model's AdamW gives way to one with moments of 8 bits.
    """

    strategy: str = "auto"
    precision: str = "32-true"
    devices: int = 1
    num_nodes: int = 1
    batch_size: int = 1
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    activation_checkpointing: bool | None = None
    sync_batchnorm: bool = False
    averages_weights: bool = False
    optimizer_8bit: bool = False

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self.devices * self.num_nodes

    @property
    def offloads(self) -> bool:
        """Whether weights, gradients and optimizer state are in host memory."""
        return self.strategy.startswith("fsdp2_offload")
