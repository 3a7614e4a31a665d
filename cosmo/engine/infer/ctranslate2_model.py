"""Answer with CTranslate2, a fast engine for processors: token ids in, token ids out.

The package `ctranslate2` (extra `ct2`) computes; `checkpoints/interop/ctranslate2_folder.py` writes
what it reads. Calls return at once with a function that waits for the results, as JAX does.
"""

import dataclasses
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from cosmo.engine.base.errors import UserError
from cosmo.engine.base.worker_processes import usable_cores
from cosmo.engine.checkpoints import any_format, convert
from cosmo.engine.checkpoints.description import check_network, check_same_vocabulary
from cosmo.engine.checkpoints.interop import ctranslate2_folder
from cosmo.engine.model.decoding import DecodingConfig

# {name of a backend: type of its weights}, beside "jax", this engine.
DTYPES = {"ctranslate2": "float32", "ctranslate2_int8": "int8"}
BACKENDS = ("jax", *DTYPES)

Ids = Sequence[int]


class Generated(NamedTuple):
    """The answers to one input: the ids of each, with EOS, and their scores (nats)."""

    tokens: list[list[int]]
    scores: list[float]


@dataclasses.dataclass(frozen=True)
class Model:
    """An opened CTranslate2 folder; made by `open_model`."""

    translator: Any = dataclasses.field(repr=False)
    reopen: Callable[[], Any] = dataclasses.field(repr=False)  # another translator
    names: tuple[str, ...] = dataclasses.field(repr=False)  # of the token ids
    ids: Mapping[str, int] = dataclasses.field(repr=False)
    eos: int

    def generate(
        self,
        inputs: Sequence[Ids],
        decoding: DecodingConfig,
        seed: int = 0,
        prefixes: Sequence[Ids] | None = None,
    ) -> Callable[[], list[Generated]]:
        """Begin to answer `inputs`; return a function that waits for the answers.

        An answer follows its input's prefix, which is neither in its ids nor in its score. Samples
        are a function of `seed` and of all arguments. Raises UserError as `check_decoding`.
        """
        check_decoding(decoding)
        prefixes = prefixes if prefixes is not None else [()] * len(inputs)
        translator = self.translator
        if decoding.temperature:
            # A thread of CTranslate2's reads the seed once, at its first sample. Hence new threads.
            ctranslate2_folder.package().set_random_seed(seed)
            translator = self.reopen()
        sent: list[Any] = [None] * len(inputs)
        # By length, because CTranslate2 counts a prefix among the tokens that it may write.
        for length in sorted(set(map(len, prefixes))):
            places = [place for place, prefix in enumerate(prefixes) if len(prefix) == length]
            results = translator.translate_batch(
                [self._texts(inputs[place]) for place in places],
                [self._texts(prefixes[place]) for place in places] if length else None,
                asynchronous=True,
                return_scores=True,
                return_end_token=True,
                max_input_length=0,  # its default cuts inputs to 1024 tokens
                **self._options(decoding, length),
            )
            for place, result in zip(places, results, strict=True):
                sent[place] = (result, length)
        shuffled = random.Random(seed)

        def wait() -> list[Generated]:
            return [
                self._generated(one.result(), length, decoding, shuffled) for one, length in sent
            ]

        return wait

    def write(
        self,
        inputs: Sequence[Ids],
        decoding: DecodingConfig,
        prefixes: Sequence[Ids],
        on_step: Callable[[int, int, int, float], bool],
    ) -> None:
        """Answer `inputs` token by token, and return when all answers have ended.

        `on_step(row, step, id, nats)` is called for each token, those of the prefixes included,
        in a thread of CTranslate2's. It returns True to end the row. Prefixes have one length.
        Several calls at once share the translator's threads. Raises UserError as `check_decoding`.
        """
        check_decoding(decoding)
        length = len(prefixes[0])
        self.translator.translate_batch(
            [self._texts(ids) for ids in inputs],
            [self._texts(ids) for ids in prefixes] if length else None,
            callback=lambda one: on_step(one.batch_id, one.step, one.token_id, one.log_prob),
            return_scores=True,  # else the steps have none either
            max_input_length=0,
            **self._options(decoding, length),
        )

    def wait_until_idle(self) -> None:
        """Wait until CTranslate2's threads have dropped the callbacks of `write`."""
        # They do so a moment after the call has returned, and need Python's lock for it. A thread
        # that asks for the lock while Python ends aborts the process.
        while self.translator.num_active_batches:
            time.sleep(0.001)

    def log_likelihoods(
        self, inputs: Sequence[Ids], targets: Sequence[Ids]
    ) -> Callable[[], list[float]]:
        """Begin to score each target after its input; return a function that waits for the nats.

        EOS counts where a target ends in it.
        """
        results = self.translator.score_batch(
            [self._texts(ids) for ids in inputs],
            # CTranslate2 adds EOS itself.
            [self._texts(ids[:-1] if ids[-1] == self.eos else ids) for ids in targets],
            max_input_length=0,
            asynchronous=True,
        )
        lengths = [len(ids) for ids in targets]

        def wait() -> list[float]:
            found = [result.result().log_probs for result in results]
            return [sum(nats[:length]) for nats, length in zip(found, lengths, strict=True)]

        return wait

    def _texts(self, ids: Ids) -> list[str]:
        return [self.names[id] for id in ids]

    def _options(self, decoding: DecodingConfig, prefix_length: int) -> dict[str, Any]:
        options: dict[str, Any] = {
            "beam_size": decoding.beam_size,
            "num_hypotheses": decoding.rows_per_input,
            # 0 gives greedy answers and samples their log-likelihood.
            "length_penalty": decoding.length_penalty if decoding.beam_size > 1 else 0.0,
            "max_decoding_length": decoding.max_new_tokens + prefix_length,
            "min_decoding_length": decoding.min_length + prefix_length,
            "no_repeat_ngram_size": decoding.block_ngram,
        }
        if decoding.banned_ids:
            options["suppress_sequences"] = [[self.names[id]] for id in decoding.banned_ids]
        if decoding.temperature:
            options["sampling_temperature"] = decoding.temperature
            options["sampling_topk"] = decoding.top_k
            options["sampling_topp"] = decoding.top_p
        return options

    def _generated(
        self, result: Any, prefix_length: int, decoding: DecodingConfig, shuffled: random.Random
    ) -> Generated:
        texts, scores = list(result.hypotheses), list(result.scores)
        if decoding.num_samples > 1:
            # CTranslate2 sorts samples by score, and the first one must be a sample like any other.
            order = shuffled.sample(range(len(texts)), len(texts))
            texts, scores = [texts[i] for i in order], [scores[i] for i in order]
        ids = [[self.ids[text] for text in one[prefix_length:]] for one in texts]
        return Generated(ids, scores)


def check_decoding(decoding: DecodingConfig) -> None:
    """Raise UserError for settings of generation that CTranslate2 does not have."""
    problem = None
    if decoding.beam_size > 1 and decoding.search != "huggingface":
        problem = (
            f"the beam search {decoding.search!r}: its own ranks as 'huggingface' does",
            "BEAM_SEARCH",
        )
    elif decoding.beam_size > 1 and not decoding.early_stopping:
        problem = (
            "a beam search that goes on once beam_size answers have ended (early_stopping=False)",
            "BEAM_EARLY_STOPPING",
        )
    elif decoding.context_block_ngram:
        problem = ("n-grams that are blocked because the input has them", "CONTEXT_BLOCK_NGRAM")
    elif decoding.forced_eos:
        problem = ("a forced EOS at the end of the longest answers", "FORCED_EOS")
    if problem:
        raise UserError(
            f"CTranslate2 has not {problem[0]}: leave it out, or answer by the backend jax",
            setting=problem[1],
        )


def backend_of(path: str, wanted: str | None) -> str:
    """Return the backend that answers by the checkpoint at `path`: `wanted`, or the usual one.

    A CTranslate2 folder has its own, and any other checkpoint has "jax". Raises UserError
    for an unknown name, and for one that the folder does not allow.
    """
    if wanted is not None and wanted not in BACKENDS:
        raise UserError(
            f"backend={wanted!r}; it is one of {', '.join(BACKENDS)}", setting="BACKEND"
        )
    found = any_format.locate(path)
    if found.format != "ctranslate2":
        return wanted or "jax"
    dtype = ctranslate2_folder.read_description(found.folder)["dtype"]
    own = next(name for name, kind in DTYPES.items() if kind == dtype)
    if wanted not in (None, own):
        raise UserError(
            f"{path} is a CTranslate2 folder of {dtype} weights, whose backend is {own}, not "
            f"{wanted}: leave the backend out, or give the checkpoint that it was exported from",
            setting="BACKEND",
        )
    return own


def open_model(
    path: str, backend: str, wanted: Mapping[str, Any], batches: int = 1
) -> tuple[Model, int]:
    """Return (the model at `path`, its step). A checkpoint is converted into a temporary folder.

    It computes so many `batches` at a time, which share the weights. Raises UserError if it is of
    another network or vocabulary than the description `wanted`, or none that CTranslate2 computes.
    """
    ctranslate2 = ctranslate2_folder.package()
    found, temporary = any_format.locate(path), None
    folder = found.folder
    if found.format != "ctranslate2":
        temporary = tempfile.TemporaryDirectory(prefix="cosmo-ctranslate2-")
        folder = f"{temporary.name}/model"
        convert.export_checkpoint(path, folder, format="ctranslate2", dtype=DTYPES[backend])
    description = ctranslate2_folder.read_description(folder)
    check_network(path, description, dict(wanted))
    check_same_vocabulary(path, description.get("vocabulary"), wanted.get("vocabulary"))
    threads = int(os.environ.get("OMP_NUM_THREADS") or usable_cores())

    def reopen(kept: Any = temporary) -> Any:  # the folder is removed with this function
        return ctranslate2.Translator(
            folder,
            device="cpu",
            compute_type=DTYPES[backend],
            inter_threads=batches,
            intra_threads=threads,
        )

    names = ctranslate2_folder.read_token_names(folder)
    ids = {name: id for id, name in enumerate(names)}
    eos = any_format.network_of(folder, description).special_ids.eos
    return Model(reopen(), reopen, tuple(names), ids, eos), description["step"]
