"""Trains a small LLaVA on the vision tower of `pocket()`: what is drawn here, its captions and questions, nothing else.

    python benchmarks/small_decoder.py --out build/small-decoder
    perdure run --backbone 'mllm(path="build/small-decoder")' --stream 'easy_vqa_questions(order="natural")' ...

docs/mllm.md says what came out. The vision tower is frozen: its features of every picture are computed once. Pictures
are coloured shapes drawn with Pillow. Questions are put in other words than easy-vqa's, none of whose images and
questions are used, and are mostly answered in sentences. One thread, float32; stopped and started again it goes on from
the last hundred steps and ends with the same weights. It says how many answers about pictures kept apart are right.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from drawn_shapes import COLOURS, KINDS, SHAPES, Asked, draw
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F

from perdure.backbones.clip import pocket_weights
from perdure.backbones.pretrained import read_weights

PATCHES = 36
POSITIONS = 256

# Words that people may use when they teach and ask, beside those that stand in the templates below.
MORE = """
a about above all also am an and animal any are as ask be below between big bird both but by can cannot car cat child
color colors colour colours contain contained contains could count day did different do does dog down draw each eight
every false few find five flower food for four from give glad good has have he hello help here high his house how i if
in inside into is it its kind know left less light like list little long look lot low made make man many may me middle
more most much must my name near new next night nine no nobody none not nothing now number object objects of off old
on one only or other our out outside over page paper part people person photo picture place please present presence
question right road round same say scene see seen seven she should show shown sign six sky small so some something
square ten than thank that the their them then there these they thing things this those three time to too top tree
true two under up us use very wall want was water way we were what when where which who whose why will with without
woman word words would write wrong year yes you your zero answer image images shape shapes form forms figure figures
appear appears visible absent exist exists
"""
SPECIAL = ("<pad>", "<unk>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<image>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tokenizer(file: Path) -> None:
    """A token a word, and pieces of a letter for all other words."""
    said = {word for number in range(300) for ask in KINDS.values() for t in range(4)
            for text in ask(draw(number), random.Random(f"words {number} {t}")) for word in text.split()}  # fmt: skip
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    words = sorted((said | set(MORE.split()) | set(COLOURS) | set(SHAPES)) - set(letters))
    listed = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters if letter.isalnum()), *words]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(listed)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(file))


def compose(tokenizer_file: Path) -> tuple[Any, Any]:
    """The model, of which only the vision tower has learnt weights, and its processor."""
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file), pad_token="<pad>", eos_token="<|end|>", unk_token="<unk>"
    )
    pocket = pocket_weights()
    end, pad, image = (tokenizer.convert_tokens_to_ids(token) for token in ("<|end|>", "<pad>", "<image>"))
    config = hf.LlavaConfig(
        vision_config=json.loads((pocket / "config.json").read_text())["vision_config"],
        text_config=hf.LlamaConfig(
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=POSITIONS,
            vocab_size=len(tokenizer),
            tie_word_embeddings=True,
            pad_token_id=pad,
            eos_token_id=end,
            bos_token_id=None,
        ),
        image_token_index=image,
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
        tie_word_embeddings=True,
    )
    model = hf.LlavaForConditionalGeneration(config).float()
    weights = read_weights(pocket / "model.safetensors")
    tower = {name.partition(".")[2]: each for name, each in weights.items() if name.startswith("vision_model.")}
    model.model.vision_tower.load_state_dict(tower)
    model.generation_config = hf.GenerationConfig(eos_token_id=end, pad_token_id=pad)
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessor.from_pretrained(pocket),
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return model, processor


@torch.no_grad()
def features(model: Any, processor: Any, numbers: range) -> Tensor:
    """What the vision tower makes of the pictures, float16 (N, patches, width)."""
    found = []
    for first in range(numbers.start, numbers.stop, 64):
        pictures = [draw(i).picture for i in range(first, min(first + 64, numbers.stop))]
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        found.append(states[model.config.vision_feature_layer][:, 1:].half())
    return torch.cat(found)


class Packed:
    """A step's pictures, each with several questions that do not see each other.

    Every question has the positions that it would have alone, so a picture is read once for all.
    """

    def __init__(self, tokenizer: Any, asked: list[list[Asked]]) -> None:
        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
        rows = [[self._ids(tokenizer, ids, *each) for each in some] for some in asked]
        longest = 1 + PATCHES + max(sum(len(ask) + len(say) for ask, say in row) for row in rows)
        shape = (len(rows), longest)
        self.inputs = torch.full(shape, ids["<pad>"])
        self.targets = torch.full(shape, -100)
        self.positions = torch.zeros(shape, dtype=torch.int64)
        group = torch.full(shape, -1)
        for i, row in enumerate(rows):
            start = 1 + PATCHES
            self.inputs[i, 0], group[i, :start] = ids["<|user|>"], 0
            self.positions[i, :start] = torch.arange(start)
            for number, (ask, say) in enumerate(row, 1):
                end = start + len(ask) + len(say)
                self.inputs[i, start:end] = torch.tensor(ask + say)
                first = start + len(ask) - 1  # the last token of the prompt says the answer's first
                self.targets[i, first : end - 1] = torch.tensor(say)
                self.positions[i, start:end] = 1 + PATCHES + torch.arange(end - start)
                group[i, start:end] = number
                start = end
        before = torch.ones(longest, longest, dtype=torch.bool).tril()
        same = (group.unsqueeze(2) == group.unsqueeze(1)) | (group.unsqueeze(1) == 0)
        self.mask = (before & same).unsqueeze(1)

    @staticmethod
    def _ids(tokenizer: Any, ids: dict[str, int], ask: str, say: str) -> tuple[list[int], list[int]]:
        asked, said = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (ask, say))
        return [*asked, ids["<|end|>"], ids["<|assistant|>"]], [*said, ids["<|end|>"]]

    def logits(self, model: Any, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the answers' tokens, and the tokens."""
        body = model.model
        embedded = body.language_model.embed_tokens(self.inputs)
        shown = body.multi_modal_projector(seen.float())
        embedded = torch.cat([embedded[:, :1], shown, embedded[:, 1 + PATCHES :]], 1)
        hidden = body.language_model(
            inputs_embeds=embedded, attention_mask=self.mask, position_ids=self.positions, use_cache=False
        ).last_hidden_state
        chosen = self.targets >= 0
        return model.lm_head(hidden[chosen]), self.targets[chosen]


def step_of(number: int, pictures: int, batch: int) -> tuple[list[int], list[list[Asked]]]:
    """The pictures of a step, and what is asked of them: one question of each kind."""
    epoch, place = divmod(number * batch, pictures)
    order = torch.randperm(pictures, generator=torch.Generator().manual_seed(epoch)).tolist()
    chosen = order[place : place + batch]
    asked = []
    for picture in chosen:
        scene, rng = draw(picture), random.Random(f"{number} {picture}")
        asked.append([ask(scene, rng) for ask in KINDS.values()])
    return chosen, asked


@torch.no_grad()
def measure(model: Any, tokenizer: Any, seen: Tensor, first: int) -> dict[str, float]:
    """Share of answers, by kind, whose every token is the likeliest, about pictures that were not learnt."""
    right: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for start in range(0, len(seen), 32):
        scenes = [draw(first + i) for i in range(start, min(start + 32, len(seen)))]
        for kind, ask in KINDS.items():
            asked = [[ask(s, random.Random(f"kept {first + start + i}"))] for i, s in enumerate(scenes)]
            packed = Packed(tokenizer, asked)
            logits, targets = packed.logits(model, seen[start : start + len(scenes)])
            hits = torch.ones(packed.targets.shape, dtype=torch.bool)
            hits[packed.targets >= 0] = logits.argmax(1) == targets
            right[kind] += hits.all(1).float().tolist()
    return {kind: round(sum(each) / len(each), 3) for kind, each in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/small-decoder"))
    parser.add_argument("--pictures", type=int, default=12000)
    parser.add_argument("--kept", type=int, default=500, help="pictures that are measured, not learnt")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=32, help="pictures a step")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    begun = options.out / "training"
    begun.mkdir(parents=True, exist_ok=True)
    if not (begun / "tokenizer.json").exists():
        write_tokenizer(begun / "tokenizer.json")
    model, processor = compose(begun / "tokenizer.json")
    learnt = {n: p for n, p in model.named_parameters() if ".vision_tower." not in n}
    print(f"{sum(p.numel() for p in learnt.values()) / 1e6:.2f} M parameters beside the vision tower", flush=True)
    if not (begun / "features.safetensors").exists():
        found = features(model, processor, range(options.pictures + options.kept))
        save_file({"seen": found}, begun / "features.safetensors")
    seen = load_file(begun / "features.safetensors")["seen"]
    kept = seen[options.pictures :]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in learnt.values() if p.ndim > 1]},
            {"params": [p for p in learnt.values() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=0,
        weight_decay=0.05,
    )
    done = restore(begun / "state.safetensors", learnt, optimizer)
    model.train()
    began = time.process_time()
    for number in range(done, options.steps):
        warm, cool = min(1.0, (number + 1) / 60), 0.5 * (1 + math.cos(math.pi * number / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * warm * max(cool, 0.02)
        chosen, asked = step_of(number, options.pictures, options.batch)
        logits, targets = Packed(processor.tokenizer, asked).logits(model, seen[chosen])
        loss = F.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt.values(), 1.0)
        optimizer.step()
        if (number + 1) % 100 == 0:
            keep(begun / "state.safetensors", learnt, optimizer, number + 1)
            each = (time.process_time() - began) / (number + 1 - done)
            right = measure(model.eval(), processor.tokenizer, kept[:128], options.pictures)
            print(f"step {number + 1}: loss {loss.item():.3f}, {each:.2f} s of CPU a step, right {right}", flush=True)
            model.train()
    print(measure(model.eval(), processor.tokenizer, kept, options.pictures), flush=True)
    model.save_pretrained(options.out)
    processor.save_pretrained(options.out)


def keep(file: Path, learnt: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, step: int) -> None:
    """Weights and the optimizer's state."""
    state = {f"weight {n}": p.detach() for n, p in learnt.items()}
    for name, parameter in learnt.items():
        state |= {f"{key} {name}": value for key, value in optimizer.state[parameter].items()}
    state["done"] = torch.tensor(step)
    save_file(state, file.with_suffix(".part"))
    file.with_suffix(".part").rename(file)


def restore(file: Path, learnt: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Take them back, where there are any; returns how many steps are done."""
    if not file.exists():
        return 0
    state = load_file(file)
    with torch.no_grad():
        for name, parameter in learnt.items():
            parameter.copy_(state[f"weight {name}"])
            keys = ("step", "exp_avg", "exp_avg_sq")
            optimizer.state[parameter] = {key: state[f"{key} {name}"] for key in keys}
    return int(state["done"])


if __name__ == "__main__":
    main()
