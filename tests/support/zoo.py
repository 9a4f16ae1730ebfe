"""Tiny models of many families: one line of configuration each, two blocks, hidden size 32, a vocabulary of 96."""

from __future__ import annotations

import tiny
import torch
import transformers as hf

VOCABULARY = 96
BASE = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GROUPED = dict(BASE, num_key_value_heads=2)
HEADS = dict(GROUPED, head_dim=8)
GPT = dict(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
FALCON = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    bos_token_id=1,
    eos_token_id=2,
    ffn_hidden_size=64,
)
DEEPSEEK = dict(
    GROUPED,
    num_key_value_heads=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    n_shared_experts=1,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
)

CAUSAL, ENCODER, CLASSIFIER = "AutoModelForCausalLM", "AutoModel", "AutoModelForSequenceClassification"
FAMILIES: dict[str, tuple[str, str, dict]] = {
    # decoders
    "llama": (CAUSAL, "Llama", GROUPED),
    "mistral": (CAUSAL, "Mistral", dict(HEADS, sliding_window=8)),
    "mixtral": (CAUSAL, "Mixtral", dict(GROUPED, num_local_experts=4)),
    "qwen2": (CAUSAL, "Qwen2", GROUPED),
    "qwen3": (CAUSAL, "Qwen3", dict(GROUPED, head_dim=16)),
    "qwen2_moe": (CAUSAL, "Qwen2Moe", dict(GROUPED, **EXPERTS, shared_expert_intermediate_size=32)),
    "qwen3_moe": (CAUSAL, "Qwen3Moe", dict(HEADS, **EXPERTS)),
    "olmoe": (CAUSAL, "Olmoe", dict(GROUPED, num_experts=4, num_experts_per_tok=2)),
    "deepseek_v3": (CAUSAL, "DeepseekV3", DEEPSEEK),
    "gemma": (CAUSAL, "Gemma", HEADS),
    "gemma2": (CAUSAL, "Gemma2", dict(HEADS, sliding_window=8)),
    "gemma3": (
        CAUSAL,
        "Gemma3Text",
        dict(HEADS, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    ),
    "phi": (CAUSAL, "Phi", BASE),
    "phi3": (CAUSAL, "Phi3", GROUPED),
    "opt": (
        CAUSAL,
        "OPT",
        dict(
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    "gpt2": (CAUSAL, "GPT2", GPT),
    "gpt_bigcode": (CAUSAL, "GPTBigCode", GPT),
    "gpt_neo": (
        CAUSAL,
        "GPTNeo",
        dict(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=8,
            intermediate_size=64,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    "gpt_neox": (CAUSAL, "GPTNeoX", BASE),
    "gptj": (CAUSAL, "GPTJ", dict(GPT, rotary_dim=4)),
    "codegen": (CAUSAL, "CodeGen", dict(GPT, rotary_dim=4)),
    "bloom": (
        CAUSAL,
        "Bloom",
        dict(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
    ),
    "falcon": (CAUSAL, "Falcon", dict(FALCON, multi_query=True, parallel_attn=True)),
    "falcon_new": (CAUSAL, "Falcon", dict(FALCON, new_decoder_architecture=True, num_kv_heads=2)),
    "falcon_sequential": (
        CAUSAL,
        "Falcon",
        dict(FALCON, multi_query=False, parallel_attn=False, bias=True, alibi=True),
    ),
    "mpt": (
        CAUSAL,
        "Mpt",
        dict(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=64, expansion_ratio=2),
    ),
    "stablelm": (CAUSAL, "StableLm", GROUPED),
    "starcoder2": (CAUSAL, "Starcoder2", GROUPED),
    "olmo": (CAUSAL, "Olmo", GROUPED),
    "olmo2": (CAUSAL, "Olmo2", GROUPED),
    "olmo3": (CAUSAL, "Olmo3", dict(GROUPED, sliding_window=8)),
    "cohere": (CAUSAL, "Cohere", GROUPED),
    "cohere2": (CAUSAL, "Cohere2", dict(HEADS, sliding_window=8)),
    "persimmon": (CAUSAL, "Persimmon", BASE),
    "granite": (CAUSAL, "Granite", GROUPED),
    "smollm3": (CAUSAL, "SmolLM3", GROUPED),
    "glm": (CAUSAL, "Glm", HEADS),
    "glm4": (CAUSAL, "Glm4", HEADS),
    "helium": (CAUSAL, "Helium", HEADS),
    "nemotron": (CAUSAL, "Nemotron", GROUPED),
    "seed_oss": (CAUSAL, "SeedOss", HEADS),
    "ernie4_5": (CAUSAL, "Ernie4_5", HEADS),
    "exaone4": (CAUSAL, "Exaone4", dict(GROUPED, sliding_window=8)),
    "xglm": (
        CAUSAL,
        "XGLM",
        dict(
            vocab_size=VOCABULARY,
            d_model=32,
            ffn_dim=64,
            num_layers=2,
            attention_heads=4,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    # encoders, as embedding models
    "bert": (ENCODER, "Bert", BASE),
    "roberta": (ENCODER, "Roberta", dict(BASE, max_position_embeddings=66)),
    "distilbert": (
        ENCODER,
        "DistilBert",
        dict(
            vocab_size=VOCABULARY,
            dim=32,
            hidden_dim=64,
            n_layers=2,
            n_heads=4,
            max_position_embeddings=64,
            pad_token_id=0,
        ),
    ),
    "electra": (ENCODER, "Electra", dict(BASE, embedding_size=16)),
    "mpnet": (ENCODER, "MPNet", dict(BASE, max_position_embeddings=66)),
    "xlm_roberta": (ENCODER, "XLMRoberta", dict(BASE, max_position_embeddings=66)),
    "modernbert": (ENCODER, "ModernBert", dict(BASE, cls_token_id=1, sep_token_id=2, local_attention=8)),
    "nomic_bert": (ENCODER, "NomicBert", dict(BASE)),
    "ernie": (ENCODER, "Ernie", BASE),
    "albert": (ENCODER, "Albert", dict(BASE, embedding_size=16)),
    "deberta_v2": (ENCODER, "DebertaV2", dict(BASE, relative_attention=True, pos_att_type=["p2c", "c2p"])),
    "esm": (ENCODER, "Esm", dict(BASE, max_position_embeddings=66, mask_token_id=3)),
    # sequence classifiers, masked language models
    "bert_classifier": (CLASSIFIER, "Bert", dict(BASE, num_labels=3)),
    "camembert_classifier": (CLASSIFIER, "Camembert", dict(BASE, max_position_embeddings=66, num_labels=3)),
    "distilbert_classifier": (
        CLASSIFIER,
        "DistilBert",
        dict(
            vocab_size=VOCABULARY,
            dim=32,
            hidden_dim=64,
            n_layers=2,
            n_heads=4,
            max_position_embeddings=64,
            pad_token_id=0,
        ),
    ),
    "modernbert_classifier": (CLASSIFIER, "ModernBert", dict(BASE, cls_token_id=1, sep_token_id=2, local_attention=8)),
    "llama_classifier": (CLASSIFIER, "Llama", dict(GROUPED, num_labels=3)),
    "bert_masked": ("AutoModelForMaskedLM", "Bert", BASE),
}
HERE = [name for name, (_, config, _) in FAMILIES.items() if hasattr(hf, config + "Config")]
"""Those that the installed transformers has."""


def build(family: str) -> torch.nn.Module:
    """A float32 model in eval mode with fixed random weights, large enough that blocks matter."""
    auto, config, fields = FAMILIES[family]
    torch.manual_seed(0)
    return tiny.spread(getattr(hf, auto).from_config(getattr(hf, config + "Config")(**fields)).eval())
