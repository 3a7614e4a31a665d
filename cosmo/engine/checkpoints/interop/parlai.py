"""Read ParlAI's models: the file `model`, its options `model.opt`, its dictionary `model.dict`.

Two kinds are read. The first is the transformer of variant "prelayernorm": BlenderBot, and the
PushShift transformer that Prost starts from. The second is T5 (`hugging_face/t5`), as the published
Canary. Source: ParlAI 1.7.2, `agents/transformer` and `agents/hugging_face/t5.py`.
"""

from typing import Any

from etils import epath

from cosmo.engine.base.errors import UserError, shown
from cosmo.engine.checkpoints import lazy
from cosmo.engine.checkpoints.description import Path
from cosmo.engine.checkpoints.interop import foreign_files, huggingface, names, torch_file
from cosmo.engine.checkpoints.lazy import LazyArray
from cosmo.engine.model.blenderbot import BlenderbotConfig
from cosmo.engine.model.t5 import T5Config

USUAL_NAME = "model"
OPTIONS, DICTIONARY, BPE_VOCABULARY = ".opt", ".dict", ".dict-vocab.json"  # after the file's name
WEIGHTS = "model"  # the entry of the file that holds the tensors
T5 = "t5."  # begins the names of T5's tensors; HuggingFace's names follow
# The same tensors once more, as T5's modules hold them: {their name: HuggingFace's}.
T5_STACKS = {"encoder.stack.": "encoder.", "decoder.stack.": "decoder."}
START = "START"  # the start token's id, which is not a parameter
LAYER = "{side}.layers.{layer}."
EMBEDDING = "embeddings.weight"
COPIES = ("encoder.embeddings.weight", "decoder.embeddings.weight")
FORBIDDEN = (1,)  # ParlAI's transformer gives its start token the probability 0

# Options with one value that our network can compute, and what leaving one out means.
FIXED = {
    "variant": ("prelayernorm", "aiayn"),
    "activation": ("gelu", "relu"),
    "embeddings_scale": (True, True),
    "output_scaling": (1.0, 1.0),
    "n_segments": (0, 0),
    "share_word_embeddings": (True, True),
}
SMALL = "BlenderBot 90M has this variant, which norms after each layer"
# Options on the form of a model's texts: what stands between turns, and lengths.
DELIMITER, USUAL_DELIMITER = "delimiter", "\n"
LENGTHS = ("text_truncate", "label_truncate", "truncate")


def model_file(path: epath.Path) -> str | None:
    """Return the model's file of a ParlAI checkpoint, None if `path` is none.

    `path` is the file, or the folder of one model. Raises UserError for a folder of several.
    """
    if not path.is_dir():
        return str(path) if _has_options(path) else None
    found = [p.with_suffix("") for p in sorted(path.glob(f"*{OPTIONS}"))]
    found = [file for file in found if file.is_file()]
    usual = [file for file in found if file.name == USUAL_NAME]
    if len(found) > 1 and not usual:
        listed = ", ".join(str(file) for file in found[:3])
        raise UserError(f"{path} holds {len(found)} models of ParlAI: give one of {listed}")
    return str((usual or found)[0]) if found else None


def _has_options(file: epath.Path) -> bool:
    """Return whether a file has ParlAI's options beside it."""
    return file.is_file() and file.with_name(file.name + OPTIONS).is_file()


def vocabulary_path(path: str) -> str | None:
    """Return the dictionary of a model if it is a byte-level BPE, whose files are beside it.

    T5's is the SentencePiece model beside the file, which ParlAI itself does not write.
    """
    if epath.Path(path + BPE_VOCABULARY).exists():
        return path + DICTIONARY
    spiece = epath.Path(path).parent / "spiece.model"
    return str(spiece) if spiece.exists() else None


def open_checkpoint(path: str) -> tuple[dict[str, Any], dict[str, LazyArray]]:
    """Return (options, tensors by name) of a local file. Reads no tensor yet.

    Raises UserError if the file is remote, damaged, or holds anything but tensors and options.
    """
    if "://" in path:
        raise UserError(f"{path}: ParlAI's models are read from local disk; copy it first")
    options = foreign_files.read_json_object(epath.Path(path + OPTIONS))
    override = options.get("override") or {}
    if not isinstance(override, dict):
        raise UserError(f"{path}{OPTIONS}: override={shown(override)}, expected a JSON object")
    content = torch_file.read(path)
    tensors = content.get(WEIGHTS) if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not tensors:
        held = sorted(map(str, content)) if isinstance(content, dict) else content
        raise UserError(
            f"{path} has no entry {WEIGHTS!r} with tensors (it holds {shown(held)}): it is no "
            "model of ParlAI's"
        )
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, LazyArray):
            raise UserError(f"{path}: {WEIGHTS}/{name} is {shown(tensor)}, expected a tensor")
    return {**options, **override}, {k: t for k, t in tensors.items() if k != START}


def text_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options on the form of texts: the delimiter, and the lengths there are."""
    delimiter = options.get(DELIMITER, USUAL_DELIMITER)
    lengths = {name: options.get(name) for name in LENGTHS}
    # -1 and None stand for no limit.
    lengths = {name: n for name, n in lengths.items() if type(n) is int and n > 0}
    return {DELIMITER: delimiter if isinstance(delimiter, str) else USUAL_DELIMITER, **lengths}


def is_t5(tensors: dict[str, LazyArray]) -> bool:
    """Return whether a file's tensors are of ParlAI's T5 agent."""
    return any(name.startswith(T5) for name in tensors)


def network(
    path: str, options: dict[str, Any], tensors: dict[str, LazyArray]
) -> T5Config | BlenderbotConfig:
    """Return the network of a file. Raises UserError if ours cannot compute it."""
    if is_t5(tensors):
        return _t5_network(path, options, tensors)
    where = f"{path}{OPTIONS}"
    for name, (expected, default) in FIXED.items():
        value = options.get(name, default)
        if value != expected or isinstance(value, bool) != isinstance(expected, bool):
            further = f"; {SMALL}" if value == "xlm" else ""
            raise UserError(f"{where}: {name}={shown(value)}, expected {expected!r}{further}")
    embedding = tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{path} has no table {EMBEDDING}: it is no generator of ParlAI's")
    positions = tensors.get("encoder.position_embeddings.weight")
    if positions is None or len(positions.shape) != 2 or 0 in positions.shape:
        raise UserError(f"{path} has no table encoder.position_embeddings.weight")
    sizes = {
        "vocab_size": embedding.shape[0],
        "emb_dim": foreign_files.check_size(where, "embedding_size", options.get("embedding_size")),
        "num_heads": foreign_files.check_size(where, "n_heads", options.get("n_heads")),
        "mlp_dim": foreign_files.check_size(where, "ffn_size", options.get("ffn_size")),
        "max_positions": positions.shape[0],
    }
    for side in ("encoder", "decoder"):
        # -1 stands for the number that both sides have.
        layers = options.get(f"n_{side}_layers", -1)
        layers = options.get("n_layers") if layers == -1 else layers
        layers = foreign_files.check_size(where, f"n_{side}_layers", layers)
        foreign_files.check_layers(where, side, layers, tensors, f"{side}.layers.")
        sizes[f"num_{side}_layers"] = layers
    # Larger tables are for the hardware's sake, and 0 rows no table at all.
    if not all(id < sizes["vocab_size"] for id in FORBIDDEN):
        raise UserError(f"{path}: {EMBEDDING} has {sizes['vocab_size']} rows, expected more")
    width, heads = sizes["emb_dim"], sizes["num_heads"]
    # Building the network computes a table of this width.
    foreign_files.check_shape(where, EMBEDDING, embedding, (sizes["vocab_size"], width))
    foreign_files.check_heads(where, "embedding_size", width, "n_heads", heads)
    return BlenderbotConfig(
        **sizes,
        dropout_rate=foreign_files.check_rate(where, "dropout", options.get("dropout", 0.0)),
        forbidden_ids=FORBIDDEN,
        train_positions=options.get("learn_positional_embeddings") is True,
    )


def read_params(
    path: str,
    tensors: dict[str, LazyArray],
    config: T5Config | BlenderbotConfig,
    *,
    allow_nonfinite: bool = False,
) -> dict[Path, LazyArray]:
    """Return our parameters, float32, from a file's tensors.

    Raises UserError if a tensor is missing, surplus or misshapen, or a copy differs.
    """
    where = f"ParlAI model {path}"
    if isinstance(config, T5Config):
        # HuggingFace's tables serve, behind the prefix.
        return huggingface.read_params(
            path, _t5_tensors(path, tensors), config, allow_nonfinite=allow_nonfinite, where=where
        )
    found = dict(tensors)
    for name in COPIES:
        if name in found and not lazy.equal(found.pop(name), tensors[EMBEDDING]):
            raise UserError(f"{path}: {name} differs from {EMBEDDING}, which it should copy")
    places = [
        names.place(parameter, parameter.in_layers(LAYER, parameter.name.parlai))
        for parameter in names.parameters(config)
    ]
    return names.gather(where, found, places, allow_nonfinite=allow_nonfinite)


def _t5_tensors(path: str, tensors: dict[str, LazyArray]) -> dict[str, LazyArray]:
    """Return the tensors of a T5 under HuggingFace's names; UserError if a copy differs."""
    found = {k.removeprefix(T5): t for k, t in tensors.items() if k.startswith(T5)}
    for name, tensor in tensors.items():
        if name.startswith(T5):
            continue
        stack = next((stack for stack in T5_STACKS if name.startswith(stack)), None)
        if stack is None:
            raise UserError(f"{path} has {name}, which ParlAI's T5 has no place for")
        original = T5_STACKS[stack] + name.removeprefix(stack)
        if not lazy.equal(tensor, found.get(original)):
            raise UserError(f"{path}: {name} differs from {T5}{original}, which it should copy")
    return found


def _t5_network(path: str, options: dict[str, Any], tensors: dict[str, LazyArray]) -> T5Config:
    """Return the network of a T5, whose sizes are those of its tensors. Raises UserError."""

    def shape(name: str, axes: int = 2) -> tuple[int, ...]:
        found = tensors.get(T5 + name)
        if found is None or len(found.shape) != axes or 0 in found.shape:
            raise UserError(f"{path} has no matrix {T5}{name}: it is no T5 of ParlAI's")
        return found.shape

    vocab_size, emb_dim = shape("shared.weight")
    buckets, heads = shape(f"encoder.{names.BIAS}")
    inner, _ = shape("encoder.block.0.layer.0.SelfAttention.q.weight")
    gated = f"{T5}encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in tensors
    mlp_dim, _ = shape(f"encoder.block.0.layer.1.DenseReluDense.wi{'_0' if gated else ''}.weight")
    layers = {
        side: foreign_files.layers_in(tensors, f"{T5}{side}.block.")
        for side in ("encoder", "decoder")
    }
    if inner % heads or not layers["decoder"]:
        raise UserError(
            f"{path}: {inner} outputs of the queries, {heads} heads and {layers['decoder']} "
            "decoder layers are of no T5"
        )
    head = tensors.get(f"{T5}lm_head.weight")
    return T5Config(
        vocab_size=vocab_size,
        emb_dim=emb_dim,
        num_heads=heads,
        head_dim=inner // heads,
        mlp_dim=mlp_dim,
        num_encoder_layers=layers["encoder"],
        num_decoder_layers=layers["decoder"],
        relative_attention_num_buckets=buckets,
        # T5 1.0 and Flan-T5 (1.1), the only ones that ParlAI offers.
        mlp_activations=("gelu", "linear") if gated else ("relu",),
        logits_via_embedding=head is None or lazy.equal(head, tensors[f"{T5}shared.weight"]),
        # ParlAI's loss scales every T5's logits, those of Flan-T5 too.
        scale_decoder_outputs=True,
        dropout_rate=foreign_files.check_rate(
            f"{path}{OPTIONS}", "t5_dropout", options.get("t5_dropout", 0.0)
        ),
    )
