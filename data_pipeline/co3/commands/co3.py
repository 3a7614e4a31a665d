"""Distil dialogues from a language model: triples in, SODA out (Kim et al. 2023).

It calls any server that speaks OpenAI's API (vLLM, llama.cpp, hosted ones). It writes to --output:
  soda.jsonl, soda.parquet        records with the published SODA's fields
  provenance.jsonl                further fields of each record, line by line
  rejected.jsonl                  every other triple, with its reason
  report.json, .txt, .png, README.md (a dataset card), journal/ (all answers)

The same command resumes a run that ended in any way. Every answer is journaled before it is used,
and no answered request is sent again. Ctrl-C and SIGTERM wait for the calls in flight. Settings may
change between starts: requests that stay the same keep their answers.

The key is read from the environment (OPENAI_API_KEY, or the variable named by --api_key_env).
Exit codes: 0 done; 1 an error; 3 a cap is reached; 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import gc
import json
import logging
import time
from pathlib import Path
from typing import Any

from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.progress import Progress
from cosmo.engine.base.retries import RetryPolicy
from data_pipeline.calls import answer_text, flags, run, secrets
from data_pipeline.calls.client import Client, Server, probe
from data_pipeline.calls.gateway import Gateway
from data_pipeline.calls.journal import Journal
from data_pipeline.calls.limits import Limits
from data_pipeline.calls.outputs import Outputs
from data_pipeline.co3 import distil, inflection, labels, postprocess, prompts, report, schema
from data_pipeline.co3.triples import CRITICS, NoTriples, Source

log = logging.getLogger("data_pipeline")


def add_arguments(made: argparse.ArgumentParser) -> None:
    """Add the flags of `co3`."""
    made.description = __doc__
    group = made.add_argument_group("input and output")
    group.add_argument(
        "--triples", type=Path, help="ATOMIC as .jsonl, .tsv or .parquet (or --no_context)"
    )
    group.add_argument("--output", type=Path, required=True, help="the folder of this run")
    group.add_argument("--critic", choices=CRITICS, help="ATOMIC-10X: what the critic keeps")
    group.add_argument("--sample", type=int, help="draw so many, in SODA's ratios of relations")
    group.add_argument(
        "--limit", type=int, help="only the first so many usable triples, of all shards"
    )
    group.add_argument("--shard", default="0/1", help="i/n: the i-th of n parts, from 0")
    group.add_argument("--seed", type=int, default=0, help="of names and samples (%(default)s)")
    group.add_argument("--prompts", type=Path, help="prompts of your own")
    group = made.add_argument_group("server")
    flags.add_server(group)
    group.add_argument("--moderation_url", help="a service with /moderations; none is asked else")
    group.add_argument("--moderation_model", default="omni-moderation-latest")
    # A variable of its own, because the service may be another company's.
    group.add_argument("--moderation_key_env", default="OPENAI_API_KEY", metavar="NAME")
    group = made.add_argument_group("limits")
    flags.add_limits(group)
    group = made.add_argument_group("stages")
    group.add_argument("--retries", type=int, help="of a narrative or dialogue (2)")
    group.add_argument(
        "--as_published", action="store_true", help="ask as the published code: prompts, 1 retry"
    )
    group.add_argument(
        "--no_context",
        action="store_true",
        help="in place of --triples: --limit dialogues without narrative, the paper's baseline",
    )
    group.add_argument("--canary_labels", type=Path, help="JSON lines of id and label")
    group.add_argument("--no_commonsense", action="store_true", help="ask no questions on triples")
    group.add_argument("--no_human", action="store_true", help="do not ask who is human")
    group.add_argument("--no_parquet", action="store_true", help="leave out soda.parquet")
    group.add_argument("--no_plots", action="store_true", help="leave out report.png")


def run_co3(args: argparse.Namespace) -> int:
    """Run `co3`; return the exit code."""
    # Before anything is opened, so that a mistyped number costs no call.
    least = {"sample": 1, "limit": 1, "retries": 0}
    flags.check(args, ("base_url", "moderation_url"), least)
    return asyncio.run(_main(args))


async def _main(args: argparse.Namespace) -> int:
    source = _source(args)
    _check_earlier(args)
    settings = _settings(args)
    server, allowance = flags.server(args), flags.allowance(args)
    # Before the journal makes its folder: a wrong path leaves nothing behind.
    identity = source.identity()
    inflection.past("to go")  # loads its dictionary now, not while answers wait
    gc.freeze()  # the modules and lists stay to the end, so collections need not visit them
    # Answers make few cycles: with the usual threshold of 700 objects, looking for them takes time
    # from the calls.
    gc.set_threshold(50_000, 20, 20)
    # Locked before the first call, because two runs in one folder would pay twice.
    with Journal(args.output / "journal") as journal:
        async with contextlib.AsyncExitStack() as stack:
            client = await stack.enter_async_context(Client(server, allowance.concurrency))
            # The other form would ask everything anew, so later starts keep the first one.
            form = _known_form(args) or args.form
            server = dataclasses.replace(server, form=await probe(client, form))
            log.info("%s, model %s, %s form", server.address, server.model, server.form)
            client.server = server
            moderation = None
            if args.moderation_url:
                judge = Server(
                    args.moderation_url,
                    args.moderation_model,
                    "moderation",
                    args.moderation_key_env,
                    args.timeout,
                )
                other = await stack.enter_async_context(Client(judge, allowance.concurrency))
                moderation = (other.post, judge)
            # After the probe: counting reads the whole file, and a wrong key shows in one call.
            total, dropped = source.count()
            about = _about(args, identity, server, settings)
            # Only a sample drops triples that rejected.jsonl does not have.
            if args.sample is not None:
                about["dropped"] = dropped
            # The same model at another address makes the same corpus, and a limit only cuts it.
            what = {n: v for n, v in about.items() if n not in ("base_url", "limit")}
            outputs = Outputs(args.output, what, total, postprocess.key_of)
            write_atomic(args.output / "run.json", json.dumps(about, indent=1))
            if args.canary_labels:
                # Now, because this run replaces the soda.jsonl whose rows the labels number.
                labels.keep(args.canary_labels, settings.canary, args.output)
            # The caps hold over all starts, so earlier calls count.
            limits = Limits(allowance, journal.tokens_spent())
            policy = RetryPolicy(tries=args.tries)
            gateway = Gateway(client.post, server, journal, limits, policy, moderation)
            progress = Progress(total, outputs.next, unit="triple")
            if outputs.next or len(journal):
                log.info("resuming: %d answers in the journal", len(journal))
            began = time.monotonic()

            def tick() -> None:
                progress.update(outputs.next, _note(gateway, time.monotonic() - began))

            try:
                works = distil.works(source.read(), settings)
                stopped = await run.run(works, gateway, outputs, tick=tick)
                seconds = time.monotonic() - began
                if stopped is None:
                    outputs.finish()
            finally:
                outputs.close()
                progress.finish()
        if stopped is not None:
            # As shells report a signal: 128 and its number.
            code = {"stopped by SIGINT": 130, "stopped by SIGTERM": 143}.get(stopped, 3)
            stopped = f"--{stopped}" if code == 3 else stopped  # the name of a cap
            log.warning(
                "%s. Answers in the journal: %d. Triples written to %s or rejected: %d. %s resumes",
                stopped,
                len(journal),
                args.output / "soda.jsonl.partial",
                outputs.next,
                "The same command with a higher cap" if code == 3 else "The same command",
            )
            return code
        _report(args, about, journal, gateway, seconds)
    return 0


def _report(
    args: argparse.Namespace,
    about: dict[str, Any],
    journal: Journal,
    gateway: Gateway,
    seconds: float,
) -> None:
    numbers, reasons = report.count_outputs(args.output)
    counts = gateway.counts
    retries = {name: n for name, n in sorted(counts.items()) if name.startswith("retried")}
    this_start = {
        "seconds": round(seconds, 1),
        "calls": counts["calls"],
        "calls_per_second": round(counts["calls"] / max(seconds, 1e-9), 1),
        "replayed": counts["replayed"],
        "most_at_once": gateway.limits.most_running,
        "concurrency": {
            "decreases": gateway.limits.concurrency.decreases,
            "least": gateway.limits.concurrency.least,
            "at_the_end": int(gateway.limits.concurrency.allowed),
        },
        "estimated_answers": counts["estimated"],  # their tokens are our own count
        "errors": counts["errors"],
        "retries": retries,
    }
    allowance = gateway.limits.allowance
    calls = report.calls_of(journal.spent(), (allowance.price_in, allowance.price_out))
    made = report.build(about, numbers, reasons, calls, this_start)
    report.write(args.output, made, plot=not args.no_plots)
    schema.write_parquet(args.output, wanted=not args.no_parquet)
    if not args.quiet:
        print(report.table(made))
        # Some may not exist: flags leave them out, and the plot needs matplotlib.
        names = ("soda.jsonl", "soda.parquet", "report.json", "report.png", "README.md")
        print(f"\n{args.output}:", ", ".join(n for n in names if (args.output / n).exists()))
    failed = sum(n for (_, reason), n in reasons.items() if reason.startswith("failed: "))
    if failed:
        log.warning("failed at the server: %d triples; the same command asks again", failed)


def _note(gateway: Gateway, seconds: float) -> str:
    """Return the part of the progress line that is about calls."""
    limits, counts = gateway.limits, gateway.counts
    allowance, allowed = limits.allowance, int(limits.concurrency.allowed)
    # Before a decrease the limit is the user's own number.
    of = f" of {allowed} allowed" if limits.concurrency.decreases else ""
    parts = [
        f"{limits.running} in flight{of}",
        f"{counts['calls'] / max(seconds, 1e-9):.0f} calls/s",
    ]
    parts.append(f"{limits.spent_in + limits.spent_out} tokens")
    if allowance.price_in or allowance.price_out:
        parts.append(f"cost {allowance.cost(limits.spent_in, limits.spent_out):.2f}")
    if retried := sum(n for name, n in counts.items() if name.startswith("retried")):
        parts.append(f"{retried} retries")
    return ", ".join([*parts, *(f"{name} {n}" for name, n in gateway.stages.most_common(3))])


def _settings(args: argparse.Namespace) -> postprocess.Settings:
    default = prompts.PUBLISHED if args.as_published else prompts.DEFAULT
    default = prompts.NO_CONTEXT if args.no_context else default
    try:
        texts = prompts.load(args.prompts or default)
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts={args.prompts}: {error}") from error
    # The published code makes two attempts.
    usual = 1 if args.as_published else 2
    return postprocess.Settings(
        seed=args.seed,
        prompts=texts,
        retries=usual if args.retries is None else args.retries,
        as_published=args.as_published,
        no_context=args.no_context,
        canary=labels.of_run(args.canary_labels, args.output) if args.canary_labels else None,
        ask_human=not args.no_human,
        ask_moderation=bool(args.moderation_url),
        # Without a triple there is nothing to ask about.
        ask_commonsense=not (args.no_commonsense or args.no_context),
    )


def _about(
    args: argparse.Namespace, identity: dict, server: Server, settings: postprocess.Settings
) -> dict[str, Any]:
    """Return the settings that decide the output, and its limit: `run.json`."""
    return {
        **identity,
        "limit": args.limit,
        "base_url": server.address,
        "model": server.model,
        "form": server.form,
        "body": secrets.body(server.extra_body),
        # Another version takes other answers out of the same journal.
        "answers": answer_text.VERSION,
        "prompts": settings.prompts.version,
        "retries": settings.retries,
        # Left out where false, as in the files of older runs.
        **({"as_published": True} if settings.as_published else {}),
        # With its hash, because other labels make another output.
        "canary": f"{path} ({labels.digest(path)})" if (path := args.canary_labels) else None,
        "moderation": args.moderation_model if args.moderation_url else None,
        "ask_human": settings.ask_human,
        "ask_commonsense": settings.ask_commonsense,
    }


def _check_earlier(args: argparse.Namespace) -> None:
    """Raise UserError for --as_published or --no_context where --output has a run of other ones.

    Its answers are of other prompts, so a second start in that folder would pay for all anew.
    """
    for name in ("prompts", "retries"):
        if args.as_published and getattr(args, name) is not None:
            raise UserError(f"--as_published sets --{name}: give one of the two")
    with contextlib.suppress(OSError, ValueError):
        earlier = json.loads((args.output / "run.json").read_text())
        for name in ("as_published", "no_context"):
            if earlier.get(name, False) != getattr(args, name):
                raise UserError(
                    f"--output={args.output} has a run "
                    f"{'with' if earlier.get(name, False) else 'without'} --{name}: start as that "
                    "run did, or give another folder"
                )


def _known_form(args: argparse.Namespace) -> str | None:
    """Return the form that an earlier start found for the same server and model."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        about = json.loads((args.output / "run.json").read_text())
        # Another server or model may offer another form.
        if (about["base_url"], about["model"]) == (secrets.address(args.base_url), args.model):
            return about["form"] if args.form == "auto" else None
    return None


def _source(args: argparse.Namespace) -> Source | NoTriples:
    """Return the source that the flags name. Raises UserError for flags that exclude each other."""
    shard = _shard(args.shard)
    if not args.no_context:
        if args.triples is None:
            raise UserError("give --triples, or --no_context")
        return Source(args.triples, args.critic, args.sample, args.limit, shard, args.seed)
    for name in ("triples", "critic", "sample", "as_published", "moderation_url", "canary_labels"):
        if getattr(args, name):
            raise UserError(f"--no_context goes without --{name}")
    if args.limit is None:
        raise UserError("--no_context needs --limit: how many dialogues (the paper's are 100)")
    return NoTriples(args.limit, shard, args.seed)


def _shard(text: str) -> tuple[int, int]:
    with contextlib.suppress(ValueError):
        index, count = (int(part) for part in text.split("/"))
        if 0 <= index < count:
            return index, count
    raise UserError(f"--shard={text}: give i/n with i from 0 to n-1, such as 0/8")
