"""The record of one training run."""

from dataclasses import dataclass, field


@dataclass
class Run:
    """The figures of one seed, epoch by epoch; accuracies in per cent, times in seconds."""

    seed: int
    train_loss: list[float] = field(default_factory=list)
    validation_accuracy: list[float] = field(default_factory=list)
    test_accuracy: list[float | None] = field(default_factory=list)  # None: not measured
    step_time: list[float] = field(default_factory=list)
    diverged: bool = False

    @property
    def best_epoch(self) -> int | None:
        """The first epoch with the best validation accuracy; None if the run diverged."""
        if self.diverged or not self.validation_accuracy:
            return None
        return self.validation_accuracy.index(max(self.validation_accuracy))

    @property
    def selected_test_accuracy(self) -> float | None:
        """The test accuracy of the best epoch."""
        return None if self.best_epoch is None else self.test_accuracy[self.best_epoch]
