"""Count what a server does, in Prometheus's text format."""

from collections.abc import Callable

import prometheus_client
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})


class Metrics:
    """A registry of one application: two servers in a process share no count.

    `prefix` begins every name. Requests are counted by route, method and status.
    """

    def __init__(self, prefix: str = "cosmo"):
        self.prefix = prefix
        self.registry = prometheus_client.CollectorRegistry()
        labels = ["route", "method", "status"]
        self._requests = self.counter("requests", "Requests answered.", labels)
        self._seconds = self.histogram("request_seconds", "Time of a request.", ["route"])

    def counter(self, name: str, help: str, labels=()) -> prometheus_client.Counter:
        """Return a new counter."""
        return prometheus_client.Counter(
            f"{self.prefix}_{name}", help, labels, registry=self.registry
        )

    def histogram(
        self, name: str, help: str, labels=(), buckets=LATENCY_BUCKETS
    ) -> prometheus_client.Histogram:
        """Return a new histogram of seconds, or of what `buckets` count."""
        return prometheus_client.Histogram(
            f"{self.prefix}_{name}", help, labels, registry=self.registry, buckets=buckets
        )

    def gauge(
        self, name: str, help: str, read: Callable[[], float] | None = None
    ) -> prometheus_client.Gauge:
        """Return a new gauge; with `read` its value is asked for at every scrape."""
        made = prometheus_client.Gauge(f"{self.prefix}_{name}", help, registry=self.registry)
        if read is not None:
            made.set_function(read)
        return made

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request. `route` is one of the application's, so that labels stay few."""
        # A client may invent methods.
        method = method if method in METHODS else "other"
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """Return all values in Prometheus's text format."""
        return prometheus_client.generate_latest(self.registry)

    def route(self, path: str = "/metrics") -> Route:
        """Return the route that a Prometheus scrapes."""

        async def metrics(request: Request) -> Response:
            return Response(
                self.text(), headers={"content-type": prometheus_client.CONTENT_TYPE_LATEST}
            )

        return Route(path, metrics)
