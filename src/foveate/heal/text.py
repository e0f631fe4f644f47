"""What a model heals on: calibration text, a file of the user's, or texts that the original itself writes."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.heal.base import Job, reader
from foveate.models.anatomy import anatomy
from foveate.models.caches import with_cache
from foveate.train import processes
from foveate.train.checkpoint import unwritten

CACHE_BYTES = 24 * 2**30
"""Memory that the caches of texts that are sampled together may take on a GPU."""
BLANK = re.compile(r"(?<=[^\W_])\n\n")
"""Where a text is cut into parts: a blank line after a letter or a digit."""
PART = 100_000
"""Characters of a text, at least, that the tokenizer reads in one go."""


def sequences(job: Job, data: str, count: int, length: int, samples: int, seed: int) -> Tensor:
    """Healing text in rows of equal length, as many as there are or are asked for.

    Args:
        job: whose tokenizer, teacher and folder are used.
        data: `calibration` (the calibration parts of prose, then code), `samples`, or what `load_text` takes: of a
            file the whole, of a Hub data set the part to calibrate on. Several, `samples+notes.txt`, share `count`.
        count: tokens asked for.
        length: tokens of a row.
        samples: tokens sampled at most, with `samples`.
        seed: of the sampling.

    Returns:
        Token ids, int64 (rows, length), on the student's device; at least one row.

    Raises:
        FoveateError: there is no such text, or it is shorter than one row.
    """
    limit = anatomy(job.student).max_positions
    if length > limit:
        raise FoveateError(f"length={length} is longer than the {limit} positions of this model: give {limit} at most.")
    if "+" in data and not Path(data).exists():
        parts = data.split("+")
        return torch.cat([sequences(job, part, -(-count // len(parts)), length, samples, seed) for part in parts])
    if data == "samples":
        rows = sampled(job, -(-min(count, samples) // length), length, seed)
    else:
        ids = _read(job, data, count)
        rows = ids[: len(ids) // length * length].view(-1, length)
        if not len(rows):
            raise FoveateError(
                f"the healing text {data} has {len(ids)} tokens, and one sequence is to have {length}: give a longer "
                "text, or a smaller length."
            )
        rows = rows[: -(-count // length)]
    if rows.numel() < count:
        job.show.say(
            f"{data} gives {rows.numel():,} tokens of {count:,}: they are read {count / rows.numel():.1f} times"
        )
    return rows.to(job.student.device)


def _read(job: Job, data: str, count: int) -> Tensor:
    """Token ids (n,) of a text: the first `count` and some, or all there are."""
    if data == "calibration":
        texts = [load_text("prose").calibration, load_text("code").calibration]
    else:
        text = load_text(data)
        judged = data in ("prose", "code") or data.startswith("hub:")
        texts = [text.calibration if judged else text.calibration + text.evaluation]
    ids = torch.empty(0, dtype=torch.long)
    for each in texts:
        if len(ids) < count:
            # A token has at least one character: what lies far behind what is asked for isn't read.
            ids = torch.cat([ids, _tokens(each[: 16 * count + 4096], job.tokenizer())])
    return ids


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids (n,): a long text is cut at blank lines, and its parts go through the tokenizer side by side.

    Byte-level tokenizers give what they would of the whole: they join no letter with the line break behind it. One
    that begins a text with a token of its own does so in every part.
    """
    starts = [0]
    while blank := BLANK.search(text, starts[-1] + PART):
        starts.append(blank.start())
    parts = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    ids = torch.empty(0, dtype=torch.long)
    for first in range(0, len(parts), 256):  # as Python's numbers, all at once would fill the memory
        found = tokenizer(parts[first : first + 256], add_special_tokens=False, verbose=False)["input_ids"]
        ids = torch.cat([ids, torch.tensor(list(itertools.chain.from_iterable(found)), dtype=torch.long)])
    return ids


def sampled(job: Job, rows: int, length: int, seed: int) -> Tensor:
    """Texts that the teacher writes, int64 (rows, length), on its device: no data is needed.

    Each starts with the token that begins a text (a random token in models without one), and goes on at temperature 1
    from the whole distribution; a text that ends before the row does is followed by another. Many rows are sampled
    together. With a folder each batch is stored in it, and not sampled again.
    """
    teacher = job.teacher
    parts = anatomy(teacher)
    size = 2 * len(parts.layers) * parts.kv_heads * parts.head_dim * length * next(teacher.parameters()).element_size()
    together = max(1, min(2048, CACHE_BYTES // size)) if teacher.device.type == "cuda" else 16
    who = {"teacher": digest(teacher), "length": length, "seed": seed, "together": together}
    folder = None if job.work is None else job.work / "samples"
    starts = range(0, rows, together)
    batches: list[Tensor] = []
    with reader(teacher) as reading, torch.inference_mode():
        for number, start in enumerate(starts):
            here = min(together, rows - start)
            owner = number % processes.world()
            batch = torch.empty(here, length, dtype=torch.long, device=teacher.device)
            if owner == processes.rank():
                kept = None if folder is None else _stored(folder / f"{number:05}.safetensors", who, here)
                if kept is None:
                    kept = _sample(reading, here, length, 100_003 * seed + number)
                    if folder is not None:
                        _store(folder / f"{number:05}.safetensors", kept, who)
                batch = kept.to(teacher.device)
            batches.append(batch)
            done = (number + 1) / len(starts)
            job.show.at("sample", done, f"{sum(map(len, batches)) * length:,} tokens")
    for number, batch in enumerate(batches):
        processes.from_rank(batch, number % processes.world())
    return torch.cat(batches).clone()


def _sample(teacher: PreTrainedModel, rows: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator(teacher.device).manual_seed(seed)
    first = teacher.config.bos_token_id
    words = anatomy(teacher).vocab
    ids = torch.empty(rows, length, dtype=torch.long, device=teacher.device)
    if first is None:
        ids[:, 0] = torch.randint(words, (rows,), generator=generator, device=teacher.device)
    else:
        ids[:, 0] = first
    cache = DynamicCache(config=teacher.config)
    for at in range(1, length):
        logits = teacher(ids[:, at - 1 : at], **with_cache(cache), use_cache=True).logits[:, -1].float()
        # The largest of logits plus Gumbel noise is a draw from their softmax, and needs no sum over the vocabulary.
        noise = torch.empty_like(logits).exponential_(generator=generator)
        torch.argmax(logits - noise.log_(), dim=-1, out=ids[:, at])
    return ids


def _store(path: Path, ids: Tensor, who: dict[str, object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"ids": ids.to("cpu", torch.int32)}, temporary, metadata={"of": json.dumps(who)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise unwritten(path.parent, error) from error


def _stored(path: Path, who: dict[str, object], rows: int) -> Tensor | None:
    """What was sampled before, or None; an error where it is another run's."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            of, ids = json.loads((file.metadata() or {}).get("of", "{}")), file.get_tensor("ids")
    except (OSError, SafetensorError, ValueError) as error:
        raise FoveateError(f"{path} can't be read ({error}): delete it, and it is sampled again.") from error
    if of != who:
        raise FoveateError(
            f"{path} holds samples of another run (another model, length or seed): give another folder to work in, or "
            f"delete {path.parent}."
        )
    # Fewer rows can be had of a batch that was larger, but a larger one is another draw.
    return ids[:rows].long() if len(ids) >= rows else None


def digest(model: PreTrainedModel) -> str:
    """16 hexadecimal digits that change with a model's weights: of names, shapes, dtypes and some numbers of each."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().flatten()
        found.update(flat[:: max(1, len(flat) // 256)].to("cpu", torch.float64).numpy().tobytes())
    return found.hexdigest()[:16]
