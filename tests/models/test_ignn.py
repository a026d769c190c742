"""IGNN's models: inputs, batches of graphs, constraint, gradients, official switch, bad graphs."""

import gc
import math
import weakref

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch_geometric.data import Batch, Data
from transformers import AutoConfig, AutoModel, Trainer, TrainingArguments

import deqzoo  # noqa: F401  (registers the family)
from deqzoo.data.graphs import collate_graphs
from deqzoo.errors import UserError
from deqzoo.models.ignn import layer as layer_module
from deqzoo.models.ignn.configuration_ignn import IGNNConfig
from deqzoo.models.ignn.dense import times_transposed
from deqzoo.models.ignn.inputs import GraphBatch
from deqzoo.models.ignn.modeling_ignn import (
    IGNNForGraphClassification,
    IGNNForNodeClassification,
    IGNNModel,
    classification_loss,
)
from deqzoo.models.ignn.projection import project_rows, row_norm
from deqzoo.models.ignn.sparse import Adjacency, SparseMatrix
from deqzoo.models.ignn.symmetry import merge_equal_nodes, refine
from deqzoo.training.constraints import ProjectionCallback


def config(**changes):
    return IGNNConfig(**{"num_features": 3, "hidden_sizes": [8, 6], **changes})


def graph(n, seed, extra=4, p=3):
    """A connected undirected graph; the features of odd seeds are larger, and so is their class."""
    generator = torch.Generator().manual_seed(seed)
    path = torch.stack([torch.arange(n - 1), torch.arange(1, n)])
    more = torch.randint(0, n, (2, extra), generator=generator)
    edges = torch.cat([path, more[:, more[0] != more[1]]], dim=1)
    edges = torch.unique(torch.cat([edges, edges.flip(0)], dim=1), dim=1)
    x = torch.rand(n, p, generator=generator)
    x = x + seed % 2
    return Data(x=x, edge_index=edges, y=torch.tensor([seed % 2]))


@pytest.fixture
def graphs():
    return [graph(n, seed) for seed, n in enumerate((5, 9, 3, 12))]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return IGNNForGraphClassification(config()).eval()


def test_published_parameter_counts():
    def count(model):
        return sum(p.numel() for p in model.parameters())

    for features, expected in ((35, 37_634), (3, 33_538)):
        official = IGNNConfig(num_features=features, official=True)
        assert count(IGNNForGraphClassification(official)) == expected
    ppi = IGNNConfig(
        num_features=50,
        hidden_sizes=[1024, 512, 512, 256],
        skip_connections=True,
        implicit_head=True,
        num_labels=121,
        normalization="none",
        official=True,
    )
    assert count(IGNNForNodeClassification(ppi)) == 4_656_931
    used = IGNNForGraphClassification(IGNNConfig(num_features=35))
    assert count(used) == 37_634 - 10_624


def test_inputs_are_equivalent(model, graphs):
    batch = Batch.from_data_list(graphs)
    expected = model(batch).logits
    plain = model(batch.x, batch.edge_index, batch=batch.batch).logits
    weighted = model(
        x=batch.x,
        edge_index=batch.edge_index,
        edge_weight=torch.ones(batch.num_edges),
        batch=batch.batch,
    ).logits
    built = GraphBatch.build(model.config, batch.x, batch.edge_index, batch=batch.batch)
    for other in (plain, weighted, model(built).logits):
        torch.testing.assert_close(other, expected, rtol=0, atol=1e-6)
    assert expected.shape == (4, 2)
    heavier = model(batch.x, batch.edge_index, torch.full((batch.num_edges,), 3.0), batch.batch)
    assert not torch.allclose(heavier.logits, expected, atol=1e-4)


def test_graphs_of_a_batch_are_solved_independently(model, graphs):
    """Each graph stops by itself and gets the result that it has alone."""
    together = model(Batch.from_data_list(graphs), solver={"tol": 1e-6})
    alone = [model(g, solver={"tol": 1e-6}) for g in graphs]
    torch.testing.assert_close(
        together.logits, torch.cat([o.logits for o in alone]), rtol=0, atol=1e-5
    )
    steps = torch.cat([o.n_steps for o in alone])
    assert together.n_steps.tolist() == steps.tolist()
    assert together.residual.shape == together.converged.shape == (4,)
    assert bool(together.converged.all()) and float(together.residual.max()) <= 1e-6


def test_solved_graphs_stop_and_leave_the_batch(model, graphs):
    """A graph that starts at its equilibrium stops at once, while the others go on."""
    batch = Batch.from_data_list(graphs)
    settings = {"solver": {"tol": 1e-6}}
    solved = model(batch, output_hidden_states=True, **settings)
    known = (batch.batch % 2 == 1)[:, None]
    starts = [torch.where(known, state, 0) for state in solved.hidden_states]
    for compact in (False, True):
        with torch.set_grad_enabled(not compact):
            output = model(batch, initial_states=starts, **settings)
        assert output.n_steps[1::2].tolist() == [2, 2] and int(output.n_steps[::2].min()) > 10
        torch.testing.assert_close(output.logits, solved.logits, rtol=0, atol=1e-5)


def test_a_non_finite_graph_does_not_touch_others(model, graphs):
    batch = Batch.from_data_list(graphs)
    built = GraphBatch.build(model.config, batch.x, batch.edge_index, batch=batch.batch)
    expected = model(built).logits
    built.features = built.features.clone()
    built.features[batch.batch == 1] = math.nan
    output = model(built)
    others = [0, 2, 3]
    torch.testing.assert_close(output.logits[others], expected[others], rtol=0, atol=1e-6)
    assert output.converged.tolist() == [True, False, True, True]


def test_warm_start_saves_steps_and_changes_nothing(model, graphs):
    batch = Batch.from_data_list(graphs)
    cold = model(batch, output_hidden_states=True, solver={"tol": 1e-6})
    assert [h.shape[1] for h in cold.hidden_states] == [8, 6]
    warm = model(batch, initial_states=cold.hidden_states, solver={"tol": 1e-6})
    assert int(warm.n_steps.sum()) < int(cold.n_steps.sum()) / 2
    torch.testing.assert_close(warm.logits, cold.logits, rtol=0, atol=1e-5)


def star_and_ring():
    """Graphs with equal nodes: a star with two kinds of leaves, and a ring."""
    star = torch.tensor([[0, 0, 0, 0, 0], [1, 2, 3, 4, 5]])
    ring = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    leaves = torch.eye(3)[[0, 1, 1, 1, 2, 2]]
    return [
        Data(x=leaves, edge_index=torch.cat([star, star.flip(0)], 1), y=torch.tensor([0])),
        Data(
            x=torch.ones(4, 3), edge_index=torch.cat([ring, ring.flip(0)], 1), y=torch.tensor([1])
        ),
    ]


def test_equal_nodes_merge_without_changing_results(graphs):
    torch.manual_seed(0)
    model = IGNNForGraphClassification(config(dropout=0.0)).double()
    batch = Batch.from_data_list([*star_and_ring(), *graphs])
    batch.x = batch.x.double()
    whole = GraphBatch.build(model.config, batch.x, batch.edge_index, batch=batch.batch)
    merged = merge_equal_nodes(whole)
    assert merged.counts[merged.index == 0].sort().values.tolist() == [1, 2, 3]
    assert merged.counts[merged.index == 1].tolist() == [4]
    assert int(merged.counts.sum()) == batch.num_nodes
    again = merge_equal_nodes(merged)
    assert torch.equal(again.counts.sort().values, merged.counts.sort().values)
    tight = {"solver": {"tol": 1e-13, "max_steps": 2000}, "labels": batch.y}
    adjoint = {"name": "fixed_point", "max_steps": 2000, "tol": 1e-13}
    for gradient in ({"name": "implicit", "solver": adjoint}, "upg", "npg"):
        found = []
        for inputs in (whole, merged):
            model.zero_grad()
            output = model(inputs, gradient=gradient, **tight)
            output.loss.backward()
            found.append((output.logits, torch.cat([p.grad.flatten() for p in model.parameters()])))
        torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-10)
        torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=1e-9)


def test_weights_and_features_keep_nodes_apart():
    path = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])

    def kinds(x, weight):
        settings = config(normalization="none")
        return refine(GraphBatch.build(settings, x, path, weight)).unique().numel()

    equal = torch.ones(3, 3)
    assert kinds(equal, torch.ones(4)) == 2  # the ends of the path are alike
    assert kinds(equal, torch.tensor([1.0, 1.0, 2.0, 2.0])) == 3
    assert kinds(torch.eye(3), torch.ones(4)) == 3


def gradients(model, batch, **options):
    model.zero_grad()
    model(batch, labels=batch.y, **options).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_gradients_by_name(graphs):
    """More phantom steps come closer to the exact gradient; UPG equals NPG at the equilibrium."""
    torch.manual_seed(0)
    model = IGNNForGraphClassification(config(dropout=0.0)).double()
    batch = Batch.from_data_list(graphs)
    batch.x = batch.x.double()
    tight = {"solver": {"tol": 1e-13, "max_steps": 2000}}
    adjoint = {"name": "fixed_point", "max_steps": 2000, "tol": 1e-13}
    exact = gradients(model, batch, gradient={"name": "implicit", "solver": adjoint}, **tight)
    errors = []
    for steps in (1, 5, 20):
        settings = {"steps": steps, "damping": 0.5}
        upg = gradients(model, batch, gradient={"name": "upg", **settings}, **tight)
        npg = gradients(model, batch, gradient={"name": "npg", **settings}, **tight)
        torch.testing.assert_close(upg, npg, rtol=1e-8, atol=1e-10)
        errors.append(float((upg - exact).norm() / exact.norm()))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-2


def test_gradient_matches_finite_differences(graphs):
    torch.manual_seed(0)
    model = IGNNForGraphClassification(config(dropout=0.0)).double()
    batch = Batch.from_data_list(graphs)
    batch.x = batch.x.double()
    tight = {"solver": {"tol": 1e-13, "max_steps": 2000}}
    adjoint = {"name": "fixed_point", "max_steps": 2000, "tol": 1e-13}
    layer = model.ignn.layers[0]
    gradients(model, batch, gradient={"name": "implicit", "solver": adjoint}, **tight)
    entry = (0, int(layer.state_weight[0].abs().argmax()))
    exact, losses = float(layer.state_weight.grad[entry]), []
    for shift in (-1e-6, 1e-6):
        with torch.no_grad():
            layer.state_weight[entry] += shift
            scaled = layer.kappa
            layer.kappa = None  # free: the bound must not hide the shift
            losses.append(float(model(batch, labels=batch.y, **tight).loss))
            layer.kappa = scaled
            layer.state_weight[entry] -= shift
    assert exact == pytest.approx((losses[1] - losses[0]) / 2e-6, rel=1e-4, abs=1e-9)


def test_second_backward_gives_the_same_gradient(model, graphs):
    batch = Batch.from_data_list(graphs)
    for name in ("implicit", "npg", "upg"):
        loss = model(batch, labels=batch.y, gradient=name).loss
        model.zero_grad()
        loss.backward(retain_graph=True)
        first = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        loss.backward()
        for a, p in zip(first, model.parameters(), strict=True):
            torch.testing.assert_close(a, p.grad, rtol=1e-6, atol=1e-8)


def test_gradient_checkpointing_changes_nothing(graphs):
    torch.manual_seed(0)
    model = IGNNForGraphClassification(config(dropout=0.0)).train()
    batch = Batch.from_data_list(graphs)
    plain = gradients(model, batch)
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(model, batch), plain, rtol=1e-6, atol=1e-8)


def test_save_and_load(model, graphs, tmp_path):
    batch = Batch.from_data_list(graphs)
    expected = model(batch).logits
    model.save_pretrained(tmp_path)
    again = IGNNForGraphClassification.from_pretrained(tmp_path)
    assert torch.equal(again(batch).logits, expected)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), IGNNConfig)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, IGNNModel)
    torch.testing.assert_close(
        base(batch).last_hidden_state, model.ignn(batch).last_hidden_state, rtol=0, atol=1e-6
    )
    loaded = deqzoo.DEQModel.from_pretrained(str(tmp_path))
    assert isinstance(loaded, IGNNForGraphClassification)


def test_loading_mends_weights_outside_the_bound(model, graphs, tmp_path, caplog):
    with torch.no_grad():
        model.ignn.layers[1].state_weight.mul_(3)
    model.save_pretrained(tmp_path)
    again = IGNNForGraphClassification.from_pretrained(tmp_path)
    assert row_norm(again.ignn.layers[1].state_weight) <= 0.9 * (1 + 1e-5)
    assert again.enforce_constraint() == 0.0


def test_weights_outside_the_bound_are_projected_for_the_solve_only(model, graphs):
    batch = Batch.from_data_list(graphs)
    layer = model.ignn.layers[0]
    with torch.no_grad():
        layer.state_weight.mul_(5)
    stored = layer.state_weight.detach().clone()
    expected = model(batch).logits
    assert torch.equal(layer.state_weight, stored)
    model.project_()
    assert row_norm(layer.state_weight) == pytest.approx(0.9, abs=1e-5)
    torch.testing.assert_close(model(batch).logits, expected, rtol=0, atol=1e-6)


def test_official_evaluation_changes_weights(graphs):
    """The published code projects the stored weights in every forward, evaluation included."""
    torch.manual_seed(0)
    model = IGNNForGraphClassification(config(official=True)).eval()
    before = model.ignn.layers[0].state_weight.detach().clone()
    assert row_norm(before) > 0.9
    model(Batch.from_data_list(graphs))
    after = model.ignn.layers[0].state_weight.detach()
    torch.testing.assert_close(after, project_rows(before, 0.9))


def test_new_models_are_well_posed():
    assert IGNNModel(config()).enforce_constraint() == 0.0
    with pytest.raises(StrictDataclassError, match="kappa=0 "):
        config(kappa=0)
    assert config(kappa=0, official=True).kappa == 0


def test_measured_radius(graphs):
    """Without normalisation the bound depends on the graph: the solve stays a contraction."""
    torch.manual_seed(0)
    model = IGNNModel(config(normalization="none", kappa=0.9)).eval()
    batch = Batch.from_data_list(graphs)
    output = model(batch, solver={"tol": 1e-5, "max_steps": 500})
    assert bool(output.converged.all())
    adjacency = Adjacency.from_edges(batch.edge_index, batch.num_nodes, None, "none")
    dense = adjacency.csr.to_dense().double()
    radius = float(torch.linalg.eigvalsh(dense).abs().max())
    assert adjacency.spectral_radius == pytest.approx(radius, abs=1e-6)
    assert model.largest_radius == 0.0
    model.train()(batch)
    assert model.largest_radius == pytest.approx(radius + 1e-5, abs=1e-6)
    model.project_()
    assert row_norm(model.layers[0].state_weight) <= 0.9 / radius + 1e-5


@pytest.mark.parametrize("directed", [False, True])
def test_spectral_radius_of_large_graphs(directed):
    generator = torch.Generator().manual_seed(1)
    edges = torch.randint(0, 700, (2, 3000), generator=generator)
    if not directed:
        edges = torch.cat([edges, edges.flip(0)], dim=1)
    adjacency = Adjacency.from_edges(edges, 700, None, "none")
    dense = adjacency.csr.to_dense().double()
    radius = float(torch.linalg.eigvals(dense).abs().max())
    assert adjacency.spectral_radius >= radius - 1e-6
    assert adjacency.spectral_radius == pytest.approx(radius, rel=1e-3)


def test_sparse_features_equal_dense_ones(graphs):
    torch.manual_seed(0)
    model = IGNNForNodeClassification(config(skip_connections=True, local_injection=True)).eval()
    g = graphs[3]
    dense = model(g.x, g.edge_index).logits
    torch.testing.assert_close(model(g.x.to_sparse(), g.edge_index).logits, dense)


def test_multi_label_nodes_with_a_mask(graphs):
    torch.manual_seed(0)
    kind = {"problem_type": "multi_label_classification", "num_labels": 4}
    model = IGNNForNodeClassification(config(implicit_head=True, **kind)).eval()
    g = graphs[3]
    labels = torch.randint(0, 2, (12, 4)).float()
    mask = torch.arange(12) < 5
    output = model(g, labels=labels, mask=mask, output_hidden_states=True)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(output.logits[:5], labels[:5])
    assert float(output.loss) == pytest.approx(float(expected))
    assert [h.shape[1] for h in output.hidden_states] == [8, 6, 4]
    with pytest.raises(UserError, match="multi-label"):
        model(g, labels=torch.zeros(12, dtype=torch.int64))


def test_settings_of_a_call_and_of_the_model(model, graphs):
    batch = Batch.from_data_list(graphs)
    loose = model(batch, solver={"tol": 1e-1}).n_steps.sum()
    tight = model(batch, solver={"tol": 1e-6}).n_steps.sum()
    assert int(loose) < int(tight)
    anderson = model(batch, solver={"name": "anderson", "tol": 1e-6})
    torch.testing.assert_close(
        anderson.logits, model(batch, solver={"tol": 1e-6}).logits, rtol=0, atol=1e-4
    )
    model.set_solver(max_steps=1)
    assert model(batch).n_steps.tolist() == [2] * 4  # one in each of two layers
    with pytest.raises(ValueError, match="unknown solver"):
        model(batch, solver="newton")


def test_half_precision(model, graphs):
    batch = Batch.from_data_list(graphs)
    expected = model(batch).logits
    half = model.to(torch.bfloat16)(batch, solver={"tol": 1e-2})
    assert half.logits.dtype == torch.bfloat16
    torch.testing.assert_close(half.logits.float(), expected, rtol=0, atol=5e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hubs_in_half_precision(dtype):
    """A degree of 1001 is counted, though a sum of ones in bfloat16 stops at 256."""
    leaves = torch.arange(1, 1001)
    star = torch.stack([torch.zeros_like(leaves), leaves])
    star = torch.cat([star, star.flip(0)], dim=1)
    batch = GraphBatch.build(config(), torch.rand(1001, 3, dtype=dtype), star)
    for adjacency in (
        batch.adjacency,
        batch.to(batch.features).adjacency,
        Adjacency.from_edges(star, 1001, dtype=dtype),
    ):
        loop = adjacency.values[(adjacency.index == 0).all(0)]
        assert float(loop) == pytest.approx(1 / 1001, rel=1e-5)
        assert adjacency.spectral_radius == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_meets_the_bound(model, dtype, tmp_path, caplog):
    """Rounded weights exceed the bound by a rounding: no reason to complain or to project."""
    caplog.set_level("WARNING", logger="deqzoo.models")  # commands raise it
    with torch.no_grad():
        for layer in model.implicit_layers:
            layer.state_weight.mul_(5)
    model.project_()
    model.save_pretrained(tmp_path)
    again = IGNNForGraphClassification.from_pretrained(tmp_path, dtype=dtype)
    assert "norm bound" not in caplog.text
    for half, full in zip(again.implicit_layers, model.implicit_layers, strict=True):
        assert torch.equal(half.state_weight, full.state_weight.to(dtype))
        assert half.allows(1.0) and row_norm(half.state_weight) > 0.9
    with torch.no_grad():
        half.state_weight.mul_(1.1)
    assert again.enforce_constraint() > 0
    assert half.allows(1.0) and again.enforce_constraint() == 0


@pytest.mark.parametrize("several", [False, True])
def test_masks_of_labels(several):
    """Bool, one entry per node; labels of a narrow type can be left out, too."""
    kind = "multi_label_classification" if several else None
    settings, logits = config(problem_type=kind), torch.randn(4, 3)
    labels = torch.eye(3)[[0, 1, 2, 0]] if several else torch.tensor([0, 1, 2, 0])
    for mask in (torch.ones(4).long(), torch.ones(3, dtype=torch.bool), torch.tensor([0, 2])):
        with pytest.raises(UserError, match=r"mask must be bool of shape \(4,\)"):
            classification_loss(settings, logits, labels, mask)
    mask = torch.tensor([True, False, True, False])
    expected = classification_loss(settings, logits[mask], labels[mask])
    for narrow in (labels, labels.to(torch.uint8)):
        torch.testing.assert_close(classification_loss(settings, logits, narrow, mask), expected)


@torch.no_grad()
def test_batch_mates_do_not_matter_where_radii_are_measured(graphs):
    torch.manual_seed(0)
    settings = config(normalization="none", solver={"tol": 1e-6, "max_steps": 500})
    model = IGNNForGraphClassification(settings).eval()
    batch = Batch.from_data_list(graphs)
    radii = GraphBatch.build(settings, batch.x, batch.edge_index, batch=batch.batch).radii
    middle = sum(radii) / len(radii)
    for layer in model.implicit_layers:
        layer.state_weight.mul_(0.9 / middle / row_norm(layer.state_weight))
        assert sum(layer.allows(radius) for radius in radii) in (1, 2, 3)
    output = model(batch)
    assert output.converged.all()
    for number, one in enumerate(graphs):
        alone = model(one)
        torch.testing.assert_close(output.logits[number], alone.logits[0], rtol=1e-4, atol=1e-5)
    order = torch.randperm(batch.num_nodes)
    moved = model(batch.x[order], order.argsort()[batch.edge_index], batch=batch.batch[order])
    torch.testing.assert_close(moved.logits, output.logits, rtol=1e-4, atol=1e-5)
    starts = model(batch, output_hidden_states=True).hidden_states
    assert int(model(batch, initial_states=starts).n_steps.max()) <= 4


@torch.no_grad()
def test_many_directed_graphs_are_bound_by_their_own_radii():
    """Chains have the radius 0; of more than 512 nodes together only a loose bound is measured."""
    torch.manual_seed(0)
    model = IGNNModel(config(hidden_sizes=[6], normalization="none", directed=True)).eval()
    model.layers[0].state_weight.mul_(60)
    path = torch.stack([torch.arange(9), torch.arange(1, 10)])
    chains = [Data(x=torch.rand(10, 3), edge_index=path) for _ in range(52)]
    batch = Batch.from_data_list(chains)
    adjacency = Adjacency.from_edges(batch.edge_index, batch.num_nodes, None, "none")
    assert not model.layers[0].allows(adjacency.spectral_radius)
    together = model(batch).last_hidden_state[:10]
    torch.testing.assert_close(together, model(chains[0]).last_hidden_state)


def test_products_agree_with_plain_ones():
    x, weight, plus = torch.randn(50, 7), torch.randn(5, 7), torch.randn(50, 5)
    with torch.no_grad():
        torch.testing.assert_close(times_transposed(x, weight), x @ weight.T)
        torch.testing.assert_close(times_transposed(x, weight, plus), x @ weight.T + plus)
        torch.testing.assert_close(times_transposed(x.T, plus.T), x.T @ plus)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("directed", (False, True))
def test_large_graphs_in_blocks(dtype, directed, monkeypatch):
    """Step by step with the last block not full, and a whole solve."""
    torch.manual_seed(0)
    model = IGNNModel(config(directed=directed)).to(dtype).eval()
    path = torch.stack([torch.arange(9), torch.arange(1, 10)])
    edges = path if directed else graph(10, 0).edge_index
    x = torch.rand(10, 3, dtype=dtype)
    adjacency = Adjacency.from_edges(edges, 10, torch.ones(edges.shape[1], dtype=dtype), "none")
    f = layer_module.GraphMap(
        torch.rand(6, 6, dtype=dtype), torch.randn(10, 6, dtype=dtype), adjacency
    )
    state = torch.randn(10, 6, dtype=dtype)
    with torch.no_grad():
        whole, answer = f(state), model(x=x, edge_index=edges).last_hidden_state
        calls = []
        rows = SparseMatrix.product_rows

        def counted(self, dense, first, end):
            calls.append(end - first)
            return rows(self, dense, first, end)

        monkeypatch.setattr(SparseMatrix, "product_rows", counted)
        monkeypatch.setattr(layer_module, "_LARGE", 0)
        monkeypatch.setattr(layer_module, "_BLOCK", 4)
        torch.testing.assert_close(f(state), whole)
        assert calls == [4, 4, 2]
        torch.testing.assert_close(model(x=x, edge_index=edges).last_hidden_state, answer)
    assert len(calls) > 6


def test_trainer(tmp_path):
    """A dict from the collator trains under Trainer; the callback keeps the bound."""
    torch.manual_seed(0)
    data = [graph(6 + seed % 4, seed) for seed in range(24)]
    model = IGNNForGraphClassification(config(dropout=0.0))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        num_train_epochs=15,
        learning_rate=2e-2,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate_graphs,
        callbacks=[ProjectionCallback()],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert all(layer.excess(1.0) == 0 for layer in model.implicit_layers)
    assert trainer.evaluate()["eval_loss"] < losses[0]


def bad_graphs():
    g = graph(5, 0)
    x, e = g.x, g.edge_index
    one = torch.zeros(5, dtype=torch.int64)
    return {
        "no nodes": ({"x": torch.zeros(0, 3), "edge_index": e[:, :0]}, "no nodes"),
        "an empty graph": ({"x": x, "edge_index": e, "batch": one + 1}, "graph 0 .* no nodes"),
        "NaN": ({"x": x.where(x != x[0, 0], math.nan), "edge_index": e}, "NaN"),
        "width": ({"x": x[:, :2], "edge_index": e}, r"reads \(nodes, 3\)"),
        "integers": ({"x": x.long(), "edge_index": e}, "floating point"),
        "range": ({"x": x, "edge_index": e + 1}, "nodes 0 to 4"),
        "negative": ({"x": x, "edge_index": e - 1}, "nodes 0 to 4"),
        "edge shape": ({"x": x, "edge_index": e.T}, r"shape \(2, edges\)"),
        "no edges given": ({"x": x}, "edge_index is missing"),
        "directed": ({"x": x, "edge_index": e[:, :-1]}, "no equal reverse edge"),
        "weights": ({"x": x, "edge_index": e, "edge_weight": -torch.ones(e.shape[1])}, "negative"),
        "batch length": ({"x": x, "edge_index": e, "batch": one[:3]}, "one entry per node"),
        "edge between graphs": (
            {"x": x, "edge_index": e, "batch": torch.tensor([0, 0, 0, 1, 1])},
            "different graphs",
        ),
    }


@pytest.mark.parametrize("what", bad_graphs())
def test_bad_graphs(model, what):
    arguments, message = bad_graphs()[what]
    with pytest.raises(UserError, match=message):
        model(**arguments)


def test_object_without_features(model):
    with pytest.raises(UserError, match="no x"):
        model(Data(edge_index=torch.zeros(2, 0, dtype=torch.int64), num_nodes=3))


def test_isolated_nodes_and_graphs_without_edges(model):
    """They are right: such a node's state solves z = relu(W z + Omega x) by itself."""
    x = torch.rand(3, 3)
    none = torch.zeros(2, 0, dtype=torch.int64)
    whole = model(x, none).logits
    assert bool(whole.isfinite().all())
    base = model.ignn
    states = base(x, none, solver={"tol": 1e-6}).last_hidden_state
    alone = [base(x[i : i + 1], none, solver={"tol": 1e-6}).last_hidden_state for i in range(3)]
    torch.testing.assert_close(states, torch.cat(alone), rtol=0, atol=1e-5)
    raw = IGNNModel(config(normalization="none")).eval()
    assert torch.equal(raw(x, none).last_hidden_state, torch.zeros(3, 6))


def test_directed_graphs_where_they_are_allowed():
    torch.manual_seed(0)
    chain = torch.tensor([[0, 1, 2], [1, 2, 3]])
    x = torch.zeros(4, 3)
    x[0, 0] = 1
    forward = IGNNModel(config(directed=True)).eval()
    states = forward(x, chain, solver={"tol": 1e-7}).last_hidden_state
    backward = forward(x, chain.flip(0), solver={"tol": 1e-7}).last_hidden_state
    assert bool((states[1:].abs().sum(1) > 0).any()), "information must flow along the edges"
    assert torch.equal(backward[1:], torch.zeros(3, 6))


def test_training_under_autocast_without_onednn(monkeypatch, graphs):
    """What a GPU does: the products are autocast's to narrow, their backward is not."""
    monkeypatch.setattr("deqzoo.models.ignn.dense._ONEDNN_LINEAR", None)
    batch = Batch.from_data_list(graphs)
    for gradient in ("implicit", "upg", "npg", "jfb"):
        torch.manual_seed(0)
        model = IGNNForGraphClassification(config(dropout=0.0)).train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch.y, gradient=gradient).loss
        loss.backward()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
        torch.testing.assert_close(loss, model(batch, labels=batch.y).loss, rtol=0.02, atol=0)


def test_adjacencies_are_freed_without_the_collector():
    gc.disable()
    try:
        for edges in ([[0, 1], [1, 0]], [[0, 1], [1, 2]]):
            adjacency = Adjacency.from_edges(torch.tensor(edges), 3, None, "none")
            assert adjacency.transposed.transposed is adjacency
            assert adjacency.is_symmetric == (edges == [[0, 1], [1, 0]])
            alive = weakref.ref(adjacency)
            transposed = adjacency.transposed
            del adjacency
            dense = transposed.transposed.csr.to_dense()
            assert torch.equal(dense.T, transposed.csr.to_dense())
            del transposed
            assert alive() is None
    finally:
        gc.enable()


def test_parallel_edges_in_another_order_are_undirected():
    weights = torch.tensor([1.0, 0.6, 0.7, 0.4])
    forward = torch.tensor([[0] * 4, [1] * 4])
    edges = torch.cat([forward, forward.flip(0)], dim=1)
    model = IGNNModel(config()).eval()
    both = torch.cat([weights, weights[[2, 1, 3, 0]]])
    assert torch.equal(both[:4].sort().values, both[4:].sort().values)
    assert model(torch.rand(2, 3), edges, both).converged.all()
    with pytest.raises(UserError, match="no equal reverse edge"):
        model(torch.rand(2, 3), edges, both + torch.tensor([0.001] + [0] * 7))


def test_many_graphs_stay_apart_in_half_precision():
    n = 600  # bfloat16 counts to 256
    batch = torch.arange(n)
    none = torch.zeros(2, 0, dtype=torch.int64)
    features = torch.ones(n, 3, dtype=torch.bfloat16)
    graphs = GraphBatch.build(config(), features, none, batch=batch)
    assert len(merge_equal_nodes(graphs).features) == n


def test_every_form_of_the_same_graph():
    """Arrays, lists, int32, sparse features, dicts and lists of Data."""
    data_class = pytest.importorskip("torch_geometric.data").Data
    torch.manual_seed(0)
    config = IGNNConfig(num_features=3, hidden_sizes=[4], num_labels=2)
    model = IGNNForGraphClassification(config).eval()
    x = torch.eye(3)[[0, 1, 2, 0]]
    edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    expected = model(x, edges).logits
    graph = data_class(x=x, edge_index=edges)
    for given in (
        (x.numpy(), edges.numpy()),
        (x.tolist(), edges.tolist()),
        (x.double().numpy(), edges.int()),
        (x.to_sparse_csr(), edges),
        (x.to_sparse(), edges.numpy().astype("int16")),
        ({"x": x, "edge_index": edges},),
        ([graph],),
    ):
        torch.testing.assert_close(model(*given).logits, expected)
    torch.testing.assert_close(model([graph, graph]).logits, expected.repeat(2, 1))
    weights = [1.0, 1.0, 5.0, 5.0]
    weighed = model(x, edges, edge_weight=weights).logits
    torch.testing.assert_close(weighed, model(x, edges, edge_weight=torch.tensor(weights)).logits)
    for call, said in (
        (lambda: model(x, edges, initial_states=[]), "initial_states"),
        (lambda: model(x, edges, initial_states=[torch.zeros(4, 9)]), "initial_states"),
        (lambda: model(x, edges, labels=torch.tensor([7])), "from 0 to 1"),
        (lambda: model(x, edges, labels=torch.tensor([0.5])), "whole numbers"),
        (lambda: model(x, edges.float()), "edge_index"),
        (lambda: model(x, "edges"), "edge_index must be"),
        (lambda: model("graph"), "type str"),
        (lambda: model([3]), "type list"),
        (lambda: model({"x": x}), "no edge_index"),
    ):
        with pytest.raises(UserError, match=said):
            call()


@pytest.mark.parametrize("normalization", ["augmented", "symmetric", "none"])
@pytest.mark.parametrize("directed", [False, True])
def test_products_have_the_gradient_of_their_entries(normalization, directed):
    """Parallel edges, self loops, and an edge whose reverse weighs the same or is missing."""
    index = torch.tensor([[0, 1, 1, 2, 0, 3, 3], [1, 0, 2, 1, 1, 3, 0]])
    if not directed:
        index = torch.cat([index, index.flip(0)], dim=1)
    weight = torch.ones(index.shape[1], dtype=torch.float64, requires_grad=True)
    nodes = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def f(weight, nodes):
        adjacency = Adjacency.from_edges(index, 4, weight, normalization)
        return adjacency.propagate(nodes), adjacency.matmul(nodes)

    assert torch.autograd.gradcheck(f, (weight, nodes))
    assert torch.autograd.gradgradcheck(f, (weight, nodes))


@pytest.mark.parametrize("gradient", ["implicit", "upg", "npg", "jfb", "unrolled"])
def test_edge_weights_get_their_gradient(gradient):
    torch.manual_seed(0)
    config = IGNNConfig(num_features=3, hidden_sizes=[4, 4], num_labels=2, directed=True)
    model = IGNNForGraphClassification(config).double().eval()
    index = torch.tensor([[0, 1, 2, 3, 0, 4, 1, 5, 6], [1, 2, 3, 0, 2, 0, 4, 6, 5]])
    batch = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    x = torch.randn(7, 3, dtype=torch.float64)
    weight = (torch.rand(9, dtype=torch.float64) + 0.5).requires_grad_()
    adjoint = {"name": "anderson", "max_steps": 200, "tol": 1e-12}
    spec = {
        "implicit": {"name": "implicit", "solver": adjoint},
        "upg": {"name": "upg", "steps": 300, "damping": 1.0},
        "npg": {"name": "npg", "steps": 300, "damping": 1.0},
        "unrolled": {"name": "unrolled", "steps": 300},
    }.get(gradient, gradient)
    solver = {"name": "anderson", "max_steps": 200, "tol": 1e-13}

    def score(weight, **more):
        output = model(x, index, edge_weight=weight, batch=batch, solver=solver, **more)
        return output.logits[:, 0].sum()

    (found,) = torch.autograd.grad(score(weight, gradient=spec), weight)
    step, expected = 1e-5, torch.zeros(9, dtype=torch.float64)
    with torch.no_grad():
        for i in range(9):
            moved = torch.zeros_like(weight)
            moved[i] = step
            expected[i] = (score(weight + moved) - score(weight - moved)) / (2 * step)
    assert expected.abs().max() > 1e-5
    if gradient == "jfb":
        assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.5
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


def test_constant_edges_cost_nothing_and_a_symmetric_one_is_kept_once():
    index = torch.tensor([[0, 1], [1, 0]])
    constant = Adjacency.from_edges(index, 2)
    assert constant.transposed is constant and constant.detached() is constant
    learned = Adjacency.from_edges(index, 2, torch.ones(2, requires_grad=True))
    assert learned.is_symmetric and learned.transposed is not learned
    assert learned.transposed.transposed is learned
    assert not learned.detached().values.requires_grad


def test_gnn_explainer_scores_edges_and_features():
    """PyG's explainers mask messages; a layer that hands on its own messages takes the mask."""
    from torch_geometric.explain import Explainer, GNNExplainer
    from torch_geometric.nn import MessagePassing

    class Edges(MessagePassing):
        def forward(self, edge_index, n):
            return self.propagate(edge_index, x=torch.ones(n, 1)).squeeze(1)

        def message(self, x_j):
            return x_j

        def aggregate(self, inputs):
            return inputs

    class Explained(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.edges = model, Edges()

        def forward(self, x, edge_index):
            weight = self.edges(edge_index, len(x))
            return self.model(x, edge_index, edge_weight=weight).logits

    torch.manual_seed(0)
    config = IGNNConfig(num_features=3, hidden_sizes=[4], num_labels=2, directed=True)
    model = IGNNForGraphClassification(config).eval()
    explainer = Explainer(
        Explained(model),
        algorithm=GNNExplainer(epochs=5),
        explanation_type="model",
        node_mask_type="attributes",
        edge_mask_type="object",
        model_config={"mode": "multiclass_classification", "task_level": "graph",
                      "return_type": "raw"},
    )  # fmt: skip
    index = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    found = explainer(torch.randn(3, 3), index)
    assert found.edge_mask.shape == (4,) and found.edge_mask.unique().numel() > 1
    assert found.node_mask.shape == (3, 3)


def test_projecting_twice_is_projecting_once() -> None:
    """A resumed run projects its weights once more than one that was never cut off."""
    from deqzoo.models.ignn.projection import project_rows

    torch.manual_seed(0)
    once = project_rows(torch.randn(200, 64), 0.9)
    assert torch.equal(project_rows(once, 0.9), once)
    assert float(once.abs().sum(1).max()) < 0.9 * (1 + 1e-6)


def test_labels_behind_a_mask_reach_no_gradient():
    """NaN is how data sets mark nodes without labels."""
    torch.manual_seed(0)
    settings = config(problem_type="multi_label_classification", num_labels=3)
    model = IGNNForNodeClassification(settings).eval()
    data = graph(5, 0)
    labels = torch.tensor([[0.0, 1, 1], [1, 0, 0], [math.nan] * 3, [1, 1, 1], [0, 0, 0]])
    mask = torch.tensor([1, 1, 0, 1, 1]).bool()
    loss = model(data.x, data.edge_index, labels=labels, mask=mask).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    logits = model(data.x, data.edge_index).logits
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[mask], labels[mask])
    torch.testing.assert_close(loss, expected)
    for value in (-100.0, 2.0, math.nan):
        with pytest.raises(UserError, match=r"must lie in \[0, 1\]"):
            classification_loss(settings, logits.detach(), labels.nan_to_num(value))
    with pytest.raises(UserError, match="no loss for problem_type 'regression'"):
        classification_loss(config(problem_type="regression"), logits, labels[:, 0])


def test_what_comes_beside_a_graph_object_is_refused(model):
    data = graph(5, 0)
    for extra in ({"edge_weight": torch.ones(data.num_edges)}, {"batch": torch.zeros(5).long()}):
        with pytest.raises(UserError, match="belong into the graph object"):
            model(data, **extra)
        with pytest.raises(UserError, match="a GraphBatch comes alone"):
            model(model.read_graphs(data), **extra)


def test_weights_of_edges_have_a_second_derivative():
    """Duplicate edges, which add up, included; checked by differences in float64."""
    torch.manual_seed(0)
    matrix_index = torch.tensor([[0, 1, 1, 2, 0], [1, 0, 2, 1, 1]])
    x = torch.rand(3, 2, dtype=torch.float64)

    def energy(values):
        matrix = SparseMatrix(matrix_index, values, (3, 3))
        return matrix.matmul(x).pow(3).sum()

    values = torch.rand(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(energy, (values,))
    settings = config(solver={"max_steps": 200, "tol": 1e-12})
    model = IGNNForGraphClassification(settings).double().eval()
    data = graph(5, 0)
    weights = torch.ones(data.num_edges, dtype=torch.float64, requires_grad=True)
    output = model(data.x.double(), data.edge_index, weights, gradient="upg")
    (first,) = torch.autograd.grad(output.logits.sin().sum(), weights, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), weights)
    assert first.requires_grad and second.abs().max() > 0


def test_a_start_without_the_heads_own_is_refused():
    model = IGNNForNodeClassification(config(implicit_head=True, num_labels=2)).eval()
    data = graph(5, 0)
    states = model.ignn(data.x, data.edge_index, output_hidden_states=True)
    starts = [state.detach() for state in states.hidden_states[-2:]]
    assert [state.shape[1] for state in starts] == [8, 6]
    with pytest.raises(UserError, match="initial_states must end with a state of the head"):
        model(data.x, data.edge_index, initial_states=starts)
