"""Behaviour of the DEQ-Transformer: causality, memory, cache, loading, options."""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from deqzoo.errors import UserError
from deqzoo.models.deq_transformer import (
    DEQTransformerCache,
    DEQTransformerConfig,
    DEQTransformerForCausalLM,
    DEQTransformerModel,
)
from deqzoo.models.deq_transformer.inputs import check_labels, check_tokens
from deqzoo.models.deq_transformer.layers import draw_masks

TIGHT = {"tol": 1e-12, "max_steps": 400}


def tiny_config(**changes: object) -> DEQTransformerConfig:
    settings = {
        "vocab_size": 60,
        "d_model": 32,
        "d_embed": 32,
        "n_head": 4,
        "d_inner": 48,
        "cutoffs": [15, 35],
        "div_val": 2,
        "mem_len": 8,
        "local_size": 9,
        "eos_token_id": None,
    }
    return DEQTransformerConfig(**(settings | changes))


def lively_model(
    gain: float = 1.0, dtype: torch.dtype = torch.float64, **changes: object
) -> DEQTransformerForCausalLM:
    """A model with weights as large as training makes them; ``gain`` scales the block."""
    torch.manual_seed(0)
    model = DEQTransformerForCausalLM(tiny_config(**changes)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embedding" in name or "lm_head" in name:
                parameter.normal_(0, 0.3)
            elif name.endswith("gain"):
                parameter.mul_(gain)
            elif "transformer.injection" in name:
                parameter.normal_(0, 0.15)
            elif name.endswith("_bias"):
                parameter.normal_(0, 0.2)
    return model


def random_ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("placement", ["post", "pre"])
@pytest.mark.parametrize("solver", ["anderson", "fixed_point", "broyden"])
@pytest.mark.parametrize(("tol", "max_steps"), [(0.3, 30), (1e-2, 7), (1e-4, 60), (1e-9, 12)])
@pytest.mark.parametrize("gain", [0.7, 2.0])
@torch.no_grad()
def test_no_leak(placement: str, solver: str, tol: float, max_steps: int, gain: float) -> None:
    # A map that does not contract blows rounding up: where words of other clusters, or sequences
    # that leave the batch earlier, change the shapes of products.
    batch, div_val = (3, 2) if gain < 1 else (1, 1)
    model = lively_model(gain, norm_placement=placement, div_val=div_val)
    settings = {"name": solver, "tol": tol, "max_steps": max_steps}
    ids = random_ids(batch, 24)
    reference = model(ids, solver=settings).logits
    changed = ids.clone()
    changed[:, 13:] = random_ids(batch, 11, seed=2)
    logits = model(changed, solver=settings).logits
    assert (logits[:, :13] - reference[:, :13]).abs().max() < 1e-9
    assert (logits[:, 13:] - reference[:, 13:]).abs().max() > 1e-3
    if gain < 1:  # a map that does not contract blows rounding up when shapes differ
        shorter = model(ids[:, :14], solver=settings).logits
        assert (shorter - reference[:, :14]).abs().max() < (1e-9 if solver == "anderson" else 1e-8)


@torch.no_grad()
def test_whole_sequence_solver_leaks() -> None:
    model = lively_model(causal=False)
    ids = random_ids(2, 24)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 60
    settings = {"tol": 1e-2}
    difference = model(ids, solver=settings).logits - model(changed, solver=settings).logits
    assert difference[:, :-1].abs().max() > 1e-6


@torch.no_grad()
def test_rows_do_not_matter_to_each_other() -> None:
    model = lively_model()
    ids = random_ids(3, 20)
    together = model(ids, solver={"tol": 1e-2})
    alone = model(ids[1:2], solver={"tol": 1e-2})
    assert (together.logits[1:2] - alone.logits).abs().max() < 1e-9
    assert together.n_steps[1] == alone.n_steps[0]
    assert together.n_steps.shape == together.residual.shape == together.converged.shape == (3,)
    assert together.token_steps.shape == (3, 20)


@pytest.mark.parametrize("cuts", [[1] * 24, [5, 5, 14], [23, 1]])
@torch.no_grad()
def test_segmentation_does_not_matter(cuts: list[int]) -> None:
    """With a memory that covers the window, at equilibrium."""
    model = lively_model(mem_len=8, local_size=9)
    ids = random_ids(2, 24)
    whole = model(ids, solver=TIGHT)
    memory, cache, by_memory, by_cache = None, DEQTransformerCache(9), [], []
    for piece in ids.split(cuts, dim=1):
        output = model(piece, memory=memory, solver=TIGHT)
        memory = output.memory
        by_memory.append(output.logits)
        by_cache.append(model(piece, cache=cache, solver=TIGHT).logits)
    assert (torch.cat(by_memory, 1) - whole.logits).abs().max() < 1e-8
    assert (torch.cat(by_cache, 1) - whole.logits).abs().max() < 1e-8
    assert cache.get_seq_length() == 24
    assert cache.layer.keys.shape[2] == 8


@torch.no_grad()
def test_cache_under_its_old_name() -> None:
    """Before transformers 5.24 callers and generation say `past_key_values`."""
    model = lively_model()
    ids = random_ids(1, 6)
    output = model(ids[:, :5], use_cache=True, solver=TIGHT)
    assert output.past_key_values is output.cache is output["past_key_values"]
    assert "past_key_values" in output
    continued = model(ids[:, 5:], past_key_values=output.cache, solver=TIGHT)
    whole = model(ids, solver=TIGHT)
    assert (continued.logits[:, 0] - whole.logits[:, 5]).abs().max() < 1e-8
    assert output.cache.get_seq_length() == 6


@pytest.mark.parametrize("placement", ["post", "pre"])
@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": True},
    ],
)
def test_generation_with_and_without_cache(placement: str, how: dict) -> None:
    # Contracting, so that every equilibrium on the way is reached: short of it the two may differ.
    model = lively_model(0.7, norm_placement=placement)
    model.set_solver(**TIGHT)
    ids = random_ids(2, 6)
    options = {"max_new_tokens": 12, "attention_mask": torch.ones_like(ids), **how}
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        texts.append(model.generate(ids, use_cache=use_cache, **options))
    assert texts[0].shape[1] == 18
    assert texts[0].tolist() == texts[1].tolist()


@pytest.mark.parametrize("placement", ["post", "pre"])
@pytest.mark.parametrize(("blocks", "more", "past"), [(5, 3, 0), (4, 0, 3), (3, 0, 8), (6, 1, 8)])
def test_blocks_of_a_long_text_give_the_same(
    placement: str, blocks: int, more: int, past: int
) -> None:
    model = lively_model(0.7, norm_placement=placement)
    ids, memory = random_ids(2, blocks * model.config.window + more), None
    if past:
        memory = tuple(t[:, -past:] for t in model(random_ids(2, past, seed=3)).memory)
    banded, state = model.equilibrium_map(ids, memory)
    assert banded.window == model.config.window
    state = torch.randn_like(state).requires_grad_()
    found = []
    for f in (banded, replace(banded, window=None)):
        value = f(state)
        found += [value, *torch.autograd.grad(value.sin().sum(), state)]
    torch.testing.assert_close(found[0], found[2], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found[1], found[3], rtol=1e-12, atol=1e-13)
    assert not torch.equal(found[0], found[2])  # by another way


@pytest.mark.parametrize("gain", [0.7, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_a_text_alone_sees_nothing_of_its_future(gain: float, dtype: torch.dtype) -> None:
    """To the last bit; shapes of matrix products change in a batch only, hence rounding."""
    model = lively_model(gain, dtype=dtype, div_val=1)  # clusters are products of their own shapes
    ids = random_ids(1, 40)
    changed = ids.clone()
    changed[:, 22:] = random_ids(1, 18, seed=2)
    for tol in (1e-1, 1e-3, 1e-5):
        settings = {"tol": tol, "max_steps": 30}
        first, other = (model.transformer(t, solver=settings) for t in (ids, changed))
        assert torch.equal(first.last_hidden_state[:, :22], other.last_hidden_state[:, :22])
        assert torch.equal(first.token_steps[:, :22], other.token_steps[:, :22])
        assert not torch.equal(first.last_hidden_state[:, 22:], other.last_hidden_state[:, 22:])


@torch.no_grad()
def test_a_batch_changes_nothing_at_a_loose_tolerance() -> None:
    """Texts of other lengths and with other futures, padded on either side."""
    model = lively_model(0.7)
    texts = [random_ids(1, n, seed=n)[0] for n in (31, 12, 1, 24)]
    alone = [model.transformer(t[None], solver={"tol": 3e-2}) for t in texts]
    for side in ("left", "right"):
        ids, mask = torch.zeros(4, 31, dtype=torch.int64), torch.zeros(4, 31, dtype=torch.int64)
        places = []
        for row, text in enumerate(texts):
            n = len(text)
            places.append(slice(0, n) if side == "right" else slice(31 - n, 31))
            ids[row, places[-1]], mask[row, places[-1]] = text, 1
        together = model.transformer(ids, attention_mask=mask, solver={"tol": 3e-2})
        for row, (place, single) in enumerate(zip(places, alone, strict=True)):
            state = together.last_hidden_state[row, place]
            assert (state - single.last_hidden_state[0]).abs().max() < 1e-11
            assert torch.equal(together.token_steps[row, place], single.token_steps[0])


@torch.no_grad()
def test_left_padding_changes_nothing() -> None:
    model = lively_model()
    model.set_solver(**TIGHT)
    long, short = random_ids(1, 9, seed=5), random_ids(1, 4, seed=6)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.int64), short], dim=1)
    ids = torch.cat([long, padded])
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    output = model(ids, attention_mask=mask)
    alone = model(short)
    assert (output.logits[1, 5:] - alone.logits[0]).abs().max() < 1e-8
    assert output.n_steps[1] == alone.n_steps[0]
    assert torch.isfinite(output.logits).all()
    texts = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    expected = model.generate(
        short, attention_mask=torch.ones_like(short), max_new_tokens=10, do_sample=False
    )
    assert texts[1, 9:].tolist() == expected[0, 4:].tolist()
    uncached = model.generate(
        ids, attention_mask=mask, max_new_tokens=10, do_sample=False, use_cache=False
    )
    assert texts.tolist() == uncached.tolist()


@torch.no_grad()
def test_one_new_token_costs_one_single_token_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively_model()
    cache = DEQTransformerCache(9)
    model(random_ids(2, 12), cache=cache)
    kept = cache.layer.keys.clone()
    lengths = []
    solve = DEQTransformerModel.solve

    def spy(self, f, z0, **options):
        lengths.append(z0.shape[1])
        return solve(self, f, z0, **options)

    monkeypatch.setattr(DEQTransformerModel, "solve", spy)
    model(random_ids(2, 1), cache=cache)
    assert lengths == [1]
    assert torch.equal(cache.layer.keys[:, :, :-1], kept[:, :, 1:])


@torch.no_grad()
def test_warm_start_reaches_the_same_equilibrium() -> None:
    model = lively_model(0.7)
    model.set_solver(**TIGHT)
    states, steps = [], []
    for warm in (False, True):
        cache = DEQTransformerCache(9)
        model(random_ids(2, 12), cache=cache)
        output = model(random_ids(2, 1), cache=cache, warm_start=warm)
        states.append(output.logits)
        steps.append(output.n_steps)
    assert (states[0] - states[1]).abs().max() < 1e-9
    assert steps[0].tolist() != steps[1].tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {"variant": "torchdeq-lm", "norm_placement": "pre", "n_sublayers": 3},
        {"variant": "torchdeq-seq", "norm_placement": "pre"},
    ],
)
def test_no_cache_without_equilibrium(changes: dict) -> None:
    model = lively_model(**changes)
    ids = random_ids(2, 6)
    with pytest.raises(UserError, match="no equilibrium"):
        model(ids, use_cache=True)
    options = {"max_new_tokens": 2, "attention_mask": torch.ones_like(ids)}
    assert model.generate(ids, **options).shape == (2, 8)
    with pytest.raises(UserError, match="no equilibrium"):
        model.generate(ids, use_cache=True, **options)
    output = model(ids)
    assert output.n_steps.tolist() == [12, 12]
    with pytest.raises(UserError, match="no equilibrium"):
        model(ids, solver="anderson")
    with pytest.raises(UserError, match="gradient"):
        model(ids, gradient="jfb")
    model.set_solver(max_steps=30, tol=1e3)
    output = model(ids)
    assert output.n_steps.tolist() == [30, 30] and output.converged.all()
    assert not model(ids, solver={"tol": 0.0}).converged.any()
    with pytest.raises(UserError, match="anderson"):
        model.set_solver("anderson")
    with pytest.raises(UserError, match="leave gradient out"):
        model.set_gradient("jfb")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_loss(side: str) -> None:
    model = lively_model(0.7)
    texts = [random_ids(1, n, seed=n)[0] for n in (5, 9)]
    alone = torch.cat([model(t[None], labels=t[None]).nll[0, :-1] for t in texts])
    ids, mask = torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int64)
    for row, text in enumerate(texts):
        place = slice(0, len(text)) if side == "right" else slice(9 - len(text), 9)
        ids[row, place], mask[row, place] = text, 1
    output = model(ids, attention_mask=mask, labels=ids)
    torch.testing.assert_close(output.loss, alone.mean(), rtol=1e-3, atol=0)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1))
    scored = model(ids, attention_mask=mask, labels=shifted, shift=False).nll != 0
    assert torch.equal(scored, mask.bool())


def test_every_weight_takes_part_without_rare_words() -> None:
    model = lively_model()
    ids = random_ids(2, 8) % model.config.cutoffs[0]
    model(ids, labels=ids, return_logits=False).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_settings_of_a_preset_change_one_by_one() -> None:
    name = "deq-transformer-wikitext2"
    preset = DEQTransformerConfig.from_preset(name)
    changed = DEQTransformerConfig.from_preset(name, solver={"max_steps": 7})
    assert changed.solver == {**preset.solver, "max_steps": 7}
    assert changed.gradient == preset.gradient


@pytest.mark.parametrize("variant", ["locuslab-deq", "torchdeq-seq"])
def test_variants_with_equilibrium_are_cached(variant: str) -> None:
    assert lively_model(variant=variant)(random_ids(2, 6), use_cache=True).cache


def test_losses_and_labels() -> None:
    model = lively_model()
    ids = random_ids(2, 10)
    shifted = model(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(
        shifted.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    torch.testing.assert_close(shifted.loss, expected)
    given = model(ids[:, :-1], labels=ids[:, 1:], shift=False, return_logits=False)
    assert given.logits is None
    torch.testing.assert_close(given.loss, shifted.loss)
    torch.testing.assert_close(given.nll, shifted.nll[:, :-1])
    ignored = ids.clone()
    ignored[:, 5:] = -100
    assert model(ids, labels=ignored).nll[:, 4:].abs().sum() == 0
    kept = model(ids, logits_to_keep=1).logits
    torch.testing.assert_close(kept, shifted.logits[:, -1:])


@pytest.mark.parametrize("cutoffs", [[], [15, 35]])
def test_losses_from_all_scores(cutoffs: list[int]) -> None:
    model = lively_model(cutoffs=cutoffs)
    hidden = torch.randn(2, 9, 32, dtype=torch.float64)
    words = random_ids(2, 9)
    words[0, 2] = words[1, 5] = -100
    found, expected = model.lm_head.dense_nll(hidden, words), model.lm_head.nll(hidden, words)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    scores = torch.log_softmax(model.lm_head(hidden), -1)
    picked = -scores.gather(2, words.clamp(min=0).unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(found, picked * (words != -100), rtol=1e-12, atol=1e-12)


def test_logits_are_log_probabilities_under_cutoffs() -> None:
    logits = lively_model()(random_ids(2, 5)).logits
    assert logits.shape == (2, 5, 60)
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(2, 5, dtype=torch.float64))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_norm": False, "norm_placement": "pre", "cutoffs": [], "div_val": 1},
        {"variant": "torchdeq-lm", "norm_placement": "pre", "n_sublayers": 2},
        {"div_val": 1, "d_embed": 24, "tie_projections": [True, False, True]},
        {"tie_word_embeddings": False},
    ],
)
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_save_and_load(tmp_path, changes: dict, size: str) -> None:
    model = lively_model(dtype=torch.float32, **changes)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or size == "20KB"
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, DEQTransformerForCausalLM)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = random_ids(2, 7)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    base = DEQTransformerModel.from_pretrained(tmp_path)
    expected = model.transformer(ids).last_hidden_state
    assert torch.equal(base(ids).last_hidden_state, expected)


def test_tied_parameters_are_shared() -> None:
    model = lively_model()
    embedding, head = model.transformer.embedding, model.lm_head
    assert all(a.weight is b.weight for a, b in zip(embedding.tables, head.tables, strict=True))
    pairs = zip(embedding.projections, head.projections, strict=True)
    assert [a.weight is b.weight for a, b in pairs] == [False, True, True]


def test_bfloat16() -> None:
    model = lively_model(0.7, dtype=torch.bfloat16)
    output = model(random_ids(2, 8), labels=random_ids(2, 8), solver={"tol": 0.05})
    assert output.logits.dtype == torch.bfloat16
    assert output.residual.dtype == torch.float32
    assert output.converged.all() and torch.isfinite(output.loss)


@torch.no_grad()
def test_tolerance_in_half_precision(caplog: pytest.LogCaptureFixture) -> None:
    """Rounding keeps residuals above the configured 1e-3; the solve must not wait for them."""
    caplog.set_level("WARNING", logger="deqzoo.models")  # commands raise it
    model = lively_model(0.7, dtype=torch.bfloat16)
    ids = random_ids(4, 16)
    output = model(ids)
    assert output.converged.all() and 1e-3 < output.residual.max() <= 3 * 2**-7
    model(ids)
    assert caplog.text.count("cannot resolve the tolerance 1.0e-03") == 1
    assert not model(ids, solver={"tol": 0.0, "max_steps": 9}).converged.any()
    wide = model.resolve_solver(None)
    for dtype in (torch.float32, torch.float64):
        assert model._resolvable(wide, dtype) is wide


@pytest.mark.parametrize("gradient", ["implicit", "upg", "npg", "jfb", "unrolled"])
def test_every_gradient_reaches_every_parameter(gradient: str) -> None:
    model = lively_model(0.7)
    output = model(random_ids(2, 8), labels=random_ids(2, 8), gradient=gradient)
    output.loss.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_gradient_reaches_weights_through_the_memory() -> None:
    model = lively_model(0.7)
    memory = model(random_ids(2, 8)).memory
    output = model(random_ids(2, 1), memory=memory, labels=random_ids(2, 1), shift=False)
    output.loss.backward()
    assert not memory[0].requires_grad
    assert model.transformer.layers[0].attention.relative.gain.grad.abs().sum() > 0


PLACES = ["input_dropout", "position_dropout", "hidden_dropout", "final_dropout"]


@pytest.mark.parametrize("option", ["dropout", "dropatt", "dropword", *PLACES])
def test_dropout_acts_in_training_only(option: str) -> None:
    model = lively_model(0.7, **{option: 0.3})
    ids = random_ids(2, 8)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("place", PLACES)
def test_dropouts_are_separate(place: str) -> None:
    def drawn(**changes: float) -> dict[str, torch.Tensor | None]:
        config = tiny_config(dropatt=0.1, dropword=0.1, **changes)
        torch.manual_seed(3)
        masks = draw_masks(config, 2, 5, 3, torch.zeros(()))
        layer = masks.layers[0]
        return {
            "word": masks.words, "attention": layer.attention, "input_dropout": masks.input,
            "position_dropout": masks.positions, "hidden_dropout": layer.up, "output": layer.output,
            "down": layer.down,
        }  # fmt: skip

    others = dict.fromkeys(PLACES, 0.0)
    masks = drawn(dropout=0.4, **{**others, place: None})
    assert (masks.get(place) is not None) == (place != "final_dropout")
    hidden = [masks[name] is not None for name in ("hidden_dropout", "output", "down")]
    assert hidden == [place == "hidden_dropout"] * 3
    assert all(masks.get(p) is None for p in PLACES if p != place)
    assert masks["word"] is not None and masks["attention"] is not None
    # One rate for all draws what it always drew.
    for mine, theirs in zip(
        drawn(dropout=0.4).values(), drawn(**dict.fromkeys(PLACES, 0.4)).values(), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_configurations_of_before_keep_one_dropout() -> None:
    stored = tiny_config(dropout=0.3).to_dict()
    for place in PLACES:
        del stored[place]
    config = DEQTransformerConfig.from_dict(stored)
    assert [config.dropout_rate(place.split("_")[0]) for place in PLACES] == [0.3] * 4


def test_output_dropout_of_features_keeps_tokens() -> None:
    hidden = torch.ones(2, 40, 32, dtype=torch.float64)
    for kind, dimension in (("token", 2), ("feature", 1)):
        model = lively_model(dropout=0.5, output_dropout=kind).train()
        dropped = model._output_dropout(hidden, None)
        assert (dropped == dropped.select(dimension, 0).unsqueeze(dimension)).all()
        assert 0 < (dropped == 0).double().mean() < 1


def test_jacobian_loss_and_spectral_radius() -> None:
    model = lively_model(0.7).train()
    output = model(random_ids(2, 8), labels=random_ids(2, 8), output_state=True)
    penalty = model.jacobian_loss(output.equilibrium_map, output.state)
    (output.loss + penalty).backward()
    assert model.transformer.layers[0].feed_forward.up.gain.grad.abs().sum() > 0
    radius = model.spectral_radius(output.equilibrium_map, output.state)
    assert radius.shape == (2,) and (radius > 0).all()


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for recompute in (False, True):
        model = lively_model(0.7).train()
        if recompute:
            model.gradient_checkpointing_enable()
        model(random_ids(2, 8), labels=random_ids(2, 8)).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 33}, "even"),
        ({"cutoffs": [30, 20]}, "rise"),
        ({"cutoffs": [10, 20, 30], "div_val": 4}, "feature"),
        ({"tie_projections": [True]}, "one flag per cluster"),
        ({"tie_word_embeddings": False, "tie_projections": [True] * 3}, "needs tie_word"),
        ({"n_sublayers": 2}, "one sub-layer"),
        ({"variant": "torchdeq-lm"}, "pre-LN"),
        ({"dropout": 1.0}, "dropout"),
        ({"hidden_dropout": 1.0}, "hidden_dropout"),
        ({"solver": {"name": "newton"}}, "newton"),
        ({"variant": "xl"}, "variant"),
    ],
)
def test_impossible_configurations(changes: dict, message: str) -> None:
    with pytest.raises(Exception, match=message):
        tiny_config(**changes)


def test_wrong_calls() -> None:
    model = lively_model()
    ids = random_ids(2, 6)
    memory = model(ids).memory
    with pytest.raises(UserError, match="not both"):
        model(ids, memory=memory, use_cache=True)
    with pytest.raises(UserError, match="DEQTransformerCache"):
        model(ids, cache=object())
    with pytest.raises(UserError, match="window of 4, this model sees 9"):
        model(ids, cache=DEQTransformerCache(4))
    for past in ({"memory": memory}, {"cache": model(ids, use_cache=True).cache}):
        with pytest.raises(UserError, match="holds 2 texts, input_ids 3"):
            model(random_ids(3, 6), **past)
    with pytest.raises(UserError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(2, 3))


@pytest.mark.parametrize("changes", [{}, {"cutoffs": [], "div_val": 1}])
def test_what_is_no_text(changes: dict) -> None:
    model = lively_model(**changes)
    empty = torch.tensor([[]])  # float32, as tokenizers return an empty text
    for call in (model, model.transformer, partial(model.generate, max_new_tokens=2)):
        with pytest.raises(UserError, match=r"\(1, 0\)"):
            call(empty)
        with pytest.raises(UserError, match="holds 60, .* 0 to 59"):
            call(torch.tensor([[1, 60]]))
    with pytest.raises(UserError, match="holds -1"):
        model.train()(torch.tensor([[-1, 1]]))
    # Training does not wait for another device to read the indices; "meta" has none to read.
    check_tokens(model.config, torch.zeros(1, 2, dtype=torch.int64, device="meta"), training=True)
    with pytest.raises(UserError, match=r"\(batch, tokens\)"):
        model(torch.tensor([1, 2]))


def test_what_are_no_labels() -> None:
    model = lively_model()
    ids = random_ids(2, 6)
    for labels, shift in ((ids[:, 1:], False), (ids[:, :-2], True), (ids[:1], True)):
        with pytest.raises(UserError, match="one label per token"):
            model(ids, labels=labels, shift=shift)
    for word in (60, -1):
        labels = ids.clone()
        labels[1, 3] = word
        with pytest.raises(UserError, match=f"labels holds {word}, .* 0 to 59; use -100"):
            model.train()(ids, labels=labels)
    away = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    check_labels(model.config, away, away, training=True)
    with pytest.raises(ValueError, match="one target per state"):
        model.lm_head.nll(torch.zeros(2, 5, 32, dtype=torch.float64), ids)


@torch.no_grad()
def test_padding_behind_a_memory() -> None:
    model = lively_model(0.7)
    memory = model(random_ids(1, 6), solver=TIGHT).memory
    ids = random_ids(1, 4, seed=2)
    plain = model(ids, memory=memory, labels=ids, solver=TIGHT)
    mask = torch.tensor([[1, 1, 1, 0]])
    padded = model(ids, memory=memory, attention_mask=mask, solver=TIGHT)
    torch.testing.assert_close(padded.logits[:, :3], plain.logits[:, :3])
    # A mask may cover the past, too; nothing is scored at its padding either.
    longer = torch.tensor([[1] * 6 + [1, 1, 1, 0]])
    scored = model(ids, memory=memory, attention_mask=longer, labels=ids, solver=TIGHT).nll
    torch.testing.assert_close(scored[:, :2], plain.nll[:, :2])
    assert (scored[:, 2:] == 0).all()


def test_hidden_states() -> None:
    model = lively_model()
    ids = random_ids(2, 6)
    assert model(ids).hidden_states is None
    words, states = model(ids, output_hidden_states=True).hidden_states
    embedding = model.get_input_embeddings()
    assert torch.equal(words, embedding(ids) * embedding.scale)
    assert torch.equal(states, model.transformer(ids).last_hidden_state)
    generated = model.generate(
        ids, max_new_tokens=3, output_hidden_states=True, return_dict_in_generate=True
    )
    shapes = [[state.shape[1] for state in step] for step in generated.hidden_states]
    assert shapes == [[6, 6], [1, 1], [1, 1]]
    model.config.output_hidden_states = True
    assert torch.equal(model(ids).hidden_states[1], states)
    assert model(ids, output_hidden_states=False).hidden_states is None


def test_the_vocabulary_keeps_its_size() -> None:
    model = lively_model()
    embedding = model.get_input_embeddings()
    assert model.resize_token_embeddings() is embedding
    assert model.resize_token_embeddings(59, pad_to_multiple_of=10) is embedding
    with pytest.raises(NotImplementedError, match="adaptive .* from 60 to 64"):
        model.resize_token_embeddings(61, pad_to_multiple_of=8)
    with pytest.raises(NotImplementedError, match="from 60 to 61"):
        model.transformer.resize_token_embeddings(61)
    model.set_input_embeddings(embedding)
    with pytest.raises(UserError, match="not by Embedding; .* inputs_embeds"):
        model.set_input_embeddings(torch.nn.Embedding(60, 32))


@pytest.mark.parametrize(
    ("preset", "total", "distinct"),
    [
        ("deq-transformer-wikitext103-post", 97_851_488, 97_691_888),
        ("deq-transformer-wikitext103-pre", 97_851_488, 97_691_888),
        ("deq-transformer-wikitext103-pre-jr", 97_851_488, 97_691_888),
        ("deq-transformer-wikitext103-upg", 97_851_488, 97_691_888),
        ("torchdeq-lm-wikitext103", 97_730_888, 97_571_288),
    ],
)
def test_sizes_of_the_official_presets(preset: str, total: int, distinct: int) -> None:
    with torch.device("meta"):
        model = DEQTransformerForCausalLM(DEQTransformerConfig.from_preset(preset))
    tables = {f"lm_head.tables.{i}.weight" for i in range(4)}
    named = dict(model.named_parameters(remove_duplicate=False))
    # On the meta device nothing is tied yet; upstream counts tied projections twice.
    assert sum(p.numel() for n, p in named.items() if n not in tables) == total
    tied = model.all_tied_weights_keys
    assert sum(p.numel() for n, p in named.items() if n not in tied) == distinct


@pytest.mark.parametrize("corpus", ["wikitext2", "ptb"])
def test_large_presets_fit_three_files(corpus: str) -> None:
    with torch.device("meta"):
        config = DEQTransformerConfig.from_preset(f"deq-transformer-{corpus}-large")
        model = DEQTransformerForCausalLM(config)
    tied = model.all_tied_weights_keys
    named = model.named_parameters(remove_duplicate=False)
    assert sum(2 * p.numel() for n, p in named if n not in tied) < 45e6
    assert config.mem_len == config.window - 1 and config.cutoffs == []


def test_presets_accept_overrides() -> None:
    config = DEQTransformerConfig.from_preset("deq-transformer-ptb", d_inner=64)
    assert (config.vocab_size, config.d_inner) == (10_000, 64)
    assert config.mem_len == config.window - 1
    with pytest.raises(ValueError, match="the presets are"):
        DEQTransformerConfig.from_preset("xl")


def test_words_that_are_no_whole_numbers():
    for wrong in (torch.rand(1, 4), torch.ones(1, 4, dtype=torch.bool)):
        with pytest.raises(UserError, match="whole numbers"):
            check_tokens(tiny_config(), wrong, False)


@pytest.mark.parametrize("cutoffs", ([], [10, 20]))
def test_a_model_may_be_untied(tmp_path, cutoffs):
    config = DEQTransformerConfig(
        vocab_size=40, d_model=16, d_embed=16, n_head=2, d_inner=32, cutoffs=cutoffs,
        div_val=2 if cutoffs else 1,
    )  # fmt: skip
    fresh = deepcopy(config)
    model = DEQTransformerForCausalLM(config).eval()
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    loaded = DEQTransformerForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(40, (1, 6))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    heads, tables = loaded.lm_head.tables, loaded.transformer.embedding.tables
    assert not any(h.weight is t.weight for h, t in zip(heads, tables, strict=True))
    assert torch.equal(heads[0].weight, tables[0].weight)
    base = DEQTransformerModel(fresh).eval()
    base.config.tie_word_embeddings = False
    base.save_pretrained(tmp_path / "base")
    again = DEQTransformerModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        assert torch.equal(again(ids).last_hidden_state, base(ids).last_hidden_state)


@torch.no_grad()
def test_words_without_an_answer_get_none() -> None:
    """Where no state is finite, scores read from the start would be made up."""
    model = lively_model(0.7)
    vectors = model.get_input_embeddings()(random_ids(2, 12))
    clean = model(inputs_embeds=vectors)
    vectors[1, 5, 3] = float("nan")
    labels = random_ids(2, 12, seed=3)
    output = model(inputs_embeds=vectors, labels=labels)
    assert output.logits[1, 5:].isnan().all() and output.loss.isnan()
    assert not output.converged[1] and output.converged[0]
    torch.testing.assert_close(output.logits[0], clean.logits[0])


@torch.no_grad()
def test_a_cache_knows_whose_words_it_holds() -> None:
    """Also once it was emptied, and once a weight was written to."""
    first, second = lively_model(0.7), lively_model(0.9)
    ids = random_ids(2, 12)
    cache = first(ids, use_cache=True).cache
    with pytest.raises(UserError, match="tokens of another model"):
        second(ids, cache=cache)
    cache.crop(-12)
    torch.testing.assert_close(second(ids, cache=cache).logits, second(ids).logits)
    cache.crop(-12)
    copies = deepcopy(second), deepcopy(cache)
    for model, past in ((copies[0], cache), (second, copies[1])):  # the same words, all the same
        model(ids[:, :2], cache=past)
    cache.crop(-2)
    second.transformer.layers[0].feed_forward.down.bias.add_(0.5)
    torch.testing.assert_close(second(ids, cache=cache).logits, second(ids).logits)


def test_a_cache_of_inference_mode_goes_on_outside() -> None:
    model = lively_model(0.7)
    ids = random_ids(2, 12)
    with torch.inference_mode():
        cache = model(ids[:, :6], use_cache=True).cache
        cache.batch_select_indices(torch.tensor([1, 0]))
    with torch.no_grad():
        logits = model(ids.flip(0)[:, 6:], cache=cache).logits
        reference = model(ids.flip(0)).logits[:, 6:]
    assert (logits - reference).abs().max() < 0.05 * reference.abs().max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"input_ids": random_ids(1, 4).to(torch.uint8)},
            "whole numbers, int64 or int32, got torch.uint8",
        ),
        ({"labels": random_ids(1, 4).to(torch.uint8)}, "labels must be whole numbers, int64"),
        ({"position_ids": [0, 1, 2, 3]}, "position_ids must be a tensor"),
        ({"memory": torch.zeros(1, 3, 32)}, "the pair of states and injections"),
        ({"memory": (torch.zeros(1, 3, 32), torch.zeros(1, 2, 96))}, "pass both of one output"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 0, 32)}, "at least one token"),
    ],
)
def test_what_no_forward_takes_is_said(arguments: dict, message: str) -> None:
    model = lively_model(0.7, dtype=torch.float32)
    with pytest.raises(UserError, match=message):
        model(**{"input_ids": random_ids(1, 4), **arguments})
