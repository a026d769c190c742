"""Taking a run into the zoo."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from killing import kills

from deqzoo import DEQModel, UserError, list_models
from deqzoo.cli import run
from deqzoo.data.own import RECORD
from deqzoo.hub import store
from deqzoo.hub.catalogue import entries
from deqzoo.hub.integrity import check_checksums, check_golden, seal
from deqzoo.hub.verify import verify_model


@pytest.fixture
def finished(tiny_mdeq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder, and an empty zoo to store it in."""
    folder = tmp_path / "run"
    shutil.copytree(tiny_mdeq, folder / "model")
    (folder / "record.json").write_text(
        json.dumps(
            {"finished": True, "recipe": {"name": "mdeq-new"}, "pflop": 0.5, "seconds": 7200.0}
        )
    )
    (tmp_path / "hub_configs").mkdir()
    for module in ("deqzoo.zoo", "deqzoo.hub.store"):
        monkeypatch.setattr(f"{module}.checkpoints_root", lambda: tmp_path / "hub_configs")
    return folder


def test_a_stored_run_verifies(
    finished: Path, cifar_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The stand-in is untrained and need not be stable.
    assert run(["store", str(finished), "--data", str(cifar_folder), "--force"]) == 0
    folder = finished.parent / "hub_configs" / "mdeq-new"
    stored = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {
        "evaluation/cifar10-test.json",
        "evaluation/cifar10-validation.json",
        "training.json",
        "golden.json",
        "SHA256SUMS",
    } <= stored
    assert verify_model("mdeq-new") == []
    assert "0.5" in (folder / "training.json").read_text()
    with pytest.raises(UserError, match="--force"):
        store.store_run(finished, cifar_folder)


def test_a_run_on_data_with_one_hold_out(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its test split decides, since there is no other."""
    asked = []

    def evaluate(model: object, name: str, *, split: str, data: object) -> dict[str, object]:
        asked.append(split)
        raise UserError("enough")

    monkeypatch.setattr(store, "evaluate_model", evaluate)
    for record, first in (
        ({"train": ["a"]}, "test"),
        ({"train": ["a"], "validation": ["b"], "one_hold_out": True}, "test"),
        ({"train": ["a"], "validation": ["b"], "one_hold_out": False}, "validation"),
        ({"train": "a", "validation": 0, "stored": {"validation": "b"}}, "validation"),
    ):
        (finished / "model" / RECORD).write_text(json.dumps(record))
        with pytest.raises(UserError, match="enough"):
            store.store_run(finished, None)
        assert asked.pop() == first


@pytest.mark.parametrize("name", ["..", ".", "../other", "a/b", ".hidden", "--force"])
def test_no_name_leads_out_of_the_zoo(finished: Path, name: str) -> None:
    """`--force` would replace whatever it leads to: the folder of all checkpoints, say."""
    with pytest.raises(UserError, match="--name"):
        store.store_run(finished, None, name=name, force=True)
    assert (finished.parent / "hub_configs").is_dir() and finished.is_dir()


def test_a_model_in_the_working_folder_has_its_name(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir((finished / "model").rename(finished.parent / "mine"))
    (finished.parent / "hub_configs" / "mine").mkdir()
    with pytest.raises(UserError, match="hub_configs/mine exists"):
        store.store_run(Path("."), None)


def test_unstable_models_are_refused_before_the_test_split(
    finished: Path, cifar_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def evaluate(model, name, *, split, data):
        measured.append(split)
        return evaluation(residual=0.5)

    monkeypatch.setattr("deqzoo.hub.store.evaluate_model", evaluate)
    with pytest.raises(UserError, match="no stable equilibrium"):
        store.store_run(finished, cifar_folder)
    assert measured == ["validation"]
    assert not list((finished.parent / "hub_configs").iterdir())


def test_the_test_split_refuses_nothing(
    finished: Path, cifar_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(model, name, *, split, data):
        return evaluation(residual=0.5 if split == "test" else 1e-3)

    monkeypatch.setattr("deqzoo.hub.store.evaluate_model", evaluate)
    folder = store.store_run(finished, cifar_folder)
    assert (folder / "evaluation" / "cifar10-test.json").is_file()


def evaluation(
    residual: float | None = 1e-3, last: float = 0.85, metric: str = "accuracy", own: float = 0.85
) -> dict:
    return {
        "metric": metric,
        "data": {"name": "cifar10"},
        "results": {} if residual is None else {"residual_median": residual},
        "budget": {"default": own, "steps": [{"max_steps": 30, metric: last}]},
    }


def test_instabilities() -> None:
    assert store.instabilities(evaluation()) == []
    assert "above 5e-03" in store.instabilities(evaluation(residual=6e-3))[0]
    assert "above" in store.instabilities(evaluation(residual=float("nan")))[0]
    assert "accuracy after 30 steps" in store.instabilities(evaluation(last=0.84))[0]
    assert store.instabilities(evaluation(last=0.852)) == []
    for share, faults in ((0.98, 1), (0.99, 0)):
        content = evaluation()
        content["results"]["converged_share"] = share
        assert len(store.instabilities(content)) == faults
    # The difference of these comes out above 0.003.
    assert store.instabilities(evaluation(last=0.862, own=0.865)) == []


def test_the_zoo_converges_within_its_default_budgets() -> None:
    """Of every figure measured with the budget that the checkpoint has now."""
    shares = {
        entry.name: file["results"]["converged_share"]
        for entry in entries()
        for file in entry.tests()
        if "converged_share" in file["results"]
        and file["model"]["solver"]["max_steps"] == entry.config["solver"]["max_steps"]
    }
    assert len(shares) >= 7
    assert min(shares.values()) >= store.MIN_CONVERGED, shares


def test_a_kill_while_storing_leaves_the_old_or_the_new_checkpoint(
    finished: Path, cifar_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step on the file system, with --force over an earlier checkpoint."""
    monkeypatch.setattr(
        "deqzoo.hub.store.evaluate_model", lambda model, name, *, split, data: evaluation()
    )
    folder = store.store_run(finished, cifar_folder)
    record = finished / "record.json"

    def prepare() -> None:
        record.write_text(json.dumps({"finished": True, "recipe": {"name": "mdeq-new"}, "of": 1}))
        store.store_run(finished, cifar_folder, force=True)
        record.write_text(json.dumps({"finished": True, "recipe": {"name": "mdeq-new"}, "of": 2}))

    seen = []
    for _ in kills(
        lambda: store.store_run(finished, cifar_folder, force=True), folder.parent, prepare
    ):
        assert list_models() == ["mdeq-new"] and check_checksums(folder) == []
        seen.append(json.loads((folder / "training.json").read_text())["of"])
    assert seen == sorted(seen) and set(seen) == {1, 2}


def test_a_kill_while_sealing_leaves_a_seal_that_holds(
    tiny_mdeq: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_mdeq, tmp_path / "mdeq-test"))
    model = DEQModel.from_pretrained(folder)

    def prepare() -> None:
        for name in ("golden.json", "SHA256SUMS"):
            (folder / name).unlink(missing_ok=True)

    for _ in kills(lambda: seal(folder), folder, prepare):
        if (folder / "SHA256SUMS").exists():
            assert check_checksums(folder) == [] and check_golden(folder, model) == []
    # Sealing what is sealed touches nothing, so that a kill cannot part seal and prediction.
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert run(["seal", str(folder)]) == 0
    assert "sealed already" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("metric", ["auc", "micro_f1"])
def test_graphs_are_held_to_the_same(metric: str) -> None:
    assert store.instabilities(evaluation(metric=metric)) == []
    (fault,) = store.instabilities(evaluation(metric=metric, last=0.84))
    assert "after 30 steps differs" in fault


def test_perplexities_are_compared_by_their_ratio() -> None:
    assert store.instabilities(evaluation(metric="perplexity", own=100.0, last=100.2)) == []
    (fault,) = store.instabilities(evaluation(metric="perplexity", own=100.0, last=101.0))
    assert "perplexity after 30 steps differs by 1.00%" in fault
    (fault,) = store.instabilities(evaluation(metric="perplexity", own=100.0, last=float("nan")))
    assert "perplexity" in fault


def test_what_was_not_measured_is_a_fault() -> None:
    (fault,) = store.instabilities(evaluation(residual=None))
    assert "residual was not measured" in fault
    (fault,) = store.instabilities(evaluation() | {"budget": None})
    assert "more solver steps was not measured" in fault
