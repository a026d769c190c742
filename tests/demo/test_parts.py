"""Parts of the demo without a server: charts, empty zoo, uploads, limits, and the Space."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

import deqzoo.zoo
from deqzoo import DEQModel, IGNNConfig, IGNNForNodeClassification
from deqzoo.cli import run
from deqzoo.data.pictures import read_picture
from deqzoo.demo import graphs, guard, images, molecules, nodes, text
from deqzoo.demo.app import build_demo
from deqzoo.demo.controls import in_place, menu_label
from deqzoo.demo.guard import Deadline, Gate, guarded
from deqzoo.demo.look import theme
from deqzoo.demo.shelf import GRAPHS, IMAGES, TEXT, LoadedCheckpoint, Shelf, solver_settings
from deqzoo.errors import UserError
from deqzoo.evaluation.chart import page_chart
from deqzoo.evaluation.classify import classify, classify_pixels
from deqzoo.hub.catalogue import Entry
from deqzoo.models.readers import load_processor, load_tokenizer, to_batch


def loaded(folder: Path, read) -> LoadedCheckpoint:
    model = DEQModel.from_pretrained(folder)
    entry = Entry(folder.name, folder, model.config.to_dict(), {})
    return LoadedCheckpoint(entry, model, read(model))


def test_page_without_checkpoints(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(deqzoo.zoo, "checkpoints_root", lambda: tmp_path)
    page = json.dumps(build_demo().get_config_file())
    assert page.count("No checkpoint for") == 5
    for command in (
        "mdeq-tiny-cifar-upg.yaml",
        "deq-transformer-ptb-upg.yaml",
        "ignn-proteins-upg.yaml",
    ):
        assert command in page
    with pytest.raises(UserError, match="train one"):
        Shelf().get(None, TEXT)


def test_shelf_loads_once_and_skips_damage(zoo, monkeypatch) -> None:
    damaged = zoo / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text("{")
    shelf = Shelf()
    try:
        assert shelf.names(IMAGES) == ["mdeq-test"]
        first = shelf.get("mdeq-test", IMAGES)
        assert shelf.get(None, IMAGES) is first
    finally:
        (damaged / "config.json").unlink()
        damaged.rmdir()


def test_residual_chart() -> None:
    residuals = [(1, 1.0), (2, 0.1), (3, float("inf")), (4, 1e-4)]
    options = {"title": "t", "tip": "{x}: {y}", "log_y": True, "level": 1e-3}
    svg = page_chart({"": residuals}, **options)
    assert svg.count("<circle") == 3
    assert "tolerance 0.001" in svg and ">10⁻⁴<" in svg
    heights = [float(part.split('"')[0]) for part in svg.split('cy="')[1:]]
    assert heights[0] < heights[1] < heights[2]
    assert page_chart({"": []}, **options).count("<circle") == 0
    assert page_chart({"": [(1, 0.0)]}, **options).count("<circle") == 1
    shares = page_chart({"<b>": [(1, 0.5), (2, 0.7)]}, title="t", tip="{y}", percent=True, mark=2)
    assert "&lt;b&gt;" in shares and ">75 %<" in shares and "that of step 2" in shares


def test_steps_of_a_solve_lead_to_its_answer(tiny_mdeq) -> None:
    model = loaded(tiny_mdeq, load_processor)
    picture = Image.new("RGB", (50, 40), "orange")
    settings = {"name": "anderson", "max_steps": 40, "tol": 1e-6}
    solve = images.solve_picture(model, picture, settings)
    name, probability = solve.labels[0]
    assert solve.probabilities[name][-1] == pytest.approx(probability, abs=1e-3)
    assert len(solve.residuals) == len(solve.probabilities[name]) == solve.n_steps
    assert solve.model_picture.size == (32, 32)
    assert max(abs(a - b) for a, b in zip(solve.model_picture.getpixel((9, 9)), (255, 165, 0))) <= 1  # noqa: B905
    assert ("Equilibrium found" in images.solve_html(solve)) == solve.converged


def test_answer_badge_and_curve_agree(tiny_mdeq) -> None:
    """Where the nearest state is not the last, the page says whose answer it shows."""
    model = loaded(tiny_mdeq, load_processor)
    solve = images.solve_picture(
        model, Image.new("RGB", (50, 40), "orange"),
        {"name": "fixed_point", "max_steps": 8, "tol": 1e-6},
    )  # fmt: skip
    assert solve.residual == min(solve.residuals)
    name, probability = solve.labels[0]
    assert solve.probabilities[name][solve.answer_step - 1] == pytest.approx(probability, abs=1e-3)
    early = replace(solve, answer_step=2, converged=False)
    shown = images.solve_html(early)
    assert "No equilibrium found" in shown and "that of step <b>2</b>" in shown
    assert shown.count('class="dz-answer"') == 2
    last = images.solve_html(replace(solve, answer_step=solve.n_steps, converged=False))
    assert "Stopped early" in last and "dz-answer" not in last


def test_a_picture_without_a_finite_state_gets_no_answer(overflowing_mdeq) -> None:
    model = loaded(overflowing_mdeq, load_processor)
    picture = Image.new("RGB", (50, 40), "orange")
    with pytest.raises(UserError, match="no answer"):
        images.solve_picture(model, picture, {"name": "anderson", "max_steps": 8, "tol": 1e-3})
    found = classify(model.model, [picture], processor=model.reader)
    shown = images.batch_html([picture], ["orange.png"], found, ["cat"])
    assert "<b>no answer</b>" in shown and "not converged" in shown


def test_molecules_have_all_their_atoms() -> None:
    for name, formula in {
        "celecoxib": {"C": 17, "H": 14, "F": 3, "N": 3, "O": 2, "S": 1},
        "aspirin": {"C": 9, "H": 8, "O": 4},
        "caffeine": {"C": 8, "H": 10, "N": 4, "O": 2},
    }.items():
        atoms, bonds = molecules.read_smiles(molecules.MOLECULES[name])
        assert Counter(atoms) == formula
        rings = len(bonds) - len(atoms) + 1
        assert rings == {"celecoxib": 3, "aspirin": 1, "caffeine": 2}[name]
    with pytest.raises(ValueError, match="cannot read"):
        molecules.read_smiles("C[Na]")


def test_words_of_the_corpus_are_shown_as_people_write(text_folder) -> None:
    shown = text.tokens_html(
        text.ScoredText(
            SimpleNamespace(),
            [text.Token(word, True, 1.0, 3, True) for word in "well @-@ known , did n't".split()],
        )
    )
    plain = unescape(re.sub(r"<[^>]+>", "", shown.split('class="dz-text">')[1]))
    assert plain.strip() == "well-known, didn't"
    assert "not in the vocabulary" not in shown
    assert text.readable("on . = = Music video = = The video") == "on .\n\nMusic video\n\nThe video"


def test_mistakes_stand_in_the_place_of_the_answer() -> None:
    with gr.Blocks():
        answer, details = gr.Label(), gr.HTML()

    def fail() -> None:
        raise UserError("too <large>")

    empty, said = in_place(fail, [answer, details], details)()
    assert empty is None and "Too &lt;large&gt;" in said and 'role="alert"' in said


def test_menu_tells_checkpoints_apart() -> None:
    labels = [
        menu_label(entry) for task in (IMAGES, TEXT, GRAPHS) for entry in Shelf().entries(task)
    ]
    assert len(set(labels)) == len(labels)
    tiny = next(label for label in labels if label.startswith("mdeq-tiny-cifar-upg"))
    assert "on CIFAR-10" in tiny and "159k weights" in tiny
    proteins = Shelf().get("ignn-proteins-upg", GRAPHS).entry
    assert menu_label(proteins) in labels and "no better than" not in menu_label(proteins)
    test = next(e for e in proteins.evaluations.values() if e["data"]["split"] == "test")
    test["results"]["majority"] = test["results"]["accuracy"]
    assert "no better than" in menu_label(proteins)


def test_time_limit(text_folder, monkeypatch) -> None:
    monkeypatch.setattr(text, "Deadline", lambda: Deadline(0.0))
    time.sleep(0.01)
    with pytest.raises(UserError, match="took more than"):
        text.score(loaded(text_folder, load_tokenizer), "the river")


def test_tokens_are_escaped_and_counted(text_folder) -> None:
    model = loaded(text_folder, load_tokenizer)
    scored = text.score(model, 'the <script> "river"\n\nof & .\n')
    words = [token.word for token in scored.tokens]
    assert len(words) == scored.report.tokens and words.count("<eos>") == 3
    page = text.tokens_html(scored)
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert page.count("data-tip=") == len(words)
    assert sum(not token.known for token in scored.tokens) == scored.report.unknown


def test_suggestions_are_the_next_probabilities(text_folder) -> None:
    model = loaded(text_folder, load_tokenizer)
    found = text.next_words(model, "the river", count=5)
    assert [p for _, p in found] == sorted((p for _, p in found), reverse=True)
    assert "<unk>" not in dict(found)
    written = list(text.write(model, "the river", 3, temperature=0))
    first = written[0].text or "<eos>"
    assert found[0][0] in (first, "<eos>")
    assert [len(w.steps) for w in written] == [1, 2, 3]


def test_seeds_are_bounded() -> None:
    assert text.check_seed(-1) is None and text.check_seed(None) is None
    assert text.check_seed(7.0) == 7
    for seed in (2**70, 1.5, float("nan")):
        with pytest.raises(UserError, match="the seed must be a whole number"):
            text.check_seed(seed)


@pytest.mark.parametrize("port", ["99999", "0"])
def test_impossible_ports_are_one_line(port, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["app.py", "--port", port])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(Path(deqzoo.__file__).parents[1] / "app.py"), run_name="__main__")
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"got {port}" in said and len(said.splitlines()) == 1


def test_large_pictures_are_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    Image.new("L", (11, 10)).save(tmp_path / "big.png")
    with pytest.raises(UserError, match="11 × 10"):
        images.open_picture(tmp_path / "big.png")
    with pytest.raises(UserError, match="too many"):
        images.check_count(["x"] * 25)


def test_several_pictures_are_reduced_one_by_one(tiny_mdeq, tmp_path, monkeypatch) -> None:
    reader = loaded(tiny_mdeq, load_processor)
    paths = []
    for number in range(3):
        paths.append(tmp_path / f"{number}.png")
        Image.effect_noise((400, 300), 40 * number + 1).save(paths[-1])
    small, pixels = images.open_pictures(paths, reader)
    whole = [images.open_picture(path) for path in paths]
    assert torch.equal(pixels, to_batch(reader.reader, whole, reader.model))
    assert max(side for picture in small for side in picture.size) <= 96
    found = classify(reader.model, whole, processor=reader.reader)
    assert classify_pixels(reader.model, pixels) == found
    assert images.batch_html(small, ["<a>", "b", "c"], found).count("<img") == 3


def test_contrast_of_buttons_and_labels() -> None:
    """WCAG 2.1, 1.4.3 (AA): 4.5 to 1 for text of usual size, in light and dark mode."""
    look = theme()

    def colour(name: str, mode: str) -> str:
        value = getattr(look, name + mode, None) or getattr(look, name)
        if value.startswith("*"):
            return colour(value[1:], mode)
        return {"white": "#ffffff"}.get(value, value)

    def luminance(value: str) -> float:
        parts = [int(value[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for text_name, ground_name in [
        ("button_primary_text_color", "button_primary_background_fill"),
        ("button_primary_text_color_hover", "button_primary_background_fill_hover"),
        ("checkbox_label_text_color_selected", "checkbox_label_background_fill_selected"),
        ("block_label_text_color", "block_label_background_fill"),
        ("block_title_text_color", "block_title_background_fill"),
        ("block_info_text_color", "block_background_fill"),
    ]:
        for mode in ("", "_dark"):
            pair = [luminance(colour(name, mode)) for name in (text_name, ground_name)]
            assert (max(pair) + 0.05) / (min(pair) + 0.05) >= 4.5, text_name + mode


def test_uploaded_graphs(graph_folder, graph_data, tmp_path) -> None:
    pytest.importorskip("torch_geometric")
    model = loaded(graph_folder, lambda _: None)
    files = sorted((graph_data / "PROTEINS").iterdir())
    graph = graphs.pick(model, graphs.MADE_UP, 0, None, files)
    assert len(graph.x) == 3 and graph.label == 0
    reading = graphs.read_graph(model, graph)
    drawing = graphs.graph_html(graph, reading, graphs.node_kinds(model))
    assert drawing.count("<circle") == 3 and drawing.count("<line") == 3
    assert reading.norms.shape == (3,) and bool((reading.norms > 0).all())
    with pytest.raises(UserError, match="from 0 to 1"):
        graphs.pick(model, graphs.MADE_UP, 2, None, files)
    with pytest.raises(UserError, match="upload the files of one data set"):
        graphs.pick(model, graphs.MADE_UP, 0, None, files[1:])
    copies = [Path(shutil.copy(file, tmp_path)) for file in files]
    for part, line, message in [
        ("node_labels", "2000000000", "make 2000000001 features for each of 5 nodes"),
        ("graph_indicator", "2000000000", "names graph 2000000000"),
    ]:
        path = next(file for file in copies if file.stem.endswith(part))
        text = path.read_text()
        path.write_text(text[:-2] + line + "\n")
        with pytest.raises(UserError, match=message):
            graphs.pick(model, graphs.MADE_UP, 0, None, copies)
        path.write_text(text)
    (tmp_path / "PROTEINS_edge_labels.txt").write_text("2000000000\n" + "0\n" * 7)
    edges = tmp_path / "PROTEINS_edge_labels.txt"
    assert len(graphs.pick(model, graphs.MADE_UP, 1, None, [*copies, edges]).x) == 2
    (tmp_path / "X_A.txt").write_text("a, b\n")
    with pytest.raises(UserError):
        graphs.pick(model, graphs.MADE_UP, 0, None, [tmp_path / "X_A.txt"])
    assert graphs.pick(model, "PROTEINS", 1, graph_data, None).edge_index.shape == (2, 2)


def test_errors_become_messages(caplog) -> None:
    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(gr.Error) as caught:
        guarded(fail)(UserError("no <b> here"))
    assert caught.value.message == "No &lt;b&gt; here"
    with pytest.raises(gr.Error) as caught:
        guarded(fail)(RuntimeError("secret path"))
    assert "secret" not in caught.value.message and "secret path" in caplog.text
    with pytest.raises(UserError, match="the tolerance"):
        solver_settings("anderson", 5, float("nan"))


def test_space_is_uploaded(tmp_path) -> None:
    path = Path(__file__).resolve().parents[1] / "hub" / "hub_double.py"
    spec = importlib.util.spec_from_file_location("hub_double_of_demo", path)
    hub_double = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hub_double)
    server = hub_double.HubDouble()
    environment = os.environ | {
        "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": hub_double.TOKEN, "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    try:
        command = [sys.executable, "-m", "deqzoo", "publish-space", "--repo-id", "org/demo"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        first = server.files("org/demo")
        old = {"deqzoo/gone.py": b"", "graphs/COX2/COX2_A.txt": b"1, 2"}
        server.commit("org/demo", "main", first | old)
        again = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert again.returncode == 0, again.stderr
        files = server.files("org/demo")
    finally:
        server.shutdown()
        server.server_close()
    source = Path(deqzoo.__file__).parent
    assert files["app.py"] == (source.parent / "app.py").read_bytes()
    assert files["deqzoo/cli.py"] == (source / "cli.py").read_bytes()
    assert files["README.md"].startswith(b"---\ntitle:")
    assert not any("__pycache__" in name for name in files)
    assert "deqzoo/gone.py" not in files and "graphs/COX2/COX2_A.txt" in files


def test_space_is_refused_before_anything_is_copied(tmp_path, monkeypatch, capsys) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    folder = tmp_path / "space"
    dry_run = ["--dry-run", str(folder)]
    assert run(["publish-space", "--repo-id", "a b", *dry_run]) == 2
    assert "write ORG/NAME" in capsys.readouterr().err
    inside = Path(deqzoo.__file__).parent / "demo" / "space"  # which a copy would copy for ever
    assert run(["publish-space", "--repo-id", "org/demo", "--dry-run", str(inside)]) == 2
    assert "holds a copy of" in capsys.readouterr().err and not inside.exists()
    monkeypatch.setattr("deqzoo.demo.space.version", missing)
    assert run(["publish-space", "--repo-id", "org/demo", *dry_run]) == 2
    assert "needs Gradio" in capsys.readouterr().err and not folder.exists()


def test_space_runs_from_its_own_folder(tmp_path, capsys) -> None:
    folder = tmp_path / "space"
    assert run(["publish-space", "--repo-id", "org/demo", "--dry-run", str(folder)]) == 0
    assert "org/demo" in capsys.readouterr().out
    head = (folder / "README.md").read_text().split("---")[1]
    assert f"sdk_version: {gr.__version__}" in head and "app_file: app.py" in head
    assert any(line.startswith("torch>=") for line in (folder / "requirements.txt").open())
    listed = {path.name for path in (folder / "deqzoo" / "hub_configs").glob("*")}
    assert listed == set(deqzoo.list_models())
    script = "import app, deqzoo; from deqzoo.demo.app import build_demo; build_demo(app.PICTURES)"
    script += "; print(deqzoo.__file__, deqzoo.list_models())"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(folder)},
    )  # fmt: skip
    assert str(folder) in done.stdout and str(deqzoo.list_models()) in done.stdout
    assert run(["publish-space", "--repo-id", "org/demo", "--dry-run", str(folder)]) == 2
    assert "not an empty folder" in capsys.readouterr().err


def _inside(gate: Gate) -> int:
    """Requests that wait or work."""
    return sum(gate._clients.values())


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def node_model(config: dict[str, Any]) -> LoadedCheckpoint:
    torch.manual_seed(0)
    model = IGNNForNodeClassification(IGNNConfig(**config)).eval()
    return LoadedCheckpoint(
        Entry("node-test", Path("node-test"), model.config.to_dict(), {}), model, None
    )


def test_a_change_at_a_node_is_followed_through_the_network() -> None:
    """On a chain, by distance, as two calls of the model have it; two layers would end at two."""
    chosen = node_model({"num_features": 6, "hidden_sizes": [8], "num_labels": 3})
    network = nodes.pick(chosen, nodes.CHAIN, None)
    found = nodes.reach(chosen, network, 3)
    assert found.distance.tolist() == [abs(i - 3) for i in range(40)] and found.converged
    x = network.x.clone()
    x[3] = 0
    exact = {"tol": 1e-9, "max_steps": 400}
    with torch.inference_mode():
        before, after = (
            chosen.model(
                y, network.edge_index, output_hidden_states=True, solver=exact
            ).hidden_states[-1]
            for y in (network.x, x)
        )
    expected = (after - before).norm(dim=1) / before.norm(dim=1)
    torch.testing.assert_close(found.change, expected, rtol=1e-3, atol=1e-6)
    far = int(found.distance[found.change > nodes.UNMOVED].max())
    assert 2 < far < 36
    said = nodes.verdict_html(network, found, 3)
    assert f"up to <b>{far}</b> edges away" in said and "drawn at random" in said
    drawn = nodes.network_html(network, found, 3)
    assert drawn.count("<circle") == 40 and drawn.count("dz-ringed") == 1
    assert "node 3, 0 edges away" in drawn.split("dz-ringed")[1][:60]
    assert nodes.distance_html(found).count("<circle") == 36
    with pytest.raises(UserError, match="from 0 to 39"):
        nodes.reach(chosen, network, 40)


def test_a_network_of_this_machine_is_read_with_its_labels(tmp_path: Path) -> None:
    """A path of three proteins and one without a partner; labels of each, and the wrong width."""
    pytest.importorskip("torch_geometric")
    (tmp_path / "HumLoc").mkdir()
    np.savez(
        tmp_path / "HumLoc" / "humloc.npz", x=np.eye(4, 6, dtype=np.float32),
        edge_index=np.array([[0, 1], [1, 2]]), y=np.array([[0, 1], [1, 1], [0, 0], [1, 0]]),
        train_idx=[0], val_idx=[1], test_idx=[2, 3],
    )  # fmt: skip
    assert nodes.available_networks(tmp_path) == [nodes.CHAIN, nodes.CLUB, "HumLoc"]
    many = {"num_labels": 2, "problem_type": "multi_label_classification"}
    chosen = node_model({"num_features": 6, "hidden_sizes": [8], **many})
    network = nodes.pick(chosen, "HumLoc", tmp_path)
    said = nodes.verdict_html(network, nodes.reach(chosen, network, 1), 1)
    assert "of the 2 other nodes" in said and "the data set: labels 0, 1." in said
    alone = nodes.reach(chosen, network, 3)
    assert "has no edges" in nodes.verdict_html(network, alone, 3)
    assert nodes.distance_html(alone) == ""
    other = node_model({"num_features": 5, "hidden_sizes": [8], **many})
    with pytest.raises(UserError, match="have 6 features, but node-test reads 5"):
        nodes.pick(other, "HumLoc", tmp_path)
    with pytest.raises(UserError, match="available here: chain of 40"):
        nodes.pick(other, "../HumLoc", tmp_path)


@pytest.mark.parametrize(
    ("stop", "answer"), [("batch-stop", "batch-answers"), ("write-stop", "write-output")]
)
def test_stop_ends_whatever_fills_the_answer(stop: str, answer: str) -> None:
    config = build_demo(Path(deqzoo.__file__).parents[1] / "examples" / "pictures").config
    numbers = {c["props"].get("elem_id"): c["id"] for c in config["components"]}
    cancels = {
        number
        for event in config["dependencies"]
        if [numbers[stop], "click"] in [list(target) for target in event["targets"]]
        for number in event["cancels"]
    }
    filling = {e["id"] for e in config["dependencies"] if numbers[answer] in e["outputs"]}
    assert filling and cancels == filling


def test_the_gate_serves_clients_in_turn() -> None:
    gate, order, full = Gate(1, per_client=3, per_endpoint=5, waiting=5), [], []

    def ask(client: str) -> None:
        with gate.enter(client, "graph"):
            order.append(client)
            time.sleep(0.05)

    def start(client: str) -> threading.Thread:
        thread = threading.Thread(target=ask, args=(client,))
        before = _inside(gate)
        thread.start()
        _until(lambda: _inside(gate) > before)
        return thread

    with gate.enter("first", "graph"):
        threads = [start(client) for client in ("greedy", "greedy", "greedy", "second")]
        for client in ("greedy", "third", "fourth"):
            try:
                with gate.enter(client, "graph"):
                    pass
            except UserError as error:
                full.append(str(error))
            else:
                raise AssertionError
            if client == "greedy":
                threads.append(start("third"))
                assert "not answered yet" in full[0]
    for thread in threads:
        thread.join(timeout=300)
    assert order == ["greedy", "second", "third", "greedy", "greedy"]
    assert all("too many people" in said for said in full[1:])
    with gate.enter("greedy", "graph"):  # nobody is counted any more
        assert gate._clients == {"greedy": 1} and not gate._queues


def test_a_request_that_was_given_up_leaves_the_queue(monkeypatch) -> None:
    gate = Gate(1, per_client=2, per_endpoint=5, waiting=5)
    with gate.enter("one", "graph"):
        token = guard._REQUEST.set((time.monotonic(), lambda: False))
        with pytest.raises(UserError, match="nobody waits"), gate.enter("two", "graph"):
            pass
        guard._REQUEST.reset(token)
        token = guard._REQUEST.set((time.monotonic() - 100, lambda: True))
        with pytest.raises(UserError, match="took more than"), gate.enter("two", "graph"):
            pass
        guard._REQUEST.reset(token)
    with gate.enter("two", "graph"):
        assert gate._clients == {"two": 1}


@pytest.mark.parametrize("workers", [2, 3])
def test_no_endpoint_has_all_workers_while_another_is_asked_for(workers: int) -> None:
    gate, order, threads = Gate(workers, per_client=9, per_endpoint=3, waiting=5), [], []
    done = threading.Event()

    def ask(client: str, endpoint: str) -> None:
        with gate.enter(client, endpoint):
            order.append(endpoint)
            done.wait(300)

    def start(client: str, endpoint: str) -> None:
        threads.append(threading.Thread(target=ask, args=(client, endpoint)))
        before = _inside(gate)
        threads[-1].start()
        _until(lambda: _inside(gate) > before)

    with gate.enter("else", "graph"):
        for client in "abcde"[: workers + 1]:  # the last two wait: one worker is busy with a graph
            start(client, "generate")
        start("f", "classify")
        _until(lambda: len(order) >= workers - 1)
        assert order == ["generate"] * (workers - 1)
    _until(lambda: len(order) >= workers)
    assert order == ["generate"] * (workers - 1) + ["classify"]
    start("g", "generate")
    with pytest.raises(UserError, match="too many people"), gate.enter("h", "generate"):
        pass
    done.set()
    for thread in threads:
        thread.join(timeout=300)
    assert len(order) == len(threads)


def test_several_pictures_by_any_solver_and_of_any_depth(tiny_mdeq, tmp_path) -> None:
    """Settings of the model's own solver are none of another's; 16 bits are scaled down, too."""
    pictures = loaded(tiny_mdeq, load_processor)
    pictures.model.set_solver({"name": "anderson", "window": 4, "max_steps": 8})
    deep = Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16)
    assert deep.mode == "I;16" and images.thumbnail(deep).mode == "RGB"
    batch = to_batch(pictures.reader, [Image.new("RGB", (50, 40), "orange"), deep], pictures.model)
    for name in ("broyden", "fixed_point", "anderson"):
        results = images.solve_batch(pictures, batch, {"name": name, "max_steps": 5, "tol": 1e-3})
        assert len(results) == 2
    deep.resize((5000, 4000)).save(tmp_path / "deep.png")
    assert max(images.open_picture(tmp_path / "deep.png").size) < 5000


def test_work_that_nobody_waits_for_ends(text_folder, tiny_mdeq) -> None:
    """Perplexity, writing and pictures alike, in the middle."""
    texts, pictures = loaded(text_folder, load_tokenizer), loaded(tiny_mdeq, load_processor)
    picture = Image.new("RGB", (50, 40), "orange")
    batch = to_batch(pictures.reader, [picture] * 3, pictures.model)
    settings = {"name": "anderson", "max_steps": 40, "tol": 0.0}
    for work in (
        lambda: text.score(texts, "the river " * 200),
        lambda: list(text.write(texts, "the river", 200)),
        lambda: images.solve_picture(pictures, picture, settings),
        lambda: images.solve_batch(pictures, batch, settings),
    ):
        asked = []
        wanted = lambda asked=asked: asked.append(1) or len(asked) < 3  # noqa: E731
        token = guard._REQUEST.set((time.monotonic(), wanted))
        with pytest.raises(UserError, match="nobody waits"):
            work()
        guard._REQUEST.reset(token)
        assert len(asked) == 3


@pytest.mark.parametrize(
    ("mode", "size"),
    [("RGB", (300_000, 1)), ("1", (7000, 7000)), ("P", (1, 50_000)), ("L", (20_000, 2_000))],
)
def test_huge_pictures_are_cut_before_anything_else(tmp_path, tiny_mdeq, mode, size) -> None:
    path = tmp_path / "huge.png"
    Image.new(mode, size).save(path)
    opened = images.open_picture(path)
    assert opened.width * opened.height < 4 * guard.ENOUGH_PIXELS
    assert max(opened.size) <= guard.MAX_ASPECT * min(opened.size)
    model = loaded(tiny_mdeq, load_processor)
    assert to_batch(model.reader, [opened], model.model).shape == (1, 3, 32, 32)


def test_cutting_keeps_the_answer_of_large_pictures(tmp_path, tiny_mdeq) -> None:
    """Of a picture of 20 million pixels, turned by its camera."""
    picture = Image.linear_gradient("L").resize((5000, 4000)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "large.png", exif=exif)
    model = loaded(tiny_mdeq, load_processor)
    cut = images.open_picture(tmp_path / "large.png")
    assert cut.width * cut.height < 10_000_000
    whole = read_picture(tmp_path / "large.png")
    mine, theirs = (to_batch(model.reader, [one], model.model) for one in (cut, whole))
    assert (mine - theirs).abs().max() < 0.05


def test_messages_name_no_folder_of_the_server(tiny_mdeq, tmp_path, monkeypatch) -> None:
    zoo = tmp_path / "hub_configs"
    folder = Path(shutil.copytree(tiny_mdeq, zoo / "mdeq-broken"))
    (folder / "model.safetensors").write_bytes(b"broken")
    monkeypatch.setattr(deqzoo.zoo, "checkpoints_root", lambda: zoo)
    with pytest.raises(UserError) as caught:
        Shelf().get("mdeq-broken", IMAGES)
    assert "mdeq-broken" in str(caught.value) and str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("closed", [False, True])
def test_a_chain_and_a_ring_do_not_cross_themselves(closed: bool) -> None:
    n = 40
    ends = np.stack([np.arange(n), (np.arange(n) + 1) % n])[:, : n if closed else n - 1]
    place = graphs.positions(n, np.concatenate([ends, ends[::-1]], axis=1))
    assert place.min() >= 0 and place.max() <= 1

    def side(a: int, b: int, c: int) -> bool:
        (ax, ay), (bx, by), (cx, cy) = place[[a, b, c]]
        return (bx - ax) * (cy - ay) > (by - ay) * (cx - ax)

    for a, b in ends.T:
        for c, d in ends.T:
            if len({a, b, c, d}) == 4:
                crossing = side(a, b, c) != side(a, b, d) and side(c, d, a) != side(c, d, b)
                assert not crossing, (a, b, c, d)


def test_graphs_without_edges_have_places() -> None:
    for n in (1, 2, 3):
        place = graphs.positions(n, np.zeros((2, 0), dtype=int))
        assert place.shape == (n, 2) and np.isfinite(place).all()
        assert len({tuple(row) for row in place.round(3).tolist()}) == n
