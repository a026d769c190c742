"""Official checkpoints (locuslab/deq, locuslab/torchdeq) to this package's layout."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deqzoo.errors import UserError
from deqzoo.models.convert import output_folder, read_settings, read_state_dict
from deqzoo.models.deq_transformer.configuration_deq_transformer import (
    VARIANTS,
    DEQTransformerConfig,
)
from deqzoo.models.deq_transformer.modeling_deq_transformer import DEQTransformerForCausalLM
from deqzoo.models.deq_transformer.presets_deq_transformer import PRESETS

# Neutral names of the settings file and ours; the others have the same name.
RENAMED = {
    "tie_weights": "tie_word_embeddings",
    "tie_projs": "tie_projections",
    "eval_iterations": "fixed_iterations",
}
IGNORED_SETTINGS = ("d_head",)  # d_model / n_head

_LAYER_KEYS = {
    "dec_attn.r_w_bias": "attention.content_bias",
    "dec_attn.r_r_bias": "attention.position_bias",
    "dec_attn.qkv_net": "attention.qkv",
    "dec_attn.r_net": "attention.relative",
    "dec_attn.o_net": "attention.output",
    "dec_attn.ln1": "attention.input_norm",
    "dec_attn.ln2": "attention.output_norm",
    "pos_ff.ff1_net": "feed_forward.up",
    "pos_ff.ff2_net": "feed_forward.down",
    "pos_ff.ln": "feed_forward.norm",
}
_LEAVES = {"weight_g": "gain", "weight_v": "direction"}
# Old checkpoints hold the block four times; these copies are derived or duplicates.
_DROPPED = re.compile(r"^(deq\.|func_copy\.|pos_emb\.)")


def config_from_settings(settings: dict[str, Any]) -> DEQTransformerConfig:
    """Configuration from neutral settings (see the converter's ``--config``).

    Raises:
        UserError: a setting is unknown or impossible.
    """
    values = {
        RENAMED.get(key, key): value
        for key, value in settings.items()
        if key not in IGNORED_SETTINGS
    }
    if values.get("variant") not in VARIANTS:
        raise UserError(
            f"The settings name variant {values.get('variant')!r}; choose one of "
            f"{', '.join(VARIANTS)}."
        )
    valid_names = set(DEQTransformerConfig().to_dict())
    unknown_names = sorted(set(values) - valid_names)
    if unknown_names:
        raise UserError(f"Unknown settings {', '.join(unknown_names)} in the config.")
    width = (settings.get("d_head") or 0) * (settings.get("n_head") or 0)
    if width not in (0, settings.get("d_model")):
        raise UserError("d_head times n_head must be d_model.")
    lacks_equilibrium = values["variant"] == "torchdeq-lm" or (
        values["variant"] == "torchdeq-seq" and values.get("norm_placement") == "pre"
    )
    if not lacks_equilibrium:
        values.pop("fixed_iterations", None)
    try:
        return DEQTransformerConfig(**values)
    except Exception as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"The settings do not fit together: {reason}") from error


def read_config(source: str | Path) -> DEQTransformerConfig:
    """Configuration from a preset, or a JSON file with settings at its top or in ``config``."""
    if str(source) in PRESETS:
        return DEQTransformerConfig.from_preset(str(source))
    content = read_settings(Path(source), PRESETS)
    return config_from_settings(content.get("config", content))


def converted_key(key: str) -> str | None:
    """Our name of an upstream parameter, or None for one that is dropped."""
    if _DROPPED.match(key):
        return None
    key = re.sub(r"(_projs\.\d+)$", r"\1.weight", key)  # before v2 projections had no `.weight`
    key = re.sub(r"^word_emb\.emb_layers\.", "transformer.embedding.tables.", key)
    key = re.sub(r"^word_emb\.emb_projs\.", "transformer.embedding.projections.", key)
    key = re.sub(r"^(inject_conv|injection)\.", "transformer.injection.", key)
    key = re.sub(r"^crit\.out_layers\.", "lm_head.tables.", key)
    key = re.sub(r"^crit\.out_projs\.", "lm_head.projections.", key)
    key = re.sub(r"^crit\.cluster_(weight|bias)$", r"lm_head.clusters.\1", key)
    match = re.match(r"^func\.(dec_attn|pos_ff)\.(?:(\d+)\.)?(.+)$", key)
    if match is None:
        return key
    part, index, rest = match.groups()
    head, _, leaf = rest.partition(".")
    module = _LAYER_KEYS.get(f"{part}.{head}")
    if module is None:
        return key
    name = f"transformer.layers.{index or 0}.{module}"
    return f"{name}.{_LEAVES.get(leaf, leaf)}" if leaf else name


def deinterleaved(rows: Tensor, n_head: int) -> Tensor:
    """Rows grouped [q_h | k_h | v_h] head by head, regrouped as all q, all k, all v."""
    return rows.unflatten(0, (n_head, 3, -1)).transpose(0, 1).flatten(0, 2)


def convert_state_dict(
    state_dict: dict[str, Tensor], config: DEQTransformerConfig
) -> dict[str, Tensor]:
    """Upstream tensors under our names and in our shapes.

    Raises:
        UserError: tied copies differ.
    """
    tensors = {}
    for key, tensor in state_dict.items():
        name = converted_key(key)
        if name is None:
            continue
        if name.startswith("transformer.") and ".tables." not in name:
            # A convolution of kernel 1 is a linear map.
            keep = 2 if name.endswith(("weight", "direction", "gain")) else 1
            while tensor.ndim > max(keep, 1) and tensor.shape[-1] == 1:
                tensor = tensor.squeeze(-1)
            if name.endswith("gain"):
                tensor = tensor.reshape(-1, 1)
        if name.endswith(("content_bias", "position_bias")):
            tensor = tensor.flatten()
        is_interleaved = "attention.qkv." in name or name.startswith("transformer.injection.")
        if config.variant == "torchdeq-lm" and is_interleaved:
            tensor = deinterleaved(tensor, config.n_head)
        if name in tensors:
            raise UserError(f"the checkpoint holds {name} twice, in the spellings of two sources")
        tensors[name] = tensor.contiguous()
    return tensors


def build_model(
    state_dict: dict[str, Tensor], config: DEQTransformerConfig
) -> DEQTransformerForCausalLM:
    """Model with converted weights, in the dtype of the source.

    Raises:
        UserError: the tensors do not fit the configuration.
    """
    tensors = convert_state_dict(state_dict, config)
    dtypes = {t.dtype for t in tensors.values() if t.is_floating_point()}
    if len(dtypes) != 1:
        raise UserError(f"The checkpoint mixes dtypes {sorted(map(str, dtypes))}.")
    config.dtype = dtypes.pop()
    model: Any = DEQTransformerForCausalLM(config)
    model.to(config.dtype).eval()
    for target, source in model.all_tied_weights_keys.items():
        one, other = tensors.get(target), tensors.get(source)
        if one is not None and other is not None and not torch.equal(one, other):
            raise UserError(
                f"{target} and {source} differ in the checkpoint, but the config ties them; "
                "check tie_weights and tie_projs."
            )
    model_tensors = model.state_dict()
    wrong_tensors = sorted(
        f"{name} {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if name not in model_tensors or model_tensors[name].shape != tensor.shape
    )
    tied_keys = model.all_tied_weights_keys
    missing_names = sorted(
        name for name in model_tensors if name not in tensors and tied_keys.get(name) not in tensors
    )
    if wrong_tensors or missing_names:
        fault = (
            f"does not take {wrong_tensors[0]}" if wrong_tensors else f"lacks {missing_names[0]}"
        )
        raise UserError(
            f"The checkpoint does not fit the config: it {fault} "
            f"({len(wrong_tensors)} unexpected, {len(missing_names)} missing tensors)."
        )
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    return model


def convert(
    source: str | Path, config: str | Path, output: str | Path, weights: str | None = None
) -> Path:
    """Write an official checkpoint as a folder that `from_pretrained` loads, in its own dtype.

    A tokenizer is not written: official checkpoints come without their vocabulary.

    Args:
        source: a file as `read_state_dict` takes it; its state dict may have the prefix "sd.".
        config: a preset's name, or a JSON file with the settings.
        output: folder to write.
        weights: key of the state dict in a file that has several.

    Raises:
        UserError: unreadable files, impossible settings, or tensors that do not fit them.
    """
    output = output_folder(output)
    state_dict = without_companions(read_state_dict(Path(source), weights))
    model = build_model(state_dict, read_config(config))
    model.save_pretrained(output)
    return output


def without_companions(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a file in which it has the prefix "sd." among other tensors."""
    inner = {key.removeprefix("sd."): v for key, v in tensors.items() if key.startswith("sd.")}
    return inner or tensors
