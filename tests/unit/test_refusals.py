"""What a method cannot do is refused in one line: when it is built, before the first task, or when it is exported."""

from typing import Any

import pytest

from perdure.backbones.clip import pocket
from perdure.core.learner import Core
from perdure.export.model import export
from perdure.training.building import dry_run
from perdure.training.config import make_method, make_objective
from perdure.types import Task

SCORES = "reservoir class_balanced herding kmeans"
# What is said, and of which sums.
BUILT = {
    r"^(ncm|lora) stands twice in .*; write each part once$": "ncm + ncm | lora + lora",
    r"^unknown method 'inflor'; did you mean 'inflora'\?$": "inflor",
    r"^method 'lora' has no option 'ranks'; did you mean 'rank'": "lora(ranks=3)",
    # What is to be protected is not there.
    r"^ewc has nothing to protect in .* Write 'lora \+ ewc' or 'finetune \+ ewc'$": (
        "ewc | inflora + ewc | probe + ewc | ncm + replay + ewc | adapter(tasks=1) + ewc | coda_prompt + ewc | "
        "lora(tasks=1) + ewc | lora(per_task=True) + ewc | o_lora + ewc | c_lora + ewc | sd_lora + ewc | "
        "fm_lora(prompts=0) + ewc"
    ),
    r"^(si|mas) has nothing to protect in .* Write 'lora \+ \1'": "inflora + si | inflora + mas",
    r"^weight_average has nothing to protect in .*parameters that tasks share": (
        "weight_average | inflora + weight_average | probe + weight_average"
    ),
    r"^(lwf|feature_distill) has nothing to protect in .*: no part changes the encoder\. Write 'lora": (
        "lwf | probe + lwf | ncm + lwf | probe + replay + lwf | feature_distill | probe + feature_distill | "
        "ncm + replay + feature_distill"
    ),
    r"^a?gem has nothing to protect beside joint, which trains on all old images": (
        "lora + joint + gem | lora + joint + agem"
    ),
    # Two parts do what only one can.
    r"^\w+ cannot be combined with \w+: each trains on images of old tasks; keep one of them$": (
        "replay + derpp | lora + joint + replay | icarl + lora + derpp | icarl + replay | icarl + joint"
    ),
    r"^(\w+) cannot be combined with (\w+), which changes .* what \1 protects or relies on would be void": (
        "l2p + lora | lora + l2p | finetune + l2p | l2p + prompt | coda_prompt + lora | dualprompt + lora | "
        "prefix + dualprompt | gpm + lora | gpm + finetune | moe_adapters + lora | inflora + adapter | "
        "inflora + lora | lora + inflora | inflora + finetune | finetune + inflora | "
        "inflora + fm_lora | fm_lora + inflora"
    ),
    r"^(icarl|ncm) and (ncm|ranpac) cannot be combined: each defines 'pred": "finetune + icarl + ncm | ncm + ranpac",
    # Options that mean nothing, by themselves or beside others.
    r"rank=4 has no effect with covariance='shared'": "align(rank=4)",
    r"epochs=0: expected 1 or more": "align(start='heads', epochs=0)",
    r"(temperature=0\.1|lr=0\.1|samples=9) has no effect with epochs=0: leave it out$": (
        "align(temperature=0.1, epochs=0) | align(lr=0.1, epochs=0) | align(samples=9, epochs=0)"
    ),
    r"at='fc2' has no effect with parallel=True, which stands beside each": "adapter(at='fc2', parallel=True)",
    r"length=5: expected an even number": "coda_prompt(length=5)",
    r"start='ortho': expected 'orthogonal' or 'random'": "coda_prompt(start='ortho')",
    r"(size|bytes|selection|ratio|mask)=.* has no effect with alpha=0 and beta=0: leave it out$": (
        "derpp(alpha=0, beta=0, mask=True) | lora + derpp(alpha=0, beta=0, size=12) | "
        "lora + derpp(alpha=0, beta=0, bytes='1MB') | lora + derpp(alpha=0, beta=0, selection='herding') | "
        "lora + derpp(alpha=0, beta=0, ratio=0.5)"
    ),
    r"general_blocks='0' has no effect with general_length=0": "dualprompt(general_length=0, general_blocks='0')",
    r"decay=0\.5 has no effect with form='offline'": "lora + ewc(form='offline', decay=0.5)",
    r"did you mean 'offline'": "lora + ewc(form='of line')",
    r"did you mean 'updates'": "lora + ewc(of='update')",
    r"(form|tower)='\w+' has no effect with strength=0: leave it out$": (
        "lora(tower='both') + feature_distill(strength=0, form='mse') | "
        "lora(tower='both') + feature_distill(strength=0, tower='text') | "
        "lora(tower='both') + feature_distill(strength=0, tower='both')"
    ),
    r"^method 'fm_lora', option ranks=\(2, 8\): expected at most rank=4, the dimension of the shared bases": (
        "fm_lora(rank=4, ranks=(2, 8))"
    ),
    r"^method 'fm_lora', option (ranks|drs)=.*one rank leaves nothing to choose; .*drs='fixed'": (
        "fm_lora(rank=4, ranks=4, drs='affine') | fm_lora(rank=1, drs='affine')"
    ),
    r"option ranks=\(2, 4\): drs='fixed' takes one rank for all tasks; write": "fm_lora(ranks=(2, 4), drs='fixed')",
    r"option rank_cost=0\.1 has no effect with drs='fixed': leave it out$": "fm_lora(drs='fixed', rank_cost=0.1)",
    r"option ranks=\(\): expected candidate ranks": "fm_lora(ranks=()) | inflora(ranks=())",
    r"option drs='afine': expected .*; did you mean 'affine'\?$": "fm_lora(drs='afine')",
    r"temperature=3\.0 has no effect with strength=0": (
        "icarl(strength=0, temperature=3.0) | lora + expert_distillation(strength=0, temperature=3.0)"
    ),
    r"(form|epochs|lr|batch_size|reference)='?[\w.]+\(?\)?'? has no effect with strength=0": (
        "lora + expert_distillation(strength=0, form='logits') | lora + expert_distillation(strength=0, epochs=4) | "
        "lora + expert_distillation(strength=0, lr=0.5) | lora + expert_distillation(strength=0, batch_size=4) | "
        "lora + expert_distillation(strength=0, reference='synthetic()')"
    ),
    r"share=0\.1 has no effect with strength=0: leave it out$": "reg_lora(strength=0, share=0.1)",
    r"method 'inflora', option moments=0: ": "inflora(moments=0)",
    r"option rank=4 has no effect beside ranks: leave it out$": "inflora(rank=4, ranks=(2, 4))",
    r"option rank_cost=0\.1 has no effect without ranks: leave it out$": "inflora(rank_cost=0.1)",
    r"option ranks=\(4,( 4)?\): one candidate leaves nothing to choose; write rank=4 instead$": (
        "inflora(ranks=(4,)) | inflora(ranks=(4, 4))"
    ),
    r"end_moments='training' counts images, and tower='both' reads": "inflora(tower='both', end_moments='training')",
    r"top=11: expected at most pool=10, the number of entries$": "l2p(top=11)",
    r"top=10 takes all entries of pool=10, so that keys choose nothing: write strength=0, or fewer$": "l2p(top=10)",
    r"batchwise=True has no effect with top=10 of pool=10 entries: leave": "l2p(top=10, strength=0, batchwise=True)",
    r"reads='mean': expected 'prompts' or 'class' or None$": "l2p(reads='mean')",
    r"(reads='class'|batchwise=True) has no effect with tower='text': leave it out": (
        "l2p(tower='text', reads='class') | l2p(tower='text', batchwise=True) | "
        "dualprompt(tower='text', batchwise=True)"
    ),
    r"per_task=True has no effect with tasks=1": "lora(tasks=1, per_task=True)",
    r"experts=2: expected at least top=3": "moe_adapters(experts=2, top=3)",
    r"expand=0\.5 has no effect with freeze=0": "moe_adapters(expand=0.5, freeze=0)",
    r"grow='novel' has no effect with freeze=0": "moe_adapters(grow='novel', freeze=0)",
    r"^method 'prompt', option blocks='0-1' has no effect with deep=False, where tokens pass through all": (
        "prompt(blocks='0-1')"
    ),
    r"every=5 has no effect with schedule='interleaved'": "lora + replay(every=5)",
    r"augment='none': expected 'flip', 'crop' or 'zoom' or None": "lora + replay(augment='none')",
    r"selection='herd': .*did you mean 'herding'": "lora + replay(selection='herd')",
    r"bytes='many': expected a positive number of bytes": "lora + replay(bytes='many')",
    r"size=10 and bytes='50MB' are two budgets for one memory: give one of them": (
        "replay(size=10, bytes='50MB') | derpp(size=10, bytes='50MB') | icarl(size=10, bytes='50MB')"
    ),
    r"position='top' has no effect with selection='.*', which has no scores": " | ".join(
        f"{part}(selection={name!r}, position='top')" for part in ("replay", "derpp") for name in SCORES.split()
    ),
    r"^method 'sd_lora', option .*drops=.*: expected one number of tasks between any two ranks": (
        "sd_lora(rank=(4, 2)) | sd_lora(drops=(4,))"
    ),
    r"option rank=\(4, 3, 2\), drops=\(8, 4\): .* rising, as in rank=\(10, 8": "sd_lora(rank=(4, 3, 2), drops=(8, 4))",
    r"distil=0\.0009 puts an update into old magnitudes, which normalise='code' sets anew at every task: leave norm": (
        "sd_lora(distil=9e-4, normalise='code')"
    ),
    r"normalise='joint': expected 'jointly', 'paper' or 'code'; did you mean 'jointly'": "sd_lora(normalise='joint')",
    r"damping=0\.1 has no effect with strength=0: leave it out$": "lora + si(strength=0, damping=0.1)",
    r"alpha=0\.5 has no effect with form='running'": "finetune + weight_average(alpha=0.5)",
    r"every=2 has no effect with form='wise'": "finetune + weight_average(form='wise', every=2)",
    r"images=3 has no effect without a reference": "finetune + zscl(images=3)",
    r"texts=3 has no effect with text_gradient=False": (
        "finetune + zscl(text_gradient=False, reference='synthetic()', texts=3)"
    ),
    r"reference='synthetic\(\)' has no effect with": (
        "finetune + zscl(strength_image=0, strength_text=0, reference='synthetic()')"
    ),
}
# The same of the tasks of a stream, from their descriptions, by the setting: scenario or objective.
FORESEEN = {
    "class": {
        r"^rank=99: expected 1 to ": "lora(rank=99) | moe_adapters(rank=99)",
        r"^rank=17: expected 1 to 16, the (inputs|smaller side) of [^\n]+$": (
            "lora(rank=17) | o_lora(rank=17) | c_lora(rank=17) | "
            "sd_lora(rank=17) | route_lora(rank=17) | fm_lora(rank=17)"
        ),
        r"^sketch=8 has no effect where no layer has more than 4,096 inputs: leave it out$": (
            "inflora(rank=2, sketch=8) | gpm(sketch=8)"
        ),
        r"'\d-4' is outside 0-1": "prompt(deep=True, blocks='1-4') | dualprompt(blocks='2-4')",
        r"^blocks='1-1' and general_blocks='0-1' share vision.blocks.1: ": "dualprompt(general_blocks='0-1')",
        r"^align\(rank=17\): expected 1 to 16, the size of the features$": "align(covariance='lowrank', rank=17)",
        r" has no text tower; it has: vision": "finetune(tower='text') | prefix(tower='text')",
        r"^size=5: icarl answers by exemplars, .* for each of 6 classes": "lora(rank=2) + icarl(size=5)",
        r"^bytes=500: expected at least 768, what one image takes at the size the mo": "lora + replay(bytes=500)",
        r"^task 2: (lwf|feature_distill) has no effect where no part trains the encoder any more: ": (
            "lora(rank=2, tasks=1) + lwf | lora(rank=2, tasks=1) + feature_distill | "
            "adapter(rank=3, tasks=1) + feature_distill"
        ),
        r"^task 3: feature_distill has no effect where no part": "feature_distill + lora(rank=2, tasks=2)",
        r"^task 3: weight_average has no effect where no part": "lora(rank=2, tasks=2) + weight_average",
        r"^zscl keeps scores of images and texts, and classify reads no texts: use": "finetune + zscl",
        r"^mod_x needs captions, and classify learns classes: leave it out of .* --obj.* retrieve$": "lora + mod_x",
        r"^feature_distill\(tower='(text|both)'\): this objective reads no texts: use --objective zeroshot": (
            "lora(rank=2) + feature_distill(tower='text') | lora(rank=2) + feature_distill(tower='both')"
        ),
        r"^text_temperature=1\.0 has no effect without texts: use": "lora(rank=2) + lwf(text_temperature=1.0)",
        r"^heads='frozen' has no effect where no old head stands apart": (
            "replay(size=12) + lora(rank=2) + lwf(heads='frozen')"
        ),
        r"^(replay|derpp) has nothing to teach: ncm answers without the heads": (
            "ncm + replay(size=5) | ncm + derpp(size=5) | lora(rank=2, tasks=1) + ncm + replay"
        ),
        r"^(maml|fomaml|reptile) has nothing to teach: (ncm|ranpac) answers without the heads": (
            "ncm + maml | fomaml + ncm | ncm + reptile | ranpac(dim=8) + reptile"
        ),
        r"^a?gem has no gradient to project: ncm answers without the heads": (
            "ncm + gem | ncm + agem | lora(rank=2, tasks=1) + ncm + gem | lora(rank=2, tasks=1) + ncm + agem"
        ),
        r"^adapter reads what .* gives, .*: write adapter last, or": "adapter(rank=2) + lora(rank=2, at='fc2')",
        r"^selection='grand' is 'el2n' here: .*; write": "lora(rank=2) + cosine + replay(size=9, selection='grand')",
        r"^mask=True has no effect beside a part that lets all .*: leave": "finetune(mask=False) + gem(mask=True)",
        r"^classify\(init='zeroshot'\) needs a text tower, which tiny.* or pocket\(\), or": "cosine(init='zeroshot')",
        r"^align cannot be combined with (ncm|ranpac), which answers without the heads": (
            "ncm + align | align + ncm | ranpac(dim=8) + align | align + ranpac(dim=8)"
        ),
        r"backbone_lr=0\.2 has no effect beside the part that trains the encoder": "joint(backbone_lr=0.2) + lora",
        r"^(lr=0\.1|samples=9) has no effect on align's closed form \(epochs=5 would train\): leave it out$": (
            "align(lr=0.1) | align(samples=9) | align(samples=9, start='lda')"
        ),
    },
    "classify(cosine=True)": {
        r"^align: start='lda' is the solution for linear heads": "align(start='lda') | align(epochs=0)",
        r"^selection='grand' is 'el2n' here: .*; write": "lora(rank=2) + replay(size=9, selection='grand')",
    },
    "domain": {
        r"^heads='frozen' has no effect where no old head stands apart": "lora(rank=2) + lwf(heads='frozen')",
        r"^mask=(True|False) has no effect where every task has all classes.*: leave it out$": (
            "finetune(mask=False) | lora + derpp(mask=True)"
        ),
    },
    "zeroshot": {
        r"^align re-trains heads, and this objective has none: use --objective class": "align",
        r"^objective 'zeroshot' has no option 'cosine'": "lora + cosine",
        r"^task 2: zscl has no effect where no part trains the encoder any more": "lora(rank=2, tasks=1) + zscl",
        r"text_gradient=False has no effect where no part trains the": "lora(rank=2) + zscl(text_gradient=False)",
        r"^mod_x needs captions, and zeroshot learns classes: leave it out of .* --obj.* retrieve$": "lora + mod_x",
        r"has no effect on the text tower, which no .* write tower='vision'": (
            "lora(rank=2) + feature_distill(tower='both') | finetune + feature_distill(tower='text')"
        ),
        r"has no effect on the vision tower, which no .* write tower='text'": (
            "lora(rank=2, tower='text') + feature_distill(tower='vision') | "
            "finetune(tower='text') + feature_distill(tower='both')"
        ),
        r"^heads='frozen' has no effect where no old head stands apart": "lora(rank=2) + lwf(heads='frozen')",
        r"^a?gem has no gradient to project: .* Write 'lora \+ a?gem'": "probe + gem | probe + agem",
        r"^selection='grand' is 'el2n' here: .*; write": "lora(rank=2) + replay(size=9, selection='grand')",
        r"tower='both' has no effect beside the part that trains the": "lora(tower='both') + joint(tower='both')",
    },
    "retrieve": {
        r"needs classes( or conversations)?, and retrieve learns captions: leave it out .* classify or .*zeroshot$": (
            "ncm | probe + align | ranpac | lora + derpp | finetune + icarl"
        ),
        r"^task 2: mod_x has no effect where no part trains the encoder any": "lora(rank=2, tasks=1) + mod_x",
        r"^heads='frozen' has no effect where there are no heads": "lora(tower='both') + lwf(heads='frozen')",
        r"^mask=(True|False) has no effect where pairs compete.*: leave it out$": (
            "lora(rank=2) + gem(mask=True) | lora(rank=2) + agem(mask=False) | finetune(mask=False)"
        ),
    },
}
# And of what only the learning of a task shows.
LEARNT = {
    r"both adapted and fine-tuned.* Use one of the two": "lora(rank=2) + finetune",
    r"^of='updates': no part of .* adds a linear update to a layer, so (ewc|mas) would hold none; write of=": (
        "finetune + ewc(of='updates') | finetune + mas(of='updates')"
    ),
    r"^every=4: task 1 had no more than 4 steps, .* such as every=1$": "lora(rank=2) + weight_average(every=4)",
}
ENCODER = r"^\w+ changes features as no weights can express; keep this learner with save$"
TOKENS = r"^prompts take part in the encoder, which no weights can hold; keep this learner with save$"
EXPORTED = {
    "l2p": ENCODER,
    "coda_prompt(length=2)": ENCODER,
    "dualprompt(length=1)": ENCODER,
    "prefix(length=1, blocks='0')": TOKENS,
    "prompt": TOKENS,
    "fm_lora(rank=4, prompts=2)": TOKENS,
    "adapter(rank=2)": r"is no linear update of its weight: neither LoRA nor merged weights",
    "adapter(rank=2, parallel=True)": r"is no linear update of its weight: neither LoRA nor merged weights",
}


def each(table: dict[str, str], *more: str) -> list[tuple[str, ...]]:
    return [(spec, *more, said) for said, specs in table.items() for spec in specs.split(" | ")]


@pytest.mark.parametrize(("spec", "said"), each(BUILT))
def test_what_no_task_could_learn_is_refused_in_one_line_when_it_is_built(spec: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        make_method(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("spec", "where", "said"), [row for w, table in FORESEEN.items() for row in each(table, w)])
def test_what_a_task_is_refused_with_is_said_before_the_first(spec: str, where: str, said: str, lab: Any) -> None:
    bench = lab.but(**{"scenario" if where in ("class", "domain") else "objective": where})
    with pytest.raises(ValueError, match=said) as before:
        dry_run(bench.config(spec), bench.backbone(), bench.stream())
    assert "\n" not in str(before.value)
    with pytest.raises(ValueError, match=said):
        bench.taught(spec, epochs=1)


@pytest.mark.parametrize(("spec", "said"), each(LEARNT))
def test_what_only_learning_shows_is_refused_by_the_task(spec: str, said: str, lab: Any) -> None:
    with pytest.raises(ValueError, match=said):
        lab.taught(spec)


@pytest.mark.parametrize(
    "spec",
    ["align(lr=0.1, epochs=1)", "align(samples=9, start='lda', epochs=1)", "cosine + align(lr=0.1, samples=9)"],
)
def test_what_is_refused_without_effect_is_taken_where_it_has_one(spec: str, lab: Any) -> None:
    assert lab.taught(spec, epochs=1).learnt == 3


@pytest.mark.parametrize("spec", EXPORTED)
def test_export_is_refused_of_what_no_weights_can_hold(spec: str, tmp_path: Any) -> None:
    learner = Core(pocket(), make_objective("classify"), make_method(spec))
    learner.grow(Task(0, "first", (0, 1), ("a", "b")))
    learner.learnt = 1
    for to in ("merged", "peft"):
        with pytest.raises(ValueError, match=EXPORTED[spec]):
            export(learner, tmp_path / "out", to)
    assert not any(tmp_path.iterdir())
