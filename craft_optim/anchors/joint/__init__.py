"""Joint passes: anchors and task batch in one forward and one backward, with their gradients apart."""

from .joint_pass import JointPass, JointPassError

__all__ = ["JointPass", "JointPassError"]
