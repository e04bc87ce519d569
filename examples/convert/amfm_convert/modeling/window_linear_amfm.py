"""Softmax over a window and linear attention over older tokens, in plain torch: token after token, no chunks.

Sizes: B rows, T tokens, D model, H heads, J key-value heads, K head size, F features, W slots before the tokens, S = W + T.
A token enters the state when it leaves the window. Padding before the text, which a mask [B, T] leaves out, changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from amfm.pretrain.export.modeling_template.attention_amfm import gate_heads, gate_size
from amfm.pretrain.export.modeling_template.blocks_amfm import RMSNorm
from amfm.pretrain.export.modeling_template.rotary_amfm import rotate, rotation

# What the options leave open, by the name of their preset.
PRESETS = {
    "learned": {"features": "hedgehog", "gate": "learned", "combine": "joint", "linear_positions": "none"},
    "lolcats": {"features": "hedgehog", "gate": "none", "combine": "joint", "linear_positions": "rotary"},
    "liger": {"features": "softmax", "gate": "key", "combine": "average", "linear_positions": "none"},
    "lizard": {"features": "hedgehog", "gate": "channel", "combine": "joint", "linear_positions": "none"},
}


class WindowLinear(nn.Module):
    """Window and older tokens in one sum with one denominator (`joint`), or linear attention next to the window
    (`average`).

    The state: keys, values, features, log decays and which slots hold a token, of the last W tokens, and one matrix a key head.
    """

    is_softmax = True

    def __init__(self, options: dict[str, Any], config: Any, depth: float) -> None:
        super().__init__()
        form = PRESETS[options["preset"]]
        self.options = options | {name: options[name] or form[name] for name in form}
        self.heads, self.size, self.window = options["num_heads"], options["head_dim"], options["window"]
        self.kv_heads = options["num_kv_heads"] or self.heads
        self.is_joint = self.options["combine"] == "joint"
        width, keys = config.hidden_size, self.kv_heads * self.size
        self.q_proj = nn.Linear(width, self.heads * self.size, bias=False)
        self.k_proj, self.v_proj = nn.Linear(width, keys, bias=False), nn.Linear(width, keys, bias=False)
        self.o_proj = nn.Linear(self.heads * self.size, width, bias=False)
        self.output_gate = options["output_gate"]
        if self.output_gate != "none":
            self.g_proj = nn.Linear(width, self.heads * gate_size(self.output_gate, self.size), bias=False)
        if options["qk_norm"]:
            self.q_norm = RMSNorm(self.size, config.norm_epsilon)
            self.k_norm = RMSNorm(self.size, config.norm_epsilon)
        self.num_features = self.size
        if self.options["features"] == "hedgehog":
            rows = options["feature_size"] or self.size
            self.num_features = 2 * rows
            self.query_features = nn.Parameter(torch.zeros(self.heads, rows, self.size))
            self.key_features = nn.Parameter(torch.zeros(self.kv_heads, rows, self.size))
        if self.options["gate"] in ("learned", "channel"):
            decays = self.num_features if self.options["gate"] == "channel" else 1
            self.decay_proj = nn.Linear(width, self.kv_heads * decays, bias=False)
        if self.is_joint:
            self.window_weight = nn.Parameter(torch.zeros(self.heads))
        if options["meta_tokens"]:
            shape = (self.kv_heads, options["meta_tokens"], self.size)
            self.meta_keys, self.meta_values = (nn.Parameter(torch.zeros(shape)) for _ in range(2))

    def forward(
        self, x_BTD: Tensor, mask_BT: Tensor | None, positions_BT: Tensor, state: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x [B, T, D] -> y [B, T, D] and the state after it."""
        rows, tokens, _ = x_BTD.shape
        q, phi_q, k, v, phi_k, fading = self._project(x_BTD, positions_BT)
        is_text = x_BTD.new_ones(rows, tokens, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
        if state is None:
            state = tuple(x.new_zeros(rows, self.window, *x.shape[2:]) for x in (k, v, phi_k, fading, is_text))
            columns = self.size + self.is_joint
            state += (fading.new_zeros(rows, self.kv_heads, self.num_features, columns),)
        k, v, phi_k, fading, is_text = (torch.cat(pair, dim=1) for pair in zip(state, (k, v, phi_k, fading, is_text)))
        linear, matrix = self._read_older(phi_q, phi_k, v, fading, is_text, state[5])
        o_BTHV, mass_BTH = self._attend(q, k, v, is_text)
        if self.is_joint:
            mass = self.window_weight.float().sigmoid() * mass_BTH
            o = (mass[..., None] * o_BTHV + linear[..., :-1]) / (mass + linear[..., -1])[..., None]
        else:
            share = self.options["linear_weight"]
            o = (1 - share) * o_BTHV + share * linear
        o = o.to(x_BTD.dtype)
        if self.output_gate != "none":
            o = gate_heads(o, self.g_proj(x_BTD))
        kept = tuple(x[:, tokens:] for x in (k, v, phi_k, fading, is_text))
        return self.o_proj(o.flatten(2)), (*kept, matrix)

    def _project(self, x_BTD: Tensor, positions_BT: Tensor) -> tuple[Tensor, ...]:
        """Compute q, its features, k, v, the features of k, and log decays of key heads, [B, T, J, 1] or [B, T, J, F]."""
        q, k, v = (proj(x_BTD).unflatten(-1, (-1, self.size)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.options["qk_norm"]:
            q, k = self.q_norm(q), self.k_norm(k)
        plain_q, plain_k = q, k
        if self.options["positions"] == "rope":
            rope = {"theta": self.options["rope_theta"], "fraction": self.options["rope_fraction"], "scaling": "none"}
            if self.options["rope_llama3"] is not None:
                rope |= {"scaling": "llama3", "llama3": self.options["rope_llama3"]}
            cos, sin = rotation(rope, self.size, positions_BT)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        seen_q, seen_k = (q, k) if self.options["linear_positions"] == "rotary" else (plain_q, plain_k)
        if self.options["gate"] in ("learned", "channel"):
            fading = F.logsigmoid(self.decay_proj(x_BTD).float() + 4.0).unflatten(-1, (self.kv_heads, -1))
        elif self.options["gate"] == "key":
            fading = F.logsigmoid(plain_k.float()) / 16.0
        else:
            fading = torch.zeros(*k.shape[:3], 1, device=k.device)
        return q, self._features(seen_q, "query_features"), k, v, self._features(seen_k, "key_features"), fading

    def _features(self, x_BTHK: Tensor, name: str) -> Tensor:
        """Positive features [B, T, H, F]."""
        if self.options["features"] == "softmax":
            return x_BTHK.float().softmax(-1).to(x_BTHK.dtype)
        mapped = torch.einsum("bthk,hjk->bthj", x_BTHK, getattr(self, name)).float()
        return torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], dim=-1).to(x_BTHK.dtype)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, is_text_BS: Tensor) -> tuple[Tensor, Tensor]:
        """The softmax over each window [B, T, H, V], and the sum of e^(score - largest) [B, T, H]."""
        repeat = self.heads // self.kv_heads
        scale = self.options["softmax_scale"] or self.size**-0.5
        k, v = k.repeat_interleave(repeat, dim=2), v.repeat_interleave(repeat, dim=2)
        scores = torch.einsum("bthk,bshk->bths", q, k).float() * scale
        # Query t stands in slot t + W; a padded one sees itself, so that its softmax has something to sum.
        slots = torch.arange(k.shape[1], device=k.device)
        behind_TS = slots[self.window :, None] - slots[None, :]
        is_near_TS = (behind_TS >= 0) & (behind_TS < self.window)
        allowed = (is_near_TS & is_text_BS[:, None]) | (behind_TS == 0)
        scores = scores.masked_fill(~allowed[:, :, None], -torch.inf)
        if self.options["meta_tokens"]:
            meta_k = self.meta_keys.repeat_interleave(repeat, dim=0)
            scores = torch.cat([scores, torch.einsum("bthk,hnk->bthn", q, meta_k).float() * scale], dim=-1)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        mass = weights.sum(-1)
        o = torch.einsum("bths,bshv->bthv", weights[..., : k.shape[1]], v.float())
        if self.options["meta_tokens"]:
            meta_v = self.meta_values.repeat_interleave(repeat, dim=0).float()
            o = o + torch.einsum("bthn,hnv->bthv", weights[..., k.shape[1] :], meta_v)
        return o / mass[..., None], mass

    def _read_older(
        self, phi_q: Tensor, phi_k: Tensor, v: Tensor, fading: Tensor, is_text_BS: Tensor, matrix: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What queries read of the tokens that left their windows, [B, T, H, V and the weights' sum], and the matrix after."""
        repeat, late = self.heads // self.kv_heads, self.window if self.is_joint else 0
        # Padding stands before the text: it adds nothing, and nothing fades over it.
        phi_k = torch.where(is_text_BS[..., None, None], phi_k.float(), 0.0)
        fading = torch.where(is_text_BS[..., None, None], fading, 0.0)
        v = F.pad(v.float(), (0, 1), value=1.0) if self.is_joint else v.float()
        outputs = []
        for token in range(phi_q.shape[1]):
            enters = token + self.window - late
            matrix = fading[:, enters].exp()[..., None] * matrix + phi_k[:, enters, :, :, None] * v[:, enters, :, None]
            since = fading[:, enters + 1 : token + self.window + 1].sum(1).exp()
            q = phi_q[:, token].float() * since.repeat_interleave(repeat, dim=1)
            outputs.append((q[:, :, None] @ matrix.repeat_interleave(repeat, dim=1))[:, :, 0])
        return torch.stack(outputs, dim=1), matrix

    def give_first_values(self, deviation: float) -> None:
        """Normal ones for features and meta tokens, windows of weight one half."""
        for parameter in self.parameters(recurse=False):
            if parameter.dim() > 1:
                init.normal_(parameter, std=deviation)
            else:
                init.zeros_(parameter)
