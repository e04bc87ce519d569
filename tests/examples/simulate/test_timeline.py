"""Events of traced ranks on a clock: what overlaps, who waits for whom, and the file that Perfetto opens."""

import json
import math

import pytest
from amfm_simulate.timeline import compare_seconds, draw_streams, lay_out, planned_step, write_timeline
from amfm_simulate.trace import TracedRank
from matplotlib.figure import Figure

from amfm.launch.plan.estimate import Assumptions
from amfm.launch.plan.hardware import Hardware
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.memory import Memory
from tests.launch.plan.presets import preset

NANOSECOND = 1e-3  # in the microseconds of the format
# One second for 1e12 FLOPs of a product, 1e12 bytes of memory, 1e9 bytes of a link.
SIMPLE = Hardware(
    name="simple",
    bf16_flops=1e12,
    float32_flops=1e12,
    memory_gib=80,
    memory_bytes_per_second=1e12,
    node_link_bytes_per_second=1e9,
    network_bytes_per_second=1e9,
    hop_seconds=0,
    product_efficiency=1,
    grouped_efficiency=1,
    attention_efficiency=1,
    memory_efficiency=1,
    link_efficiency=1,
)


def computing(seconds, kind="M"):
    return {
        "do": "compute",
        "name": "aten.mm",
        "kind": kind,
        "phase": "forward",
        "limit": "product",
        "wide": False,
        "flops": int(seconds * 1e12),
        "bytes": 0,
    }


def gather(number, seconds=1.0, axis="dp_cp"):
    """A gather over two ranks, of which each hands in what the other needs."""
    place = {"axis": axis, "ranks": 2, "stride": 1, "number": number}
    return {"do": "collective", "collective": "all_gather", "bytes": seconds * 1e9, **place}


def passing(what, number, peer, seconds=1.0):
    return {"do": what, "axis": "pp", "ranks": 2, "stride": 1, "number": number, "peer": peer, "bytes": seconds * 1e9}


def waiting(number):
    return {"do": "wait", "number": number}


def traced(rank, *events, overrides=("parallel.pipeline=2",)):
    config = preset("ladder_20m", *overrides, ranks=2)
    entry = {"events": list(events), "micro_batches": 1}
    return TracedRank(rank, "training", config, Layout.of(config, 2), Memory({}, "passes"), entry)


def test_a_collective_runs_beside_what_is_computed_until_somebody_waits_for_it():
    (line,) = lay_out([traced(0, computing(1), gather(1), computing(0.25, "E"), waiting(1), computing(0.5))], SIMPLE)
    assert line.seconds == pytest.approx(2.5)
    assert line.waited == pytest.approx({"dp_cp": 0.75})
    assert line.busy == pytest.approx({"mamba": 1.5, "moe": 0.25})
    spans = {(entry.lane, entry.name): (entry.start, entry.stop) for entry in line.slices}
    assert spans["dp_cp", "all_gather"] == pytest.approx((1.0, 2.0))
    assert spans["compute", "moe: aten.mm"] == pytest.approx((1.0, 1.25))


def test_a_picture_shows_what_each_stream_does():
    (line,) = lay_out([traced(0, computing(1), gather(1), computing(0.25, "E"), waiting(1))], SIMPLE)
    axes = Figure().subplots()
    draw_streams(axes, line)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["compute", "dp_cp"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["mamba", "exchanges", "moe"]
    ends = [bars.get_datalim(axes.transData).x1 for bars in axes.collections]
    assert ends == pytest.approx([1000, 2000, 1250]) and axes.get_xlim() == (0, 2000)


def test_collectives_of_one_axis_follow_each_other_and_those_of_two_do_not():
    (line,) = lay_out([traced(0, gather(1), gather(2), gather(3, axis="tp"), waiting(3), waiting(2))], SIMPLE)
    assert line.seconds == pytest.approx(2.0)
    assert line.waited == pytest.approx({"tp": 1.0, "dp_cp": 1.0})


def test_a_stage_waits_for_what_another_sends():
    first = traced(
        0, computing(1), passing("send", 1, 1), passing("receive", 2, 1), waiting(2), waiting(1), computing(1)
    )
    last = traced(1, passing("receive", 1, 0), waiting(1), computing(2), passing("send", 2, 0), waiting(2))
    ahead, behind = lay_out([first, last], SIMPLE)
    assert behind.waited == pytest.approx({"pp": 3.0})  # for the stream, then for its own send
    assert behind.seconds == pytest.approx(5.0)
    assert ahead.seconds == pytest.approx(6.0)
    # Of a rank that was not traced the stream is there in time.
    (alone,) = lay_out([last], SIMPLE)
    assert alone.seconds == pytest.approx(4.0)


def test_weights_that_the_step_before_gathers_arrive_during_this_one():
    (line,) = lay_out([traced(0, computing(0.5), waiting(3), computing(1), gather(8))], SIMPLE)
    assert line.seconds == pytest.approx(2.0)
    assert [entry.start for entry in line.slices if entry.lane == "dp_cp"] == [0.0]


def test_the_parts_of_both_sides_add_up():
    (line,) = lay_out(
        [traced(0, computing(1), gather(1), waiting(1), computing(0.5, "step"), computing(1, "head"))], SIMPLE
    )
    parts = compare_seconds(line, planned_step(line.entry, SIMPLE, Assumptions()))
    planned, found = parts.pop("all")
    assert planned == pytest.approx(sum(said for said, _ in parts.values()))
    assert found == pytest.approx(sum(own for _, own in parts.values())) == pytest.approx(line.seconds)
    assert parts["optimizer and gradient accumulation"][1] == pytest.approx(0.5)


def assert_trace_events(document):
    """Hold a file to the rules of Chrome's trace event format (JSON object form), which Perfetto reads.

    Every event names its phase and process; complete ones (X) have a time and a duration and, on one thread, are in each
    other or apart; instants (i) have a scope; metadata (M) names a process or a thread.
    """
    assert document.keys() <= {"traceEvents", "displayTimeUnit", "otherData"}
    assert document["displayTimeUnit"] in ("ms", "ns")
    spans, named, used = {}, set(), set()
    for event in document["traceEvents"]:
        assert isinstance(event["name"], str) and type(event["pid"]) is int, event
        assert isinstance(event.get("args", {}), dict)
        if event["ph"] == "M":
            field = {"process_name": "name", "thread_name": "name", "thread_sort_index": "sort_index"}[event["name"]]
            assert isinstance(event["args"][field], str if field == "name" else int), event
            named.add((event["pid"], event.get("tid")))
            continue
        assert event["ph"] in "Xi" and type(event["tid"]) is int, event
        assert math.isfinite(event["ts"]) and event["ts"] >= 0, event
        used.add((event["pid"], event["tid"]))
        if event["ph"] == "i":
            assert event["s"] in ("g", "p", "t") and "dur" not in event, event
        else:
            assert math.isfinite(event["dur"]) and event["dur"] >= 0, event
            spans.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    assert used <= named  # every stream has a name
    for lane in spans.values():
        around = []
        for start, stop in sorted(lane, key=lambda span: (span[0], -span[1])):
            while around and around[-1] <= start + NANOSECOND:
                around.pop()
            assert not around or stop <= around[-1] + NANOSECOND, (start, stop, around[-1])
            around.append(stop)


def test_perfetto_gets_a_process_a_rank_and_a_thread_a_stream(tmp_path):
    lines = lay_out(
        [traced(0, computing(1), gather(1), {"do": "host", "what": "a file:1: a number"}, waiting(1))], SIMPLE
    )
    write_timeline(lines, tmp_path / "out.json")
    document = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert_trace_events(document)
    events = document["traceEvents"]
    names = {event["args"]["name"] for event in events if event["ph"] == "M" and "name" in event["args"]}
    assert names == {"rank 0, pipeline stage 0", "compute", "dp_cp", "waits of the host"}
    spans = [event for event in events if event["ph"] == "X"]
    assert [(event["ts"], event["dur"]) for event in spans] == [pytest.approx((0, 1e6)), pytest.approx((1e6, 1e6))]
    assert all(event["pid"] == 0 for event in events)


def test_what_was_posted_at_once_arrives_one_after_the_other(tmp_path):
    sends = computing(1), passing("send", 1, 1), computing(2), passing("send", 2, 1), waiting(1), waiting(2)
    awaited = passing("receive", 1, 0), passing("receive", 2, 0), waiting(1), computing(1), waiting(2)
    lines = lay_out([traced(0, *sends), traced(1, *awaited)], SIMPLE)
    write_timeline(lines, tmp_path / "out.json")
    assert_trace_events(json.loads((tmp_path / "out.json").read_text(encoding="utf-8")))
    received = [entry for entry in lines[1].slices if entry.name == "receive"]
    assert [(entry.start, entry.stop) for entry in received] == [pytest.approx((0, 2)), pytest.approx((2, 4))]


@pytest.mark.parametrize(
    "broken",
    [
        {"ph": "X", "name": "a", "pid": 0, "tid": 0, "ts": 0.0, "dur": -1.0},
        {"ph": "X", "name": "a", "pid": 0, "tid": 0, "ts": 1.0, "dur": 2.0},
        {"ph": "X", "name": "a", "pid": 0, "tid": 9, "ts": 0.0, "dur": 1.0},
        {"ph": "i", "name": "a", "pid": 0, "tid": 0, "ts": math.inf, "s": "t"},
        {"ph": "i", "name": "a", "pid": 0, "tid": 0, "ts": 0.0},
    ],
    ids=["negative duration", "overlap", "a stream without a name", "no time", "no scope"],
)
def test_what_perfetto_could_not_show_is_found(broken):
    stream = {"ph": "M", "name": "thread_name", "pid": 0, "tid": 0, "args": {"name": "compute"}}
    first = {"ph": "X", "name": "b", "pid": 0, "tid": 0, "ts": 0.0, "dur": 2.0}
    document = {"traceEvents": [stream, first], "displayTimeUnit": "ms"}
    assert_trace_events(document)
    with pytest.raises((AssertionError, KeyError)):
        assert_trace_events(document | {"traceEvents": [stream, first, broken]})
