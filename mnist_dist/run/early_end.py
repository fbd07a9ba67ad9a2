"""When a run has been trained enough before its last epoch."""

from mnist_dist.config.train import TrainerConfig
from mnist_dist.results.history import History


def early_end(config: TrainerConfig, history: History) -> str:
    """Why a run ends after these epochs, fewer than `trainer.epochs`, in words; empty if it does not.

    A function of the history alone: all processes decide alike, and an interrupted run as an uninterrupted one.
    """
    if not 0 < len(history.epochs) < config.epochs:
        return ""
    best, asked = history.best, config.stop_at_val_accuracy
    if asked is not None and best.val_accuracy >= asked:
        return f"the validation accuracy reached {best.val_accuracy:.4f} (trainer.stop_at_val_accuracy={asked})"
    if config.patience is not None and len(history.epochs) - best.epoch >= config.patience:
        return (
            f"the validation accuracy has not risen above the {best.val_accuracy:.4f} of epoch {best.epoch} "
            f"(trainer.patience={config.patience})"
        )
    return ""
