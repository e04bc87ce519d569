"""A conversion whose updates a router chooses among: they are trained, resume, and stay in a model like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from amfm_convert.measure import ConversionReport, RoutedSource, Ruler
from amfm_convert.rules import check_conversion
from amfm_convert.stages import ConversionStage, conversion_stages
from amfm_convert.verbs import print_conversion
from amfm_convert.weights import StartReport, stage_weights, write_folder, write_start
from safetensors.torch import save_file

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.store.store import TokenStore
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups
from amfm.model.routed_updates import ENDS
from amfm.pretrain.checkpoint.inspect import diff_checkpoints, find_checkpoint, read_full_state
from amfm.pretrain.config.convert import ConvertConfig
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.export.export import resolve_target
from amfm.pretrain.inference.weights import Weights, read_weights
from amfm.pretrain.train import train
from tests.examples.convert.conversions import conversion, train_teacher
from tests.pretrain.tiny_run import read_metrics

ROUTING = {"num_experts": 3, "top_k": 2, "hard_from_step": 2}


def test_routed_updates_are_tuned_resume_to_the_bit_and_stay_in_the_result(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = train_teacher(data, tmp_path)
    config = conversion(data, tmp_path, teacher, convert__transfer=None, convert__tune__routing=ROUTING)
    check_conversion(config, 1)
    write_start(config)
    tune, *_ = conversion_stages(config)
    assert train(tune.config) == 0
    assert all(line["auxiliary"]["lora_balance"] > 0 for line in read_metrics(tune.run_dir))

    again = tune.config.model_copy(update={"run": tune.config.run.model_copy(update={"dir": str(tmp_path / "again")})})
    assert train(again.model_copy(update={"train": again.train.model_copy(update={"stop_after_steps": 2})})) == 0
    assert train(again) == 0
    difference = diff_checkpoints(*(find_checkpoint(Path(path)) for path in (tune.run_dir, again.run.dir)))
    assert not difference["tensors"] and not difference["only_in_first"] and not difference["only_in_second"]

    tuned, first = stage_weights(tune), read_weights(tune.initial)
    for name, tensor in first.state.items():
        assert name.startswith("blocks.0.mixer.") or torch.equal(tuned.state[name], tensor), name
    assert {name for name in tuned.state if name not in first.state} == {n for n in tuned.state if n.endswith(ENDS)}
    assert all(tuned.state[name].any() for name in tuned.state if name.endswith("lora.up"))
    write_folder(tmp_path / "result", tuned)
    result, run = read_weights(tmp_path / "result"), read_weights(tune.run_dir)
    assert run.model.lora_mixer is not None and run.model.lora_mixer.hard_from_step == 2
    # Its choices are hard from the first step of a run that continues from it.
    assert result.model.lora_mixer == run.model.lora_mixer.model_copy(update={"hard_from_step": None})
    tokens_BT, meta = torch.tensor([[1, 2, 3]]), PackMeta.one_document_a_row(1, 3)
    logits = [weights.build()(tokens_BT, meta).logits_BTV for weights in (result, run, first)]
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    with pytest.raises(ValueError, match="no class holds them"):
        resolve_target(result, "own")
    check_what_sources_choose(config, result, capsys)


@pytest.mark.slow
def test_updates_trained_elsewhere_stay_as_they_are_while_the_router_is_trained(
    data: DataConfig, tmp_path: Path
) -> None:
    teacher = train_teacher(data, tmp_path)
    donors = []
    for number, alpha in ((0, 4.0), (1, 2.0)):
        own = conversion(data, tmp_path / str(number), teacher, convert__transfer=None, train__seed=number)
        own = own.model_copy(update={"convert": with_tune(own, alpha=alpha)})
        write_start(own)
        donor = next(stage for stage in conversion_stages(own) if stage.name == "tune-teacher")
        assert train(donor.config) == 0
        donors.append(read_full_state(find_checkpoint(donor.run_dir)))
    # The third comes from peft: A and B of every projection, with the names of an export.
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "bias": "none", "use_rslora": False}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    names = [name for name in donors[0] if name.endswith((".lora.down", ".lora.up"))]
    written = {name: torch.randn_like(donors[0][name]) for name in names}
    theirs = {
        name.replace("blocks.", "base_model.model.model.layers.", 1)
        .replace(".lora.down", ".lora_A.weight")
        .replace(".lora.up", ".lora_B.weight"): tensor
        for name, tensor in written.items()
    }
    save_file(theirs, adapter / "adapter_model.safetensors")

    runs = [str(tmp_path / str(number) / "conversion" / "convert-tune-teacher") for number in (0, 1)]
    routing = {"num_experts": 3, "top_k": 2, "updates": [*runs, str(adapter)]}
    config = conversion(data, tmp_path, teacher, convert__transfer=None, convert__tune__routing=routing)
    check_conversion(config, 1)
    write_start(config)
    tune, *_ = conversion_stages(config)
    stopped = tune.config.model_copy(update={"train": tune.config.train.model_copy(update={"stop_after_steps": 2})})
    assert train(stopped) == 0
    (adapter / "adapter_config.json").unlink()  # a run that continues has them in its checkpoint
    assert train(tune.config) == 0
    state, first = stage_weights(tune).state, read_weights(tune.initial).state
    for name in names:
        parts = [donor[name] for donor in donors] + [written[name]]
        if name.endswith(".up"):  # their own alpha / rank over the conversion's 16 / 2
            parts = [part * scale for part, scale in zip(parts, (4 / 16, 2 / 16, 8 / 16))]
        torch.testing.assert_close(state[name], torch.cat(parts, 1 if name.endswith(".up") else 0), rtol=0, atol=0)
    routers = [name for name in state if name.endswith("updates.router.weight")]
    fresh = stage_model(tune)
    assert routers and all(not torch.equal(state[name], fresh.get_parameter(name)) for name in routers)
    assert all(torch.equal(state[name], first[name]) for name in first if not name.startswith("blocks.0.mixer."))

    few = conversion(data, tmp_path, teacher, convert__tune__routing=routing | {"updates": runs})
    with pytest.raises(ConfigError, match=r"routing\.updates = .*: names 2, and convert\.tune\.routing\.num_experts=3"):
        check_conversion(few, 1)
    for changes, message in (
        ({"updates": [*runs, str(teacher)]}, "has not one low-rank update"),
        ({"updates": [*runs, str(tmp_path / "nothing")]}, "holds no checkpoint"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            write_start(conversion(data, tmp_path, teacher, convert__tune__routing=routing | changes))
    wider = conversion(data, tmp_path, teacher, convert__tune__routing=routing | {"updates": runs, "num_experts": 2})
    with pytest.raises(ValueError, match=r"has rank 2, and convert\.tune\.rank=4"):
        write_start(wider.model_copy(update={"convert": with_tune(wider, rank=4)}))


def with_tune(config: RunConfig, **changes: object) -> ConvertConfig:
    assert config.convert is not None and config.convert.tune is not None
    tune = config.convert.tune.model_copy(update=changes)
    return config.convert.model_copy(update={"tune": tune})


def stage_model(stage: ConversionStage) -> HybridModel:
    """The stage's model with the first weights of its router."""
    config = stage.config
    return HybridModel(config.model, single_rank_groups(), seed=config.train.seed)


def check_what_sources_choose(config: RunConfig, result: Weights, capsys: pytest.CaptureFixture[str]) -> None:
    """The report says, for each source, its loss and how its tokens are spread over the updates of each block."""
    routed: dict[str, RoutedSource] = {}
    ruler = Ruler(config, TokenStore.open(config.data.text_store()))
    loss = ruler.measure(result, routed=routed)
    names = ruler.store.source_names
    ruler.store.close()
    assert list(routed) == list(names)
    for source in routed.values():
        assert set(source.shares) == {0, 2}
        assert all(len(shares) == 3 and sum(shares) == pytest.approx(1) for shares in source.shares.values())
    assert min(source.loss for source in routed.values()) <= loss <= max(source.loss for source in routed.values())
    start = StartReport((), (), ())
    report = ConversionReport(Path("r"), "*-", (0,), {"teacher": loss}, {}, "verdict", ruler.tokens, start, routed)
    print_conversion(report, as_json=True)
    printed = json.loads(capsys.readouterr().out)["routed_updates_by_source"]
    assert printed[names[0]]["share_of_updates_by_block"]["2"] == routed[names[0]].shares[2]
    print_conversion(report, as_json=False)
    assert "Updates by source" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"convert__tune__routing": {"num_experts": 3, "top_k": 4}}, "convert.tune.routing.top_k = 4: is more than"),
        (
            {"convert__tune__routing": ROUTING | {"hard_from_step": 3}},
            "hard_from_step = 3: must be less than convert.tune.steps=3",
        ),
        ({"convert__tune__routing": ROUTING | {"top_k": 3}}, "hard_from_step = 2: has no effect with .*top_k=3"),
        (
            {"convert__tune__routing": ROUTING, "train__compile": True},
            "train.compile = true: is not built for the routed",
        ),
        ({"model__lora_mixer": {"num_experts": 3}}, "model.lora_mixer: is what convert.tune.routing gives"),
    ],
)
def test_what_updates_are_not_built_for_is_refused(
    data: DataConfig, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_conversion(conversion(data, tmp_path, tmp_path / "teacher", **changes), 1)
