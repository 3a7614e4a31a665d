"""Make the headers of an HTML page: a policy that admits its own parts alone."""

from collections.abc import Sequence

ALWAYS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",  # browsers that do not know frame-ancestors
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


def policy(scripts: str, styles: str, further: Sequence[str] = (), forms: str = "'none'") -> str:
    """Return a Content-Security-Policy: nothing is loaded but what its arguments name.

    `scripts`, `styles` and `forms` are sources, `further` are whole directives.
    """
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {scripts}",
            f"style-src {styles}",
            "img-src data:",  # the icon
            *further,
            "base-uri 'none'",
            f"form-action {forms}",
            "frame-ancestors 'none'",
            # The browser refuses innerHTML and its kin, so that no text can become markup.
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )
