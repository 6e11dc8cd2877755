"""The slow, obvious twin of GradRegOptimizer, written from the method and not from the code.

One parameter at a time, Python numbers for every scalar, a copy of everything:

    g1 = ∇L(θ)        d = clip(g1)        θ' = θ + ε·d        g2 = clip(∇L(θ'))        g = d + (γ/ε)·(g2 − d)

``combined`` is this formula for one gradient, ``curvature_along`` what it estimates, by double backward, and
``Reference`` takes whole steps, with groups and settings.
"""

import math

import torch


def norm(tensors):
    """‖x‖ over a list of tensors, summed in float64."""
    total = 0.0
    for tensor in tensors:
        wide = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
        total += wide.double().square().sum().item()
    return math.sqrt(total)


def inner(first, second):
    """⟨x, y⟩ over two lists of real tensors, summed in float64."""
    return sum((a.double() * b.double()).sum().item() for a, b in zip(first, second, strict=True))


def clip_factor(length, bound):
    """min(1, bound/(length + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it."""
    return 1.0 if bound is None else min(1.0, bound / (length + 1e-6))


def clipped(gradient, bound):
    """The gradient, shortened to ``bound``."""
    factor = clip_factor(norm(gradient), bound)
    return [factor * g.detach() for g in gradient]


def gradient_of(parameters, loss):
    """The gradient of ``loss`` at θ + distance·direction, as a function of both; the parameters are back at θ after it."""

    def gradient_at(direction=None, distance=0.0):
        start = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, along in zip(parameters, direction or [], strict=direction is not None):
                p += distance * along
        found = torch.autograd.grad(loss(), parameters)
        with torch.no_grad():
            for p, value in zip(parameters, start, strict=True):
                p.copy_(value)
        return list(found)

    return gradient_at


def combined(gradient_at, *, strength, eps, method="forward", g1_clip=None, g2_clip=None):
    """d + (γ/ε)·Δ: Δ = clip(g2) − d or, for "central", (clip(g₊) − clip(g₋))/2."""
    d = clipped(gradient_at(), g1_clip)
    ahead = clipped(gradient_at(d, eps), g2_clip)
    if method == "central":
        behind = clipped(gradient_at(d, -eps), g2_clip)
        delta = [(a - b) / 2 for a, b in zip(ahead, behind, strict=True)]
    else:
        delta = [a - b for a, b in zip(ahead, d, strict=True)]
    return [a + strength / eps * x for a, x in zip(d, delta, strict=True)]


def curvature_along(parameters, loss, bound=None):
    """d = clip(∇L) and H·d, the second derivative along it: by double backward, and no difference of anything."""
    gradient = torch.autograd.grad(loss(), parameters, create_graph=True)
    d = clipped(gradient, bound)
    product = torch.autograd.grad(sum((g * x).sum() for g, x in zip(gradient, d, strict=True)), parameters)
    return d, list(product)


class Reference:
    """Takes the regularized step with a bare optimizer; a group may bring its own strength, eps or radius."""

    def __init__(
        self,
        optimizer,
        *,
        strength=1e-3,
        eps=1e-3,
        radius=None,
        warmup_steps=0,
        factor=lambda step: 1.0,
        g1_clip=10.0,
        g2_clip=10.0,
        max_penalty_ratio=None,
        excluded=(),
    ):
        self.optimizer = optimizer
        self.warmup_steps, self.factor = warmup_steps, factor
        self.g1_clip, self.g2_clip, self.max_penalty_ratio = g1_clip, g2_clip, max_penalty_ratio
        self.taken, self.skipped, self.metrics = 0, 0, {}
        self.groups = []  # (strength, eps, radius) of each group
        self.settings = []  # (parameter, strength, eps, radius) of each parameter that can be regularized
        for group in optimizer.param_groups:
            own_strength = group.get("gradreg_strength", strength)
            own_eps, own_radius = eps, radius
            if "gradreg_eps" in group:
                own_eps, own_radius = group["gradreg_eps"], None
            if "gradreg_radius" in group:
                own_eps, own_radius = None, group["gradreg_radius"]
            self.groups.append((own_strength, own_eps, own_radius))
            for parameter in group["params"]:
                if not any(parameter is other for other in excluded):
                    self.settings.append((parameter, own_strength, own_eps, own_radius))

    @torch.no_grad()
    def step(self, closure):
        """One step; returns the loss at θ."""
        factor = 0.0 if self.taken < self.warmup_steps else self.factor(self.taken)
        self.taken += 1
        active = [(p, strength * factor, eps, radius) for p, strength, eps, radius in self.settings if strength * factor > 0]
        parameters = [p for p, _, _, _ in active]
        everything = [p for group in self.optimizer.param_groups for p in group["params"]]

        random = torch.get_rng_state()
        with torch.enable_grad():
            loss = closure()
        if not active:
            self.optimizer.step()
            return loss
        first = {p: None if p.grad is None else p.grad.clone() for p in everything}
        g1 = [torch.zeros_like(p) if first[p] is None else first[p] for p in parameters]
        g1_norm = norm(g1)
        if not math.isfinite(g1_norm):
            self.skipped += 1
            self.optimizer.step()
            return loss
        d = [clip_factor(g1_norm, self.g1_clip) * g for g in g1]
        length = norm(d)

        eps = [fixed if radius is None else (radius / length if length > 0 else 0.0) for _, _, fixed, radius in active]
        theta = [p.clone() for p in parameters]
        for p, step, along in zip(parameters, eps, d, strict=True):
            p += step * along
        moved = [p - start for p, start in zip(parameters, theta, strict=True)]
        after = torch.get_rng_state()
        torch.set_rng_state(random)
        with torch.enable_grad():
            closure()
        torch.set_rng_state(after)
        reached = [p.grad is not None for p in parameters]
        g2 = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        for p, start in zip(parameters, theta, strict=True):
            p.copy_(start)
        for p in everything:  # excluded parameters, and groups of strength 0, are updated with g1
            p.grad = first[p]

        g2_norm = norm(g2)
        if math.isfinite(g2_norm):
            g2 = [clip_factor(g2_norm, self.g2_clip) * g for g in g2]
            delta = [b - a for a, b in zip(d, g2, strict=True)]
            weight = [strength / step if step > 0 else 0.0 for (_, strength, _, _), step in zip(active, eps, strict=True)]
            penalty = [w * x for w, x in zip(weight, delta, strict=True)]
            if self.max_penalty_ratio is not None and norm(penalty) > self.max_penalty_ratio * length:
                penalty = [x * (self.max_penalty_ratio * length / norm(penalty)) for x in penalty]
        else:
            self.skipped += 1
            penalty = None
        for i, p in enumerate(parameters):
            if penalty is None:
                p.grad = None if first[p] is None else d[i]
            elif first[p] is not None or reached[i]:
                p.grad = d[i] + penalty[i]
        self.optimizer.step()

        if penalty is not None and length > 0 and not any(p.is_complex() for p in parameters):
            leading = next(group for group in self.groups if group[0] > 0)
            along = [step * x for step, x in zip(eps, d, strict=True)]
            self.metrics = {
                "g1_norm": g1_norm,
                "g2_norm": g2_norm,
                "penalty_ratio": norm(penalty) / length,
                "curvature": sum(inner([x], [y]) / e for x, y, e in zip(d, delta, eps, strict=True)) / length**2,
                "cosine": inner(d, g2) / (length * norm(g2)),
                "perturbation_fidelity": inner(moved, along) / norm(along) ** 2,
                "strength": leading[0] * factor,
                "eps": leading[1] if leading[2] is None else leading[2] / length,
            }
        return loss
