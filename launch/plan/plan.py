"""What a run will cost before anything is rented: its size, memory, time, and which layouts fit.

How it works: a layout (`layout.py`) says how many ranks each axis has and what one rank of every pipeline stage holds.
Only from that and the configuration `memory.py` adds up the bytes of the most loaded rank and `time.py` the seconds of the
slowest stage: operations at their roofline (`hardware.py`), collectives by the bytes of `exchanges/` on the declared
links. `search.py` lists layouts that obey every rule of a run; here they are estimated, ranked and explained.

Why formulas: nothing is allocated and no model is built, so that a laptop plans 2,048 GPUs and a search tries thousands
of layouts. What formulas leave out is stated (`Assumptions`) and measured: tests/launch/plan hold the memory and the
bytes against real steps, `python -m benchmarks.calibration` and `benchmarks.published` the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from amfm.launch.plan.activations import storage_of
from amfm.launch.plan.blocks.indexer import pays_from
from amfm.launch.plan.cuts import TimedCut, cut_by_seconds
from amfm.launch.plan.estimate import Assumptions, Estimate, estimate, estimate_as_dict, mfu_range
from amfm.launch.plan.exchanges.buckets import bucketed_bytes
from amfm.launch.plan.failures.goodput import Goodput, estimate_goodput
from amfm.launch.plan.failures.replicas import HostMemory, ReplicaCost, estimate_host, estimate_replicas
from amfm.launch.plan.hardware import GIB, Hardware
from amfm.launch.plan.layout import Layout, held_by_stages
from amfm.launch.plan.left_out import LeftOut, Tally, untried
from amfm.launch.plan.memory import persistent_bytes
from amfm.launch.plan.ranking import Found, at_stage, choose_layouts, rank_layouts
from amfm.launch.plan.search import LARGEST_CONTEXT, all_layouts, is_allowed, neighbour_layouts, with_layout
from amfm.model.config.schema import has_indexer
from amfm.model.flops import Counts, count_parameters, flops_per_token
from amfm.pretrain.checks.stages import ranks_of_stage
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.stages import RunStage, resolve_stages

SECONDS_A_DAY = 86_400
Progress = Callable[[int, int, str], None]  # done, all, a warning
SHOWN_LAYOUTS = 8


def no_progress(done: int, total: int, remark: str) -> None:
    """Progress that no one sees."""


@dataclass(frozen=True)
class StageEstimate:
    """Estimate of one training stage in the configuration's own layout.

    A search adds `layouts`, which fit this stage, fastest first, and the `chosen` one of them, with which a run of all
    stages is fastest; None if nothing fits.
    """

    stage: RunStage
    estimate: Estimate
    layouts: tuple[Estimate, ...] = ()
    chosen: Estimate | None = None

    def seconds(self) -> float:
        """Seconds of the whole stage; steps of a batch ramp count as full ones."""
        return self.stage.num_steps * self.estimate.step.total()


@dataclass(frozen=True)
class Plan:
    """Everything that `amfm plan` prints; `own` is the first training stage in the configuration's own layout.

    `layouts` and `near_misses` suit every stage, or after a search the first one, since each has its own then. `is_search`:
    whether layouts of all axes were tried. `is_own`: False if a stage's layout breaks a rule for this many ranks, and the
    best one found takes its place. `left_out`: why a search of the first stage has no other layouts. `cut`: the fastest layout of a
    search with its pipeline cut by seconds, None if that takes as long. `tokens` may differ from the configuration's where the user asked for another number;
    stages are scaled in proportion. `goodput`: of the first training stage, None if no one asked for it.
    """

    config: RunConfig
    hardware: Hardware
    counts: Counts
    flops: dict[str, float]
    stages: tuple[StageEstimate, ...]
    layouts: tuple[Estimate, ...]
    near_misses: tuple[Estimate, ...]
    is_own: bool
    is_search: bool
    tokens: float
    assumptions: Assumptions
    left_out: tuple[LeftOut, ...] = ()
    goodput: Goodput | None = None
    cut: TimedCut | None = None

    @property
    def own(self) -> Estimate:
        """Estimate of the first training stage."""
        return self.stages[0].estimate

    @property
    def replicas(self) -> ReplicaCost | None:
        """Cost of the replicas in the first training stage; None if the run writes none."""
        return estimate_replicas(self.config, self.own, self.hardware)

    @property
    def store_bytes(self) -> int | None:
        """Bytes of the store of a teacher; None for a run without one."""
        if self.config.distill is None:
            return None
        from amfm.launch.plan.teacher import store_bytes

        return store_bytes(self.config)

    @property
    def host(self) -> HostMemory:
        """What saves take of each host in the first training stage."""
        return estimate_host(self.config, self.own, self.hardware)

    def seconds(self) -> float:
        """Seconds of the whole run in the configuration's own layout, scaled to `tokens`."""
        declared = sum(entry.stage.num_tokens() for entry in self.stages)
        return sum(entry.seconds() for entry in self.stages) * self.tokens / declared


def make_plan(
    config: RunConfig,
    hardware: Hardware,
    ranks: int,
    assumptions: Assumptions,
    *,
    tokens: float | None = None,
    search: bool = False,
    progress: Progress = no_progress,
) -> Plan:
    """Plan a configuration that `check_run` passed for `ranks` ranks.

    `tokens`: of the run; None: as configured. `search`: over all axes, not only ZeRO stages and micro-batch sizes, and
    for each stage on its own; then the configuration's own layouts need not suit this many ranks. `progress`: of layouts that
    were tried, of a search. Raises ValueError if
    no layout obeys all rules, and for an optimizer in the host's memory, which is not modelled.
    """
    config = hardware.with_precision(config)
    hardware = hardware.with_libraries(config)
    stages = resolve_stages(config)
    if any(stage.config.parallel.offload_optimizer for stage in stages):
        raise ValueError(
            "parallel.offload_optimizer=true is not modeled: the plan counts master weights, moments and the optimizer's step on "
            "the device; plan with false"
        )
    runs = [stage.config for stage in stages]
    numbers = [ranks_of_stage(config, stage, range(ranks, 0, -hardware.gpus_per_node)) for stage in stages]
    if search:
        found = search_stages(runs, ranks, hardware, assumptions, progress)
    else:
        neighbours = neighbour_layouts(runs[0], numbers[0])
        found = [rank_layouts(config, runs, neighbours, hardware, assumptions, recomputes=False)]
    chosen = choose_layouts(stages, found) if search else ()
    fits_ranks = [is_allowed(run, number) for run, number in zip(runs, numbers)]
    if not all(fits_ranks):
        runs = lay_out(runs, chosen or [found[0].nearest] * len(runs), config, stages, ranks)
        numbers = [ranks] * len(runs)
    own = [with_range(run, Layout.of(run, number), hardware, assumptions) for run, number in zip(runs, numbers)]
    entries = [StageEstimate(stage, item) for stage, item in zip(stages, own)]
    if search:
        entries = [
            StageEstimate(entry.stage, entry.estimate, here.fitting, best if best and best.fits() else None)
            for entry, here, best in zip(entries, found, chosen)
        ]
    return Plan(
        config=config,
        hardware=hardware,
        counts=count_parameters(config.model),
        flops=flops_of(config, stages[0].train.sequence_length),
        stages=tuple(entries),
        layouts=found[0].fitting,
        near_misses=found[0].misses,
        is_own=all(fits_ranks),
        is_search=search,
        assumptions=assumptions,
        tokens=tokens or float(sum(stage.num_tokens() for stage in stages)),
        left_out=found[0].left_out,
        goodput=estimate_goodput(config, own[0], hardware, assumptions),
        cut=cut_of_fastest(stages[0].config, found[0], hardware, assumptions) if search else None,
    )


def cut_of_fastest(run: RunConfig, found: Found, hardware: Hardware, assumptions: Assumptions) -> TimedCut | None:
    """The fastest layout of a search with its pipeline cut by seconds; None without one, or where that takes as long."""
    if not found.fitting:
        return None
    layout = found.fitting[0].layout
    return cut_by_seconds(with_layout(run, layout), layout, hardware, assumptions)


def lay_out(
    runs: list[RunConfig],
    best: Sequence[Estimate | None],
    config: RunConfig,
    stages: Sequence[RunStage],
    ranks: int,
) -> list[RunConfig]:
    """Give each stage's run the layout that is best for it; raises ValueError for a stage without one."""
    missing = [stage.name for stage, item in zip(stages, best) if item is None]
    if missing:
        raise ValueError(f"no layout of stage {missing[0]} obeys all rules for {ranks} ranks")
    return [
        with_layout(run, at_stage(item.layout, config, index, run))
        for index, (run, item) in enumerate(zip(runs, best))
        if item
    ]


def with_range(run: RunConfig, layout: Layout, hardware: Hardware, assumptions: Assumptions) -> Estimate:
    """The estimate of a layout together with the range that its MFU is in."""
    item = estimate(run, layout, hardware, assumptions)
    return replace(item, mfu_range=mfu_range(run, layout, hardware, assumptions))


def counted(layouts: list[Layout], progress: Progress) -> Iterator[Layout]:
    """Yield layouts, with the number of those that were tried."""
    for done, layout in enumerate(layouts):
        progress(done, len(layouts), "")
        yield layout
    progress(len(layouts), len(layouts), "")


def search_stages(
    runs: list[RunConfig], ranks: int, hardware: Hardware, assumptions: Assumptions, progress: Progress
) -> list[Found]:
    """Search the layouts of every stage, each taken as a run; stages of equal rows, batch and indexers share one search."""
    known: dict[tuple[Any, ...], Found] = {}
    shapes = []
    for run in runs:
        train = run.train
        indexers = tuple(getattr(options, "indexer", None) for _, options in run.model.sections())
        shape = (train.sequence_length, train.global_batch_size, train.batch_ramp is not None, indexers)
        shapes.append(shape)
        if shape not in known:
            tally = Tally()
            layouts = list(all_layouts(run, ranks, hardware.gpus_per_node, tally))
            ranked = rank_layouts(
                run, [run], counted(layouts, progress), hardware, assumptions, recomputes=True, tally=tally
            )
            more = untried(run, ranks, hardware, largest_context=LARGEST_CONTEXT)
            known[shape] = replace(ranked, left_out=(*tally.reasons(), *more))
    return [known[shape] for shape in shapes]


def flops_of(config: RunConfig, sequence_length: int) -> dict[str, float]:
    """FLOPs of a token by kind of block, those of a teacher among them."""
    found = flops_per_token(config.model, sequence_length)
    if config.distill is None:
        return found
    from amfm.launch.plan.teacher import teacher_flops  # where one teaches

    return found | teacher_flops(config)


def describe_unplanned(config: RunConfig) -> str:
    """What to know of a teacher that the plan does not count; empty for most runs."""
    if config.distill is None:
        return ""
    from amfm.launch.plan.teacher import describe_missing

    return describe_missing(config)


def advise(plan: Plan) -> str:
    """What to do when a stage does not fit in the configuration's own layout, or a save in the hosts; empty when all do."""
    misfits = [entry for entry in plan.stages if not entry.estimate.fits()]
    if not misfits:
        return plan.host.problem() or describe_unplanned(plan.config)
    where = f"stage {misfits[0].stage.name} of " if len(plan.stages) > 1 else ""
    if plan.layouts:
        best = plan.layouts[0].layout.describe()
        return f"{where}this layout does not fit; fits: {best}"
    return where + explain_no_layout(plan)


def explain_no_layout(plan: Plan) -> str:
    """Why every layout is out of memory, and which part of the model or batch would have to shrink."""
    if not plan.near_misses:
        return "no layout obeys all rules for this many ranks; see `amfm config CONFIG --ranks N`"
    room = plan.hardware.memory_gib * GIB
    nearest = plan.near_misses[0]
    parts, layout = nearest.memory.parts, nearest.layout
    by_rows = parts.get("activations", 0.0) + parts.get("working space", 0.0)
    storage = storage_of(plan.config)
    held = max(
        held_by_stages(
            plan.config.model,
            layout,
            plan.stages[0].stage.train.sequence_length,
            plan.config.optimizer.matrix_settings(),
        ),
        key=lambda entry: entry.parameters,
    )
    # What no number of data ranks and rows takes away.
    gradients = bucketed_bytes(held, layout) if layout.zero_stage in (1, 2) else storage.element_bytes * held.parameters
    fixed = sum(persistent_bytes(held, layout, storage).values()) + gradients
    causes = []
    if fixed > room:
        causes.append(
            f"{fixed / GIB:,.1f} GiB of states and gradients stay whatever the micro-batch is (but under ZeRO 2 each rank holds the "
            "gradients of all its weights): cut the model by parallel.tensor, expert or pipeline; --search finds how"
        )
    elif nearest.memory.phase.startswith("building"):
        causes.append(
            "a rank builds its part of the model in float32 before ZeRO spreads it: cut the model by parallel.tensor, "
            "expert or pipeline; --search finds how"
        )
    if by_rows / layout.micro_batch_size > room:
        causes.append(
            f"activations of one sequence are {by_rows / layout.micro_batch_size / GIB:,.1f} GiB: use train.recompute=full, "
            "parallel.context, or a shorter train.sequence_length"
        )
    if not causes:
        causes.append(
            "states, gradients and sequences together are too much: use larger devices, train.recompute, or "
            "parallel.zero_stage=2, under which a rank keeps its share of the gradients"
        )
    return (
        f"no layout that was tried fits {plan.hardware.name}; the nearest ({layout.describe()}) {nearest.reason}. "
        + "; ".join(causes)
    )


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values: bytes, seconds, days and ratios, as `amfm plan --json` prints them."""
    seconds = plan.seconds()
    return {
        "gpus": plan.own.layout.ranks,
        "gpu": plan.hardware.name,
        "assumptions": asdict(plan.assumptions)
        | {each.name: each.assumes for each in plan.own.mfu_range}
        | {name: value for name, value in plan.hardware.model_dump().items() if name.endswith("_efficiency")},
        "parameters": {
            "total": plan.counts.total,
            "active": plan.counts.active,
            "total_by_kind": plan.counts.total_by_kind,
            "active_by_kind": plan.counts.active_by_kind,
        },
        "flops_per_token": sum(plan.flops.values()),
        "flops_per_token_by_kind": plan.flops,
        **({"sparse_from": sparse_from(plan)} if has_indexer(plan.config.model) else {}),
        **estimate_as_dict(plan.own),
        "stages": [
            {
                "name": entry.stage.name,
                "steps": entry.stage.num_steps,
                "tokens": entry.stage.num_tokens(),
                "sequence_length": entry.stage.train.sequence_length,
                "days": entry.seconds() / SECONDS_A_DAY,
                **estimate_as_dict(entry.estimate),
                **searched_as_dict(entry),
            }
            for entry in plan.stages
        ],
        "run": {
            "tokens": plan.tokens,
            "tokens_per_day": plan.tokens / seconds * SECONDS_A_DAY,
            "days": seconds / SECONDS_A_DAY,
            "gpu_hours": seconds / 3600 * plan.own.layout.ranks,
        },
        "host": asdict(plan.host),
        "replicas": None if plan.replicas is None else plan.replicas.to_json(),
        **({} if plan.store_bytes is None else {"teacher_store_bytes": plan.store_bytes}),
        "goodput": None if plan.goodput is None else plan.goodput.to_json(),
        "advice": advise(plan),
        "layouts": [estimate_as_dict(item) for item in plan.layouts],
        "near_misses": [estimate_as_dict(item) for item in plan.near_misses],
        **({"left_out": [vars(entry) for entry in plan.left_out]} if plan.is_search else {}),
        **({} if plan.cut is None else {"cut": {"pattern": plan.cut.pattern, **estimate_as_dict(plan.cut.estimate)}}),
    }


def sparse_from(plan: Plan) -> dict[str, int | None]:
    """The sequence length from which chosen keys are predicted to take less time than all, by kind of block; None: from none."""
    model, precision = plan.config.model, plan.config.train.precision
    return {
        kind.name: pays_from(options, model.hidden_size, plan.hardware, precision)
        for kind, options in model.kinds_in_use()
        if getattr(options, "indexer", None) is not None
    }


def searched_as_dict(entry: StageEstimate) -> dict[str, Any]:
    """What a search found for a stage, as JSON values; empty without a search."""
    if not entry.layouts:
        return {}
    chosen = None if entry.chosen is None else estimate_as_dict(entry.chosen)
    return {"chosen": chosen, "layouts": [estimate_as_dict(item) for item in entry.layouts[:SHOWN_LAYOUTS]]}
