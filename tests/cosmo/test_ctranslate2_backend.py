"""Answers by CTranslate2 beside the engine's, from one checkpoint. Most need the extra `ct2`."""

import json
import pathlib

import pytest

import cosmo
from cosmo.__main__ import main
from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints import any_format
from cosmo.engine.infer import continuous, ctranslate2_model, infer
from cosmo.engine.model import models, t5
from cosmo.engine.model.decoding import DecodingConfig
from cosmo.tasks import vocabularies
from tests.tiny_models import save

VOCABULARY = "tasks/sample/vocabulary.model"
LENGTHS = {"inputs": 64, "targets": 12}
# Sums in another order flip a near-tie now and then, and all later tokens follow it.
MIN_EQUAL = 0.95
SCORE_ERROR = 2e-3  # nats of a whole answer in float32


def rows(count: int) -> list[list[str]]:
    """Return the first turns of the sample's dialogues."""
    lines = pathlib.Path("tasks/sample/questions.jsonl").read_text().splitlines()
    turns = [json.loads(line)["turns"] for line in lines]
    for path in sorted(pathlib.Path("tasks/sample/soda").glob("*.jsonl")):
        turns += [json.loads(line)["dialogue"][:3] for line in path.read_text().splitlines()]
    return turns[:count]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    """A T5 1.1 of random weights, saved as a run."""
    folder = tmp_path_factory.mktemp("ct2") / "run"
    vocabulary = vocabularies.load(VOCABULARY)
    network = t5.T5Config(
        vocab_size=vocabulary.size,
        emb_dim=32,
        num_heads=2,
        num_encoder_layers=2,
        num_decoder_layers=2,
        head_dim=16,
        mlp_dim=64,
        dtype="float32",
    )
    save(folder, models.EncoderDecoderModel(network), vocabulary)
    sizes = {
        "VOCAB_SIZE": network.vocab_size,
        "EMB_DIM": network.emb_dim,
        "NUM_HEADS": network.num_heads,
        "NUM_ENCODER_LAYERS": network.num_encoder_layers,
        "NUM_DECODER_LAYERS": network.num_decoder_layers,
        "HEAD_DIM": network.head_dim,
        "MLP_DIM": network.mlp_dim,
        "DTYPE": network.dtype,
        "TASK_FEATURE_LENGTHS": LENGTHS,
        "MAX_NEW_TOKENS": LENGTHS["targets"],
        "VOCABULARY_PATH": VOCABULARY,
        "MIXTURE_OR_TASK_NAME": "soda",
    }
    text = "".join(f"{name} = {value!r}\n" for name, value in sizes.items())
    (folder / "config.gin").write_text(text)
    return folder


@pytest.fixture(scope="module")
def ours(run):
    return cosmo.load(str(run), vocabulary=VOCABULARY, batch_size=8)


@pytest.fixture(scope="module")
def theirs(run):
    pytest.importorskip("ctranslate2")
    return cosmo.load(str(run), vocabulary=VOCABULARY, batch_size=8, backend="ctranslate2")


BEAMS = {"beam_size": 3, "search": "huggingface", "early_stopping": True}
WAYS = {
    "greedy": {},
    "min_length": {"min_length": 6},
    "block_ngram": {"block_ngram": 2},
    "banned_ids": {"banned_ids": (5, 17, 40)},
    "beams": BEAMS,
    "beams_limited": {**BEAMS, "length_penalty": 1.0, "min_length": 3, "block_ngram": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_the_engine_s(ours, theirs, way):
    """Oracle: our own decoding, greedy and by beams, on the sample's inputs."""
    records = rows(32)
    wanted, found = ours.generate(records, **WAYS[way]), theirs.generate(records, **WAYS[way])
    equal = [a for a, b in zip(wanted, found, strict=True) if a.texts == b.texts]
    assert len(equal) >= MIN_EQUAL * len(records)
    if way in ("greedy", "beams"):  # limits change CTranslate2's scores: see docs
        for a, b in zip(wanted, found, strict=True):
            if a.texts == b.texts:
                assert b.scores == pytest.approx(a.scores, abs=SCORE_ERROR)


def test_scores_are_the_engine_s(ours, theirs):
    """Oracle: our own log-likelihoods of given responses."""
    records = [{"turns": turns, "response": turns[0]} for turns in rows(12)]
    for a, b in zip(ours.score(records), theirs.score(records), strict=True):
        assert b.log_likelihood == pytest.approx(a.log_likelihood, abs=SCORE_ERROR)
        assert b.num_tokens == a.num_tokens


def test_samples(theirs, ours):
    """Oracles: a seed repeats its samples; at a low temperature they are the likeliest tokens."""
    records, how = rows(8), {"temperature": 1.0, "top_p": 0.9, "num_samples": 3}
    first, again = (theirs.generate(records, seed=1, **how) for _ in range(2))
    assert first == again
    assert first != theirs.generate(records, seed=2, **how)
    assert all(len(reply.texts) == 3 for reply in first)
    # CTranslate2 sorts them by score, which would favour the first one.
    assert any(reply.scores[0] != max(reply.scores) for reply in first)
    cold = theirs.generate(records, temperature=1e-3)
    assert [a.text for a in cold] == [a.text for a in ours.generate(records)]


def test_a_text_after_a_choice_is_the_engine_s(ours, theirs):
    """Oracle: our own choice and continuation, of choices of several lengths and with EOS."""
    encode, eos = ours.session.vocabulary.encode, ours.session.vocabulary.eos_id
    choices = [encode("yes"), encode("I do not know"), [*encode("no"), eos]]
    found = []
    for model in (ours, theirs):
        made = model._rows(rows(16))
        for decoding in (DecodingConfig(8, block_ngram=2), DecodingConfig(8, min_length=5)):
            work = infer.choosing_then_generating(model.session, choices, decoding)
            found.append(infer.answer(model.session, made, work))
        found.append(infer.answer(model.session, made, infer.choosing(model.session, choices)))
    for wanted, got in zip(found[:3], found[3:], strict=True):
        equal = 0
        for a, b in zip(wanted, got, strict=True):
            nats = (a.scores, b.scores) if a.choice is None else (a.choice_scores, b.choice_scores)
            assert nats[1] == pytest.approx(nats[0], abs=SCORE_ERROR)
            equal += (a.choice, a.predictions) == (b.choice, b.predictions)
        assert equal >= MIN_EQUAL * len(wanted)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_an_exported_folder_is_recognised(run, ours, tmp_path, dtype):
    """Oracle: `cosmo.load` of the run; the folder has its vocabulary, lengths and step."""
    pytest.importorskip("ctranslate2")
    folder = str(tmp_path / "exported")
    flags = [f"--checkpoint={run}", f"--output={folder}", f"--dtype={dtype}", "--quiet"]
    assert main(["export", "--format=ctranslate2", *flags]) == 0
    model = cosmo.load(folder)
    assert (model.step, model.session.lengths) == (ours.step, ours.session.lengths)
    records = rows(8)
    texts = [reply.text for reply in model.generate(records)]
    if dtype == "float32":
        assert texts == [reply.text for reply in ours.generate(records)]
    with pytest.raises(UserError, match="weights are not read here"):
        any_format.open_source(folder)
    other = "ctranslate2" if dtype == "int8" else "ctranslate2_int8"
    with pytest.raises(UserError, match="leave the backend out"):
        cosmo.load(folder, backend=other)
    with pytest.raises(UserError, match="needs the backend jax"):
        continuous.Scheduler(model.session)


def test_infer_takes_a_backend(run, tmp_path):
    """Oracles: the engine's own file of answers; a manifest that keeps the two apart."""
    pytest.importorskip("ctranslate2")
    source = tmp_path / "records.jsonl"
    source.write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in rows(8)))
    found = {}
    for backend in ("jax", "ctranslate2"):
        output = tmp_path / f"{backend}.jsonl"
        flags = [f"--input={source}", f"--output={output}", "--batch_size=8", "--quiet"]
        command = ["infer", f"--gin.MODEL_DIR={run}", *flags]
        assert main([*command, f"--backend={backend}"]) == 0
        found[backend] = [json.loads(line) for line in output.read_text().splitlines()]
    same = [a["prediction"] == b["prediction"] for a, b in zip(*found.values(), strict=True)]
    assert sum(same) >= len(same) - 1
    assert main([*command, "--backend=ctranslate2_int8"]) == 1  # another backend's output
    exported = tmp_path / "exported"
    flags = [f"--checkpoint={run}", f"--output={exported}", "--quiet"]
    assert main(["export", "--format=ctranslate2", *flags]) == 0
    output = tmp_path / "exported.jsonl"
    flags = [f"--input={source}", f"--output={output}", "--quiet"]
    assert main(["infer", f"--gin.MODEL_DIR={exported}", *flags]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [a["prediction"] for a in lines] == [a["prediction"] for a in found["ctranslate2"]]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"context_block_ngram": 2}, "n-grams"),
        ({"forced_eos": True}, "forced EOS"),
        ({"beam_size": 2}, "beam search 't5x'"),
        ({"beam_size": 2, "search": "huggingface"}, "early_stopping=False"),
    ],
)
def test_settings_that_ctranslate2_has_not(settings, words):
    """Oracle: the options of its `translate_batch`."""
    with pytest.raises(UserError, match=words):
        ctranslate2_model.check_decoding(DecodingConfig(**settings))


def test_wrong_backends(run, tmp_path):
    """Oracle: the list of backends; CTranslate2's weights have no dtype of JAX's products."""
    with pytest.raises(UserError, match="one of jax, ctranslate2, ctranslate2_int8"):
        cosmo.load(str(run), vocabulary=VOCABULARY, backend="torch")
    with pytest.raises(UserError, match="by the backend"):
        cosmo.load(str(run), vocabulary=VOCABULARY, backend="ctranslate2", dtype="bfloat16")
    for name in ("model.bin", "shared_vocabulary.json", "config.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="write it by"):
        cosmo.load(str(tmp_path))
    (tmp_path / "cosmo.json").write_text('{"dtype": "float16", "step": 1}')
    with pytest.raises(UserError, match="is damaged"):
        cosmo.load(str(tmp_path))
