"""Public models of `transformers` with random weights: what each is called with."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

os.environ.setdefault("HF_HUB_OFFLINE", "1")

Losses = Callable[..., Tensor]


class Scale(NamedTuple):
    """How large a model and its batch are."""

    width: int = 16
    heads: int = 2
    examples: int = 3
    tokens: int = 6
    words: int = 40
    pixels: int = 16
    patch: int = 4
    dtype: torch.dtype = torch.float64


SMALL = Scale()
ENCODERS = ("Bert", "Roberta", "DebertaV2")
DECODERS = ("GPT2", "Llama", "Qwen3", "OPT", "T5")
VISION = ("ViT", "Swin", "ConvNext")
CLASSES = {
    **{f"{family}ForMaskedLM": family for family in ENCODERS},
    **{f"{family}ForCausalLM": family for family in ("Llama", "Qwen3", "OPT")},
    **{f"{family}ForImageClassification": family for family in VISION},
    "GPT2LMHeadModel": "GPT2",
    "T5ForConditionalGeneration": "T5",
}
NAMES = sorted(CLASSES)


def options(family: str, scale: Scale) -> dict[str, Any]:
    """Return how large a model of two layers is, in the words of its configuration."""
    width, heads = scale.width, scale.heads
    plain = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": heads}
    inner = plain | {"intermediate_size": 2 * width}
    image = {"image_size": scale.pixels}
    special: dict[str, dict[str, Any]] = {
        "GPT2": {"n_embd": width, "n_layer": 2, "n_head": heads, "n_positions": 64},
        "OPT": plain | {"ffn_dim": 2 * width, "word_embed_proj_dim": width},
        "T5": {
            "d_model": width,
            "d_kv": width // heads,
            "d_ff": 2 * width,
            "num_layers": 2,
            "num_heads": heads,
        },
        "ViT": inner | image | {"patch_size": scale.patch},
        "Swin": image
        | {
            "patch_size": 2,
            "embed_dim": width // 2,
            "depths": [2, 1],
            "num_heads": [heads // 2, heads],
            "window_size": 4,
        },
        "ConvNext": image
        | {"hidden_sizes": [width // 2, width], "depths": [1, 1], "num_stages": 2},
        "Llama": inner | {"num_key_value_heads": heads // 2},
        "Qwen3": inner | {"num_key_value_heads": heads // 2, "head_dim": width // heads},
        "DebertaV2": inner
        | {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 4,
        },
    }
    words = {} if family in VISION else {"vocab_size": scale.words}
    return special.get(family, inner) | words


def build(
    name: str, transformers: Any, scale: Scale = SMALL
) -> tuple[Losses, dict[str, Tensor], tuple[Tensor, ...]]:
    """Return losses of examples, parameters and a batch."""
    torch.manual_seed(0)
    family = CLASSES[name]
    config = getattr(transformers, f"{family}Config")(**options(family, scale))
    if family == "T5":
        config.decoder_start_token_id = 0
    net = getattr(transformers, name)(config).to(scale.dtype).eval()
    params = {key: value.detach() for key, value in net.named_parameters()}
    buffers = {key: value.detach() for key, value in net.named_buffers()}
    count, tokens = scale.examples, scale.tokens
    if family in VISION:
        images = torch.randn(count, 3, scale.pixels, scale.pixels).to(scale.dtype)

        def labelled(params: Any, x: Tensor, y: Tensor) -> Tensor:
            logits = functional_call(net, (params, buffers), (x,)).logits
            return F.cross_entropy(logits, y, reduction="none")

        return labelled, params, (images, torch.arange(count) % 2)
    ids, mask = torch.randint(3, scale.words, (count, tokens)), torch.ones(count, tokens)
    mask[1, 2 * tokens // 3 :] = mask[2, tokens // 2 :] = 0

    def written(params: Any, ids: Tensor, mask: Tensor) -> Tensor:
        given = {"input_ids": ids, "attention_mask": mask}
        if family == "T5":
            given["decoder_input_ids"] = ids
        logits = functional_call(net, (params, buffers), (), given).logits
        losses = F.cross_entropy(logits.transpose(1, 2), ids.roll(-1, 1), reduction="none")
        return (losses * mask).sum(1)

    return written, params, (ids, mask.long())
