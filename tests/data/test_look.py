"""What `finetune check` says about rows and tokens, and what stops a run before it begins."""

import json
import shutil

import pytest

from finetune.__main__ import main
from finetune.config.load import load_recipe
from finetune.config.model_files import embedding_problem, read_token_facts, with_stops
from finetune.data.look import look
from finetune.errors import ModelError
from finetune.models.generation import Generation, reply, stops_of
from finetune.models.loading import check_embeddings, load_tokenizer
from finetune.pipeline import prepare
from tests.data.conftest import TINY, question


@pytest.fixture
def model(tmp_path):
    """Side files of the embedded model, without its weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in TINY.iterdir():
        if path.suffix in (".json", ".jinja") and "index" not in path.name:
            shutil.copy(path, folder)
    return folder


@pytest.fixture
def recipe(model, tmp_path, write_jsonl):
    """Writes a recipe that trains on these rows, and returns its path."""

    def write(rows, more=""):
        path = tmp_path / "recipe.yaml"
        data = write_jsonl(rows)
        path.write_text(f"model: {{path: {model}}}\noutput: {{dir: {tmp_path}/run}}\ndata:\n  train: {data}\n{more}")
        return path

    return write


def stop_elsewhere(model):
    (model / "generation_config.json").write_text('{"eos_token_id": 640}')


def add_tokens(model, count):
    content = json.loads((model / "tokenizer.json").read_text())
    first = max(token["id"] for token in content["added_tokens"]) + 1
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    content["added_tokens"] += [{"id": first + n, "content": f"<|extra_{n}|>", **plain} for n in range(count)]
    (model / "tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    del settings["added_tokens_decoder"]  # it would take the place of those in tokenizer.json
    (model / "tokenizer_config.json").write_text(json.dumps(settings))


ROWS = [question(str(n)) | {"source": "web"} for n in range(12)]


def test_check_lists_columns_that_nothing_reads(recipe, capsys):
    assert main(["check", str(recipe(ROWS))]) == 0
    assert "note: not read: source (12 rows)" in capsys.readouterr().out
    assert main(["check", str(recipe(ROWS)), "--json"]) == 0
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert note.startswith("not read: source (12 rows)")


def test_check_stops_at_them_when_asked(recipe, capsys):
    assert main(["check", str(recipe(ROWS, "  unread: error\n"))]) == 2
    assert "has columns that nothing reads: source (12 rows)" in capsys.readouterr().err


def test_check_leaves_bad_rows_to_prepare(recipe):
    (note,) = look(load_recipe(recipe([{"text": "a"}, *ROWS[:2]])))
    assert note.startswith("not read: source (2 rows)")


def test_check_tells_of_an_end_at_which_the_model_goes_on(recipe, model):
    rows = [question("a")]
    assert look(load_recipe(recipe(rows))) == []
    stop_elsewhere(model)
    (note,) = look(load_recipe(recipe(rows)))
    assert note.startswith("training teaches <|im_end|> (642) as the end of an answer, which is not among the stop")
    assert look(load_recipe(recipe([{"text": "a"}], "  template: text\n"))) == []


def test_tokens_without_an_embedding_stop_check_and_prepare(recipe, model, capsys):
    rows = [{"messages": [{"role": "user", "content": "say <|extra_9|>"}, {"role": "assistant", "content": "ok"}]}]
    path = recipe(rows)
    sizes = json.loads((model / "config.json").read_text())
    tokens = max(read_token_facts(model).ids.values()) + 1
    checked = load_recipe(path)
    add_tokens(model, sizes["vocab_size"] - tokens + 4)
    assert main(["check", str(path)]) == 2
    told = capsys.readouterr().err
    assert "4 tokens without an embedding" in told
    assert "resize_token_embeddings" in told
    with pytest.raises(ModelError, match="4 tokens without an embedding"):
        check_embeddings(load_tokenizer(model), TINY)
    shutil.copytree(TINY, model.parent / "whole")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, model.parent / "whole")
    whole = checked.model.model_copy(update={"path": str(model.parent / "whole")})
    with pytest.raises(ModelError, match="4 tokens without an embedding"):
        prepare(checked.model_copy(update={"model": whole}))


def test_every_token_of_the_embedded_model_has_an_embedding():
    check_embeddings(load_tokenizer(TINY), TINY)
    assert embedding_problem({"a": 0, "b": 1}, 2) is None
    assert embedding_problem({"a": 0, "b": 2}, 2)[0].startswith("has 1 token without an embedding, from 'b' (2) on")


def test_files_are_read_without_a_tokenizer(model, tmp_path):
    facts = read_token_facts(model)
    assert facts.end == 642
    assert facts.end in facts.stops
    assert facts.has_switch
    assert facts.thinks_by_default
    assert facts.text_of(facts.end) == "<|im_end|>"
    nothing = read_token_facts(tmp_path / "nowhere")
    assert (nothing.ids, nothing.stops, nothing.chat_template) == ({}, (), None)
    for name in ("tokenizer.json", "generation_config.json", "tokenizer_config.json", "config.json"):
        (model / name).write_text("[")
    assert read_token_facts(model).ids == {}
    assert json.loads(with_stops(b'{"eos_token_id": 1, "top_k": 2}', [3, 1])) == {"eos_token_id": [1, 3], "top_k": 2}
    assert json.loads(with_stops(None, [3])) == {"eos_token_id": [3]}


def test_a_reply_stops_at_the_end_of_a_turn():
    from finetune.adapters.attach import load

    model, tokenizer = load(TINY)
    model.generation_config.eos_token_id = [640]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in stops_of(model, tokenizer)
    said = reply(model, tokenizer, [{"role": "user", "content": "reverse: k q z"}], Generation(max_new_tokens=60))
    assert 0 < len(tokenizer(said)["input_ids"]) < 55
