"""Builds a tiny random model of any causal-LM type that transformers knows."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import nn

# Names by which configurations call the same few sizes. Only those that a configuration has are set.
_SIZES = dict(
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "model_dim"), 64),
    **dict.fromkeys(("embedding_size", "embedding_hidden_size", "attention_hidden_size", "lru_width"), 64),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "intermediate_size_mlp"), 96
    ),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "feed_forward_hidden_size", "block_ff_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size", "zero_expert_num"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), 320),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "moe_layer_start_index"), 1),
    **dict.fromkeys(("q_lora_rank",), 32),
    **dict.fromkeys(("kv_lora_rank", "v_head_dim", "head_dim", "global_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "laurel_rank"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_d_state", "ssm_state_size", "state_size", "d_state"), 16),
    **dict.fromkeys(("mamba_d_ssm",), 128),
    **dict.fromkeys(("linear_num_key_heads", "index_n_heads", "altup_num_inputs"), 2),
    **dict.fromkeys(("linear_num_value_heads", "linear_conv_kernel_dim", "time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("linear_head_dim", "nemo_conv_channels"), 16),
    **dict.fromkeys(("linear_num_heads",), 4),
    **dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), 320),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "index_topk"), 16),
    **dict.fromkeys(("sliding_window", "attention_window", "attention_chunk_size"), 32),
    num_kv_shared_layers=0,
    use_cache=True,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    sep_token_id=2,
    decoder_start_token_id=1,
)

# What a type needs beside these sizes; a dictionary goes to the part of the configuration of that name.
_MLA = {"head_dim": 8, "num_key_value_heads": 4}  # keys of every head come from one latent
_PAD = {"pad_token_id": 0}  # asked for, and not always there
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_BLT = {"hidden_size": 64, "cross_attn_k": 1, "hidden_size_global": 64}
_DOTS3 = {
    "num_hidden_layers": 4,
    "layer_types": ["indexed_attention", "indexed_attention", "sliding_attention", "sliding_attention"],
    "num_key_value_heads": 4,
    "shared_experts_intermediate_size": 32,
    **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 4),
    **dict.fromkeys(("swa_head_dim", "swa_v_head_dim", "swa_kv_lora_rank"), 16),
    "swa_qk_nope_head_dim": 8,
    "swa_q_lora_rank": 32,
}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 512,
    "split_ngram_parts": 4,
}
_OWN: dict[str, dict] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "longcat_flash", "youtu"), _MLA),
    "bailing_hybrid": {"num_expert_group": 1, "num_experts_per_tok": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "use_cache": False,  # a cache is made from a number of layers that its configuration has not
        "encoder_hash_byte_group_vocab": 512,
        "cross_attn_k": 1,
        "encoder_config": {**_BLT, "sliding_window": 512},  # any other is lost when transformers saves it
        "decoder_config": _BLT,
        "global_config": {"hidden_size": 64},
    },
    "codegen": {"rotary_dim": 8},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_v2": {**_MLA, "num_experts_per_tok": 2},
    "dots3_note": {
        "text_config": {
            **_DOTS3,
            "hidden_size": 64,
            "vocab_size": 320,
            **dict.fromkeys(("intermediate_size", "max_position_embeddings"), 96),
            **dict.fromkeys(("num_attention_heads", "n_routed_experts"), 4),
            **dict.fromkeys(("kv_lora_rank", "v_head_dim", "head_dim", "index_head_dim", "index_topk"), 16),
            **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
            **dict.fromkeys(("q_lora_rank", "moe_intermediate_size"), 32),
            **dict.fromkeys(("index_n_heads", "num_experts_per_tok"), 2),
            **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
        },
        "vision_config": {
            **dict.fromkeys(("hidden_size", "adapter_in_dim", "adapter_out_dim"), 64),
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "moe_intermediate_size": 32,
            "pyramid_num_routed": [-1, -1, 4, 4],
        },
        "audio_config": {
            **dict.fromkeys(("hidden_size", "adapter_input_size", "adapter_out_dim", "downsample_hidden_size"), 64),
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        },
    },
    "dots3_note_text": _DOTS3,
    "dory": {"sliding_window": 256},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "gemma3": {"vision_config": {"vision_use_head": False}},  # as google/gemma-3-4b-it has it
    "got_ocr2": {  # tables of positions, the larger part of a small tower, are less than 1 % of the real one
        "vision_config": {
            "image_size": 64,
            "window_size": 2,
            "output_channels": 32,
            "mlp_dim": 96,
            "global_attn_indexes": [1, 3],
        }
    },
    "gemma4_assistant": {
        "text_config": {
            **dict.fromkeys(("hidden_size_per_layer_input", "vocab_size_per_layer_input"), 0),
            **dict.fromkeys(("num_hidden_layers", "num_kv_shared_layers"), 4),
        }
    },
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {"num_experts_per_token": 2, "num_experts_per_tok": 2, "num_experts": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "musicgen": {"decoder": {"num_codebooks": 1}},  # else examples are several rows
    "musicgen_melody": {"decoder": {"num_codebooks": 1}},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    **dict.fromkeys(("phi", "stablelm"), _PAD),
    "phi4_multimodal": {"audio_config": {"num_blocks": 2, "ext_pw_out_channel": 64}},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "hash_seed": 0,  # else attention draws other hashes in every pass
        "axial_pos_shape": (16, 16),
        "axial_pos_embds_dim": (32, 32),
        "num_buckets": 4,
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
    },
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 2,
        "attention_hidden_size": 128,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 128},
    "zaya": {"num_experts_per_tok": 1},
}

_MOST_PARAMETERS = 60_000_000


def causal_types() -> list[str]:
    """Every `model_type` that AutoModelForCausalLM can build."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING)


def tiny_causal(model_type: str, seed: int = 0) -> nn.Module:
    """A causal language model of this type with about 64 channels, 4 layers and 320 tokens, in float32."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    torch.manual_seed(seed)
    config = tiny_config(model_type)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}]
    part = next((part for part in parts if type(part) is kind.config_class), None)
    if part is None or type(config) is kind.config_class:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:  # the model is one part of what the type describes: MusicGen's decoder
        model = kind._from_config(part, dtype=torch.float32)
    parameters = sum(p.numel() for p in model.parameters())
    if parameters > _MOST_PARAMETERS:
        raise RuntimeError(f"{model_type}: could not be made small, {parameters:,} parameters are left")
    return model.eval()


def examples_of(model: nn.Module, count: int = 40) -> list[dict] | None:
    """Inputs for a model that text alone does not run; None for any other.

    A drafting model reads the last hidden state of the model that it drafts for, and that one's keys and values.
    """
    if not type(model).__name__.endswith("AssistantForCausalLM"):
        return None
    generator = torch.Generator().manual_seed(2)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    shapes = {}
    for kind, layer in zip(model.config.get_text_config().layer_types, model.model.layers, strict=True):
        attention = layer.self_attn
        heads = attention.q_proj.out_features // attention.head_dim
        shapes[kind] = 1, heads // attention.num_key_value_groups, 9, attention.head_dim
    return [
        {
            "inputs_embeds": drawn(1, 1, model.pre_projection.in_features),
            "shared_kv_states": {kind: (drawn(*shape), drawn(*shape)) for kind, shape in shapes.items()},
            "position_ids": torch.full((1, 1), 8),
        }
        for _ in range(count)
    ]


def tiny_config(model_type: str):
    """The type's configuration with every size that has one of the usual names made small."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, own = CONFIG_MAPPING[model_type], _OWN.get(model_type, {})
    try:
        whole = kind()
    except Exception:  # defaults that it refuses itself
        whole = kind(**own)
    try:
        config = kind(**{**_wanted(whole), **own})
        for name in getattr(config, "sub_configs", None) or {}:
            if (part := getattr(config, name, None)) is not None:
                _shrink(part)
    except Exception:  # a check of its own between sizes: they are then set one by one
        config = _shrink(whole)
    _give(config, own)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def _give(config, own: dict) -> None:
    """Set what a type needs, which goes before the usual sizes."""
    for name, value in own.items():
        part = getattr(config, name, None)
        if isinstance(value, dict) and hasattr(part, "to_dict"):
            _give(part, value)
        else:
            _set(config, name, value)


def _wanted(config) -> dict:
    known = config.to_dict()
    wanted = {k: v for k, v in _SIZES.items() if known.get(k) is not None and not isinstance(known[k], (list, dict))}
    if isinstance(known.get("layer_types"), list):  # one layer of each kind first
        kinds = list(dict.fromkeys(known["layer_types"]))
        wanted["layer_types"] = (kinds * 4)[:4]
    return wanted


def _shrink(config, depth: int = 0):
    known = config.to_dict()
    for name, size in _SIZES.items():
        if known.get(name) is not None and not isinstance(known[name], (list, dict)):
            _set(config, name, size)
    for name in getattr(config, "sub_configs", None) or {}:
        if (part := getattr(config, name, None)) is not None and depth < 2:
            _shrink(part, depth + 1)
    layers = getattr(config, "num_hidden_layers", None)
    for name, value in config.to_dict().items():
        if isinstance(value, list) and isinstance(layers, int) and len(value) > layers and name != "architectures":
            kinds = [x for i, x in enumerate(value) if x not in value[:i]]
            _set(config, name, (kinds + value)[:layers])
    return config


def _set(config, name: str, value) -> None:
    with suppress(Exception):  # a property of this configuration: it follows from others
        setattr(config, name, value)
