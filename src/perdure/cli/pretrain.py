"""perdure pretrain: a step of pre-training on images without labels, before or between lessons."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from perdure.cli.console import Command, Screen
from perdure.cli.inputs import tell_learnt, tell_skipped
from perdure.formatting import shortened
from perdure.options.ranges import BatchSize, Epochs, Rate, Seed
from perdure.training.config import RunConfig

_METHOD = "lora(rank=10, at='qkvo,mlp') + feature_distill"


@dataclass(frozen=True, kw_only=True)
class Pretrain(Command):
    """Pre-train a learner on images without labels, before its first lesson or between two; heads stay as they are."""

    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folder of images, in whatever folders below: labels are ignored; with contrast() a parquet, JSONL or CSV file of
    images and captions."""
    into: Path
    """The learner's folder; a new one is made with the options below."""
    pretext: str = "masked()"
    """What is learnt: masked() predicts hidden patches; distill() gives the features that the learner gave before, of
    images with hidden patches, or those of a stronger model, as distill(teacher='vision(path=...)'); contrast()
    compares images with captions."""
    replay: Path | None = None
    """Folder of images of the old domain, mixed in as a fifth of what is learnt."""
    backbone: str | None = None
    """For a new learner; pocket() unless said otherwise."""
    method: str | None = None
    """For a new learner; LoRA with feature_distill, which keeps features of images near what they were, unless said
    otherwise."""
    objective: str | None = None
    """For a new learner; classify() unless said otherwise."""
    epochs: Epochs | None = None
    """Passes over the images; 5 unless said otherwise, and more over few images, for at least 60 steps."""
    lr: Rate | None = None
    """Learning rate, after a warm-up and before a cosine; the method's own unless said otherwise."""
    batch_size: BatchSize | None = None
    """Images per step; 64 unless said otherwise."""
    seed: Seed | None = None
    """For a new learner; 0 unless said otherwise."""
    precision: Literal["auto", "fp32", "bf16"] | None = None
    """For a new learner; auto unless said otherwise."""
    device: str | None = None
    """The learner's own unless said otherwise; auto for a new one."""
    skip_bad: bool = False
    """Leave unreadable images out, and list them."""
    captions: str | None = None
    """With contrast(): column of the captions; captions unless said otherwise."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """YAML file with values for the flags; those that are typed win."""

    def __call__(self, screen: Screen) -> None:
        """Pre-train; say how well what was taught before is still known."""
        from perdure.api.folders import teach_folder
        from perdure.core.manifests import check_single
        from perdure.reporting.report import write_report
        from perdure.reporting.runs import RunResults

        check_single(self.into)
        screen.wait("reading the data and the model")
        given = {f.name: getattr(self, f.name) for f in fields(RunConfig) if getattr(self, f.name, None) is not None}
        config = RunConfig(stream="", **{"method": _METHOD} | given)
        reading = {
            "pretext": self.pretext,
            "captions": self.captions,
            "replay": str(self.replay) if self.replay else None,
        }
        tell_learnt(self.into, screen)
        task, summary = teach_folder(self.data, self.into, config, given, screen, self.skip_bad, **reading)
        skipped = list(getattr(task.train, "skipped", ()))
        tell_skipped(skipped, screen.note)
        write_report([self.into], self.into / "report.html")
        kept = retained(summary, RunResults.read(self.into).names())
        content = {"event": "pretrained", "task": task.describe(), "summary": summary, "retention": kept}
        screen.result(
            content | {"skipped": skipped},
            *(f"{shortened(each['task'])}: {each['before']:.1%} before, {each['after']:.1%} now" for each in kept),
            f"pre-trained on {len(task.train)} images, {shortened(task.pretext)}; teach it with: perdure learn FOLDER "
            f"--into {shlex.quote(str(self.into))}",
        )


def retained(summary: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Of each task that was taught before the last step and has tests: its name, its score before and after that step.

    Args:
        summary: of the learner.
        names: of all its tasks.
    """
    matrix = summary["matrix"]
    if len(matrix) < 2:
        return []
    each = zip(names, matrix[-2], matrix[-1], strict=True)
    return [{"task": name, "before": old, "after": new} for name, old, new in each if None not in (old, new)]
