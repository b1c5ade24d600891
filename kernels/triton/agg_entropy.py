"""The entropy -1/S sum_i log q(z_i) of a weighted sum of posteriors, and its gradients: those of the joint
(agg_log_prob.py), all samples' upstream gradients being one number.
"""

from collections.abc import Sequence

from torch import Tensor

from ._launch import add_up, weight_of_each
from .agg_log_prob import agg_log_prob, joint_gradients
from .packing import Pairs
from .pair_gradients import new_gradients


def agg_entropy(pairs: Pairs, early_exit: bool, tf32x3: bool) -> Tensor:
    joint = agg_log_prob(pairs, early_exit, tf32x3)
    S = joint.shape[0]
    entropy = joint.new_empty(())
    add_up(joint.view(1, S, 1), [entropy], -weight_of_each(S))
    return entropy


def agg_entropy_backward(
    d_entropy: Tensor, pairs: Pairs, wanted: Sequence[bool], early_exit: bool, tf32x3: bool
) -> list[Tensor]:
    joint = agg_log_prob(pairs, early_exit, tf32x3)
    S = joint.shape[0]
    gradients = new_gradients(pairs, wanted)
    joint_gradients(gradients, d_entropy.expand(S), joint, pairs, early_exit, -weight_of_each(S))
    return [x for x in gradients if x is not None]
