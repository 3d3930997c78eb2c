from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import pearsonr, spearmanr
from seqeval.metrics import f1_score as entity_f1
from seqeval.scheme import IOB2
from sklearn.metrics import accuracy_score, f1_score
from sklearn.preprocessing import MultiLabelBinarizer

from configs.errors import InputError
from configs.load import shipped
from launcher.commands.options import split_models
from studies import scores
from studies.evaluate import _jobs, _Model, _pairs, _results_of, evaluate, said_of_leakage
from studies.examples import Example, Splits, load_examples, read_splits
from studies.finetune import _write, encode, read_result
from studies.intervals import holm, mean_interval, paired_bootstrap, paired_p, score_interval
from studies.leakage import Corpora, leakage
from studies.scores import baselines, counts, details, score
from studies.tasks import PROTOCOLS, SHIPPED, EvaluatedTask, load_task, parse_overrides

Write = Callable[[str, str], Path]
DRUGS, DISEASES = ("aspirin", "insulin", "warfarin", "heparin"), ("fever", "cough", "asthma", "anaemia")
QUICK = {"epochs": 3, "lr": 0.01, "batch": 8, "length": 64}


def quick(task: str, seeds: tuple[int, ...] = (1,), **protocol: Any) -> EvaluatedTask:
    return EvaluatedTask(task=task, seeds=seeds, protocol={**QUICK, **protocol})


def sentences(count: int, seed: int) -> str:
    """Write sentences with drugs and diseases as CoNLL; a model that sees the words can tell them apart."""
    draw = random.Random(seed)
    parts = []
    for _ in range(count):
        words = [
            ("The", "O"),
            ("patient", "O"),
            ("with", "O"),
            ("severe", "B-Disease"),
            (draw.choice(DISEASES), "I-Disease"),
        ]
        words += [("received", "O"), (draw.choice(DRUGS), "B-Chemical")]
        parts.append("\n".join(f"{word}\t{tag}" for word, tag in words))
    return "\n\n".join(parts) + "\n"


def ner(write: Write, **changes: Any) -> str:
    for name, count in (("train", 48), ("dev", 8), ("test", 12)):
        write(f"{name}.tsv", sentences(count, len(name)))
    tree = {
        "name": "toy-ner",
        "kind": "tokens",
        "score": "entity_f1",
        "files": {"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"},
        "protocol": {"preset": "english-ner"},
    }
    return str(write("task.yaml", yaml.safe_dump({**tree, **changes})))


def classification(write: Write, kind: str, metric: str, **changes: Any) -> str:
    def lines(count: int, seed: int) -> str:
        draw = random.Random(seed)
        rows = []
        for _ in range(count):
            ill, drug = draw.choice(DISEASES), draw.choice(DRUGS)
            label = [ill, drug] if kind == "multi" else ill
            rows.append({"text": {"a": f"Severe {ill} is seen."}, "second": f"Take {drug} daily.", "label": label})
        return "\n".join(map(json.dumps, rows)) + "\n"

    write("train.jsonl", lines(80, 1))
    write("test.jsonl", lines(16, 2))
    held_out = {} if kind == "multi" else {"validation": write("dev.jsonl", lines(16, 3)).name}
    tree = {
        "name": "toy",
        "kind": kind,
        "score": metric,
        "columns": {"text": "text.a", "pair": "second", "label": "label"},
        "files": {"train": "train.jsonl", "test": "test.jsonl", **held_out},
        "protocol": {"preset": "english"},
    }
    return str(write("task.yaml", yaml.safe_dump({**tree, **changes})))


def predictions(output: Path, run: dict[str, Any]) -> tuple[list[list[str]], list[list[str]]]:
    [path] = output.glob(f"*-{run['weights'][:8]}/seed-{run['seed']}/predictions.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row["gold"] for row in rows], [row["predicted"] for row in rows]


def test_entities_are_learned_and_scored_as_seqeval_does(model: Path, write: Write, tmp_path: Path) -> None:
    task, out = ner(write), tmp_path / "out"
    summary = evaluate([str(model)], quick(task, (1, 2)), out)
    for run in summary["runs"]:
        gold, predicted = predictions(out, run)
        strict = entity_f1(gold, predicted, mode="strict", scheme=IOB2)
        assert (run["score"], run["lenient"]) == pytest.approx((strict, entity_f1(gold, predicted)))
        assert run["protocol"]["epochs"] == 3
    assert summary["models"][0]["one_answer"] == {}
    scores = [run["score"] for run in summary["runs"]]
    assert summary["models"][0]["mean"] == pytest.approx(np.mean(scores))
    untrained = evaluate([str(model)], quick(task, lr=1e-12), tmp_path / "un")
    assert min(scores) > 0.9 > 0.3 > untrained["models"][0]["mean"]
    assert untrained["models"][0]["low"] is None, "one seed shows no spread"
    words = json.loads(next(out.glob("*/seed-1/predictions.jsonl")).read_text().splitlines()[0])["words"]
    assert words[:2] == ["The", "patient"]
    assert summary["baselines"]["majority"] == 0 < summary["baselines"]["chance"] < 0.3
    assert any("copies of training" in note for note in summary["notes"])
    before = (out / "results.json").read_bytes()
    said: list[str] = []
    evaluate([str(model)], quick(task, (1, 2)), out, say=said.append)
    assert said == ["2 of 2 fine-tunings were finished before"]
    assert (out / "results.json").read_bytes() == before
    with pytest.raises(InputError, match=r"seed-1/result\.json .* protocol") as error:
        evaluate([str(model)], quick(task, (1, 2), batch=16), out)
    assert (error.value.key, error.value.code) == ("--output", "result-of-other-settings")


@pytest.mark.parametrize("metric", ["macro_f1", "binary_f1"])
def test_sentence_pairs_with_one_label(model: Path, write: Write, tmp_path: Path, metric: str) -> None:
    positive = {"positive": "fever"} if metric == "binary_f1" else {}
    task = classification(write, "single", metric, **positive)
    summary = evaluate([str(model)], quick(task, epochs=6), tmp_path)
    gold, predicted = predictions(tmp_path, summary["runs"][0])
    ours = [[label == "fever" for [label] in rows] for rows in (gold, predicted)] if positive else [gold, predicted]
    by_hand = f1_score(*ours) if positive else f1_score(*ours, average="macro")
    assert summary["runs"][0]["score"] == pytest.approx(by_hand)
    assert by_hand > 0.6


def test_several_labels_and_two_models(model: Path, write: Write, tmp_path: Path) -> None:
    from tests.studies.conftest import save_model

    other = save_model(tmp_path / "other", hidden_size=16)
    task = classification(write, "multi", "micro_f1")
    settings = {"epochs": 4, "balance": True}
    summary = evaluate([str(model), str(other)], quick(task, (1, 2), **settings), tmp_path / "out")
    for run in summary["runs"]:
        gold, predicted = predictions(tmp_path / "out", run)
        table = MultiLabelBinarizer().fit(gold)
        by_hand = f1_score(table.transform(gold), table.transform(predicted), average="micro")
        assert run["score"] == pytest.approx(by_hand)
    [pair] = summary["pairs"]
    means = [entry["mean"] for entry in summary["models"]]
    assert pair["difference"] == pytest.approx(means[1] - means[0])
    assert (pair["low"], pair["p"], pair["p_holm"]) == (None, None, None), "two seeds show nothing of others"
    assert (tmp_path / "out" / "results.csv").read_text().count("\n") == 5


LABELS = ("A", "B", "C")
label_rows = st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1, max_size=30)


@settings(max_examples=50, deadline=None)
@given(label_rows, st.sampled_from(["micro_f1", "macro_f1", "weighted_f1", "accuracy", "binary_f1"]))
def test_scores_are_those_of_scikit_learn(rows: list[tuple[str, str]], metric: str) -> None:
    gold, predicted = ([row[side] for row in rows] for side in (0, 1))
    ours = score(metric, [[g] for g in gold], [[p] for p in predicted], LABELS, "A" if metric == "binary_f1" else None)
    if metric == "accuracy":
        theirs = accuracy_score(gold, predicted)
    elif metric == "binary_f1":
        theirs = f1_score([g == "A" for g in gold], [p == "A" for p in predicted], zero_division=0)
    else:
        theirs = f1_score(gold, predicted, average=metric.removesuffix("_f1"), zero_division=0)
    assert ours == pytest.approx(theirs, abs=1e-12)


TAGS = ("O", "O", "B-X", "I-X", "B-Y", "I-Y")


@pytest.mark.filterwarnings("ignore")
def test_strict_and_lenient_scores_are_those_of_seqeval() -> None:
    draw = random.Random(0)
    for _ in range(300):
        lengths = [draw.randrange(1, 12) for _ in range(draw.randrange(1, 8))]
        gold, predicted = ([[draw.choice(TAGS) for _ in range(length)] for length in lengths] for _ in range(2))
        predicted = [
            [p if draw.random() < 0.5 else g for g, p in zip(*rows, strict=True)]
            for rows in zip(gold, predicted, strict=True)
        ]
        if not any(tag != "O" for row in [*gold, *predicted] for tag in row):
            continue  # seqeval divides by zero
        strict = entity_f1(gold, predicted, mode="strict", scheme=IOB2, zero_division=0)
        assert score("entity_f1", gold, predicted, TAGS) == pytest.approx(strict, abs=1e-12)
        lenient = entity_f1(gold, predicted, zero_division=0)
        assert score("lenient_f1", gold, predicted, TAGS) == pytest.approx(lenient, abs=1e-12)


@pytest.mark.parametrize(("metric", "theirs"), [("spearman", spearmanr), ("pearson", pearsonr)])
def test_correlations_are_those_of_scipy(metric: str, theirs: Any) -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        x = draw.integers(6, size=30) + 1e3
        y = x + draw.normal(size=30) * 3
        rows = [[[repr(float(value))] for value in values] for values in (x, y)]
        assert score(metric, *rows, ()) == pytest.approx(theirs(x, y)[0], abs=1e-9)
    assert score(metric, [["1.0"], ["2.0"]], [["3.0"], ["3.0"]], ()) == 0, "a constant has no correlation"


@given(st.sampled_from([1e-150, 1e-6, 1.0, 1e150]), st.sampled_from([0.0, 1.0, 1e6]), st.integers(0, 9))
def test_a_correlation_has_no_unit(unit: float, offset: float, seed: int) -> None:
    x, y = np.random.default_rng(seed).normal(size=(2, 20)) + offset
    rows = [[[repr(float(value))] for value in unit * values] for values in (x, y)]
    assert score("pearson", *rows, ()) == pytest.approx(pearsonr(x, y)[0], abs=1e-6)


def test_a_balanced_label_that_all_examples_have_is_learned(model: Path, write: Write, tmp_path: Path) -> None:
    """A weight of 0 would leave it out of the loss, and its answer to the seed."""
    task = classification(write, "multi", "micro_f1")
    for path in tmp_path.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**row, "label": [*row["label"], "all"]}) + "\n" for row in rows))
    summary = evaluate([str(model)], quick(task, (1, 2, 3, 4), balance=True, threshold=0.5), tmp_path / "out")
    assert [run["classes"]["all"]["recall"] for run in summary["runs"]] == [1, 1, 1, 1]


def answers(seeds: int, right: float, draw: np.random.Generator) -> np.ndarray:
    gold = np.arange(400) % 2
    tables = []
    for _ in range(seeds):
        said = np.where(draw.random(400) < right, gold, 1 - gold)
        tables.append(counts("accuracy", [[str(g)] for g in gold], [[str(a)] for a in said], ("0", "1")))
    return np.stack(tables)


def test_paired_bootstrap_tells_a_difference_from_none() -> None:
    draw = np.random.default_rng(0)
    weak, strong, same = (answers(5, right, draw) for right in (0.6, 0.8, 0.6))
    better = paired_bootstrap("accuracy", weak, strong)
    assert 0.1 < better["low"] < better["difference"] < better["high"] < 0.3
    assert 1 / 2001 <= better["p"] < 0.01, "p is never 0"
    nothing = paired_bootstrap("accuracy", weak, same)
    assert nothing["low"] < 0 < nothing["high"]
    assert nothing["p"] > 0.05
    assert paired_bootstrap("accuracy", weak, weak)["p"] == 1
    assert paired_bootstrap("accuracy", weak[:4], strong[:4])["p"] is None


def test_a_planted_null_is_rarely_rejected() -> None:
    """The bar, 6 % of 1,000 draws, is measured by benchmarks/statistics.py; this is a short form."""
    from benchmarks.statistics import NULLS, rejections

    assert rejections(NULLS[3], 40)["rejected"] <= 0.125


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.sampled_from(["accuracy", "spearman"]))
def test_intervals_keep_to_the_bounds(values: list[float], metric: str) -> None:
    interval = score_interval(metric, values)
    assert (-1 if metric == "spearman" else 0) <= interval.low <= interval.mean + 1e-12
    assert interval.mean - 1e-12 <= interval.high <= 1


def test_holm_is_the_textbooks() -> None:
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02])


def test_what_needs_no_reading_is_scored(write: Write) -> None:
    task, _, folder = load_task(classification(write, "single", "binary_f1", positive="fever"), {})
    splits = read_splits(task, folder)
    known = baselines(task, splits)
    share = sum(example.labels == ("fever",) for example in splits.test) / len(splits.test)
    assert known["best_answer"] == "fever"
    assert known["best_answer_score"] == pytest.approx(2 * share / (1 + share))
    assert 0 < known["chance"] < known["best_answer_score"]


@pytest.mark.parametrize("metric", ["accuracy", "micro_f1", "macro_f1", "weighted_f1", "binary_f1"])
def test_the_best_answer_is_scored_as_any_other(write: Write, metric: str) -> None:
    settings = {"positive": "fever"} if metric == "binary_f1" else {}
    task, _, folder = load_task(classification(write, "single", metric, **settings), {})
    splits = read_splits(task, folder)
    gold = [example.labels for example in splits.test]
    every = [score(metric, gold, [[label]] * len(gold), splits.scored, task.positive) for label in splits.labels]
    assert baselines(task, splits)["best_answer_score"] == pytest.approx(max(every), abs=1e-12)


def test_thousands_of_labels_are_not_counted_one_by_one(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """The baselines of a task of diagnosis codes took minutes, after all fine-tunings."""
    task, _, _ = load_task(classification(write, "multi", "micro_f1"), {})
    codes = tuple(map(str, range(300)))
    examples = tuple(Example(code, code, None, (), (code, codes[number - 1])) for number, code in enumerate(codes))
    calls = []
    monkeypatch.setattr(scores, "counts", lambda *answers: calls.append(1) or counts(*answers))
    assert baselines(task, Splits(examples, examples, examples, codes, codes))["majority"] > 0
    assert len(calls) < 30


@pytest.mark.parametrize(
    ("pairs", "p"),
    [
        ([0.1] * 3, None),
        ([0.8 - 0.7, 0.9 - 0.8, 0.7 - 0.6], None),
        ([0.3 - 0.1 - 0.2] * 3, 1.0),
        ([0.1, 0.2], 0.204833),
    ],
)
def test_pairs_that_differ_by_rounding_show_no_spread(pairs: list[float], p: float | None) -> None:
    assert paired_p(pairs) == (p if p is None else pytest.approx(p, abs=1e-6))


def test_interval_of_few_values_is_students() -> None:
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval.high - interval.mean == pytest.approx(4.302653 / 3**0.5, rel=1e-6)


def test_words_meet_their_first_token(model: Path, write: Write) -> None:
    from transformers import AutoTokenizer

    from studies.finetune import Job

    task, protocol, folder = load_task(ner(write), {})
    splits = read_splits(task, folder)
    job = Job("", task, protocol, splits, 0, folder, {})
    words = ("Hyperparathyroidism", "(", "HPT", ")", "\u00e9t\u00e9", "``", "x")
    example = Example("", " ".join(words), None, words, ("B-Disease", "O", "O", "O", "I-Disease", "O", "O"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoded = encode([example], job, tokenizer, 512)
    offsets = tokenizer(example.text, return_offsets_mapping=True)["offset_mapping"]
    for word, place in zip(words, encoded.words[0], strict=True):
        assert place is not None
        first, last = offsets[place[1]]
        assert word.startswith(example.text[first:last].strip())
    assert sum(label >= 0 for label in encoded.rows[0]["labels"]) == len(words)
    windows = encode([example], job, tokenizer, 8)
    assert len(windows.rows) > 2
    assert windows.cut == 0
    for word, place in zip(words, windows.words[0], strict=True):
        assert place is not None
        token = tokenizer.decode([windows.rows[place[0]]["input_ids"][place[1]]])
        assert word.startswith(token.strip()), "the first token of the word, in some row"


def test_long_texts_are_read_in_windows(model: Path, write: Write) -> None:
    from transformers import AutoTokenizer

    from studies.finetune import Job, _whole

    task, protocol, folder = load_task(classification(write, "single", "macro_f1"), {})
    splits = read_splits(task, folder)
    job = Job("", task, protocol, splits, 0, folder, {})
    tokenizer = AutoTokenizer.from_pretrained(model)
    label = splits.labels[0]
    texts = [Example("", text, None, (), (label,)) for text in ("fever " * 40, "fever", "cough " * 25)]
    encoded = encode(texts, job, tokenizer, 16)
    assert encoded.owners == sorted(encoded.owners)
    assert set(encoded.owners) == {0, 1, 2}
    assert (encoded.windowed, encoded.cut) == (2, 0)
    assert max(len(row["input_ids"]) for row in encoded.rows) == 16
    words = [tokenizer.decode(row["input_ids"]).count("fever") for row in encoded.rows]
    assert sum(words) >= 41, "no word is lost"
    pair = Example("", "fever " * 40, "cough", (), (label,))
    assert encode([pair], job, tokenizer, 16).cut == 1
    logits = np.array([[1.0, 0.0], [3.0, 2.0], [5.0, -1.0]])
    assert _whole(logits, [0, 0, 1], np.add).tolist() == [[2.0, 1.0], [5.0, -1.0]]
    assert _whole(logits, [0, 0, 1], np.maximum).tolist() == [[3.0, 2.0], [5.0, -1.0]]


def test_leakage_finds_runs_of_words(write: Write) -> None:
    run = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    text = write("corpus.jsonl", json.dumps({"text": f"Before: {run.title()}, after. A short one here."}))
    examples = [
        Example(location, content, None, (), ())
        for location, content in (
            ("a", f"x y {run} z"),
            ("b", "a SHORT one, here"),
            ("c", run[:40] + " other " * 9),
            ("d", "no"),
        )
    ]
    corpora = Corpora()
    corpora.add_text(str(text))
    for processes in (None, 2):
        leaked = leakage(examples, corpora, processes)
        assert (leaked["found"], leaked["share"], leaked["where"]) == (2, 0.5, ["a", "b"])
        assert "1 examples below 4 words" in said_of_leakage(leaked)[1]


def test_leakage_reads_the_text_as_the_run_did(write: Write, tmp_path: Path) -> None:
    """Another column and split than the default, and records that the run leaves out."""
    from configs.load import load_config

    said = "the patient was seen by nobody"
    for split, note in (("train", "something else"), ("validation", said)):
        rows = [{"note": note, "text": "other"}, {"note": 7, "text": said}]
        write(f"notes/{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    reading = "reading: {text: note, split: validation, on_error: skip}"
    source = f'{{name: a, shards: "{tmp_path}/none", text: "{tmp_path}/notes", {reading}}}'
    corpora = Corpora()
    corpora.add_run("run", load_config("demo", [f"data.sources=[{source}]"]))
    leaked = leakage([Example("x", said, None, (), ())], corpora)
    assert (leaked["found"], leaked["training_documents"]) == (1, 1)


def test_leakage_does_not_depend_on_the_form_of_accents(write: Write) -> None:
    """Shards of an uncased tokenizer have none, and those of ModernBERT's join what a file may state apart."""
    said = "Le côlon a été opéré"
    corpora = Corpora()
    corpora.add_text(str(write("text.jsonl", json.dumps({"text": "le colon a ete opere"}) + "\n")))
    for form in ("NFC", "NFD"):
        assert leakage([Example("a", normalize(form, said), None, (), ())], corpora)["found"] == 1


def test_leakage_looks_at_shards_and_at_the_run_before(toy_shards: Path, write: Write, tmp_path: Path) -> None:
    """A run of text began from a run of shards, which began from a model of the hub."""
    from configs.load import dump_config, load_config
    from datapipe.manifest import read_manifest
    from datapipe.shards import ShardReader
    from datapipe.tokenizer import load_tokenizer
    from studies.models import config_of_run

    manifest = read_manifest(toy_shards)
    ids = ShardReader((toy_shards / manifest.shards[0].name).open("rb", buffering=0), "").ids(0)
    said = load_tokenizer(manifest.tokenizer.name).backend.decode(ids.tolist())
    gone = f'{{name: gone, shards: "{tmp_path}/gone"}}'
    sources = f'data.sources=[{{name: a, shards: "{toy_shards}"}}, {gone}]'
    before = load_config("demo", [sources, "model.init=org/model", "model.size=null"])
    text = write("corpus.jsonl", json.dumps({"text": "nothing of it"}))
    now = f'data.sources=[{{name: b, shards: "{tmp_path}/new", text: "{text}"}}]'
    after = load_config("demo", [now, f"model.init={tmp_path}/before/checkpoints/9", "model.size=null"])
    (tmp_path / "before" / "checkpoints" / "9").mkdir(parents=True)
    (tmp_path / "after").mkdir()
    (tmp_path / "before" / "config.yaml").write_text(dump_config(before))
    (tmp_path / "after" / "config.yaml").write_text(dump_config(after))
    corpora = Corpora()
    corpora.add_run(str(tmp_path / "after"), config_of_run(str(tmp_path / "after")))
    leaked = leakage([Example("x", said, None, (), ()), Example("y", "else " * 20, None, (), ())], corpora, 1)
    assert leaked["where"] == ["x"]
    assert leaked["training_documents"] == 1 + manifest.documents
    assert [word in line for word, line in zip(("gone", "org/model"), leaked["not_looked_at"], strict=True)] == [
        True
    ] * 2


@pytest.mark.parametrize(
    ("name", "content", "code", "location"),
    [
        ("train.tsv", "The\tO\nfever\n", "bad-token-line", r"train.tsv, line 2: .*'fever'"),
        ("train.tsv", "The\tO\nfever\tX-Disease\n", "bad-tag", r"train.tsv, line 2: 'X-Disease'"),
        ("train.tsv", "\n", "no-examples", r"train.tsv"),
    ],
)
def test_bad_token_files(
    model: Path, write: Write, tmp_path: Path, name: str, content: str, code: str, location: str
) -> None:
    task = ner(write)
    write(name, content)
    with pytest.raises(InputError, match=location) as error:
        evaluate([str(model)], EvaluatedTask(task=task), tmp_path / "out")
    assert error.value.code == code
    assert not (tmp_path / "out").exists(), "nothing has started"


@pytest.mark.parametrize(
    ("name", "content", "code", "location"),
    [
        ("train.jsonl", '{"text": 1}\n', "missing-field", r"train.jsonl, line 1: .*`text.a`"),
        ("train.jsonl", "{}\n", "missing-field", r"train.jsonl, line 1: .*`text.a`"),
        ("test.jsonl", "\n{\n", "bad-json", r"test.jsonl, line 2: "),
    ],
)
def test_bad_records(
    model: Path, write: Write, tmp_path: Path, name: str, content: str, code: str, location: str
) -> None:
    task = classification(write, "single", "macro_f1")
    write(name, content)
    with pytest.raises(InputError, match=location) as error:
        evaluate([str(model)], EvaluatedTask(task=task), tmp_path / "out")
    assert error.value.code == code


def test_other_bad_input(model: Path, write: Write, tmp_path: Path) -> None:
    task = ner(write)

    def refused(models: list[Path], task: str, **settings: Any) -> InputError:
        with pytest.raises(InputError) as error:
            evaluate([str(model) for model in models], EvaluatedTask(task=task, **settings), tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return error.value

    assert "bc5cdr" in str(refused([model], "bc5cdt")), "the nearest name is offered"
    missing = refused([model], "bc5cdr")
    assert (missing.key, missing.code) == ("--data", "file-missing")
    assert refused([tmp_path], task).code == "not-a-model"
    assert refused([model, model], task).code == "model-given-twice"
    assert refused([model], task, protocol={"files.test": "dev.tsv"}).code == "test-is-another-split"
    assert "'epochs'" in str(refused([model], task, protocol={"epoch": 2}))
    assert "entity_f1" in str(refused([model], ner(write, score="macro_f1")))
    for name in ("klingon", ["english"]):
        preset = refused([model], ner(write, protocol={"preset": name}))
        assert preset.key == "protocol.preset"


def test_a_result_of_other_scored_labels_is_refused(write: Write, tmp_path: Path) -> None:
    """Neither the scored labels nor the positive one are in the examples, so the result states them itself."""
    model = _Model("m", tmp_path, "0" * 64)

    def job(metric: str, **changes: Any) -> Any:
        task, protocol, splits = load_examples(quick(classification(write, "single", metric, **changes)))
        [made] = _jobs(model, task, protocol, splits, (17,), tmp_path / metric)
        return made

    for metric, one, other in (
        ("micro_f1", {}, {"scored": ["fever", "cough"]}),
        ("binary_f1", {"positive": "fever"}, {"positive": "cough"}),
    ):
        done = job(metric, **one)
        _write(done.output, done.splits.test, [["fever"]] * len(done.splits.test), {"seed": 17, **done.settings})
        assert read_result(job(metric, **one)) is not None
        with pytest.raises(InputError, match="delete") as error:
            read_result(job(metric, **other))
        assert error.value.code == "result-of-other-settings"


def test_two_models_are_compared_on_texts_with_other_line_ends(write: Write, tmp_path: Path) -> None:
    rows = [{"text": f"a{end}b {number}", "label": number} for number, end in enumerate("\x85\u2028\u2029" * 3)]
    write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    files = {"train": "rows.jsonl", "validation": "rows.jsonl", "test": None}
    columns = {"text": "text", "label": "label"}
    task, _, splits = load_examples(quick(classification(write, "single", "accuracy", files=files, columns=columns)))
    models = [_Model(name, tmp_path, name * 64) for name in "12"]
    for model in models:
        _write(_results_of(tmp_path, model, 17), splits.test, [example.labels for example in splits.test], {})
    [pair] = _pairs(models, task, splits, (17,), tmp_path)
    assert pair["difference"] == 0


def test_few_examples_of_a_sorted_file_have_all_labels(write: Write) -> None:
    rows = [{"text": f"note {number}", "label": "no" if number < 500 else "yes"} for number in range(1000)]
    write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    columns = {"text": "text", "label": "label"}
    task = classification(write, "single", "accuracy", files={"train": "rows.jsonl"}, columns=columns)
    _, _, splits = load_examples(quick(task, examples=100))
    assert len(splits.train) == 100 >= len(splits.validation)
    assert len(splits.test) < 140, "validation is scored as a whole"
    places = [int(example.text.split()[1]) for example in splits.train]
    assert places == sorted(places), "in the order of the file"
    assert 30 < sum(place < 500 for place in places) < 70
    write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in reversed(rows)))
    turned = load_examples(quick(task, examples=100))[2].train
    assert [example.text for example in turned] == [example.text for example in reversed(splits.train)]
    with pytest.raises(InputError) as error:
        load_examples(quick(task, examples=1))
    assert (error.value.key, error.value.code) == ("examples", "nothing-to-learn")


def test_an_entity_type_of_validation_only_is_a_miss(write: Write) -> None:
    task = ner(write)
    write("dev.tsv", "fever\tB-Disease\nrash\tB-Sign\n")
    _, _, splits = load_examples(quick(task))
    gold = [example.labels for example in splits.validation]
    assert score("entity_f1", gold, [["B-Disease", "O"]], splits.scored) == pytest.approx(2 / 3)


def test_precision_and_recall_of_a_binary_task_are_those_of_its_label(write: Write) -> None:
    task, _, splits = load_examples(quick(classification(write, "single", "binary_f1", positive="fever")))
    gold = [["fever"]] * 4 + [["cough"]] * 4
    predicted = [["fever"]] * 2 + [["cough"]] * 2 + [["fever"]] + [["cough"]] * 3
    found = details(task, splits, gold, predicted)
    assert (found["precision"], found["recall"]) == (pytest.approx(2 / 3), 0.5)


@pytest.mark.parametrize("seeds", [[], [1, 1], [-1], [2**32]])
def test_seeds_are_some_and_each_once(seeds: list[int]) -> None:
    with pytest.raises(ValidationError, match="seeds"):
        EvaluatedTask(task="bc5cdr", seeds=tuple(seeds))


def test_overrides_without_a_model_are_refused() -> None:
    assert split_models(["m", "lr=1"]) == (["m"], ["lr=1"])
    with pytest.raises(InputError) as error:
        split_models(["lr=1"])
    assert error.value.code == "no-model"


def test_overrides_are_yaml() -> None:
    assert parse_overrides(["lr=2e-4", "files.test=null"]) == {"lr": 2e-4, "files.test": None}
    with pytest.raises(InputError, match="epochs") as error:
        parse_overrides(["epochs"])
    assert error.value.code == "not-an-override"


def test_one_length_replaces_the_other(write: Write) -> None:
    _, protocol, _ = load_task(ner(write), {"steps": 7})
    assert (protocol.steps, protocol.epochs) == (7, None)


def test_every_described_task_is_whole() -> None:
    assert len(shipped(SHIPPED)) >= 19
    for name in shipped(SHIPPED):
        task, protocol, _ = load_task(name, {})
        assert task.name == name
        assert task.source
        assert task.licence
        assert protocol.lr in {preset["lr"] for preset in PROTOCOLS.values()}
