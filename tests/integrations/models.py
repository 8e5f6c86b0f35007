"""Tiny random models from configurations, and what a trainer is to the code under test."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.inkling.configuration_inkling import InklingTextConfig
from transformers.models.inkling2.configuration_inkling2 import Inkling2TextConfig

from orpo_kernels.integrations.fused import Batch
from orpo_kernels.integrations.trainer import Settings

transformers.logging.set_verbosity_error()

VOCAB, FEATURES = 97, 32
TOKENS: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE: dict[str, Any] = {
    **TOKENS,
    "hidden_size": FEATURES,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # large weights, so that a softcap or a scale that is read wrongly shows
}
GPT: dict[str, Any] = {**TOKENS, "n_embd": FEATURES, "n_layer": 2, "n_head": 4, "n_positions": 64}


class _Output(dict[str, Any]):
    """What a model's body returns: hidden states, and None for whatever else is asked of it."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __getitem__(self, index: Any) -> Any:
        return self["last_hidden_state"] if index == 0 else super().__getitem__(index)


class _Body(nn.Module):
    """In place of a body that has no small form: an embedding."""

    vocabulary_mapping = types.SimpleNamespace(image_tokens=[93, 95, 96])  # Chameleon's

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, FEATURES)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(self, input_ids: torch.Tensor, **_: Any) -> _Output:
        return _Output(last_hidden_state=self.embed_tokens(input_ids))


def _head_of(cls: Any, config: Any, **attributes: Any) -> Any:
    """A model class's own forward over a head of our size and no body."""
    model = cls.__new__(cls)
    nn.Module.__init__(model)
    model.config = config
    model.model = model.backbone = _Body()
    model.lm_head = nn.Linear(FEATURES, VOCAB, bias=False)
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def llama(cls: Any = transformers.LlamaForCausalLM, **options: Any) -> Any:
    torch.manual_seed(0)
    return cls(transformers.LlamaConfig(**{**SHAPE, **options}))


def _auto(kind: str, shape: dict[str, Any] | None = None, **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        config = getattr(transformers, kind)(**{**(SHAPE if shape is None else shape), **options})
        return AutoModelForCausalLM.from_config(config)

    return build


_MUSE = {"output_multiplier": 0.3, "final_logit_softcapping": 2.0}
_FEW_EXPERTS: dict[str, Any] = {
    "head_dim": 8,
    "swa_head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "rel_extent": 16,
}
_DECODER = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
# A model, and what it is to be read as beside its 97 columns. Each is a row of what heads in transformers do.
ROWS: dict[str, tuple[Callable[[], Any], str]] = {
    "llama": (llama, ""),
    "gpt2": (_auto("GPT2Config", GPT), ""),
    "gemma2": (_auto("Gemma2Config", head_dim=8, final_logit_softcapping=2.0), ", softcap 2"),
    "gemma3": (_auto("Gemma3TextConfig", head_dim=8, final_logit_softcapping=2.0), ", softcap 2"),
    "vaultgemma": (_auto("VaultGemmaConfig", head_dim=8, final_logit_softcapping=2.0), ", softcap 2"),
    "nanochat": (_auto("NanoChatConfig", final_logit_softcapping=2.0), ", softcap 2"),
    "recurrent_gemma": (
        _auto(
            "RecurrentGemmaConfig",
            logits_soft_cap=2.0,
            lru_width=FEATURES,
            attention_window_size=16,
            block_types=("recurrent", "attention"),
        ),
        ", softcap 2",
    ),
    "xlstm": (
        lambda: _head_of(
            transformers.xLSTMForCausalLM,
            transformers.xLSTMConfig(output_logit_soft_cap=2.0, max_inference_chunksize=4),
        ),
        ", softcap 2",
    ),
    "muse_glimmer": (
        lambda: _head_of(
            transformers.MuseGlimmerForConditionalGeneration, transformers.MuseGlimmerConfig(text_config=dict(_MUSE))
        ),
        ", scale 0.3, softcap 2",
    ),
    "muse_spark": (
        lambda: _head_of(
            transformers.MuseSparkForConditionalGeneration, transformers.MuseSparkConfig(text_config=dict(_MUSE))
        ),
        ", scale 0.3, softcap 2",
    ),
    "cohere": (_auto("CohereConfig", logit_scale=0.3), ", scale 0.3"),
    "cohere2": (_auto("Cohere2Config", logit_scale=0.3, head_dim=8), ", scale 0.3"),
    "cohere_compass": (
        lambda: _head_of(
            transformers.CohereCompassForConditionalGeneration, transformers.CohereCompassConfig(), logit_scale=0.3
        ),
        ", scale 0.3",
    ),
    "granite": (_auto("GraniteConfig", logits_scaling=3.0), ", scale 0.333333"),
    "granitemoe": (_auto("GraniteMoeConfig", logits_scaling=3.0, num_local_experts=4), ", scale 0.333333"),
    "granitemoehybrid": (
        _auto(
            "GraniteMoeHybridConfig",
            logits_scaling=3.0,
            layer_types=["attention", "attention"],
            shared_intermediate_size=16,
            num_local_experts=0,
            mamba_n_heads=2,
        ),
        ", scale 0.333333",
    ),
    "minicpm3 divides hidden states": (
        _auto(
            "MiniCPM3Config",
            num_key_value_heads=4,
            q_lora_rank=16,
            kv_lora_rank=8,
            qk_nope_head_dim=4,
            qk_rope_head_dim=4,
            v_head_dim=8,
            dim_model_base=8,
        ),
        "",
    ),
    "hyperclovax multiplies": (_auto("HyperCLOVAXConfig", logits_scaling=0.4, head_dim=8), ", scale 0.4"),
    "falcon_h1": (
        _auto(
            "FalconH1Config", lm_head_multiplier=0.3, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8
        ),
        ", scale 0.3",
    ),
    "inkling slices": (
        lambda: AutoModelForCausalLM.from_config(InklingTextConfig(**SHAPE, **_FEW_EXPERTS, unpadded_vocab_size=90)),
        "slice",
    ),
    "inkling2 slices and caps": (
        lambda: AutoModelForCausalLM.from_config(
            Inkling2TextConfig(**SHAPE, **_FEW_EXPERTS, unpadded_vocab_size=90, final_logit_softcapping=2.0)
        ),
        "slice, softcap 2",
    ),
    "mpt ignores its scale": (
        lambda: AutoModelForCausalLM.from_config(
            transformers.MptConfig(**TOKENS, d_model=FEATURES, n_heads=4, n_layers=2, logit_scale=0.3)
        ),
        "",
    ),
    "phi has a bias": (_auto("PhiConfig"), ""),
    "gptj has a bias": (_auto("GPTJConfig", GPT, rotary_dim=4), ""),
    "codegen has a bias": (_auto("CodeGenConfig", GPT, rotary_dim=4), ""),
    "bert transforms before": (_auto("BertConfig", is_decoder=True), ""),
    "electra transforms before": (_auto("ElectraConfig", is_decoder=True, embedding_size=FEATURES), ""),
    "modernbert transforms before": (_auto("ModernBertDecoderConfig"), ""),
    "opt projects before": (_auto("OPTConfig", word_embed_proj_dim=16, ffn_dim=48), ""),
    "bart": (_auto("BartConfig", TOKENS, d_model=FEATURES, **_DECODER), ""),
    "chameleon masks": (
        lambda: _head_of(transformers.ChameleonForConditionalGeneration, transformers.ChameleonConfig()),
        ", 3 of them masked",
    ),
}


def build(name: str) -> tuple[Any, str]:
    """A model without dropout, and what it is to be read as."""
    torch.manual_seed(0)
    make, expected = ROWS[name]
    model = make().float().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    head = model.get_output_embeddings()
    if head.bias is not None:
        nn.init.normal_(head.bias)
    expected = expected.replace("slice", "90 columns") if expected.startswith("slice") else f"{VOCAB} columns{expected}"
    return model, expected


class FakeTrainer:
    """As much of a ``transformers.Trainer`` as a fused forward looks at."""

    class _Accelerator:
        is_local_main_process = True
        state = types.SimpleNamespace()

        @staticmethod
        def unwrap_model(model: Any) -> Any:
            return model

    def __init__(self) -> None:
        self.accelerator = self._Accelerator()
        self.args = types.SimpleNamespace()


class FakePatch:
    """As much of a patch."""

    def __init__(self, **settings: Any) -> None:
        self.settings = Settings(**settings)


def batch(pairs: int = 2, length: int = 9, seed: int = 0) -> Batch:
    """Token ids below every mask and slice of the models above, with a prompt of three tokens."""
    chance = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (2 * pairs, length), generator=chance)
    nll = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    answer = nll.clone()
    answer[:, :2] = -100
    return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, answer, nll[:pairs], -100)
