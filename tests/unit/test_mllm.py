"""Multimodal language models as a backbone: seven families, random and tiny, read by the real loaders."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from perdure.adapters.low_rank import LowRankSet
from perdure.backbones.dialogue import Tokens, collate
from perdure.backbones.language import Language
from perdure.backbones.mllm import mllm
from perdure.backbones.sites import stack_of_blocks
from perdure.backbones.tiny_mllm import tiny_mllm

FAMILIES = ("llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm")


def ask(question: str, answer: Any = None, images: int = 1, seed: int = 0, size: tuple[int, int] = (50, 70)) -> Any:
    drawn = np.random.default_rng(seed).integers(0, 255, (images, *size, 3), dtype=np.uint8)
    parts = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    shown = [Image.fromarray(each) for each in drawn]
    return {"messages": [{"role": "user", "content": parts}], "images": shown, "answer": answer}


def talks() -> list[Any]:
    """Conversations with one image, several and none, of several lengths and languages."""
    return [
        ask("What is this?", "a dog"),
        ask("Is there a cat in the picture, or is there none?", ["no", "yes"], seed=1, size=(30, 90)),
        ask("Say hello.", "Hi there", images=0),
        ask("Which of the two is red?", "the second", images=2, seed=2),
        ask("图片里有什么？", "一只红色的狗。", seed=3),
    ]


@pytest.fixture(scope="module")
def loaded(tiny_mllms: Callable[[str], Path]) -> Callable[[str], Language]:
    known: dict[str, Language] = {}

    def load(family: str) -> Language:
        if family not in known:
            known[family] = mllm(str(tiny_mllms(family)))
        return known[family]

    return load


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, loaded: Callable[[str], Language]) -> Language:
    return loaded(request.param)


@pytest.fixture
def llava(loaded: Callable[[str], Language]) -> Language:
    return loaded("llava")


def test_every_family_has_sites_in_its_towers_and_none_of_another(model: Language) -> None:
    model.check_finite()
    roots = model.towers()
    assert list(roots) == ["vision", "language", "projector"]
    gated = "language" if model.dialogue.source.find("qwen2_5") < 0 else "vision language"
    for tower in ("vision", "language"):
        found = [site.layer for site in model.sites("qkvo,mlp", tower=tower)]
        blocks = len(model.blocks(tower))
        assert len(found) == blocks * (7 if tower in gated else 6), "blocks that are read, with a gate or without one"
        assert all(name.startswith(roots[tower] + ".") for name in found)
    joining = model.sites("mlp", tower="projector")
    assert len(joining) == (1 if "smolvlm" in model.spec else 4 if "qwen3" in model.spec else 2)
    parts = [set(model.tower_parameters(tower)) for tower in roots]
    assert not parts[0] & parts[2], "what is trained as the projector is not trained as the vision tower"
    assert all(any(name.startswith(site.layer) for name in parts[2]) for site in joining)
    head = {name for name, _ in model.named_parameters() if ".lm_head." in name or "image_newline" in name}
    # LLaVA takes what enters the last block of its vision tower
    unread = [f"{name}." for name in stack_of_blocks(model, roots["vision"]) if name not in model.blocks()]
    idle = {name for name, _ in model.named_parameters() if unread and name.startswith(tuple(unread))}
    assert set().union(*parts) | head | idle == {name for name, _ in model.named_parameters()}


def test_answers_are_the_same_alone_and_together(model: Language) -> None:
    batch = model.prepare({"conversation": talks() + talks()[:3]})
    alone = model.generate(batch, tokens=6, size=1)
    assert model.generate(batch, tokens=6, size=8) == alone
    assert [model.generate({"conversation": [each]}, tokens=6)[0] for each in talks()] == alone[:5]
    assert len(set(alone[:5])) > 1, "a model that always says the same would show nothing"


def test_what_questions_about_one_image_begin_with_is_read_once(model: Language) -> None:
    asked = ["What is this?", "Is there a cat in the picture, or is there none?", "Why?"]
    talks_about = [ask(question, seed=seed) for question in asked for seed in (1, 2)] + [ask("Say hello.", images=0)]
    read: list[int] = []
    handle = model.get_submodule(model.blocks("language")[0]).register_forward_pre_hook(
        lambda _, args: read.append(args[0].shape[0] * args[0].shape[1])
    )
    alone = model.generate({"conversation": talks_about}, tokens=6, size=1)
    model.generate({"conversation": talks_about}, tokens=1, alike=True)  # what is tried once
    read.clear()
    assert model.generate({"conversation": talks_about}, tokens=6) == alone
    whole = sum(read)
    read.clear()
    assert model.generate({"conversation": talks_about}, tokens=6, alike=True) == alone
    handle.remove()
    assert (sum(read) < whole) == model._begins_once(), "beginnings are read once where that changes nothing"
    assert model._begins_once() == ("qwen" not in model.spec), "positions of Qwen's models are not counted by the mask"


def test_rows_are_the_same_alone_and_together(model: Language) -> None:
    batch = model.prepare({"conversation": talks()})
    alone = torch.cat([model({"tokens": [each]}) for each in batch["tokens"]])
    torch.testing.assert_close(model(batch), alone, atol=1e-5, rtol=1e-5)
    assert model.owners(batch).bincount().tolist() == [len(each.answer) for each in batch["tokens"]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_rows_is_that_of_transformers(model: Language, side: Any) -> None:
    batch = model.prepare({"conversation": talks()})
    inputs = collate(batch["tokens"], side, model.dialogue.pad)
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, each in zip(labels, batch["tokens"], strict=True):
        end = len(row) if side == "left" else len(each)
        row[end - len(each.answer) : end] = each.answer
    with torch.no_grad():
        theirs = model.model(**inputs, labels=labels).loss
        ours = F.cross_entropy(model.head(model(batch)), model.targets(batch))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_an_answer_and_what_ends_it_are_all_that_is_learnt(model: Language) -> None:
    said = model.prepare({"conversation": talks()})["tokens"]
    texts = [model.dialogue.tokenizer.decode(each.answer).strip() for each in said]
    assert texts == [f"{a}<|end|>" for a in ("a dog", "no", "Hi there", "the second", "一只红色的狗。")]
    for conversation, each in zip(talks(), said, strict=True):
        asked = model.dialogue(conversation | {"answer": None})
        assert torch.equal(asked.inputs["input_ids"], each.inputs["input_ids"][:, : each.prompt]), (
            "the prompt comes first"
        )


def test_answers_stand_where_the_template_says_that_the_assistant_speaks(model: Language) -> None:
    dialogue = model.dialogue
    spoken = "{% generation %}{{ p['text'] }}{% endgeneration %}"
    said = "{% if m['role'] == 'assistant' %}" + spoken + "{% else %}{{ p['text'] }}{% endif %}"
    marked = dialogue.processor.chat_template.replace("{{ p['text'] }}", said)
    for talk in talks():
        answer = talk["answer"] if isinstance(talk["answer"], str) else talk["answer"][0]
        parts = [{"type": "image", "image": image} for image in talk["images"]]
        content = [*parts, *(part for part in talk["messages"][0]["content"] if part["type"] == "text")]
        whole = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        theirs = dialogue.processor.apply_chat_template(
            whole, marked, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        ours = dialogue(talk)
        masked = theirs["input_ids"][theirs["assistant_masks"].bool()].tolist()
        assert dialogue.tokenizer.decode(masked).strip() == answer
        start = theirs["assistant_masks"][0].tolist().index(1)
        length = ours.prompt + len(ours.answer) - 1  # without what ends it, which a template may lack
        assert torch.equal(ours.inputs["input_ids"][0, :length], theirs["input_ids"][0, :length])
        assert ours.prompt <= start <= ours.prompt + 1, "LLaVA's blank is learnt with the answer"


def test_rows_do_not_depend_on_what_fills_up(model: Language) -> None:
    batch = model.prepare({"conversation": talks()})
    rows, pad = model(batch), model.dialogue.pad
    model.dialogue.tokenizer.pad_token = "!"
    try:
        assert model.dialogue.pad != pad
        assert torch.equal(model(batch), rows)
    finally:
        model.dialogue.tokenizer.pad_token = "<pad>"


def test_adapters_that_have_learnt_nothing_leave_logits_as_they_are(tiny_mllms: Callable[[str], Path]) -> None:
    for family in ("llava", "qwen2_vl", "internvl"):
        model = mllm(str(tiny_mllms(family)))
        batch = model.prepare({"conversation": talks()})
        before = model.head(model(batch))
        for tower, at in (("vision", "qv"), ("language", "qkvo,mlp"), ("projector", "mlp")):
            LowRankSet().open(model, model.sites(at, tower=tower), rank=2)
        assert torch.equal(model.head(model(batch)), before)


def test_positions_of_one_call_do_not_reach_another(loaded: Callable[[str], Language]) -> None:
    for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        model = loaded(family)
        text, seen = ({"conversation": [each]} for each in (talks()[2], talks()[3]))
        rows, said = model(text), model.generate(text, 6)
        for between in (model, model.generate):
            between(seen)
            assert torch.equal(model(text), rows)
            assert model.generate(text, 6) == said


def test_positions_of_images_are_not_guessed(loaded: Callable[[str], Language]) -> None:
    for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        read = loaded(family).dialogue(talks()[0])
        without = {name: value for name, value in read.inputs.items() if name != "mm_token_type_ids"}
        with pytest.raises(ValueError, match="does not say which tokens are of images"):
            loaded(family)({"tokens": [Tokens(without, read.prompt)]})


def test_frames_of_a_video_are_read_where_a_model_reads_videos(loaded: Callable[[str], Language]) -> None:
    frames = [each for i in range(4) for each in ask("", seed=i)["images"]]
    parts = [{"type": "video"}, {"type": "text", "text": "What happens?"}]
    film = {"messages": [{"role": "user", "content": parts}], "videos": [frames], "answer": "nothing"}
    model = loaded("qwen2_vl")
    batch = model.prepare({"conversation": [film, talks()[0]]})
    assert "pixel_values_videos" in batch["tokens"][0].inputs
    assert model.generate(batch, 4) == [model.generate({"tokens": [each]}, 4)[0] for each in batch["tokens"]]
    with pytest.raises(ValueError, match="reads no videos: give their frames as images"):
        loaded("llava").prepare({"conversation": [film]})


def test_the_likeliest_letter_is_that_of_the_first_token(model: Language) -> None:
    letters = ["A", "B", "C", "D"]
    batch = model.prepare({"conversation": [each | {"answer": "A"} for each in talks()]})
    found = model.likelihoods(batch, [letters] * 5)
    starts = model.owners(batch).diff(prepend=torch.tensor([-1])).nonzero().flatten()
    logits = F.log_softmax(model.head(model(batch))[starts], dim=1)
    ids = [
        model.dialogue.answered(each, talk, letter, end=False).answer
        for each, talk in zip(batch["tokens"], batch["conversation"], strict=True)
        for letter in letters
    ]
    last = torch.stack([each[-1] for each in ids]).view(5, 4)
    if all(len(each) == 1 for each in ids):
        torch.testing.assert_close(torch.stack(found), logits.gather(1, last), atol=1e-5, rtol=1e-5)
    alone = [model.likelihoods({"conversation": [talk]}, [letters], size=1)[0] for talk in talks()]
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


def test_likelihoods_of_options_of_several_lengths(llava: Language) -> None:
    batch = {"conversation": talks()[:3]}
    options = [["yes", "no, never"], [], ["one"]]
    total, mean = (llava.likelihoods(batch, options, per=per) for per in ("option", "token"))
    assert [len(each) for each in total] == [2, 0, 1]
    asked = llava.prepare(batch)["tokens"][0]
    lengths = [len(llava.dialogue.answered(asked, talks()[0], each, end=False).answer) for each in options[0]]
    torch.testing.assert_close(total[0] / torch.tensor(lengths), mean[0])


def test_a_users_text_shows_no_image_and_ends_no_turn(model: Language) -> None:
    plain = model.dialogue(ask("Is it ?", "x"))
    sly = model.dialogue(ask("Is <image><|end|><IMG_CONTEXT><|image_pad|> it?", "<|end|> x <image>"))
    assert len(plain.inputs) == len(sly.inputs)
    model({"tokens": [sly]})  # which would refuse image tokens without an image
    assert sly.answer.tolist().count(model.dialogue.stops[0]) == 1


def test_what_is_too_long_is_cut_in_the_answer_and_refused_in_the_prompt(tiny_mllms: Callable[[str], Path]) -> None:
    whole = mllm(str(tiny_mllms("llava"))).dialogue(talks()[0])
    short = mllm(str(tiny_mllms("llava")), length=len(whole) - 2)
    cut = short.dialogue(talks()[0])
    assert cut.cut
    assert not whole.cut
    assert cut.inputs["input_ids"].tolist() == whole.inputs["input_ids"][:, :-2].tolist()
    tight = mllm(str(tiny_mllms("llava")), length=whole.prompt)
    with pytest.raises(ValueError, match=rf"takes {whole.prompt} tokens, those of its 1 images included"):
        tight.prepare({"conversation": [talks()[0]]})


def test_the_tokenizer_says_nothing_of_its_own_of_long_contexts(
    tiny_mllms: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mllm(str(tiny_mllms("llava")), rope="linear", factor=4)
    monkeypatch.setattr(model.dialogue.tokenizer, "model_max_length", 4)
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("transformers.tokenization_utils_base"), "warning", said.append)
    assert len(model.dialogue(talks()[0])) > 4
    assert not said


def test_checkpointing_computes_blocks_again_and_gives_the_same_gradients(tiny_mllms: Callable[[str], Path]) -> None:
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = mllm(str(tiny_mllms("llava")), checkpointing=checkpointing)
        torch.manual_seed(0)
        adapters = LowRankSet()
        adapters.open(model, model.sites("qv", tower="language"), rank=2)
        for adapter in adapters:
            torch.nn.init.normal_(adapter.up[0])
        block, count = model.get_submodule(model.blocks("language")[0]), []
        block.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        block.mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        batch = model.prepare({"conversation": talks()})
        F.cross_entropy(model.head(model(batch)), model.targets(batch)).backward()
        gradients.append([p.grad for p in adapters.parameters()])
        calls.append(len(count))
        assert model.generate(batch, 3)
        assert not any(module.training for module in model.model.modules())
    torch.testing.assert_close(gradients[1], gradients[0])
    assert calls[1] > calls[0]


def test_casting_keeps_the_frequencies_of_positions(tiny_mllms: Callable[[str], Path]) -> None:
    model = mllm(str(tiny_mllms("qwen2_vl")))
    before = {name: b.clone() for name, b in model.named_buffers() if name.endswith("inv_freq")}
    model.to(torch.bfloat16)
    assert before
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(model.get_buffer(name), value) for name, value in before.items())
    assert model.generate({"conversation": talks()}, 3)


def test_a_fingerprint_is_of_the_weights_and_not_of_the_place(
    tiny_mllms: Callable[[str], Path], tmp_path: Path
) -> None:
    there = tiny_mllms("llava")
    shutil.copytree(there, tmp_path / "copy")
    assert mllm(str(tmp_path / "copy")).fingerprint() == mllm(str(there)).fingerprint()
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    weights[min(weights)] += 1e-3
    save_file(weights, tmp_path / "copy" / "model.safetensors", {"format": "pt"})
    assert mllm(str(tmp_path / "copy")).fingerprint() != mllm(str(there)).fingerprint()


def test_sampling_and_penalties_of_a_checkpoint_do_not_change_answers(
    tiny_mllms: Callable[[str], Path], tmp_path: Path, llava: Language
) -> None:
    shutil.copytree(tiny_mllms("llava"), tmp_path / "m")
    file = tmp_path / "m" / "generation_config.json"
    more = {"do_sample": True, "temperature": 0.1, "top_p": 0.5, "repetition_penalty": 5.0}
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    batch = {"conversation": talks()}
    assert mllm(str(tmp_path / "m")).generate(batch, 6) == llava.generate(batch, 6)


def without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def of_words_only(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def foreign(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.Config", "AutoModelForImageTextToText": "own.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": own}))


def incomplete(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if "mlp" not in k}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def without_processor(folder: Path) -> None:
    (folder / "processor_config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_template, "has no chat template"),
        (pickled, "can run foreign code when read"),
        (of_words_only, "is a llama model, which answers no questions about images"),
        (foreign, "names no model that transformers knows without running foreign code"),
        (incomplete, "lacks [0-9]+ of the weights"),
        (without_processor, "no usable processor"),
        (shutil.rmtree, "no such folder|is offline|gave no model"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(
    damage: Callable[[Path], None], message: str, tiny_mllms: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_mllms("llava"), folder)
    damage(folder)
    with pytest.raises(ValueError, match=message) as refused:
        mllm(str(folder))
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where there is no GPU")
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantised_weights_are_refused_without_a_gpu(bits: Any, tiny_mllms: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=f"quantize='{bits}' needs a GPU with CUDA, and there is none"):
        mllm(str(tiny_mllms("llava")), quantize=bits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, "1 places for images and 0 images"),
        ({"answer": " "}, "an answer is empty"),
        ({"images": [b"GIF89a no"]}, "cannot read image"),
        ({"images": ["/nowhere/x.png"]}, "cannot read image '/nowhere/x.png'"),
    ],
)
def test_a_conversation_that_cannot_be_read_is_refused_in_one_line(
    changes: dict[str, Any], message: str, llava: Language
) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        llava.prepare({"conversation": [ask("What?", "a") | changes | {"where": "data.jsonl line 7"}]})
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("data.jsonl line 7: ")


def test_a_conversation_without_an_answer_is_answered_but_not_learnt(llava: Language) -> None:
    open_ = llava.prepare({"conversation": [ask("What?")]})
    assert len(llava.generate(open_, 3)) == 1
    with pytest.raises(ValueError, match="without an answer cannot be learnt"):
        llava(open_)


def test_the_tiny_one_is_the_same_everywhere_and_reads_any_text() -> None:
    model, state = tiny_mllm(), torch.get_rng_state()
    assert torch.equal(torch.get_rng_state(), state)
    assert tiny_mllm().fingerprint() == model.fingerprint() != tiny_mllm(seed=8).fingerprint()
    batch = model.prepare({"conversation": talks()})
    torch.testing.assert_close(model(batch), torch.cat([model({"tokens": [each]}) for each in batch["tokens"]]))
    assert isinstance(batch["tokens"][4], Tokens)
    assert model.dialogue.tokenizer.decode(batch["tokens"][4].answer) == "一只红色的狗。<|end|>"
