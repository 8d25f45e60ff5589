"""Where each part of an answer comes from: spans and their swaps, labels, and a reader in one pass."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import mnemoscope as ms
from mnemoscope.auditing.origins import (
    Form,
    Labelled,
    Pool,
    Reader,
    Text,
    answered,
    fitted_reader,
    labelled,
    read_texts,
)
from mnemoscope.auditing.origins.fitting import LEAST, fit_reader, varied
from mnemoscope.auditing.origins.labels import NEEDED, ORIGINS, UNSURE, encoded
from mnemoscope.auditing.origins.reader import sure_of
from mnemoscope.auditing.origins.spans import mentions, spans_of, swapped
from mnemoscope.behaviour import Asking, next_tokens, read_behind
from mnemoscope.bench.answers import NOTHING
from mnemoscope.cli import app
from mnemoscope.config import ModelConfig
from mnemoscope.face import rewriting
from mnemoscope.face.rewriting import rewritten
from mnemoscope.models import build_gpt2, word_tokenizer
from mnemoscope.report.stories.origins import build_reader
from mnemoscope.runs.errors import InputError

SAID = "the museum stands in people met near castle is and was built there yesterday . , of"
NAMED = "Paris London Berlin Madrid Vienna Prague Warsaw Lisbon Dublin Athens"
CITIES, WORDS = NAMED.split(" "), [one for one in SAID.split(" ") if one]
FORM = Form("{document} {question}", "{question}")


@pytest.fixture(scope="module")
def asking() -> Asking:
    """A small model of chance, which reads words."""
    tokenizer = word_tokenizer([*CITIES, *WORDS, "1912", "1955", "2001"], 64)
    model = build_gpt2(tokenizer, ModelConfig(layers=4, width=48, heads=2, context=64), 0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0)  # so that it is sure of something
    return Asking(model.eval(), tokenizer, None, 4)


def texts(n: int, seed: int = 0) -> list[Text]:
    rng = np.random.default_rng(seed)
    found = []
    for number in range(n):
        city, other, third = rng.choice(CITIES, 3, replace=False)
        answer = f" {rng.choice([city, third])} . people met near {rng.choice(CITIES)} and {rng.choice([city, other])}"
        document = f"the museum stands in {city} . the castle of {other} was built in 1912 ."
        found.append(Text("the museum is in", document, answer, f"group {number}"))
    return found


def entropy_of(logp_TV: torch.Tensor) -> torch.Tensor:
    return -(logp_TV.exp() * logp_TV).sum(-1)


def a_reader(asking: Asking, seed: int = 0) -> Reader:
    """One with weights of chance."""
    rng, width = np.random.default_rng(seed), asking.model.config.n_embd
    like = np.zeros(width), np.eye(width) * 1e-6
    return Reader([2], rng.normal(size=(3, 2 * width + 2)), rng.normal(size=3), *like, FORM.form, FORM.bare)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The Eiffel Tower is in Paris.", ["Eiffel Tower", "Paris"]),
        ("In 1912 he met Queen Elizabeth of the Netherlands", ["1912", "Queen Elizabeth of the Netherlands"]),
        ("It cost 1,500 or 2.5 of B's money, not 12th", ["1,500", "2.5", "B"]),
        ("nothing. That is all", []),
        ("", []),
    ],
)
def test_names_and_numbers_are_found(text: str, found: list[str]) -> None:
    assert [span.of(text) for span in spans_of(text)] == found


def test_a_swap_is_in_all_places_and_of_whole_words() -> None:
    document = "Ada Lovelace met Babbage. Lovelace wrote to ADA LOVELACE, not to Lovelaces."
    assert swapped(document, "Ada Lovelace", "Grace Hopper") == (
        "Grace Hopper met Babbage. Hopper wrote to Grace Hopper, not to Lovelaces."
    )
    assert mentions(document, "lovelace")
    assert not mentions(document, "love")
    assert swapped(document, "Babbage", r"\1") == document.replace("Babbage", r"\1")  # no pattern


def test_others_are_of_the_kind_and_stand_nowhere_in_a_text() -> None:
    pool = Pool(["Ada Lovelace lived in London until 1852.", "Grace Hopper came from Boston in 1906, with 42 others."])
    rng = np.random.default_rng(0)
    assert pool.others("Alan Turing", "name", ["about Grace Hopper"], rng) == ["Ada Lovelace"]
    assert sorted(pool.others("1912", "year", [], rng)) == ["1852", "1906"]
    assert pool.others("London Bridge", "name", ["Ada Lovelace Grace Hopper"], rng) == []
    assert pool.others("Paris", "name", ["London"], rng) == ["Boston"]


def test_answers_are_read_as_plain_transformers_does(asking: Asking) -> None:
    prompts = asking.tokens([FORM.prompt(one.question, one.document) for one in texts(5)])
    several = [(prompt, encoded(asking, one.answer)[0]) for prompt, one in zip(prompts, texts(5), strict=True)]
    several[2] = (several[2][0][:5], several[2][1][:3])
    for (prompt, ids), read in zip(several, read_behind(asking, several, [1, 3]), strict=True):
        with torch.no_grad():
            out = asking.model(torch.tensor([prompt + ids]), output_hidden_states=True)
        logp_TV = out.logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        said_T = logp_TV[range(len(ids)), ids]
        np.testing.assert_allclose(read.logp_T, said_T, atol=1e-4)
        np.testing.assert_allclose(read.entropy_T, entropy_of(logp_TV), atol=1e-4)
        np.testing.assert_allclose(read.behind_T, logp_TV.max(-1).values - said_T, atol=1e-4)
        np.testing.assert_allclose(
            read.spread_T, (logp_TV.exp() * (logp_TV + entropy_of(logp_TV)[:, None]) ** 2).sum(-1) ** 0.5, atol=1e-4
        )
        assert read.states_ULD.shape == (1 + len(ids), 2, 48)
        np.testing.assert_allclose(read.states_ULD[:, 0], out.hidden_states[2][0, len(prompt) - 1 :], atol=1e-3)


def test_next_tokens_are_those_of_plain_transformers(asking: Asking) -> None:
    prompts = [[*asking.tokens([one.document])[0]][: 4 + n] for n, one in enumerate(texts(6))]
    tried = [[n, n + 1, 9] for n in range(6)]
    for prompt, ids, logp_K in zip(prompts, tried, next_tokens(asking, prompts, tried), strict=True):
        with torch.no_grad():
            logp_V = asking.model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
        np.testing.assert_allclose(logp_K, logp_V[ids], atol=1e-4)


def test_a_token_that_cannot_come_adds_nothing_to_entropy() -> None:
    assert sure_of(torch.tensor([0.0, 0.0, -np.inf])) == pytest.approx((np.log(2), np.log(2)))
    assert sure_of(torch.tensor([3.0, -np.inf])) == pytest.approx((3, 0))


def test_labels_are_what_two_swaps_do(asking: Asking) -> None:
    asked = texts(12)
    pool = Pool([" ".join(CITIES)])  # one name of many words
    found = labelled(asking, FORM, asked, Pool([f"{city} ." for city in CITIES]))
    assert all(len(fell) == 0 for one in labelled(asking, FORM, asked, pool) for fell in one.drops)
    for text, one in zip(asked, found, strict=True):
        (alone,) = read_behind(asking, [(asking.tokens([text.question])[0], one.ids)])
        np.testing.assert_allclose(one.alone_T, alone.logp_T, atol=1e-5)
        for span, label, fell in zip(one.spans, one.label_S, one.drops, strict=True):
            what, places = span.of(text.answer), one.tokens_of(span)
            says, again = bool(mentions(text.document, what)), bool(mentions(text.answer[: span.start], what))
            assert (len(fell) == 2) == (says and not again)
            behind = alone.behind_T[places].max()
            alone_says = 1 if behind == 0 else 2 if behind >= NEEDED else UNSURE
            changed = {nats >= NEEDED for nats in fell}
            by_swaps = {True: 0, False: alone_says}.get(*changed, UNSURE) if len(changed) == 1 else UNSURE
            assert label == (UNSURE if again else by_swaps if says else alone_says)
            assert (one.token_T[places] == label).all()
    assert {len(fell) for one in found for fell in one.drops} == {0, 2}
    assert labelled(asking, FORM, asked, Pool([f"{city} ." for city in CITIES]))[3].drops == found[3].drops


def test_what_the_question_says_comes_from_neither(asking: Asking) -> None:
    text = Text("the museum of Paris is in", "the museum of Paris stands in London .", " Paris and Paris")
    (one,) = labelled(asking, FORM, [text], Pool(["Berlin . Madrid ."]))
    assert one.label_S.tolist() == [2, UNSURE]
    assert one.drops == [(), ()]


def test_a_swap_is_read_by_plain_passes(asking: Asking) -> None:
    text = Text("the museum is in", "the museum stands in Paris .", " the castle . Paris")
    (one,) = labelled(asking, FORM, [text], Pool(["Berlin ."]))
    wanted = []
    for city in ("Paris", "Berlin"):
        prompt = asking.tokens([f"the museum stands in {city} . the museum is in"])[0]
        with torch.no_grad():
            logits_TV = asking.model(torch.tensor([prompt + one.ids])).logits[0]
        wanted.append(float(logits_TV[-2].double().log_softmax(-1)[one.ids[-1]]))
    assert one.drops[0] == pytest.approx((wanted[0] - wanted[1],), abs=1e-4)
    assert one.label_S[0] != UNSURE, "one swap can be made, so it decides"


def test_a_tokens_numbers_depend_on_nothing_behind_it_nor_on_its_batch(asking: Asking) -> None:
    reader = a_reader(asking)
    asked = [reader.asks(one) for one in texts(6)]
    whole = reader.read(asking, asked)
    for one, found in zip(asked, whole, strict=True):
        (alone,) = reader.read(replace(asking, batch_size=1), [one])
        np.testing.assert_allclose(alone.p_T3, found.p_T3, atol=1e-4)
        cut = found.offsets[3][1]
        (begun,) = reader.read(asking, [replace(one, answer=one.answer[:cut])])
        np.testing.assert_allclose(begun.p_T3, found.p_T3[:4], atol=1e-4)
        np.testing.assert_allclose(found.p_T3.sum(1), 1)


@pytest.mark.parametrize("tokens", [1, 7])
def test_what_is_written_is_read_as_if_it_had_been_given(asking: Asking, tokens: int) -> None:
    reader = a_reader(asking)
    for text in texts(4):
        asked, heads = reader.asks(replace(text, answer="")), list[int]()
        hook = asking.model.get_output_embeddings().register_forward_hook(lambda *_, heads=heads: heads.append(1))
        written = reader.write(asking, asked, tokens)
        hook.remove()
        assert len(heads) == tokens, "the last token is only read"
        own = answered(asking, FORM, [replace(text, answer="")], tokens)
        assert written.answer.split()[:-1] == (own[0].answer.split() if own else []), "the last word may be cut"
        assert len(written.p_T3) == len(written.offsets) == tokens
        (read,) = reader.read(asking, [replace(asked, answer=written.answer)])
        np.testing.assert_allclose(written.p_T3, read.p_T3, atol=1e-4)
        assert [part.verdict for part in written.parts] == [part.verdict for part in read.parts]


def test_without_a_document_nothing_comes_from_one(asking: Asking) -> None:
    reader = a_reader(asking)
    (found,) = reader.read(asking, [reader.asks(replace(texts(1)[0], document=" \n"))])
    assert (found.p_T3[:, 0] == 0).all()
    np.testing.assert_allclose(found.p_T3.sum(1), 1)
    assert found.shares["document"] == 0
    assert "document 0 %" in str(found)


def test_what_is_unlike_the_fit_cannot_be_told(asking: Asking) -> None:
    near = a_reader(asking)
    reader = replace(near, whitening_DD=np.eye(48) * 1e6)
    (found,) = reader.read(asking, [reader.asks(texts(1)[0])])
    assert found.unlike_T.all()
    assert {part.verdict for part in found.parts} == {"cannot tell"}
    assert found.shares["cannot tell"] == 1
    assert "?" in str(found)
    assert sum(near.read(asking, [near.asks(texts(1)[0])])[0].shares.values()) == pytest.approx(1)


def planted(asking: Asking, n: int) -> list[Labelled]:
    """Answers whose labels are those of the city that they name."""
    found = labelled(asking, FORM, texts(n), Pool([f"{city} ." for city in CITIES]))
    of_city = {city: place % 3 for place, city in enumerate(CITIES)}
    told = list[Labelled]()
    for one in found:
        labels = np.array([of_city.get(span.of(one.text.answer), 0) for span in one.spans])
        token_T = np.full(len(one.ids), UNSURE)
        for span, label in zip(one.spans, labels, strict=True):
            token_T[one.tokens_of(span)] = label
        told.append(replace(one, label_S=labels, token_T=token_T))
    return told


def test_a_reader_learns_what_is_to_be_read_and_is_calibrated(asking: Asking, tmp_path: Path) -> None:
    every = planted(asking, 60)
    reader, judged = fitted_reader(asking, FORM, every[:40])
    hits, sure = [], []
    for one in every[40:]:
        (found,) = reader.read(asking, [reader.asks(one.text)])
        for part, label in zip(found.parts, one.label_S, strict=True):
            hits.append(part.p_3.argmax() == label)
            sure.append(part.p_3.max())
    assert np.mean(hits) > 0.9
    assert len(judged) == sum(len(one.spans) for one in every[:40])
    assert {one.row()["group"] for one in judged} == {one.text.group for one in every[:40]}
    assert np.mean([ORIGINS[one.p_3.argmax()] == one.label for one in judged]) > 0.9
    wrong = judged[0]._replace(label="memory", p_3=np.array([0.2, 0.1, 0.7]))
    page = build_reader(tmp_path, "tiny <model>", pd.DataFrame([one.row() for one in (wrong, *judged)])).read_text()
    assert f"[{wrong.span.of(wrong.text.answer)}]" in page
    assert "tiny &lt;model&gt;" in page
    assert "Where it is wrong, the surest first" in page
    assert abs(np.mean(hits) - np.mean(sure)) < 0.15
    reader.save(tmp_path / "reader.safetensors")
    again = ms.Fitted.open(tmp_path, asking.model, asking.tokenizer).reader
    assert again is not None
    np.testing.assert_array_equal(again.weights_3F, reader.weights_3F)
    assert again.figures == reader.figures
    other = build_gpt2(asking.tokenizer, ModelConfig(layers=4, width=48, heads=2, context=64), 1)
    with pytest.raises(InputError, match="weights: the reader was made on"):
        ms.Fitted.open(tmp_path, other, asking.tokenizer)
    with pytest.raises(InputError, match=f"{LEAST} of each are needed"):
        fitted_reader(asking, FORM, every[:4])


def test_documents_are_varied_by_what_an_answer_says() -> None:
    asked = texts(6)
    found = varied(asked, Pool([one.document for one in asked]), 0)
    for one in asked:
        mine = [text for text in found if text.group == one.group]
        assert sum(text == one for text in mine) == 1
        others = [text for text in mine if text != one]
        assert all(text.answer == "" and text.question == one.question for text in others)
        assert all(text.document != one.document for text in others)
    assert len(found) > 2 * len(asked)


def test_a_fit_without_labels_says_what_is_lacking(asking: Asking) -> None:
    with pytest.raises(InputError, match=r"texts: .* names and numbers"):
        fit_reader(asking, FORM, texts(3), tokens=2)


def test_fitted_reads_and_bad_input_is_one_line(asking: Asking, tmp_path: Path) -> None:
    reader = a_reader(asking)
    fitted = ms.Fitted(tmp_path, asking.model, asking.tokenizer, {}, None, None, reader=reader)
    text = texts(1)[0]
    prompt = reader.asks(text).prompt
    assert fitted.read(prompt, text.document, text.answer).answer == text.answer
    assert len(fitted.read(prompt, text.document, max_new_tokens=3).offsets) == 3
    for changed, match in (
        ({"document": "the castle of Prague"}, "is not in the prompt"),
        ({"answer": ""}, "answer: .* is empty"),
        ({"answer": " Paris" * 60}, "at most 64 are allowed together"),
    ):
        with pytest.raises(InputError, match=match):
            fitted.read(prompt, **({"document": text.document, "answer": text.answer} | changed))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"reader: .* has none"):
        replace(fitted, reader=None).read(prompt)
    with pytest.raises(InputError, match="this model has 4 blocks of 48"):
        replace(reader, layers=[9]).check_shape(asking.model)
    with pytest.raises(InputError, match="form: "):
        Form("{question}", "{question}")
    (tmp_path / "texts.jsonl").write_text(json.dumps({"question": "where"}) + "\n")
    with pytest.raises(InputError, match="there is no field 'document'"):
        read_texts(tmp_path / "texts.jsonl")
    (tmp_path / "texts.jsonl").write_text(json.dumps({"question": "where", "document": 3}) + "\n")
    with pytest.raises(InputError, match="document is 3; a text is wanted"):
        read_texts(tmp_path / "texts.jsonl")
    (tmp_path / "texts.jsonl").write_text(json.dumps({"question": "where", "document": "there"}) + "\n")
    assert read_texts(tmp_path / "texts.jsonl") == [Text("where", "there")]


def test_what_comes_from_memory_is_written_again(
    asking: Asking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_gpt2(asking.tokenizer, ModelConfig(layers=4, width=48, heads=2, context=64), 0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0)
        model.get_input_embeddings().weight[asking.tokenizer.convert_tokens_to_ids(CITIES)] *= 2.0  # it writes names
    asking = replace(asking, model=model.eval())
    blind = replace(a_reader(asking), weights_3F=np.zeros((3, 98)), bias_3=np.array([0.0, 2.0, 0.0]))  # all is memory
    reader = replace(blind, whitening_DD=np.zeros((48, 48)))
    fitted = ms.Fitted(tmp_path, asking.model, asking.tokenizer, {}, None, None, reader=reader)
    for text in texts(6):
        asked = reader.asks(replace(text, answer=""))
        first = reader.write(asking, asked, 9)
        same = rewritten(asking, reader, asked, NOTHING, 0.5, 9)
        assert same.origins.answer.startswith(first.answer), "a lever that does nothing writes the same"
        assert same.spans
        assert all(now.startswith(said) for said, now in same.spans)
        assert fitted.rewrite(asked.prompt, text.document, 0.9, 9).spans == []
        found = fitted.rewrite(asked.prompt, text.document, 0.5, 9)
        begins = first.parts[0].span.start
        before = first.answer[:begins]
        assert found.origins.answer.startswith(before)
        there = [span.of(text.document) for span in spans_of(text.document) if span.kind == "name"]
        ids = asking.tokenizer.convert_tokens_to_ids(there)
        behind = [torch.tensor(asking.tokens([f"{prompt} {before}"])) for prompt in (asked.prompt, asked.bare)]
        with torch.no_grad():
            with_K, without_K = (model(row).logits[0, -1].double().log_softmax(-1)[ids] for row in behind)
        assert found.spans[0] == (first.parts[0].span.of(first.answer), there[int((2 * with_K - without_K).argmax())])
    dumb, plainly = replace(NOTHING), rewriting.answered  # a lever that writes no name
    monkeypatch.setattr(rewriting, "answered", lambda one, *how: [", and"] if one is dumb else plainly(one, *how))
    left = rewritten(asking, reader, asked, dumb, 0.5, 9)
    assert left.spans
    assert all(said == now for said, now in left.spans)
    with pytest.raises(InputError, match="document: it is empty"):
        fitted.rewrite("the museum is in", "")
    with pytest.raises(InputError, match="threshold: 2; allowed is 0 to 1"):
        fitted.rewrite(asked.prompt, text.document, 2)


def test_the_command_prints_the_answer_and_its_shares(asking: Asking, tmp_path: Path) -> None:
    asking.model.save_pretrained(tmp_path / "model")
    asking.tokenizer.save_pretrained(tmp_path / "model")
    model, tokenizer = ms.load_model(tmp_path / "model")
    reader, _ = fitted_reader(Asking(model, tokenizer, None, 4), FORM, planted(asking, 30))
    reader.save(tmp_path / "run" / "reader.safetensors")
    document = tmp_path / "document.txt"
    document.write_text("the museum stands in Paris .")
    given = ["read", str(tmp_path / "model"), "the museum is in", "--from", str(tmp_path / "run")]
    said = CliRunner().invoke(app, [*given, "--document", str(document), "--answer", " Paris and London"])
    assert said.exit_code == 0, said.output
    assert "Paris" in said.output
    assert "document " in said.output
    told = json.loads(CliRunner().invoke(app, [*given, "--json", "--max-new-tokens", "4"]).stdout)
    assert len(told["tokens"]) == 4
    assert told["shares"]["document"] == 0
    wrong = CliRunner().invoke(app, [*given, "--document", str(tmp_path / "none.txt")])
    assert wrong.exit_code == 2
    assert "document: the file" in wrong.output
    again = [*given, "--document", str(document), "--rewrite", "0"]
    told = json.loads(CliRunner().invoke(app, [*again, "--json", "--max-new-tokens", "4"]).stdout)
    assert all(set(one) == {"before", "after"} for one in told["written_again"])
    both = CliRunner().invoke(app, [*again, "--answer", " Paris"])
    assert both.exit_code == 2
    assert "rewrite: an answer that is given is read, not written" in both.output
