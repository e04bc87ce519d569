"""The model again, written token by token and expert by expert in float64, sharing no code with model/ or kernels/.

`reference_forward` takes the parameters by their global names and the configuration; autograd gives its gradients.
Shapes follow the legend; single letters are sizes.
"""

import math

import torch
import torch.nn.functional as F

LETTERS = {"A": "*", "F": "E", "D": "-"}


def reference_forward(config, pattern, parameters, tokens_BT, document_ids_BT, biases=None):
    """Logits [B, T, V] and auxiliary losses by name of plain pattern letters, in the dtype of the parameters."""
    factors = config.multipliers
    x_BTD = parameters["embedding.weight"][tokens_BT] * factors.embedding
    auxiliary = {}
    for index, letter in enumerate(pattern):
        prefix = f"blocks.{index}."
        here = {name[len(prefix) :]: value for name, value in parameters.items() if name.startswith(prefix)}
        mixer = {name[len("mixer.") :]: value for name, value in here.items() if name.startswith("mixer.")}
        normed_BTD = norm(x_BTD, here["norm.weight"], config.norm_epsilon)
        bias = None if biases is None else biases.get(index)
        y_BTD, losses = reference_block(LETTERS.get(letter, letter), config, mixer, normed_BTD, document_ids_BT, bias)
        x_BTD = x_BTD + y_BTD * factors.residual
        for name, value in losses.items():
            auxiliary[name] = auxiliary.get(name, 0.0) + value
    hidden_BTD = norm(x_BTD, parameters["final_norm.weight"], config.norm_epsilon)
    head_VD = parameters["embedding.weight"] if config.tie_embeddings else parameters["head.weight"]
    return hidden_BTD @ head_VD.T * factors.logits, auxiliary


def reference_block(letter, config, p, x_BTD, document_ids_BT, bias=None):
    """One mixer on rows of packed documents: each document is cut out and run on its own."""
    if letter == "E":
        return moe(config.moe, p, x_BTD, bias)
    rows = []
    for x_TD, ids_T in zip(x_BTD, document_ids_BT):
        pieces = []
        for document in ids_T.unique(sorted=True):
            piece_TD = x_TD[ids_T == document]
            if letter == "M":
                pieces.append(mamba(config, p, piece_TD))
            elif letter == "*":
                pieces.append(attention(config, p, piece_TD))
            else:
                pieces.append(feed_forward(p["up_proj.weight"], p["down_proj.weight"], config.feed_forward, piece_TD))
        rows.append(torch.cat(pieces))
    return torch.stack(rows), {}


def norm(x, weight, epsilon):
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def mamba(config, p, x_TD):
    section = config.mamba
    H, P, N, G, W = (
        section.num_heads,
        section.head_dim,
        section.state_size,
        section.num_groups,
        section.conv_kernel,
    )
    inner = H * P
    rows = x_TD @ p["in_proj.weight"].T
    z, inputs, dt = rows[:, :inner], rows[:, inner : inner + inner + 2 * G * N], rows[:, -H:]
    padded = torch.cat([inputs.new_zeros(W - 1, inputs.shape[1]), inputs])
    outputs = []
    state_HPN = x_TD.new_zeros(H, P, N)
    for t in range(len(x_TD)):
        convolved = (padded[t : t + W] * p["conv.weight"].T).sum(0)
        if "conv.bias" in p:
            convolved = convolved + p["conv.bias"]
        convolved = convolved / (1 + torch.exp(-convolved))
        x_HP = convolved[:inner].view(H, P)
        B_HN = convolved[inner : inner + G * N].view(G, N).repeat_interleave(H // G, 0)
        C_HN = convolved[inner + G * N :].view(G, N).repeat_interleave(H // G, 0)
        step_H = torch.log1p(torch.exp(dt[t] + p["dt_bias"]))
        decay_H = torch.exp(-step_H * torch.exp(p["A_log"]))
        state_HPN = decay_H[:, None, None] * state_HPN + (step_H[:, None] * x_HP)[:, :, None] * B_HN[:, None, :]
        y_HP = (state_HPN * C_HN[:, None, :]).sum(-1) + p["D"][:, None] * x_HP
        gated = y_HP.reshape(G, inner // G) * (z[t] * torch.sigmoid(z[t])).view(G, inner // G)
        outputs.append(norm(gated, p["norm.weight"].view(G, -1), config.norm_epsilon).reshape(-1))
    return torch.stack(outputs) @ p["out_proj.weight"].T


def attention(config, p, x_TD):
    section = config.attention
    H, J, K = section.num_heads, section.num_kv_heads, section.head_dim
    T = len(x_TD)
    q_THK = (x_TD @ p["q_proj.weight"].T).view(T, H, K)
    k_TJK = (x_TD @ p["k_proj.weight"].T).view(T, J, K)
    v_TJK = (x_TD @ p["v_proj.weight"].T).view(T, J, K)
    if section.qk_norm:
        q_THK = norm(q_THK, p["q_norm.weight"], config.norm_epsilon)
        k_TJK = norm(k_TJK, p["k_norm.weight"], config.norm_epsilon)
    if section.positions == "rope":
        q_THK, k_TJK = rotate(section, q_THK), rotate(section, k_TJK)
    scale = section.softmax_scale or K**-0.5
    heads = []
    for h in range(H):
        j = h // (H // J)
        rows = []
        for t in range(T):
            scores = k_TJK[: t + 1, j] @ q_THK[t, h] * scale
            rows.append(torch.exp(scores - torch.logsumexp(scores, 0)) @ v_TJK[: t + 1, j])
        heads.append(torch.stack(rows))
    o_THK = torch.stack(heads, 1)
    if section.gate != "none":
        gate_TX = 1 / (1 + torch.exp(-(x_TD @ p["g_proj.weight"].T)))
        o_THK = o_THK * (gate_TX.view(T, H, K) if section.gate == "element" else gate_TX[:, :, None])
    return o_THK.reshape(T, H * K) @ p["o_proj.weight"].T


def rotate(section, q_THK):
    """Half-split rotation; with ntk the base grows by alpha^(d / (d - 2))."""
    rope, rotated = section.rope, int(section.head_dim * section.rope.fraction)
    theta = rope.theta
    if rope.scaling == "ntk":
        theta *= rope.ntk_alpha ** (rotated / (rotated - 2))
    out = q_THK.clone()
    half = rotated // 2
    for t in range(len(q_THK)):
        for i in range(half):
            angle = t * theta ** (-2 * i / rotated)
            a, b = q_THK[t, :, i], q_THK[t, :, half + i]
            out[t, :, i] = a * math.cos(angle) - b * math.sin(angle)
            out[t, :, half + i] = b * math.cos(angle) + a * math.sin(angle)
    return out


def feed_forward(up, down, section, x):
    hidden = x @ up.T
    if section.activation == "swiglu":
        gate, value = hidden.chunk(2, -1)
        hidden = gate * torch.sigmoid(gate) * value
    else:
        hidden = F.relu(hidden) ** 2
    return hidden @ down.T


def moe(section, p, x_BTD, bias):
    B, T, D = x_BTD.shape
    E = section.num_experts
    x_RD = x_BTD.reshape(-1, D)
    logits = x_RD @ p["router.weight"].T
    if section.router == "softmax":
        scores = torch.softmax(logits, -1)
    else:
        scores = torch.sigmoid(logits) if section.router == "sigmoid" else logits.exp().log1p().sqrt()
    chosen_RE = torch.zeros(len(x_RD), E, dtype=torch.bool)
    rows = []
    for r in range(len(x_RD)):
        choice = scores[r].detach() + (0 if bias is None else bias)
        if section.num_router_groups > 1:
            by_group = choice.view(section.num_router_groups, -1)
            best = (
                by_group.sort(-1, descending=True)
                .values[:, : section.group_score_top_k]
                .sum(-1)
                .sort(descending=True)
                .indices
            )
            allowed = torch.full_like(by_group, -torch.inf)
            allowed[best[: section.router_group_top_k]] = 0
            choice = choice + allowed.view(-1)
        ids = choice.sort(descending=True).indices[: section.top_k]
        counted = ids if section.balance_counts == "routed" else scores[r].sort(descending=True).indices[: len(ids)]
        chosen_RE[r, counted] = True
        weights = scores[r, ids]
        if section.normalize_probabilities:
            weights = weights / weights.sum()
        token = x_RD[r] if "latent_down.weight" not in p else p["latent_down.weight"] @ x_RD[r]
        y = sum(
            weight * section.routed_scaling * feed_forward(p["experts.up"][e], p["experts.down"][e], section, token)
            for weight, e in zip(weights, ids.tolist())
        )
        if "latent_up.weight" in p:
            y = p["latent_up.weight"] @ y
        if "shared.up_proj.weight" in p:
            shared = feed_forward(p["shared.up_proj.weight"], p["shared.down_proj.weight"], section, x_RD[r])
            if section.shared_expert_gate:
                shared = shared / (1 + torch.exp(-(p["shared_gate.weight"] @ x_RD[r])))
            y = y + shared
        rows.append(y)
    losses = {}
    shares = scores / scores.sum(-1, keepdim=True)
    if section.auxiliary_loss_weight:
        load = chosen_RE.double().sum(0) / chosen_RE.sum()
        losses["balance"] = section.auxiliary_loss_weight * E * (load * shares.mean(0)).sum()
    if section.sequence_loss_weight:
        load = chosen_RE.view(B, T, E).double().mean(1) * E / section.top_k
        losses["sequence_balance"] = section.sequence_loss_weight * (load * shares.view(B, T, E).mean(1)).sum(1).mean()
    if section.z_loss_weight:
        losses["router_z"] = section.z_loss_weight * torch.logsumexp(logits, -1).square().mean()
    return torch.stack(rows).view(B, T, D), losses
