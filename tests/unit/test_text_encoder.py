"""Text encoders: a real one beside what transformers 5.24 computes, its twin in torch, refusals."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shardline.shards.core.errors import ConfigError, CorruptFile, NotFound
from shardline.shards.text import text_encoder
from shardline.shards.text.model_folder import describe_model, find_model
from shardline.shards.text.text_encoder import TextEncoder, Unreadable
from shardline.training.features.torch_bert import TorchBert
from tests.text_models import REAL, WIDTH, needs_real, tiny_model

# text, numbers of its pieces, first and last of the 384 numbers of its vector: by transformers
REFERENCE = [
    (
        "red running shoes for women",
        [101, 2417, 2770, 6007, 2005, 2308, 102],
        [-0.04922, -0.05379, -0.03326, 0.06255],
        [-0.01148, -0.13679, -0.0226, 0.01899],
    ),
    (
        "Kaffeemühle für Espresso",
        [101, 10556, 16020, 6633, 27225, 2571, 6519, 9686, 20110, 2080, 102],
        [-0.06048, 0.05331, -0.02359, 0.07788],
        [0.04832, 0.08072, 0.10047, -0.07768],
    ),
    (
        "電気ケトル 1.7L",
        [101, 100, 100, 1703, 30240, 30259, 1015, 1012, 1021, 2140, 102],
        [-0.08982, 0.10602, 0.09448, 0.02761],
        [-0.02156, 0.03022, -0.04579, 0.04955],
    ),
    (
        "It's Sigma ΣΑΣ naïve İstanbul ﬁ \u200b x\u00a0y",
        [101, 2009, 1005, 1055, 13201, 1173, 14608, 29733, 15743, 9960, 1984, 1060, 1061, 102],
        [0.05151, -0.03299, 0.00443, 0.02625],
        [0.10169, -0.01597, 0.04885, -0.06411],
    ),
]
TEXTS = [text for text, *_ in REFERENCE]


@pytest.fixture(scope="module")
def real() -> TextEncoder:
    return TextEncoder.load(REAL)


@needs_real
def test_as_transformers_computes_it(real: TextEncoder) -> None:
    vectors = real.encode(TEXTS)
    assert vectors.shape == (len(TEXTS), 384) and vectors.dtype == np.float32
    for (text, numbers, first, last), vector in zip(REFERENCE, vectors, strict=True):
        assert real._tokenizer.numbers(text) == numbers
        np.testing.assert_allclose(vector[:4], first, atol=1e-5)
        np.testing.assert_allclose(vector[-4:], last, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert real._tokenizer.numbers("a" * 101 + " 🙂") == [101, 100, 100, 102]
    # a name of a special token is text: transformers would end the sentence there
    assert real._tokenizer.numbers("[SEP]") != [101, 102, 102]


@needs_real
def test_the_twin_in_torch_computes_the_same(real: TextEncoder) -> None:
    twin = TextEncoder.load(REAL, TorchBert)
    texts = [*TEXTS, "", "tent " * 40]
    expected = real.encode(texts, cut=True)
    np.testing.assert_allclose(twin.encode(texts, cut=True), expected, atol=1e-5)


@needs_real
def test_the_company_of_other_texts_changes_nothing(real: TextEncoder) -> None:
    texts = [*TEXTS, "one", "a much longer text than all the others, " * 5, *["filler"] * 40]
    together = real.encode(texts)
    for text, vector in list(zip(texts, together, strict=True))[:6]:
        np.testing.assert_allclose(real.encode([text])[0], vector, atol=1e-6)
    assert real.encode([]).shape == (0, 384)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pooling_and_length_are_as_the_folder_says(tmp_path: Path, pooling: str) -> None:
    folder = tiny_model(tmp_path / "m")
    plain = TextEncoder.load(str(folder))
    texts = ["red shoes", "tent"]
    states = plain._layers(np.array([[2, 4, 6, 7, 3], [2, 8, 3, 0, 0]]), np.arange(5) < [[5], [3]])
    expected = np.stack([states[0].mean(axis=0), states[1, :3].mean(axis=0)])
    np.testing.assert_allclose(plain.encode(texts), expected, atol=1e-6)
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    listed = [{"type": f"sentence_transformers.models.{n}", "path": path} for n, path in modules]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    name = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}[pooling]
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({name: True}))
    found = TextEncoder.load(str(folder))
    pooled = expected if pooling == "mean" else states[:, 0]
    length = np.linalg.norm(pooled, axis=1, keepdims=True)
    np.testing.assert_allclose(found.encode(texts), pooled / length, atol=1e-6)
    assert found.model.id != plain.model.id  # other vectors of the same weights
    twin = TextEncoder.load(str(folder), TorchBert)
    np.testing.assert_allclose(twin.encode(texts), found.encode(texts), atol=1e-5)


def test_texts_that_are_too_long(tmp_path: Path) -> None:
    encoder = TextEncoder.load(str(tiny_model(tmp_path / "m")))
    assert encoder.model.max_tokens == 8
    with pytest.raises(Unreadable) as caught:
        encoder.encode(["red", "red red red red red red red"])
    assert (caught.value.place, caught.value.tokens) == (1, 9)
    with pytest.raises(Unreadable) as caught:
        encoder.encode(["red", "\u200b"])
    assert (caught.value.place, caught.value.tokens) == (1, 2)
    assert encoder.encode(["", "\u200b"], cut=True).shape == (2, WIDTH)
    cut = encoder.encode(["red red red red red red red"], cut=True)
    np.testing.assert_array_equal(cut, encoder.encode(["red red red red red red"]))


def test_a_long_text_does_not_make_the_short_ones_beside_it_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = TextEncoder.load(str(tiny_model(tmp_path / "model")))
    texts = ["red"] * 31 + ["red " * 6]
    expected = np.concatenate([encoder.encode([text]) for text in texts])
    shapes, layers = [], encoder._layers

    def counted(numbers: Any, mask: Any) -> Any:
        shapes.append(numbers.shape)
        return layers(numbers, mask)

    monkeypatch.setattr(encoder, "_layers", counted)
    monkeypatch.setattr(text_encoder, "TOKENS_AT_ONCE", 100)
    found = encoder.encode(texts)
    assert shapes == [(31, 3), (1, 8)]
    assert np.allclose(found, expected, atol=1e-5)


def test_words_that_are_too_long_are_not_kept(tmp_path: Path) -> None:
    encoder = TextEncoder.load(str(tiny_model(tmp_path / "model")))
    tokenizer = encoder._tokenizer
    before = tokenizer._pieces.cache_info().currsize
    long = "x" * (tokenizer._longest_word + 1)
    assert len(tokenizer.numbers(f"{long} {long}y")) == 4
    assert tokenizer._pieces.cache_info().currsize == before


def test_the_id_is_of_what_decides_on_vectors(tmp_path: Path) -> None:
    first = describe_model(tiny_model(tmp_path / "a"))
    assert describe_model(tiny_model(tmp_path / "b")).id == first.id  # wherever it lies
    assert describe_model(tiny_model(tmp_path / "c", seed=1)).id != first.id
    assert describe_model(tiny_model(tmp_path / "d", layer_norm_eps=0.1)).id != first.id


def test_names_that_are_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "__init__.py").write_text("raise SystemExit('code of a package ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, words in (
        (str(tmp_path / "empty"), "no text encoder here"),
        (str(tmp_path / "nowhere"), "not a text encoder; expected a folder, or an installed"),
        ("sentence-transformers/all-MiniLM-L6-v2", "none is downloaded"),
        ("json", "got a package without one"),
        ("evil", "got a package without one"),
        ("evil.part", "got neither"),
        ("no_such_package", "got neither"),
    ):
        with pytest.raises(NotFound, match=words):
            find_model(name)
    tiny_model(tmp_path / "evil" / "model")
    assert find_model("evil") == tmp_path / "evil" / "model"
    assert "evil" not in sys.modules


def _drop(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({n: w for n, w in weights.items() if n != name}, folder / "model.safetensors")


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_models_of_other_kinds_and_damaged_ones(tmp_path: Path) -> None:
    def refused(number: int, kind: type[Exception], words: str, edit: Any) -> None:
        folder = tiny_model(tmp_path / str(number))
        edit(folder)
        with pytest.raises(kind, match=words):
            TextEncoder.load(str(folder))

    modules = [{"type": "x.Transformer", "path": ""}, {"type": "x.Dense", "path": "2_Dense"}]
    cases: list[tuple[type[Exception], str, Any]] = [
        (ConfigError, "model_type.*expected bert; got mpnet", {"model_type": "mpnet"}),
        (ConfigError, "hidden_act.*got relu", {"hidden_act": "relu"}),
        (CorruptFile, "not of a model", {"hidden_size": "wide"}),
        (CorruptFile, "not a BERT", {"num_hidden_layers": 3}),
    ]
    for number, (kind, words, changes) in enumerate(cases):
        refused(number, kind, words, lambda f, c=changes: _edit(f / "config.json", **c))
    files: list[tuple[type[Exception], str, Any]] = [
        (CorruptFile, "not a BERT", lambda f: _drop(f, "encoder.layer.0.output.dense.bias")),
        (CorruptFile, "cannot be read", lambda f: (f / "model.safetensors").write_bytes(b"no")),
        (CorruptFile, "not JSON", lambda f: (f / "config.json").write_text("{")),
        (
            ConfigError,
            "a tokenizer that is not known",
            lambda f: _edit(f / "tokenizer.json", model={"type": "BPE"}),
        ),
        (
            ConfigError,
            "modules that are not known.*got Transformer, Dense",
            lambda f: (f / "modules.json").write_text(json.dumps(modules)),
        ),
    ]
    for number, (kind, words, edit) in enumerate(files, start=len(cases)):
        refused(number, kind, words, edit)
