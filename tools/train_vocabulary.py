"""Train a vocabulary on dialogue corpora: a SentencePiece model, or a byte-level BPE.

A SentencePiece model has the layout of T5's published vocabulary (pad 0, end 1, unknown 2, no
begin). Unlike T5's, it can hold Cosmo's separators as pieces of their own. A byte-level BPE has the
layout of BlenderBot's (pad 0, start 1, end 2, unknown 3, and spare rows at the end). Both are read
by `tasks.vocabularies`.
"""

from __future__ import annotations

import argparse
import io
import json
import string
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cosmo.engine.base import byte_level_bpe, command_line
from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import DataError, UserError
from cosmo.tasks.files import files_for_split, resolve
from cosmo.tasks.formatting import soda_examples
from cosmo.tasks.prosocial import prosocial_examples
from cosmo.tasks.readers import read_prosocial, read_soda
from cosmo.tasks.recognize import PROSOCIAL, looks_like
from cosmo.tasks.vocabularies import import_tokenizers, load

# Pieces for all that an English speaker types, even if the corpus never uses the character.
_REQUIRED_CHARACTERS = string.ascii_letters + string.digits + string.punctuation
# BlenderBot's vocabulary ends in as many; Prost's marks take two.
_SPARE = tuple(f"__FP16_PAD_{number}__" for number in range(4))
_LONGEST_TEXT = 65_536  # bytes; SentencePiece silently leaves out texts longer than its limit


def corpus_of(file: Any) -> str:
    """Return "soda" or "prosocial", by the fields of the first record of `file`; else DataError."""
    found = looks_like(file)
    if found == "SODA":
        return "soda"
    if found in PROSOCIAL:
        return "prosocial"
    raise DataError.at(
        file,
        None,
        "the corpus cannot be told from the first record",
        got=found or "a file of no known corpus",
        expected="SODA (narrative, dialogue, speakers) or ProsocialDialog (context, response, ...)",
        remedy="Give files of these corpora.",
    )


def corpus_texts(inputs: Sequence[str], split: str) -> Iterator[str]:
    """Yield every text that a model reads or writes for `split`, each once per dialogue."""
    for path in inputs:
        # A file named on the command line is read, whatever split its name has.
        files = [resolve(path)] if resolve(path).is_file() else files_for_split(path, split)
        for file in files:
            if corpus_of(file) == "soda":
                dialogues = ((soda_examples(item), ()) for item in read_soda({split: file}, split))
            else:
                dialogues = (
                    (
                        prosocial_examples(item),
                        [text for turn in item.turns for text in (turn.safety_label, *turn.rots)],
                    )
                    for item in read_prosocial({split: file}, split)
                )
            for examples, more in dialogues:
                # A dialogue's narrative and earlier turns are in each of its examples: each text
                # counts once.
                texts = list(more)
                for example in examples:
                    texts += [example.narrative, example.instruction]
                    texts += [*example.turns, example.response]
                yield from filter(None, dict.fromkeys(texts))


def train(texts: Iterable[str], size: int, symbols: Sequence[str]) -> bytes:
    """Return the model file of a unigram vocabulary of at most `size` pieces.

    The same texts give the same bytes. Raises RuntimeError where SentencePiece refuses.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        # T5's type; HuggingFace's tokenizer is written for no other.
        model_type="unigram",
        vocab_size=size,
        hard_vocab_limit=False,  # a small corpus gives a smaller vocabulary, not an error
        # T5's layout, by which the engine finds PAD, EOS and unknown pieces.
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        user_defined_symbols=list(symbols),
        required_chars=_REQUIRED_CHARACTERS,
        # Small corpora: a rare character would be unknown, and a piece costs little.
        character_coverage=1.0,
        # As T5's: bytes would take 256 pieces of a small vocabulary.
        byte_fallback=False,
        normalization_rule_name="nmt_nfkc",
        max_sentence_length=_LONGEST_TEXT,
        num_threads=1,  # more threads sum in another order: other bytes
        # Errors alone: the library reports every iteration.
        minloglevel=2,
    )
    return model.getvalue()


def train_bpe(texts: Iterable[str], size: int) -> str:
    """Return the `tokenizer.json` of a byte-level BPE of at most `size` pieces.

    The same texts give the same text. Raises ValueError if `size` has no room for a merge.
    """
    tokenizers = import_tokenizers("to train")
    alphabet = sorted(byte_level_bpe.SYMBOLS)
    merges = size - len(byte_level_bpe.SPECIAL) - len(alphabet) - len(_SPARE)
    if merges < 1:
        raise ValueError(f"--vocab_size={size} is less than the {size - merges + 1} needed")
    # The pieces that BlenderBot adds to its BPE get no ids here.
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=len(alphabet) + merges, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    trained = json.loads(model.to_str())["model"]
    pieces = sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    pairs = tuple(map(tuple, trained["merges"]))
    found = byte_level_bpe.ByteLevelBpe((*byte_level_bpe.SPECIAL, *pieces, *_SPARE), pairs)
    return found.tokenizer_json()


def unknown_rate(model: bytes, texts: Iterable[str]) -> tuple[int, int]:
    """Return (unknown pieces, all pieces) of the encoded `texts`."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    unknown = total = 0
    for text in texts:
        ids = processor.encode(text)
        unknown += ids.count(processor.unk_id())
        total += len(ids)
    return unknown, total


FLAGS = """
--output FILE!     the model file to write
--kind unigram|bpe=unigram  unigram: SentencePiece, for T5; bpe: byte-level BPE, for BlenderBot
                   (needs tokenizers: pip install 'cosmo-dialogue[blenderbot]')
--vocab_size N=2000  pieces at most; fewer when the corpus has no more
--symbols A,B=<sep>,<turn>  texts that always become one piece, with commas between
                   (Cosmo's separators; empty for none; a BPE has none)
--split NAME=train  the split to read of a folder
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.train_vocabulary",
        description="Train a vocabulary on SODA and ProsocialDialog files. A SentencePiece unigram "
        "model has T5's special pieces (pad 0, end 1, unknown 2), the separators as pieces, and "
        "all printable ASCII characters. A byte-level BPE has BlenderBot's special pieces (pad 0, "
        "start 1, end 2, unknown 3), all bytes, and four spare rows. The same input gives the same "
        "bytes.",
        epilog="Example: python -m tools.train_vocabulary --input tasks/sample/soda "
        "tasks/sample/prosocial --output=tasks/sample/vocabulary.model --vocab_size=2000",
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files (JSON lines, JSON or Parquet, plain or gzipped) or folders of either corpus; "
        "which one is told by the fields",
    )
    command_line.add_flags(parser, FLAGS)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Train and write a vocabulary, and print its size and its share of unknown pieces."""
    options = _parser().parse_args(arguments)
    try:
        texts = list(corpus_texts(options.input, options.split))
        if options.kind == "bpe":
            model = train_bpe(texts, options.vocab_size).encode()
            share = "no text has an unknown piece"
        else:
            symbols = [symbol for symbol in options.symbols.split(",") if symbol]
            model = train(texts, options.vocab_size, symbols)
            unknown, total = unknown_rate(model, texts)
            share = f"<unk> {unknown} of {total} pieces ({unknown / max(total, 1):.4%})"
        output = Path(options.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(output, model)
    except (OSError, UserError, ValueError, RuntimeError) as error:
        message = " ".join(str(error).split())
        if "Vocabulary size is smaller" in message:  # SentencePiece names options we do not have
            message = f"--vocab_size={options.vocab_size} is less than the characters need"
        print(f"train_vocabulary: {message}", file=sys.stderr)
        return 1
    # Read back as training will read it: a file that it refuses must not pass here.
    size = load(options.output).size
    print(f"{options.output}: {size} pieces from {len(texts)} texts; {share}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
