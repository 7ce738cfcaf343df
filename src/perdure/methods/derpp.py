"""Dark experience replay (DER++; Buzzega et al., NeurIPS 2020, arXiv:2004.07211): old images, labels and logits.

`penalty`: alpha · ‖f(x') - z'‖² + beta · CE(f(x''), y''), x' and x'' two independent draws from the memory, z' the
logits that were stored with x', ‖·‖² a mean. `end_task` stores.

Differs: images and logits are stored at the end of a task, from all of its images and by the finished model without
augmentation; the paper samples and stores along the way. Logits cover the classes seen until then, and only these are
compared: in mammoth ‖·‖² is a mean over all classes of the stream, so alpha counts for less there as long as few of
them were seen. All seen classes compete for new and old images; in mammoth those still to come do too.
"""

import torch
from torch import Tensor

from perdure.adapters.state import BufferDict
from perdure.core.forgetting import Forgotten
from perdure.core.learner import Core
from perdure.core.method import check_mask
from perdure.mechanisms.references import BufferView
from perdure.mechanisms.replay import ExemplarBuffer, Rehearsal, Selection
from perdure.mechanisms.selection_scores import Position
from perdure.options.ranges import Bytes, Count, Ratio, Strength, without_effect
from perdure.types import Batch, Data, Task, take

_TOP = 64  # likeliest tokens of which logits are kept: those of a vocabulary are gigabytes


class DERPP(Rehearsal, name="derpp"):
    """Old images shall give the logits they gave when they were stored, and their labels.

    Args:
        size: number of images remembered in all; None is 2000, or what `bytes` allow.
        alpha: weight of the logits; 0 leaves them out.
        beta: weight of the labels; 0 leaves them out. With both 0 it is plain training, and nothing is remembered.
        selection: which images are kept, see `ExemplarBuffer`.
        position: which scores are kept with `el2n`, `grand` and `influence`, see `ExemplarBuffer`.
        bytes: of images (logits come on top), as a number or a text such as "50MB", in place of `size`.
        ratio: size of each of the two draws per new image.
        mask: True lets new images compete among their task's own classes only, as methods without old images do; old
            ones (x'') always compete among all.
    """

    needs = ("classes", "conversations")
    rehearses = "some"
    borderless = True

    def __init__(
        self,
        size: Count | None = None,
        alpha: Strength = 0.3,
        beta: Strength = 0.5,
        selection: Selection = "reservoir",
        position: Position | None = None,
        bytes: Bytes | str | None = None,
        ratio: Ratio = 1.0,
        mask: bool = False,
    ) -> None:
        super().__init__(ExemplarBuffer(size, bytes, selection, position))
        if not (alpha or beta):
            chosen = None if selection == "reservoir" else selection
            drawn = None if ratio == 1 else ratio
            without_effect(
                "with alpha=0 and beta=0",
                size=size,
                bytes=bytes,
                selection=chosen,
                position=position,
                ratio=drawn,
                mask=mask or None,
            )
        self.alpha, self.beta, self.ratio, self.mask = alpha, beta, ratio, mask
        # of the memory's references, in their order: "logits" (rows, classes seen); of answers in words those of the
        # likeliest "tokens" (rows, k), and "rows", how many rows each has
        self.stored_logits = BufferDict()

    def grow(self, learner: Core, task: Task) -> None:
        """All heads learn from old images, and without the mask from new ones."""
        super().grow(learner, task)
        if task.index > 0 and (self.alpha or self.beta):
            if self.mask:
                learner.objective.requires_grad_(True)
            else:
                learner.objective.unmask()

    def check(self, learner: Core, task: Task) -> None:
        """Refuse what would have no effect; known when all parts have grown."""
        super().check(learner, task)
        check_mask(learner, self.mask or None)

    def penalty(self, learner: Core, batch: Batch, features: Tensor) -> Tensor | float:
        """alpha · ‖f(x') - z'‖² + beta · CE(f(x''), y''): both draws in one pass through the encoder."""
        if not len(self.memory) or not (self.alpha or self.beta):
            return 0.0
        n = max(1, round(self.ratio * len(batch["label"])))
        first, second = (
            self.memory.pick(n if weight else 0, learner.generator(f"derpp {draw}", learner.step))
            for draw, weight in (("logits", self.alpha), ("labels", self.beta))
        )
        old = self.memory.seen(learner, torch.cat([first, second]), batch)
        again, objective = learner.encode(old), learner.objective
        of_logits = objective.owners(old) < len(first)
        total: Tensor | float = 0.0
        if self.alpha:
            total = self.alpha * self._apart(learner, again[of_logits], first)
        if self.beta:
            labelled = take(old, torch.arange(len(first), len(old["label"])))
            total = total + self.beta * objective.losses(again[~of_logits], labelled, only_task=False).mean()
        return total

    def remember(self, learner: Core, task: Task) -> None:
        """Offer images to the memory; store the logits of those that were taken."""
        if not (self.alpha or self.beta):
            return
        before = self.memory.refs.cpu()
        super().remember(learner, task)
        if not self.alpha:
            return
        refs, objective = self.memory.refs.cpu(), learner.objective
        fresh, counts = ~torch.isin(_keys(refs), _keys(before)), torch.ones(len(refs), dtype=torch.int64)
        places = _places(before, refs[~fresh])
        new = torch.zeros(0, len(objective.classes), dtype=torch.float32, device=learner.device)
        said = new.long()
        if fresh.any():
            images = BufferView(learner.tasks, refs[fresh])
            if objective.one_row:
                features, _ = learner.features(images)
                with torch.no_grad():
                    new = objective.scores(features)
            else:
                said, new, counts[fresh] = _likeliest(learner, images)
        if not (fresh.all() or objective.one_row):
            counts[~fresh] = self.stored_logits["rows"].cpu()[places]
        old_rows = None if fresh.all() else self._rows(places)
        of_fresh = fresh.repeat_interleave(counts)
        if not objective.one_row:
            self.stored_logits["tokens"] = self._with_old("tokens", said, of_fresh, old_rows)
        self.stored_logits["logits"] = self._with_old("logits", new, of_fresh, old_rows)
        if not objective.one_row:
            self.stored_logits["rows"] = counts

    def forget(self, left: Forgotten) -> None:
        """Let go of what was stored with the images of classes, and of what was said of these classes of others."""
        if "logits" not in self.stored_logits:
            return
        stays, logits = left.stays(self.memory.refs[:, 2]), self.stored_logits["logits"]
        columns = left.columns[left.columns < logits.shape[1]].to(logits.device)
        self.stored_logits["logits"] = logits[stays.to(logits.device)][:, columns].contiguous()

    def _with_old(self, name: str, new: Tensor, of_new: Tensor, old_rows: Tensor | None) -> Tensor:
        """`new` (n, k) at the places `of_new` (m,), and what was stored in `old_rows` at the others."""
        old = new[:0] if old_rows is None else self.stored_logits[name][old_rows]
        whole = new.new_zeros(len(of_new), max(new.shape[1], old.shape[1]))
        whole[of_new, : new.shape[1]] = new
        whole[~of_new, : old.shape[1]] = old
        return whole

    def _rows(self, images: Tensor) -> Tensor:
        """Where the logits of `images` (n,) stand, of which each may have several rows."""
        if "rows" not in self.stored_logits:
            return images
        counts = self.stored_logits["rows"].cpu()
        places = torch.split(torch.arange(int(counts.sum())), counts.tolist())
        return torch.cat([places[i] for i in images.tolist()])

    def _apart(self, learner: Core, features: Tensor, images: Tensor) -> Tensor:
        """Mean squared difference to the stored logits, of the classes that were seen when they were stored."""
        rows = self._rows(images)
        wanted, found = self.stored_logits["logits"][rows], learner.objective.scores(features)
        if "tokens" in self.stored_logits:
            found = found.gather(1, self.stored_logits["tokens"][rows])
        found = found[:, : wanted.shape[1]]
        if "classes" not in learner.objective.asks:
            return (found - wanted).square().mean()
        columns = torch.arange(wanted.shape[1], device=wanted.device)
        seen = self._seen(learner)[self.memory.refs[images, 0].cpu()].to(wanted.device)
        compared = columns < seen.unsqueeze(1)
        return ((found - wanted).square() * compared).sum() / compared.sum()

    @staticmethod
    def _seen(learner: Core) -> Tensor:
        """Number of classes seen at the end of each task."""
        known: set[int] = set()
        counts = []
        for task in learner.tasks:
            known.update(task.classes)
            counts.append(len(known))
        return torch.tensor(counts)


def _likeliest(learner: Core, data: Data) -> tuple[Tensor, Tensor, Tensor]:
    """Of each answer's tokens the likeliest ones (rows, k) and their logits, and how many rows each example has."""
    said, logits, counts = [], [], []
    with learner.inference():
        for batch in learner.batches(data, 64):
            scores = learner.objective.scores(learner.encode(batch))
            best = scores.topk(min(_TOP, scores.shape[1]), dim=1)
            said.append(best.indices)
            logits.append(best.values)
            counts.append(torch.bincount(learner.objective.owners(batch), minlength=len(batch["label"])).cpu())
    return torch.cat(said).clone(), torch.cat(logits).clone(), torch.cat(counts).clone()


def _places(refs: Tensor, wanted: Tensor) -> Tensor:
    """Rows of `refs` (n, 3) in which `wanted` (k, 3), which are among them, stand."""
    known, order = _keys(refs).sort()
    return order[torch.searchsorted(known, _keys(wanted))]


def _keys(refs: Tensor) -> Tensor:
    """One number for each of `refs` (n, 3)."""
    return refs[:, 0] * 2**32 + refs[:, 1]
