"""What a run leaves behind and shows: metrics files, TensorBoard, wandb, live progress and the closing table."""

from dppo_fast.log.display import print_summary
from dppo_fast.log.metrics import read_metrics
from dppo_fast.log.run import RunLog

__all__ = ["RunLog", "print_summary", "read_metrics"]
