"""All actions: what users do, each the same to both copies, and what each may change."""

from tests.play import actions_change, actions_copy, actions_run, actions_write
from tests.play.registry import ACTIONS

__all__ = ["ACTIONS", "actions_change", "actions_copy", "actions_run", "actions_write"]
