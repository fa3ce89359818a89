"""The authors' models, as functions of their state dicts: what a loaded model of ours is held against.

Written from Bai et al., arXiv 1909.01377 and 2006.08656, and Dai et al., arXiv 1901.02860, in plain PyTorch,
with the names and shapes of the authors' checkpoints. `*_weights` make random ones of that layout.
"""

import itertools

import torch
from torch.nn import functional


def convolution(weights, name, x, stride=1):
    """With weight normalisation where the checkpoint has a pair."""
    if f"{name}.weight_v" in weights:
        v = weights[f"{name}.weight_v"]
        weight = weights[f"{name}.weight_g"] * v / v.flatten(1).norm(dim=1).view(-1, *[1] * (v.dim() - 1))
    else:
        weight = weights[f"{name}.weight"]
    bias = weights.get(f"{name}.bias")
    if weight.dim() == 2:
        return x @ weight.T + (0 if bias is None else bias)
    if weight.dim() == 3:
        return functional.conv1d(x, weight, bias)
    return functional.conv2d(x, weight, bias, stride, weight.shape[-1] // 2)


def groupnorm(weights, name, x, groups):
    grouped = x.unflatten(1, (groups, -1)).flatten(2)
    mean, variance = grouped.mean(2, keepdim=True), grouped.var(2, correction=0, keepdim=True)
    normal = ((grouped - mean) / (variance + 1e-5).sqrt()).view(x.shape)
    if f"{name}.weight" not in weights:
        return normal
    return normal * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]


def batchnorm(weights, name, x):
    mean, variance = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
    normal = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    if f"{name}.weight" not in weights:
        return normal
    return normal * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]


# ---------------------------------------------------------------------------------------- multiscale


def mdeq_layer(weights, maps, injection, groups):
    """One evaluation of f on all resolutions."""
    count = len(maps)
    between = []
    for i, z in enumerate(maps):
        block = f"fullstage.branches.{i}.blocks.0"
        out = convolution(weights, f"{block}.conv1", z)
        out = groupnorm(weights, f"{block}.gn1", out, groups).relu()
        out = convolution(weights, f"{block}.conv2", out) + (injection if i == 0 else 0)
        out = groupnorm(weights, f"{block}.gn2", out, groups)
        between.append(groupnorm(weights, f"{block}.gn3", (out + z).relu(), groups))
    following = []
    for i in range(count):
        total = 0
        for j in range(count):
            y, net = between[j], f"fullstage.fuse_layers.{i}.{j}.net"
            for k in range(i - j):  # down
                y = convolution(weights, f"{net}.{k}.conv", y, stride=2)
                y = groupnorm(weights, f"{net}.{k}.gnorm", y, groups)
                y = y.relu() if k < i - j - 1 else y
            if j > i:  # up
                y = groupnorm(weights, f"{net}.gnorm", convolution(weights, f"{net}.conv", y), groups)
                y = y.repeat_interleave(2 ** (j - i), 2).repeat_interleave(2 ** (j - i), 3)
            total = total + y
        post = f"fullstage.post_fuse_layers.{i}"
        y = convolution(weights, f"{post}.conv", total.relu())
        following.append(groupnorm(weights, f"{post}.gnorm", y, groups // 2))
    return following


def mdeq_maps(weights, images, channels, groups, steps, downsamplings):
    """`steps` evaluations from zero."""
    x = images
    for place in (0, 3):
        stride = 2 if downsamplings > place // 3 else 1
        x = convolution(weights, f"downsample.{place}", x, stride)
        x = batchnorm(weights, f"downsample.{place + 1}", x).relu()
    if "stage0.0.weight" in weights:
        x = batchnorm(weights, "stage0.1", convolution(weights, "stage0.0", x)).relu()
    size = x.shape[2:]
    maps = [x.new_zeros(len(x), c, size[0] >> i, size[1] >> i) for i, c in enumerate(channels)]
    for _ in range(steps):
        maps = mdeq_layer(weights, maps, x, groups)
    return maps


def classified(weights, maps):
    """Logits from the maps."""

    def widened(i):
        name = f"incre_modules.{i}.0"
        y = maps[i]
        for k in (1, 2, 3):
            y = batchnorm(weights, f"{name}.bn{k}", convolution(weights, f"{name}.conv{k}", y))
            y = y.relu() if k < 3 else y
        shortcut = convolution(weights, f"{name}.downsample.0", maps[i])
        return (y + batchnorm(weights, f"{name}.downsample.1", shortcut)).relu()

    y = widened(0)
    for i in range(1, len(maps)):
        down = convolution(weights, f"downsamp_modules.{i - 1}.0", y, stride=2)
        y = widened(i) + batchnorm(weights, f"downsamp_modules.{i - 1}.1", down).relu()
    y = batchnorm(weights, "final_layer.1", convolution(weights, "final_layer.0", y)).relu()
    return y.mean((2, 3)) @ weights["classifier.weight"].T + weights["classifier.bias"]


def segmented(weights, maps):
    size = maps[0].shape[2:]
    raised = [functional.interpolate(y, size, mode="bilinear", align_corners=True) for y in maps[1:]]
    y = convolution(weights, "last_layer.0", torch.cat([maps[0], *raised], 1))
    y = batchnorm(weights, "last_layer.1", y).relu()
    return convolution(weights, "last_layer.3", y)


class Random(dict):
    """Random weights under the authors' names."""

    def convolve(self, name, inputs, outputs, *sizes, normal=False, bias=False):
        weight = 0.5 * torch.randn(outputs, inputs, *sizes, dtype=torch.float64) / inputs**0.5
        if normal:
            self[f"{name}.weight_g"] = 0.5 + torch.rand(outputs, *[1] * (1 + len(sizes)), dtype=torch.float64)
            self[f"{name}.weight_v"] = weight
        else:
            self[f"{name}.weight"] = weight
        if bias:
            self[f"{name}.bias"] = torch.randn(outputs, dtype=torch.float64)

    def normalise(self, name, channels, affine=True, batch=False):
        if affine:
            self[f"{name}.weight"] = 0.5 + torch.rand(channels, dtype=torch.float64)
            self[f"{name}.bias"] = torch.randn(channels, dtype=torch.float64)
        if batch:
            self[f"{name}.running_mean"] = 0.1 * torch.randn(channels, dtype=torch.float64)
            self[f"{name}.running_var"] = 0.5 + torch.rand(channels, dtype=torch.float64)
            self[f"{name}.num_batches_tracked"] = torch.tensor(7)


def mdeq_weights(channels, expansion, classes, head, final, *, downsamplings, post_affine, segments=False):
    w = Random()
    first, count = channels[0], len(channels)
    for place, inputs in ((0, 3), (3, first)):
        w.convolve(f"downsample.{place}", inputs, first, 3, 3)
        w.normalise(f"downsample.{place + 1}", first, batch=True)
    if downsamplings or count > 2:
        w.convolve("stage0.0", first, first, 1, 1)
        w.normalise("stage0.1", first, batch=True)
    for i, c in enumerate(channels):
        block = f"fullstage.branches.{i}.blocks.0"
        w.convolve(f"{block}.conv1", c, expansion * c, 3, 3, normal=True)
        w.normalise(f"{block}.gn1", expansion * c)
        w.convolve(f"{block}.conv2", expansion * c, c, 3, 3, normal=True)
        w.normalise(f"{block}.gn2", c)
        w.normalise(f"{block}.gn3", c)
        for j, of in enumerate(channels):
            net = f"fullstage.fuse_layers.{i}.{j}.net"
            if j > i:
                w.convolve(f"{net}.conv", of, c, 1, 1)
                w.normalise(f"{net}.gnorm", c)
            for k in range(i - j):
                to = c if k == i - j - 1 else of
                w.convolve(f"{net}.{k}.conv", of, to, 3, 3)
                w.normalise(f"{net}.{k}.gnorm", to)
        w.convolve(f"fullstage.post_fuse_layers.{i}.conv", c, c, 1, 1, normal=True)
        w.normalise(f"fullstage.post_fuse_layers.{i}.gnorm", c, affine=post_affine)
    if segments:
        total = sum(channels)
        w.convolve("last_layer.0", total, total, 1, 1, bias=True)
        w.normalise("last_layer.1", total, batch=True)
        w.convolve("last_layer.3", total, classes, 1, 1, bias=True)
        return dict(w)
    for i, (c, inner) in enumerate(zip(channels, head, strict=True)):
        name = f"incre_modules.{i}.0"
        w.convolve(f"{name}.conv1", c, inner, 1, 1)
        w.normalise(f"{name}.bn1", inner, affine=False, batch=True)
        w.convolve(f"{name}.conv2", inner, inner, 3, 3)
        w.normalise(f"{name}.bn2", inner, affine=False, batch=True)
        w.convolve(f"{name}.conv3", inner, 4 * inner, 1, 1)
        w.normalise(f"{name}.bn3", 4 * inner, affine=False, batch=True)
        w.convolve(f"{name}.downsample.0", c, 4 * inner, 1, 1)
        w.normalise(f"{name}.downsample.1", 4 * inner, batch=True)
        if i:
            w.convolve(f"downsamp_modules.{i - 1}.0", 4 * head[i - 1], 4 * inner, 3, 3, bias=True)
            w.normalise(f"downsamp_modules.{i - 1}.1", 4 * inner, batch=True)
    w.convolve("final_layer.0", 4 * head[-1], final, 1, 1, bias=True)
    w.normalise("final_layer.1", final, batch=True)
    w.convolve("classifier", final, classes, bias=True)
    return dict(w)


# --------------------------------------------------------------------------------------- transformer


def transformer_layer(weights, z, u, past, heads, pre_norm, window):
    """One evaluation of f: z `[B, D, T]`, u `[B, 3D, M + T]`, past `[B, D, M]`."""
    _batch, width, length = z.shape
    memory = past.shape[2]
    reach = memory + length
    distance = torch.arange(reach - 1, -1, -1, dtype=z.dtype)
    frequency = 1 / 10000 ** (torch.arange(0, width, 2, dtype=z.dtype) / width)
    angle = frequency[:, None] * distance
    positions = torch.cat([angle.sin(), angle.cos()])[None]

    def norm(x):
        return functional.layer_norm(x.transpose(1, 2), (width,)).transpose(1, 2)

    both = torch.cat([past, z], dim=2)
    product = convolution(weights, "func.dec_attn.qkv_net", norm(both) if pre_norm else both) + u
    q, k, v = (part.unflatten(1, (heads, -1)) for part in product.chunk(3, dim=1))
    q = q[..., memory:]
    r = convolution(weights, "func.dec_attn.r_net", positions)[0].unflatten(0, (heads, -1))
    content = torch.einsum("bndi,bndj->bnij", q + weights["func.dec_attn.r_w_bias"][:, :, None], k)
    place = torch.einsum("bndi,ndj->bnij", q + weights["func.dec_attn.r_r_bias"][:, :, None], r)
    query, key = torch.arange(length)[:, None] + memory, torch.arange(reach)
    column = (reach - 1 - (query - key)).clamp(max=reach - 1)  # of the distance between the two
    place = place.gather(3, column.expand_as(place))
    scores = (content + place) / q.shape[2] ** 0.5
    hidden = (key > query) | (key <= query - window)
    mixed = torch.einsum("bnij,bndj->bndi", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
    s = convolution(weights, "func.dec_attn.o_net", mixed.flatten(1, 2)) + z
    s = s if pre_norm else norm(s)

    inner = norm(s) if pre_norm else s
    out = convolution(weights, "func.pos_ff.ff1_net", inner.transpose(1, 2)).relu()
    out = convolution(weights, "func.pos_ff.ff2_net", out).transpose(1, 2) + inner
    return out if pre_norm else norm(out)


def embedded(weights, tokens, bounds, width):
    out = torch.zeros(*tokens.shape, width, dtype=torch.float64)
    for i, (low, high) in enumerate(itertools.pairwise(bounds)):
        chosen = (tokens >= low) & (tokens < high)
        vectors = weights[f"word_emb.emb_layers.{i}.weight"][tokens[chosen] - low]
        out[chosen] = vectors @ weights[f"word_emb.emb_projs.{i}.weight"].T
    return out * width**0.5


def log_prob(weights, hidden, bounds):
    """`[N, V]`: the head knows the clusters from the last to the first."""
    first, count = bounds[1], len(bounds) - 2
    weight = torch.cat([weights["crit.out_layers.0.weight"], weights["crit.cluster_weight"]])
    bias = torch.cat([weights["crit.out_layers.0.bias"], weights["crit.cluster_bias"]])
    head = (hidden @ weights["crit.out_projs.0.weight"] @ weight.T + bias).log_softmax(1)
    parts = [head[:, :first]]
    for i in range(1, count + 1):
        tail = hidden @ weights[f"crit.out_projs.{i}.weight"] @ weights[f"crit.out_layers.{i}.weight"].T
        tail = (tail + weights[f"crit.out_layers.{i}.bias"]).log_softmax(1)
        parts.append(head[:, first + count - i, None] + tail)
    return torch.cat(parts, dim=1)


def transformer_weights(bounds, width, heads, inner, div, normal=True):
    w = Random()
    for i, (low, high) in enumerate(itertools.pairwise(bounds)):
        entries = width // div**i
        w[f"word_emb.emb_layers.{i}.weight"] = torch.randn(high - low, entries, dtype=torch.float64)
        w.convolve(f"word_emb.emb_projs.{i}", entries, width)
    w.convolve("inject_conv", width, 3 * width, 1, bias=True)
    w["pos_emb.inv_freq"] = 1 / (10000 ** (torch.arange(0.0, width, 2.0) / width))
    w["func.dec_attn.r_w_bias"] = torch.randn(heads, width // heads, dtype=torch.float64)
    w["func.dec_attn.r_r_bias"] = torch.randn(heads, width // heads, dtype=torch.float64)
    w.convolve("func.dec_attn.qkv_net", width, 3 * width, 1, normal=normal)
    w.convolve("func.dec_attn.r_net", width, width, 1, normal=normal)
    w.convolve("func.dec_attn.o_net", width, width, 1, normal=normal, bias=True)
    w.convolve("func.pos_ff.ff1_net", width, inner, normal=normal, bias=True)
    w.convolve("func.pos_ff.ff2_net", inner, width, normal=normal, bias=True)
    count = len(bounds) - 2
    w["crit.cluster_weight"] = torch.randn(count, width, dtype=torch.float64)
    w["crit.cluster_bias"] = torch.randn(count, dtype=torch.float64)
    for i, (low, high) in enumerate(itertools.pairwise(bounds)):
        w[f"crit.out_layers.{i}.weight"] = w[f"word_emb.emb_layers.{i}.weight"]
        w[f"crit.out_layers.{i}.bias"] = torch.randn(high - low, dtype=torch.float64)
        if i:
            w[f"crit.out_projs.{i}.weight"] = w[f"word_emb.emb_projs.{i}.weight"]
        else:
            w.convolve(f"crit.out_projs.{i}", width, width)
    return dict(w)
