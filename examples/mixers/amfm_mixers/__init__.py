"""Mixers of amfm that no preset needs: `plugins: [examples/mixers/amfm_mixers]` registers them, or an installation."""

from amfm_mixers.spec import SPECS

__all__ = ["SPECS"]
