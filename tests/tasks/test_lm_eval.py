from __future__ import annotations

import importlib.util
import json
import types

import pytest
import torch

from foveate.errors import FoveateError
from foveate.methods import Recipe, apply
from foveate.tasks import TASKS, lm_eval
from foveate.tasks.lm_eval import LmEval, _harness_model

DOCUMENTS = [
    {"question": "Roses are red, violets are", "choices": ["blue", "seven"], "label": 0},
    {"question": "The capital of France is", "choices": ["Berlin", "Paris"], "label": 1},
    {"question": "One, two, three,", "choices": ["four", "apple"], "label": 0},
    {"question": "The sky is", "choices": ["wooden", "blue"], "label": 1},
]
TASK_FILE = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {folder}/documents.jsonl
  cache_dir: {folder}/cache
test_split: train
"""
CHOICES = """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
ANSWERS = """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["\\n", "."], max_gen_toks: 8}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
ROLLING = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed"
)


@pytest.fixture
def harness_task(tmp_path):
    """Writes a task of the harness that needs no network; gives its path."""
    (tmp_path / "documents.jsonl").write_text("\n".join(json.dumps(document) for document in DOCUMENTS))

    def write(name, body):
        path = tmp_path / f"{name}.yaml"
        path.write_text(TASK_FILE.format(name=name, folder=tmp_path) + body)
        return str(path)

    return write


def request(*args):
    return types.SimpleNamespace(args=args)


def test_the_task_of_the_harness_is_written_alone():
    task = TASKS.parse("lm-eval:hellaswag,limit=5")
    assert task == LmEval(task_name="hellaswag", limit=5)
    assert str(task) == "lm-eval:hellaswag,limit=5"


def test_without_the_package_it_says_what_to_install(bench, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FoveateError, match=r"pip install 'foveate\[lm-eval\]'"):
        LmEval(task_name="hellaswag").check(bench)


@needs_harness
def test_unknown_tasks_and_files_are_told_before_anything_runs(bench, tmp_path, monkeypatch):
    known = types.SimpleNamespace(all_tasks=["hellaswag", "piqa"])
    monkeypatch.setattr(lm_eval, "_index", lambda folder: known)
    with pytest.raises(FoveateError, match="no task hellaswagg: did you mean .*hellaswag"):
        LmEval(task_name="hellaswagg").check(bench)
    with pytest.raises(FoveateError, match="can't be read"):
        LmEval(task_name=f"{tmp_path}/none.yaml").check(bench)
    (tmp_path / "empty.yaml").write_text("dataset_path: json\n")
    with pytest.raises(FoveateError, match="names no task"):
        LmEval(task_name=f"{tmp_path}/empty.yaml").check(bench)


@needs_harness
@torch.no_grad()
def test_with_the_full_cache_log_likelihoods_are_those_of_one_forward(bench):
    context, continuation = "Roses are red, violets are", " blue"
    harness = _harness_model(bench)
    asked = [request(context, continuation), request(context, " x")]
    answers = harness.loglikelihood(asked, disable_tqdm=True)
    ids = bench.tokenizer(context + continuation, return_tensors="pt").input_ids
    logs = bench.model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    assert answers[0][0] == pytest.approx(float(logs[-len(continuation) :].sum()), abs=1e-3)
    assert answers[0][1] is False

    text = "Some text. " * 30  # several chunks
    ids = bench.tokenizer("<bos>" + text, return_tensors="pt").input_ids
    logs = bench.model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    assert harness.loglikelihood_rolling([request(text)])[0] == pytest.approx(float(logs.sum()), rel=1e-4)


@needs_harness
def test_greedy_continuations_are_known_as_such(bench):
    bench.model.generation_config.eos_token_id = None
    harness = _harness_model(bench)
    # Only the tokens of printable ASCII, the first 94, come back as the same tokens when text is read again.
    bench.model.lm_head.weight.data[94:] = bench.model.lm_head.weight.data[0]
    (answer,) = harness.generate_until([request("Once upon", {"until": [], "max_gen_toks": 4})])
    assert answer and harness.loglikelihood([request("Once upon", answer)], disable_tqdm=True)[0][1]
    stop = answer[2]
    (cut,) = harness.generate_until([request("Once upon", {"until": [stop], "max_gen_toks": 4})])
    assert cut == answer.split(stop)[0]


@needs_harness
def test_a_cache_policy_changes_what_the_harness_sees(bench):
    ask = [request("The quick brown fox jumps over the lazy dog and", " s")]  # even one token of continuation
    (full,) = _harness_model(bench).loglikelihood(ask, disable_tqdm=True)
    with apply(bench.model, "window:entries=4"):
        (window,) = _harness_model(bench).loglikelihood(ask, disable_tqdm=True)
    with apply(bench.model, "window:keep=1"):
        (kept,) = _harness_model(bench).loglikelihood(ask, disable_tqdm=True)
    assert abs(window[0] - full[0]) > 1e-2 and kept[0] == pytest.approx(full[0], abs=1e-3)


@needs_harness
@pytest.mark.parametrize(
    "name, body, metric",
    [("choices", CHOICES, "acc"), ("answers", ANSWERS, "exact_match"), ("rolling", ROLLING, "bits_per_byte")],
)
def test_the_harness_runs_on_a_recipe(bench, harness_task, name, body, metric):
    fractions = []
    bench.progress = fractions.append
    task = LmEval(task_name=harness_task(name, body), limit=3)
    task.check(bench)
    outcome = task.measure(bench, Recipe.of("streaming:entries=8"))
    assert set(outcome.metrics) == {metric}
    assert outcome.metrics[metric].low <= outcome.metrics[metric].value <= outcome.metrics[metric].high
    assert fractions[-1] == 1


@needs_harness
def test_the_default_model_knows_the_answers(smollm2_bench, harness_task):
    outcome = LmEval(task_name=harness_task("facts", CHOICES)).run(smollm2_bench)
    assert outcome.metrics["acc"].value == 1
