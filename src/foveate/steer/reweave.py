"""Reweaving: past states of several layers, read back and mixed into the present token's residual stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import elu
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, mean, median
from foveate.methods import Paper, Target, method
from foveate.models.anatomy import Anatomy, anatomy
from foveate.steer.base import ResidualSteer, ResidualView, reinjected
from foveate.tasks.base import Bench

CHUNK = 256
"""Tokens whose reads of each other are made at a time, so that memory grows linearly with the text."""


class Reweaving(nn.Module):
    """What is trained: it writes each token's states into a summary, and reads the summary for each token.

    Of token t, u(t) = [norm(h_l(t)) for l in layers] has the inputs of several layers. With f(x) = elu(x) + 1:

        S(t) = sum over i <= t of f(K u(i)) (V u(i))^T        the summary, (rank, rank)
        z(t) = sum over i <= t of f(K u(i))                   (rank,)
        x(t) + gate * O( S(t)^T q / z(t).q ),  q = f(Q norm(x(t)))

    `gate` has a number for each channel and starts at zero, so that an untrained module changes nothing. The summary
    has a fixed size; it is all that is kept of a text.

    Args:
        hidden: width of the residual stream.
        layers: the layers whose inputs are captured.
        at: the layer before which the residual stream is changed; none of `layers` is above it.
        rank: width of keys, queries and values.
    """

    def __init__(self, hidden: int, layers: Iterable[int], at: int, rank: int = 16):
        super().__init__()
        self.layers, self.at = list(layers), at
        wide = hidden * len(self.layers)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in self.layers)
        self.query_norm = nn.RMSNorm(hidden)
        self.key, self.value = nn.Linear(wide, rank, bias=False), nn.Linear(wide, rank, bias=False)
        self.query, self.out = nn.Linear(hidden, rank, bias=False), nn.Linear(rank, hidden, bias=False)
        self.gate = nn.Parameter(torch.zeros(hidden))

    def forward(self, view: ResidualView) -> Tensor:
        """The new residual stream, float32 (batch, token, hidden); `view.state` is brought up to its last token."""
        hidden = view.hidden.float()
        states = [norm(view.captured[i].float()) for norm, i in zip(self.norms, self.layers, strict=True)]
        combined = torch.cat(states, dim=-1)
        key, value = elu(self.key(combined)) + 1, self.value(combined)
        if view.valid is not None:
            key = key * view.valid[..., None]  # padding writes nothing
        query = elu(self.query(self.query_norm(hidden))) + 1
        none = key.new_zeros(len(key), key.shape[-1], 1)
        total, weight = view.state.get("reweave", none.expand(-1, -1, key.shape[-1])), view.state.get("weight", none)
        reads = []
        for q, k, v in zip(query.split(CHUNK, 1), key.split(CHUNK, 1), value.split(CHUNK, 1), strict=True):
            match = (q @ k.transpose(1, 2)).tril()
            read, norm = q @ total + match @ v, q @ weight + match.sum(-1, keepdim=True)
            reads.append(read / norm.clamp(min=1e-6))
            total, weight = total + k.transpose(1, 2) @ v, weight + k.sum(1)[..., None]
        view.state["reweave"], view.state["weight"] = total, weight
        return hidden + self.gate * self.out(torch.cat(reads, dim=1))

    def save(self, path: str | Path) -> None:
        """Write it as safetensors, for the recipe `reweave:weights=PATH`."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, path, {"layers": " ".join(map(str, self.layers)), "at": str(self.at)})

    @classmethod
    def load(cls, path: str | Path) -> Reweaving:
        """What `save` wrote.

        Raises:
            FoveateError: no such file, or not one of these.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            rank, hidden = tensors["query.weight"].shape
            module = cls(hidden, [int(i) for i in about["layers"].split()], int(about["at"]), rank)
            module.load_state_dict(tensors)
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise FoveateError(
                f"reweave: {path} holds no trained module ({' '.join(str(error).split())[:200]}): give the file that "
                "`Reweaving.save` wrote."
            ) from error
        return module


@method("reweave")
class Reweave(ResidualSteer):
    """Capture hidden states at several layers, and mix what past ones hold back into the present token.

    The paper's abstract gives no formula, so this is one reading of it: the captured states of each token are combined
    into one latent and written into a causal summary of fixed size; each token reads it by a learned query, and
    what is read is added to the residual stream through a gate for each channel. There is no attention to single past
    tokens and no external memory. `Reweaving` has the formulas.

    The module has to be trained: `reweave_module` makes it for a model, `train_reweave` trains it (the model's own
    weights stay, or learn with it), `Reweaving.save` writes the file that a recipe names.

    Fields:
        weights: path of the trained module, as safetensors.

    Example:
        >>> import foveate as fv, tempfile, torch
        >>> from foveate.steer.reweave import reweave_module, train_reweave
        >>> model, text = fv.tiny("llama"), torch.arange(1, 41).unsqueeze(0)
        >>> module = reweave_module(model, layers=[0, 2], at=2)
        >>> losses = train_reweave(model, module, [(text, text)] * 20)
        >>> losses[-1] < losses[0]
        True
        >>> path = tempfile.mkdtemp() + "/module.safetensors"
        >>> module.save(path)
        >>> with fv.apply(model, f"reweave:weights={path}"):
        ...     ids = model.generate(text, max_new_tokens=4, do_sample=False)
    """

    paper: ClassVar[Paper | None] = Paper(
        "Contextual Memory Reweaving in Large Language Models Using Layered Latent State Reconstruction",
        2025,
        "https://arxiv.org/abs/2502.02046",
    )
    claim: ClassVar[str] = (
        "past states of several layers, mixed back in, improve recall over distance and of rare tokens"
    )

    weights: str | None = None

    def residual(self, target: Target, parts: Anatomy) -> tuple[int, list[int], Callable[[ResidualView], Tensor]]:
        if self.weights is None:
            raise FoveateError(
                "reweave needs a trained module: make one with foveate.steer.reweave.reweave_module, train it with "
                "train_reweave, save it, and give its path as weights=PATH."
            )
        module = Reweaving.load(self.weights)
        hidden = module.query.in_features
        if hidden != parts.hidden:
            raise FoveateError(
                f"reweave: {self.weights} was trained for a hidden size of {hidden}, and this model's is "
                f"{parts.hidden}: give a module that was trained on this model."
            )
        module.to(target.model.device).requires_grad_(False)
        return module.at, module.layers, module


def reweave_module(
    model: PreTrainedModel, layers: Iterable[int] | None = None, at: int | None = None, rank: int = 16, seed: int = 0
) -> Reweaving:
    """An untrained module for a model: it changes nothing until it is trained.

    Args:
        model: a causal language model of a known family.
        layers: the layers whose inputs are captured; by default the first, the middle one up to `at`, and `at`.
        at: the layer before which the residual stream is changed; by default at two thirds of the depth.
        rank: width of keys, queries and values.
        seed: decides the first weights.
    """
    parts = anatomy(model)
    at = 2 * len(parts.layers) // 3 if at is None else at
    layers = sorted({0, at // 2, at}) if layers is None else layers
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Reweaving(parts.hidden, layers, at, rank).to(model.device)


@contextmanager
def reweaving(model: PreTrainedModel, module: Reweaving) -> Iterator[None]:
    """The module on the model, until the block ends; for training."""
    with reinjected(Reweave.name, anatomy(model), module.at, module.layers, module):
        yield


def train_reweave(
    model: PreTrainedModel,
    module: Reweaving,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    lr: float = 4e-3,
    whole: bool = False,
) -> list[float]:
    """Train the module, or with `whole` the model too, to predict labels. AdamW; a step for each batch.

    Args:
        model, module: changed in place; the model only with `whole`.
        batches: token ids and labels, LongTensor (batch, length) each; the labels are the ids, or -100 where a token is
            not to be learned.
        lr: learning rate.

    Returns:
        The loss of each batch, in nats.
    """
    parameters = list(module.parameters()) + (list(model.parameters()) if whole else [])
    step = _stepper(model, module, parameters, lr)
    return [step(ids, labels) for ids, labels in batches]


def _stepper(
    model: PreTrainedModel, module: Reweaving | None, parameters: list[nn.Parameter], lr: float
) -> Callable[[Tensor, Tensor], float]:
    """A function that takes one training step and gives the loss; the module is on the model just while it runs."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)

    def step(ids: Tensor, labels: Tensor) -> float:
        with torch.enable_grad(), nullcontext() if module is None else reweaving(model, module):
            loss = model(ids.to(model.device), labels=labels.to(model.device), use_cache=False).loss
            # Not backward(): parameters that are not trained get no gradients.
            gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


# ---- the claim --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Recall:
    """Key-value recall: a stream of key, value, key, value ...; each text has its own value for each key.

    Keys come as often as one over their rank; a value is scored where its key was there before.
    """

    keys: int = 48
    pairs: int = 40

    def batch(self, generator: torch.Generator, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids and labels (batch, 2 * pairs); distance in tokens to the key's last time (0: none), and keys, by pair."""
        often = 1 / torch.arange(1, self.keys + 1).float()
        keys = torch.multinomial(often.expand(size, -1), self.pairs, replacement=True, generator=generator)
        values = torch.randint(self.keys, (size, self.keys), generator=generator).gather(1, keys)
        place = torch.arange(self.pairs)
        same = (keys[:, :, None] == keys[:, None]).tril(-1)
        last = torch.where(same, place, -1).amax(-1)
        distance = torch.where(last >= 0, 2 * (place - last), 0)
        ids = torch.stack([keys, self.keys + values], dim=-1).flatten(1)
        labels = torch.full_like(ids, -100)
        labels[:, 1::2] = torch.where(last >= 0, self.keys + values, -100)
        return ids, labels, distance, keys


@claim("reweave")
class RecallOverDistance(Claim):
    statement: ClassVar[str] = (
        "reweaving past states of several layers improves recall over a range of lengths, most of all that of rarely "
        "occurring tokens, at an acceptable cost (abstract)"
    )
    setting: ClassVar[str] = (
        "Llama-like models of 2 layers and width 32, trained from scratch on key-value recall (48 keys, 40 pairs, "
        "batches of 32) with reweaving of rank 16, and with an MLP wider by as many parameters; 3 seeds, 512 texts; "
        "far: over 16 tokens; rare: the 32 rarest of 48 keys; after 300 batches, and judged after 900; a training step "
        "of both timed in alternation"
    )

    seeds: ClassVar[int] = 3
    marks: ClassVar[tuple[int, ...]] = (300, 900)
    rank: ClassVar[int] = 16

    def run(self, bench: Bench) -> Finding:
        found: dict[tuple[str, int], list[dict[str, float]]] = {}
        ratios: list[float] = []
        for seed in range(10, 10 + self.seeds):  # the form of the module was chosen on other seeds
            arms = {"wider MLP": self.model(seed, wider=True), "reweaving": self.model(seed, wider=False)}
            ratios += self.train(arms, seed, found)
            bench.progress((seed - 9) / self.seeds)
        metrics: dict[str, Metric] = {}
        gains: dict[str, Metric] = {}
        for mark in self.marks:
            for kind in ("all", "near", "far", "rare"):
                ours, wider = ([r[kind] for r in found[name, mark]] for name in ("reweaving", "wider MLP"))
                at = f"accuracy after {mark} batches, {kind}"
                metrics[f"{at}: reweaving"], metrics[f"{at}: wider MLP"] = mean(ours), mean(wider)
                gains[kind] = mean([a - b for a, b in zip(ours, wider, strict=True)])  # the last mark's stay
                metrics[f"{at}: reweaving less wider MLP"] = gains[kind]
        sizes = {name: sum(p.numel() for part in arm if part for p in part.parameters()) for name, arm in arms.items()}
        metrics["parameters, reweaving over wider MLP"] = Metric.exact(sizes["reweaving"] / sizes["wider MLP"])
        metrics["time of a training step, reweaving over wider MLP"] = median(ratios)
        return Finding(
            metrics,
            {
                "better at near distances (to 16 tokens)": gains["near"].low > 0,
                "better at far distances": gains["far"].low > 0,
                "better on rare tokens": gains["rare"].low > 0,
                "gains more on rare tokens than on all": gains["rare"].value > gains["all"].value,
                "a training step takes at most half as long again": median(ratios).value < 1.5,
            },
        )

    def model(self, seed: int, *, wider: bool) -> tuple[LlamaForCausalLM, Reweaving | None]:
        """A fresh model with a module, or one that is wider by as many parameters."""
        hidden, layers, intermediate = 32, 2, 128
        more = sum(p.numel() for p in Reweaving(hidden, [0, 1], 1, self.rank).parameters())
        config = LlamaConfig(
            vocab_size=2 * _Recall.keys,
            hidden_size=hidden,
            intermediate_size=intermediate + (round(more / (3 * hidden * layers)) if wider else 0),
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=256,
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = LlamaForCausalLM(config)
        return model, None if wider else reweave_module(model, [0, 1], 1, self.rank, seed)

    def train(
        self,
        arms: dict[str, tuple[LlamaForCausalLM, Reweaving | None]],
        seed: int,
        found: dict[tuple[str, int], list[dict[str, float]]],
    ) -> list[float]:
        """Both on the same batches, in alternation; adds to `found` what they recall at the marks.

        Returns the time of a step with reweaving over that without, for each step.
        """
        generator, recall, ratios = torch.Generator().manual_seed(seed), _Recall(), []
        steps = {
            name: _stepper(model, module, [*model.parameters(), *([] if module is None else module.parameters())], 4e-3)
            for name, (model, module) in arms.items()
        }
        for done in range(1, self.marks[-1] + 1):
            ids, labels, *_ = recall.batch(generator, 32)
            spent = {}
            for name, step in steps.items():
                start = time.perf_counter()
                step(ids, labels)
                spent[name] = time.perf_counter() - start
            ratios.append(spent["reweaving"] / spent["wider MLP"])
            if done in self.marks:
                for name, arm in arms.items():
                    found.setdefault((name, done), []).append(self.recall(*arm))
        return ratios

    @torch.no_grad()
    def recall(self, model: LlamaForCausalLM, module: Reweaving | None) -> dict[str, float]:
        """Accuracy on new texts: over all pairs, by distance, and of rare keys."""
        ids, _, distance, keys = _Recall().batch(torch.Generator().manual_seed(10_000), 512)
        with nullcontext() if module is None else reweaving(model, module):
            logits = model(ids, use_cache=False).logits
        right = (logits[:, 0:-1:2].argmax(-1) == ids[:, 1::2]).float()
        where = {
            "all": distance > 0,
            "near": (distance > 0) & (distance <= 16),
            "far": distance > 16,
            "rare": (distance > 0) & (keys >= 16),
        }
        return {name: float(right[mask].mean()) for name, mask in where.items()}
