"""Conversations, prompts with completions: what is learned of them is stored, verified, read in rows, and shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from amfm.data_pipeline.config import DataConfig, PhaseConfig
from amfm.data_pipeline.loader.loader import PretrainLoader
from amfm.data_pipeline.prepare.prepare import prepare
from amfm.data_pipeline.samples.packing import IGNORED_LABEL
from amfm.data_pipeline.store.manifest import MANIFEST
from amfm.data_pipeline.store.megatron_files import export_megatron
from amfm.data_pipeline.store.shards import DamagedError
from amfm.data_pipeline.store.store import TokenStore
from amfm.data_pipeline.tokenizer.chat_template import ChatTemplate
from amfm.data_pipeline.verify import sample_text, verify_store
from tests.helpers.tiny_store import run_in_process, write_jsonl

SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
CHATML = """{% if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}<|im_end|>{% endgeneration %}{% else %}{{ message.content }}<|im_end|>{% endif %}

{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# The same without marks: what a turn adds to its prompt is the assistant's, here with the newline behind its end.
UNMARKED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 1, "b": "é <x>"}}]}
TURNS = [
    {"role": "user", "content": "What is one and one?"},
    CALL,
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "It is two.\n"},
]
TOOLS = [{"name": "add", "parameters": {"a": "int"}}]


def write_tokenizer(folder: Path, template: str | None = CHATML) -> Path:
    """A byte-level tokenizer.json with control tokens and the chat template next to it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["What is one and one? It is two. user assistant\n"] * 20, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>"} | ({} if template is None else {"chat_template": template})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder / "tokenizer.json"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_store(folder: Path, *sources: dict[str, Any], model: Path, **settings: Any) -> DataConfig:
    given = {
        "store": str(folder / "store"),
        "sources": sources,
        "tokenizer": {"model": str(model)},
        "validation_fraction": 0.0,
    }
    config = DataConfig.model_validate(given | {"num_workers": 0} | settings)
    prepare(config, runner=run_in_process)
    return config


def learned_texts(config: DataConfig, source: str = "chat") -> tuple[list[str], list[list[str]]]:
    """Texts of the documents of a source, and of their runs that are learned, with control tokens."""
    store = TokenStore.open(config.store or "")
    tokenizer = tokenizers.Tokenizer.from_file(str(store.tokenizer_path))
    (part,) = store.parts(source, "train")
    tokens, spans = store.read_tokens(part, 0, part.num_tokens).astype(int), store.loss_spans(part)
    assert spans is not None
    documents, runs = [], []
    for start, stop in zip([0, *store.document_ends(part)[:-1].tolist()], store.document_ends(part).tolist()):
        inside = [pair for pair in spans.reshape(-1, 2).tolist() if start <= pair[0] < stop]
        documents.append(tokenizer.decode(tokens[start:stop].tolist(), skip_special_tokens=False))
        runs.append([tokenizer.decode(tokens[low:high].tolist(), skip_special_tokens=False) for low, high in inside])
    return documents, runs


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(("template", "behind"), [(CHATML, ""), (UNMARKED, "\n<|end|>")])
def test_what_the_assistant_wrote_is_learned(tmp_path: Path, suffix: str, template: str, behind: str) -> None:
    # As tables have them: fields of other messages are there without a value, and tools as text.
    path = write_rows(tmp_path / f"a{suffix}", [{"messages": TURNS, "tools": json.dumps(TOOLS)}])
    source = {"name": "chat", "paths": [path], "messages_column": "messages"}
    config = make_store(tmp_path, source, model=write_tokenizer(tmp_path / "model", template))
    (text,), (runs,) = learned_texts(config)
    whole, _ = ChatTemplate(template, {}).render_turns(TURNS, TOOLS)
    assert text == whole + "<|end|>"
    call = '[{"name": "add", "arguments": {"a": 1, "b": "é <x>"}}]<|im_end|>'
    assert runs == [call + behind.removesuffix("<|end|>"), "It is two.\n<|im_end|>" + behind]
    assert verify_store(config.store or "") == []


def test_tokens_and_mask_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = write_tokenizer(tmp_path / "model")
    source = {
        "name": "chat",
        "paths": [write_rows(tmp_path / "a.jsonl", [{"messages": TURNS}])],
        "messages_column": "messages",
    }
    config = make_store(tmp_path, source, model=model)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(model), chat_template=CHATML)
    wanted = fast.apply_chat_template(TURNS, return_assistant_tokens_mask=True, return_dict=True)
    store = TokenStore.open(config.store or "")
    (part,) = store.parts("chat", "train")
    tokens, spans = store.read_tokens(part, 0, part.num_tokens), store.loss_spans(part)
    assert spans is not None
    mask = [int(any(low <= place < high for low, high in spans.reshape(-1, 2))) for place in range(part.num_tokens)]
    assert tokens.tolist()[:-1] == wanted["input_ids"]
    assert mask[:-1] == wanted["assistant_masks"] and mask[-1] == 0


def test_a_completion_is_learned_with_its_end(tmp_path: Path) -> None:
    rows = [{"q": "What is one?", "a": " It is <|im_end|> one."}]
    source = {
        "name": "chat",
        "paths": [write_rows(tmp_path / "a.jsonl", rows)],
        "prompt_column": "q",
        "completion_column": "a",
    }
    config = make_store(tmp_path, source, model=write_tokenizer(tmp_path / "model", None))
    assert learned_texts(config) == (
        ["What is one? It is <|im_end|> one.<|end|>"],
        [[" It is <|im_end|> one.<|end|>"]],
    )
    store = TokenStore.open(config.store or "")
    (part,) = store.parts("chat", "train")
    end = tokenizers.Tokenizer.from_file(str(store.tokenizer_path)).token_to_id("<|im_end|>")
    assert end not in store.read_tokens(part, 0, part.num_tokens)


BAD = {
    "no assistant turn: nothing of it would be learned": {"messages": TURNS[:1]},
    "a message holds the control token '<|im_end|>' as text, which would become one": {
        "messages": [{"role": "user", "content": "<|im_end|>"}, TURNS[3]]
    },
    "field 'messages' is not a list of messages with a role": {"messages": ["hello"]},
    "no field 'messages'": {"messages": None},
    "messages or tools are a text that is not JSON: Expecting value: line 1 column 1 (char 0)": {"messages": "hello"},
}


def test_records_without_a_turn_are_counted_and_reported(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "a.jsonl",
        [*BAD.values(), BAD["no assistant turn: nothing of it would be learned"], {"messages": TURNS}],
    )
    source = {"name": "chat", "paths": [path], "messages_column": "messages"}
    model = write_tokenizer(tmp_path / "model")
    config = DataConfig.model_validate(
        {
            "store": str(tmp_path / "store"),
            "sources": [source],
            "tokenizer": {"model": str(model)},
            "validation_fraction": 0.0,
        }
    )
    report = prepare(config, runner=run_in_process)
    assert report.documents["chat"]["train"] == 1 and report.rejects == 6
    assert "no assistant turn" in report.first_rejects["chat"]
    assert "source 'chat' has 2 records of which nothing would be learned; they are left out" in report.remarks
    listed = [
        json.loads(line)["reason"] for line in (tmp_path / "store/rejects/chat/000000.jsonl").read_text().splitlines()
    ]
    assert listed == [*BAD, "no assistant turn: nothing of it would be learned"]


def test_a_source_of_which_nothing_is_learned_is_refused(tmp_path: Path) -> None:
    source = {
        "name": "chat",
        "paths": [write_rows(tmp_path / "a.jsonl", [{"messages": TURNS[:1]}])],
        "messages_column": "messages",
    }
    with pytest.raises(
        ValueError,
        match=r"gave no training document: 1 records were rejected, .*no assistant turn.* check messages_column='messages'",
    ):
        make_store(tmp_path, source, model=write_tokenizer(tmp_path / "model"))
    source = {
        "name": "chat",
        "paths": [write_rows(tmp_path / "b.jsonl", [{"q": "a", "a": ""}])],
        "prompt_column": "q",
        "completion_column": "a",
    }
    with pytest.raises(ValueError, match=r"field 'a' is empty: nothing of it would be learned"):
        make_store(tmp_path, source, model=write_tokenizer(tmp_path / "model"))


def test_templates_that_say_nothing_certain_are_refused(tmp_path: Path) -> None:
    last = "{% for m in messages %}{{ m.content }}{% if loop.last %}.{% endif %}{% endfor %}"
    twice = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    with pytest.raises(ValueError, match=r"writes turn 2 in another way when something follows"):
        ChatTemplate(last, {}).render_turns(twice)
    with pytest.raises(ValueError, match=r"marks of turns within each other, or a message holds U\+FDD0"):
        ChatTemplate(CHATML, {}).render_turns([{"role": "assistant", "content": "a\ufdd1"}])
    with pytest.raises(ValueError, match="'strftime_now' is undefined"):
        ChatTemplate("{{ strftime_now('%Y') }}", {}, has_clock=False).render_turns(twice)


def test_the_cost_of_a_record_of_thousands_of_turns_is_bounded() -> None:
    turns = [{"role": role, "content": "x"} for _ in range(2000) for role in ("user", "assistant")]
    with pytest.raises(
        ValueError, match=r"^2,000 assistant turns, and at most 256 are found in a template without marks"
    ):
        ChatTemplate(UNMARKED, {}).render_turns(turns)
    assert len(ChatTemplate(CHATML, {}).render_turns(turns)[1]) == 2000


def test_settings_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"messages": TURNS}])
    for settings, match in (
        ({"prompt_column": "q"}, "prompt_column and completion_column belong together"),
        ({"messages_column": "m", "prompt_column": "q", "completion_column": "a"}, "exclude each other"),
        ({"messages_column": "m", "fim": {"rate": 0.5}}, "fim is for text all of which is learned"),
    ):
        with pytest.raises(ValueError, match=match):
            DataConfig.model_validate({"sources": [{"name": "chat", "paths": [path], **settings}]})
    source = {"name": "chat", "paths": [path], "messages_column": "messages"}
    with pytest.raises(ValueError, match=r"no chat template is next to data.tokenizer.model; name a Jinja file"):
        make_store(tmp_path, source, model=write_tokenizer(tmp_path / "model", None))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"files without columns; name .jsonl"):
        make_store(tmp_path, source | {"paths": [str(tmp_path / "a.txt")]}, model=write_tokenizer(tmp_path / "model"))


def make_mixed(folder: Path, weight: float = 0.3) -> DataConfig:
    """Conversations and text with moved middles in one store, with a SentencePiece trained here that has the template's tokens."""
    random = np.random.default_rng(3)
    rows = [
        {"messages": [turn | {"content": f"{turn['content']} {random.integers(1000)}"} for turn in TURNS]}
        for _ in range(60)
    ]
    (folder / "chat.jinja").write_text(CHATML)
    config = DataConfig.model_validate(
        {
            "store": str(folder / "store"),
            "sources": [
                {
                    "name": "chat",
                    "paths": [write_rows(folder / "a.jsonl", rows)],
                    "messages_column": "messages",
                    "weight": weight,
                },
                {
                    "name": "web",
                    "paths": [str(write_jsonl(folder / "web.jsonl", 120, seed=1))],
                    "weight": 1 - weight,
                    "fim": {"rate": 0.5},
                },
            ],
            "tokenizer": {
                "vocab_size": 400,
                "control_tokens": SPECIAL[1:],
                "chat_template": str(folder / "chat.jinja"),
            },
            "validation_fraction": 0.0,
            "num_workers": 0,
        }
    )
    prepare(config, runner=run_in_process)
    return config


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return make_mixed(tmp_path_factory.mktemp("mixed"))


def load(config: DataConfig, **changes: Any) -> PretrainLoader:
    return PretrainLoader(config, **({"sequence_length": 64, "micro_batch_size": 4, "seed": 5} | changes))


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_masks_of_turns_and_of_documents_meet_in_mixed_rows(mixed: DataConfig, packing: str) -> None:
    config = mixed.model_copy(update={"packing": packing})
    loader = load(config)
    batches = [batch for _ in range(6) for batch in loader.take(16)]
    counts = {name: [0, 0] for name in loader.source_names}
    for batch in batches:
        tokens, labels = batch.tokens_BT.numpy(), batch.labels_BT.numpy()
        assert ((labels != IGNORED_LABEL) == batch.loss_mask_BT.numpy()).all()
        inner = labels[:, :-1]
        assert ((inner == IGNORED_LABEL) | (inner == tokens[:, 1:])).all()
        for row, source in enumerate(batch.source_ids):
            place = counts[loader.source_names[source]]
            place[0] += int((labels[row] != IGNORED_LABEL).sum())
            place[1] += labels.shape[1]
            assert tokens[row].max() < 400
        same = batch.document_ids_BT[:, 1:] == batch.document_ids_BT[:, :-1]
        assert (inner[~same.numpy()] == IGNORED_LABEL).all()
    chat, web = (counts[name][0] / counts[name][1] for name in ("chat", "web"))
    assert 0.2 < chat < 0.7 and web > 0.8
    loader.close()


def test_a_row_learns_what_its_own_tokens_say(mixed: DataConfig) -> None:
    """Against the store, token by token: the label of a place counts where the next token lies in a run."""
    loader = load(mixed)
    store = loader.store
    samples = np.arange(40)
    checked = 0
    for place, row in zip(loader.reader.locate(samples), loader.reader.read(samples)[0]):
        spans, first = store.loss_spans(place.part), loader.reader.first_token(place)
        assert (spans is None) == (row.labels is None) == (place.source == "web")
        if spans is None or row.labels is None:
            continue
        inside = [
            any(low <= token < high for low, high in spans.reshape(-1, 2).tolist())
            for token in range(first, first + 65)
        ]
        wanted = [int(token) if counts else IGNORED_LABEL for token, counts in zip(row.tokens[1:], inside[1:])]
        assert row.labels.tolist() == wanted
        checked += 1
    assert checked > 5
    loader.close()


def test_reading_processes_give_the_same_labels(mixed: DataConfig) -> None:
    here, there = load(mixed), load(mixed.model_copy(update={"num_workers": 1}))
    for one, other in zip(here.take(8), there.take(8)):
        assert (one.labels_BT == other.labels_BT).all() and (one.tokens_BT == other.tokens_BT).all()
    here.close()
    there.close()


def test_a_sample_is_shown_with_what_is_learned_of_it(mixed: DataConfig) -> None:
    config = mixed.model_copy(update={"phases": (PhaseConfig(start_sample=0, weights={"chat": 1.0}),)})
    shown = sample_text(config, 3, sequence_length=128, seed=5)
    text = "".join(f"«{piece}»" if is_learned else piece for runs in shown.pieces for piece, is_learned in runs)
    assert "<|im_start|>assistant\n«" in text and "<|im_end|>»" in text
    (row,), _ = load(config, sequence_length=128).reader.read(np.array([3]))
    assert row.labels is not None and shown.num_learned == (row.labels[:127] != IGNORED_LABEL).sum()


def test_damage_and_an_older_program_are_told(mixed: DataConfig, tmp_path: Path) -> None:
    store = TokenStore.open(mixed.store or "")
    manifest = json.loads((store.path / MANIFEST).read_text())
    assert manifest["version"] == 4, "a program that knows only version 3 would learn all of it"
    (part,) = store.parts("chat", "train")
    file = store.path / part.path / "loss_spans/c/0"
    content = file.read_bytes()
    try:
        file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        (problem,) = verify_store(store.path)
        assert "loss_spans" in problem
        with pytest.raises(DamagedError, match="loss_spans"):
            TokenStore.open(store.path).read_tokens(part, 0, 1)
        file.unlink()
        with pytest.raises(DamagedError, match="loss_spans/c/0 is missing"):
            TokenStore.open(store.path).read_tokens(part, 0, 1)
    finally:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"states which of its tokens are learned, and a .bin cannot"):
        export_megatron(store, "chat", "train", tmp_path / "out")


def test_any_zarr_reader_opens_the_runs(mixed: DataConfig) -> None:
    import zarr

    store = TokenStore.open(mixed.store or "")
    (part,) = store.parts("chat", "train")
    found = zarr.open_array(store.path / part.path / "loss_spans", mode="r")
    assert found[:].tolist() == store.loss_spans(part).tolist()  # type: ignore[union-attr]


def test_a_store_without_masks_is_what_it_was(mixed: DataConfig, tmp_path: Path) -> None:
    config = mixed.model_copy(update={"store": str(tmp_path / "store"), "sources": mixed.sources[1:]})
    prepare(config, runner=run_in_process)
    manifest = json.loads((tmp_path / "store" / MANIFEST).read_text())
    (part,) = manifest["sources"]["web"]["train"]
    assert manifest["version"] == 3 and "num_spans" not in part
    assert prepare(config, runner=run_in_process).units_written == 0
