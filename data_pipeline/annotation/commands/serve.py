"""Serve a task to people: each judge gets a link, and every answer is on the disk before thanks.

Links are printed and kept in ANSWERS.judges.csv. A judge who returns continues, and so does a
server that is started again. /status shows the progress, on this machine alone.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from urllib.parse import urlsplit

from cosmo.engine.base.command_line import add_flags
from cosmo.engine.base.errors import UserError
from cosmo.engine.web import errors
from data_pipeline.annotation.serving import tokens
from data_pipeline.annotation.task_files import read_task

log = logging.getLogger("data_pipeline")

FLAGS = """
--task FILE!  the task
--answers FILE!  where the answers are appended
judges:
--judges A,B,C  their names, or a number N for judge-1 to judge-N (default: those of --tokens)
--judges_file FILE  their names, one a line
--tokens FILE  CSV of judge, token, link (default: ANSWERS.judges.csv; made where it is missing)
--per_judge N:int  items that a judge gets at most (default: all that are open)
--hold_minutes N=30.0  after so long an unanswered page is given to others
where:
--host ADDRESS=127.0.0.1  0.0.0.0 for other machines
--port N=8200  0 takes a free one
--address URL  links begin with it: that of a proxy with TLS, which has to keep the header Host
"""
MAX_PRINTED_LINKS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `annotate serve`."""
    parser.description = __doc__
    add_flags(parser, FLAGS)


def run_serve(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code."""
    errors.check_extra("annotate serve")
    from cosmo.engine.web import app, run
    from data_pipeline.annotation.serving import routes
    from data_pipeline.annotation.serving.study import Study

    if args.per_judge is not None and args.per_judge < 1:
        raise UserError(f"--per_judge={args.per_judge}: give 1 or more")
    if not 0 < args.hold_minutes < 1e6:
        raise UserError(f"--hold_minutes={args.hold_minutes}: give more than 0")
    proxy = urlsplit(args.address) if args.address else None
    if proxy and (proxy.scheme not in ("http", "https") or not proxy.hostname or proxy.path):
        raise UserError(f"--address={args.address}: give an address such as https://example.org")
    task = read_task(args.task)
    path = Path(args.tokens or f"{args.answers}.judges.csv")
    known = tokens.judges(path, _names(args))
    if args.hold_minutes * 60 <= task.min_seconds:
        raise UserError(f"--hold_minutes={args.hold_minutes}: the task wants {task.min_seconds} s")
    # Before the files are touched, so that a port in use changes nothing.
    listener = run.listen(args.host, args.port)
    study = Study(task, args.answers, hold_seconds=args.hold_minutes * 60, per_judge=args.per_judge)
    try:
        own = run.address(listener)
        base = args.address or own
        tokens.write_tokens(path, known, base)
        for one in study.quarantined[:5]:
            log.warning("set aside: %s:%d: %s", one.file, one.line, one.reason)
        if study.quarantined:
            log.warning("%d lines are set aside in %s.quarantined.jsonl: they do not count",
                        len(study.quarantined), args.answers)  # fmt: skip
        if not app.is_loopback(args.host) and not args.address:
            log.warning("--host=%s: links and answers cross the network unencrypted; put a proxy "
                        "with TLS in front, and give its --address", args.host)  # fmt: skip
        hosts = app.allowed_hosts(args.host)
        if hosts is not None and proxy:
            hosts |= {proxy.hostname}
        _print(args, study.status(known), known, base, own, path)
        run.serve(routes.application(study, known, hosts), listener=listener)
    finally:
        study.close()
    return 0


def _names(args: argparse.Namespace) -> list[str]:
    if args.judges and args.judges_file:
        raise UserError("give --judges or --judges_file, not both")
    if args.judges_file:
        return tokens.read_names(Path(args.judges_file))
    if not args.judges:
        return []
    if args.judges.isascii() and args.judges.isdigit():
        count = int(args.judges)
        if not 1 <= count <= tokens.MAX_JUDGES:
            raise UserError(f"--judges={args.judges}: give 1 to {tokens.MAX_JUDGES:,}")
        return [f"judge-{number}" for number in range(1, count + 1)]
    return tokens.checked([name.strip() for name in args.judges.split(",")])


def _print(args: argparse.Namespace, state: dict, known: dict, base: str, own: str, path) -> None:
    if args.quiet:
        return
    print(f"{args.task}: page {state['page']}, {state['answered']:,} of {state['wanted']:,} "
          f"answers, {len(known):,} judges, task {state['task']}")  # fmt: skip
    for judge, token in list(known.items())[:MAX_PRINTED_LINKS]:
        print(f"  {judge}: {tokens.link(base, token)}")
    print(f"links: {path}")
    print(f"status: {own}/status")
