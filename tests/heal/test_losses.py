"""The losses against slow plain references in float64, and their gradients."""

import copy
import sys

import pytest
import torch

import foveate as fv
from foveate.heal import HEALS, distill, heal, minilm
from foveate.heal.base import Job
from foveate.heal.text import sampled, sequences
from foveate.models.surgery import Surgery, cut
from foveate.train.show import Show


def models(family="llama"):
    return fv.tiny(family).double(), fv.tiny(family, seed=1).double()


IDS = torch.randint(256, (3, 11), generator=torch.Generator().manual_seed(3))


def reference(student, teacher, ids, temperature, logits, text):
    """Token by token, from the models' own logits."""
    s, t = student(ids).logits, teacher(ids).logits
    total = 0.0
    for row in range(ids.shape[0]):
        for at in range(ids.shape[1]):
            p, q = (t[row, at] / temperature).softmax(-1), (s[row, at] / temperature).softmax(-1)
            total = total + logits * temperature**2 * (p * (p / q).log()).sum() / ids.numel()
            if at + 1 < ids.shape[1]:
                nll = -s[row, at].softmax(-1)[ids[row, at + 1]].log()
                total = total + text * nll / (ids.shape[0] * (ids.shape[1] - 1))
    return total


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # untied, with capped logits
@pytest.mark.parametrize("temperature, logits, text", [(1.0, 1.0, 0.0), (2.0, 1.0, 0.5), (1.0, 0.0, 1.0)])
def test_logits_and_gradients_are_those_of_the_plain_loss(monkeypatch, family, temperature, logits, text):
    monkeypatch.setattr(distill, "CHUNK", 7)  # 33 tokens in chunks that don't divide them
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    student, teacher = models(family)
    spec = HEALS.parse(f"distill:hidden=0,temperature={temperature},logits={logits},text={text}")
    loss = distill.Distillation(student, teacher, spec, IDS)(IDS)
    expected = reference(student, teacher, IDS, temperature, logits, text)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-9)
    ours = torch.autograd.grad(loss, list(student.parameters()))
    theirs = torch.autograd.grad(expected, list(student.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_hidden_states_are_compared_token_by_token():
    student, teacher = models()
    spec = HEALS.parse("distill:logits=0,hidden=1")
    loss = distill.Distillation(student, teacher, spec, IDS)(IDS)
    mine = student(IDS, output_hidden_states=True).hidden_states
    theirs = teacher(IDS, output_hidden_states=True).hidden_states
    far = []
    for layer in range(1, 4):  # transformers gives the last one behind the final norm
        for row in range(3):
            for at in range(11):
                s, t = mine[layer][row, at], theirs[layer][row, at]
                far.append(float(((s - t).square().sum() / t.square().sum()).detach()))
    states = [distill._states(model, IDS)[1][3] for model in (student, teacher)]
    far += ((states[0] - states[1]).square().sum(-1) / states[1].square().sum(-1)).flatten().tolist()
    assert loss.item() == pytest.approx(sum(far) / len(far), rel=1e-5)


def test_layers_learn_from_those_that_they_were():
    teacher = fv.tiny("llama", num_hidden_layers=6, initializer_range=0.05)
    for gone in ({1, 2}, {3}, {0, 4}):
        student = copy.deepcopy(teacher)
        student.model.layers = torch.nn.ModuleList(
            layer for i, layer in enumerate(student.model.layers) if i not in gone
        )
        mine, theirs = (distill._states(m, IDS)[1] for m in (student, teacher))
        pairs = distill.matched(mine, theirs)
        assert [i for i, _ in pairs] == list(range(6 - len(gone)))
        assert all(a < b for (_, a), (_, b) in zip(pairs, pairs[1:], strict=False)) and pairs[-1][1] == 5
        before = min(gone)
        assert pairs[:before] == [(i, i) for i in range(before)]  # untouched so far: the states are the same


def test_relations_are_the_papers():
    """Attention distributions and value relations from the projections, head by head."""
    student, teacher = models("gpt2")  # no rotary positions: q, k and v are what the map gives
    spec = HEALS.parse("minilm:values=0.5")
    loss = minilm.Relations(student, teacher, spec)(IDS)
    rel = []
    for model in (teacher, student):
        block = model.transformer.h[-1]
        x = block.ln_1(model(IDS, output_hidden_states=True).hidden_states[3])
        rel.append([part.view(3, 11, 4, 16).transpose(1, 2) for part in block.attn.c_attn(x).split(64, dim=-1)])
    expected = 0.0
    for first, second, weight in ((0, 1, 1.0), (2, 2, 0.5)):
        for row in range(3):
            for head in range(4):
                for at in range(11):
                    p, q = (
                        (r[first][row, head, at] @ r[second][row, head, : at + 1].T / 16**0.5).softmax(-1) for r in rel
                    )
                    expected += weight * float((p * (p / q).log()).sum().detach()) / (3 * 4 * 11)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_minilm_leaves_what_comes_after_the_attention():
    teacher, student = fv.tiny("llama"), fv.tiny("llama", num_hidden_layers=2, hidden_size=32, head_dim=8, seed=1)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    heal(student, teacher, "minilm:tokens=1k,batch=4,length=32,data=samples", progress=False)
    same = {name for name, p in student.named_parameters() if torch.equal(p, before[name])}
    layer = "model.layers.1."
    assert same == {
        f"{layer}self_attn.o_proj.weight", f"{layer}mlp.gate_proj.weight", f"{layer}mlp.up_proj.weight",
        f"{layer}mlp.down_proj.weight", f"{layer}post_attention_layernorm.weight", "model.norm.weight",
        "lm_head.weight",
    }  # fmt: skip


def outputs(model, ids):
    """The mean of what each sublayer adds, attention and MLP in turn."""
    found = []

    def keep(module, inputs, output):
        adds = output[0] if isinstance(output, tuple) else output
        found.append(adds.double().expand(*ids.shape, 64).mean((0, 1)))

    modules = [module for layer in model.model.layers for module in (layer.self_attn, layer.mlp)]
    hooks = [module.register_forward_hook(keep) for module in modules]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


def test_bias_brings_every_mean_to_the_originals():
    teacher = fv.tiny("llama")
    student = copy.deepcopy(teacher)
    cut(student, "channel", [torch.arange(64)] * 4, Surgery())
    cut(student, "attention", [torch.arange(i != 2) for i in range(4)], Surgery())
    cut(student, "mlp", [torch.arange(i != 1) for i in range(4)], Surgery())
    heal(student, teacher, "bias:tokens=1k,length=32,data=samples", progress=False)
    ids = heal_rows(teacher)
    torch.testing.assert_close(outputs(student, ids), outputs(teacher, ids), rtol=1e-4, atol=1e-4)
    assert student.model.layers[2].self_attn.value.shape == (64,)
    assert student.model.layers[1].mlp.settings == {"size": 64}


def heal_rows(teacher):
    with Show(False) as show:
        return sampled(Job(teacher, teacher, lambda: None, None, 1, show), 32, 32, 0)


def test_several_texts_give_as_much_each_as_far_as_they_reach(tmp_path):
    teacher = fv.tiny("llama", num_hidden_layers=1)
    (tmp_path / "a.txt").write_text("a" * 1000)
    (tmp_path / "b.txt").write_text("b" * 100)
    with Show(False) as show:
        job = Job(teacher, teacher, fv.tiny_tokenizer, None, 1, show)
        rows = sequences(job, f"{tmp_path / 'a.txt'}+{tmp_path / 'b.txt'}", 512, 32, 0, 0)
    assert rows.shape == (11, 32)  # 256 tokens of one, and the 96 that fill rows of the other
    a, b = fv.tiny_tokenizer()("ab").input_ids
    assert (rows[:8] == a).all() and (rows[8:] == b).all()


def test_a_long_text_is_read_in_parts_as_if_it_were_one(smollm2, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["foveate.heal.text"], "PART", 20)
    text = "".join(f"line {i}{'.' * (i % 3 > 1)}{chr(10) * (1 + i % 4)}{' ' * (i % 5)}" for i in range(2000))
    (tmp_path / "a.txt").write_text(text)
    teacher, tokenizer = fv.tiny("llama", num_hidden_layers=1), smollm2[1]
    with Show(False) as show:
        job = Job(teacher, teacher, lambda: tokenizer, None, 1, show)
        rows = sequences(job, str(tmp_path / "a.txt"), 512, 32, 0, 0)
    assert rows.flatten().tolist() == tokenizer(text, add_special_tokens=False)["input_ids"][:512]
