"""Parity with the official implementations, number by number, in float64."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deqzoo.models.deq_transformer.block import EquilibriumMap, attention_output
from deqzoo.models.deq_transformer.convert_deq_transformer import (
    build_model,
    config_from_settings,
    convert_state_dict,
    deinterleaved,
)
from deqzoo.models.deq_transformer.layers import DropoutMasks, LayerMasks, sinusoids

GOLDEN = Path(__file__).parents[1] / "golden" / "deq_transformer"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.json"))
SOLVED = [name for name in NAMES if not name.startswith("tdeq")]
TIGHT = {"name": "anderson", "tol": 1e-13, "max_steps": 300}
EXACT_GRADIENT = {
    "name": "implicit",
    "solver": {"name": "anderson", "tol": 1e-13, "max_steps": 300},
}


class Case:
    """A golden file, the model made from it, and access to one segment's tensors."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64) -> None:
        self.info = json.loads((GOLDEN / f"{name}.json").read_text())
        self.tensors = load_file(GOLDEN / f"{name}.safetensors")
        self.tolerance = self.info["tolerances"]
        self.config = config_from_settings(self.info["config"])
        prefix = "sd."
        self.official = {
            key.removeprefix(prefix): value.to(dtype)
            for key, value in self.tensors.items()
            if key.startswith(prefix)
        }
        self.model = build_model(self.official, self.config)
        self.n_segments = self.info["n_segments"]

    def segment(self, k: int) -> dict[str, torch.Tensor]:
        prefix = f"seg{k}."
        return {
            key.removeprefix(prefix): value
            for key, value in self.tensors.items()
            if key.startswith(prefix)
        }

    def injection(self, values: torch.Tensor) -> torch.Tensor:
        """Stored injections in this package's order of features."""
        if self.config.variant != "torchdeq-lm":
            return values
        rows = values.movedim(-1, 0)
        return deinterleaved(rows, self.config.n_head).movedim(0, -1)

    def memory(self, segment: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor] | None:
        if "mem_state_in" not in segment:
            return None
        return segment["mem_state_in"], self.injection(segment["mem_injection_in"])

    def bound_map(self, segment: dict[str, torch.Tensor]) -> EquilibriumMap:
        masks = DropoutMasks(layers=(LayerMasks(),) * self.config.n_sublayers)
        base = self.model.transformer
        return base.bind(
            base.inject(segment["input_ids"], masks), masks, None, self.memory(segment)
        )


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {name: Case(name) for name in NAMES}


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_single_applications(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    tolerance = case.tolerance["single_application_abs"]
    for k in range(case.n_segments):
        segment = case.segment(k)
        base, f = case.model.transformer, case.bound_map(segment)
        words = base.embedding(segment["input_ids"]) * base.embedding.scale
        close(words, segment["embedding"], tolerance)
        close(f.injection, case.injection(segment["injection"]), tolerance)
        n_keys, width = segment["pos_emb"].shape
        table = sinusoids(n_keys, width, dtype=torch.float64, device=torch.device("cpu"))
        close(table, segment["pos_emb"], tolerance)
        close(f(segment["state_random"]), segment["F_state_random"], tolerance)
        zero = torch.zeros_like(segment["state_random"])
        close(f(zero), segment["F_state_zero"], tolerance)
        twice = segment["unroll2_state" if "unroll2_state" in segment else "F2_state_zero"]
        close(f(f(zero)), twice, tolerance)
        if "attn_block_out_random" in segment:
            half = attention_output(
                segment["state_random"], f.injection, f.layers[0], f.bias, f.kind
            )
            close(half, segment["attn_block_out_random"], tolerance)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_losses_and_memory(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    solved = name in SOLVED
    state_tolerance = case.tolerance["equilibrium_abs" if solved else "state_out_abs"]
    memory = None
    for k in range(case.n_segments):
        segment = case.segment(k)
        output = case.model(
            segment["input_ids"],
            labels=segment["targets"],
            shift=False,
            memory=memory,
            output_state=True,
            solver=TIGHT if solved else None,
        )
        expected = segment["equilibrium" if solved else "state_out"]
        close(output.state, expected, state_tolerance)
        close(output.nll, segment["nll"], case.tolerance["nll_abs"])
        close(output.loss, segment["nll"].mean(), case.tolerance["nll_abs"])
        from_logits = torch.nn.functional.cross_entropy(
            output.logits.flatten(0, 1), segment["targets"].flatten(), reduction="none"
        )
        close(from_logits.view_as(segment["nll"]), segment["nll"], case.tolerance["nll_abs"])
        memory = output.memory
        close(memory[0], segment["mem_state_out"], state_tolerance)
        close(memory[1], case.injection(segment["mem_injection_out"]), state_tolerance)


@pytest.mark.parametrize("name", ["tdeq_lm", "tdeq_seq_pre"])
@torch.no_grad()
def test_iterates_of_models_without_equilibrium(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    segment = case.segment(0)
    output = case.model.transformer(segment["input_ids"], solver={"max_steps": 5})
    close(output.last_hidden_state, segment["iterate5"], case.tolerance["state_out_abs"])
    assert output.n_steps.tolist() == [5] * case.info["batch"]


@pytest.mark.parametrize("name", [n for n in SOLVED if "dropout" not in n])
@torch.no_grad()
def test_shallow_losses(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    segment = case.segment(0)
    output = case.model(segment["input_ids"], labels=segment["targets"], shift=False, shallow=True)
    close(output.nll, segment["unroll2_nll"], case.tolerance["nll_abs"])


@pytest.mark.parametrize("name", ["post_memory_window", "pre_memory_adaptive"])
@torch.no_grad()
def test_full_context(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    ids = torch.cat([case.segment(k)["input_ids"] for k in range(case.n_segments)], dim=1)
    output = case.model.transformer(ids, solver=TIGHT)
    close(
        output.last_hidden_state,
        case.tensors["full.equilibrium"],
        case.tolerance["equilibrium_abs"],
    )


@pytest.mark.parametrize("name", ["post_plain", "pre_plain", "post_adaptive"])
def test_implicit_gradients(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    segment = case.segment(0)
    case.model.zero_grad()
    output = case.model(
        segment["input_ids"],
        labels=segment["targets"],
        shift=False,
        solver=TIGHT,
        gradient=EXACT_GRADIENT,
    )
    output.loss.backward()
    expected = {k.removeprefix("grad."): v for k, v in case.tensors.items() if "grad." in k}
    assert expected
    expected = convert_state_dict(expected, case.config)
    tied = case.model.all_tied_weights_keys
    for target, source in tied.items():
        # Upstream keeps two parameters for a tied projection, here it is one.
        if target in expected and source in expected:
            expected[source] = expected[source] + expected.pop(target)
    parameters = dict(case.model.named_parameters(remove_duplicate=False))
    assert set(expected) >= {name for name, _ in case.model.named_parameters()}
    for key, gradient in expected.items():
        error = (parameters[key].grad - gradient).norm() / gradient.norm()
        assert error < case.tolerance["grad_rel"], key


@pytest.mark.parametrize("name", ["post_plain", "pre_plain", "post_adaptive"])
def test_jacobian_penalty(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    segment = case.segment(0)
    f = case.bound_map(segment)
    state = segment["equilibrium"].requires_grad_()
    (product,) = torch.autograd.grad(f(state), state, case.tensors["jac.probe"])
    close(product, case.tensors["jac.vjp"], 1e-8)
    loss = case.model.jacobian_loss(f, state, probes=[case.tensors["jac.probe"]])
    close(loss.reshape(1), case.tensors["jac.loss"], 1e-8)


@pytest.mark.parametrize("name", ["post_dropout", "pre_dropout_window"])
@torch.no_grad()
def test_dropout_masks(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    segment, drop = case.segment(0), {k: v for k, v in case.tensors.items() if "drop." in k}
    layer = LayerMasks(
        attention=drop["drop.mask_attn_prob"],
        output=drop["drop.mask_attn_out"],
        up=drop["drop.mask_ff1"],
        down=drop["drop.mask_ff2"],
    )
    masks = DropoutMasks(
        input=drop["drop.mask_input"],
        positions=drop["drop.mask_pos"],
        hidden=drop["drop.mask_output"],
        layers=(layer,),
    )
    base = case.model.transformer
    tolerance = case.tolerance["single_application_abs"]
    close(segment["embedding"] * masks.input, drop["drop.embedding"], tolerance)
    # The recorded block application has the undropped injection of the evaluation pass.
    f = base.bind(segment["injection"], masks)
    close(f(segment["state_random"]), drop["drop.F_state_random"], tolerance)
    dropped = case.model._output_dropout(segment["equilibrium"], masks)
    close(dropped, drop["drop.equilibrium_after_output_drop"], tolerance)


@pytest.mark.parametrize("name", ["post_adaptive", "pre_memory_adaptive", "tdeq_lm"])
@torch.no_grad()
def test_float32_model(name: str) -> None:
    case = Case(name, dtype=torch.float32)
    segment = case.segment(0)
    solver = {"tol": 1e-7, "max_steps": 100} if name in SOLVED else None
    output = case.model(segment["input_ids"], labels=segment["targets"], shift=False, solver=solver)
    assert output.nll.dtype == torch.float32
    close(output.nll.double(), segment["nll"], case.tolerance["float32_model_abs"])
