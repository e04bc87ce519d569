"""What is served: a model with its tokenizer, from a run, a checkpoint, an import or an export.

A conversation's prompt has control tokens in it, which the template writes as text; so it is encoded by the folder's
tokenizer.json, which knows them. Text of a completion is text, as in training: control tokens written out in it end nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from amfm.data_pipeline.durable.foreign_files import read_object
from amfm.data_pipeline.tokenizer.chat_template import ChatTemplate, make_template, read_template
from amfm.data_pipeline.tokenizer.huggingface import parse_tokenizer
from amfm.data_pipeline.tokenizer.tokenizer import Tokenizer
from amfm.launch.modules import is_transformers_folder, read_model
from amfm.pretrain.inference.generate import Sampling, stream_text
from amfm.pretrain.inference.kept_states import SharedModel

if TYPE_CHECKING:
    import tokenizers


class ServedModel:
    """A named model that continues prompts, with the chat template of its folder where it has one."""

    def __init__(
        self,
        name: str,
        shared: SharedModel,
        tokenizer: Tokenizer,
        *,
        end_ids: Collection[int],
        template: ChatTemplate | None,
        chat_tokenizer: tokenizers.Tokenizer | None,
    ) -> None:
        self.name, self.shared, self.tokenizer = name, shared, tokenizer
        self.end_ids, self.template, self.chat_tokenizer = frozenset(end_ids), template, chat_tokenizer
        # Characters of the longest token: a text of more than this many a token is too long before it is tokenized.
        self.longest_token = max((len(tokenizer.decode([index])) for index in range(tokenizer.vocab_size)), default=1)

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        """Write a conversation as its template does. Raises ValueError without a template, and if it rejects."""
        if self.template is None or self.chat_tokenizer is None:
            raise ValueError(
                f"{self.name} has no chat template: it continues text and was not taught to answer; ask /v1/completions, "
                "or serve a model that was fine-tuned on conversations"
            )
        return self.template.render(messages)

    def encode_chat(self, text: str) -> list[int]:
        """Encode a conversation that `render_chat` wrote, where control tokens are tokens."""
        assert self.chat_tokenizer is not None, "render_chat rejects"
        return list(self.chat_tokenizer.encode(text, add_special_tokens=False).ids)

    def generate(self, ids: list[int], max_new_tokens: int, sampling: Sampling) -> Iterator[int]:
        """Yield the ids that follow."""
        return self.shared.generate(ids, max_new_tokens, sampling, self.end_ids)

    def stream(self, ids: list[int], tokens: Iterator[int]) -> Iterator[str]:
        """Decode ids as they come, in whole characters."""
        return stream_text(self.tokenizer, ids, tokens)


def load_model(path: Path, *, device: str, backend: str, max_state_bytes: int) -> ServedModel:
    """Load what `amfm generate` accepts, or a transformers folder of a class that we export to.

    A run that continues a released model has that model's chat template. Raises ValueError for anything else, and for a model
    without a tokenizer.
    """
    is_export, weights = is_transformers_folder(path), read_model(path)
    tokenizer = weights.tokenizer
    shared = SharedModel(
        weights.build(backend=backend, device=device),
        vocab_size=min(tokenizer.vocab_size, weights.model.vocab_size),
        max_state_bytes=max_state_bytes,
    )
    end_ids = {tokenizer.eos_id, *(read_end_ids(path) if is_export else ())}
    template = read_template(path) if is_export else None
    fast = parse_tokenizer((path / "tokenizer.json").read_bytes()) if template is not None else None
    if weights.released is not None and not is_export:
        template = make_template(weights.released.chat_template, weights.released.special_tokens)
        fast = fast_tokenizer(tokenizer) if template is not None else None
        end_ids |= set(list_ids(weights.released.generation.get("eos_token_id")))
    name = path.resolve().name
    return ServedModel(name, shared, tokenizer, end_ids=end_ids, template=template, chat_tokenizer=fast)


def read_end_ids(folder: Path) -> list[int]:
    """Read the ids that end a text by generation_config.json: a fine-tuned model ends its turns with another token."""
    path = folder / "generation_config.json"
    return list_ids(read_object(path).get("eos_token_id") if path.is_file() else None)


def list_ids(found: object) -> list[int]:
    """The ids of a field that holds one, several or none."""
    listed = found if isinstance(found, list) else [found]
    return [index for index in listed if isinstance(index, int) and not isinstance(index, bool)]


def fast_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer as the tokenizers library has it, in which control tokens that are written out are tokens."""
    from amfm.data_pipeline.tokenizer.sentencepiece_model import read_sentencepiece_model
    from amfm.pretrain.export.tokenizer import build_fast_tokenizer, tokenizer_json

    if tokenizer.kind != "sentencepiece":
        return parse_tokenizer(tokenizer_json(tokenizer))

    return build_fast_tokenizer(read_sentencepiece_model(tokenizer.to_bytes()))
