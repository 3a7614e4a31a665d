"""Time train steps and generation: a function for each library, run in a process of its own.

A function imports its own library, so that it runs where the others are not installed. It returns
{"rates": tokens a second of each repetition}.
"""

import argparse
import functools
import json
import os
import pathlib

from tools.bench_rates import timed

SIZES = {"batch": 8, "inputs": 256, "targets": 64}
# T5 1.1 small for transformers, as gin/models/t5_1_1_small.gin has it for us.
VOCAB, EMB, HEADS, LAYERS, HEAD, MLP = 32128, 512, 6, 8, 64, 1024
PIECES = range(3, 2000)  # of the sample vocabulary, but for padding, EOS and unknown


def random_batch() -> dict:
    """Return full rows of random pieces, as NumPy arrays."""
    import numpy as np

    # One seed: every side computes the same rows.
    random = np.random.default_rng(0)
    shape = {n: (SIZES["batch"], SIZES[n]) for n in ("inputs", "targets")}
    return {
        n: random.integers(PIECES.start, PIECES.stop, s).astype("int32") for n, s in shape.items()
    }


def network(model: str, **settings):
    """Return the network of gin/models/`model`.gin, with further `settings` of T5Config."""
    from cosmo.engine.base import config, saved_settings
    from cosmo.engine.model import t5

    sizes = saved_settings.macros_in((config.ROOT / f"gin/models/{model}.gin").read_text())
    return t5.T5Config(**{name.lower(): value for name, value in sizes.items()}, **settings)


def our_network(args: argparse.Namespace):
    """Return T5 1.1 small in our engine."""
    how = {"dropout_rate": args.dropout_rate, "scan_layers": args.scan_layers}
    return network("t5_1_1_small", dtype="float32", **how)


def write_weights(folder: str, config, vocabulary: str) -> None:
    """Write fresh weights of a network as a HuggingFace folder with its vocabulary."""
    import jax
    import numpy as np
    from etils import epath

    from cosmo.engine.checkpoints import lazy
    from cosmo.engine.checkpoints.description import flat
    from cosmo.engine.checkpoints.interop import huggingface, tokenizer
    from cosmo.engine.model import models

    model = models.EncoderDecoderModel(config)
    params = jax.jit(lambda: models.init(model, jax.random.key(0)))()
    arrays = {p: lazy.from_array(np.asarray(x)) for p, x in flat(params).items()}
    out = epath.Path(folder)
    out.mkdir()
    # One file: all of the weights have 300 MB.
    huggingface.write_folder(out, arrays, config, "float32", 10**10, lambda count: None)
    tokenizer.write_tokenizer(out, vocabulary)


def ours_train(args: argparse.Namespace) -> dict:
    """Time our engine's train steps."""
    import jax
    import numpy as np

    from cosmo.engine.model import models, step

    model = models.EncoderDecoderModel(our_network(args))
    settings, batch = step.StepConfig(), random_batch()
    # Donated, as in training: the new state takes the memory of the old one.
    run = jax.jit(step.make_train_step(model, settings, seed=0), donate_argnums=0)
    state = jax.jit(lambda: step.init_state(model, settings, 0))()
    features = {
        "encoder_input_tokens": batch["inputs"],
        "decoder_input_tokens": np.pad(batch["targets"], ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": batch["targets"],
    }

    def one():
        nonlocal state
        state, sums = run(state, features)
        # JAX returns before the device is done.
        jax.block_until_ready((state, sums))

    return timed(one, args.steps, sum(array.size for array in batch.values()))


def ours_decode(args: argparse.Namespace) -> dict:
    """Time our engine's generation; the tokens are the `answer`."""
    import jax
    import numpy as np

    import cosmo
    from cosmo.engine.model import decoding, generate

    session = cosmo.load(args.weights).session
    settings = decoding.DecodingConfig(
        max_new_tokens=args.new_tokens,
        temperature=0.0 if args.top_p is None else 1.0,
        top_p=args.top_p or 1.0,
    )
    run = jax.jit(lambda p, x, k: generate.predict(session.model, p, x, settings, k))
    # A key for each row, as inference has.
    keys, inputs = jax.random.split(jax.random.key(1), SIZES["batch"]), random_batch()["inputs"]
    out = {}

    def one():
        out["tokens"] = np.asarray(run(session.params, inputs, keys).tokens)

    result = timed(one, args.steps, SIZES["batch"] * args.new_tokens)
    # A row that ended early computes less than the peers, which are made to write every token.
    if not out["tokens"][..., -1].all():
        raise SystemExit("a row ended before the last position: nothing to compare")
    return {**result, "answer": out["tokens"][:, 0].tolist()}


def huggingface_train(args: argparse.Namespace) -> dict:
    """Time train steps of transformers on PyTorch."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration
    from transformers.optimization import Adafactor

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=EMB,
            d_kv=HEAD,
            d_ff=MLP,
            num_layers=LAYERS,
            num_decoder_layers=LAYERS,
            num_heads=HEADS,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            dropout_rate=args.dropout_rate,
            decoder_start_token_id=0,
        )
    )
    batch = {name: torch.tensor(array).long() for name, array in random_batch().items()}
    model.train()
    # A given rate, as ours has: this class would else make one from its own count of steps.
    optimizer = Adafactor(model.parameters(), lr=1e-3, relative_step=False, warmup_init=False)

    def one():
        model(input_ids=batch["inputs"], labels=batch["targets"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return timed(one, args.steps, sum(array.numel() for array in batch.values()))


def huggingface_decode(args: argparse.Namespace) -> dict:
    """Time generation by transformers; the tokens are the `answer`."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(args.weights).eval()
    # torch looks up embeddings by 64-bit integers.
    inputs, new = torch.tensor(random_batch()["inputs"]).long(), args.new_tokens
    sampling = {} if args.top_p is None else {"do_sample": True, "top_p": args.top_p, "top_k": 0}
    out = {}

    def one():
        # Every token is written: a rate must not depend on where the answers end.
        out["tokens"] = model.generate(inputs, max_new_tokens=new, min_new_tokens=new, **sampling)

    result = timed(one, args.steps, SIZES["batch"] * new)
    # The first is the decoder's start token, which ours does not return.
    return {**result, "answer": out["tokens"][:, 1:].tolist()}


def ctranslate2_decode(args: argparse.Namespace, compute_type: str = "float32") -> dict:
    """Time generation by CTranslate2; the tokens are the `answer`."""
    import ctranslate2

    folder = pathlib.Path(args.weights).with_name("ctranslate2")
    # Converted in the first round, and kept for the others.
    if not folder.exists():
        ctranslate2.converters.TransformersConverter(args.weights).convert(str(folder))
    translator = ctranslate2.Translator(
        str(folder),
        device="cpu",
        compute_type=compute_type,
        intra_threads=int(os.environ["OMP_NUM_THREADS"]),
    )
    pieces = json.loads((folder / "shared_vocabulary.json").read_text())
    inputs = [[pieces[i] for i in row] for row in random_batch()["inputs"].tolist()]
    new = args.new_tokens
    # 0 means all tokens. Its default of 1 would be greedy.
    sampling = {} if args.top_p is None else {"sampling_topk": 0, "sampling_topp": args.top_p}
    out = {}

    def one():
        out["tokens"] = translator.translate_batch(
            inputs, beam_size=1, max_decoding_length=new, min_decoding_length=new, **sampling
        )

    result = timed(one, args.steps, len(inputs) * new)
    # CTranslate2 answers in pieces, the others in ids.
    numbers = {piece: i for i, piece in enumerate(pieces)}
    return {**result, "answer": [[numbers[t] for t in r.hypotheses[0]] for r in out["tokens"]]}


def onnxruntime_decode(args: argparse.Namespace) -> dict:
    """Time generation by ONNX Runtime, by way of optimum; the tokens are the `answer`."""
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTModelForSeq2SeqLM

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    folder = pathlib.Path(args.weights).with_name("onnx")
    # Exported in the first round, and kept for the others.
    source, exports = (folder, False) if folder.exists() else (args.weights, True)
    model = ORTModelForSeq2SeqLM.from_pretrained(source, export=exports, session_options=options)
    if exports:
        model.save_pretrained(folder)
    inputs, new = torch.tensor(random_batch()["inputs"]).long(), args.new_tokens
    sampling = {} if args.top_p is None else {"do_sample": True, "top_p": args.top_p, "top_k": 0}
    out = {}

    def one():
        out["tokens"] = model.generate(inputs, max_new_tokens=new, min_new_tokens=new, **sampling)

    result = timed(one, args.steps, SIZES["batch"] * new)
    return {**result, "answer": out["tokens"][:, 1:].tolist()}


SIDES = {
    "train": {"ours": ours_train, "huggingface": huggingface_train},
    "decode": {
        "ours": ours_decode,
        "huggingface": huggingface_decode,
        "ctranslate2": ctranslate2_decode,
        "ctranslate2_int8": functools.partial(ctranslate2_decode, compute_type="int8"),
        "onnxruntime": onnxruntime_decode,
    },
}
