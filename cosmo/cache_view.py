"""What a cache holds, for people."""

from cosmo.engine.base.errors import UserError
from cosmo.engine.data.cache_reading import Cache
from cosmo.tasks import vocabularies


def report(cache: Cache) -> str:
    """A finished cache in a few lines."""
    lines = [f"{cache.path}: {cache}"]
    for name, entry in cache.manifest["tasks"].items():
        lines.append(
            f"  {name}: {entry['cached']['examples']:,} examples ({entry['times']:.4g} times an "
            f"epoch), {entry['unknown_share']:.2%} of its pieces unknown"
        )
    return "\n".join(lines)


def show(path: str, rows: str, vocabulary_path: str | None = None) -> None:
    """Print the examples of `rows`, numbers and commas: their ids and their texts."""
    cache = Cache(path)
    known = cache.manifest["vocabulary"]
    vocabulary = vocabularies.load(vocabulary_path or known["path"])
    if vocabulary.fingerprint != known["fingerprint"]:
        raise UserError(
            f"{vocabulary.path} is not the vocabulary of {path}; give it with --vocabulary=FILE"
        )
    for text in rows.split(","):
        if not text.strip().isdigit() or int(text) >= cache.rows:
            raise UserError(f"--show={rows}: {text!r} is no row; there are 0 to {cache.rows - 1}")
        number = int(text)
        (record,) = cache.records([number])
        batch = cache.format.features(cache.format.decode([record]))
        shard, position = cache.place(number)
        print(f"row {number} ({shard['file']}, record {position}, epoch {shard['epoch']})")
        sides = {
            side: (batch[tokens][0], batch.get(f"{side}_segment_ids", [None])[0])
            for side, tokens in (
                ("encoder", "encoder_input_tokens"),
                ("decoder", "decoder_target_tokens"),
            )
        }
        for segment, name in enumerate(cache.format.names(record), 1):
            print(f"  {segment}. {name or '(no id)'}")
            for label, side in (("inputs", "encoder"), ("targets", "decoder")):
                tokens, segments = sides[side]
                ids = tokens if segments is None else tokens[segments == segment]
                print(f"     {label}: {vocabulary.decode(ids)}")
