"""The options of a mixture of experts. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from amfm.model.config.options import (
    Axis,
    MixerOptions,
    Prunable,
    channel_dims,
    must_divide,
)
from amfm.model.config.routers import OURS, RegisteredRouters, RouterSpec, router_specs
from amfm.model.config.structure import (
    DENSE,
    ExpertActivation,
    FeedForwardPart,
    LinearKind,
    Structure,
    broken_limit,
)

if TYPE_CHECKING:
    Router = str
else:
    Router = Literal[(*OURS, *router_specs())]

# Channels by which rows of experts with biases are wider: one that is 1, and zeros up to whole 16 bytes in bf16.
BIAS_CHANNELS = 8


class MoeConfig(MixerOptions):
    """Mixture of experts with optional shared expert; letter `E` (Hunyuan: `F`)."""

    num_experts: int = Field(gt=0, le=1_000_000, description="Routed experts.")
    top_k: int = Field(gt=0, description="Routed experts per token; at most num_experts.")
    expert_hidden_size: int = Field(gt=0, description="Inner width of a routed expert.")
    shared_expert_hidden_size: int = Field(0, ge=0, description="Inner width of the shared expert; 0: none.")
    shared_expert_gate: bool = Field(
        False,
        description="Sigmoid of the input, one number per token, times the shared expert's output, as in Qwen3-Next.",
    )
    shared_expert_linear_kind: LinearKind = Field(
        "dense",
        description="Form of the shared expert's matrices, as feed_forward.linear_kind; routed experts are dense.",
    )
    shared_expert_linear_rank: int | None = Field(None, gt=0, description="As feed_forward.linear_rank.")
    shared_expert_linear_blocks: int | None = Field(None, ge=2, description="As feed_forward.linear_blocks.")
    activation: ExpertActivation = Field("squared_relu", description="Of routed and shared experts.")
    activation_limit: float | None = Field(
        None,
        gt=0,
        description="Of routed and shared experts: gate at most this, and up between its negative and this, before they are multiplied: 7 in gpt-oss, 10 in DeepSeek-V4; null: no limit. Only for gated activations.",
    )
    bias: bool = Field(
        False, description="Biases on the router's logits and on both products of routed experts, as in gpt-oss."
    )
    router: Router = Field(
        "sigmoid",
        description="How logits become scores; sqrt_softplus: the square root of log(1 + e^logit). Or a router of a package or of yours (docs/hooks.md).",
    )
    router_options: RegisteredRouters = Field(RegisteredRouters(), description="Options of a package's router.")
    normalize_probabilities: bool = Field(True, description="Divide the chosen scores by their sum.")
    routed_scaling: float = Field(1.0, gt=0, description="Factor on the chosen probabilities.")
    num_router_groups: int = Field(1, gt=0, description="Groups of experts for group-limited routing; 1: no limit.")
    router_group_top_k: int = Field(1, gt=0, description="Groups that a token may use; at most num_router_groups.")
    group_score_top_k: int = Field(
        2,
        gt=0,
        description="Groups are ranked by the sum of this many of their best experts: 2 in DeepSeek-V3, 1 in DeepSeek-V2, top_k / router_group_top_k in Megatron-Core.",
    )
    expert_bias: bool = Field(
        False,
        description="Add a balancing bias to the scores when choosing (Wang et al. 2024, arXiv 2408.15664); not with softmax.",
    )
    bias_rule: Literal["sign", "quantile"] = Field(
        "sign",
        description="How the balancing bias follows a step: by bias_update_rate against the load's sign, or as the quantile with which each expert would have had an even share.",
    )
    bias_update_rate: float = Field(
        1e-3,
        ge=0,
        description="Change of the balancing bias after each step with bias_rule sign; 0: the bias stays, with both.",
    )
    auxiliary_loss_weight: float = Field(
        0.0, ge=0, description="Balance over a micro-batch (Fedus et al. 2021, arXiv 2101.03961, section 2.2)."
    )
    sequence_loss_weight: float = Field(
        0.0, ge=0, description="Balance inside each sequence (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."
    )
    balance_counts: Literal["routed", "scores"] = Field(
        "scores",
        description="Load in both balance losses: the routes that only `scores` would choose, as the equations of both papers, or routes as `routed`, with bias and groups.",
    )
    z_loss_weight: float = Field(
        0.0, ge=0, description="Squared log-sum-exp of the router logits (Zoph et al. 2022, arXiv 2202.08906)."
    )
    latent_size: int | None = Field(
        None, gt=0, description="Width at which tokens are sent to routed experts; null: hidden_size."
    )
    capacity_factor: float | None = Field(
        None,
        gt=0,
        description="While training, an expert accepts this many times its even share of a micro-batch's token-expert assignments; null: no limit.",
    )
    overflow: Literal["drop", "recycle"] = Field(
        "drop",
        description="Tokens over an expert's capacity are dropped, or go to a random expert with free capacity (Hunyuan-Large, arXiv 2411.02265).",
    )

    forced_balance: bool = Field(
        False,
        description="Only for benchmarks: in training each token gets the next top_k experts whatever the router would choose, so that all loads are equal.",
    )

    def shared_structure(self) -> Structure:
        """Form of the shared expert's matrices."""
        return Structure(
            self.shared_expert_linear_kind, self.shared_expert_linear_rank, self.shared_expert_linear_blocks
        )

    training_only: ClassVar[frozenset[str]] = frozenset(
        (
            "bias_rule",
            "bias_update_rate",
            "auxiliary_loss_weight",
            "sequence_loss_weight",
            "balance_counts",
            "z_loss_weight",
        )
    )

    def feed_forwards(self) -> tuple[FeedForwardPart, ...]:
        """The shared expert, which may be none; routed experts are dense."""
        inner, structure = self.shared_expert_hidden_size, self.shared_structure()
        return (FeedForwardPart("shared.", "shared_expert_", structure, inner, self.activation),)

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        """Every token finds top_k different experts in the groups it may use, and options have an effect."""
        if self.top_k > self.num_experts:
            yield "top_k", f"must be at most model.moe.num_experts={self.num_experts}; lower top_k"
        yield from broken_limit(self.activation, self.activation_limit)
        yield from self._broken_groups()
        if self.router not in OURS or self.router_options.packages_used():
            from amfm.model.config.moe_rules import broken_router

            yield from broken_router(self)
        if self.shared_expert_gate and not self.shared_expert_hidden_size:
            rule = "needs model.moe.shared_expert_hidden_size above 0: there is no shared expert to gate"
            yield "shared_expert_gate", f"{rule}; set its size, or remove the gate"
        if not self.shared_expert_hidden_size and self.shared_structure() != DENSE:
            rule = "has no effect with model.moe.shared_expert_hidden_size=0: there is no shared expert"
            yield "shared_expert_linear_kind", f"{rule}, and routed experts are dense; set its size, or remove this"
        if self.expert_bias and self.router == "softmax":
            rule = "needs model.moe.router=sigmoid or sqrt_softplus, not softmax"
            yield "expert_bias", f"{rule}; use router: sigmoid, or balance with auxiliary_loss_weight"
        if self.bias_rule == "quantile":
            from amfm.model.config.moe_rules import broken_quantile

            yield from broken_quantile(self)
        if self.overflow == "recycle" and self.capacity_factor is None:
            rule = "needs model.moe.capacity_factor: without it no expert is ever full"
            yield "overflow", f"{rule}; set capacity_factor: 1.5, or remove overflow"
        if self.overflow == "recycle" and self.capacity_factor is not None and self.capacity_factor < 1:
            rule = f"needs model.moe.capacity_factor of at least 1, not {self.capacity_factor}"
            remedy = "experts have room for fewer choices than there are; raise it, or use overflow: drop"
            yield "overflow", f"{rule}: {remedy}"

    def package_router(self) -> RouterSpec | None:
        """The router of a package that `router` names; None for ours."""
        return None if self.router in OURS else router_specs()[self.router]

    def refuses(self) -> dict[str, str]:
        """Context ranks, where a package's router compares the tokens of whole rows."""
        spec = self.package_router()
        if spec is None or not spec.compares_tokens:
            return {}
        return {"context": f"its router {spec.name} compares the tokens of whole rows"}

    def broken_training(self) -> Iterator[tuple[str, str, str]]:
        """A weight that is always 1 gives the router no gradient (Megatron-Core rejects it too)."""
        if self.top_k == 1 < self.num_experts and self.normalize_probabilities and self.router in OURS:
            rule = "gives the one chosen expert the weight 1, with normalize_probabilities: the router gets no gradient of the loss"
            yield "top_k", rule, "use normalize_probabilities: false, or top_k of 2 or more"

    def routes_by_scores(self) -> bool:
        """Whether neither a bias nor a limit of groups has a part in choosing experts; a package's router is not asked."""
        return self.router not in OURS or (not self.expert_bias and self.router_group_top_k == self.num_router_groups)

    def _broken_groups(self) -> Iterator[tuple[str, str]]:
        """Groups of experts are of one size, and those that a token may use hold its experts."""
        yield from must_divide("num_router_groups", self.num_router_groups, "model.moe.num_experts", self.num_experts)
        if self.router_group_top_k > self.num_router_groups:
            rule = f"must be at most model.moe.num_router_groups={self.num_router_groups}; lower it"
            yield "router_group_top_k", rule
        group_size = self.num_experts // self.num_router_groups
        if self.num_router_groups > 1 and group_size < self.group_score_top_k:
            rule = f"leaves {group_size} expert(s) per group, and group_score_top_k={self.group_score_top_k} of them rank it"
            yield "num_router_groups", f"{rule}; use fewer groups, or group_score_top_k: {group_size}"
        if self.group_score_top_k != 2 and self.router_group_top_k == self.num_router_groups:
            rule = "has no effect if every group may be used (router_group_top_k = num_router_groups)"
            yield "group_score_top_k", f"{rule}; limit the groups, or remove it"
        reachable = self.router_group_top_k * group_size
        if self.top_k > reachable:
            rule = f"must be at most the {reachable} experts that router_group_top_k={self.router_group_top_k} groups"
            yield "top_k", f"{rule} of {group_size} hold; lower top_k or raise router_group_top_k"

    def cut_evenly(self) -> dict[Axis, dict[str, int]]:
        """Experts, their inner widths, and channels and blocks of factors of the shared expert."""
        shared = {}
        if self.shared_expert_hidden_size:
            shared["shared_expert_hidden_size"] = self.shared_expert_hidden_size
        if self.shared_expert_linear_blocks is not None:
            shared["shared_expert_linear_blocks"] = self.shared_expert_linear_blocks
        return {
            "expert": {"num_experts": self.num_experts},
            "expert_tensor": {"expert_hidden_size": self.expert_hidden_size},
            "tensor": shared,
        }

    def auxiliary_names(self) -> tuple[str, ...]:
        """Those with a weight (model/moe/balance.py)."""
        weights = {
            "balance": self.auxiliary_loss_weight,
            "sequence_balance": self.sequence_loss_weight,
            "router_z": self.z_loss_weight,
        }
        spec = self.package_router()
        return (*(name for name, weight in weights.items() if weight), *(() if spec is None else spec.losses))

    def routed_experts(self) -> int:
        """num_experts."""
        return self.num_experts

    def expert_width(self, hidden_size: int) -> int:
        """Width of the rows that routed experts read and write, with the channels that biases need."""
        return (self.latent_size or hidden_size) + BIAS_CHANNELS * self.bias

    def prunable(self, groups: str) -> Prunable | None:
        """Inner channels of the shared expert, or whole routed experts, whose bias then keeps the router from them."""
        if groups == "channels" and self.shared_expert_hidden_size:
            inner = self.shared_expert_hidden_size
            return Prunable({"shared_expert_hidden_size": 1}, inner, channel_dims(inner), place="shared.")
        if groups != "experts":
            return None
        from amfm.model.config.moe_rules import keeps_experts

        dims = {name: (0, self.num_experts, 1) for name in ("experts.up", "experts.down")}
        return Prunable(
            {"num_experts": 1},
            self.num_experts,
            dims,
            rows=("router.weight", "expert_bias"),
            least="top_k",
            refused=tuple(keeps_experts(self)),
        )
