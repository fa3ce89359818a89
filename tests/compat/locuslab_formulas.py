"""What locuslab/deq computes, from the published formulas, in the plainest form.

Anderson: the bordered system of Walker & Ni (2011), solved densely for each sample. Broyden: the inverse
Jacobian itself, updated by Sherman and Morrison's formula (Broyden 1965). One norm over the batch, the traces
filled up with the lowest residual, and the numbers of steps as the authors count them.
"""

import math

import torch

INITIAL = 1e8


def anderson(f, x0, m=6, lam=1e-4, threshold=50, eps=1e-3, stop_mode="rel", beta=1.0):
    batch = len(x0)
    xs = [x0.reshape(batch, -1)]
    fs = [f(x0).reshape(batch, -1)]
    xs.append(fs[0])
    fs.append(f(fs[0].reshape_as(x0)).reshape(batch, -1))
    book = Book(stop_mode, eps, threshold, x0)
    for k in range(2, threshold):
        recent = slice(max(k - m, 0), k)
        following = torch.stack(
            [
                mixed([x[sample] for x in xs[recent]], [fx[sample] for fx in fs[recent]], lam, beta)
                for sample in range(batch)
            ]
        )
        xs.append(following)
        fs.append(f(following.reshape_as(x0)).reshape(batch, -1))
        absolute = (fs[-1] - xs[-1]).norm().item()
        book.note(k, xs[-1].reshape_as(x0), absolute, absolute / (1e-5 + fs[-1].norm().item()))
        if book.trace[stop_mode][-1] < eps:
            break
    return book.close(threshold - 2)


def mixed(xs, fs, lam, beta):
    """One sample's next iterate, from its recent x and f(x)."""
    residuals = torch.stack(fs) - torch.stack(xs)
    count = len(residuals)
    bordered = torch.zeros(count + 1, count + 1, dtype=residuals.dtype)
    bordered[0, 1:] = bordered[1:, 0] = 1
    bordered[1:, 1:] = residuals @ residuals.T + lam * torch.eye(count, dtype=residuals.dtype)
    right = torch.zeros(count + 1, dtype=residuals.dtype)
    right[0] = 1
    alpha = torch.linalg.solve(bordered, right)[1:]
    return alpha @ torch.stack(xs) + beta * (alpha @ residuals)


def broyden(f, x0, threshold, eps=1e-3, stop_mode="rel"):
    batch, entries = len(x0), x0[0].numel()
    inverse = -torch.eye(entries, dtype=x0.dtype).repeat(batch, 1, 1)
    x = x0.reshape(batch, -1)
    g = f(x0).reshape(batch, -1) - x
    book = Book(stop_mode, eps, threshold, x0)
    protection = (1e6 if stop_mode == "abs" else 1e3) * x0.shape[-1]
    for step in range(1, threshold + 1):
        s = -(inverse @ g[..., None])[..., 0]
        x = x + s
        before, g = g, f(x.reshape_as(x0)).reshape(batch, -1) - x
        absolute = g.norm().item()
        book.note(step, x.reshape_as(x0), absolute, absolute / ((g + x).norm().item() + 1e-9))
        trace = book.trace[stop_mode]
        if trace[-1] < eps:
            break
        if trace[-1] < 3 * eps and step > 30 and max(trace[-30:]) / min(trace[-30:]) < 1.3:
            break
        if trace[-1] > trace[0] * protection:
            book.prot_break = True
            break
        y = g - before
        row = (s[:, None] @ inverse)[:, 0]
        column = (s - (inverse @ y[..., None])[..., 0]) / (row * y).sum(1, keepdim=True)
        inverse = inverse + column[:, :, None] * row[:, None]
    return book.close(threshold + 1)


class Book:
    """What is kept of a solve."""

    def __init__(self, stop_mode, eps, threshold, x0):
        self.stop_mode, self.eps, self.threshold, self.result = stop_mode, eps, threshold, x0
        self.trace = {"abs": [], "rel": []}
        self.lowest = {"abs": INITIAL, "rel": INITIAL}
        self.nstep, self.prot_break = 0, False

    def note(self, step, x, absolute, relative):
        for mode, residual in (("abs", absolute), ("rel", relative)):
            self.trace[mode].append(residual)
            if residual < self.lowest[mode]:
                self.lowest[mode] = residual
                if mode == self.stop_mode:
                    self.result, self.nstep = x, step

    def close(self, length):
        padded = {
            mode: trace + [self.lowest[mode]] * (length - len(trace)) for mode, trace in self.trace.items()
        }
        assert all(math.isfinite(value) for trace in padded.values() for value in trace)
        return {
            "result": self.result,
            "lowest": self.lowest[self.stop_mode],
            "nstep": self.nstep,
            "prot_break": self.prot_break,
            "abs_trace": padded["abs"],
            "rel_trace": padded["rel"],
            "eps": self.eps,
            "threshold": self.threshold,
        }
