"""Export: what was learnt as a folder that plain PEFT, transformers or timm load, with the classifier beside it.

Exact, not an approximation: linear updates are either one LoRA per layer, whose inner dimension is the sum of all
branches', or added to the weights. Experts of a language model that stay apart are one LoRA a task, each in a folder.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from perdure.adapters.injection import prompted, updates
from perdure.adapters.task_branches import TaskBranches
from perdure.backbones import pretrained
from perdure.backbones.base import Backbone
from perdure.backbones.clip import Clip, pocket_weights
from perdure.backbones.language import Language
from perdure.backbones.open_clip import CONFIG, WEIGHTS, OpenClip, locate_model
from perdure.backbones.open_clip_attention import fused_state
from perdure.backbones.timm import Timm
from perdure.backbones.vision import Vision
from perdure.core.learner import Core
from perdure.core.manifests import check_outside
from perdure.core.method import parts_of
from perdure.core.objective import Head
from perdure.export import language
from perdure.export.files import TERMS, TOKENIZER, Use, copy, finish, force_to_disk, options_of, readme, use_of
from perdure.export.graph import FILES, graph_readme, write_graph
from perdure.export.head import answering, head_of
from perdure.formatting import meant
from perdure.mechanisms.task_experts import TaskExperts
from perdure.options.paths import unplaced
from perdure.storage.files import write_json, write_text
from perdure.storage.replacement import draft_beside, drop_drafts
from perdure.training.config import make_backbone
from perdure.version import __version__

Target = Literal["peft", "merged", "transformers", "onnx", "torch"]
"""`peft`: a LoRA for the pre-trained model; `merged`: the whole model with the updates in its weights; `transformers`:
the same, for a model of that library alone; `onnx` and `torch`: images to scores as one graph, see `export.graph`."""

# Beside config and weights: how images and texts are read, and what may be done with the model.
_PROCESSOR = ("*processor_config.json",)


def export(learner: Core, folder: Path, to: Target | str, last: Callable[[Path], None] | None = None) -> Path:
    """Write `learner` to `folder`, whole or not at all; returns `folder`.

    Beside a language model stand its processor and `learnt.json`, see `export.language`; beside others
    `head.safetensors` (`weight` (classes, dim), and `bias` or `logit_scale` where there is one;
    for captions `logit_scale` alone), `labels.json` (names of the classes in the order of the columns, and how to get
    from features to scores) and `README.md` with a working example.

    Args:
        learner: that has learnt at least one task.
        folder: new or empty.
        to: `peft`, `merged`, `transformers`, `onnx` or `torch`.
        last: is called with the draft of the folder before it counts.

    Raises:
        ValueError: when the other library could not do the same as this learner, or the folder holds something.
    """
    check_outside(folder)
    _check(learner, to)
    to = "merged" if to == "transformers" else to
    target = folder.expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{folder} is there already and not an empty folder: give a new one")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        drop_drafts(target.parent)
        with draft_beside(target) as draft:
            _write(learner, draft, to)
            if last:
                last(draft)
            if target.exists():
                target.rmdir()
            draft.rename(target)
        force_to_disk([target.parent])
    except (OSError, SafetensorError) as error:  # nothing that was learnt is concerned, so there is nothing to resume
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(
            f"{folder} cannot be written ({why}): make room or get leave there, or give another"
        ) from error
    return folder


def _write(learner: Core, folder: Path, to: str) -> None:
    if to in FILES:
        _write_graph(learner, folder, to)
        return
    with learner.inference():
        if to == "peft":
            _write_lora(learner, folder)
        else:
            _write_merged(_merged(learner), folder)
        if isinstance(learner.backbone, Language):
            language.describe(learner, folder, to)
        else:
            _write_head(learner, folder, to)
    finish(folder)


def _write_graph(learner: Core, folder: Path, to: str) -> None:
    with torch.no_grad():
        whole = _merged(learner)
        write_graph(learner, folder, to, None if whole is learner.backbone else whole)
        with learner.inference():
            facts = _facts(learner, Use("", (), (), "", ""), head_of(learner))
    write_json(folder / "labels.json", facts | {"features": f"scores come from {FILES[to]}"})
    write_text(folder / "README.md", graph_readme(learner, to, __version__))
    options = options_of(learner.backbone)
    if isinstance(learner.backbone, Clip | Vision) and "vision" not in options:
        copy(_source(options), TERMS, folder)
    finish(folder)


def _write_head(learner: Core, folder: Path, to: str) -> None:
    head, use = head_of(learner), use_of(learner.backbone, to)
    save_file({k: v.detach().cpu().contiguous() for k, v in head.tensors.items()}, folder / "head.safetensors")
    write_json(folder / "labels.json", _facts(learner, use, head))
    write_text(folder / "README.md", readme(learner, to, use, head))


def _check(learner: Core, to: str) -> None:
    backbone = learner.backbone
    if to not in get_args(Target):
        near = meant(to, get_args(Target)) or f"; write one of {', '.join(map(repr, get_args(Target)))}"
        raise ValueError(f"unknown export {to!r}{near}")
    if not learner.learnt:
        raise ValueError("this learner has learnt nothing yet: there is nothing to export")
    if "classes" in learner.objective.asks and all(task.pretext for task in learner.tasks[: learner.learnt]):
        raise ValueError("this learner was only pre-trained, without labels: teach it first, with 'perdure learn'")
    if not isinstance(backbone, Clip | Vision | Timm | OpenClip | Language):
        raise ValueError(
            f"{backbone.spec} cannot be exported: learn on pocket(), clip(...), open_clip(...), vision(...), timm(...) "
            "or mllm(...), or keep it with save"
        )
    if to in FILES and isinstance(backbone, Language):
        raise ValueError(f"{backbone.spec} answers in words, token by token, which is no single graph: write 'merged'")
    if to == "transformers" and isinstance(backbone, Timm | OpenClip):
        raise ValueError(f"{backbone.spec} is no model of transformers: export to 'merged'")
    experts = isinstance(backbone, Language) and any(isinstance(each, TaskBranches) for _, each, _ in updates(backbone))
    if experts and to != "peft":
        raise ValueError(
            "each example takes an expert of its own, which no weights can hold: export to 'peft', which writes a LoRA "
            "for each task, or keep this learner with save"
        )
    if experts and any(isinstance(part, TaskExperts) and not part.apart for part in parts_of(learner.method)):
        raise ValueError(
            f"{learner.method.spec} adds up what it learnt of all tasks in part: keep this learner with save"
        )
    if not experts and (strange := [part.name for part in parts_of(learner.method) if part.treats]):
        raise ValueError(f"{strange[0]} changes features as no weights can express; keep this learner with save")
    if backbone.layers:
        raise ValueError(
            f"{backbone.spec} takes features from several blocks, which no export holds; keep it with save"
        )
    if prompted(backbone):
        raise ValueError("prompts take part in the encoder, which no weights can hold; keep this learner with save")
    if not isinstance(backbone, Language):  # whose vocabulary answers
        answering(learner)
    linear = False
    for site, adapter, part in updates(backbone):
        if experts or adapter.delta(part, branches=True) is not None:
            linear = True
        elif adapter.state_dict():
            raise ValueError(
                f"the {type(adapter).__name__} on {site.layer} is no linear update of its weight: neither LoRA nor "
                "merged weights can hold it; keep this learner with save"
            )
    if to == "peft":
        _check_lora(learner, experts, linear)


def _check_lora(learner: Core, experts: bool, linear: bool) -> None:
    backbone = learner.backbone
    if isinstance(backbone, OpenClip):
        raise ValueError("OpenCLIP's attention is one fused layer, which no LoRA of PEFT fits: export to 'merged'")
    if "vision" in options_of(backbone):
        raise ValueError(f"{backbone.spec} was put together here, no folder has it for a LoRA: export to 'merged'")
    if backbone.changed:
        raise ValueError(f"a LoRA does not bring {backbone.changed}, which its model has not: export to 'merged'")
    if learner.tunes_backbone:
        raise ValueError("the encoder's own weights were trained, which a LoRA cannot hold: export to 'merged'")
    if not linear:
        raise ValueError("no layer of the encoder was adapted, so there is no LoRA to write: export to 'merged'")
    remedy = "keep this learner with save" if experts else "export to 'merged'"
    if isinstance(backbone, Language) and "path" not in options_of(backbone):
        raise ValueError(f"{backbone.spec} is made here, and no folder has it for a LoRA; {remedy}")


def _write_lora(learner: Core, folder: Path) -> None:
    names = language.experts(learner)
    for task, name in names.items():
        (folder / name).mkdir()
        _write_one_lora(learner, folder / name, task)
    if not names:
        _write_one_lora(learner, folder, None)


def _write_one_lora(learner: Core, folder: Path, task: int | None) -> None:
    layers = {name.removeprefix("model."): pair for name, pair in _stacked(learner.backbone, task).items()}
    tensors = {}
    for name, (down, up) in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = down.cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = up.cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    ranks = {name: len(down) for name, (down, _) in layers.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != common}
    kind, options = type(learner.backbone.model), options_of(learner.backbone)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": options.get("path"),
        "auto_mapping": {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,  # PEFT multiplies by alpha / r
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(layers),
    }
    if isinstance(learner.backbone, Timm):
        config["auto_mapping"] = None  # PEFT would look for `from_pretrained`, which timm's classes lack
        config["base_model_name_or_path"] = options.get("checkpoint", options["name"])
    if isinstance(learner.backbone, Language):
        config |= language.lora_facts(learner.backbone)
    write_json(folder / "adapter_config.json", config)


def _stacked(backbone: Backbone, task: int | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> (down (r, fan_in), up (fan_out, r)) of all that stands on it, float32; or of the expert of `task`."""
    pieces: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for site, adapter, part in updates(backbone):
        if task is not None and isinstance(adapter, TaskBranches):
            found: tuple[Tensor, Tensor] | None = adapter.factors_of(task)
        else:
            found = adapter.factors(part)
        if found is None:
            continue
        up, down = (factor.detach().float() for factor in found)
        layer: Any = backbone.get_submodule(site.layer)
        whole = up.new_zeros(len(layer.weight), up.shape[1])
        whole[site.rows[0] : site.rows[1]] = up
        known = pieces.setdefault(site.layer, [])
        # k and v of a fused layer read through the same `down`: once is enough.
        for i, (other, sofar) in enumerate(known):
            if torch.equal(other, down):
                known[i] = other, sofar + whole
                break
        else:
            known.append((down, whole))
    return {
        layer: (torch.cat([down for down, _ in known]), torch.cat([up for _, up in known], 1))
        for layer, known in pieces.items()
    }


def _merged(learner: Core) -> Any:
    """The backbone with all updates in its weights, in float32."""
    backbone = learner.backbone
    if learner.tunes_backbone or all(p.dtype == torch.float32 for p in backbone.parameters()):
        return backbone
    # In bfloat16 most of a small update is lost: it has to meet the weights as they were published.
    whole = make_backbone(language.whole_spec(backbone) if isinstance(backbone, Language) else backbone.spec)
    if whole.fingerprint() != learner.fingerprint:
        raise ValueError(f"{backbone.spec} has changed since this learner was made: give the weights it was learnt on")
    for site, adapter, part in updates(backbone):
        update = adapter.delta(part, branches=True)
        if update is not None:
            whole.get_submodule(site.layer).weight[site.rows[0] : site.rows[1]] += update.cpu()
    return whole


def _write_merged(whole: Any, folder: Path) -> None:
    if isinstance(whole, Timm):
        _write_timm(whole, folder)
    elif isinstance(whole, OpenClip):
        _write_open_clip(whole, folder)
    else:
        _write_transformers(whole, folder)


def _write_transformers(backbone: Any, folder: Path) -> None:
    from transformers.utils import logging as hf

    bars = hf.is_progress_bar_enabled()
    hf.disable_progress_bar()
    try:
        backbone.model.save_pretrained(folder)
    finally:
        if bars:
            hf.enable_progress_bar()
    if isinstance(backbone, Language):
        language.write_reading(backbone, folder)
        return
    options = options_of(backbone)
    if "vision" in options:  # two models that have never met
        for tower in ("vision", "text"):
            copy(_folder(options[tower]), TERMS, folder, before=f"{tower}-")
        copy(_folder(options["vision"]), _PROCESSOR, folder)
        backbone.tokenizer.save_pretrained(folder)  # says which class it is of, which a copied vocabulary need not
    else:
        copy(_source(options), (*_PROCESSOR, *TERMS, *(TOKENIZER if isinstance(backbone, Clip) else ())), folder)
        if "length" in options:  # the tokenizer cuts texts off as well
            backbone.tokenizer.save_pretrained(folder)
    changes: dict[str, Any] = {"do_normalize": False} if options.get("input_norm") == "none" else {}
    if "size" in options:
        changes |= backbone.preprocess.sides()
    for file in folder.glob("*processor_config.json") if changes else ():
        facts = json.loads(file.read_text(encoding="utf-8"))
        facts.get("image_processor", facts).update(changes)
        write_json(file, facts)


def _folder(model: str) -> Path:
    return Path(pretrained.locate(model)[1])


def _source(options: Mapping[str, Any]) -> Path:
    return _folder(options["path"]) if "path" in options else pocket_weights()


def _write_timm(backbone: Timm, folder: Path) -> None:
    from timm.models import save_for_hf

    save_for_hf(backbone.model, str(folder), safe_serialization=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["pretrained_cfg"] |= {k: backbone.preprocess.describe()[k] for k in ("mean", "std")}
    config["pretrained_cfg"]["input_size"] = [3, backbone.preprocess.size, backbone.preprocess.size]
    write_json(folder / "config.json", config)


def _write_open_clip(backbone: OpenClip, folder: Path) -> None:
    """What `open_clip.create_model_and_transforms("local-dir:...")` loads."""
    options = options_of(backbone)
    source = locate_model(options["name"], options.get("checkpoint"))
    preprocess = backbone.preprocess
    reading = {
        "size": preprocess.size,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "interpolation": preprocess.interpolation,
        "resize_mode": "squash" if preprocess.squash else "shortest",
    }
    described = source.model
    described["vision_cfg"]["image_size"], described["text_cfg"]["context_length"] = preprocess.size, backbone.length
    write_json(folder / CONFIG, {"model_cfg": described, "preprocess_cfg": reading})
    weights = fused_state(backbone.model)
    save_file({name: tensor.detach().cpu().clone() for name, tensor in weights.items()}, folder / WEIGHTS)
    copy(source.folder, (*TERMS, *TOKENIZER), folder)
    if source.folder is None and hasattr(backbone.tokenizer, "tokenizer"):  # one of transformers, from the hub
        backbone.tokenizer.tokenizer.save_pretrained(folder)


def _facts(learner: Core, use: Use, head: Head) -> dict[str, Any]:
    config = getattr(learner, "config", None)
    facts = {
        "labels": list(learner.objective.names) if "classes" in learner.objective.asks else [],
        "objective": unplaced(config.objective) if config else learner.objective.name,
        "classifier": head.what,
        "features": f"features = {use.features}; head = head.safetensors; scores = {head.scores}",
        "preprocess": learner.backbone.preprocess.describe(),
        "perdure": __version__,
        "backbone": learner.backbone.spec,
        "fingerprint": learner.fingerprint,
    }
    if config:
        facts["method"] = unplaced(config.method)
    if {"classes", "text"} <= learner.objective.asks | learner.objective.towers:
        facts["templates"] = list(learner.objective.templates)
    return facts
