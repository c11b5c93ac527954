"""Small models of every architecture that the installed transformers knows, from its own configs made small.

A config class's defaults are the published sizes. Here every size gets a small value by its name, nested configs too;
what then contradicts itself is an architecture that this cannot build, and the study says so.
"""

import inspect
import re
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto as auto

WIDTH, HEADS, LAYERS, VOCABULARY, IMAGE, PATCH = 32, 4, 2, 96, 32, 8
# The end of an attribute's name, first match -> its value. Lists keep their length.
SIZES: tuple[tuple[str, int], ...] = (
    (r"^(ngram_)?vocab_size(_per_layer_input)?$|^num_(embeddings|tokens)$|_vocab_size$", VOCABULARY),
    (r"^(num_|n_)(key_value|kv)_heads?$|^num_key_value_heads$|^n_head_kv$|^attn_num_kv_heads$", HEADS // 2),
    (r"(^|_)(num|n)_?(attention_)?heads?$|^(encoder|decoder)_(attention_)?heads$|^num_heads$|^n_head$|^attention_heads$"
     r"|^(encoder|decoder|text|vision)_?(num_)?(attention_)?heads$|^num_(text|vision|encoder|decoder)_attention_heads$"
     r"|_num_attention_heads$|^ssm_num_heads$", HEADS),
    (r"^(num_(hidden_)?layers?|n_layers?|num_layers|depth|(encoder|decoder|text|vision)_(num_)?(hidden_)?layers"
     r"|num_(encoder|decoder|text|vision)_(hidden_)?layers|num_blocks|n_blocks|.*_num_hidden_layers|.*_num_layers)$",
     LAYERS),
    (r"^(num_(local_|routed_)?experts|n_routed_experts|num_local_experts|moe_num_experts|n_experts)$", 4),
    (r"^(num_experts_per_tok|num_experts_per_token|top_k|moe_k|moe_topk|topk|moe_top_k|experts_per_token)$", 2),
    (r"^(n_group|topk_group|n_groups|num_expert_group)$", 1),
    (r"^(q_lora_rank|kv_lora_rank)$", 16),
    (r"^(qk_nope_head_dim|v_head_dim|head_dim|attention_head_dim|d_kv|kv_channels|global_head_dim"
     r"|linear_(key|value)_head_dim)$", WIDTH // HEADS),
    (r"^(qk_rope_head_dim)$", WIDTH // HEADS),
    (r"^(d_ff|.*intermediate_size|.*ffn_dim|ffn_hidden_size|n_inner|dim_feedforward|.*feedforward_dim"
     r"|shared_intermediate_size|mlp_hidden_size|.*_ffn_hidden_size|hidden_dim_ffn|ff_dim|encoder_mlp_dim|mlp_dim)$",
     WIDTH + 16),
    (r"^(hidden_size|d_model|n_embd|dim|embed_dim|emb_dim|embedding_size|.*_hidden_size|.*hidden_dim|.*embed_dim|"
     r"projection_dim|out_hidden_size|output_dim|proj_dim|.*projection_dim|word_embed_proj_dim|encoder_dim"
     r"|.*_d_model|.*projection_size)$", WIDTH),
    (r"^(image_size|img_size|input_size)$", IMAGE),
    (r"^(patch_size)$", PATCH),
    (r"^(max_position_embeddings|n_positions|n_ctx|max_source_positions|max_target_positions|max_seq_len)$", 64),
    (r"^(state_size|ssm_state_size|mamba_d_state|d_state)$", 8),
    (r"^(mamba_n_heads|mamba_num_heads|linear_num_value_heads|linear_num_key_heads)$", HEADS),
)  # fmt: skip
FIXED = {"pad_token_id": 0, "use_cache": False, "dropout": 0.0, "layerdrop": 0.0}
TASKS = (  # the first of these that a model type has is what is built
    "MODEL_FOR_CAUSAL_LM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", "MODEL_FOR_IMAGE_TEXT_TO_TEXT", "MODEL_FOR_MASKED_LM",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ", "MODEL_FOR_CTC", "MODEL_FOR_IMAGE_CLASSIFICATION", "MODEL_FOR_SEMANTIC_SEGMENTATION",
    "MODEL_FOR_OBJECT_DETECTION", "MODEL_FOR_UNIVERSAL_SEGMENTATION", "MODEL_FOR_DEPTH_ESTIMATION",
    "MODEL_FOR_AUDIO_CLASSIFICATION", "MODEL_FOR_VIDEO_CLASSIFICATION", "MODEL_FOR_SEQUENCE_CLASSIFICATION", "MODEL",
)  # fmt: skip


def architectures() -> dict[str, tuple[str, str]]:
    """Model type -> the class that is built, and its task."""
    found: dict[str, tuple[str, str]] = {}
    for task in TASKS:
        for model_type, name in getattr(auto, f"{task}_MAPPING_NAMES").items():
            for one in (name,) if isinstance(name, str) else name[:1]:
                found.setdefault(model_type, (one, task.removeprefix("MODEL").removeprefix("_FOR_").lower() or "model"))
    return dict(sorted(found.items()))


def config_of(name: str) -> Any:
    """The small config of a model class."""
    kind = getattr(transformers, name)
    config = kind.config_class()
    shrink(config)
    return config


def shrink(config: Any) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            shrink(value)
        elif name in FIXED:
            assign(config, name, FIXED[name])
        elif type(value) is int and (small := small_size(name)) is not None:
            assign(config, name, small if value else 0)
        elif isinstance(value, list | tuple) and value and all(type(one) is int for one in value):
            if (small := small_size(name.removesuffix("s"))) is not None or (small := small_size(name)) is not None:
                assign(config, name, [small] * len(value))
            elif name in ("depths", "hidden_sizes", "num_channels"):
                assign(config, name, [1] * len(value) if name == "depths" else [WIDTH] * len(value))
        elif isinstance(value, str) and name in ("layer_types", "layers_block_type"):
            continue
    layers = getattr(config, "num_hidden_layers", LAYERS)
    for name in ("layer_types", "layers_block_type", "mlp_layer_types", "attn_layer_indices"):
        if isinstance(getattr(config, name, None), list) and getattr(config, name):
            assign(config, name, getattr(config, name)[-layers:])
    fit_rotary(config)
    if getattr(config, "kv_lora_rank", None):  # latent attention has no groups
        assign(config, "num_key_value_heads", HEADS)
    if getattr(config, "rotary_dim", None):
        assign(config, "rotary_dim", WIDTH // HEADS // 2)
    for name, value in vars(config).items():
        if name.endswith("_token_id") and type(value) is int and value >= VOCABULARY:
            assign(config, name, 1)


def fit_rotary(config: Any) -> None:
    """Sections of a multimodal rotary embedding must add up to half a head."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = getattr(config, name, None)
        if isinstance(rope, dict) and "mrope_section" in rope:
            rope["mrope_section"] = [2, 1, 1] if rope.get("partial_rotary_factor", 1) == 1 else [1, 1, 0]


def assign(config: Any, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except Exception:  # a property, or a validated value: left as it is
        return


def small_size(name: str) -> int | None:
    return next((value for pattern, value in SIZES if re.search(pattern, name)), None)


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    """What the model's forward needs, by the names of its arguments."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    accepted = inspect.signature(model.forward).parameters
    found: dict[str, torch.Tensor] = {}
    tokens = torch.randint(3, VOCABULARY - 8, (1, 12), generator=generator)
    vision = getattr(config, "vision_config", None) or config
    side = getattr(vision, "image_size", IMAGE) or IMAGE
    side = side if isinstance(side, int) else side[0]
    channels = getattr(vision, "num_channels", 3)
    main = getattr(model, "main_input_name", "input_ids")
    if "input_ids" in accepted:
        found["input_ids"] = tokens
    if "pixel_values" in accepted and ("input_ids" not in accepted or main == "pixel_values"):
        found["pixel_values"] = torch.randn(
            1, channels if type(channels) is int else 3, side, side, generator=generator
        )
    if "pixel_values_videos" in accepted and "input_ids" not in accepted:
        frames = getattr(config, "num_frames", 2)
        found["pixel_values_videos"] = torch.randn(1, frames, 3, side, side, generator=generator)
    if "input_values" in accepted and "input_ids" not in accepted:
        found["input_values"] = torch.randn(1, 2000, generator=generator)
    if "input_features" in accepted and "input_ids" not in accepted:
        bins = next((getattr(config, n) for n in ("num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim")
                     if getattr(config, n, None)), 80)  # fmt: skip
        found["input_features"] = torch.randn(1, bins, 128, generator=generator)
    if "decoder_input_ids" in accepted:
        found["decoder_input_ids"] = torch.randint(3, VOCABULARY - 8, (1, 6), generator=generator)
    if "bbox" in accepted:
        found["bbox"] = torch.zeros(1, 12, 4, dtype=torch.long)
    return found
