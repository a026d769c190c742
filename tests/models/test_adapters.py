"""What other libraries add to the layers of a map acts on its equilibrium and gets gradients."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from transformers import PreTrainedModel

from deqzoo import UserError
from deqzoo.models.auto import load_class
from deqzoo.models.weights import WeightNorm
from deqzoo.training.norms import freeze_batch_norm

from .test_common import TINY, inputs

peft = pytest.importorskip("peft")

#: A few steps, so that rounding is not amplified where random weights make no contraction.
SOLVER = {"name": "fixed_point", "tol": 0.0, "max_steps": 4}
CLASSES = {
    "mdeq": "MDEQForImageClassification",
    "deq_transformer": "DEQTransformerForCausalLM",
    "ignn": "IGNNForGraphClassification",
}
#: Every layer of the map, and for the others what "all-linear" finds.
TARGETS = {
    "mdeq": r"mdeq\.transformation\..*conv[12]?",
    "deq_transformer": "all-linear",
    "ignn": "all-linear",
}
CHANGES = {
    "mdeq": [{"weight_norm": "all"}, {"weight_norm": "none"}],
    "deq_transformer": [{}, {"weight_norm": False, "cutoffs": [], "div_val": 1}],
    "ignn": [{"skip_connections": True}],
}
CASES = [(family, change) for family, changes in CHANGES.items() for change in changes]


def build(family: str, change: dict) -> PreTrainedModel:
    torch.manual_seed(0)
    name = CLASSES[family]
    prefix = next(p for p in TINY if name.startswith(p))
    config = load_class(f"{prefix}Config")(**{**TINY[prefix], "solver": SOLVER, **change})
    model = load_class(name)(config).eval()
    with torch.no_grad():  # every part matters, and the equilibrium is found
        for module in model.modules():
            if isinstance(module, WeightNorm):
                module.weight.data = 2 * module.weight
            elif isinstance(module, nn.Embedding):
                module.weight.normal_()
            elif isinstance(module, (nn.Linear, nn.Conv2d)):
                module.weight.normal_(std=0.1)
    return model


def logits(model: nn.Module, base: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(**inputs(base)).logits


def adapted(model: PreTrainedModel, family: str, **options: object) -> nn.Module:
    """The model with random, no longer neutral adapters."""
    config = peft.LoraConfig(target_modules=TARGETS[family], r=3, lora_alpha=3, **options)
    wrapped = peft.get_peft_model(model, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return wrapped


@pytest.mark.parametrize("family", ["mdeq", "deq_transformer"])
def test_what_is_written_to_a_normalised_weight_arrives(family: str, tmp_path: Path) -> None:
    """In place, through `data`, and as a parameter of its own, which is saved, too."""
    model = build(family, CHANGES[family][0])
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, WeightNorm))
    with torch.no_grad():
        expected = 0.5 * layer.weight
        layer.weight.mul_(0.5)
        torch.testing.assert_close(layer.effective_weight(), expected)
        layer.weight.data.mul_(2)
        torch.testing.assert_close(layer.effective_weight(), 2 * expected)
        layer.weight[0] = 0
        assert not layer.effective_weight()[0].any() and layer.effective_weight()[1].any()
        nn.init.ones_(layer.weight)
        assert (layer.effective_weight() - 1).abs().max() < 1e-6
        nn.init.constant_(layer.weight, 1.0)
        nn.init.normal_(layer.weight, mean=5.0, std=0.1)  # nn.init names its argument
        assert (layer.effective_weight() - 5).abs().max() < 1
        layer.weight.copy_(torch.ones_like(expected))
        layer.weight.data += 0.5
        torch.testing.assert_close(layer.effective_weight(), torch.full_like(expected, 1.5))
    temporary = layer.weight  # of a graph: nothing of it is taken over
    temporary.mul_(0.5)
    temporary.sum().backward()
    expected[-1] = 0  # as structured pruning leaves it
    layer.weight = nn.Parameter(expected.clone())
    before = logits(model, model)
    model.save_pretrained(tmp_path, True, model.state_dict())
    loaded = type(model).from_pretrained(tmp_path)
    assert isinstance(loaded.get_submodule(name), WeightNorm)
    torch.testing.assert_close(logits(loaded, loaded), before)


def test_saved_adapters_of_pictures_need_fixed_batch_statistics(tmp_path: Path) -> None:
    """PEFT saves no batch statistics: an adapter fits those of the model that it is put on."""
    base = build("mdeq", {})
    assert freeze_batch_norm(base)
    tuned = adapted(base, "mdeq")
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    tuned.train()
    for _ in range(2):
        data = inputs(base)
        labels = torch.zeros(len(data["pixel_values"]), dtype=torch.int64)
        tuned(**data, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build("mdeq", {}), tmp_path).eval()
    torch.testing.assert_close(logits(again, base), logits(tuned, base))


@pytest.mark.parametrize(("family", "change"), CASES)
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_act_learn_and_merge(family: str, change: dict, dora: bool) -> None:
    model = build(family, change)
    before = logits(model, model)
    wrapped = adapted(model, family, use_dora=dora)
    acting = logits(wrapped, model)
    assert (acting - before).abs().max() > 1e-3
    labels = inputs(model).get("input_ids", torch.tensor([0, 1]))
    wrapped(**inputs(model), labels=labels, gradient="upg").loss.backward()
    dead = [
        name
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad and not parameter.grad.any()
    ]
    assert not dead
    merged = wrapped.merge_and_unload()
    assert type(merged) is type(model)
    torch.testing.assert_close(logits(merged, model), acting, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["IA3Config", "LoHaConfig"])
def test_other_kinds_of_adapters_leave_their_effect_behind(kind: str) -> None:
    """They put the layer's weight back, computed or not, when they go."""
    model = build("deq_transformer", {})
    options = {"feedforward_modules": []} if kind == "IA3Config" else {"r": 3}
    neutral = {f"init_{'ia3_' if kind == 'IA3Config' else ''}weights": False}
    config = getattr(peft, kind)(target_modules="all-linear", **neutral, **options)
    wrapped = peft.get_peft_model(model, config).eval()
    acting = logits(wrapped, model)
    with wrapped.disable_adapter():
        assert (acting - logits(wrapped, model)).abs().max() > 1e-3
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(merged, model), acting, rtol=1e-3, atol=1e-4)


def test_adapters_reach_every_layer_of_the_block() -> None:
    wrapped = adapted(build("deq_transformer", {}), "deq_transformer")
    names = " ".join(name for name, _ in wrapped.named_parameters() if "lora_A" in name)
    for part in ("injection", "qkv", "relative", "output", "up", "down"):
        assert f"{part}.lora_A" in names


def test_merged_models_are_saved_and_loaded(tmp_path: Path) -> None:
    model = build("mdeq", {"weight_norm": "all"})
    merged = adapted(model, "mdeq").merge_and_unload()
    expected = logits(merged, model)
    merged.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, model), expected)


def calls_of(model: PreTrainedModel, module: nn.Module, steps: int) -> int:
    calls: list[int] = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    solver = {"name": "anderson", "tol": 0.0, "max_steps": steps}
    model(**inputs(model), solver=solver)
    handle.remove()
    return len(calls)


@pytest.mark.parametrize("family", ["mdeq", "deq_transformer"])
def test_adapted_weights_are_computed_once_per_solve(family: str) -> None:
    model = build(family, {})
    block = model.base_model
    layer = (
        block.transformation.branches[0][0].conv1
        if family == "mdeq"
        else block.layers[0].attention.qkv
    )
    assert calls_of(model, layer, 3) == calls_of(model, layer, 12) <= 2
    model.train()
    assert calls_of(model, layer, 12) == 1


@pytest.mark.parametrize(("family", "change"), CASES)
def test_hooks_act_like_the_weights_they_stand_for(family: str, change: dict) -> None:
    model = build(family, change)
    halved = copy.deepcopy(model)
    for one in (model, halved):
        for module in one.modules():
            if not isinstance(module, (nn.Linear, nn.Conv2d)) or module.bias is not None:
                continue
            if one is model:
                module.register_forward_hook(lambda _, __, output: output / 2)
            elif isinstance(module, WeightNorm):
                getattr(module, module.length_name).data.div_(2)
            else:
                module.weight.data.div_(2)
    torch.testing.assert_close(logits(model, model), logits(halved, model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mdeq", "deq_transformer"])
def test_hooks_that_are_not_linear_are_refused(family: str) -> None:
    for hook in (lambda *a: a[-1].relu(), lambda *a: a[-1] + 1):
        model = build(family, {})
        layer = next(m for m in model.modules() if isinstance(m, WeightNorm) and m.bias is None)
        layer.register_forward_hook(hook)
        with pytest.raises(UserError, match="linear"):
            logits(model, model)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize(("family", "change"), CASES[:4])
def test_folding_keeps_the_outputs_and_serves_tools_that_want_a_weight(
    family: str, change: dict, tmp_path: Path
) -> None:
    model = build(family, change)
    expected = logits(model, model)
    for module in model.modules():
        if isinstance(module, WeightNorm):
            with pytest.raises(UserError, match="call fold_weight_norm"):
                prune.l1_unstructured(module, "weight", amount=0.5)
    model.fold_weight_norm()
    assert not any(isinstance(module, WeightNorm) for module in model.modules())
    torch.testing.assert_close(logits(model, model), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, model), logits(model, model))
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        and ("transformation" in name or "layers" in name)
    ]
    for layer in layers:
        prune.l1_unstructured(layer, "weight", amount=0.5)
    pruned = logits(model, model)
    model(**inputs(model), labels=labels_of(model), gradient="npg").loss.backward()
    assert all(layer.weight_orig.grad.any() for layer in layers)
    for layer in layers:
        prune.remove(layer, "weight")
    torch.testing.assert_close(logits(model, model), pruned, rtol=1e-4, atol=1e-5)
    assert (pruned - expected).abs().max() > 1e-3
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", Doubled())
    doubled = logits(model, model)
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(logits(model, model), doubled)


def labels_of(model: PreTrainedModel) -> Tensor:
    return inputs(model).get("input_ids", torch.tensor([0, 1]))


@pytest.mark.parametrize(("family", "change"), CASES)
def test_dynamic_quantisation(family: str, change: dict) -> None:
    model = build(family, change)
    if family != "ignn":
        model.fold_weight_norm()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    expected, found = logits(model, model), logits(quantised, model)
    difference = (found - expected).norm() / expected.norm()
    assert 0 < difference < 0.1


@pytest.mark.parametrize("folded", [False, True])
def test_torchao(folded: bool) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = build("deq_transformer", {})
    expected = logits(model, model)
    if folded:
        model.fold_weight_norm()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    difference = (logits(model, model) - expected).norm() / expected.norm()
    assert 0 < difference < 0.1


@pytest.mark.parametrize("family", ["mdeq", "deq_transformer"])
def test_offloading_to_the_cpu(family: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = build(family, CHANGES[family][0])
    expected = logits(model, model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(logits(model, model), expected)
