"""The API's endpoints against the library, their limits, and many users at once."""

from __future__ import annotations

import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from deqzoo import DEQModel
from deqzoo.data.pictures import read_picture
from deqzoo.data.text import UNKNOWN
from deqzoo.evaluation.classify import classify
from deqzoo.evaluation.perplexity import perplexity
from deqzoo.models.deq_transformer.tokenization_deq_transformer import detokenize
from deqzoo.models.readers import load_tokenizer

PICTURE = Path(__file__).resolve().parents[2] / "examples" / "pictures" / "chelsea.png"
TEXT = "The river and the city .\n\nA zyxwv band , in the north"


@pytest.fixture(scope="module")
def client(served) -> Client:
    return Client(served.url, verbose=False)


def refusal(client: Client, *arguments: Any, **named: Any) -> str:
    with pytest.raises(AppError) as caught:
        client.predict(*arguments, **named)
    assert "Traceback" not in str(caught.value)
    return str(caught.value)


def test_classify_is_the_library(client, served, monkeypatch) -> None:
    monkeypatch.setenv("DEQZOO_PLAIN_INFERENCE", "1")
    label, report = client.predict(handle_file(PICTURE), api_name="/classify")
    model = DEQModel.from_pretrained(served.zoo / served.image)
    (expected,) = classify(model, [read_picture(PICTURE)])
    assert label["label"] == expected.labels[0][0]
    shown = [(c["label"], c["confidence"]) for c in label["confidences"][:5]]
    assert [name for name, _ in shown] == [name for name, _ in expected.labels]
    for (_, found), (_, wanted) in zip(shown, expected.labels, strict=True):
        assert found == pytest.approx(wanted, rel=1e-3)
    assert report["n_steps"] == expected.n_steps == len(report["residuals"])
    assert report["converged"] == expected.converged
    assert min(report["residuals"]) == pytest.approx(report["residual"])


def test_solver_options_reach_the_solver(client) -> None:
    _, short = client.predict(handle_file(PICTURE), max_steps=2, api_name="/classify")
    assert short["n_steps"] == 2
    settings = {"tolerance": 1e-6, "max_steps": 7, "api_name": "/classify"}
    _, one = client.predict(handle_file(PICTURE), solver="fixed_point", **settings)
    _, other = client.predict(handle_file(PICTURE), solver="broyden", **settings)
    assert one["residuals"] != other["residuals"]


@pytest.mark.parametrize(
    "named, message",
    [
        ({"max_steps": 0}, "budget"),
        ({"max_steps": 1e9}, "budget"),
        ({"tolerance": -1}, "tolerance"),
        ({"solver": "newton"}, "unknown solver"),
        ({"checkpoint": "/etc"}, "unknown checkpoint"),
    ],
)
def test_classify_refuses_settings(client, named, message) -> None:
    said = refusal(client, handle_file(PICTURE), api_name="/classify", **named)
    assert message in said.lower()


def test_classify_refuses_other_files(client, tmp_path) -> None:
    file = tmp_path / "words.png"
    file.write_text("not a picture")
    said = refusal(client, handle_file(file), api_name="/classify")
    assert said == "words.png is no picture that can be read"
    assert "no picture yet" in refusal(client, None, api_name="/classify")


def test_large_files_are_refused(client, tmp_path) -> None:
    file = tmp_path / "large.png"
    file.write_bytes(bytes(21 * 10**6))
    with pytest.raises(Exception, match="(?i)size"):
        client.predict(handle_file(file), api_name="/classify")


def test_perplexity_is_the_library(client, served) -> None:
    found = client.predict(TEXT, api_name="/perplexity")
    model = DEQModel.from_pretrained(served.zoo / served.text)
    expected = perplexity(model, TEXT.split("\n"), load_tokenizer(model)).to_dict()
    for name in ("perplexity", "bits_per_character", "unknown_share", "tokens", "characters"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3), name
    assert len(found["surprisal"]) == found["tokens"]
    mean = sum(nats for _, nats in found["surprisal"]) / found["tokens"]
    assert math.exp(mean) == pytest.approx(found["perplexity"], rel=1e-6)


@pytest.mark.parametrize("endpoint", ["/perplexity", "/generate"])
def test_texts_are_limited(client, endpoint) -> None:
    assert "empty" in refusal(client, "  \n ", api_name=endpoint)
    said = refusal(client, "word " * 2_000_000, api_name=endpoint)
    assert "10,000,000 characters" in said and "20,000" in said


def test_generate_is_the_library(client, served) -> None:
    text, report = client.predict("The river and the", 8, 0, api_name="/generate")
    model = DEQModel.from_pretrained(served.zoo / served.text)
    tokenizer = load_tokenizer(model)
    vocabulary = tokenizer.get_vocab()
    words = "<eos> The river and the".split()
    ids = torch.tensor([[vocabulary.get(w, vocabulary[UNKNOWN]) for w in words]])
    expected = model.generate(
        ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=True,
        suppress_tokens=[vocabulary[UNKNOWN]], eos_token_id=None,
        attention_mask=torch.ones_like(ids),  # else the first <eos> is taken for padding
    )  # fmt: skip
    new = tokenizer.convert_ids_to_tokens(expected[0, ids.shape[1] :].tolist())
    assert text == detokenize(" ".join(new))
    assert len(report["n_steps"]) == 8


def test_generate_follows_its_seed_and_limits(client) -> None:
    draw = {"length": 12, "temperature": 1.5, "api_name": "/generate"}
    one = client.predict("The river", seed=1, **draw)
    assert one == client.predict("The river", seed=1, **draw)
    assert one != client.predict("The river", seed=2, **draw)
    said = refusal(client, "The river", seed=2**70, api_name="/generate")
    assert said.startswith("The seed must be a whole number from -1 to 9007199254740992")
    assert "1 to 200" in refusal(client, "The river", 201, api_name="/generate")
    assert "temperature" in refusal(client, "The river", 5, -1, api_name="/generate")


def test_graph_endpoint(client, served) -> None:
    found = client.predict(0, api_name="/graph")
    assert sum(found["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert len(found["norms"]) > 3 and found["n_steps"] >= 1
    said = refusal(client, 1000, api_name="/graph")
    told = re.search(r"graph number .* from 0 to (\d+), got 1000", said)
    assert told and client.predict(int(told[1]), api_name="/graph")["probabilities"]
    assert f"got {int(told[1]) + 1}" in refusal(client, int(told[1]) + 1, api_name="/graph")
    assert "available here" in refusal(client, 0, "Karate", api_name="/graph")


def test_readme_example_runs(served, monkeypatch) -> None:
    readme = (PICTURE.parents[2] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```py\n(.*?)```", readme, flags=re.DOTALL)
    monkeypatch.chdir(PICTURE.parents[2])
    names: dict[str, Any] = {}
    exec(example.replace("http://127.0.0.1:7860", served.url), names)
    assert names["label"]["label"] and names["report"]["n_steps"] > 0


def test_ten_users_at_once(client, served, tmp_path) -> None:
    """Half of them make mistakes; nobody gets another one's answer or error."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG")
    texts = [f"The river and the city {'of the sea ' * i}." for i in range(5)]
    expected = [client.predict(text, api_name="/perplexity") for text in texts]

    def use(user: int) -> Any:
        own = Client(served.url, verbose=False)
        try:
            if user % 2:
                return own.predict(handle_file(broken), api_name="/classify")
            return own.predict(texts[user // 2], api_name="/perplexity")
        except AppError as error:
            return str(error)

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(use, range(10)))
    assert [a["perplexity"] for a in answers[::2]] == [e["perplexity"] for e in expected]
    assert all("broken.png" in answer for answer in answers[1::2])


def test_answers_carry_security_headers(served) -> None:
    for path in ("/", "/gradio_api/info", "/nowhere"):
        headers = httpx.get(served.url + path, timeout=60).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "SAMEORIGIN"
        assert "frame-ancestors 'self'" in headers["content-security-policy"]
    evil = httpx.get(served.url, headers={"Host": "evil.example"}, timeout=60)
    assert evil.status_code == 400
