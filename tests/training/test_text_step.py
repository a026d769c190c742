"""The training step of language models: what it computes, and that it never waits for a device."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

from deqzoo.equilibrium.fixed import fixed_steps
from deqzoo.models.deq_transformer import DEQTransformerConfig, DEQTransformerForCausalLM, block
from deqzoo.models.deq_transformer.layers import DropoutMasks, LayerMasks
from deqzoo.recipe import Data, Jacobian, Model, Optimizer, Recipe, Stage
from deqzoo.tasks.text import LanguageModelingTask, ResidentText
from deqzoo.training.optimizers import build_optimizer
from deqzoo.training.step import TrainingStep

PICARD = {"name": "fixed_point", "max_steps": 4, "tol": 0.0}
ANDERSON = {"name": "anderson", "max_steps": 4, "tol": 0.0}
UPG = {"name": "upg", "steps": 2, "damping": 0.5}
GRADIENTS = (UPG, {"name": "npg", "steps": 3, "damping": 0.9}, {"name": "jfb"})
SIZES = {
    "d_model": 32, "d_embed": 32, "n_head": 4, "d_inner": 48, "mem_len": 8, "local_size": 9,
    "tgt_len": 6, "initializer_range": 0.2,
}  # fmt: skip
DROPS = {"dropout": 0.2, "input_dropout": 0.5, "dropatt": 0.1, "dropword": 0.2}


def make_model(**changes: object) -> DEQTransformerForCausalLM:
    torch.manual_seed(0)
    config = DEQTransformerConfig(**{"vocab_size": 60, **SIZES, **changes})
    return DEQTransformerForCausalLM(config).train()


def random_words(*shape: int) -> torch.Tensor:
    return torch.randint(0, 60, shape, generator=torch.Generator().manual_seed(1))


def make_step(stage: Stage, penalised: bool = False, **settings: object) -> TrainingStep:
    recipe = Recipe(
        name="text",
        task="language-modeling",
        data=Data("ptb"),
        model=Model("deq_transformer", "deq-transformer-ptb-large", {**SIZES, **settings}),
        optimizer=Optimizer("muon", 0.01, clip=1.0),
        stages=(stage,),
        batch_size=4,
        augment={"forget": 0.1},
        average=0.9,
    )
    task = LanguageModelingTask(recipe, None, stand_in=True)
    torch.manual_seed(0)
    model = task.model().to("meta").train()
    model.tie_weights()  # which moving to meta tensors has undone
    average = copy.deepcopy(model)
    model.use_training_kernels(False, torch.bfloat16)
    data = task.resident(torch.device("meta"))
    optimizer = build_optimizer(model, recipe.optimizer, capturable=True)
    step = TrainingStep(task, recipe, stage, data, model, average, optimizer, True, penalised)
    step.rows = data.epoch(0, stage)[0]
    return step


@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS, ids=str)
@pytest.mark.parametrize("solver", [PICARD, ANDERSON], ids=str)
def test_a_step_never_waits_for_the_device(never_waits, solver, gradient, penalised: bool) -> None:
    step = make_step(Stage(1, solver, gradient, 7, Jacobian(0.3, 4, difference=0.1)), penalised)
    with never_waits():
        step.run()


@pytest.mark.parametrize("change", [{"cutoffs": [2000]}, {"cutoffs": [2000, 4000], "div_val": 2}])
def test_an_adaptive_softmax_never_waits_either(never_waits, change: dict) -> None:
    step = make_step(Stage(1, PICARD, UPG), **change)
    with never_waits():
        step.run()


@pytest.mark.parametrize("cutoffs", [[], [20], [20, 40]])
def test_muon_takes_all_matrices_of_the_block(cutoffs: list[int]) -> None:
    model = make_model(cutoffs=cutoffs)
    groups = build_optimizer(model, Optimizer("muon", 0.01)).param_groups
    names = {p: name for name, p in model.named_parameters()}
    taken = [{names[p] for p in group["params"]} for group in groups]
    block = "transformer.layers.0."
    parts = ("attention.qkv", "attention.relative", "attention.output", "feed_forward.up",
             "feed_forward.down")  # fmt: skip
    assert taken[0] == {"transformer.injection.weight"} | {f"{block}{p}.direction" for p in parts}
    assert "transformer.embedding.tables.0.weight" in taken[1]


@pytest.mark.parametrize("n_past", [0, 3, 8])
@pytest.mark.parametrize("gradient", GRADIENTS, ids=str)
@pytest.mark.parametrize("solver", [PICARD, ANDERSON], ids=str)
@pytest.mark.parametrize("kind", ["post", "pre"])
def test_step_is_that_of_a_growing_memory(kind: str, solver, gradient, n_past: int) -> None:
    """A memory of fixed length, partly filled, solved without books: state, loss and gradient."""
    model = make_model(norm_placement=kind, cutoffs=[20]).double()
    words = random_words(3, 14 + 1)
    memory = None
    if n_past:
        with torch.no_grad():
            memory = model(words[:, : 8 + 6], solver=PICARD).memory
        memory = tuple(t[:, -n_past:] for t in memory)
    inputs, labels = words[:, 8:-1], words[:, 9:]
    whole = torch.rand(3, 4, 6, 14, dtype=torch.float64) * 2
    drop = {"input": torch.rand(3, 1, 32).double(), "hidden": torch.rand(3, 1, 32).double()}
    options = {"labels": labels, "shift": False, "solver": solver, "gradient": gradient}

    def masks(n_keys: int) -> DropoutMasks:
        layer = LayerMasks(attention=whole[..., -n_keys:], up=torch.ones(3, 1, 48).double() / 2)
        return DropoutMasks(layers=(layer,), **drop)

    expected = model(inputs, memory=memory, dropout_masks=masks(6 + n_past), **options)
    theirs = torch.autograd.grad(expected.loss, list(model.parameters()))
    size = (3, 8)
    memory = memory or (torch.zeros(3, 0, 32), torch.zeros(3, 0, 96))
    padded = tuple(F.pad(part.double(), (0, 0, 8 - n_past, 0), value=7.0) for part in memory)
    held = (torch.arange(8) >= 8 - n_past).expand(size)
    model.use_fixed_steps()
    output = model(
        inputs, memory=padded, memory_mask=held, dropout_masks=masks(14), return_logits=False,
        **options,
    )  # fmt: skip
    mine = torch.autograd.grad(output.loss, list(model.parameters()))
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-7, atol=0)
    total = torch.cat([g.flatten() for g in theirs])
    error = torch.cat([(a - b).flatten() for a, b in zip(mine, theirs, strict=True)])
    assert error.norm() < 1e-7 * total.norm()
    for new, old in zip(output.memory, expected.memory, strict=True):
        n = min(8, n_past + 6)
        torch.testing.assert_close(new[:, -n:], old[:, -n:], rtol=1e-7, atol=1e-9)


def test_a_mask_that_is_not_the_memorys() -> None:
    model, words = make_model(), random_words(2, 5)
    for memory, match in ((None, "memory is missing"), (model(words).memory, r"holds \(2, 5\)")):
        with pytest.raises(Exception, match=match):
            model(words, memory=memory, memory_mask=torch.ones(2, 4, dtype=torch.bool))


def make_resident(forget: float = 0.0, n: int = 103, seed: int = 0) -> ResidentText:
    config = DEQTransformerConfig(**{"vocab_size": 120, **SIZES})
    return ResidentText(torch.arange(n), 4, config, lambda _: 6, forget, seed)


def test_segments_follow_the_text_and_are_reproducible() -> None:
    data, stage = make_resident(0.3), Stage(1)
    plan = data.epoch(3, stage)
    assert plan.shape == (4, 4, 3)  # 25 words a stream
    assert torch.equal(plan, make_resident(0.3).epoch(3, stage))
    for other in (make_resident(0.3).epoch(4, stage), make_resident(0.3, seed=1).epoch(3, stage)):
        assert not torch.equal(plan, other)
    assert (plan[0, :, 2] == 0).all() and 0 < plan[1:, :, 2].float().mean() < 1
    read = [data.inputs(rows, torch.zeros(()), stage) for rows in plan]
    for inputs in read:
        assert torch.equal(inputs["labels"], (inputs["input_ids"] + 1) % 103)
    for before, after in itertools.pairwise(read):
        assert torch.equal(after["input_ids"][:, 0], before["labels"][:, -1])
    first = read[0]["input_ids"][:, 0]
    assert torch.equal((first[1:] - first[:-1]) % 103, torch.full((3,), 25))


def test_memory_fills_up_and_is_forgotten_by_stream() -> None:
    model, data, stage = make_model(vocab_size=103), make_resident(), Stage(1)
    rows = data.epoch(0, stage)[:4].clone()
    rows[2, 1, 2] = 0
    held = []
    for step in rows:
        inputs = data.inputs(step, torch.zeros(()), stage)
        held.append(inputs["memory_mask"].sum(1).tolist())
        assert inputs["memory_mask"].flip(1).int().diff(dim=1).amax() <= 0  # the last ones
        outputs = model(**inputs, solver=PICARD, gradient=UPG)
        data.keep(outputs)
    assert held == [[0] * 4, [6] * 4, [8, 0, 8, 8], [8, 6, 8, 8]]
    assert torch.equal(data.states[0], outputs.memory[0][0])
    # Half of the streams, as where a batch is accumulated: the others keep theirs.
    kept = [t.clone() for t in data.tensors()]
    data.keep(model(**data.inputs(rows[3][:2], torch.zeros(()), stage), solver=PICARD))
    for new, old in zip(data.tensors(), kept, strict=True):
        assert torch.equal(new[2:], old[2:])
        assert new.dtype == torch.int64 or not torch.equal(new[:2], old[:2])


def test_a_model_without_memory() -> None:
    model = make_model(vocab_size=103, mem_len=0)
    data = ResidentText(torch.arange(103), 4, model.config, lambda _: 6)
    inputs = data.inputs(data.epoch(0, Stage(1))[0], torch.zeros(()), Stage(1))
    assert "memory" not in inputs
    data.keep(model(**inputs, solver=PICARD))


def test_a_traced_map_gives_the_plain_ones_gradient(monkeypatch) -> None:
    torch._dynamo.reset()
    traced = torch.compile(block.apply_layers, backend="aot_eager", fullgraph=True, dynamic=False)
    monkeypatch.setattr(block, "_compiled_layers", lambda: traced)
    model, words = make_model(**DROPS), random_words(3, 7)
    found = []
    for compiled in (False, True):
        model.use_training_kernels(compiled)
        torch.manual_seed(1)
        loss = model(words, labels=words, solver=PICARD, gradient=UPG, return_logits=False).loss
        grads = torch.autograd.grad(loss, list(model.parameters()))
        found.append((loss.detach(), torch.cat([g.flatten() for g in grads])))
    (plain, a), (mine, b) = found
    torch.testing.assert_close(mine, plain, rtol=1e-5, atol=0)
    assert (a - b).norm() < 1e-4 * a.norm()


@pytest.mark.parametrize("window", [1, 3])
def test_a_whole_solve_is_one_graph(window: int) -> None:
    model, words = make_model(**DROPS), random_words(3, 7)
    f, start = model.equilibrium_map(words)

    def solve(z):
        return fixed_steps(
            lambda h: block.apply_layers(h, f.injection, f.layers, f.bias, f.kind), z, 4,
            window=window,
        )  # fmt: skip

    torch._dynamo.reset()
    with torch.no_grad():
        traced = torch.compile(solve, backend="eager", fullgraph=True, dynamic=False)(start)
        torch.testing.assert_close(traced, solve(start))


def test_one_precision_is_close_to_float32() -> None:
    model, words = make_model(), random_words(3, 7)
    f, start = model.equilibrium_map(words)
    narrow = f.in_precision(torch.bfloat16)
    z = F.layer_norm(torch.randn(start.shape), start.shape[-1:])
    with torch.no_grad():
        mine, theirs = narrow(z), f(z)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(narrow(z), mine, rtol=0, atol=0)  # says nothing to it
    assert mine.dtype == torch.float32
    assert 1e-6 < (mine - theirs).norm() / theirs.norm() < 0.02
    penalties = []
    for enabled in (False, True):
        model.use_training_kernels(dtype=torch.bfloat16 if enabled else None)
        options = {"solver": PICARD, "gradient": UPG, "output_state": True}
        output = model(words, labels=words, return_logits=False, **options)
        penalties.append(output.loss.detach())
    torch.testing.assert_close(penalties[1], penalties[0], rtol=0.01, atol=0)
