"""How `--help` shows defaults."""

import argparse


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Every default is shown, but for those that say nothing, and where the help says it itself."""

    def _get_help_string(self, action):
        nothing = action.default is None or action.default is False or action.default == ()
        if nothing or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)
