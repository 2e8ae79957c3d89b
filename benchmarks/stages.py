"""The three stages of a study that starts from a script: demonstrations, pre-training, fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dppo_fast.collect import main as collect
from dppo_fast.train import main as train


def stages(
    demonstrations: Path, out: Path, collecting: Sequence[str], pretraining: Sequence[str], finetuning: Sequence[str]
) -> int:
    """The exit code of running them with these arguments; ``demonstrations`` that are there are not recorded again.

    ``out`` gets the fine-tuned run, a folder beside it, named ``<out>_pretrained``, the run that it starts from.
    """
    pretrained, data = out.with_name(f"{out.name}_pretrained"), f"data.folder={demonstrations}"
    code = 0 if demonstrations.is_dir() else collect([*collecting, f"out={demonstrations}"])
    code = code or train([*pretraining, data, f"logdir={pretrained}"])
    return code or train([*finetuning, data, f"policy.checkpoint={pretrained}", f"logdir={out}"])
