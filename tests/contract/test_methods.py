"""What every method, and every combination of methods, must honour."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perdure.adapters.injection import detach, prompted
from perdure.core.learner import Core
from perdure.core.method import METHODS, Method, treated
from perdure.objectives.retrieve import embedded
from perdure.training.config import make_method, register
from perdure.training.loop import Quiet, fit_task
from perdure.types import Task

register()
ALONE = sorted(name for name, method in METHODS.items() if not method.protects and method.needs != ("conversations",))
# Sums, parted by |, beside all methods that stand alone.
COMBINATIONS = (
    "lora(rank=2) + ewc | lora(rank=2) + replay(size=12) | lora(rank=2) + ncm | lora(rank=2) + joint | "
    "lora(rank=2) + ewc + replay(size=12, selection='class_balanced') | inflora(rank=2) + replay(size=12) | "
    "inflora(rank=2) + ncm | inflora(rank=2) + replay(size=12) + ncm | inflora(rank=2) + joint | finetune + ewc | "
    "finetune + replay(size=12) | probe + replay(size=12) | finetune(mask=False) + ncm | "
    "lora(rank=2, per_task=True) | lora(rank=2, tasks=1) + ncm | inflora(ranks=(1, 2, 4)) | "
    "sd_lora(rank=(3, 2), drops=(1,)) | sd_lora(rank=2, distil=0.9) | "
    "sd_lora(rank=2, normalise='paper') + replay(size=12) | fm_lora(rank=4) + replay(size=12) | "
    "fm_lora(rank=4, share=False, prompts=0) | o_lora(rank=2) + ncm | route_lora(rank=2) + ewc | probe + align | "
    "probe + align(covariance='lowrank', rank=4, temperature=0.1, shrink=0.1, epochs=1) | "
    "lora(rank=2) + replay(size=12) + align(covariance='diagonal') | lora(rank=2) + align(covariance='full') + ewc | "
    "lora(rank=2) + joint + align | inflora(rank=2) + align(start='heads', epochs=1) | "
    "inflora(rank=2) + ranpac(dim=64) | fm_lora(rank=4) + align | "
    "fm_lora(rank=4) + ewc | ewc + route_lora(rank=2) | inflora(ranks=(1, 2)) + joint | "
    "inflora(rank=2) + ranpac(dim=0) | adapter(rank=3) + ewc | "
    "ewc + adapter(rank=3, parallel=True, scale=0.5) | adapter(rank=3, at='o,fc2') + replay(size=12) | "
    "adapter(rank=3, tasks=1) + ncm | lora(rank=2, at='fc2') + adapter(rank=3) | lora(rank=2) + lwf | "
    "inflora(rank=2) + lwf | lora(rank=2) + feature_distill | finetune + lwf + ewc | "
    "fm_lora(rank=4) + feature_distill(form='mse') | lwf(schedule='share') + inflora(ranks=(1, 2)) | "
    "lora(rank=2) + lwf(heads='frozen') | lora(rank=2) + lwf + replay(size=12) | "
    "lora(rank=2) + replay(size=12, selection='herding') | "
    "lora(rank=2) + replay(size=12, selection='el2n', position='mid') | "
    "lora(rank=2) + replay(size=12, schedule='periodic', every=2) | "
    "probe + replay(size=12, selection='kmeans', augment='flip') | "
    "inflora(rank=2, blocks='1') + replay(bytes=12000) | lora(rank=2) + derpp(size=12) | "
    "inflora(rank=2) + derpp(size=12, selection='influence') | finetune + icarl(size=12) | "
    "inflora(rank=2) + icarl(size=12) | lora(rank=2) + align + derpp(size=12, selection='grand') | "
    "coda_prompt(strength=0.1) + replay(size=12) | coda_prompt + align | coda_prompt + joint | "
    "dualprompt + replay(size=12) | dualprompt + ncm | dualprompt + ewc | prefix + ewc | prefix + lora(rank=2) | "
    "lora(rank=2) + gem | finetune + agem | lora(rank=2) + agem + replay(size=12) | "
    "inflora(rank=2) + gem(size=12, margin=0.0) | gpm(keep=0.5) + ncm | gpm(at='kv', keep=0.5) + agem | "
    "lora(rank=2) + si | lora(rank=2) + mas | finetune + si | finetune + ewc(form='offline') | "
    "lora(rank=2) + ewc(of='updates') | fm_lora(rank=4) + mas(of='updates') | "
    "si + route_lora(rank=2) + replay(size=12) | prompt(deep=True) | prompt(deep=True, blocks='1') | prompt + ewc | "
    "prompt + align | l2p(reads='class', strength=0) | l2p + replay(size=12) | l2p + ncm | l2p + ewc | "
    "finetune + weight_average | lora(rank=2) + weight_average(form='wise') + ewc | moe_adapters(grow='novel') | "
    "moe_adapters + replay(size=12) | moe_lora(rank=4, experts=2) + ewc | moe_lora + replay(size=12) | "
    "reg_lora(rank=2) + replay(size=12) | pnn(lateral=False) | pnn + align | disco + ncm | "
    "lora(rank=2) + reptile | "
    "lora(rank=2) + replay(size=12) + reptile(inner_steps=2) | finetune + fomaml | lora(rank=2) + ewc + maml | "
    "inflora(rank=2) + maml(inner_steps=2) | lora(rank=2) + lamaml(size=12) | lora(rank=2) + oml | "
    "finetune + lamaml(size=12, second_order=False) | lora(rank=2) + replay(size=12) + oml | l2p + fomaml | "
    "lora(rank=2) + expert_distillation(epochs=1) | "
    "lora(rank=2) + replay(size=12) + expert_distillation(form='logits', epochs=1) | "
    "lora(rank=2) + expert_distillation(reference='synthetic()', size=20, epochs=1)"
)
OTHER_SCENARIOS = (
    "lora | inflora | ncm | probe + replay(size=12) | finetune + ewc | lora(rank=2) + joint | fm_lora(rank=4) | "
    "head_gates | sd_lora(rank=2) | probe + align | inflora(rank=2) + ranpac(dim=64) | "
    "lora(rank=2) + lwf | l2p | prompt | dualprompt | coda_prompt | finetune + si | probe + agem | "
    "lora(rank=2) + icarl(size=12) | lora(rank=2) + derpp(size=12) | gpm(keep=0.5) | pnn | "
    "lora(rank=2) + lamaml(size=12) | "
    "lora(rank=2) + oml | lora(rank=2) + maml | "
    "lora(rank=2) + expert_distillation(epochs=1)"
)
ELSEWHERE = {
    "task": OTHER_SCENARIOS,
    "domain": OTHER_SCENARIOS,
    "zeroshot": (
        "ncm | joint | lora(rank=2, tower='both') | inflora(rank=2) | inflora(rank=2) + replay(size=12) | "
        "finetune(tower='both') + ewc | lora(rank=2) + ncm | fm_lora(rank=4) | inflora(rank=2) + ranpac(dim=64) | "
        "l2p | dualprompt | prompt + ewc | lora(rank=2, tower='both') + ewc(of='updates') | "
        "gpm(keep=0.5, tower='both') | lora(rank=2, tower='both') + lwf(text_temperature=1.0) | "
        "lora(rank=2, tower='both') + feature_distill(tower='both') | "
        "finetune(tower='both') + zscl + weight_average | "
        "finetune + zscl(reference='captions_synthetic()', images=4, texts=5, size=20) | moe_adapters + zscl | "
        "moe_adapters(tower='both') | ewc(samples=8) + moe_adapters(tower='text') | "
        "moe_adapters(tower='text') + mas(samples=8) | moe_adapters(tower='text', expand=0.3) + replay(size=12) | "
        "moe_adapters + weight_average + ewc | prompt + zscl | prompt(tower='both') | prefix(tower='text') | "
        "l2p(tower='both') | l2p(tower='text') + replay(size=12) | dualprompt(tower='both') | "
        "hide_lora | modal_prompt | pnn(rank=4) | moe_lora(tower='both') | reg_lora(rank=2, tower='both') | "
        "dualprompt(tower='text', general_length=0) + replay(size=12) | coda_prompt(strength=0.1, tower='both') | "
        "lora(rank=2, tower='both') + maml | lora(rank=2) + lamaml(size=12) | "
        "lora(rank=2, tower='both') + expert_distillation(epochs=1)"
    ),
    "retrieve": (
        "probe | finetune(tower='both') | finetune(tower='text') + si | finetune(tower='both') + ewc(samples=8) | "
        "lora(rank=2, tower='both') + mas(samples=8) | joint(tower='both') | lora(rank=2, tower='both') | "
        "lora(rank=2, tower='text', per_task=True) | lora(rank=2, tower='both') + lwf | "
        "lora(rank=2, tower='both') + replay(size=6) | lora(rank=2, tower='both') + gem(size=6) | "
        "lora(rank=2) + agem(size=6) | lora(rank=2) + feature_distill | "
        "lora(rank=2, tower='both') + feature_distill(tower='both', form='mse') | "
        "finetune(tower='both') + zscl + weight_average | lora(rank=2, tower='both') + zscl(text_gradient=False) | "
        "lora(rank=2, tower='both') + mod_x | finetune(tower='both') + weight_average(form='wise') | "
        "replay(size=6) + lora(rank=2, tower='both') + mod_x | moe_adapters | moe_adapters + mod_x | "
        "moe_adapters(tower='both') | ewc(samples=8) + moe_adapters(tower='text') | inflora(rank=2, tower='both') | "
        "inflora(ranks=(1, 2), tower='text') | inflora(rank=2, tower='both') + replay(size=6) + lwf | "
        "gpm(keep=0.5, tower='both') | fm_lora(rank=4, tower='both') | sd_lora(rank=2, tower='both') | "
        "o_lora(rank=2, tower='both') | c_lora(rank=2, tower='both') | route_lora(rank=2, tower='both') | "
        "adapter(rank=3, tower='both') | prompt | l2p | dualprompt | coda_prompt | l2p(tower='both') | "
        "dualprompt(tower='both') | dualprompt(tower='text') + replay(size=6) + lwf | prefix | prefix(tower='both') | "
        "prefix(length=2, tower='text') + lwf | prompt(tokens=2, deep=True, tower='both') | "
        "lora(rank=2, tower='both') + reptile | lora(rank=2, tower='both') + lwf + maml | "
        "lora(rank=2, tower='both') + lamaml(size=6)"
    ),
    "retrieve domain": (
        "lora(rank=2, tower='both') + ewc(samples=8, of='updates') | "
        "lora(rank=2, tower='both') + lwf(schedule='share', text_temperature=1.0) | "
        "lora(rank=2, tower='text') + feature_distill(tower='text') | moe_adapters(tower='text') + replay(size=6) | "
        "inflora(rank=2, tower='both') | coda_prompt(tower='text') | prompt(tower='text')"
    ),
}
COSINE = "classify(cosine=True)"
ELSEWHERE |= {COSINE: "inflora(rank=2) + align", f"{COSINE} task": "lora(rank=2)", f"{COSINE} domain": "lora(rank=2)"}


def unlisted_guards() -> list[str]:
    """What only guards other parts, beside something to guard; those that the sums above name are tested there."""
    listed = " | ".join([COMBINATIONS, *ELSEWHERE.values()])
    named = {part.partition("(")[0].strip() for part in listed.replace("|", "+").split(" + ")}
    guards = sorted(name for name, method in METHODS.items() if method.protects and name not in named)
    return [f"lora(rank=2) + {name}" for name in guards if METHODS[name].needs in ((), ("classes",))]


SPECS = [*ALONE, *COMBINATIONS.split(" | "), *unlisted_guards()]
FROZEN = [s for s in SPECS if "finetune" not in s and "gpm" not in s and s != "joint"]


def settings(words: str) -> dict[str, str]:
    """Of the laboratory: an objective, a scenario or both."""
    return {"scenario" if word in ("task", "domain") else "objective": word for word in words.split()}


PLACES = [(spec, {}) for spec in SPECS]
PLACES += [(spec, settings(words)) for words, specs in ELSEWHERE.items() for spec in specs.split(" | ")]
NAMES = [" ".join([spec, *where.values()]) for spec, where in PLACES]
PARAMETERS = ("spec", "where")


def of(name: str) -> Any:
    """What is taught once for many tests is taught by one of the processes that share them out."""
    return pytest.mark.xdist_group(name)


SUMS = [name for name, (spec, _) in zip(NAMES, PLACES, strict=True) if " + " in spec]
SAMPLE = {*NAMES} - {*SUMS} | {*SUMS[::3]}  # what CI runs: each method by itself everywhere, and a third of the sums


def unless(sampled: bool) -> list[Any]:
    return [] if sampled else [pytest.mark.slow]


every_place = pytest.mark.parametrize(
    PARAMETERS,
    [
        pytest.param(*place, id=name, marks=[of(name), *unless(name in SAMPLE)])
        for name, place in zip(NAMES, PLACES, strict=True)
    ],
)


def differs(spec: str, where: dict[str, str]) -> bool:
    """Whether a stopped run can go wrong here in a way of its own.

    That the state is whole is proved everywhere else by what goes on from a loaded one; a stop and a resumption add
    what is in flight: each method by itself under each objective, each guard once an objective, sums whose parts see
    each other's work.
    """
    if " + " not in spec:
        return where.get("scenario") is None
    return spec in IN_FLIGHT[where.get("objective", "classify").partition("(")[0]].split(" | ")


# The sums of `differs`, by objective.
IN_FLIGHT = {
    "classify": (
        "lora(rank=2) + ewc + replay(size=12, selection='class_balanced') | finetune(mask=False) + ncm | "
        "lora(rank=2) + joint + align | ewc + route_lora(rank=2) | inflora(rank=2) + ranpac(dim=0) | "
        "lora(rank=2) + lwf + replay(size=12) | lora(rank=2) + feature_distill | "
        "lora(rank=2) + replay(size=12, schedule='periodic', every=2) | "
        "probe + replay(size=12, selection='kmeans', augment='flip') | "
        "lora(rank=2) + align + derpp(size=12, selection='grand') | coda_prompt(strength=0.1) + replay(size=12) | "
        "lora(rank=2) + agem + replay(size=12) | inflora(rank=2) + gem(size=12, margin=0.0) | lora(rank=2) + si | "
        "fm_lora(rank=4) + mas(of='updates') | finetune + ewc(form='offline') | "
        "lora(rank=2) + weight_average(form='wise') + ewc | lora(rank=2) + lamaml(size=12) | lora(rank=2) + oml | "
        "lora(rank=2) + expert_distillation(epochs=1) | "
        "lora(rank=2) + expert_distillation(reference='synthetic()', size=20, epochs=1)"
    ),
    "zeroshot": (
        "lora(rank=2, tower='both') + ewc(of='updates') | lora(rank=2, tower='both') + lwf(text_temperature=1.0) | "
        "finetune(tower='both') + zscl + weight_average | "
        "finetune + zscl(reference='captions_synthetic()', images=4, texts=5, size=20) | "
        "moe_adapters(tower='text') + mas(samples=8) | l2p(tower='text') + replay(size=12)"
    ),
    "retrieve": (
        "finetune(tower='both') + ewc(samples=8) | "
        "lora(rank=2, tower='both') + lwf(schedule='share', text_temperature=1.0) | "
        "replay(size=6) + lora(rank=2, tower='both') + mod_x | inflora(rank=2, tower='both') + replay(size=6) + lwf | "
        "dualprompt(tower='text') + replay(size=6) + lwf"
    ),
}


def where(stopped: bool) -> Any:
    """The places where a stopped run says more, or those where it does not; the others by `make test-all`."""
    return pytest.mark.parametrize(
        PARAMETERS,
        [
            pytest.param(
                *place,
                id=name,
                marks=[of(name), *unless(differs(*place) == stopped and (stopped or name in SAMPLE))],
            )
            for name, place in zip(NAMES, PLACES, strict=True)
        ],
    )


@pytest.fixture(scope="module")
def watched(lab: Any) -> Any:
    """A learner that has learnt the whole stream, and who looked on; not to be changed."""

    @cache
    def made(spec: str, where: tuple[tuple[str, str], ...]) -> "Watch":
        bench = lab.but(**dict(where))
        stream = bench.stream()
        watch = Watch(bench.learner(spec), stream.tasks[0].test.__getitems__(range(8)))
        watch.means = "ncm" in spec or "ranpac" in spec
        for task in stream:
            watch.before()
            watch.learner.grow(task)
            fit_task(watch.learner, task, bench.train_config(), watch)
            watch.end()
        return watch

    return lambda spec, where=(): made(spec, tuple(dict(where).items()))


@pytest.fixture(scope="module")
def taught(watched: Any) -> Any:
    """A learner that has learnt the whole stream; not to be changed."""
    return lambda spec, where=(): watched(spec, where).learner


@where(stopped=True)
def test_a_run_stopped_after_a_task_and_within_the_next_equals_an_unbroken_run(
    spec: str, where: Any, lab: Any, content_of: Any, tmp_path: Any
) -> None:
    bench = lab.but(**where, tasks=2)
    bench.run(spec, tmp_path / "unbroken")
    bench.broken_run(spec, tmp_path / "broken", (0, None), (1, 3), save_every=2)
    assert content_of(tmp_path / "broken") == content_of(tmp_path / "unbroken")


@pytest.mark.parametrize("spec", [pytest.param(spec, marks=of(spec)) for spec in FROZEN])
def test_detach_gives_the_pretrained_model_back_bit_for_bit(spec: str, lab: Any, taught: Any) -> None:
    learner, before = copy.deepcopy(taught(spec)), lab.backbone().state_dict()
    assert learner.backbone.state_dict().keys() == before.keys()
    detach(learner.backbone)
    after = learner.backbone.state_dict()
    assert [k for k in before if not torch.equal(before[k], after[k])] == []


@every_place
def test_every_trainable_parameter_gets_a_gradient(spec: str, where: Any, lab: Any) -> None:
    bench = lab.but(**where)
    learner = bench.learner(spec)
    for task in bench.stream().tasks[:2]:
        learner.grow(task)
        learner.method.begin_task(learner, task)
        fixed = learner.trainable().items()
        torch.manual_seed(0)
        with torch.no_grad():  # a branch that adds nothing yet hides its first factor from the loss
            for _, p in fixed:
                p.add_(torch.randn_like(p), alpha=0.1)
        batch = learner.method.batch(learner, task.train.__getitems__(range(len(task.train))))
        learner.zero_grad()
        if fixed:
            learner.loss(batch).backward()
        idle = [n for n, p in fixed if p.grad is None or not p.grad.any()]
        # an expert that no image of the batch takes has none
        assert [n for n in idle if ".learnt." not in n or dict(fixed)[n].grad is None] == []
        learner.method.end_task(learner, task)
        learner.learnt += 1


ONE_A_TASK = ("hide_lora", "disco", "pnn", "modal_prompt", "head_gates")
# By definition: the published forms of SD-LoRA set all magnitudes anew, and new components of CODA-Prompt start
# orthogonal to the old ones, not at zero.
JUMP = ("normalise='paper'", "coda_prompt", "moe_adapters", "lora_experts", *ONE_A_TASK)


@every_place
def test_growing_changes_no_feature_and_no_old_score_yet(spec: str, where: Any, watched: Any) -> None:
    if any(word in spec for word in JUMP):
        pytest.skip("its source says otherwise")
    for before, after in watched(spec, where).growths:
        torch.testing.assert_close(after[0], before[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(after[1][:, : before[1].shape[1]], before[1], rtol=1e-6, atol=1e-6)


# What decides at a task's end what the learner will be, and the sentence of its card that says so.
CONCLUDES = {
    "align": "after every task all heads are fitted again",
    "weight_average": "That is what is evaluated and saved",
    "moe_adapters": "When an image comes, nobody tells its task: task identification asks which",
    **dict.fromkeys(("lora_experts", *ONE_A_TASK), "When an example comes, nobody tells its task."),
    "distil=": "a new direction that former ones explain up to this share of its squared norm is given up",
}


@every_place
def test_what_is_evaluated_after_a_task_is_what_its_last_step_trained(spec: str, where: Any, watched: Any) -> None:
    if any(word in spec for word in CONCLUDES):
        pytest.skip("its card says otherwise")
    for trained, evaluated in watched(spec, where).steps_and_ends:
        torch.testing.assert_close(evaluated, trained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("word", CONCLUDES)
def test_a_card_says_that_a_task_ends_in_something_else_than_was_trained(word: str) -> None:
    cards = Path(__file__).parents[2] / "docs" / "methods"
    card = (cards / f"{'sd_lora' if word == 'distil=' else word}.md").read_text(encoding="utf-8")
    assert CONCLUDES[word] in " ".join(card.split())


@every_place
def test_predictions_depend_on_no_other_image_of_the_batch(spec: str, where: Any, lab: Any, taught: Any) -> None:
    bench = lab.but(**where)
    learner, data = taught(spec, where), bench.stream().tasks[1].test
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))
    mixed = data.subset(order)
    with learner.inference():
        together, one_by_one, shuffled = (
            torch.cat([answered(learner, batch) for batch in learner.batches(each, size)])
            for each, size in ((data, 64), (data, 1), (mixed, 5))
        )
    torch.testing.assert_close(one_by_one, together, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shuffled, together[order], rtol=1e-5, atol=1e-5)


@every_place
def test_memory_in_a_learner_that_knows_only_descriptions_predicts_the_same(
    spec: str, where: Any, lab: Any, taught: Any
) -> None:
    bench = lab.but(**where)
    learner, images = taught(spec, where), bench.stream().tasks[0].test.__getitems__(range(8))
    fresh = bench.learner(spec)
    for task in learner.tasks:
        fresh.grow(Task.described(task.describe()))
    missing, unexpected = fresh.load_state_dict(learner.learnt_state(), strict=False)
    assert unexpected == []
    assert [key for key in missing if not key.startswith("backbone.")] == []
    assert torch.equal(scored(fresh, images), scored(learner, images))


@where(stopped=False)
def test_state_is_all_that_a_method_remembers(spec: str, where: Any, lab: Any) -> None:
    bench = lab.but(**where)
    stream = bench.stream()
    went_on = bench.teach(bench.learner(spec), stream.tasks[:1], epochs=1)
    loaded = bench.learner(spec)
    loaded.grow(stream.tasks[0])
    loaded.load_state_dict(went_on.learnt_state(), strict=False)
    loaded.learnt = 1
    a, b = (bench.teach(learner, stream.tasks[1:2], epochs=1).learnt_state() for learner in (went_on, loaded))
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


@every_place
def test_a_step_costs_the_same_after_two_and_after_three_tasks(spec: str, where: Any, watched: Any) -> None:
    if spec == "pnn":
        pytest.skip("by definition: a column reads all former ones")
    if "moe_adapters" in spec:
        pytest.skip("its frozen experts turn from parameters into tensors; their work stays the same")
    _, two, three = watched(spec, where).costs
    assert three == two


@pytest.mark.slow
@pytest.mark.parametrize("spec", [spec for spec in SPECS if "moe_adapters" not in spec and spec != "pnn"])
def test_a_step_costs_the_same_after_two_and_after_six_tasks(spec: str, lab: Any) -> None:
    bench = lab.but(tasks=6, per_class=4, epochs=1)
    learner, stream = bench.learner(spec), bench.stream()
    bench.teach(learner, stream.tasks[:2])
    after_two = structure(learner)
    bench.teach(learner, stream.tasks[2:])
    assert structure(learner) == after_two


def test_two_owners_of_an_exclusive_hook_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for hook in ("predict", "data", "backward"):
        one, two = (type(n, (METHODS["probe"],), {hook: lambda *_: None, "name": n}) for n in ("one", "two"))
        monkeypatch.setitem(METHODS, "one", one)
        monkeypatch.setitem(METHODS, "two", two)
        with pytest.raises(ValueError, match=f"^one and two cannot be combined: each defines '{hook}'; keep one of"):
            make_method("one + lora + two")


class Watch(Quiet):
    """Looks at the learner before and after each task's growth, after its last step, and when it has ended."""

    means: bool
    """Whether answers are by means of classes, of which new ones have none yet."""

    def __init__(self, learner: Core, images: dict[str, Tensor]) -> None:
        self.learner, self.images, self.seen = learner, images, 0
        self.growths: list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]] = []
        self.steps_and_ends: list[tuple[Tensor, Tensor]] = []
        self.costs: list[dict[str, int]] = []

    def before(self) -> None:
        """What images and classes give that the learner has grown for."""
        self.seen = len(self.learner.objective.classes)
        plain = self.learner.backbone(self.images) if not self.seen else torch.empty(0)
        self.given = self.both() if self.seen else (plain, plain[:, :0])

    def task(self, task: Task, tasks: int | None, epochs: int, steps: int) -> None:
        self.steps, now = steps, self.both()
        if not self.seen and (prompted(self.learner.backbone) or treated(self.learner.method)):
            self.given = now[0], self.given[1]  # which changes features by itself
        self.growths.append((self.given, now))

    def step(self, step: int, loss: Tensor, images: int) -> None:
        if step == self.steps:
            self.trained = self.look()

    def end(self) -> None:
        self.costs.append(structure(self.learner))
        if self.steps:
            self.steps_and_ends.append((self.trained, self.look()))

    def both(self) -> tuple[Tensor, Tensor]:
        """Features, and scores of the classes that were seen before."""
        features = encoded(self.learner, self.images)
        scores = features[:, :0] if self.means else scored(self.learner, self.images)
        return features, scores[:, : self.seen] if "classes" in self.learner.objective.asks else scores

    def look(self) -> Tensor:
        """Features of images beside what the objective makes of them, before a method answers in its place."""
        with self.learner.inference():
            if "classes" not in self.learner.objective.asks:
                return answered(self.learner, self.images).clone()
            features = self.learner.encode(self.images)
            return torch.cat([features, self.learner.objective.scores(features)], dim=1).clone()


def encoded(learner: Core, images: dict[str, Tensor]) -> Tensor:
    """Features as training computes them: the open branch beside the layer, the rest in its weight."""
    learner.prepare()
    with torch.no_grad():
        return learner.encode(images).clone()


def scored(learner: Core, images: dict[str, Tensor]) -> Tensor:
    with learner.inference():
        return answered(learner, images).clone()


def answered(learner: Core, images: dict[str, Tensor]) -> Tensor:
    """Scores of classes; for captions, the image's features beside the embeddings of its texts."""
    if "classes" in learner.objective.asks:
        return learner(images)
    return torch.cat([learner.encode(images), torch.stack(embedded(learner, images["text"])).flatten(1)], dim=1)


def counts(name: str) -> bool:
    return not name.startswith("objective.") and not name.endswith("magnitudes")


def structure(learner: Core) -> dict[str, int]:
    """What a step's cost depends on, without heads and SD-LoRA's one scalar a task."""

    def hooks(module: nn.Module) -> int:
        return len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)

    return {
        "modules of the backbone": len(list(learner.backbone.modules())),
        "hooks on the backbone": sum(map(hooks, learner.backbone.modules())),
        "modules of the method": len(list(learner.method.modules())),
        "parameters of the method": sum(p.numel() for n, p in learner.method.named_parameters() if counts(n)),
        "trained parameters": sum(p.numel() for n, p in learner.trainable().items() if counts(n)),
    }


def test_a_new_guard_is_tested_beside_what_it_guards_and_refused_where_it_would_lose_what_it_holds(lab: Any) -> None:
    class Forgetful(Method, name="forgetful"):
        protects = "shared_parameters"

        def end_task(self, learner: Core, task: Task) -> None:
            self.before = [{"heads": torch.ones(3)}]

    try:
        assert unlisted_guards() == ["lora(rank=2) + forgetful"]
        with pytest.raises(
            ValueError, match=r"forgetful holds the tensor before\[0\]\['heads'\], which state_dict does"
        ):
            lab.taught("lora(rank=2) + forgetful")
    finally:
        del METHODS["forgetful"]
