"""A transformer's folder, as sentence-transformers or transformers save it: found, and read.

    config.json               model_type bert, sizes
    tokenizer.json            WordPiece, with its vocabulary
    model.safetensors         weights; pickles are not read
    modules.json              which pooling, and whether vectors get length one; may be absent
    1_Pooling/config.json     mean or cls
    sentence_bert_config.json max_seq_length; may be absent

A model is named by its folder or by an installed Python package that carries such a folder. Nothing
is ever fetched, and no code of the package or of the model is run.
"""

import hashlib
import importlib.util
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file

from shardline.shards.core.encoder_files import Weights
from shardline.shards.core.errors import ConfigError, CorruptFile, NotFound
from shardline.shards.core.files import sha256_of
from shardline.shards.core.small_files import MAX_TEXT_BYTES, read_json

CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", "model.safetensors"
NEEDED = (CONFIG, TOKENIZER, WEIGHTS)
MAX_TOKENIZER_BYTES = 64 << 20  # 0.5 MB of 30,000 pieces
PACKAGE = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
ID_DIGITS = 12
TRANSFORMER, POOLING, NORMALIZE = "Transformer", "Pooling", "Normalize"
WAYS = ("mean", "cls")  # of pooling, those that are known


@dataclass(frozen=True, slots=True, kw_only=True)
class TextModel:
    """What a folder declares. ``id``: hash of weights, vocabulary and of how both are used: two
    folders of one id give every text the same vector.

    max_tokens: of a text, [CLS] and [SEP] included.
    """

    folder: Path
    id: str
    width: int
    layers: int
    heads: int
    epsilon: float
    max_tokens: int
    pooling: str  # mean | cls
    is_unit: bool  # vectors have length one

    @property
    def name(self) -> str:
        return self.folder.parent.name if self.folder.name == "model" else self.folder.name


def find_model(name: str) -> Path:
    """The folder of a model; name: its path, or that of an installed package that carries it.

    Raises:
        NotFound: there is neither, or no model in it.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _in_package(name)
    missing = [each for each in NEEDED if not (folder / each).is_file()]
    if missing:
        raise NotFound(
            f"{folder}: no text encoder here",
            expected=", ".join(NEEDED),
            got=f"no {', '.join(missing)}",
            hint="copy a model into a local folder; none is downloaded",
        )
    return folder.resolve()


def _in_package(name: str) -> Path:
    module = name.replace("-", "_")
    # the parts of a dotted name would be imported, and nothing of a package's is run
    is_name = PACKAGE.fullmatch(name) is not None and "." not in name
    spec = importlib.util.find_spec(module) if is_name else None
    roots = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    for root in roots:
        for folder in (root, *sorted(each for each in root.iterdir() if each.is_dir())):
            if (folder / CONFIG).is_file():
                return folder
    raise NotFound(
        f"{name}: not a text encoder",
        expected="a folder, or an installed Python package that carries a model",
        got="a package without one" if roots else "neither",
        hint="copy a model into a local folder; none is downloaded",
    )


def describe_model(folder: Path) -> TextModel:
    """What is in a folder that ``find_model`` gave; reads all of it once, for its id.

    Raises:
        ConfigError: a model of another kind than what is known here. CorruptFile: not JSON, or a
            value is missing.
    """
    config = _json(folder / CONFIG)
    _check_kind(folder, config)
    pooling, is_unit = _modules(folder)
    try:
        longest = int(config["max_position_embeddings"])
        limits = folder / "sentence_bert_config.json"
        if limits.is_file():
            longest = min(longest, int(_json(limits).get("max_seq_length") or longest))
        model = TextModel(
            folder=folder,
            id="",
            width=int(config["hidden_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=int(config["num_attention_heads"]),
            epsilon=float(config.get("layer_norm_eps", 1e-12)),
            max_tokens=longest,
            pooling=pooling,
            is_unit=is_unit,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"{folder / CONFIG}: not of a model", got=repr(error)) from error
    values = {f.name: getattr(model, f.name) for f in fields(model) if f.name != "folder"}
    return TextModel(**values | {"folder": folder, "id": _id(folder, values)})


def read_weights(model: TextModel) -> Weights:
    """Every tensor by its name, float32. Raises CorruptFile."""
    path = model.folder / WEIGHTS
    try:
        found: Weights = load_file(path)
    except (SafetensorError, KeyError, OSError, TypeError, ValueError) as error:
        raise CorruptFile(
            f"{path}: cannot be read", expected="float32 or float16", got=str(error)
        ) from error
    return {name.removeprefix("bert."): array.astype("float32") for name, array in found.items()}


def read_tokenizer(model: TextModel) -> dict[str, Any]:
    return _json(model.folder / TOKENIZER)


def _json(path: Path) -> dict[str, Any]:
    limit = MAX_TOKENIZER_BYTES if path.name == TOKENIZER else MAX_TEXT_BYTES
    try:
        content = read_json(path, limit)
    except OSError as error:
        raise CorruptFile(f"{path}: cannot be read", got=str(error)) from error
    if not isinstance(content, dict):
        raise CorruptFile(f"{path}: not a map", got=type(content).__name__)
    return content


def _check_kind(folder: Path, config: dict[str, Any]) -> None:
    expected = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    for name, value in expected.items():
        if config.get(name, value) != value or (name == "model_type" and name not in config):
            raise ConfigError(
                f"{folder}: a transformer of a kind that is not known",
                field=name,
                expected=value,
                got=str(config.get(name)),
                hint="make vectors with the model's own library and send them as vectors",
            )


def _modules(folder: Path) -> tuple[str, bool]:
    """Pooling, and whether vectors get length one; without modules.json mean, and not."""
    path = folder / "modules.json"
    if not path.is_file():
        return "mean", False
    try:
        listed = [
            (str(each["type"]).rpartition(".")[2], str(each["path"]))
            for each in read_json(path, MAX_TEXT_BYTES)
        ]
    except (KeyError, TypeError, OSError) as error:
        raise CorruptFile(f"{path}: not a list of modules", got=repr(error)) from error
    kinds = [kind for kind, _ in listed]
    if kinds not in ([TRANSFORMER, POOLING], [TRANSFORMER, POOLING, NORMALIZE]):
        raise ConfigError(
            f"{path}: modules that are not known",
            expected=f"{TRANSFORMER}, {POOLING} and maybe {NORMALIZE}",
            got=", ".join(kinds),
        )
    declared = _json(folder / Path(listed[1][1]).name / CONFIG)
    named = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
    ways = [way for way, name in named.items() if declared.get(name)]
    others = [name for name, on in declared.items() if name.startswith("pooling_mode_") and on]
    if "pooling_mode" in declared:
        ways, others = [str(declared["pooling_mode"])], [str(declared["pooling_mode"])]
    if len(others) != 1 or ways[:1] not in [[way] for way in WAYS]:
        raise ConfigError(
            f"{path}: a pooling that is not known",
            expected=" or ".join(WAYS),
            got=", ".join(others) or "none",
        )
    return ways[0], kinds[-1] == NORMALIZE


def _id(folder: Path, values: dict[str, Any]) -> str:
    digest = hashlib.sha256(repr(sorted(values.items())).encode())
    for name in (TOKENIZER, WEIGHTS):
        digest.update(sha256_of(folder / name).encode())
    return digest.hexdigest()[:ID_DIGITS]
