"""The mixer of a mixture-of-experts block: router, routed experts, an optional shared expert, load balancing.

A token's way through it:

1. Router: one matrix gives a logit for each expert, in float32. Under sequence parallelism the narrow logits are gathered,
   not the tokens, so that all tensor ranks choose alike.
2. Choice: logits become scores, and the top k experts are taken, within the best groups of experts if that is asked for.
   A balancing bias counts for the choice but not for the weight (kernels/moe).
3. Capacity: only where a factor limits it, and only in training, choices over an expert's capacity are dropped or given to
   another one (capacity.py). Else nothing is ever dropped.
4. Latent: with `latent_size` the token is projected down before it goes to the routed experts.
5. Dispatch: the token's k copies reach their experts. Where every rank has a part of each expert (`_routed`) they are
   sorted by expert; where experts are spread over `groups.ep` (`_dispatch`) rows are sent by all-to-all (dispatch.py),
   while the shared expert computes.
6. Experts: each is its own feed-forward. The k results are summed by weight in float32, and projected up again.
   With `bias` a row has further channels, the first of which is 1, so that the bias of gate and up is a column of their
   matrix, in every kernel and on every rank. That of down is added to the sum, by the weights of the choices.
7. Shared expert: sees every token at full width; its output is added.
8. Balance: auxiliary losses (balance.py) push the router towards even loads through its gradient; after the optimizer's
   step `balance_experts` moves the bias of step 2 against the load of the whole global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from amfm.kernels.linear.op import linear, linear_float32
from amfm.kernels.moe.op import Routing, expert_feed_forward, route
from amfm.kernels.swiglu.gate import name_activation
from amfm.model.config.moe import BIAS_CHANNELS, MoeConfig
from amfm.model.feed_forward import FeedForward, up_segments
from amfm.model.mixers.interface import BlockState, BuildContext, Mixer, MixerOutput
from amfm.model.moe.balance import add_entropies, auxiliary_losses
from amfm.model.moe.capacity import Choices, leave_out
from amfm.model.moe.dispatch import DispatchArguments, dispatch_feed_forward, dispatch_steps
from amfm.model.moe.transfer import HeldExperts, expected_ranks
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.layers import Linear, add_bias, stream_shard
from amfm.model.parallel.regions import (
    enter_tensor_region,
    gather_stream,
    gather_tokens,
    leave_tensor_region,
    scatter_tokens,
    slice_tokens,
    sum_gradients,
)
from amfm.model.parallel.shards import Shard, ShardSpec, divide, own_shapes

if TYPE_CHECKING:
    from amfm.model.moe.balance import RequiredBiases
    from amfm.model.moe.package_router import PackageRouter

# Bias of an expert that is pruned: no score reaches the others, and no update moves it within float32.
PRUNED_BIAS = -1e9


class MoeMixer(Mixer):
    """y = sum over the top-k experts of weight * expert(x), plus the shared expert, times its gate where it has one.

    Logits, scores and weights are computed in float32 at least, and the balancing bias stays float32 under any cast.
    `draw_seed` seeds the draws of recycled choices (step 3); the model sets one for each block.

    Auxiliary losses come weighted, by name: `balance`, `sequence_balance`, `router_z`. Each is a mean over the tokens (or
    rows) of its micro-batch. A model sums them over its blocks; a step averages them over the micro-batches of all data
    ranks and adds them to the mean loss per token.
    """

    def __init__(self, moe: MoeConfig, build: BuildContext) -> None:
        super().__init__()
        groups, backend = build.groups, build.backend
        self.section, self.backend, self.groups = moe, backend, groups
        self.activation = name_activation(moe.activation, moe.activation_limit)
        # A tensor, so that compiled blocks of different seeds share their graph.
        self.draw_seed = torch.zeros((), dtype=torch.int64, device="cpu")
        # Called with the choices of a pass in training, before padding is left out, where someone traces them.
        self.note_choices: Callable[[Tensor], None] | None = None
        self.router = Linear(build.hidden_size, moe.num_experts, groups, bias=moe.bias)
        self.expert_bias: Tensor | None
        self.register_buffer("expert_bias", torch.zeros(moe.num_experts) if moe.expert_bias else None)
        self.entropy_sums: Tensor | None = None
        self.required: RequiredBiases | None = None
        self.package_router: PackageRouter | None = None
        if (spec := moe.package_router()) is not None:
            from amfm.model.moe.package_router import PackageRouter

            self.package_router = PackageRouter(spec, moe)
        if moe.bias_rule == "quantile":
            from amfm.model.moe.balance import RequiredBiases

            self.required = RequiredBiases(moe.num_experts, moe.top_k, groups)
        width = moe.latent_size or build.hidden_size
        self.latent_down = Linear(build.hidden_size, width, groups) if moe.latent_size else None
        self.latent_up = Linear(width, build.hidden_size, groups) if moe.latent_size else None
        self.width = width
        self.down_bias: nn.Parameter | None = None
        if moe.bias:
            self.down_bias = nn.Parameter(torch.empty(moe.num_experts, width))
            self.shards = {"down_bias": stream_shard(groups)}
        self.experts = Experts(moe, moe.expert_width(build.hidden_size), groups)
        self.sent_share = expected_ranks(moe, groups.ep.size()) / groups.ep.size()
        self.shared = None
        if moe.shared_expert_hidden_size:
            self.shared = FeedForward(
                build.hidden_size,
                moe.shared_expert_hidden_size,
                moe.activation,
                groups,
                name="model.moe.shared_expert_hidden_size",
                backend=backend,
                limit=moe.activation_limit,
                structure=moe.shared_structure(),
                guide=build.guide,
            )
        self.shared_gate = Linear(build.hidden_size, 1, groups) if moe.shared_expert_gate else None

    def reset_buffers(self) -> None:
        """Set the balancing bias to zero."""
        if self.expert_bias is not None:
            self.expert_bias.zero_()
        if self.required is not None:
            self.required.counts_EH.zero_()

    def set_draw_seed(self, seed: int) -> None:
        """Seed the draws of recycled choices."""
        self.draw_seed = torch.tensor(seed)

    def forward(self, x_BTD: Tensor, meta: PackMeta, state: BlockState = None) -> MixerOutput:
        """Mix x [B, T, D] -> y [B, T, D], with the auxiliary losses and the token choices of each expert, [E] int64.

        Counts are those that the router made, before a capacity limit: they say what it must be balanced against. Every rank
        of `groups.tp`, `groups.cp`, `groups.ep` and `groups.expt_tp` must call.
        """
        logits_RE, routing, chosen = self._choose(x_BTD, meta)
        compute = self._dispatch if self.travels else self._routed
        return self._finish(x_BTD, meta, logits_RE, routing, *compute(x_BTD, chosen))

    @property
    def travels(self) -> bool:
        """Whether experts are spread over ranks."""
        return self.groups.ep.size() > 1

    @property
    def is_graphable(self) -> bool:
        """Where rows stay on their rank, kernels read on the device how many each expert has.

        Rows that are sent are counted on the host, by which all-to-alls are split, at least if a step is computed again.
        """
        return not self.travels and self.package_router is None

    def steps(self, x_BTD: Tensor, meta: PackMeta) -> Generator[None, None, MixerOutput]:
        """Mix as `forward` does, pausing when rows have set out to their experts, and when sums have set out back."""
        logits_RE, routing, chosen = self._choose(x_BTD, meta)
        arguments = self._dispatch_arguments(x_BTD, chosen)
        sums_RD, shared_BTD = yield from dispatch_steps(**arguments)
        return self._finish(x_BTD, meta, logits_RE, routing, self._widen(x_BTD, sums_RD, chosen), shared_BTD)

    def _choose(self, x_BTD: Tensor, meta: PackMeta) -> tuple[Tensor, Routing, Choices]:
        """Logits of the router, what it chose, and what a capacity leaves of that."""
        logits_RE = gather_stream(self._logits(x_BTD), self.groups).flatten(0, 1)
        moe = self.section
        routing = self._route(logits_RE, meta)
        anywhere_RK = routing.expert_ids_RK
        if self.training and self.note_choices is not None:
            self.note_choices(anywhere_RK)
        if self.training and self.required is not None and self.expert_bias is not None:
            self.required.count(routing.scores_RE, self.expert_bias, self._is_living(self.expert_bias), meta.padding)
        if meta.padding is not None:
            routing = leave_out(routing, meta.padding, moe.num_experts)
        if self.training and moe.capacity_factor is not None and routing.bound is None:
            from amfm.model.moe.capacity import limit_choices

            chosen = limit_choices(routing, meta, moe, self.groups, self.draw_seed, backend=self.backend)
            if self.groups.ep.size() == 1:
                # A lost choice has weight 0; if nothing is sent, any expert will do.
                chosen = replace(chosen, expert_ids_RK=chosen.expert_ids_RK.clamp(max=moe.num_experts - 1))
        else:
            # If nothing is sent, padding stays spread over the experts, with a weight of 0.
            is_lost = self.travels or routing.bound is not None
            ids_RK = routing.expert_ids_RK if is_lost else anywhere_RK
            chosen = Choices(ids_RK, routing.weights_RK, bound=routing.bound)
        return logits_RE, routing, chosen

    def _route(self, logits_RE: Tensor, meta: PackMeta) -> Routing:
        """What the router chooses, before padding and capacities."""
        moe = self.section
        if self.package_router is not None:
            given = logits_RE, self.expert_bias, meta, self.draw_seed
            return self.package_router.route(*given, is_training=self.training)
        given_RK = None if meta.own_choices_BTK is None else meta.own_choices_BTK.flatten(0, 1)
        if self.training and moe.forced_balance:
            places_RK = torch.arange(len(logits_RE) * moe.top_k, device=logits_RE.device).view(-1, moe.top_k)
            given_RK = places_RK % moe.num_experts
        return route(
            logits_RE,
            self.expert_bias,
            score=moe.router,
            top_k=moe.top_k,
            normalize=moe.normalize_probabilities,
            scaling=moe.routed_scaling,
            num_groups=moe.num_router_groups,
            group_top_k=moe.router_group_top_k,
            group_merit=moe.group_score_top_k,
            choices_RK=given_RK,
            backend=self.backend,
        )

    def _finish(
        self,
        x_BTD: Tensor,
        meta: PackMeta,
        logits_RE: Tensor,
        routing: Routing,
        y_BTD: Tensor,
        shared_BTD: Tensor | None,
    ) -> MixerOutput:
        """Add the shared expert's output to the routed ones', and the losses that balance the router."""
        if shared_BTD is not None:
            y_BTD = y_BTD + shared_BTD
        losses: dict[str, Tensor] = {}
        if self.training:
            given = logits_RE, routing, x_BTD.shape[0], self.section, self.groups
            losses = auxiliary_losses(*given, meta.padding)
            if self.entropy_sums is not None:
                add_entropies(self.entropy_sums, routing.scores_RE, meta.padding)
        return MixerOutput(y_BTD, None, losses, routing.counts_E)

    def _logits(self, x_BTD: Tensor) -> Tensor:
        """Router logits [B, T, E] in float32 at least: bf16 would tie experts that differ, and choose by their number."""
        return add_bias(linear_float32(x_BTD, self.router.weight), self.router.bias)

    def _routed(self, x_BTD: Tensor, chosen: Choices) -> tuple[Tensor, Tensor | None]:
        """Compute routed and shared output where every tensor rank has a part of each expert's inner width."""
        narrow_BTD = x_BTD if self.latent_down is None else self.latent_down(x_BTD)
        # Wider before it enters: the all-reduce of its gradient is Megatron's, which needs a contiguous one.
        rows_BTD = enter_tensor_region(self._with_one(narrow_BTD), self.groups)
        y_RD = expert_feed_forward(
            rows_BTD.flatten(0, 1),
            chosen.expert_ids_RK,
            # Every rank's part of the experts gives a part of the gradient of the weights.
            sum_gradients(chosen.weights_RK, self.groups),
            self.experts.up,
            self.experts.down,
            activation=self.activation,
            count=chosen.bound,
            is_bound=chosen.bound is not None,
            backend=self.backend,
        )
        y_BTD = leave_tensor_region(y_RD[:, : self.width].unflatten(0, rows_BTD.shape[:2]), self.groups)
        y_BTD = self._add_down_bias(y_BTD, chosen)
        if self.latent_up is not None:
            y_BTD = self.latent_up(y_BTD)
        return y_BTD, None if self.shared is None else self._gate_shared(x_BTD, self.shared(x_BTD))

    def _dispatch(self, x_BTD: Tensor, chosen: Choices) -> tuple[Tensor, Tensor | None]:
        """Compute the same where experts are spread over ranks; the shared expert computes while rows are sent, half each way."""
        sums_RD, shared_BTD = dispatch_feed_forward(**self._dispatch_arguments(x_BTD, chosen))
        return self._widen(x_BTD, sums_RD, chosen), shared_BTD

    def _dispatch_arguments(self, x_BTD: Tensor, chosen: Choices) -> DispatchArguments:
        """What `dispatch_feed_forward` is given: this rank's rows, their choices, and the shared expert as the other work."""
        shared = self.shared
        narrow_BTD = x_BTD if self.latent_down is None else self.latent_down(x_BTD)
        own_BTD = self._with_one(scatter_tokens(narrow_BTD, self.groups))
        ids_BTK, weights_BTK = (
            slice_tokens(choices_RK.unflatten(0, (x_BTD.shape[0], -1)), self.groups)
            for choices_RK in (chosen.expert_ids_RK, chosen.weights_RK)
        )
        return {
            "x_RD": own_BTD.flatten(0, 1),
            "expert_ids_RK": ids_BTK.flatten(0, 1),
            "weights_RK": weights_BTK.flatten(0, 1),
            "experts": HeldExperts(
                self.experts.up, self.experts.down, self.groups, self.activation, self.backend, self.sent_share
            ),
            "while_out": lambda: None if shared is None else shared.project_up(x_BTD),
            "while_home": lambda inner: (
                None if shared is None or inner is None else self._gate_shared(x_BTD, shared.project_down(inner))
            ),
            "slots": chosen.slots(own_BTD.shape[0] * own_BTD.shape[1], self.section.num_experts),
        }

    def _widen(self, x_BTD: Tensor, sums_RD: Tensor, chosen: Choices) -> Tensor:
        """The sums of this rank's tokens, of all of them and at full width."""
        y_BTD = gather_tokens(sums_RD[:, : self.width].unflatten(0, (x_BTD.shape[0], -1)), self.groups)
        y_BTD = self._add_down_bias(y_BTD, chosen)
        return y_BTD if self.latent_up is None else self.latent_up(y_BTD)

    def _with_one(self, x_BTD: Tensor) -> Tensor:
        """Rows as experts read them: with biases, a channel that is 1 and zeros after."""
        if self.down_bias is None:
            return x_BTD
        one_C = torch.eye(1, BIAS_CHANNELS, dtype=x_BTD.dtype, device=x_BTD.device)
        return torch.cat([x_BTD, one_C.expand(*x_BTD.shape[:-1], -1)], dim=-1)

    def _add_down_bias(self, y_BTD: Tensor, chosen: Choices) -> Tensor:
        """Add the biases of each token's experts by weight to the sums of the residual stream's tokens, [B, T, D]."""
        if self.down_bias is None:
            return y_BTD
        # A lost choice has weight 0, and any expert will do.
        ids_RK = chosen.expert_ids_RK.clamp(max=len(self.down_bias) - 1)
        weights_RE = chosen.weights_RK.new_zeros(len(ids_RK), len(self.down_bias))
        weights_BTE = weights_RE.scatter_add(1, ids_RK, chosen.weights_RK).unflatten(0, (len(y_BTD), -1))
        if self.groups.sequence_parallel:
            weights_BTE = slice_tokens(weights_BTE, self.groups)
        return y_BTD + linear(weights_BTE.to(y_BTD.dtype), self.down_bias.T)

    def _gate_shared(self, x_BTD: Tensor, y_BTD: Tensor) -> Tensor:
        """Output of the shared expert times sigmoid of its gate, one number per token, where it has one."""
        return y_BTD if self.shared_gate is None else y_BTD * torch.sigmoid(self.shared_gate(x_BTD))

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Biases begin at 0; those that are columns of `experts.up` are left to model/init.py."""
        return torch.zeros(shape) if name in ("router.bias", "down_bias") else None

    def num_retired(self) -> int:
        """Experts whose bias keeps every token away. Waits for the device."""
        return 0 if self.expert_bias is None else int((self.expert_bias <= PRUNED_BIAS / 2).sum())

    def note_entropies(self, sums: Tensor | None) -> None:
        """Add entropies of scores to these sums in passes in training."""
        self.entropy_sums = sums

    def living_bias(self) -> Tensor | None:
        """The balancing bias [E], NaN of experts that are pruned."""
        bias_E = self.expert_bias
        return None if bias_E is None else bias_E.masked_fill(bias_E <= PRUNED_BIAS / 2, torch.nan)

    @torch.no_grad()
    def balance_experts(self, counts_E: Tensor) -> None:
        """Move each expert's bias by the update rate towards the mean load (Wang et al. 2024, arXiv 2408.15664, algorithm 1).

        counts_E [E]: the choices of the whole step, summed over micro-batches and data ranks. No collectives: equal counts give
        equal biases on all ranks. Only the sign of the difference counts, so the rate is the size of a step in the score.
        With `bias_rule: quantile` the step's own histograms decide (balance.py), and all ranks of `groups.dp_cp` must call.
        """
        if self.expert_bias is None:
            return
        if self.required is not None:
            if self.section.bias_update_rate:
                self.expert_bias.copy_(self.required.solve(self.expert_bias, self._is_living(self.expert_bias)))
            return
        # Of more choices than float32 counts, too, the sign is exact.
        counts_E = counts_E.to(self.expert_bias.device, torch.float64)
        # Pruned experts have no load to balance, and their share is the others'.
        is_pruned_E = ~self._is_living(self.expert_bias)
        mean = counts_E.sum() / (~is_pruned_E).sum()
        moved_E = torch.sign(mean - counts_E).masked_fill(is_pruned_E, 0).to(self.expert_bias)
        self.expert_bias.add_(moved_E, alpha=self.section.bias_update_rate)
        # Signs do not add up to 0, so the mean would drift; choices compare experts, and no mean changes them.
        living_E = self.expert_bias.masked_fill(is_pruned_E, 0)
        mean_E = (living_E.sum() / (~is_pruned_E).sum()).expand_as(living_E)
        self.expert_bias.sub_(mean_E.masked_fill(is_pruned_E, 0))

    @staticmethod
    def _is_living(bias_E: Tensor) -> Tensor:
        """Which experts are not pruned, [E] bool."""
        return bias_E > PRUNED_BIAS / 2

    @torch.no_grad()
    def retire_experts(self, is_retired_E: Tensor) -> None:
        """Put their bias if no score reaches the others', and no update moves it."""
        assert self.expert_bias is not None, "checked: experts are pruned where the router has a bias"
        self.expert_bias[is_retired_E.to(self.expert_bias.device)] = PRUNED_BIAS


class Experts(nn.Module):
    """Stacked weights of the routed experts that this rank holds: up [e, F, D] and down [e, D, F].

    e of the experts are here, cut over `groups.ep`, with F of their inner width, cut over `groups.expt_tp`; SwiGLU's up has
    gate rows, then up rows. With biases D is BIAS_CHANNELS more than the rows of tokens have, and column -BIAS_CHANNELS of up
    is the bias; the columns after it, and as many rows of down, are zeros that have no effect and get no gradient.
    """

    extra_repr = own_shapes

    def __init__(self, moe: MoeConfig, width: int, groups: ProcessGroupCollection) -> None:
        super().__init__()
        if groups.ep.size() == 1 and groups.expt_tp.size() != groups.tp.size():
            raise ValueError(
                f"the expt_tp group has {groups.expt_tp.size()} ranks and the tp group {groups.tp.size()}; without expert "
                "ranks every tensor rank has a part of each expert: give both the same ranks"
            )
        segments = up_segments(moe.expert_hidden_size, moe.activation)
        inner = divide(moe.expert_hidden_size, groups, "model.moe.expert_hidden_size", axis="expert_tensor")
        experts = divide(moe.num_experts, groups, "model.moe.num_experts", axis="expert")
        self.up = nn.Parameter(torch.empty(experts, inner * len(segments), width))
        self.down = nn.Parameter(torch.empty(experts, width, inner))
        by_expert = ShardSpec(0, "ep", (moe.num_experts,))
        self.shards = {
            "up": Shard((by_expert, ShardSpec(1, "expt_tp", segments))),
            "down": Shard((by_expert, ShardSpec(2, "expt_tp", (moe.expert_hidden_size,)))),
        }
