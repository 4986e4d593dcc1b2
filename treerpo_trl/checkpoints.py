"""The public place of what scripts use of [`~treerpo_trl.running.checkpoints`]: where a run goes on from."""

from .running.checkpoints import last_complete_checkpoint


__all__ = ["last_complete_checkpoint"]
