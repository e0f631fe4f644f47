from __future__ import annotations

import pytest
import torch

from foveate.errors import FoveateError
from foveate.models.tiny import TINY_FAMILIES, tiny, tiny_tokenizer


@pytest.mark.parametrize("family", TINY_FAMILIES)
@torch.no_grad()
def test_logits_depend_on_early_tokens(family):
    model = tiny(family)
    ids = torch.randint(0, 256, (1, 64), generator=torch.Generator().manual_seed(5))
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % 256
    last, changed = model(ids).logits[0, -1], model(other).logits[0, -1]
    assert model.dtype == torch.float32 and not model.training
    assert (last - changed).std() > 0.1 * last.std()


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    first, again, other = tiny("llama"), tiny("llama"), tiny("llama", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(FoveateError, match="did you mean llama"):
        tiny("lama")
    with pytest.raises(FoveateError, match="num_hidden_layers"):
        tiny("llama", num_layers=3)


@pytest.mark.parametrize("text", ["", "plain", "héllo  wörld\n\t", "日本語 🙂", "a" * 300])
def test_tokenizer_gives_back_every_text(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text


def test_a_pipeline_from_chat_to_text():
    tokenizer, model = tiny_tokenizer(), tiny("llama")
    assert len(tokenizer) <= model.config.vocab_size
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (
        model.config.pad_token_id,
        model.config.bos_token_id,
        model.config.eos_token_id,
    )
    chats = [[{"role": "user", "content": "Hi"}], [{"role": "user", "content": "Hello there"}]]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    assert batch["attention_mask"][0, 0] == 0 and batch["input_ids"][0, 0] == tokenizer.pad_token_id
    out = model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert out.shape == (2, batch["input_ids"].shape[1] + 5)
    alone = tokenizer.apply_chat_template(chats[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert torch.equal(
        model.generate(**alone, max_new_tokens=5, min_new_tokens=5, do_sample=False)[0, -5:], out[0, -5:]
    )
