"""The Mamba2 block's mixer (Dao and Gu 2024, arXiv 2405.21060, section 7)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.causal_conv1d.op import causal_conv1d, causal_conv1d_step
from kernels.decay_scan.op import mamba2_scan, mamba2_step
from kernels.norm.op import gated_rms_norm
from model.config import Mamba2Config, ModelConfig
from model.groups import ProcessGroupCollection
from model.layers import ColumnLinear, Cut, RowLinear, Shard, divide
from model.mixer import BlockState, MambaState, MixerOutput
from model.packing import PackMeta


class Mamba2Mixer(nn.Module):
    """in_proj to z, x, B, C, dt; convolution and SiLU over x, B, C; the scan; norm(y * silu(z)) by group; out_proj.

    Heads and groups are cut over the tensor-parallel ranks; a norm group never spans ranks, so the norm needs no
    collective. dt is not clamped. A, dt and the state are computed in float32 for bf16 weights. The convolution, the
    state and the decay restart at each document.
    """

    def __init__(self, config: ModelConfig, groups: ProcessGroupCollection, backend: str) -> None:
        super().__init__()
        assert config.mamba is not None, "check_model was not called: model.mamba is missing"
        mamba: Mamba2Config = config.mamba
        self.backend = backend
        self.head_dim, self.state_size, self.chunk_size = mamba.head_dim, mamba.state_size, mamba.chunk_size
        self.num_heads = divide(mamba.num_heads, groups, "model.mamba.num_heads")
        self.num_groups = divide(mamba.num_groups, groups, "model.mamba.num_groups")
        self.inner_size = self.num_heads * self.head_dim
        group_width = mamba.num_groups * mamba.state_size
        inner = mamba.inner_size()
        self.in_proj = ColumnLinear(
            config.hidden_size,
            (inner, inner, group_width, group_width, mamba.num_heads),
            groups,
            name="model.mamba.num_groups",
        )
        self.conv = DepthwiseConv(mamba, groups)
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        by_head = Shard((Cut(0, "tp", (mamba.num_heads,)),))
        self.shards = {"A_log": by_head, "D": by_head, "dt_bias": by_head}
        self.norm = GatedNorm(inner, self.num_groups, config.norm_epsilon, groups, backend)
        self.out_proj = RowLinear(inner, config.hidden_size, groups, name="model.mamba.num_heads")

    def forward(self, x_BTD: Tensor, meta: PackMeta, state: BlockState = None) -> MixerOutput:
        """x [B, T, D] -> y [B, T, D]; with a state it goes on from there and returns the next one."""
        num_rows, num_tokens, _ = x_BTD.shape
        z_BTI, inputs_BTC, dt_BTH = self.in_proj(x_BTD).split(
            [self.inner_size, self.conv.channels, self.num_heads], dim=-1
        )
        next_state: MambaState | None
        if isinstance(state, MambaState) and num_tokens == 1:
            y_BTI, next_state = self._step(inputs_BTC[:, 0], dt_BTH[:, 0], state)
        else:
            assert state is None or isinstance(state, MambaState), f"a Mamba2 block got a {type(state).__name__}"
            y_BTI, next_state = self._scan(inputs_BTC, dt_BTH, meta, state)
        y_BTI = self.norm(y_BTI.view(num_rows, num_tokens, self.inner_size), z_BTI)
        return MixerOutput(self.out_proj(y_BTI), next_state)

    def _scan(
        self, inputs_BTC: Tensor, dt_BTH: Tensor, meta: PackMeta, state: MambaState | None
    ) -> tuple[Tensor, MambaState | None]:
        document_ids_BT = meta.boundaries_BT()
        convolved_BTC = causal_conv1d(
            inputs_BTC,
            self.conv.weight,
            self.conv.bias,
            document_ids_BT=document_ids_BT,
            initial_window_BWC=None if state is None else state.window_BWC,
            backend=self.backend,
        )
        x_BTHP, B_BTGN, C_BTGN = self._split(convolved_BTC)
        scanned = mamba2_scan(
            x_BTHP,
            dt_BTH,
            self.A_log,
            B_BTGN,
            C_BTGN,
            self.D,
            self.dt_bias,
            document_ids_BT=document_ids_BT,
            initial_state_BHPN=None if state is None else state.state_BHPN,
            chunk_size=self.chunk_size,
            backend=self.backend,
        )
        if state is None:
            return scanned.y_BTHP, None
        seen_BTC = torch.cat([state.window_BWC, inputs_BTC], dim=1)
        window_BWC = seen_BTC[:, seen_BTC.shape[1] - state.window_BWC.shape[1] :]
        return scanned.y_BTHP, MambaState(window_BWC, scanned.final_state_BHPN)

    def _step(self, inputs_BC: Tensor, dt_BH: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        convolved_BC, window_BWC = causal_conv1d_step(inputs_BC, state.window_BWC, self.conv.weight, self.conv.bias)
        x_BHP, B_BGN, C_BGN = self._split(convolved_BC)
        y_BHP, state_BHPN = mamba2_step(x_BHP, dt_BH, self.A_log, B_BGN, C_BGN, self.D, self.dt_bias, state.state_BHPN)
        return y_BHP, MambaState(window_BWC, state_BHPN)

    def _split(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., H, P], B and C [..., G, N] out of the convolution's channels."""
        group_width = self.num_groups * self.state_size
        x, B, C = convolved.split([self.inner_size, group_width, group_width], dim=-1)
        return (
            x.unflatten(-1, (self.num_heads, self.head_dim)),
            B.unflatten(-1, (self.num_groups, self.state_size)),
            C.unflatten(-1, (self.num_groups, self.state_size)),
        )

    def empty_state(self, num_rows: int) -> MambaState:
        """The state before the first token: zeros."""
        weight = self.conv.weight
        window_BWC = weight.new_zeros(num_rows, weight.shape[1] - 1, self.conv.channels)
        state_BHPN = torch.zeros(num_rows, self.num_heads, self.head_dim, self.state_size, device=weight.device)
        return MambaState(window_BWC, state_BHPN)


class DepthwiseConv(nn.Module):
    """The weights of the causal convolution over x, B and C: weight [C, W], bias [C] or None."""

    def __init__(self, mamba: Mamba2Config, groups: ProcessGroupCollection) -> None:
        super().__init__()
        self.channels = mamba.conv_channels() // groups.tp.size()
        self.weight = nn.Parameter(torch.empty(self.channels, mamba.conv_kernel))
        self.bias = nn.Parameter(torch.empty(self.channels)) if mamba.conv_bias else None
        group_width = mamba.num_groups * mamba.state_size
        by_channel = Shard((Cut(0, "tp", (mamba.inner_size(), group_width, group_width)),))
        self.shards = {"weight": by_channel, "bias": by_channel}


class GatedNorm(nn.Module):
    """RMSNorm of y * silu(z) within each group of channels."""

    def __init__(
        self, inner_size: int, num_groups: int, epsilon: float, groups: ProcessGroupCollection, backend: str
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inner_size // groups.tp.size()))
        self.shards = {"weight": Shard((Cut(0, "tp", (inner_size,)),))}
        self.num_groups, self.epsilon, self.backend = num_groups, epsilon, backend

    def forward(self, y_BTI: Tensor, z_BTI: Tensor) -> Tensor:
        """y and z [B, T, inner] -> [B, T, inner]."""
        normed: Tensor = gated_rms_norm(
            y_BTI, z_BTI, self.weight, self.epsilon, num_groups=self.num_groups, backend=self.backend
        )
        return normed
