"""Which decoder architectures the layer loop can drive, and where their parts are.

A family is a description, not a forward pass: the loop calls the model's own modules by these
names. All of them follow vLLM's pre-norm convention of passing `(delta, residual)` through fused
add+norm.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DecoderFamily:
    """Attribute names of a decoder's parts.

    Attributes:
        name: what `/v1/routing/capabilities` calls it.
        architecture: class name in vLLM's registry and in the model's `config.json`.
        moe: the MLP is a mixture of experts.
        decoder: the module that holds embeddings, layers and final norm.
        embed: the decoder's method from token ids to embeddings.
        layers: the decoder's list of layers.
        final_norm: the decoder's last norm.
        attention_norm: a layer's norm before attention.
        attention: a layer's attention, called as `(positions=, hidden_states=)`.
        attention_op: the attention's vLLM `Attention` layer, which owns the K/V cache.
        mlp_norm: a layer's norm before its MLP.
        mlp: a layer's MLP or mixture of experts, called as `(hidden_states)`.
        absent: optional parts of a layer that the loop does not run and that must be None.
    """

    name: str
    architecture: str
    moe: bool = False
    decoder: str = "model"
    embed: str = "embed_input_ids"
    layers: str = "layers"
    final_norm: str = "norm"
    attention_norm: str = "input_layernorm"
    attention: str = "self_attn"
    attention_op: str = "attn"
    mlp_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    absent: tuple[str, ...] = ()


FAMILIES: tuple[DecoderFamily, ...] = (
    DecoderFamily("llama", "LlamaForCausalLM"),
    DecoderFamily("mistral", "MistralForCausalLM", absent=("ada_rms_norm_t_cond",)),
    DecoderFamily("qwen2", "Qwen2ForCausalLM"),
    DecoderFamily("qwen3", "Qwen3ForCausalLM"),
    DecoderFamily("olmoe", "OlmoeForCausalLM", moe=True),
    DecoderFamily("qwen3_moe", "Qwen3MoeForCausalLM", moe=True),
    DecoderFamily("mixtral", "MixtralForCausalLM", moe=True, mlp="block_sparse_moe"),
)


def family_of(architecture: str) -> DecoderFamily | None:
    """The family that serves an architecture, or None: such a model is served stock."""
    return next((f for f in FAMILIES if f.architecture == architecture), None)
