"""Every class of the installed transformers that makes logits of text, tiny: from its configuration, no network.

A configuration is taken as it comes and every size in it is replaced by a small one of the same meaning, so that a
class nobody here has heard of is built as well. What a family demands beside that is a row of ``SPECIAL``.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto as auto

VOCAB, FEATURES, HEADS, LENGTH = 96, 32, 4, 8
LARGEST = 25_000_000  # parameters; a class with more has a size that the tables below do not know
# Class to the list of transformers it stands in, the first of several.
KINDS: dict[str, str] = {
    name: kind
    for kind, names in (
        ("image and text", auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES),
        ("image and text", auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
        ("text to text", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        ("causal", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    )
    for name in names.values()
}
NAMES = tuple(sorted(KINDS))

_SAME: tuple[tuple[Any, str], ...] = (
    (VOCAB, "vocab_size decoder_vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size t2u_vocab_size"),
    (VOCAB, "char_vocab_size unit_hifi_gan_vocab_size pronunciation_vocab_size shape_vocab_size"),
    (FEATURES, "hidden_size d_model n_embd embedding_size emb_dim word_embed_proj_dim embedding_dim embed_dim"),
    (FEATURES, "input_embedding_size output_embedding_size lru_width backbone_hidden_size output_dim ple_embed_dim"),
    (FEATURES, "attention_hidden_size pronunciation_embed_dim shape_embed_dim hc_lowrank router_hidden_size"),
    (FEATURES, "hidden_size_global hidden_dim out_hidden_size text_hidden_size projector_hidden_size"),
    (48, "intermediate_size ffn_dim ffn_hidden_size d_ff dff dim_ff decoder_ffn_dim encoder_ffn_dim n_inner d_inner"),
    (48, "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size feed_forward_size"),
    (48, "expert_ffn_hidden_size dense_intermediate_size intermediate_size_mlp moe_shared_expert_intermediate_size"),
    (2, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers num_blocks"),
    (2, "num_encoder_layers num_layers_per_stack speech_encoder_layers t2u_encoder_layers t2u_decoder_layers depth"),
    (1, "num_sparse_encoder_layers num_sparse_decoder_layers first_k_dense_replace num_dense_layers"),
    (HEADS, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
    (HEADS, "attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads"),
    (HEADS, "speech_encoder_attention_heads t2u_encoder_attention_heads t2u_decoder_attention_heads index_n_heads"),
    (8, "head_dim d_kv dim_head kv_channels d_head attention_head_size swa_head_dim index_head_dim rotary_dim"),
    (8, "v_head_dim qk_nope_head_dim qk_rope_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim"),
    (16, "q_lora_rank kv_lora_rank o_lora_rank d_rel rel_extent laurel_rank hidden_size_per_layer_input adapter_rank"),
    (HEADS, "linear_num_key_heads linear_num_value_heads linear_num_heads"),
    (64, "max_position_embeddings n_positions n_ctx max_seq_len max_source_positions max_target_positions"),
    (64, "model_max_length max_encoder_position_embeddings max_decoder_position_embeddings context_length"),
    (64, "original_max_position_embeddings t2u_max_position_embeddings encoder_hash_byte_group_vocab"),
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k n_group topk_group num_expert_group"),
    (8, "mamba_d_state ssm_state_size state_size time_step_rank mamba_dt_rank mamba_d_head mamba_head_dim"),
    (8, "mamba_headdim mamba_n_heads mamba_num_heads n_mamba_heads"),
    (64, "mamba_d_ssm"),
    (16, "chunk_size mamba_chunk_size"),
    (4, "num_centroids centroid_intermediate_top_k num_codebooks prompt_length prompt_mid_dim num_global_tokens"),
    # What a model does to its logits: values near one would hide that it was left out.
    (2.0, "final_logit_softcapping logits_soft_cap output_logit_soft_cap"),
    (0.3, "logit_scale lm_head_multiplier output_multiplier"),
    (3.0, "logits_scaling logits_mup_width_multiplier"),
    (0.1, "z_loss_coefficient"),
)
SIZES: dict[str, Any] = {name: value for value, names in _SAME for name in names.split()}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_SHARED_BLOCK: dict[str, Any] = {
    "attention_hidden_size": 2 * FEATURES,
    "attention_head_dim": 16,
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
}
# What a class demands beside those: fields of its configuration, dotted for one inside another.
SPECIAL: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "ChameleonForConditionalGeneration": {"vocabulary_map": {"<image>": VOCAB - 1}},
    "CohereCompassForCausalLM": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)},
    "DbrxForCausalLM": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 2},
    "Dots1ForCausalLM": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "Dots3NoteForCausalLM": {
        "num_key_value_heads": HEADS,
        "head_dim": 16,
        "per_layer_config": {2: {"num_attention_heads": 2, "num_key_value_heads": 2}},
    },
    "Emu3ForConditionalGeneration": {"vocabulary_map": {"<image>": VOCAB - 1}},
    "Gemma3nForCausalLM": {"num_kv_shared_layers": 0},
    "GitForCausalLM": {"vision_config.image_size": 32, "vision_config.patch_size": 16},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["linear_attention", "full_attention"]},
    "Granite4VisionForConditionalGeneration": {"downsample_rate": "1/2", "spatial_target_layers": [0, 1, 0, 1]},
    "GraniteSpeechForConditionalGeneration": {"projector_config.encoder_hidden_size": FEATURES},
    "GraniteSpeechPlusForConditionalGeneration": {"projector_config.encoder_hidden_size": FEATURES},
    "HrmTextForCausalLM": {"num_hidden_layers": 16},  # every pass through its two stacks counts
    "HunYuanDenseV1ForCausalLM": {"head_dim": 8},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 8},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "KyutaiSpeechToTextForConditionalGeneration": {"codec_config.upsample_groups": FEATURES},
    "LEDForConditionalGeneration": {"attention_window": 4},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Mamba2ForCausalLM": {"num_heads": 8},
    "MinistralForCausalLM": {"head_dim": 8},
    "Mistral4ForCausalLM": {"head_dim": 16},
    "MuseSparkForConditionalGeneration": {"audio_config.hidden_sizes": [FEATURES] * 4},
    "MusicgenForCausalLM": {"num_codebooks": 1},
    "MusicgenMelodyForCausalLM": {"num_codebooks": 1},
    "Nemotron3_5TranscribeForConditionalGeneration": {
        "audio_config.diarization_config.head_config.audio_hidden_size": FEATURES,
    },
    "NemotronForCausalLM": {"num_key_value_heads": 2},
    "Qwen4ExpForCausalLM": {
        "indexer_n_heads": HEADS,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "RecurrentGemmaForCausalLM": {"block_types": ["recurrent", "attention"]},
    "Qwen2_5OmniThinkerForConditionalGeneration": {"vision_start_token_id": VOCAB - 1},
    "Qwen3OmniMoeThinkerForConditionalGeneration": {"vision_start_token_id": VOCAB - 1},
    "ReformerModelWithLMHead": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "hash_seed": 0,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    },
    "Step3p7ForConditionalGeneration": {"text_config.sliding_window": 4},
    "VibeVoiceAsrForConditionalGeneration": {
        f"{part}_tokenizer_encoder_config.{name}": value
        for part in ("acoustic", "semantic")
        for name, value in (("num_filters", 1), ("depths", [1] * 7))
    },
    "XmodForCausalLM": {"default_language": "en_XX"},
    "ZambaForCausalLM": _SHARED_BLOCK,
    "Zamba2ForCausalLM": {**_SHARED_BLOCK, "kv_channels": 16},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
    "xLSTMForCausalLM": {"hidden_size": 128, "embedding_dim": 128},  # its cache counts in 64s
}
# Classes whose text configuration demands what the causal class of the family does.
_TEXTS = {
    "CohereCompassForConditionalGeneration": "CohereCompassForCausalLM",
    "Dots3NoteForConditionalGeneration": "Dots3NoteForCausalLM",
    "HunYuanVLForConditionalGeneration": "HunYuanDenseV1ForCausalLM",
    "Qwen4ExpForConditionalGeneration": "Qwen4ExpForCausalLM",
}
for _name, _family in _TEXTS.items():
    SPECIAL[_name] = {f"text_config.{key}": value for key, value in SPECIAL[_family].items()}
# Three axes share the rotary pairs of a head.
for _name, _sections in {
    "Glm46VForConditionalGeneration": [2, 1, 1],
    "Glm4vForConditionalGeneration": [2, 1, 1],
    "Glm4vMoeForConditionalGeneration": [1, 1, 0],
    "GlmOcrForConditionalGeneration": [2, 1, 1],
    "HunYuanVLForConditionalGeneration": [2, 1, 1],
    "PaddleOCRVLForConditionalGeneration": [2, 1, 1],
    "Qwen2VLForConditionalGeneration": [2, 1, 1],
    "Qwen2_5_VLForConditionalGeneration": [2, 1, 1],
    "Qwen2_5OmniThinkerForConditionalGeneration": [2, 1, 1],
}.items():
    SPECIAL.setdefault(_name, {})["text_config.rope_parameters"] = {**_ROPE, "mrope_section": _sections}
TRAINS_IN_TRAINING_MODE = ("ReformerModelWithLMHead",)  # it refuses gradients otherwise; its dropouts are zero above
# What cannot be run on tokens alone.
NEEDS = {
    "Gemma4AssistantForCausalLM": "it reads the keys, values and hidden states of another model",
    "Gemma4UnifiedAssistantForCausalLM": "it reads the keys, values and hidden states of another model",
    "VoxtralRealtimeForConditionalGeneration": "it reads audio beside every token",
}


class NotBuiltError(Exception):
    """Why a class has no tiny form here."""


def tiny_config(name: str) -> PreTrainedConfig:
    """The configuration of a class with every size in it made small."""
    kind = getattr(transformers, name).config_class
    return kind(**_shrunk(kind(), SPECIAL.get(name, {})))


def _shrunk(config: PreTrainedConfig, special: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for another of the same class."""
    given = config.to_dict()
    chosen: dict[str, Any] = {}
    for key, value in given.items():
        inner = vars(config).get(key)
        if isinstance(inner, PreTrainedConfig):
            own = {path.split(".", 1)[1]: wanted for path, wanted in special.items() if path.startswith(key + ".")}
            chosen[key] = {**_shrunk(inner, own), "model_type": inner.model_type}
        elif key in SIZES:
            chosen[key] = _small(key, value)
        elif key.endswith(("_token_id", "_token_index")) and isinstance(value, int | list):
            chosen[key] = _TOKENS.get(key, VOCAB - 1)
    for counter in ("num_hidden_layers", "num_layers", "n_layer"):
        chosen.update(_layers({**given, **chosen}, given.get(counter), counter))
    chosen.update(_kv_heads(given))
    chosen.update({key: value for key, value in special.items() if "." not in key})
    return chosen


def _small(key: str, value: Any) -> Any:
    """The small value for a size, or one for each layer; anything but a number stays."""
    if isinstance(value, list):
        return [_small(key, each) for each in value]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return SIZES[key] if number and key in SIZES else value


def _layers(given: dict[str, Any], total: int | None, counter: str) -> dict[str, Any]:
    """One layer of each kind that a class alternates between, four at most and two at least."""
    lists = {key: value for key, value in given.items() if isinstance(value, list) and len(value) == total}
    if not lists or total is None or total < 2:
        return {}
    kinds = list(zip(*(map(str, value) for value in lists.values()), strict=True))
    kept = sorted({kind: index for index, kind in reversed(list(enumerate(kinds)))}.values())[:4]
    if len(kept) < 2:
        kept = [0, 1]
    chosen: dict[str, Any] = {key: [value[index] for index in kept] for key, value in lists.items()}
    if given.get("per_layer_config"):
        own = {int(index): values for index, values in given["per_layer_config"].items()}
        chosen["per_layer_config"] = {
            new: {key: _small(key, value) for key, value in own[old].items()}
            for new, old in enumerate(kept)
            if old in own
        }
    return {counter: len(kept), **chosen}


def _kv_heads(given: dict[str, Any]) -> dict[str, Any]:
    """Two heads for keys and values where they are fewer than the queries', one where there is one."""
    chosen = {}
    for key in ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"):
        value = given.get(key)
        if isinstance(value, int):
            queries = given.get("swa_num_attention_heads" if key.startswith("swa") else "num_attention_heads")
            chosen[key] = HEADS if value == queries else min(value, 2)
    return chosen


def build(name: str) -> Any:
    """The class, tiny, in float32 and without dropout, with a head whose logits are far from equal.

    Raises ``NotBuiltError`` with the reason where it has no tiny form.
    """
    if name in NEEDS:
        raise NotBuiltError(NEEDS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            cls: Any = getattr(transformers, name)
            config = tiny_config(name)
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in cls(config).parameters())
        except Exception as error:
            raise NotBuiltError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
        if size > LARGEST:
            raise NotBuiltError(f"{size:,} parameters although every size that is known here was made small")
        torch.manual_seed(0)
        model = cls._from_config(tiny_config(name), attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        _spread_logits(model)
    return model.float().train(name in TRAINS_IN_TRAINING_MODE)


def _spread_logits(model: Any) -> None:
    """Weights, biases and offsets that show when one of them is left out."""
    head = model.get_output_embeddings()
    own = () if head is None else head.parameters()
    for tensor in (*own, *(b for name, b in model.named_buffers() if name.endswith("final_logits_bias"))):
        tensor.normal_(0, 0.3)


def inputs_of(model: Any) -> tuple[dict[str, Any], Tensor]:
    """What the class is called with beside labels, and the labels [2, LENGTH], two of them ignored.

    Musicgen's classes want them as ``[..., None]``: one more axis, of codebooks.
    """
    chance = torch.Generator().manual_seed(0)
    ids, answer = torch.randint(3, VOCAB - 8, (2, 2, LENGTH), generator=chance)
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    inputs = {key: value for key, value in inputs.items() if key in accepted}
    labels = ids.clone()
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = labels = answer
        labels = labels.clone()
    if type(model).__name__ == "GitForCausalLM":  # its loss leaves the image's positions out, so there has to be one
        inputs["pixel_values"] = torch.randn(2, 3, 32, 32, generator=chance)
    labels[0, :2] = -100
    return inputs, labels
