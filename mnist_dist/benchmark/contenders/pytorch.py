"""A rival in PyTorch: its eager loop with the data in memory, or the same with `torch.compile`."""

import itertools
import time
from collections.abc import Mapping

import torch

from mnist_dist.benchmark.protocol import Turns
from mnist_dist.data.splits import Splits

BATCH_SIZE = 512
_TYPES = {"float32": "float32", "mixed_bfloat16": "bfloat16", "mixed_float16": "float16"}


def take_part(turns: Turns, splits: Splits, *, precision: str, options: Mapping[str, str]) -> None:
    """Train until the benchmark has enough."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compiled = options.get("compile") == "true"
    trainer = _Trainer(splits, device=device, dtype=getattr(torch, _TYPES[precision]), compiled=compiled)
    turns.ready(
        {
            "framework": f"torch {torch.__version__}",
            "intra_op_threads": torch.get_num_threads(),
            "inter_op_threads": torch.get_num_interop_threads(),
            "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
            "precision": precision,
        }
    )
    while True:
        turns.wait()
        start = time.perf_counter()
        loss, val_accuracy = trainer.run_epoch()
        turns.done(seconds=time.perf_counter() - start, loss=loss, val_accuracy=val_accuracy)


class _Trainer:
    """The recipe: two hidden layers with dropout, Adam, batches of 512, a validation after each epoch."""

    def __init__(self, splits: Splits, *, device: torch.device, dtype: torch.dtype, compiled: bool) -> None:
        self._device, self._dtype = device, dtype
        self._images, self._val_images = (
            torch.from_numpy(split.images).to(device) for split in (splits.train, splits.val)
        )
        self._labels, self._val_labels = (
            torch.from_numpy(split.labels.argmax(axis=1)).to(device) for split in (splits.train, splits.val)
        )
        sizes = [splits.train.images.shape[1], 256, 256]
        layers: list[torch.nn.Module] = []
        for m, n in itertools.pairwise(sizes):
            layer = torch.nn.Linear(m, n)
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            torch.nn.init.zeros_(layer.bias)
            layers += [layer, torch.nn.ReLU(), torch.nn.Dropout(0.4)]
        self._model = torch.nn.Sequential(*layers, torch.nn.Linear(256, splits.num_classes)).to(device)
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=1e-3, eps=1e-7, fused=compiled or None)
        self._loss, self._num_correct = self._eager_loss, self._eager_num_correct
        if compiled:  # with a program of its own for the last, smaller batch
            self._loss = torch.compile(self._eager_loss, dynamic=False)
            self._num_correct = torch.compile(self._eager_num_correct, dynamic=False)
        # Scales the loss for float16; does nothing otherwise.
        self._scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

    def run_epoch(self) -> tuple[float, float]:
        """Mean training loss and validation accuracy of one epoch."""
        total = torch.zeros((), device=self._device)
        self._model.train()
        for rows in torch.randperm(len(self._images), device=self._device).split(BATCH_SIZE):
            self._optimizer.zero_grad(set_to_none=True)
            loss = self._loss(rows)
            self._scaler.scale(loss).backward()
            self._scaler.step(self._optimizer)
            self._scaler.update()
            total += loss.detach() * len(rows)
        self._model.eval()
        with torch.inference_mode():
            num_correct = self._num_correct()
        # Reading a number waits for the device, so that the time includes all work.
        return total.item() / len(self._images), num_correct.item() / len(self._val_images)

    def _eager_loss(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self._logits(self._images[rows]), self._labels[rows])

    def _eager_num_correct(self) -> torch.Tensor:
        return (self._logits(self._val_images).argmax(dim=1) == self._val_labels).sum()

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype is not torch.float32):
            logits: torch.Tensor = self._model(images)
        return logits.float()
