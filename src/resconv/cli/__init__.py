"""The command line. Heavy imports happen inside the commands, so that help is instant."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run ``resconv``; errors meant for a user end as one panel and exit status 2."""
    from .signals import end_on_signals

    end_on_signals()
    try:
        from .app import app
    except ImportError as error:
        sys.exit(
            f"The command line needs {error.name}, which is not installed. Install it with: "
            "pip install 'resconv[all]'"
        )
    from .app import run_app

    sys.exit(run_app(app))
