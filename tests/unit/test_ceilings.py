"""The ceilings: exact numbers of tiny cases, the inferred mode against a slow optimiser."""

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from shardline.training.data.csr import Csr
from shardline.training.data.tables import open_dataset
from shardline.training.evaluation.ranking import evaluate_vectors
from shardline.training.synthetic import ceilings
from shardline.training.synthetic.ceilings import HiddenModel, infer_interests, measure_ceilings
from shardline.training.synthetic.generator import SynthConfig, add_ceilings, generate
from shardline.training.synthetic.race import draw_items, noise_hazard


def tiny_world(users: int = 12, sharpness: float = 1.2) -> tuple[HiddenModel, np.ndarray]:
    rng = np.random.default_rng(4)
    interests = rng.standard_normal((users, 3)).astype(np.float32)
    attributes = rng.standard_normal((80, 3)).astype(np.float32)
    logits = sharpness * interests @ attributes.T
    items = draw_items(logits, 10, noise_hazard(0.0), rng)
    return HiddenModel(interests, attributes, sharpness), items


def minus_log_posterior(
    theta: np.ndarray, model: HiddenModel, known: np.ndarray, share: float
) -> float:
    """The module's formula, written down."""
    u, log_time = theta[:-1], theta[-1]
    q = 1 - np.exp(-np.exp(log_time + model.sharpness * model.attributes.astype(float) @ u))
    is_known = np.isin(np.arange(len(q)), known)
    return float(-np.log(q[is_known]).sum() - np.log(1 - share * q[~is_known]).sum() + 0.5 * u @ u)


def test_inferred_interests_are_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "MAX_STEPS", 60)
    monkeypatch.setattr(ceilings, "SMALL_STEP", 1e-5)
    model, items = tiny_world()
    known = items[:, :8]
    got = infer_interests(model, known, 0.8)
    for user in range(len(items)):
        slow = minimize(
            minus_log_posterior,
            np.array([0.0, 0.0, 0.0, -3.0]),
            args=(model, known[user], 0.8),
            method="Nelder-Mead",
            options={"xatol": 1e-6, "fatol": 1e-10, "maxiter": 5000},
        )
        assert got[user] == pytest.approx(slow.x[:3], abs=2e-3)


@pytest.mark.parametrize("chunk", [1, 7, 80])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    model, items = tiny_world()
    whole = infer_interests(model, items[:, :8], 0.8)
    monkeypatch.setattr(ceilings, "CHUNK_ITEMS", chunk)
    monkeypatch.setattr(ceilings, "BLOCK_USERS", 5)
    assert infer_interests(model, items[:, :8], 0.8) == pytest.approx(whole, abs=1e-4)


def test_oracle_is_the_ranking_by_true_affinity() -> None:
    model, items = tiny_world()
    known, held_out = items[:, :8], items[:, 8:]
    means = measure_ceilings(model, known, held_out, ks=(5,))["oracle"]["means"]
    recalls = []
    for user in range(len(items)):
        affinity = model.attributes @ model.interests[user]
        affinity[known[user]] = -np.inf
        recalls.append(np.isin(held_out[user], np.argsort(-affinity)[:5]).mean())
    assert means["recall@5"] == pytest.approx(np.mean(recalls))


def test_ceilings_of_a_generated_dataset(tmp_path: Path) -> None:
    """They stand in the manifest, fit the files' own splits, and are in the expected order."""
    config = SynthConfig(num_users=400, num_items=2000, sharpness=1.5, noise=0.25, val_users=50)
    dataset = generate(config, tmp_path / "d")
    stored, oracle = dataset.ceilings, dataset.oracle()
    assert stored is not None
    assert oracle is not None
    known, relevant = dataset.positives("train", "val"), dataset.positives("test")
    again = evaluate_vectors(
        oracle["interest_vector"], oracle["attribute_vector"], relevant=relevant, exclude=known
    )
    assert stored["oracle"]["means"] == pytest.approx(again.means)
    assert stored["oracle"]["users"] == stored["best_estimate"]["users"] == 400
    share = {name: stored[name]["means"]["recall@100"] for name in ("oracle", "best_estimate")}
    assert share["oracle"] > share["best_estimate"] > 0.8 * share["oracle"]


def test_ceilings_may_be_added_afterwards(tmp_path: Path) -> None:
    config = SynthConfig(num_users=90, num_items=500, val_users=20, ceiling_users=60)
    whole = generate(config, tmp_path / "whole")
    bare = generate(config.model_copy(update={"ceiling_users": 0}), tmp_path / "bare")
    assert bare.ceilings is None
    added = open_dataset(add_ceilings(bare, 60).path)
    assert added.identity == bare.identity == whole.identity
    assert added.manifest["parameters"] == whole.manifest["parameters"]
    assert whole.ceilings is not None and added.ceilings is not None
    for name, ceiling in whole.ceilings.items():
        assert added.ceilings[name]["users"] == 60
        assert added.ceilings[name]["means"] == pytest.approx(ceiling["means"])


def test_best_estimate_beats_the_mean_of_known_items() -> None:
    """The obvious linear estimate: the sum of the attributes of what the user took."""
    rng = np.random.default_rng(0)
    interests = rng.standard_normal((300, 6)).astype(np.float32)
    attributes = rng.standard_normal((3000, 6)).astype(np.float32)
    items = draw_items(2.0 * interests @ attributes.T, 20, noise_hazard(0.5), rng)
    items = rng.permuted(items, axis=1)
    known, held_out = items[:, :16], items[:, 16:]
    means = measure_ceilings(HiddenModel(interests, attributes, 2.0), known, held_out, ks=(10,))
    indptr = np.arange(301, dtype=np.int64)
    linear = evaluate_vectors(
        attributes[known].sum(axis=1),
        attributes,
        relevant=Csr(indptr * 4, held_out.ravel()),
        exclude=Csr(indptr * 16, known.ravel()),
        ks=(10,),
    ).means
    best = means["best_estimate"]["means"]
    assert linear["recall@10"] * 1.02 < best["recall@10"] < means["oracle"]["means"]["recall@10"]
