"""The families of models, and the fields of config.json that each may have.

A field that is in none of these lists is refused by its name: an ignored rope or activation setting
would train a different model in silence.
"""

# model_type -> architecture
FAMILIES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}

# Fields that config.py reads, of every family and of some.
MAPPED = frozenset(
    """
    model_type architectures hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim vocab_size max_position_embeddings rms_norm_eps rope_theta
    rope_scaling rope_parameters tie_word_embeddings partial_rotary_factor attention_bias
    """.split()
)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # names of one number
OWN_EXPERTS = {"qwen3_moe": "num_experts", "glm4_moe": "n_routed_experts"}  # which the engine reads
MAPPED_MOE = {*EXPERTS, "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"}
MAPPED_OF = {
    "qwen3_moe": MAPPED_MOE,
    "glm4_moe": MAPPED_MOE
    | {"n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "use_qk_norm"}
    | {"routed_scaling_factor", "num_nextn_predict_layers"},
}

# Fields of which only these values are implemented, of every family and of some.
REQUIRED = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "attention_dropout": (0, 0.0),
    "pretraining_tp": (1,),
    "rope_interleaved": (False,),
    "quantization_config": (None,),
    "is_llama_config": (True,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
}
# How a token's experts are chosen. A dense model has none of these fields.
REQUIRED_OF = {
    "qwen3_moe": {"scoring_func": ("softmax",)},
    "glm4_moe": {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
}

# Fields that do not change what the model computes.
IGNORED = frozenset(
    """
    dtype torch_dtype transformers_version transformers.js_config _name_or_path _model_name_or_path
    use_cache initializer_range bos_token_id eos_token_id pad_token_id unk_token_id sliding_window
    max_window_layers output_attentions output_hidden_states output_router_logits return_dict
    router_aux_loss_coef chunk_size_feed_forward is_encoder_decoder id2label label2id problem_type
    use_mrope
    """.split()
)

# Fields whose default differs between families. transformers says what a config without them has.
FILLED_IN = tuple(
    """
    num_key_value_heads head_dim rms_norm_eps tie_word_embeddings partial_rotary_factor
    attention_bias use_qk_norm norm_topk_prob n_group topk_group n_shared_experts
    first_k_dense_replace routed_scaling_factor
    """.split()
)

# Fields that must be positive integers in every family, and fields that must be positive numbers.
SIZES = tuple(
    """
    hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    vocab_size max_position_embeddings
    """.split()
)
NUMBERS = ("rms_norm_eps", "rope_theta", "partial_rotary_factor", "routed_scaling_factor")
MOST_LAYERS = 10_000
