"""Parity with reference numbers, for every file in tests/golden/ignn.

Which checks a file gets is read off its name's prefix; shapes and settings come from the file.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deqzoo.equilibrium import Segments, fixed_point, make_gradient
from deqzoo.equilibrium.layer import _problem
from deqzoo.equilibrium.maps import Matrices
from deqzoo.models.ignn.convert_ignn import build_model, deqzoo_name, read_config
from deqzoo.models.ignn.inputs import GraphBatch
from deqzoo.models.ignn.layer import ImplicitGraphLayer
from deqzoo.models.ignn.modeling_ignn import IGNNForGraphClassification
from deqzoo.models.ignn.projection import project_rows
from deqzoo.models.ignn.sparse import Adjacency

FOLDER = Path(__file__).parents[1] / "golden" / "ignn"
EXACT = {"name": "fixed_point", "max_steps": 20000, "tol": 1e-14, "stop_mode": "abs"}
IMPLICIT = {"name": "implicit", "solver": EXACT}
NAMES = {"W": "state_weight", "Omega_1": "neighbor_weight", "Omega_2": "local_weight"}


def files(prefix):
    """Stems of the files with a prefix; each has a .safetensors and a .json."""
    found = sorted(path.stem for path in FOLDER.glob(f"{prefix}*.safetensors"))
    assert found, f"no reference files {prefix}* in {FOLDER}"
    return found


def read(stem):
    settings = json.loads((FOLDER / f"{stem}.json").read_text())
    return load_file(FOLDER / f"{stem}.safetensors"), settings


def adjacency(tensors, name):
    index = torch.stack([tensors[f"{name}.row"], tensors[f"{name}.col"]])
    n = int(tensors[f"{name}.n"]) if f"{name}.n" in tensors else int(index.max()) + 1
    return Adjacency(index, tensors[f"{name}.val"], n)


def gradient_of(label):
    """Settings of a gradient from its label in the files: exact, upg_k5_l0.5, npg_k1_l1.0."""
    if label in ("exact", "upstream_tight", "default"):
        return IMPLICIT
    name, steps, damping = label.split("_")
    return {"name": name, "steps": int(steps[1:]), "damping": float(damping[1:])}


def labels_of(tensors):
    return sorted({key.split(".grad.")[0] for key in tensors if ".grad." in key})


def assert_gradient(value, reference, tolerance, what):
    scale = reference.abs().max().clamp_min(1e-300)
    error = float((value - reference).abs().max() / scale)
    assert error < tolerance, f"gradient of {what} differs by {error:.1e} of its largest entry"


@pytest.mark.parametrize("stem", files("projection"))
def test_projection(stem):
    tensors, settings = read(stem)
    cases = [key for key in settings if key.startswith("case")]
    assert cases
    for case in cases:
        number, bound = case.removeprefix("case"), settings[case]["kappa"]
        weight = tensors[f"{number}.W"]
        expected = tensors[f"{number}.proj_inf"]
        torch.testing.assert_close(project_rows(weight, bound), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stem", files("adjacency"))
def test_adjacency(stem):
    tensors, settings = read(stem)
    for case, radii in settings["cases"].items():
        raw = adjacency(tensors, f"{case}.raw")
        built = {
            "raw": raw,
            "augnorm": raw.normalized("augmented"),
            "norm_no_loops": raw.normalized("symmetric"),
            "augnorm_evaltime": raw.symmetrized().normalized("augmented"),
        }
        for name, matrix in built.items():
            expected = adjacency(tensors, f"{case}.{name}").csr.to_dense()
            torch.testing.assert_close(matrix.csr.to_dense(), expected, rtol=0, atol=1e-12)
            for source, shift in (("dense", 0.0), ("upstream", 1e-5)):
                radius = radii.get(f"rho_{source}_{name}")
                if radius is not None:
                    assert matrix.spectral_radius + shift == pytest.approx(radius, abs=1e-9)


def layer_of(tensors, settings, official=False, local_injection=False):
    m, p = tensors["sd.Omega_1"].shape
    layer = ImplicitGraphLayer(
        p, m, kappa=settings["kappa"], official=official, local_injection=local_injection
    )
    layer.double()
    names = {**NAMES, "bias": "bias"}
    state = {names[k[3:]]: v for k, v in tensors.items() if k.startswith("sd.")}
    layer.load_state_dict({k: v for k, v in state.items() if k in layer.state_dict()})
    return layer


def layer_gradients(layer, features, matrix, radius, cotangent, start=None, **settings):
    """Solve one layer node-major; return (state, gradients by the files' names)."""
    features = features.T.contiguous().requires_grad_()
    f = layer(features, matrix, radius)
    layout = Segments(torch.zeros(len(features), dtype=torch.int64), 1)
    solution = fixed_point(f, f.injection if start is None else start, layout=layout, **settings)
    layer.zero_grad()
    (solution.state * cotangent.T).sum().backward()
    gradients = {"U": features.grad.T}
    for key, name in NAMES.items():
        parameter = getattr(layer, name, None)
        if parameter is not None and parameter.grad is not None:
            gradients[key] = parameter.grad
    return solution.state.detach().T, gradients, f


@pytest.mark.parametrize("stem", files("layer"))
def test_layer_forward(stem):
    tensors, settings = read(stem)
    layer, matrix = layer_of(tensors, settings), adjacency(tensors, "A")
    state, _, f = layer_gradients(
        layer,
        tensors["U"],
        matrix,
        settings["A_rho"],
        tensors["grad_X"],
        solver=EXACT,
        gradient="jfb",
    )
    torch.testing.assert_close(f.weight.detach(), tensors["W_projected"], rtol=0, atol=1e-12)
    torch.testing.assert_close(f.injection.detach().T, tensors["B"], rtol=0, atol=1e-12)
    torch.testing.assert_close(state, tensors["X_star"], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("stem", "label"), [(s, la) for s in files("layer") for la in labels_of(read(s)[0])]
)
def test_layer_gradients(stem, label):
    tensors, settings = read(stem)
    official = label in ("default", "upstream_tight")
    layer, matrix = layer_of(tensors, settings, official), adjacency(tensors, "A")
    name = label
    tolerance = 1e-3 if label == "default" else 1e-8
    if label.startswith("trunc3."):
        name = label.removeprefix("trunc3.")
        features = tensors["U"].T.contiguous()
        f = layer(features, matrix, settings["A_rho"])
        with torch.no_grad():
            start = f(f(f(f.injection)))
        state, gradients = truncated(layer, tensors, matrix, settings, start, gradient_of(name))
        if f"{label}.X" in tensors:
            torch.testing.assert_close(state, tensors[f"{label}.X"], rtol=0, atol=1e-10)
    else:
        _, gradients, _ = layer_gradients(
            layer,
            tensors["U"],
            matrix,
            settings["A_rho"],
            tensors["grad_X"],
            solver=EXACT,
            gradient=gradient_of(name),
        )
    for key, reference in tensors.items():
        if key.startswith(f"{label}.grad."):
            what = key.split(".grad.")[1]
            assert_gradient(gradients[what], reference, tolerance, what)


def truncated(layer, tensors, matrix, settings, start, gradient):
    """The gradient attached to a state that is no equilibrium."""
    features = tensors["U"].T.contiguous().requires_grad_()
    f = layer(features, matrix, settings["A_rho"])
    layout = Segments(torch.zeros(len(features), dtype=torch.int64), 1)
    layout.to_matrix(start)
    state = make_gradient(gradient).attach(_problem(Matrices(f, layout), False, 1), start)
    (state * tensors["grad_X"].T).sum().backward()
    gradients = {"U": features.grad.T}
    for key, name in NAMES.items():
        parameter = getattr(layer, name, None)
        if parameter is not None and parameter.grad is not None:
            gradients[key] = parameter.grad
    return state.detach().T, gradients


def model_of(stem, tensors, settings, **changes):
    state = {key[3:]: value for key, value in tensors.items() if key.startswith("sd.")}
    values = {**read_config(FOLDER / f"{stem}.json"), "spectral_radius": settings["adj_rho"]}
    return build_model(state, {**values, "directed": True, **changes})


def model_inputs(tensors, name="adj"):
    if "features" in tensors:
        features = tensors["features"].T.contiguous()
    else:
        n = int(tensors["features.n"])
        index = torch.stack([tensors["features.row"], tensors["features.col"]])
        features = torch.sparse_coo_tensor(index, tensors["features.val"], (n, n)).coalesce()
    n = features.shape[0]
    index = tensors.get("batch", torch.zeros(n, dtype=torch.int64))
    matrix = adjacency({**tensors, f"{name}.n": torch.tensor([n])}, name)
    return GraphBatch(features, matrix, index, int(index.max()) + 1)


def model_output(model, logits):
    """What upstream's model returns, and the loss's input: log-probabilities of graphs."""
    if isinstance(model, IGNNForGraphClassification):
        return logits.log_softmax(dim=1)
    return logits


def model_loss(model, output, tensors):
    target = tensors["target"]
    chosen = tensors.get("target_idx", torch.arange(len(output)))
    output = output[chosen]
    if len(target) == len(tensors["output"]):
        target = target[chosen]
    if target.is_floating_point():
        return torch.nn.functional.binary_cross_entropy_with_logits(output, target)
    return torch.nn.functional.cross_entropy(output, target)


MODEL_KEYS = [(s, la) for s in files("model") for la in labels_of(read(s)[0])]


@pytest.mark.parametrize(("stem", "label"), MODEL_KEYS)
def test_model(stem, label):
    tensors, settings = read(stem)
    relative = 1e-5 if "chains" in stem else 1e-8
    official = label == "upstream_tight"
    model = model_of(stem, tensors, settings, official=official)
    graphs = model_inputs(tensors)
    if not graphs.features.is_sparse:
        graphs.features.requires_grad_()
    logits = model(graphs, solver=EXACT, gradient=gradient_of(label)).logits
    output = model_output(model, logits)
    torch.testing.assert_close(output.detach(), tensors["output"], rtol=0, atol=relative)
    loss = model_loss(model, output, tensors)
    assert float(loss) == pytest.approx(settings["loss"], rel=relative)
    loss.backward()
    parameters = dict(model.named_parameters())
    n_layers = len(model.config.hidden_sizes)
    checked = 0
    for key, reference in tensors.items():
        if not key.startswith(f"{label}.grad."):
            continue
        name = key.split(".grad.")[1]
        if name == "input":
            value = graphs.features.grad.T
        else:
            value = parameters[deqzoo_name(name, type(model), n_layers)].grad
        assert_gradient(value, reference, relative, name)
        checked += 1
    assert checked > 0


@pytest.mark.parametrize("stem", files("model"))
def test_model_projection(stem):
    tensors, settings = read(stem)
    model = model_of(stem, tensors, settings)
    for number, layer in enumerate(model.implicit_layers, 1):
        expected = tensors[f"projected.ig{number}.W"]
        torch.testing.assert_close(layer.state_weight.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stem", [s for s in files("model") if "output_evaltime_adj" in read(s)[0]])
def test_official_evaluation_adjacency(stem):
    """The `official` switch evaluates graph classifiers with A + A^T, other models do not."""
    tensors, settings = read(stem)
    inputs = model_inputs(tensors)
    rows, columns = inputs.adjacency.index
    edges = inputs.adjacency.index[:, rows != columns]  # loops stem from the normalisation
    arguments = {"x": inputs.features, "edge_index": edges, "batch": inputs.index}
    for official, name in ((True, "output_evaltime_adj"), (False, "output")):
        model = model_of(stem, tensors, settings, official=official)
        logits = model(**arguments, solver=EXACT).logits
        output = model_output(model, logits).detach()
        torch.testing.assert_close(output, tensors[name], rtol=0, atol=1e-8)


TORCHDEQ = [(s, la) for s in files("tdeq") for la in labels_of(read(s)[0])]


@pytest.mark.parametrize(("stem", "label"), TORCHDEQ)
def test_torchdeq_layer(stem, label):
    tensors, settings = read(stem)
    layer = torchdeq_layer(tensors, settings).train()
    matrix = adjacency(tensors, "A")
    gradient, tolerance = IMPLICIT, 1e-8
    if "_ift_" not in label:
        _, steps, damping, mode = label.split("_")
        gradient = {"name": "upg", "steps": int(steps[1:]), "damping": float(damping[1:])}
        tolerance = 1e-2 if mode == "default" else 1e-8
    state, _, f = layer_gradients(
        layer,
        tensors["U"],
        matrix,
        settings["A_rho"],
        tensors["grad_X"],
        solver=EXACT,
        gradient=gradient,
    )
    effective = tensors[f"{label}.W_effective"]
    torch.testing.assert_close(f.weight.detach(), effective, rtol=0, atol=1e-10)
    atol = 1e-2 if label.endswith("default") else 1e-9
    torch.testing.assert_close(state, tensors[f"{label}.X"], rtol=0, atol=atol)
    state_dict = layer.state_dict()
    names = torchdeq_names(layer)
    for key, reference in tensors.items():
        name = key.split(".")[-1]
        if key.startswith(f"{label}.after."):
            torch.testing.assert_close(state_dict[names[name]], reference, rtol=0, atol=1e-10)
        if key.startswith(f"{label}.grad.") and name != "U":
            value = dict(layer.named_parameters())[names[name]].grad
            assert_gradient(value, reference, tolerance, name)


@pytest.mark.parametrize("stem", files("tdeq"))
def test_torchdeq_layer_in_evaluation(stem):
    tensors, settings = read(stem)
    layer = torchdeq_layer(tensors, settings).eval()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with torch.no_grad():
        f = layer(tensors["U"].T.contiguous(), adjacency(tensors, "A"), settings["A_rho"])
        layout = Segments(torch.zeros(len(f.injection), dtype=torch.int64), 1)
        state = fixed_point(f, f.injection, solver=EXACT, layout=layout).state.T
    torch.testing.assert_close(state, tensors["eval_tight.X"], rtol=0, atol=1e-9)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), f"evaluation changed {key}"


def torchdeq_names(layer):
    names = dict(NAMES)
    if layer.norms:
        for i, key in enumerate(NAMES):
            names[f"{key}_orig"] = names[key]
            for part, name in (("g", "gain"), ("u", "left"), ("v", "right")):
                names[f"{key}_{part}"] = f"norms.{i}.{name}"
    return names


def torchdeq_layer(tensors, settings):
    spectral = settings["norm_type"] == "spectral_norm"
    m, p = tensors["sd.Omega_1_orig" if spectral else "sd.Omega_1"].shape
    local = "Omega_2" in settings["injection"]
    layer = ImplicitGraphLayer(
        p, m, local_injection=local, kappa=settings["kappa"], spectral_norm=spectral
    ).double()
    names = torchdeq_names(layer)
    state = {names[k[3:]]: v for k, v in tensors.items() if k.startswith("sd.") and k[3:] in names}
    layer.load_state_dict({k: v for k, v in state.items() if k in layer.state_dict()})
    return layer
