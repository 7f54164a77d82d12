"""LoRA, where diffusers needs help: models that have one attached, and files in the layout of kohya and CivitAI."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel

_OLD_ATTENTION = re.compile(r"self_attn\.to_(q|k|v|out)_lora\.")  # of a text encoder; the U-Net's are attn1 and attn2


def cannot_be_saved(model: nn.Module) -> bool:
    """Tell whether a LoRA in a model, active or not, makes its `save_pretrained` write what cannot be loaded.

    The layers of a LoRA rename the weights, and the loader takes the old names for missing. Only transformers can save
    a LoRA with the path of the model it belongs to, if it knows that path: for a LoRA that was given to `add_adapter`.
    """
    if not any(name.endswith(".base_layer") for name, _ in model.named_modules()):
        return False
    configs = (getattr(model, "peft_config", None) or {}).values()
    bases = {getattr(config, "base_model_name_or_path", None) for config in configs}
    return not (isinstance(model, PreTrainedModel) and model.name_or_path and bases == {model.name_or_path})


def refuse_lora(names: Iterable[str], whose: str) -> None:
    """Refuse the weights of a model with a LoRA attached, which go by other names and would count without it."""
    renamed = next((name for name in names if ".base_layer." in name), None)
    if renamed is not None:
        raise ValueError(
            f"A LoRA is attached to {whose}: expected a model's plain weights, got {renamed!r}. Unload the LoRA "
            "first (pipeline.unload_lora_weights()); it can be loaded again afterwards."
        )


def mend_kohya(
    weights: Mapping[str, Tensor], alphas: Mapping[str, float]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Give the same LoRA, up * down * alpha / rank in every layer, as diffusers 0.36 to 0.42 reads it right.

    - It hands the alphas that differ from the commonest one to PEFT under names that PEFT does not know, for attention
      layers and the text encoder, which then get the commonest alpha. So all get that, and `up` is multiplied by
      alpha / commonest, in float32. A layer without an alpha has its rank for one.
    - It knows the text encoder's attention layers in this naming only if there is a `to_out` among them.

    Args:
        weights: as `lora_state_dict` converts a kohya file: `unet.<layer>.lora.down.weight` and so on.
        alphas: as it gives them: `unet.<layer>.alpha`.
    """
    downs = {f"{key.split('.lora.')[0]}.alpha": key for key in weights if key.endswith(".down.weight")}
    levelled = {name: float(alphas.get(name, weights[down].shape[0])) for name, down in downs.items()}
    if not levelled or not alphas.keys() <= levelled.keys():  # another layout: nothing that we know to mend
        return dict(weights), dict(alphas)
    ((commonest, _),) = Counter(levelled.values()).most_common(1)
    ups = {downs[name].replace(".down.", ".up."): alpha for name, alpha in levelled.items() if alpha != commonest}
    mended = {**weights, **{up: weights[up].float() * (alpha / commonest) for up, alpha in ups.items()}}
    renamed = {_OLD_ATTENTION.sub(r"self_attn.\1_proj.lora_linear_layer.", key): mended[key] for key in mended}
    return renamed, dict.fromkeys(levelled, commonest)
