"""Chinese-CLIP: images and Chinese texts in one space."""

from perdure.backbones.clip import Clip, named
from perdure.options.ranges import checked


@checked
def chinese_clip(path: str, input_norm: str = "model") -> Clip:
    """A Chinese-CLIP: the vision transformer of CLIP and a Chinese RoBERTa, trained on Chinese captions.

    Features are the projected image embeddings, not normalised to unit length.

    Args:
        path: hub name such as "OFA-Sys/chinese-clip-vit-base-patch16", or a folder with config, safetensors, tokenizer
            (vocab.txt) and image processor.
        input_norm: "model" for the mean and deviation of the image processor, "none" for raw pixels in [0, 1].

    Raises:
        ValueError: when there is no such model, it is incomplete, or of another kind.
    """
    return named("chinese_clip", path, input_norm, only="chinese_clip")
