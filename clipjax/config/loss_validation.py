"""Checks of a loss's config: field, value, rule, remedy."""

import dataclasses

from clipjax.config.loss import GroupRole, LossConfig, LossKind, SamePair
from clipjax.config.ranges import USED_BY
from clipjax.config.run import Config


def loss_errors(config: Config) -> list[str]:
    """Return what is wrong between the fields of the loss, a line each; their ranges hold already."""
    errors, loss, bias = [], config.loss, config.model.init_logit_bias
    if (loss.kind is LossKind.SIGMOID) != (bias is not None):
        errors.append(
            f"model.init_logit_bias={bias}: loss.kind=sigmoid needs a bias (arXiv 2303.15343 starts at -10, with "
            "model.init_logit_scale=10); softmax would ignore it, so leave it None there"
        )
    if loss.label_smoothing and loss.kind is not LossKind.SOFTMAX:
        errors.append(f"loss.label_smoothing={loss.label_smoothing}: only loss.kind=softmax has targets to smooth")
    if loss.label_smoothing and loss.same_pair is not SamePair.NONE:
        errors.append(f"loss.label_smoothing={loss.label_smoothing} needs loss.same_pair=none")
    errors += _loss_option_errors(config) + _two_captions_errors(config)
    size, batch = config.microbatch_size, config.global_batch_size
    if size is not None and size < 1:
        errors.append(f"microbatch_size={size} must be at least 1, or None for the whole batch")
    elif size is not None and batch % size:
        divisors = [n for n in range(1, batch + 1) if batch % n == 0]
        nearest = min(divisors, key=lambda n: abs(n - size))
        errors.append(f"microbatch_size={size} must divide global_batch_size={batch}; nearest: {nearest}")
    return errors


def _two_captions_errors(config: Config) -> list[str]:
    """Return what is not defined for an image with several captions."""
    loss, count = config.loss, config.data.captions_per_image
    undefined = {
        "loss.kind=global, which remembers one text of every sample": loss.kind is LossKind.GLOBAL,
        "model.caption, which predicts one text of every image": config.model.caption is not None,
        "loss.distill_from, whose teacher reads one text of every image": loss.distill_from is not None,
    }
    return [
        f"data.captions_per_image={count} is not defined with {what}; set it to 1, or leave that out"
        for what, is_there in undefined.items()
        if is_there and count > 1
    ]


def _loss_option_errors(config: Config) -> list[str]:
    """Return the options that exclude each other, or that the kind of loss would ignore."""
    errors, loss, default = [], config.loss, LossConfig()
    if loss.group_role is GroupRole.POSITIVE and (loss.same_pair is SamePair.NONE or loss.kind is LossKind.GLOBAL):
        errors.append(
            f"loss.group_role=positive needs loss.same_pair=index or caption (it is {loss.same_pair.value}) and "
            f"loss.kind=softmax or sigmoid (it is {loss.kind.value})"
        )
    if loss.distill_from is None and loss.distill_weight != default.distill_weight:
        errors.append(f"loss.distill_weight={loss.distill_weight} needs loss.distill_from, a clipjax checkpoint")
    if loss.distill_from is not None and not loss.distill_from:
        errors.append("loss.distill_from='' must name a clipjax checkpoint, or be None")
    if loss.distill_from is not None and loss.rho is not None:
        errors.append(f"loss.rho={loss.rho} would divide what is learned from loss.distill_from too; leave one out")
    if loss.gamma == 1 and loss.gamma_decay_examples:
        errors.append(f"loss.gamma_decay_examples={loss.gamma_decay_examples}: with loss.gamma=1 nothing decays")
    if loss.gamma_decay_examples > config.total_examples:
        errors.append(
            f"loss.gamma_decay_examples={loss.gamma_decay_examples} must not exceed "
            f"total_examples={config.total_examples}"
        )
    for item in dataclasses.fields(LossConfig):
        used_by, value = item.metadata.get(USED_BY, loss.kind), getattr(loss, item.name)
        if used_by is not loss.kind and value != getattr(default, item.name):
            errors.append(
                f"loss.{item.name}={value}: loss.kind={loss.kind.value} would ignore it; only {used_by.value} uses it"
            )
    return errors
