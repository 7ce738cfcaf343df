"""Reading Hugging Face models from a folder or the hub: safetensors only, quietly, with errors of one line."""

import hashlib
import logging
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from perdure.backbones.base import Backbone
from perdure.backbones.confined import check_confined
from perdure.backbones.preprocess import Interpolation, Preprocess
from perdure.process import ALONE

InputNorm = Literal["model", "none"]
"""`model`: the mean and deviation that the model's image processor gives; `none`: raw pixels in [0, 1]."""

Attention = Literal["eager", "sdpa"]

# What a model needs beside its weights; a hub repository often holds the same weights in other formats too.
_BESIDE = ("*processor_config.json", "*token*", "vocab*", "merges.txt", "*.model")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")

# Pillow's numbers, which image processors write as `resample`.
_RESAMPLE: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def locate(path: str, *needed: str, option: str = "path") -> tuple[str, str]:
    """What to record of `path`, and the folder to read: itself, or the local copy of a hub model.

    A hub model that is here already is read as it is, without asking the hub: it works offline, and does not change.

    Args:
        path: a folder or a hub name.
        needed: patterns of files beside the weights, without which a local copy of a hub model is incomplete; of
            several joined by "|", one is enough.
        option: what the user calls `path`.

    Raises:
        ValueError: when it is a folder that is missing or lacks files, or the hub has no such model in safetensors.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        check_model_folder(f"{option}={path!r}", folder)
        # What is recorded must still lead there when the program is started elsewhere.
        return str(folder.absolute()), str(folder.absolute())
    if folder.exists():
        raise ValueError(f"{option}={path!r} is a file: give the folder that holds config.json and model.safetensors")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path):
        raise ValueError(
            f"{option}={path!r}: no such folder; give one that holds config.json and model.safetensors, or a hub name "
            "such as 'openai/clip-vit-base-patch16'"
        )
    return path, fetch(path, *needed)


def fetch(name: str, *needed: str, config: str = "config.json", weights: Sequence[str] = _WEIGHTS) -> str:
    """The folder with the local copy of the hub model `name`, downloaded if it is not here yet.

    Args:
        name: of the hub.
        needed: as in `locate`.
        config: the file that describes the model.
        weights: files, of which one must be there.

    Raises:
        ValueError: when the hub cannot be reached, or has no such model in safetensors.
    """
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

    found = [try_to_load_from_cache(name, file) for file in weights]
    with reading(name):
        for here in (Path(file).parent for file in found if isinstance(file, str)):
            if all(any(any(here.glob(one)) for one in pattern.split("|")) for pattern in (config, *needed)):
                return str(here)
        # Asked first because it does not retry: without network, a download waits for half a minute.
        files = [sibling.rfilename for sibling in HfApi().model_info(name, timeout=20).siblings or ()]
        if not any(file in weights for file in files):
            raise ValueError(
                f"{name!r} has no {weights[0]} on the hub, and other formats are not read since they can run "
                "foreign code: choose another copy of the model, or convert it on a machine you trust"
            )
        shards = weights[0].replace(".safetensors", "-*.safetensors")
        return str(snapshot_download(name, allow_patterns=[config, *weights, shards, *_BESIDE]))


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Load in silence, without touching the random state, and turn what the libraries raise into one line."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as hf

    try:
        check_confined(Path(path))
        with ALONE, ExitStack() as after, torch.random.fork_rng(devices=[]):
            for library in (hf, hub):
                after.callback(library.set_verbosity, library.get_verbosity())
                library.set_verbosity(logging.CRITICAL)
            if hf.is_progress_bar_enabled():
                after.callback(hf.enable_progress_bar)
                hf.disable_progress_bar()
            yield
    except (OSError, HTTPError, SafetensorError, RuntimeError, ImportError) as error:
        raise ValueError(f"cannot load {path!r}: {_reason(path, error)}") from error


def read_model(kind: Any, path: str, fresh: str = "", /, **options: Any) -> Any:
    """The model of class `kind` in `path`, with every weight read from there; in float32, unless `dtype` is an option.

    Args:
        kind: a class of transformers.
        path: folder.
        fresh: beginning of the names of weights that may be missing: they are drawn, see `draw`.
        options: for the model.

    Raises:
        ValueError: when weights are missing: random ones in their place would go unnoticed.
    """
    options = {"dtype": torch.float32} | options
    model, found = kind.from_pretrained(
        path, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
    )
    absent = sorted(found["missing_keys"])
    if missing := [name for name in absent if not (fresh and name.startswith(fresh))]:
        raise ValueError(
            f"{path!r} lacks {len(missing)} of the weights of a {kind.__name__}, first {missing[0]}: give a folder or "
            "hub name of a complete model of that kind"
        )
    for name in absent:
        draw(model.get_parameter(name), name)
    return model


def hash_of_files(folder: str) -> str:
    """sha256 of the folder's weights, without a tensor being made of them.

    A hub's copy is a link to a file that is called by its sha256, which then is not computed again.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")):
        target = file.resolve().name
        if not (file.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", target)):
            with file.open("rb") as opened:
                target = hashlib.file_digest(opened, "sha256").hexdigest()
        digest.update(f"{file.name} {target}\n".encode())
    return digest.hexdigest()


def draw(parameter: nn.Parameter, name: str) -> None:
    """New weights, the same in every process: normal as 1 / √(number of inputs), biases zero."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    with torch.no_grad():
        if parameter.ndim < 2:
            parameter.zero_()
        else:
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / parameter[0].numel() ** 0.5
            )


def local_weights(checkpoint: str, otherwise: str) -> Path:
    """The file that the option `checkpoint` names.

    Raises:
        ValueError: when it is no safetensors file, or there is none; `otherwise` says what else to do.
    """
    file = Path(checkpoint).expanduser()
    if file.suffix != ".safetensors":
        raise ValueError(
            f"checkpoint={checkpoint!r}: only .safetensors is read, since other formats can run foreign code; convert "
            "it with safetensors.torch.save_file on a machine you trust"
        )
    if not file.is_file():
        raise ValueError(f"checkpoint={checkpoint!r}: no such file; {otherwise}")
    return file.absolute()


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: when it is damaged.
    """
    try:
        weights: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read {str(file)!r} ({error}): damaged or not safetensors; get it again") from error
    return weights


def fill(model: Any, weights: Mapping[str, Tensor], source: str, remedy: str) -> None:
    """Load `weights`, which must be all of the model's and nothing else.

    Raises:
        ValueError: when they are not.
    """
    own = model.state_dict()
    differing = [
        f"{key} {tuple(weights[key].shape) if key in weights else 'missing'} instead of {tuple(value.shape)}"
        for key, value in own.items()
        if key not in weights or weights[key].shape != value.shape
    ] + [f"{key} is not in the model" for key in weights if key not in own]
    if differing:
        raise ValueError(
            f"{source!r} does not fit the model in {len(differing)} tensors, first: {differing[0]}; {remedy}"
        )
    with torch.no_grad():
        model.load_state_dict(weights)


def read_config(path: str) -> Any:
    """The model's configuration.

    Raises:
        ValueError: when it is missing or of no kind that transformers knows.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except StrictDataclassError as error:
        raise ValueError(
            f"cannot load {path!r}: config.json: {' '.join(str(error).split())[:200]}; correct it"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"cannot load {path!r}: its config.json names no model that transformers knows without running foreign code"
        ) from error
    if config.model_type == "timm_wrapper":
        raise ValueError(f"{path!r} is a model of timm: write timm(name={path!r})")
    return config


def read_preprocess(path: str, input_norm: str) -> Preprocess:
    """The image processor that `path` brings, as plain values.

    Raises:
        ValueError: when there is none, or it does what a `Preprocess` cannot.
    """
    from transformers import AutoImageProcessor

    check_norm(input_norm)
    try:
        processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path!r} has no usable preprocessor_config.json: copy the one of the original model there; it says how "
            "images are resized and normalised"
        ) from error
    return _preprocess(path, processor, input_norm)


def set_attention(model: Any, implementation: Attention) -> None:
    """Switch a transformers model between its two ways to compute attention; one that knows only eager keeps it."""
    check_attention(implementation)
    towers = [getattr(model, name) for name in ("vision_model", "text_model") if hasattr(model, name)]
    for tower in towers or [model]:
        # There is no public way to ask, and asking for what it lacks is an error.
        tower.set_attn_implementation(implementation if tower._supports_sdpa else "eager")


def check_attention(implementation: str) -> None:
    """Raise ValueError unless `implementation` is one of the two."""
    if implementation not in get_args(Attention):
        raise ValueError(f"attention={implementation!r}: expected 'eager' or 'sdpa'")


def check_norm(input_norm: str) -> None:
    """Raise ValueError unless `input_norm` is one of the two."""
    if input_norm not in get_args(InputNorm):
        raise ValueError(
            f"input_norm={input_norm!r}: expected 'model' (the model's own mean and std) or 'none' (pixels in [0, 1])"
        )


def features_of(backbone: Backbone) -> int:
    """Number of features, from one black image: also shows that model and image processor agree on the size.

    Raises:
        ValueError: when they do not.
    """
    side = backbone.preprocess.size
    with fitting(backbone.spec, side), torch.no_grad():
        return backbone.encode_pixels(torch.zeros(1, 3, side, side, dtype=torch.float32)).shape[-1]


@contextmanager
def fitting(spec: str, side: int) -> Iterator[None]:
    """Within, a model's complaint is that it does not read images of `side` pixels."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{spec}: the model refuses images of {side} pixels, the size that its image "
            f"processor gives ({reason[:160]}); correct preprocessor_config.json"
        ) from error


def frozen(model: Any) -> Any:
    """The model as a backbone keeps it: float32, in evaluation mode, without gradients."""
    return model.float().eval().requires_grad_(False)


def check_model_folder(given: str, folder: Path) -> None:
    """Raise a ValueError unless a folder holds a configuration and weights that are read; `given` says which folder."""
    if not (folder / "config.json").is_file():
        if (folder / "open_clip_config.json").is_file():
            raise ValueError(f"{given} is a model of OpenCLIP: write open_clip(name={str(folder)!r})")
        raise ValueError(f"{given} has no config.json: give the folder of a Hugging Face model")
    if any(folder.glob("*.safetensors")):
        return
    if pickled := sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")):
        raise ValueError(
            f"{given} has its weights only as {pickled[0]}, a pickle, which can run foreign code when read: "
            "convert it to model.safetensors on a machine you trust (load it with transformers and save_pretrained)"
        )
    raise ValueError(f"{given} has no *.safetensors file: give the folder of a complete Hugging Face model")


def _reason(path: str, error: Exception) -> str:
    if Path(path).is_dir():
        text = " ".join(str(error).split())
        return f"{text[:200]}; check the folder, or download it again"
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    first = first[:160].rstrip(".")
    return f"no such folder, and the hub gave no model ({first}); check name and network, or give a folder"


def _preprocess(path: str, processor: Any, input_norm: str) -> Preprocess:
    facts = processor.to_dict()

    def refuse(name: str, expected: str) -> ValueError:
        return ValueError(
            f"{path!r}: its image processor has {name}={facts.get(name)!r}, expected {expected}; correct "
            "preprocessor_config.json"
        )

    if not facts.get("do_resize", True):
        raise refuse("do_resize", "true")
    # EfficientNet's (of ALIGN) can map pixels to [-1, 1] instead of [0, 1], and divide by the deviation once more.
    shift = float(facts.get("rescale_offset") or False)
    scale = 1 + shift
    if not facts.get("do_rescale", True) or abs(facts.get("rescale_factor", 1 / 255) * 255 - scale) > 1e-4:
        raise refuse("rescale_factor", "2/255 with rescale_offset" if shift else "1/255 with do_rescale")
    if facts.get("resample") not in _RESAMPLE:
        raise refuse("resample", "0 (nearest), 1 (lanczos), 2 (bilinear) or 3 (bicubic)")
    size = {k: v for k, v in dict(facts["size"]).items() if v is not None}
    squash = "shortest_edge" not in size
    resize = size.get("shortest_edge") or size.get("height")
    if not resize or (squash and size.get("width") != resize):
        raise refuse("size", "a shortest_edge, or height and width alike")
    side = resize
    if facts.get("do_center_crop"):
        crop = dict(facts["crop_size"])
        side = crop.get("height")
        if not side or crop.get("width") != side:
            raise refuse("crop_size", "height and width alike")
    elif not squash:
        raise refuse("do_center_crop", "true, since only the shortest_edge is given")
    mean: Any = (0.0, 0.0, 0.0)
    std: Any = (1.0, 1.0, 1.0)
    if input_norm == "model":
        if facts.get("do_normalize", True):
            mean, std = tuple(facts["image_mean"]), tuple(facts["image_std"])
        again = facts["image_std"] if facts.get("include_top") else (1.0, 1.0, 1.0)
        mean = tuple((m + shift) / scale for m in mean)
        std = tuple(s * a / scale for s, a in zip(std, again, strict=True))
    return Preprocess(side, resize, mean, std, _RESAMPLE[int(facts["resample"])], squash)
