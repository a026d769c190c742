"""Gradient modes held against the exact gradient: engine, theorem, command."""

from __future__ import annotations

import json
import time
from xml.etree import ElementTree

import pytest
import torch
from scripts import load_script

from deqzoo import cli
from deqzoo.equilibrium.diagnostics import compare_gradients, gradients_by_name
from deqzoo.errors import UserError
from deqzoo.evaluation.chart import line_chart
from deqzoo.fidelity import study as engine
from deqzoo.fidelity.adjoints import RecordedModel, neumann_rule, seeded
from deqzoo.fidelity.batches import make_batch, part
from deqzoo.fidelity.study import EQUILIBRIUM, plan, study
from deqzoo.models.auto import load_class

theorem = load_script("benchmarks/studies/theorem.py")
dot_chart = load_script("benchmarks/studies/dots.py").dot_chart


def graph_model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = load_class("IGNNConfig")(num_features=3, hidden_sizes=[6], num_labels=2)
    return load_class("IGNNForGraphClassification")(config).eval()


def picture_model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = load_class("MDEQConfig")(
        channels=[8, 8], head_channels=[2, 4], final_channels=16, num_groups=4, image_size=8,
        num_labels=3, expansion=1, stem_downsamples=0, solver={"max_steps": 100, "tol": 1e-6},
    )  # fmt: skip
    return load_class("MDEQForImageClassification")(config).eval()


@pytest.mark.parametrize("make", [graph_model, picture_model])
@pytest.mark.parametrize("damping", [1.0, 0.4])
def test_series_from_powers_is_the_npg_gradient(make, damping) -> None:
    model = make()
    batch, _ = make_batch(model, size=2)
    recorded = RecordedModel(model, batch)
    shared = recorded.gradients(neumann_rule(4, damping))
    other = recorded.gradients(neumann_rule(5, damping))
    with seeded():
        settings = {"name": "npg", "steps": 4, "damping": damping}
        loss = model(**batch, gradient=settings).loss
        found = torch.autograd.grad(loss, list(recorded.parameters.values()), allow_unused=True)
    direct = gradients_by_name(recorded.parameters, found)
    _, error, _ = compare_gradients(direct, shared, lambda name: ("all",))
    assert error["all"] < 1e-4
    _, error, _ = compare_gradients(direct, other, lambda name: ("all",))
    assert error["all"] > 1e-4
    assert "solve" not in vars(model)


def test_more_terms_come_nearer_and_the_head_does_not_count() -> None:
    model = graph_model()
    batch, _ = make_batch(model, size=4)
    found = study(model, batch, steps=(1, 3, 10), dampings=(0.5, 1.0), seconds=1e6)
    assert found.missing == 0
    npg = {
        (r.gradient["steps"], r.gradient["damping"]): r
        for r in found.rows
        if r.gradient["name"] == "npg"
    }
    errors = [npg[k, 1.0].relative_error[EQUILIBRIUM] for k in (1, 3, 10)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.1
    assert npg[1, 0.5].cosine["classifier"] == pytest.approx(1)
    assert npg[1, 0.5].agreement < 0.999
    exact = [r for r in found.rows if r.gradient["name"] == "implicit"]
    assert min(r.relative_error[EQUILIBRIUM] for r in exact) < 0.02
    upg = {
        r.gradient["steps"]: r
        for r in found.rows
        if r.gradient["name"] == "upg" and r.gradient["damping"] == 1
    }
    assert upg[10].saved_bytes > upg[3].saved_bytes > 0
    assert npg[10, 1.0].saved_bytes == npg[3, 1.0].saved_bytes
    best = found.recommendation(0.9)
    assert best is not None and best.agreement >= 0.9
    assert found.recommendation(1.1) is None


def test_text_batches_have_the_memory_of_the_words_before() -> None:
    torch.manual_seed(0)
    config = load_class("DEQTransformerConfig")(
        vocab_size=20, d_model=8, d_embed=8, n_head=2, d_inner=16, tgt_len=6, mem_len=5,
        local_size=6, cutoffs=[],
        # An untrained map need not contract: a few steps of it are the same on every machine.
        solver={"name": "fixed_point", "max_steps": 3, "tol": 0.0},
    )  # fmt: skip
    model = load_class("DEQTransformerForCausalLM")(config).eval()
    batch, described = make_batch(model, size=3)
    assert described == "3 segments of 6 random words after 5 others"
    assert batch["input_ids"].shape == (3, 6) and batch["memory"][0].shape == (3, 5, 8)
    with torch.no_grad():
        whole = model(**batch)
        alone = model(**part(batch, slice(1, 2)))
        blank = model(**{**batch, "memory": None})
    assert alone.loss.shape == () and whole.loss != blank.loss
    torch.testing.assert_close(alone.memory[0], whole.memory[0][1:2], rtol=1e-4, atol=1e-4)
    single = theorem.first_sample(batch, tokens=4)
    assert single["input_ids"].shape == (1, 4) and single["memory"][0].shape == (1, 5, 8)


def test_no_setting_is_tried_twice() -> None:
    settings = [{k: v for k, v in s.items() if k != "timed"} for s in plan((1, 2), (0.5, 1.0), 5)]
    assert len(settings) == len({str(s) for s in settings})
    assert sum(s["name"] == "upg" for s in settings) == 4


def test_theorem_holds_for_a_contraction_and_fails_for_an_expansion() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 4, requires_grad=True)
    shift = torch.randn(4, requires_grad=True)

    def f(scale: float):
        def step(z: torch.Tensor) -> torch.Tensor:
            return scale * z + 0 * (z @ weight) + 3 * shift

        return step

    state = torch.ones(1, 4)
    for scale, verdict in ((0.0, "holds"), (0.9, "holds"), (1.1, "fails")):
        (found,) = theorem.check(f(scale), state, [weight, shift], [(1, 1.0)])
        assert found.exact and found.verdict == verdict
        assert found.allowed == pytest.approx(1, abs=1e-3)
        assert found.distance == pytest.approx(scale, abs=1e-3)


def test_bounds_refute_what_the_matrices_refute(monkeypatch) -> None:
    model = picture_model()
    batch, _ = make_batch(model, size=1)
    recorded = RecordedModel(model, batch)
    state = recorded.solutions[0].state
    parameters = list(recorded.parameters.values())
    dense = theorem.check(recorded.maps[0], state, parameters, [(1, 1.0)])[0]
    monkeypatch.setattr(theorem, "_DENSE_ENTRIES", 0)
    bounded = theorem.check(recorded.maps[0], state, parameters, [(1, 1.0)])[0]
    assert dense.exact and not bounded.exact
    assert dense.verdict == bounded.verdict == "fails"
    assert bounded.distance <= dense.distance * 1.01
    assert bounded.allowed >= dense.allowed


def test_chart_escapes_and_skips_what_is_not_finite() -> None:
    svg = line_chart(
        {"a<b": [(1, 0.5), (2, float("nan")), (4, 0.9)]}, title="t", x_label="x", y_label="y"
    )
    assert "a&lt;b" in svg
    assert svg.count("<circle") == 2


def test_dot_chart() -> None:
    rows = {"first": {"A": [1.0, 3.0], "B<": [2.0]}, "second": {"A": [2.0]}}
    svg = dot_chart(rows, title="t", x_label="x")
    assert svg == dot_chart(rows, title="t", x_label="x")
    root = ElementTree.fromstring(svg)
    circles = [c for c in root.iter() if c.tag.endswith("circle")]
    assert len(circles) == 4 + 2  # values, and the groups of the legend
    first, second = ([c.get("cx") for c in circles if c.get("cy") == y] for y in ("59.0", "81.0"))
    assert first[2] == second[0] and float(first[0]) < float(first[2]) < float(first[1])
    assert "B&lt;" in svg
    assert "B&lt;" not in dot_chart({"first": {"B<": [2.0]}}, title="t", x_label="x")


def test_command_writes_table_plot_and_json(tmp_path, capsys) -> None:
    folder = tmp_path / "model"
    graph_model().save_pretrained(folder)
    command = ["gradients", str(folder), "--seconds", "20", "--batch-size", "2"]
    assert cli.run([*command, "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "Recommended:" in shown and "random graphs" in shown
    content = json.loads((tmp_path / "out" / "gradients.json").read_text())
    assert content["rows"] and content["recommendation"]
    assert (tmp_path / "out" / "gradients.svg").read_text().startswith("<svg")


def test_command_refuses_an_output_before_it_measures(tmp_path, capsys) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "out" / "gradients.svg").mkdir(parents=True)
    for output, message in (("file", "no folder that can be"), ("out", "svg is a folder")):
        command = ["gradients", str(tmp_path / "no-model"), "--output", str(tmp_path / output)]
        assert cli.run(command) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "gradients.json").exists()


def test_command_refuses_models_without_a_loss(tmp_path, capsys) -> None:
    config = load_class("IGNNConfig")(num_features=3, hidden_sizes=[6], num_labels=2)
    load_class("IGNNModel")(config).save_pretrained(tmp_path / "bare")
    assert cli.run(["gradients", str(tmp_path / "bare")]) == 2
    assert "no loss" in capsys.readouterr().err


def test_command_ends_in_time_and_prints_no_empty_table(tmp_path, capsys) -> None:
    folder = tmp_path / "model"
    torch.manual_seed(0)
    config = picture_model().config
    config.channels, config.image_size, config.final_channels = [32, 32], 32, 32
    load_class("MDEQForImageClassification")(config).save_pretrained(folder)
    started = time.process_time()  # which other work on the machine does not lengthen
    assert cli.run(["gradients", str(folder), "--seconds", "1", "--batch-size", "64"]) == 2
    assert time.process_time() - started < 20
    printed = capsys.readouterr()
    assert "--seconds" in printed.err and printed.out == ""


def test_study_stops_between_settings_and_says_how_many_it_left_out(monkeypatch) -> None:
    model = graph_model()
    batch, _ = make_batch(model, size=2)
    seen = []

    class ThreeRows:
        def __init__(self, seconds: float) -> None: ...

        def check(self) -> None:
            if len(seen) >= 3:
                raise engine.OutOfTime

    monkeypatch.setattr(engine, "Clock", ThreeRows)
    found = study(model, batch, steps=(1, 3), dampings=(1.0,), on_row=seen.append)
    assert len(found.rows) == 3 and found.spectral_radius
    settings = plan((1, 3), (1.0,), model.config.solver["max_steps"])
    assert found.missing == len(settings) - 3 > 0


def test_a_comparison_leaves_the_model_as_it_is() -> None:
    """Batch statistics, too, in training mode; and a model that solves nothing is refused."""
    model = picture_model().train()
    batch, _ = make_batch(model, size=4)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    comparison = engine.Comparison(model, batch)
    comparison.measure({"name": "upg", "steps": 2, "damping": 0.5})
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    config = load_class("DEQTransformerConfig")(
        vocab_size=50, d_model=16, d_embed=16, n_head=2, d_inner=16, cutoffs=[], div_val=1,
        variant="torchdeq-lm", norm_placement="pre", n_sublayers=2,
    )  # fmt: skip
    words = load_class("DEQTransformerForCausalLM")(config).eval()
    batch, _ = make_batch(words, size=1)
    with pytest.raises(UserError, match="solves no equilibrium"):
        engine.Comparison(words, batch)
