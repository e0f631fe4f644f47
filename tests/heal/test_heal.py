"""What all ways to heal keep to: the student recovers, the teacher is left alone, errors are sentences."""

import copy

import pytest
import torch

import foveate as fv
from foveate.errors import FoveateError
from foveate.heal import HEALS, Heal, HealReport, heal
from foveate.models.surgery import Surgery, cut, settle
from foveate.models.tiny import TINY_FAMILIES

WAYS = ["distill:lr=1e-3", "distill:hidden=0,text=1,lr=1e-3", "lora:rank=4,lr=3e-3", "minilm:lr=1e-3"]
QUICK = "tokens=4k,batch=4,length=32,data=samples"


def quick(spec):
    return f"{spec}{',' if ':' in spec else ':'}{QUICK}"


def damaged(teacher, seed=1):
    """A copy with noise on its weights."""
    student = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in student.parameters():
            p += 0.5 * p.std() * torch.randn(p.shape, generator=generator) if p.ndim > 1 else 0.0
    return student


def thinned(teacher, kind, keep):
    student = copy.deepcopy(teacher)
    cut(student, kind, keep, Surgery())
    settle(student)
    return student


def divergence(student, teacher):
    ids = torch.randint(256, (4, 48), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        p, q = (m(ids).logits.double().log_softmax(-1) for m in (teacher, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("spec", WAYS)
def test_a_damaged_model_recovers_and_the_teacher_is_left_alone(spec):
    teacher = fv.tiny("llama")
    student = damaged(teacher)
    student.requires_grad_(False)
    before, theirs, names = divergence(student, teacher), weights(teacher), list(student.state_dict())
    report = heal(student, teacher, quick(spec), progress=False)
    assert isinstance(report, HealReport)
    assert report.curve[-1][1] < report.curve[0][1]
    if not spec.startswith("minilm"):  # it compares relations, not what comes of them
        assert divergence(student, teacher) < 0.95 * before
    assert list(student.state_dict()) == names
    assert not any(p.requires_grad or p.grad is not None for p in student.parameters())
    assert not student.training
    for name, p in teacher.named_parameters():
        assert torch.equal(p, theirs[name]) and p.requires_grad and p.grad is None
    assert not any(module._forward_hooks for module in [*student.modules(), *teacher.modules()])


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_family_can_be_distilled(family):
    teacher = fv.tiny(family)
    student = damaged(teacher)
    report = heal(student, teacher, "distill:tokens=1k,batch=4,length=32,lr=1e-3,data=samples", progress=False)
    assert report.curve[-1][1] < report.curve[0][1]


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2", "phi3"])
@pytest.mark.parametrize("spec", ["lora:rank=4,lr=3e-3", "minilm:lr=1e-3", "bias"])
def test_other_ways_in_other_families(family, spec):
    teacher = fv.tiny(family)
    student = damaged(teacher)
    spec = "bias:tokens=512,length=32,data=samples" if spec == "bias" else f"{spec},{QUICK}".replace("4k", "512")
    assert heal(student, teacher, spec, progress=False).tokens == 512


@pytest.mark.parametrize(
    "kind, keep",
    [
        ("layer", [torch.arange(i != 2) for i in range(4)]),
        ("hidden", [torch.arange(48)]),
        ("channel", [torch.arange(64 + 16 * i) for i in range(4)]),
        ("kv_head", [torch.arange(1 + i % 2) for i in range(4)]),
        ("mlp", [torch.arange(i != 1) for i in range(4)]),
        ("attention", [torch.arange(i != 3) for i in range(4)]),
    ],
)
def test_thinned_models_recover(kind, keep):
    teacher = fv.tiny("llama")
    student = thinned(teacher, kind, keep)
    before = divergence(student, teacher)
    heal(student, teacher, quick("distill:lr=3e-4"), progress=False)
    assert divergence(student, teacher) < before


def test_the_dtype_stays():
    teacher = fv.tiny("llama").to(torch.bfloat16)
    student = damaged(teacher)
    heal(student, teacher, quick("distill"), progress=False)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}


def test_nothing_to_heal_stays_as_it_is():
    """Where the student is the teacher the loss and its gradient are 0."""
    teacher = fv.tiny("llama")
    student = copy.deepcopy(teacher)
    report = heal(student, teacher, "distill:tokens=256,batch=4,length=32,data=samples", progress=False)
    assert abs(report.curve[0][1]) < 1e-5


def test_lora_changes_its_targets_only():
    teacher = fv.tiny("llama")
    student = damaged(teacher)
    before = weights(student)
    heal(student, teacher, quick("lora:rank=2,targets=q/down"), progress=False)
    changed = {name.split(".")[-2] for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"q_proj", "down_proj"}
    delta = (
        student.model.layers[0].self_attn.q_proj.weight - before["model.layers.0.self_attn.q_proj.weight"]
    ).detach()
    assert torch.linalg.matrix_rank(delta.double(), rtol=1e-4) <= 2


def test_a_time_budget_ends_it_and_the_schedule_knows():
    teacher = fv.tiny("llama")
    report = heal(
        damaged(teacher),
        teacher,
        "distill:tokens=1B,samples=1k,seconds=1,batch=4,length=32,data=samples",
        progress=False,
    )
    assert 128 <= report.tokens < 10**6
    assert 0.9 < report.seconds < 10


def test_progress_is_told_and_ends_at_one():
    teacher, told = fv.tiny("llama"), []
    heal(damaged(teacher), teacher, quick("distill"), progress=told.append)
    assert told[-1] == 1.0 and all(0 <= t <= 1 for t in told)


def test_text_is_read_again_and_that_is_said(tmp_path, capsys):
    text = tmp_path / "mine.txt"
    text.write_text("The quick brown fox. " * 20)
    teacher = fv.tiny("llama")
    heal(damaged(teacher), teacher, f"distill:tokens=2k,batch=4,length=32,data={text}", tokenizer=fv.tiny_tokenizer())
    assert "416 tokens of 2,000: they are read 4.8 times" in " ".join(capsys.readouterr().err.split())


def test_all_ways_are_in_the_catalog():
    from foveate.catalog import catalog

    entries = {entry.name: entry for entry in catalog("heal")}
    assert set(entries) == {"none", "bias", "lora", "distill", "minilm"} == set(HEALS.all())
    assert all(issubclass(cls, Heal) for cls in HEALS.all().values())
    assert entries["minilm"].kind == "heal"


def test_specs_round_trip():
    for text in ("none", "distill:tokens=2M,hidden=0.5", "lora:targets=q/v", "minilm:seconds=60.0"):
        spec = HEALS.parse(text)
        assert HEALS.parse(spec.to_text()) == spec
    assert HEALS.parse("distill:tokens=2M") == HEALS.parse("distill")


@pytest.mark.parametrize(
    "spec, words",
    [
        ("destill", "did you mean distill"),
        ("distill:tokens=lots", "is no number of tokens"),
        ("distill:schedule=step", "no schedule 'step'"),
        ("distill:logits=0,hidden=0", "nothing to learn"),
        ("distill:temperature=0", "temperature must be above 0"),
        ("distill:length=4096", "1024 positions"),
        ("distill:batch=4,pieces=3", "can't be shared"),
        ("distill:data=missing.txt", "there is no text missing.txt"),
        ("lora:targets=w", "no linear maps called 'w'"),
        ("lora:targets=qkv", "no such linear maps"),
        ("minilm:values=0,attention=0", "nor both 0"),
        ("distill:lr=1e9,tokens=20k,batch=4,length=32,data=samples,warmup=0", "no longer a number"),
    ],
)
def test_errors_are_sentences(spec, words):
    teacher = fv.tiny("llama", num_hidden_layers=1)
    with pytest.raises(FoveateError, match=words):
        heal(damaged(teacher), teacher, spec, tokenizer=fv.tiny_tokenizer(), progress=False)


def test_short_text_and_models_that_do_not_go_together(tmp_path):
    teacher = fv.tiny("llama")
    text = tmp_path / "short.txt"
    text.write_text("Too short.")
    with pytest.raises(FoveateError, match="10 tokens, and one sequence is to have 512"):
        heal(damaged(teacher), teacher, f"distill:data={text}", tokenizer=fv.tiny_tokenizer(), progress=False)
    with pytest.raises(FoveateError, match="one and the same model"):
        heal(teacher, teacher, "none")
    with pytest.raises(FoveateError, match="knows 300 tokens and the teacher 260"):
        heal(fv.tiny("llama", vocab_size=300), teacher, "none")
    with pytest.raises(FoveateError, match="student's has 2 query heads"):
        student = thinned(teacher, "kv_head", [torch.arange(1)] * 4)
        heal(student, teacher, quick("minilm"), progress=False)
    with pytest.raises(FoveateError, match="has 3 layers"):
        student = thinned(teacher, "layer", [torch.arange(i != 2) for i in range(4)])
        heal(student, teacher, "bias:data=samples", progress=False)


def test_quantised_layers_are_refused():
    teacher = fv.tiny("llama")
    student = copy.deepcopy(teacher)
    for layer in student.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(module.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(FoveateError, match="they are quantised"):
        heal(student, teacher, quick("distill"), progress=False)


def test_bias_refuses_looped_maps_in_a_sentence():
    student = fv.thin(fv.tiny("llama"), "recursive:rank=4", calibration=torch.arange(3, 67).unsqueeze(0))
    with pytest.raises(FoveateError, match="heal with distill or lora"):
        heal(student, fv.tiny("llama"), "bias:tokens=1k,length=64,data=samples", progress=False)
