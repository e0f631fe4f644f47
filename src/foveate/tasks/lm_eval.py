"""lm-eval: any task of lm-evaluation-harness, with the recipe at work."""

from __future__ import annotations

import copy
import difflib
import functools
import importlib.util
import re
from pathlib import Path
from typing import Any, ClassVar

import torch

from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric
from foveate.models.anatomy import anatomy
from foveate.tasks.base import Bench, Outcome, Task, read, surprisal, task

CHUNK = 128
"""Tokens a forward where long texts are scored."""


@task("lm-eval")
class LmEval(Task):
    """Hands the model in force to lm-evaluation-harness.

    See https://github.com/EleutherAI/lm-evaluation-harness. Its own wrapper scores a context and its
    continuation in one forward, where a cache policy changes nothing. Here the context goes in first, all but
    its last token; then the continuation is scored on what the policy left of it. Texts without a context
    (`loglikelihood_rolling`) stream in chunks; free answers come from `model.generate`.

    Fields:
        task_name: a task or group of the harness, or the path of a task's YAML file; written alone, as in
            `lm-eval:hellaswag`.
        limit: documents a task; None: all.

    Metrics: the harness's, with the interval value ± 1.96 standard errors where it states one. A metric
    behind a filter is called `metric,filter`; one of a group's tasks, `task/metric`.
    """

    title: ClassVar[str] = "lm-evaluation-harness"
    positional: ClassVar[str | None] = "task_name"

    task_name: str
    limit: int | None = None

    def cost(self) -> float:
        return 500.0 * (self.limit or 1000)

    def check(self, bench: Bench) -> None:
        super().check(bench)
        if importlib.util.find_spec("lm_eval") is None:
            raise FoveateError(f"{self} needs lm-evaluation-harness: pip install 'foveate[lm-eval]'.")
        manager, name = self._found()
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists what it has."
            raise FoveateError(f"{self}: lm-evaluation-harness has no task {name}: {hint}")

    def _found(self) -> tuple[Any, str]:
        """The harness's index of tasks, and the task's name in it."""
        path = Path(self.task_name).expanduser()
        if path.suffix not in (".yaml", ".yml"):
            return _index(None), self.task_name
        try:
            name = re.search(r"^(?:task|group):\s*([\w.-]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        except OSError as error:
            raise FoveateError(f"{self}: {path} can't be read: {error.strerror}.") from error
        if name is None:
            raise FoveateError(f"{self}: {path} names no task: give it a line `task: NAME`.")
        return _index(str(path.parent)), name[1]

    def run(self, bench: Bench) -> Outcome:
        from lm_eval import simple_evaluate

        manager, name = self._found()
        found = simple_evaluate(
            _harness_model(bench),
            tasks=[name],
            limit=self.limit,
            task_manager=manager,
            bootstrap_iters=1000,
            log_samples=False,
        )
        metrics = {}
        for task_name, results in found["results"].items():
            for key, value in results.items():
                metric, comma, kept = key.partition(",")
                if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                error = results.get(f"{metric}_stderr,{kept}")
                half = 1.96 * float(error) if isinstance(error, int | float) else 0.0
                label = metric if kept == "none" else key
                label = label if task_name == name else f"{task_name}/{label}"
                metrics[label] = Metric(float(value), value - half, value + half)
        return Outcome(metrics)


@functools.cache  # the harness's own tasks take seconds to index
def _index(folder: str | None) -> Any:
    """The harness's index of its own tasks, or of those in a folder."""
    from lm_eval.tasks import TaskManager

    return TaskManager() if folder is None else TaskManager(include_path=folder, include_defaults=False)


def _harness_model(bench: Bench) -> Any:
    """The model in force, as the harness wants it; made in here, since the base is an optional package's."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    model, tokenizer = bench.model, bench.tokenizer
    limit = anatomy(model).max_positions

    def log_likelihood(context: list[int], continuation: list[int], start: Any) -> tuple[float, bool]:
        """Log-likelihood in nats of a continuation, and whether greedy decoding gives it; `start` is a cache
        that holds the context but its last token."""
        ids = torch.tensor([context[-1:] + continuation], device=model.device)
        cache, total, greedy = copy.deepcopy(start), 0.0, True
        pieces = zip(ids[:, :-1].split(CHUNK, dim=1), ids[:, 1:].split(CHUNK, dim=1), strict=True)
        for inputs, targets in pieces:
            logits, cache = read(model, inputs, cache)
            total -= float(surprisal(logits, targets).sum())
            greedy = greedy and bool((logits.argmax(-1) == targets).all())
        return total, greedy

    class HarnessModel(TemplateLM):
        eot_token_id = bench.tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            return tokenizer(string, verbose=False, **special)["input_ids"]

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            answers, before, cache = [], None, None
            for done, (_, context, continuation) in enumerate(requests, start=1):
                context = context[max(0, len(context) + len(continuation) - limit) :]
                if context != before:  # the choices of one question share its context
                    cache = None
                    if len(context) > 1:
                        _, cache = read(model, torch.tensor([context[:-1]], device=model.device), last=1)
                    before = context
                answers.append(log_likelihood(context, continuation, cache))
                bench.progress(done / len(requests))
            return answers

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            answers = []
            for done, request in enumerate(requests, start=1):
                ids = self.tok_encode(request.args[0])
                total = 0.0
                for window in get_rolling_token_windows(ids, self.prefix_token_id, limit, context_len=1):
                    context, continuation = make_disjoint_window(window)
                    total += log_likelihood(context, continuation, None)[0]
                answers.append(total)
                bench.progress(done / len(requests))
            return answers

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            answers = []
            for done, request in enumerate(requests, start=1):
                context, settings = request.args
                settings = dict(settings)
                stops = settings.pop("until", None) or []
                stops = [stops] if isinstance(stops, str) else stops
                most = settings.pop("max_gen_toks", 256)
                if not settings.get("do_sample"):  # the harness writes temperature: 0 for greedy
                    settings |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
                ids = torch.tensor([self.tok_encode(context)[-max(1, limit - most) :]], device=model.device)
                out = model.generate(  # type: ignore[operator]
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=most,
                    pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                    **({"stop_strings": stops, "tokenizer": tokenizer} if stops else {}),
                    **settings,
                )
                answer = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)[0]
                for stop in filter(None, stops):
                    answer = answer.split(stop)[0]
                answers.append(answer)
                bench.progress(done / len(requests))
            return answers

    return HarnessModel()
