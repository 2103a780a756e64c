"""A compact Qwen3-MoE for pre-training on short rows: no padding outside attention.

Legend: B sequences, S positions, T real tokens of the batch, H hidden, I expert intermediate,
G = 2I, E experts, K experts per token, P = T*K, N heads, M key/value heads, D head size,
V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.05  # 0.02, usual for wide layers, starts these narrow ones too quiet: several times slower
ROUTER_INIT_STD = 0.02  # near-even routing at the start


class Routing(NamedTuple):
    """One layer's decisions: router probabilities (T, E) and chosen experts (T, K)."""

    probs: Tensor
    experts: Tensor


class Layer(nn.Module):
    """Parameters of one block, named and shaped as transformers holds them."""

    def __init__(self, config: dict):
        super().__init__()
        hidden, head = config["hidden_size"], config["head_dim"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        experts, inner = config["num_experts"], config["moe_intermediate_size"]

        def normal(*shape):
            return nn.Parameter(torch.randn(*shape) * INIT_STD)

        self.input_layernorm = nn.Parameter(torch.ones(hidden))
        self.q_proj = normal(heads * head, hidden)
        self.k_proj = normal(kv_heads * head, hidden)
        self.v_proj = normal(kv_heads * head, hidden)
        self.o_proj = normal(hidden, heads * head)
        self.q_norm = nn.Parameter(torch.ones(head))
        self.k_norm = nn.Parameter(torch.ones(head))
        self.post_attention_layernorm = nn.Parameter(torch.ones(hidden))
        self.gate = nn.Parameter(torch.randn(experts, hidden) * ROUTER_INIT_STD)
        self.gate_up_proj = normal(experts, 2 * inner, hidden)
        self.down_proj = normal(experts, hidden, inner)


class Network(nn.Module):
    """The model of a config.json dict. `routing` holds the last forward's decisions per layer."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Parameter(torch.randn(config["vocab_size"], config["hidden_size"]) * INIT_STD)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.Parameter(torch.ones(config["hidden_size"]))
        self.routing: list[Routing] = []

    def forward(self, ids_BS: Tensor, real_BS: Tensor, wanted_BS: Tensor) -> Tensor:
        """Returns logits (wanted positions, V); `real_BS` marks what is not padding."""
        eps = self.config["rms_norm_eps"]
        size_BS, real_T = ids_BS.shape, real_BS.flatten().nonzero().squeeze(1)
        rope = self._rope(real_T % size_BS[1])
        self.routing = []
        x_TH = F.embedding(ids_BS.flatten()[real_T], self.embed_tokens)
        for layer in self.layers:
            normed_TH = F.rms_norm(x_TH, x_TH.shape[-1:], layer.input_layernorm, eps)
            x_TH = x_TH + self._attention(layer, normed_TH, rope, real_T, size_BS)
            normed_TH = F.rms_norm(x_TH, x_TH.shape[-1:], layer.post_attention_layernorm, eps)
            x_TH = x_TH + self._experts(layer, normed_TH)
        x_TH = x_TH[wanted_BS.flatten()[real_T]]
        return F.linear(F.rms_norm(x_TH, x_TH.shape[-1:], self.norm, eps), self.embed_tokens)

    def _rope(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        head = self.config["head_dim"]
        frequencies = self.config["rope_theta"] ** (-torch.arange(0, head, 2).float() / head)
        angles_TD = (positions_T[:, None] * frequencies).repeat(1, 2)
        return angles_TD.cos()[:, None], angles_TD.sin()[:, None]

    def _attention(self, layer: Layer, x_TH: Tensor, rope, real_T: Tensor, size_BS) -> Tensor:
        head, eps = self.config["head_dim"], self.config["rms_norm_eps"]
        q_TND = F.linear(x_TH, layer.q_proj).unflatten(1, (-1, head))
        k_TMD = F.linear(x_TH, layer.k_proj).unflatten(1, (-1, head))
        v_TMD = F.linear(x_TH, layer.v_proj).unflatten(1, (-1, head))
        q_TND = rotate(F.rms_norm(q_TND, (head,), layer.q_norm, eps), *rope)
        k_TMD = rotate(F.rms_norm(k_TMD, (head,), layer.k_norm, eps), *rope)
        groups = q_TND.shape[1] // k_TMD.shape[1]

        def padded(z_TND):
            flat = z_TND.new_zeros(size_BS.numel(), *z_TND.shape[1:])
            return flat.index_copy(0, real_T, z_TND).unflatten(0, size_BS).transpose(1, 2)

        k_TND, v_TND = (z.repeat_interleave(groups, dim=1) for z in (k_TMD, v_TMD))
        y_BNSD = F.scaled_dot_product_attention(padded(q_TND), padded(k_TND), padded(v_TND), is_causal=True)
        return F.linear(y_BNSD.transpose(1, 2).flatten(0, 1)[real_T].flatten(1), layer.o_proj)

    def _experts(self, layer: Layer, x_TH: Tensor) -> Tensor:
        probs_TE = F.linear(x_TH, layer.gate).softmax(-1)
        weights_TK, experts_TK = probs_TE.topk(self.config["num_experts_per_tok"], dim=-1)
        self.routing.append(Routing(probs_TE, experts_TK))
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        order_P = experts_TK.flatten().argsort()
        token_P = order_P // experts_TK.shape[1]
        rows_E = torch.bincount(experts_TK.flatten(), minlength=probs_TE.shape[1]).tolist()
        outputs = []
        for x_RH, gate_up_GH, down_HI in zip(
            x_TH[token_P].split(rows_E),
            layer.gate_up_proj.unbind(),
            layer.down_proj.unbind(),
            strict=True,
        ):
            gate_RI, up_RI = F.linear(x_RH, gate_up_GH).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate_RI) * up_RI, down_HI))
        y_PH = torch.cat(outputs) * weights_TK.flatten()[order_P, None]
        return torch.zeros_like(x_TH).index_add(0, token_P, y_PH)

    def balance_loss(self) -> Tensor:
        """Returns the mean over layers of E * sum_e load_e * probability_e; K when even.

        Switch Transformers, arXiv 2101.03961, equation 4, with top-k loads.
        """
        total = torch.zeros(())
        for probs_TE, experts_TK in self.routing:
            experts = probs_TE.shape[1]
            load_E = torch.bincount(experts_TK.flatten(), minlength=experts) / len(experts_TK)
            total = total + experts * (load_E * probs_TE.mean(0)).sum()
        return total / len(self.routing)

    def hub_tensors(self) -> dict[str, Tensor]:
        """Returns detached weights under the hub's keys, one entry per expert and projection."""
        tensors = {"model.embed_tokens.weight": self.embed_tokens, "model.norm.weight": self.norm}
        for index, layer in enumerate(self.layers):
            for name, parameter in layer.named_parameters():
                for key, tensor in hub_layer_tensors(name, parameter):
                    tensors[f"model.layers.{index}.{key}.weight"] = tensor
        return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def hub_layer_tensors(name: str, parameter: Tensor) -> list[tuple[str, Tensor]]:
    """Returns (key inside the layer, tensor) pairs: the expert stacks are split, the rest renamed."""
    if name == "gate_up_proj":
        halves = ("gate_proj", parameter.chunk(2, dim=1)[0]), ("up_proj", parameter.chunk(2, dim=1)[1])
        return [pair for half in halves for pair in hub_layer_tensors(*half)]
    if parameter.dim() == 3:
        return [(f"mlp.experts.{expert}.{name}", weight) for expert, weight in enumerate(parameter)]
    if name == "gate":
        return [("mlp.gate", parameter)]
    return [(f"self_attn.{name}" if name[:2] in ("q_", "k_", "v_", "o_") else name, parameter)]


def rotate(x_TND: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    first, second = x_TND.chunk(2, dim=-1)
    return x_TND * cos_T1D + torch.cat([-second, first], dim=-1) * sin_T1D
