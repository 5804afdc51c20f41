"""Public models of `transformers` with random weights: what each is called with."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

os.environ.setdefault("HF_HUB_OFFLINE", "1")

Losses = Callable[..., Tensor]
EXAMPLES, TOKENS, WORDS = 3, 6, 40
SHARED = {"num_hidden_layers": 2, "num_attention_heads": 2}
LANGUAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHead": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}),
    "BertForMaskedLM": ("Bert", {"hidden_size": 16, "intermediate_size": 32, **SHARED}),
    "RobertaForMaskedLM": ("Roberta", {"hidden_size": 16, "intermediate_size": 32, **SHARED}),
    "LlamaForCausalLM": (
        "Llama",
        {"hidden_size": 16, "intermediate_size": 32, "num_key_value_heads": 1, **SHARED},
    ),
    "Qwen3ForCausalLM": (
        "Qwen3",
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_key_value_heads": 1,
            "head_dim": 8,
            **SHARED,
        },
    ),
    "OPTForCausalLM": (
        "OPT",
        {"hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16, **SHARED},
    ),
    "T5ForConditionalGeneration": (
        "T5",
        {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
    ),
    "DebertaV2ForMaskedLM": (
        "DebertaV2",
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 4,
            **SHARED,
        },
    ),
}
VISION: dict[str, tuple[str, dict[str, Any]]] = {
    "ViTForImageClassification": (
        "ViT",
        {"hidden_size": 16, "intermediate_size": 32, "image_size": 8, "patch_size": 4, **SHARED},
    ),
    "SwinForImageClassification": (
        "Swin",
        {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [2, 1],
            "num_heads": [1, 2],
            "window_size": 4,
        },
    ),
    "ConvNextForImageClassification": (
        "ConvNext",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 16},
    ),
}
NAMES = [*LANGUAGE, *VISION]


def build(name: str, transformers: Any) -> tuple[Losses, dict[str, Tensor], tuple[Tensor, ...]]:
    """Return losses of examples, parameters and a batch, in float64."""
    torch.manual_seed(0)
    family, options = (LANGUAGE | VISION)[name]
    if name in LANGUAGE:
        options = options | {"vocab_size": WORDS}
    config = getattr(transformers, f"{family}Config")(**options)
    if family == "T5":
        config.decoder_start_token_id = 0
    name = name + "Model" if family == "GPT2" else name
    net = getattr(transformers, name)(config).double().eval()
    params = {key: value.detach() for key, value in net.named_parameters()}
    buffers = {key: value.detach() for key, value in net.named_buffers()}
    if family in [family for family, _ in VISION.values()]:
        images = torch.randn(EXAMPLES, 3, config.image_size, config.image_size).double()

        def labelled(params: Any, x: Tensor, y: Tensor) -> Tensor:
            logits = functional_call(net, (params, buffers), (x,)).logits
            return F.cross_entropy(logits, y, reduction="none")

        return labelled, params, (images, torch.arange(EXAMPLES) % 2)
    ids, mask = torch.randint(3, WORDS, (EXAMPLES, TOKENS)), torch.ones(EXAMPLES, TOKENS)
    mask[1, 4:] = mask[2, 3:] = 0

    def written(params: Any, ids: Tensor, mask: Tensor) -> Tensor:
        given = {"input_ids": ids, "attention_mask": mask}
        if family == "T5":
            given["decoder_input_ids"] = ids
        logits = functional_call(net, (params, buffers), (), given).logits
        losses = F.cross_entropy(logits.transpose(1, 2), ids.roll(-1, 1), reduction="none")
        return (losses * mask).sum(1)

    return written, params, (ids, mask.long())
